"""The loss of ranked lists of answers: every answer against each one behind it."""

from typing import Literal, get_args, overload

import torch
from torch import Tensor

from rlkernels import checks
from rlkernels.backends.protocol import real_dtype
from rlkernels.checks import tokens as checks_tokens
from rlkernels.logits_layout import dense
from rlkernels.losses.token_weights import TokenWeights
from rlkernels.losses.weighted_sum import weighted_sum
from rlkernels.sequences import segment_ids, segment_reduce
from rlkernels.types import ListLengths, Mask, Metrics, PolicyReduction, RankAggregation, Ranked, RankKind, Scalar

KINDS, RANK_AGGREGATIONS = get_args(RankKind), get_args(RankAggregation)
REDUCTIONS = get_args(PolicyReduction)


@overload
def rank_list_loss(
    scores: Ranked,
    lengths: ListLengths | None = None,
    *,
    mask: Mask | None = None,
    kind: RankKind = "logsigmoid",
    aggregation: RankAggregation = "pair-mean",
    reduction: PolicyReduction = "aggregation",
    return_metrics: Literal[False] = False,
) -> Scalar: ...


@overload
def rank_list_loss(
    scores: Ranked,
    lengths: ListLengths | None = None,
    *,
    mask: Mask | None = None,
    kind: RankKind = "logsigmoid",
    aggregation: RankAggregation = "pair-mean",
    reduction: PolicyReduction = "aggregation",
    return_metrics: Literal[True],
) -> tuple[Scalar, Metrics]: ...


@overload
def rank_list_loss(
    scores: Ranked,
    lengths: ListLengths | None = None,
    *,
    mask: Mask | None = None,
    kind: RankKind = "logsigmoid",
    aggregation: RankAggregation = "pair-mean",
    reduction: PolicyReduction = "aggregation",
    return_metrics: bool,
) -> Scalar | tuple[Scalar, Metrics]: ...


def rank_list_loss(
    scores: Ranked,
    lengths: ListLengths | None = None,
    *,
    mask: Mask | None = None,
    kind: RankKind = "logsigmoid",
    aggregation: RankAggregation = "pair-mean",
    reduction: PolicyReduction = "aggregation",
    return_metrics: bool = False,
) -> Scalar | tuple[Scalar, Metrics]:
    r"""Computes the loss of a reward model from ranked lists: every score should exceed those behind it in its list.

    ``-sum_lists w_list sum_{a < b} f(s_a - s_b)``, ``f`` the log of the logistic function (``"logsigmoid"``) or that
    function itself (``"sigmoid"``, whose loss is negative).

    Args:
        scores: ``s``, each list from best to worst: ``[..., K]``, or lists one behind the other ``[N]`` with
            ``lengths``; any float dtype.
        lengths: scores of each list, ``[G]`` integers, or a list of ints; 0 and 1 make no pair. On an accelerator a
            tensor is not read, and all ``N^2`` pairs are formed there; a list of ints spares that.
        mask: live scores, shaped like ``scores``, any pattern: a dead score is in no pair.
        aggregation: ``"pair-mean"``: ``w = 1 / P``, ``P`` the pairs of all lists. ``"list-mean"``: ``w = 1 / (G C(K,
            2))``, the mean over the ``G`` lists with a pair of the mean over their pairs (InstructGPT).
        reduction: ``"none"``: the mean over the pairs of each list, ``[...]`` or ``[G]``, 0 for a list without a pair;
            it takes no aggregation.

    Returns:
        Scalar, or one number per list, fp32 (fp64 for fp64 scores); no pair gives 0. With ``return_metrics``, ``(loss,
        dict)``: ``accuracy``, the share of the lists with a pair that are sorted as a whole, ``pair_accuracy`` that of
        the sorted pairs; equal scores are not sorted.

    Raises:
        ValueError: shapes that do not match, unknown names; on a CPU, lengths that are negative or do not sum to the
            number of scores.
        TypeError: wrong dtypes.

    Example:
        >>> rank_list_loss(torch.tensor([0.9, 0.4, 0.1, 0.2, 0.5]), [3, 2])
        tensor(0.5635)
        >>> rank_list_loss(torch.tensor([[2.0, 1.0, 1.5]]), return_metrics=True)[1]["pair_accuracy"]
        tensor(0.6667)

    Ouyang et al. 2022, arXiv:2203.02155, eq. 1.
    """
    caller = "rank_list_loss"
    checks.flags(caller, return_metrics=return_metrics)
    checks.floating(caller, "scores", scores)
    checks.choice(caller, "kind", kind, KINDS)
    checks.choice(caller, "aggregation", aggregation, RANK_AGGREGATIONS)
    checks.choice(caller, "reduction", reduction, REDUCTIONS)
    each = reduction == "none"
    if each and aggregation != "pair-mean":
        raise ValueError(f"{caller}: reduction='none' weighs no list; leave out aggregation")
    checks.mask(caller, mask, scores.shape)
    checks.one_device(caller, "scores", scores, mask=mask)
    checks.no_forward_ad(caller, scores)
    offsets, longest = _lists(caller, scores, lengths)
    flat = dense(scores, real_dtype(scores.dtype)).view(-1)
    first, second, both = _pairs(flat, None if mask is None else (mask != 0).reshape(-1), offsets, longest)
    pairs = segment_reduce(both.sum(-1).double(), offsets)  # of each list
    if each:
        weights = TokenWeights(both, each=True)
    elif aggregation == "pair-mean":
        weights = TokenWeights(both, both.sum())
    else:
        of_list = 1.0 / (pairs * (pairs > 0).sum())
        of_pair = of_list[segment_ids(offsets, flat.shape[0])] if pairs.shape[0] else flat.double()
        weights = TokenWeights(torch.where(both, of_pair.unsqueeze(-1), 0.0).to(flat.dtype))
    if kind == "logsigmoid":
        loss = weighted_sum("pairwise", first - second, [], (), weights)
    else:  # KTO's 1 - sigmoid of the opposite difference, which is the sigmoid of this one
        loss = weighted_sum("kto", second - first, [], (1.0,), weights.scaled(-1.0))
    if each:
        of_lists = segment_reduce(loss.double().sum(-1), offsets) / pairs.clamp(min=1)
        loss = of_lists.to(flat.dtype).view(scores.shape[:-1] if lengths is None else of_lists.shape)
    if not return_metrics:
        return loss
    with torch.no_grad():
        wrong = segment_reduce((both & ~(first > second)).sum(-1).double(), offsets)
        real = (pairs > 0).sum().clamp(min=1)
        metrics = {
            # double, because the quotient of two integers has the default dtype.
            "accuracy": ((pairs > 0) & (wrong == 0)).sum().double() / real,
            "pair_accuracy": 1.0 - wrong.sum() / pairs.sum().clamp(min=1),
        }
        return loss, {name: torch.where(pairs.sum() > 0, x, 0.0).to(flat.dtype) for name, x in metrics.items()}


def _lists(caller: str, scores: Tensor, lengths: ListLengths | None) -> tuple[Tensor, int]:
    """Returns the offsets of the lists among the flat scores, and a bound on the length of a list."""
    count = scores.numel()
    if lengths is None:
        if scores.dim() < 2:
            raise ValueError(
                f"{caller}: scores has shape {tuple(scores.shape)}, expected [..., K], or [N] together with lengths"
            )
        size = scores.shape[-1]
        lists = scores.shape[:-1].numel()
        return torch.arange(lists + 1, device=scores.device) * size, size
    if scores.dim() != 1:
        raise ValueError(
            f"{caller}: scores has shape {tuple(scores.shape)}, expected [N]: lengths says that the lists lie one "
            "behind the other; flatten it"
        )
    if isinstance(lengths, (list, tuple)):
        lengths = torch.tensor([checks.integer(caller, "lengths", x) for x in lengths], dtype=torch.int64, device="cpu")
    else:
        checks.tensor(caller, "lengths", lengths)
        checks.readable(caller, "lengths", lengths)
        checks_tokens.ids(caller, "lengths", lengths, (lengths.numel(),))
        checks.one_device(caller, "scores", scores, lengths=lengths)
    # A copy, because another thread may write to the caller's between two looks at them.
    lengths, longest = lengths.to(torch.int64, copy=True), count
    if checks.host_reads(lengths):
        known = lengths.tolist()
        if min(known, default=0) < 0:
            raise ValueError(f"{caller}: lengths holds {min(known)}, expected numbers of scores, at least 0")
        if sum(known) != count:
            raise ValueError(f"{caller}: lengths sum to {sum(known)}, scores has {count}")
        longest = max(known, default=0)
    ends = lengths.to(scores.device).cumsum(0)
    return checks_tokens.segments(caller, torch.cat([ends.new_zeros(1), ends]), scores), longest


def _pairs(flat: Tensor, live: Tensor | None, offsets: Tensor, longest: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the scores of all pairs, ``[N, longest - 1]`` each, and the mask of those that exist.

    Column ``j`` of row ``t`` is the pair of ``t`` and ``t + 1 + j``.
    """
    count = flat.shape[0]
    token = torch.arange(count, device=flat.device).unsqueeze(-1)
    other = token + torch.arange(1, max(longest, 1), device=flat.device)
    ends = offsets[1:][segment_ids(offsets, count)] if offsets.shape[0] > 1 else offsets.new_zeros(count)
    both = other < ends.unsqueeze(-1)
    other = other.clamp(max=max(count - 1, 0))
    if live is not None:
        both = both & live.unsqueeze(-1) & live[other]
    return flat.unsqueeze(-1).expand(other.shape), flat[other], both
