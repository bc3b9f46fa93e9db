"""The arguments of a policy loss, checked: its objective, its columns, its KL and entropy terms."""

import functools
import inspect
import sys
from collections.abc import Collection
from typing import Any, get_args

import torch
from torch import Tensor

from rlkernels import checks
from rlkernels.losses.kl_term import EXACT, KLS, KLTerm, exact_kind
from rlkernels.losses.row_options import ROW_KINDS, RowChoice, row_choice
from rlkernels.objectives import OBJECTIVES, Objective, registered
from rlkernels.sequences import per_token
from rlkernels.types import (
    KL,
    ExactKL,
    Number,
    ObjectiveLike,
    ObjectiveOption,
    PerToken,
    PerTokenOrSequence,
    RatioLevel,
)

ARGUMENTS = {
    "old_logp": "old_logprobs",
    "ref_logp": "ref_logprobs",
    "rollout_logp": "rollout_logprobs",
    "advantage": "advantages",
}
"""From a column of a policy objective to the argument that fills it. Any other column is a keyword of its own name."""
LOG_PROBABILITIES = tuple(name for name in ARGUMENTS if name != "advantage")
"""The columns that are log-probabilities of the tokens, of which a sequence has a sum and a mean."""
OF_KL = "rlkernels.objectives.kl"
"""The module of the KL estimators, which are terms and no objectives, although one has the old policy, too."""
ROW = "the entropy of its row"
"""Stands for the entropy of each row of logits, which such a loss computes itself."""
RATIO_LEVELS = get_args(RatioLevel)


def resolve(
    caller: str, objective: ObjectiveLike, keywords: dict[str, Number | PerToken], like: Tensor
) -> tuple[Objective, list[Number], dict[str, PerToken]]:
    """Returns the registered objective, the values of its parameters in its order, and its further columns by name.

    ``keywords``: parameters and further columns. ``like``: a tensor on the device of the data.
    """
    entry = registered(objective)
    if entry is None or not _is_policy(entry):
        known = [name for name, entry in OBJECTIVES.items() if _is_policy(entry)]
        checks.choice(caller, "objective", objective, [*known, *ROW_KINDS])
    own_names(caller, entry)
    params, further = divided(entry, keywords, ARGUMENTS)
    return entry, checks.params(caller, entry.function.__name__, entry, params, like), further


def own_names(caller: str, entry: Objective, shared: str = "") -> None:
    """Refuses an objective one of whose parameters has the name of an argument of the loss.

    The loss would take the number, and the objective its default. ``shared``: an argument that goes to the objective.
    """
    if entry.ours:
        return  # a test holds our own to it, and the question takes a microsecond of each call
    # Not in a compiled program, because Dynamo cannot trace a signature.
    if torch.compiler.is_compiling() or _arguments(caller).isdisjoint(entry.params):
        return
    for name in entry.params:
        if name in _arguments(caller) and name != shared:
            raise ValueError(
                f"{caller}: parameter {name!r} of objective {entry.function.__name__!r} has the name of an argument of "
                f"{caller}; rename it"
            )


@functools.cache
def _arguments(caller: str) -> frozenset[str]:
    """Returns the names of the arguments of a public function, without those that it hands to an objective."""
    found = inspect.signature(getattr(sys.modules["rlkernels"], caller)).parameters.values()
    return frozenset(x.name for x in found if x.kind is not x.VAR_KEYWORD)


def divided(
    entry: Objective, keywords: dict[str, Any], arguments: Collection[str]
) -> tuple[dict[str, Number], dict[str, PerToken]]:
    """Divides a caller's keywords into parameters of an objective and columns that no argument fills.

    ``arguments``: the columns that an argument fills.
    """
    names = keywords and [name for name in entry.columns[1:] if name in keywords and name not in arguments]
    if not names:
        return keywords, {}
    further: dict[str, Any] = {name: keywords[name] for name in names}  # column() refuses what is no tensor
    return {k: x for k, x in keywords.items() if k not in names}, further


def resolve_either(
    caller: str,
    objective: ObjectiveLike,
    params: dict[str, ObjectiveOption],
    like: Tensor,
    cu_seqlens: Tensor | None,
    ratio_level: RatioLevel,
    advantages: PerTokenOrSequence | None,
    ref_logprobs: PerToken | None,
) -> tuple[Objective, list[Number], dict[str, PerToken], RowChoice | None]:
    """Returns what ``resolve`` does, and the RowChoice of an objective of sequences, groups or batches, or None.

    The Objective of such a one has its columns and, for the metrics, the widths of its clip. It is not registered.
    """
    if not isinstance(objective, str) or objective not in ROW_KINDS:
        return *resolve(caller, objective, params, like), None
    choice = row_choice(caller, objective, params, like, cu_seqlens, ratio_level, advantages, ref_logprobs)
    widths = list(choice.clip_widths())
    entry = Objective(row_choice, choice.kind.columns, ("clip_low", "clip_high")[: len(widths)], None)
    return entry, widths, {}, choice


def _is_policy(entry: Objective) -> bool:
    """Tells whether an objective has the columns of a policy objective: an advantage, or a behaviour policy."""
    columns = entry.columns
    # Written out, because a generator takes a microsecond of each call.
    return (
        columns[0] == "logp"
        and entry.function.__module__ != OF_KL
        and ("advantage" in columns or "old_logp" in columns or "rollout_logp" in columns)
    )


def objective_columns(
    caller: str,
    entry: Objective,
    like: Tensor,
    old_logprobs: PerToken | None,
    advantages: PerTokenOrSequence | None,
    ref_logprobs: PerToken | None,
    rollout_logprobs: PerToken | None,
    further: dict[str, PerToken],
    cu_seqlens: Tensor | None,
    ratio_level: RatioLevel,
    engine_read: bool = False,
) -> list[Any]:
    """Returns the columns that the objective takes after ``logp``, shaped like the log-probabilities ``like``.

    None stands for the current policy in the place of ``old_logp``.

    ``further``: the columns that the caller passed by their names. ``engine_read``: whether another option reads
    ``rollout_logprobs``.
    """
    if type(ratio_level) is not str or ratio_level != "token":
        checks.choice(caller, "ratio_level", ratio_level, RATIO_LEVELS)
    if ratio_level != "token" and not any(name in entry.columns for name in LOG_PROBABILITIES):
        raise ValueError(
            f"{caller}: ratio_level={ratio_level!r} needs an objective of a ratio; this one has columns "
            f"{', '.join(entry.columns)}"
        )
    if rollout_logprobs is not None and not engine_read and "rollout_logp" not in entry.columns:
        raise ValueError(
            f"{caller}: objective {entry.function.__name__!r} has no column 'rollout_logp', so that rollout_logprobs "
            "would have no effect; leave it out, or pass a correction, which reads it"
        )
    if advantages is not None and "advantage" not in entry.columns:
        raise ValueError(
            f"{caller}: objective {entry.function.__name__!r} has no column 'advantage', so that advantages would have "
            "no effect; pass None"
        )
    inputs = {
        "old_logp": old_logprobs,
        "advantage": advantages,
        "ref_logp": ref_logprobs,
        "rollout_logp": rollout_logprobs,
    }
    columns: list[Any] = []
    for name in entry.columns[1:]:
        argument = ARGUMENTS.get(name, name)
        x = inputs[name] if name in inputs else further.get(name)
        # One number per token, plainly. With offsets an advantage might be one per sequence.
        if checks.fits(x, like, like.dtype) and (cu_seqlens is None or name != "advantage"):
            columns.append(x)
            continue
        if x is None and name == "old_logp":
            columns.append(None)  # the current policy, which the loss knows
            continue
        if x is None and name != "advantage":
            raise ValueError(missing_column(caller, entry, name, argument))
        if name == "advantage":
            checks.floating(caller, argument, x)
            x = per_token(caller, argument, x, like, cu_seqlens)
        columns.append(column(caller, argument, x, like))
    return columns


def missing_column(caller: str, entry: Objective, name: str, argument: str) -> str:
    """Returns the message for a column that the caller did not pass."""
    if name == argument and name in _arguments(caller):
        instead = f"{caller} has an argument of that name, so rename the column"
    else:
        instead = f"pass {argument}=, a floating point tensor with one number for each element of the loss"
    return f"{caller}: objective {entry.function.__name__!r} needs a column {name!r}; {instead}"


def column(caller: str, name: str, x: Tensor | None, like: Tensor, like_name: str = "logprobs") -> Tensor:
    """Returns an input without gradient, refused unless it is shaped like ``like``, whose dtype has been checked."""
    if checks.fits(x, like, like.dtype):
        return x
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
    kl: KL | ExactKL | KLTerm,
    kl_coef: Number,
    entropy: PerToken | str | None,
    entropy_coef: Number,
    reference: tuple[str, Tensor | None] | None = None,
) -> tuple[Number | None, Number | None]:
    """Checks the KL and the entropy term; returns their two coefficients, None where a term takes no part.

    ``entropy``: the caller's entropies, or ``ROW`` for those of the rows of logits. ``reference``: the name and the
    value of the argument by which a loss over rows takes the reference's rows.
    """
    if ref_logprobs is None and entropy is None and type(kl) is str and kl in KLS:
        # Nothing given: asked first, because the other questions take four microseconds of each call. By type, because
        # a tensor on a device is not read.
        if type(kl_coef) is float and kl_coef == 0 and type(entropy_coef) is float and entropy_coef == 0:
            return None, None
    exact = exact_kind(kl)
    if exact is None and not isinstance(kl, KLTerm):
        checks.choice(caller, "kl", kl, KLS if reference is None else KLS + EXACT)
    if exact is not None and reference is None:
        raise ValueError(
            f"{caller}: kl={exact!r} needs whole rows of logits; call logits_policy_loss or linear_policy_loss"
        )
    kl_coef, entropy_coef = (
        _coefficient(caller, "kl_coef", kl_coef, like),
        _coefficient(caller, "entropy_coef", entropy_coef, like),
    )
    name, rows = ("", None) if reference is None else reference
    if exact is not None and kl_coef is not None and rows is None:
        raise ValueError(f"{caller}: kl={exact!r} needs {name} where kl_coef is not 0")
    if exact is None and rows is not None and ref_logprobs is not None:
        raise ValueError(f"{caller}: ref_logprobs and {name} both give the reference; pass one of them")
    if exact is None and kl_coef is not None and ref_logprobs is None and rows is None:
        name = kl.estimator if isinstance(kl, KLTerm) else kl
        raise ValueError(f"{caller}: kl={name!r} needs ref_logprobs where kl_coef is not 0")
    if ref_logprobs is not None:
        column(caller, "ref_logprobs", ref_logprobs, like)
    if entropy_coef is not None and entropy is None:
        raise ValueError(f"{caller}: entropy_coef needs entropy")
    if entropy is not None and entropy is not ROW:
        checks.floating(caller, "entropy", entropy)
        checks.shape(caller, "entropy", entropy, like.shape)
        checks.one_device(caller, "logprobs", like, entropy=entropy)
    return kl_coef, entropy_coef
