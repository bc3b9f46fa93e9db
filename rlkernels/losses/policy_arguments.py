"""The parts of a policy loss: its objective and state, which tokens live, and what each token weighs in each term."""

from typing import NamedTuple

import torch

from rlkernels import checks
from rlkernels.aggregation import token_mean, weights_for
from rlkernels.backends.protocol import real_dtype
from rlkernels.checks import tokens as checks_tokens
from rlkernels.objectives import OBJECTIVES
from rlkernels.sequences import per_token

DEFAULTS = {
    "ppo_clip": {"clip_low": 0.2, "clip_high": 0.2},
    "dual_clip": {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0},
    "sapo": {"tau_pos": 1.0, "tau_neg": 1.05},
}
"""Parameters that the papers and trainers agree on. CISPO's bounds are not among them: three conventions are in use."""
ROW = "the entropy of its row"
RATIO_LEVELS = ("token", "sequence", "sequence_token", "sequence_sum")


def resolve(where, objective, params, like):
    """The registered objective and the values of its parameters, in order; ``like``: a tensor on the device of the
    data.
    """
    entry = OBJECTIVES.get(objective) if isinstance(objective, str) else None
    if entry is None or not _is_policy(entry):
        checks.choice(where, "objective", objective, [name for name, entry in OBJECTIVES.items() if _is_policy(entry)])
    return entry, checks.params(where, objective, entry, params, DEFAULTS, like)


def _is_policy(entry):
    # Without an advantage it is no policy objective: the caller's would be ignored in silence.
    return entry.columns[0] == "logp" and "advantage" in entry.columns


class Share(NamedTuple):
    """The weight of a token in a weighted sum: ``weight`` (None: 1; bool: 1 or 0) times ``share``, divided by the count
    ``total``.
    """

    weight: torch.Tensor | None
    total: torch.Tensor | None = None
    share: float = 1.0


def live_tokens(where, like, mask):
    """The mask as bool, shaped like ``like``."""
    return every_token(like, some_tokens(where, like, mask))


def every_token(like, live):
    """The result of ``some_tokens`` as a tensor in any case."""
    return (
        torch.ones_like(like, dtype=torch.bool, requires_grad=False, memory_format=torch.contiguous_format)
        if live is None
        else live
    )


def some_tokens(where, like, mask):
    """The mask as bool; None where all tokens live."""
    checks.mask(where, mask, like.shape)
    checks.one_device(where, "logprobs", like, mask=mask)
    # Contiguous: torch's sums follow strides, and a metric would have other last bits.
    return mask if mask is None else mask.contiguous() if mask.dtype == torch.bool else (mask != 0).contiguous()


def _is_token_mean(aggregation, weights, cu_seqlens, normalizers):
    """Tell whether the weights are those of a plain mean over the live tokens."""
    return weights is None and aggregation == "token-mean" and not normalizers and cu_seqlens is None


def state(where, entry, like, old_logprobs, advantages, cu_seqlens, ratio_level):
    """The columns that the objective names after ``logp``, shaped like the log-probabilities ``like``."""
    checks.choice(where, "ratio_level", ratio_level, RATIO_LEVELS)
    if ratio_level != "token" and "old_logp" not in entry.columns:
        raise ValueError(
            f"{where}: ratio_level={ratio_level!r} needs an objective of a ratio; this one has columns "
            f"{', '.join(entry.columns)}"
        )
    given = {"old_logp": ("old_logprobs", old_logprobs), "advantage": ("advantages", advantages)}
    columns = []
    for name in entry.columns[1:]:
        if name not in given:
            raise ValueError(
                f"{where}: the objective needs a column {name!r}, which {where} has no argument for; "
                "compute it with plain torch, or "
                "write the objective without that column"
            )
        argument, x = given[name]
        if name == "advantage":
            checks.floating(where, argument, x)
            x = per_token(where, argument, x, like, cu_seqlens)
        columns.append(column(where, argument, x, like))
    return columns


def column(where, name, x, like, like_name="logprobs"):
    """A per-token input without gradient, shaped like ``like``."""
    checks.floating(where, name, x)
    checks.shape(where, name, x, like.shape)
    checks.no_gradient(where, **{name: x})
    checks.one_device(where, like_name, like, **{name: x})
    return x


def of_sums(aggregation, weights):
    """The aggregation where there is one loss per sequence: the mean of losses is that over sequences."""
    return "seq-mean" if aggregation == "token-mean" and weights is None else aggregation


def term_weights(where, like, live, aggregation, weights, cu_seqlens, normalizers):
    """The weight of each token in every term of a loss: objective, KL and entropy alike; 0 on dead tokens.

    ``cu_seqlens``: of ``checks.tokens.rows``.

    One vector for all terms, because each must be the same whether a batch comes whole or in micro-batches.
    """
    checks.one_device(where, "logprobs", like, weights=weights)
    real = real_dtype(like.dtype)
    if weights is not None:
        if aggregation != "token-mean" or normalizers:
            raise ValueError(
                f"{where}: weights and aggregation={aggregation!r} both decide the weights; pass one of them"
            )
        column(where, "weights", weights, like)
        return checks_tokens.tied(torch.where(live, weights.to(real), 0.0), cu_seqlens)
    if _is_token_mean(aggregation, weights, cu_seqlens, normalizers):
        return token_mean(where, live, real)
    weights = weights_for(
        where, live, aggregation, cu_seqlens=cu_seqlens, dtype=real, **checks_tokens.keywords(where, normalizers)
    )
    checks.no_forward_ad(where, weights)  # of a normaliser
    return weights


def share_of(where, like, live, aggregation, weights, cu_seqlens, normalizers):
    """``term_weights`` as what a weighted loss takes; ``live``: what ``some_tokens`` found.

    A plain mean stays a mask and its count: the loss's own launch divides.
    """
    if _is_token_mean(aggregation, weights, cu_seqlens, normalizers):
        checks_tokens.rows(where, "mask", like, None)
        return Share(None, None, 1.0 / max(like.numel(), 1)) if live is None else Share(live, live.sum())
    return Share(term_weights(where, like, every_token(like, live), aggregation, weights, cu_seqlens, normalizers))


def present(coefficient):
    """Tell whether a term takes part.

    A tensor may hold a 0, which only the device knows: its term is made, and weighs nothing.
    """
    return isinstance(coefficient, torch.Tensor) or coefficient != 0


def _coefficient(where, name, x, like):
    if type(x) is not float or x != 0:
        x = checks.coefficient(checks.finite, where, name, x, like)
    return x if present(x) else None


def check_terms(where, like, ref_logprobs, kl, kl_coef, entropy, entropy_coef):
    """The two coefficients, None where a term takes no part; ``entropy``: the caller's, or ``ROW``, which any row of
    logits has.
    """
    checks.choice(where, "kl", kl, ("k1", "k2", "k3"))
    kl_coef, entropy_coef = (
        _coefficient(where, "kl_coef", kl_coef, like),
        _coefficient(where, "entropy_coef", entropy_coef, like),
    )
    if kl_coef is not None and ref_logprobs is None:
        raise ValueError(f"{where}: kl={kl!r} needs ref_logprobs where kl_coef is not 0")
    if ref_logprobs is not None:
        column(where, "ref_logprobs", ref_logprobs, like)
    if entropy_coef is not None and entropy is None:
        raise ValueError(f"{where}: entropy_coef needs entropy")
    if entropy is not None and entropy is not ROW:
        checks.floating(where, "entropy", entropy)
        checks.shape(where, "entropy", entropy, like.shape)
        checks.one_device(where, "logprobs", like, entropy=entropy)
    return kl_coef, entropy_coef
