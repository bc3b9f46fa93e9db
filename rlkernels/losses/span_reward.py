"""The reward loss of DeepSpeed-Chat: a pair is compared at every position from its first difference on."""

from typing import get_args

import torch
from torch import Tensor

from rlkernels import checks, ops
from rlkernels.aggregation import weights_for
from rlkernels.backends.protocol import real_dtype
from rlkernels.checks import tokens as checks_tokens
from rlkernels.logits_layout import dense
from rlkernels.losses.token_weights import TokenWeights
from rlkernels.losses.weighted_sum import weighted_sum
from rlkernels.sequences import means
from rlkernels.types import Normalizers, OfPairs, PairsReduction, PerPair, Scalar

REDUCTIONS = get_args(PairsReduction)


def span_reward_loss(
    rewards: OfPairs,
    input_ids: OfPairs,
    pad_id: int,
    *,
    num_padding_at_beginning: int = 0,
    allow_first_difference: bool = False,
    normalizers: Normalizers | None = None,
    reduction: PairsReduction = "mean",
) -> tuple[Scalar | PerPair, PerPair, PerPair]:
    r"""Computes the Bradley-Terry loss of a reward model that scores every token, over the span in which the answers
    differ.

    ``mean_i mean_{t = div_i .. end_i - 1} softplus(-(c_it - q_it))``: ``div`` the first position whose ids differ,
    ``end`` the longer one of the two lengths. One launch, whatever the number of pairs.

    Args:
        rewards: ``[2 B, L]``, any float dtype: the scores ``c`` of the chosen answers, then ``q`` of the rejected ones.
        input_ids: token ids, same shape; row ``i`` and row ``i + B`` are a pair.
        pad_id: the id of padding. A row's length is the index of its first one, whatever follows it, else ``L``.
        num_padding_at_beginning: how many of a row's padding ids do not end it, because they stand at its beginning: 1
            for OPT.
        allow_first_difference: pairs that differ at their first token are no error; their span begins there.
        normalizers: ``num_sequences``, ``dp_size``, ``scale`` and ``count_empty_rows`` of ``token_weights``, for pairs.
        reduction: ``"mean"``; ``"none"``: the mean over the span of each pair, ``[B]``, 0 for an empty span. It has no
            normalisers.

    Returns:
        ``(loss, chosen_scores, rejected_scores)``, fp32 (fp64 for fp64 rewards), all differentiable. The scores,
        ``[B]`` each, are those of the last token before the padding; of a row that begins with padding, the last
        column. A pair of equal ids has a span of one position, the last column. A pair with an empty span does not
        count. No pair gives 0.

    Raises:
        ValueError: an odd number of rows; shapes that do not match; on a CPU, and not in a compiled program, a pair
            that differs at its first token.
        TypeError: wrong dtypes.

    Example:
        >>> ids = torch.tensor([[5, 6, 7, 0], [5, 8, 0, 0]])
        >>> span_reward_loss(torch.tensor([[0.0, 1.0, 2.0, 9.0], [0.0, 1.0, -1.0, 9.0]]), ids, 0)
        (tensor(0.3709), tensor([2.]), tensor([1.]))

    Yao et al. 2023, arXiv:2308.01320 (DeepSpeed-Chat, ``reward_model.py``).
    """
    caller = "span_reward_loss"
    checks.floating(caller, "rewards", rewards)
    if rewards.dim() != 2:
        raise ValueError(f"{caller}: rewards has shape {tuple(rewards.shape)}, expected [2 B, L]: pairs of answers")
    rows, length = rewards.shape
    if rows % 2:
        raise ValueError(f"{caller}: rewards has {rows} rows; chosen and rejected come in pairs")
    if rows and not length:
        raise ValueError(f"{caller}: rewards has shape {tuple(rewards.shape)}: answers without a token have no score")
    checks_tokens.ids(caller, "input_ids", input_ids, rewards.shape)
    checks.one_device(caller, "rewards", rewards, input_ids=input_ids)
    checks.no_forward_ad(caller, rewards)
    pad_id = checks.integer(caller, "pad_id", pad_id)
    skipped = checks.integer(caller, "num_padding_at_beginning", num_padding_at_beginning)
    if skipped < 0:
        raise ValueError(f"{caller}: num_padding_at_beginning must not be negative, got {skipped}")
    allowed = checks.flag(caller, "allow_first_difference", allow_first_difference)
    real, pairs = real_dtype(rewards.dtype), (2, rows // 2, length)
    span, ends = _span(caller, input_ids.long().reshape(pairs), pad_id, skipped, allowed)
    checks.choice(caller, "reduction", reduction, REDUCTIONS)
    if reduction == "none" and checks_tokens.keywords(caller, normalizers):
        raise ValueError(f"{caller}: normalizers divide a mean; reduction 'none' takes none")
    chosen, rejected = (x.contiguous() for x in dense(rewards, real).view(pairs).unbind(0))
    if reduction == "none":
        loss = means(weighted_sum("pairwise", chosen - rejected, [], (), TokenWeights(span, each=True)), span, None)
    else:
        weights = weights_for(
            caller, span, "seq-mean-token-mean", dtype=real, **checks_tokens.keywords(caller, normalizers)
        )
        serving = ops.serving("weighted_loss", chosen)
        loss, _ = ops.weighted_loss("pairwise", chosen, rejected, None, [], (), weights, None, 1.0, serving)
    # Indexing, not gather, because the backward of indexing sorts, and that of gather adds by atomics.
    row = torch.arange(rows // 2, device=rewards.device)
    return loss, chosen[row, ends[0]], rejected[row, ends[1]]


def _span(caller: str, ids: Tensor, pad_id: int, skipped: int, allowed: bool) -> tuple[Tensor, Tensor]:
    """Returns the span of each pair as a mask ``[B, L]``, and the last token of each row, ``[2, B]``.

    ``ids``: ``[2, B, L]``. Each place is a count of the positions before it, so that the host reads nothing.
    """
    length = ids.shape[-1]
    lengths = ((ids == pad_id).cumsum(-1) <= skipped).sum(-1)
    differ = ids[0] != ids[1]
    first = (differ.cumsum(-1) == 0).sum(-1)
    if not allowed and checks.host_reads(first) and (first == 0).any():
        pair = int((first == 0).nonzero()[0, 0])
        raise ValueError(
            f"{caller}: pair {pair} differs at its first token, so that the answers have no prompt in common; pass "
            "allow_first_difference=True if that is meant"
        )
    equal = (first == length).unsqueeze(-1)
    position = torch.arange(length, device=ids.device)
    within = (position >= first.unsqueeze(-1)) & (position < lengths.amax(0).unsqueeze(-1))
    # A row that begins with padding has the index -1, which names its last column.
    return torch.where(equal, position == length - 1, within), (lengths - 1) % max(length, 1)
