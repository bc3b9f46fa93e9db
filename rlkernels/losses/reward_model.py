"""The pairwise loss of a reward model."""

from typing import Literal, get_args, overload

import torch
from torch import Tensor

from rlkernels import checks, ops
from rlkernels.logits_layout import dense
from rlkernels.losses.policy_arguments import column, present
from rlkernels.losses.weighted_sum import each
from rlkernels.types import Mask, Metrics, Number, PairwiseKind, PerPair, Reduction, Scalar

KINDS, REDUCTIONS = get_args(PairwiseKind), get_args(Reduction)


@overload
def pairwise_reward_loss(
    chosen: PerPair,
    rejected: PerPair,
    *,
    margin: PerPair | None = None,
    center_coef: Number = 0.0,
    kind: PairwiseKind = "logsigmoid",
    pair_weights: PerPair | None = None,
    mask: Mask | None = None,
    reduction: Reduction = "mean",
    return_metrics: Literal[False] = False,
) -> Scalar | PerPair: ...


@overload
def pairwise_reward_loss(
    chosen: PerPair,
    rejected: PerPair,
    *,
    margin: PerPair | None = None,
    center_coef: Number = 0.0,
    kind: PairwiseKind = "logsigmoid",
    pair_weights: PerPair | None = None,
    mask: Mask | None = None,
    reduction: Reduction = "mean",
    return_metrics: Literal[True],
) -> tuple[Scalar | PerPair, Metrics]: ...


@overload
def pairwise_reward_loss(
    chosen: PerPair,
    rejected: PerPair,
    *,
    margin: PerPair | None = None,
    center_coef: Number = 0.0,
    kind: PairwiseKind = "logsigmoid",
    pair_weights: PerPair | None = None,
    mask: Mask | None = None,
    reduction: Reduction = "mean",
    return_metrics: bool,
) -> Scalar | PerPair | tuple[Scalar | PerPair, Metrics]: ...


def pairwise_reward_loss(
    chosen: PerPair,
    rejected: PerPair,
    *,
    margin: PerPair | None = None,
    center_coef: Number = 0.0,
    kind: PairwiseKind = "logsigmoid",
    pair_weights: PerPair | None = None,
    mask: Mask | None = None,
    reduction: Reduction = "mean",
    return_metrics: bool = False,
) -> Scalar | PerPair | tuple[Scalar | PerPair, Metrics]:
    r"""Computes the Bradley-Terry loss of a reward model.

    One launch each way for fp32 scores without centring.

    ``(1/n) sum_i m_i w_i (softplus(-(c_i - q_i - g_i)) + center_coef (c_i + q_i)^2)``, ``n = sum_i m_i``; finite for
    every finite difference (-1e4 gives 1e4, +1e4 gives 0). No pair gives 0.

    Args:
        chosen, rejected: scores ``c``, ``q``, one per pair, any equal shape and float dtype; ``[B, k]`` of a head with
            several labels, each of which is a pair of its own.
        margin: ``g``, how much better the chosen answer is; same shape, differentiable where it requires a gradient.
        center_coef: weight of the term that keeps the scores around 0.
        kind: ``"logsigmoid"``, or ``"logexp"``: ``log(1 + e^(q - c))``, the same loss, which ignores ``margin``.
        pair_weights: ``w``, same shape, without gradient; a pair of weight 0 is left out, but counts in ``n``.
        mask: ``m``, the live pairs (or labels of pairs), same shape. What a dead pair holds is not looked at.
        reduction: ``"mean"`` as above; ``"sum"``: the same without ``1/n``; ``"none"``: each pair's term, in the shape
            of ``chosen``, 0 for a dead pair.

    Returns:
        Scalar, or the terms; fp32 (fp64 for fp64 scores). With ``return_metrics``, ``(loss, dict)``: ``accuracy``, the
        share of the live pairs with ``c > q``, and the means of ``c``, ``q`` and ``c - q`` as ``reward_chosen``,
        ``reward_rejected``, ``reward_margin``.

    Raises:
        ValueError: unequal numbers of pairs; shapes that do not match; an unknown name.

    Example:
        >>> pairwise_reward_loss(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0]), reduction="none")
        tensor([0.3133, 0.6931])

    Ouyang et al. 2022, arXiv:2203.02155, eq. 1; margin: Touvron et al. 2023, arXiv:2307.09288; centring: Eisenstein et
    al. 2023, arXiv:2312.09244; logexp: Bai et al. 2022, arXiv:2204.05862.
    """
    caller = "pairwise_reward_loss"
    checks.flags(caller, return_metrics=return_metrics)
    checks.pairs(caller, chosen, rejected)
    checks.choice(caller, "kind", kind, KINDS)
    checks.choice(caller, "reduction", reduction, REDUCTIONS)
    center_coef = checks.coefficient(checks.finite, caller, "center_coef", center_coef, chosen)
    if margin is not None:
        checks.floating(caller, "margin", margin)
        checks.shape(caller, "margin", margin, chosen.shape)
        checks.one_device(caller, "chosen", chosen, margin=margin)
    checks.no_forward_ad(caller, chosen, rejected, margin)
    real = torch.float64 if torch.float64 in (chosen.dtype, rejected.dtype) else torch.float32
    live, weights = _live_and_weights(caller, chosen, mask, pair_weights, real)
    chosen, rejected, margin = (
        dense(chosen, real),
        dense(rejected, real),
        None if margin is None or kind == "logexp" else dense(margin, real),
    )
    if reduction == "none":
        loss = _terms(chosen, rejected, margin, weights, center_coef)
    else:
        total = None if live is None or reduction == "sum" else live.sum()
        share = 1.0 / max(chosen.numel(), 1) if live is None and reduction == "mean" else 1.0
        loss, _ = ops.weighted_loss(
            "pairwise", chosen, rejected, margin, [], (), weights, total, share, ops.serving("weighted_loss", chosen)
        )
        if present(center_coef):
            loss = loss + (_centring(chosen, rejected, weights, total) * share * center_coef).to(real)
    if not return_metrics:
        return loss
    counted = live if pair_weights is None else weights != 0
    return loss, _metrics(chosen.detach(), rejected.detach(), counted)


def _live_and_weights(
    caller: str, chosen: Tensor, mask: Mask | None, pair_weights: PerPair | None, real: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Returns the mask as bool, or None, and the weight of each pair: None (1 everywhere), that mask, or numbers."""
    checks.mask(caller, mask, chosen.shape)
    checks.one_device(caller, "chosen", chosen, mask=mask)
    live = mask if mask is None else (mask != 0).contiguous()
    if pair_weights is None:
        return live, live
    weights = dense(column(caller, "pair_weights", pair_weights, chosen, "chosen"), real)
    return live, weights if live is None else torch.where(live, weights, 0.0)


def _terms(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None, weights: Tensor | None, center_coef: Number
) -> Tensor:
    """Computes the term of each pair."""
    gap = chosen - rejected if margin is None else chosen - rejected - margin
    factor = weights if weights is None else weights.to(gap.dtype)
    loss = each("pairwise", gap, (), factor)
    if present(center_coef):
        total = chosen + rejected if weights is None else torch.where(weights != 0, chosen + rejected, 0.0)
        loss = loss + (total * total * center_coef).to(gap.dtype)
    return loss if factor is None else loss * factor


def _centring(chosen: Tensor, rejected: Tensor, weights: Tensor | None, count: Tensor | None) -> Tensor:
    """Computes the weighted sum of the squares of ``c + q``, over the count where there is one."""
    total = chosen + rejected
    if weights is None:
        return (total * total).sum()
    total = torch.where(weights != 0, total, 0.0)
    squares = (total * total * weights).sum()
    return squares if count is None else squares / count.clamp(min=1)


@torch.no_grad()
def _metrics(chosen: Tensor, rejected: Tensor, live: Tensor | None) -> Metrics:
    """Computes means over the pairs that are live and have a weight; None: over all."""
    count = max(chosen.numel(), 1) if live is None else live.sum().clamp(min=1)

    def mean(x: Tensor) -> Tensor:
        return (x if live is None else torch.where(live, x, 0.0)).sum() / count

    return {
        "reward_chosen": mean(chosen),
        "reward_rejected": mean(rejected),
        "reward_margin": mean(chosen - rejected),
        "accuracy": mean((chosen > rejected).to(chosen.dtype)),
    }
