"""Penalties of length for the scores of responses, and the groups that training leaves out."""

import torch
from torch import Tensor

from rlkernels import checks
from rlkernels.checks import tokens as checks_tokens
from rlkernels.sequences import groups_of, result_dtype
from rlkernels.types import Mask, Number, PerResponse


@torch.no_grad()
def length_penalty(lengths: PerResponse, *, max_length: Number, buffer: Number, factor: Number = 1.0) -> PerResponse:
    r"""Penalises responses that come near the longest length, more with each token; to be added to the scores.

    ``-factor min(max(l - (max_length - buffer), 0), buffer) / buffer``.

    Args:
        lengths: ``l``, live tokens of each response, ``[N]``; integers or any float dtype.
        max_length: the length with the whole penalty, and beyond it.
        buffer: tokens before it over which the penalty grows; positive, at most ``max_length``.
        factor: the whole penalty.

    Returns:
        ``[N]``: float32, float64 for float64; not differentiable.

    Raises:
        TypeError: ``lengths`` not real. ValueError: ``lengths`` not ``[N]``; ``buffer`` not in ``(0, max_length]``;
            ``factor`` negative.

    Example:
        >>> length_penalty(torch.tensor([80, 90, 95, 120]), max_length=100, buffer=20)
        tensor([-0.0000, -0.5000, -0.7500, -1.0000])

    Yu et al. 2025 (DAPO), arXiv:2503.14476, eq. 13.
    """
    caller = "length_penalty"
    _responses(caller, "lengths", lengths)
    max_length, buffer = (
        checks.positive(caller, name, x) for name, x in (("max_length", max_length), ("buffer", buffer))
    )
    if buffer > max_length:
        raise ValueError(f"{caller}: buffer must be at most max_length, {max_length}, got {buffer}")
    factor = checks_tokens.not_negative(caller, "factor", factor, lengths)
    checks.no_forward_ad(caller, lengths)
    over = (lengths.double() - (max_length - buffer)).clamp(0, buffer)
    return (-factor * (over / buffer)).to(result_dtype(lengths))


@torch.no_grad()
def truncation_penalty(scores: PerResponse, truncated: Mask, coef: Number) -> PerResponse:
    r"""Scales the scores of responses that were cut off, or replaces them.

    Where ``truncated``: ``coef score`` for a ``coef`` from 0 to 1, ``coef`` itself for a negative one.

    Args:
        scores: ``[N]``; any float dtype, bool or integers.
        truncated: mask ``[N]`` of the responses that did not end by themselves.
        coef: at most 1.

    Returns:
        ``[N]``: float32, float64 for float64; not differentiable.

    Raises:
        TypeError: ``scores`` not real. ValueError: shapes differ; ``coef`` above 1 or not finite.

    Example:
        >>> scores, cut = torch.tensor([1.0, 2.0]), torch.tensor([0, 1])
        >>> truncation_penalty(scores, cut, 0.25), truncation_penalty(scores, cut, -1.0)
        (tensor([1.0000, 0.5000]), tensor([ 1., -1.]))

    Liu et al. 2025 (ProRL), arXiv:2505.24864; as in OpenRLHF 0.11.
    """
    caller = "truncation_penalty"
    _responses(caller, "scores", scores)
    checks.mask(caller, truncated, scores.shape, name="truncated")
    checks.tensor(caller, "truncated", truncated)
    checks.one_device(caller, "scores", scores, truncated=truncated)
    checks.no_forward_ad(caller, scores)
    coef = checks.finite(caller, "coef", coef)
    if coef > 1:
        raise ValueError(f"{caller}: coef must be at most 1, got {coef}")
    wide = scores.to(result_dtype(scores))
    return torch.where(truncated != 0, wide * coef if coef >= 0 else coef, wide)


@torch.no_grad()
def dynamic_sampling_mask(
    scores: PerResponse, group_ids: PerResponse, *, low: Number = 0.0, high: Number = 1.0
) -> Tensor:
    r"""Keeps the responses of groups whose mean score lies between two bounds; the others have nothing to learn from.

    ``low < mean_g < high``, over the scorable responses of the group.

    Args:
        scores: ``[N]``; any float dtype, bool or integers. NaN is a response that could not be scored: it does not
            count, and is not kept.
        group_ids: integers ``[N]``, in any order; groups may differ in size.
        low, high: the scores of a group that fails everywhere, and of one that succeeds everywhere.

    Returns:
        bool ``[N]``.

    Raises:
        TypeError: ``scores`` not real, ``group_ids`` not integers. ValueError: shapes differ; ``low`` not below
            ``high``.

    Example:
        >>> dynamic_sampling_mask(torch.tensor([1, 0, 1, 1]), torch.tensor([5, 5, 2, 2]))
        tensor([ True,  True, False, False])

    Yu et al. 2025 (DAPO), arXiv:2503.14476, section 3.2.
    """
    caller = "dynamic_sampling_mask"
    _responses(caller, "scores", scores)
    checks_tokens.ids(caller, "group_ids", group_ids, scores.shape)
    checks.one_device(caller, "scores", scores, group_ids=group_ids)
    checks.no_forward_ad(caller, scores)
    low, high = (checks.real(caller, name, x) for name, x in (("low", low), ("high", high)))
    if not low < high:
        raise ValueError(f"{caller}: low must be below high, got {low} and {high}")
    scored = ~scores.isnan()
    groups, wide = groups_of(group_ids), torch.where(scored, scores.double(), 0.0)
    # From the smallest score on, because a sum of equal scores may round away from their common value.
    base = groups.reduce_each(torch.where(scored, wide, torch.inf), "min", torch.inf)
    count = groups.reduce_each(scored.double())
    mean = base + groups.reduce_each(torch.where(scored, wide - base, 0.0)) / count.clamp(min=1)
    return scored & (low < mean) & (mean < high)


def _responses(caller: str, name: str, x: Tensor) -> None:
    """Refuses what is not one number for each response."""
    checks_tokens.numbers(caller, name, x)
    if x.dim() != 1:
        raise ValueError(f"{caller}: {name} has shape {tuple(x.shape)}, expected [N], one per response")
