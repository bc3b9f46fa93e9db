"""The arguments of a policy loss, checked: its objective, its columns, its KL and entropy terms."""

from typing import get_args

import torch
from torch import Tensor

from rlkernels import checks
from rlkernels.losses.row_options import ROW_KINDS, RowChoice, row_choice
from rlkernels.objectives import OBJECTIVES, Objective
from rlkernels.sequences import per_token
from rlkernels.types import KL, Number, ObjectiveOption, PerToken, PerTokenOrSequence, RatioLevel

DEFAULTS = {
    "ppo_clip": {"clip_low": 0.2, "clip_high": 0.2},
    "dual_clip": {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0},
    "sapo": {"tau_pos": 1.0, "tau_neg": 1.05},
}
"""Per objective, the parameters that papers and trainers agree on.

CISPO's bounds are not among them, because three conventions are in use.
"""
ROW = "the entropy of its row"
"""Stands for the entropy of each row of logits, which such a loss computes itself."""
RATIO_LEVELS, KLS = get_args(RatioLevel), get_args(KL)


def resolve(caller: str, objective: str, params: dict[str, Number], like: Tensor) -> tuple[Objective, list[Number]]:
    """Returns the registered objective and the values of its parameters, in the objective's order.

    ``like``: a tensor on the device of the data.
    """
    entry = OBJECTIVES.get(objective) if isinstance(objective, str) else None
    if entry is None or not _is_policy(entry):
        known = [name for name, entry in OBJECTIVES.items() if _is_policy(entry)]
        checks.choice(caller, "objective", objective, [*known, *ROW_KINDS])
    return entry, checks.params(caller, objective, entry, params, DEFAULTS, like)


def resolve_either(
    caller: str,
    objective: str,
    params: dict[str, ObjectiveOption],
    like: Tensor,
    cu_seqlens: Tensor | None,
    ratio_level: RatioLevel,
    advantages: PerTokenOrSequence | None,
    ref_logprobs: PerToken | None,
) -> tuple[Objective, list[Number], RowChoice | None]:
    """Returns what ``resolve`` does, and the RowChoice of an objective of sequences, groups or batches, or None.

    The Objective of such a one has its columns and, for the metrics, the widths of its clip. It is not registered.
    """
    choice = row_choice(caller, objective, params, like, cu_seqlens, ratio_level, advantages, ref_logprobs)
    if choice is None:
        return *resolve(caller, objective, params, like), None
    widths = list(choice.clip_widths())
    return Objective(row_choice, choice.kind.columns, ("clip_low", "clip_high")[: len(widths)], None), widths, choice


def _is_policy(entry: Objective) -> bool:
    """Tells whether an objective has the columns of a policy objective."""
    # One without an advantage is refused, because it would ignore the caller's in silence.
    return entry.columns[0] == "logp" and "advantage" in entry.columns


def objective_columns(
    caller: str,
    entry: Objective,
    like: Tensor,
    old_logprobs: PerToken | None,
    advantages: PerTokenOrSequence,
    cu_seqlens: Tensor | None,
    ratio_level: RatioLevel,
) -> list[Tensor]:
    """Returns the columns that the objective takes after ``logp``, shaped like the log-probabilities ``like``."""
    checks.choice(caller, "ratio_level", ratio_level, RATIO_LEVELS)
    if ratio_level != "token" and "old_logp" not in entry.columns:
        raise ValueError(
            f"{caller}: ratio_level={ratio_level!r} needs an objective of a ratio; this one has columns "
            f"{', '.join(entry.columns)}"
        )
    inputs = {"old_logp": ("old_logprobs", old_logprobs), "advantage": ("advantages", advantages)}
    columns = []
    for name in entry.columns[1:]:
        if name not in inputs:
            raise ValueError(
                f"{caller}: the objective needs a column {name!r}, which {caller} has no argument for; "
                "compute it with plain torch, or "
                "write the objective without that column"
            )
        argument, x = inputs[name]
        if name == "advantage":
            checks.floating(caller, argument, x)
            x = per_token(caller, argument, x, like, cu_seqlens)
        columns.append(column(caller, argument, x, like))
    return columns


def column(caller: str, name: str, x: Tensor | None, like: Tensor, like_name: str = "logprobs") -> Tensor:
    """Returns an input without gradient, refused unless it is shaped like ``like``."""
    checks.floating(caller, name, x)
    checks.shape(caller, name, x, like.shape)
    checks.no_gradient(caller, **{name: x})
    checks.one_device(caller, like_name, like, **{name: x})
    return x


def present(coefficient: Number) -> bool:
    """Tells whether a term takes part in a loss.

    A tensor may hold a 0, which only the device knows. Its term is computed and weighs nothing.
    """
    return isinstance(coefficient, torch.Tensor) or coefficient != 0


def _coefficient(caller: str, name: str, x: Number, like: Tensor) -> Number | None:
    """Returns a coefficient as a number or a tensor, None where its term takes no part."""
    if type(x) is not float or x != 0:
        x = checks.coefficient(checks.finite, caller, name, x, like)
    return x if present(x) else None


def check_terms(
    caller: str,
    like: Tensor,
    ref_logprobs: PerToken | None,
    kl: KL,
    kl_coef: Number,
    entropy: PerToken | str | None,
    entropy_coef: Number,
) -> tuple[Number | None, Number | None]:
    """Checks the KL and the entropy term; returns their two coefficients, None where a term takes no part.

    ``entropy``: the caller's entropies, or ``ROW`` for those of the rows of logits.
    """
    checks.choice(caller, "kl", kl, KLS)
    kl_coef, entropy_coef = (
        _coefficient(caller, "kl_coef", kl_coef, like),
        _coefficient(caller, "entropy_coef", entropy_coef, like),
    )
    if kl_coef is not None and ref_logprobs is None:
        raise ValueError(f"{caller}: kl={kl!r} needs ref_logprobs where kl_coef is not 0")
    if ref_logprobs is not None:
        column(caller, "ref_logprobs", ref_logprobs, like)
    if entropy_coef is not None and entropy is None:
        raise ValueError(f"{caller}: entropy_coef needs entropy")
    if entropy is not None and entropy is not ROW:
        checks.floating(caller, "entropy", entropy)
        checks.shape(caller, "entropy", entropy, like.shape)
        checks.one_device(caller, "logprobs", like, entropy=entropy)
    return kl_coef, entropy_coef
