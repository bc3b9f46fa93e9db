"""The reward of each token, from the scores of responses and the KL to a reference, and the masks of its tokens."""

from typing import NamedTuple, get_args

import torch
from torch import Tensor

from rlkernels import checks
from rlkernels.checks import tokens as checks_tokens
from rlkernels.objectives.language import OBJECTIVES
from rlkernels.packed_rows import takes_one_row
from rlkernels.sequences import last_live_index, result_dtype, segment_ids, segment_reduce
from rlkernels.tracing import without_gradient
from rlkernels.types import KL, Mask, Number, Offsets, PerToken, PerTokenOrSequence, Placement, TokenIds

# Those that are objectives, because a gradient that differs from the value is of no use to a reward.
KLS, PLACEMENTS = tuple(name for name in get_args(KL) if name in OBJECTIVES), get_args(Placement)


@takes_one_row(main="mask", per_token=True)
@without_gradient
def assemble_rewards(
    scores: PerTokenOrSequence,
    mask: Mask,
    *,
    logprobs: PerToken | None = None,
    ref_logprobs: PerToken | None = None,
    kl: KL = "k1",
    kl_coef: Number = 0.0,
    score_clip: tuple[Number, Number] | None = None,
    placement: Placement = "last-action",
    cu_seqlens: Offsets | None = None,
) -> PerToken:
    r"""Puts the score of each response onto one token, and the KL to the reference onto all live ones.

    ``r_t = -kl_coef KL_t + [t = p] clip(score)``; the position ``p`` of the score:

    * ``"last-action"``: the last live token, the one that decides for the end (OpenRLHF, ReFT)
    * ``"trl-end"``: the token behind the last live one, or that one where there is no room (TRL before 1.0)
    * ``"deepspeed-end"``: the same position, whose KL counts, too (DeepSpeed-Chat)
    * ``"token-level"``: scores of each token (verl)

    ``gae`` must see the position behind the last live token: ``extended_mask`` makes that mask. OpenRLHF's order of a
    baseline is the same call with advantages of ``group_advantages`` as ``scores``. The reward of RLOO and GRPO with
    the KL inside is ``sequence_sums(rewards)``.

    Args:
        scores: ``[B]``, or ``[S]`` when packed; shaped like ``mask`` with ``"token-level"``. Any float dtype, bool or
            integers.
        mask: live tokens, ``[B, L]`` or packed ``[N]`` with ``cu_seqlens``, any pattern. A sequence without a live
            token has its score at its last token.
        logprobs, ref_logprobs: shaped like ``mask``; needed for a KL. What a dead token holds is not looked at.
        kl: the estimator, ``"k1"``, ``"k2"`` or ``"k3"``.
        kl_coef: a negative one counts as 0.
        score_clip: the smallest and the largest score, such as ``(-10, 10)`` of OpenRLHF; None: no clip.

    Returns:
        shaped like ``mask``: float32, float64 for float64; not differentiable.

    Raises:
        TypeError: dtypes. ValueError: shapes differ; unknown ``placement`` or ``kl``; one of ``logprobs`` and
            ``ref_logprobs`` alone; a ``kl_coef`` above 0 without them; a ``score_clip`` that is no pair or the wrong
            way round.

    Example:
        >>> logprobs, reference = torch.tensor([[-1.0, -0.5, -2.0, -9.0]]), torch.tensor([[-1.5, -0.5, -1.0, 9.0]])
        >>> mask = torch.tensor([[1, 1, 1, 0]])
        >>> assemble_rewards(torch.tensor([20.0]), mask, logprobs=logprobs, ref_logprobs=reference, kl_coef=0.1,
        ...     score_clip=(-5, 5))
        tensor([[-0.0500,  0.0000,  5.1000,  0.0000]])

    OpenRLHF v0.5.5 ``compute_reward``; DeepSpeed-Chat ``compute_rewards``; TRL 0.12 ``PPOTrainer``; verl 0.9.
    """
    caller = "assemble_rewards"
    checks_tokens.numbers(caller, "scores", scores)
    live, offsets = _tokens(caller, mask, cu_seqlens)
    checks.choice(caller, "placement", placement, PLACEMENTS)
    checks.choice(caller, "kl", kl, KLS)
    kl_coef = checks.coefficient(checks.finite, caller, "kl_coef", kl_coef, live)
    of_sequences = live.shape[:1] if offsets is None else (offsets.shape[0] - 1,)
    checks.shape(caller, "scores", scores, live.shape if placement == "token-level" else of_sequences)
    checks.no_forward_ad(caller, scores, logprobs, ref_logprobs)
    for name, x, other in (("logprobs", logprobs, ref_logprobs), ("ref_logprobs", ref_logprobs, logprobs)):
        if x is None:
            if other is not None or isinstance(kl_coef, Tensor) or kl_coef > 0:
                raise ValueError(f"{caller}: {name} is None; a KL needs logprobs and ref_logprobs")
            continue
        checks.floating(caller, name, x)
        checks.shape(caller, name, x, live.shape)
    checks.one_device(caller, "mask", live, scores=scores, logprobs=logprobs, ref_logprobs=ref_logprobs)

    real = result_dtype(*(x for x in (scores, logprobs, ref_logprobs) if x is not None))
    wide = scores.to(real)
    if score_clip is not None:
        wide = wide.clamp(*_bounds(caller, score_clip))
    place = live
    if placement == "token-level":
        rewards = torch.where(live, wide, 0.0)
    else:
        at = _score_index(live, offsets, behind=placement != "last-action")
        positions = torch.arange(live.shape[-1], device=live.device)
        if offsets is None:
            place, wide = positions == at[:, None], wide[:, None]
        else:
            ids = segment_ids(offsets, live.shape[0])
            place, wide = positions == at[ids], wide[ids]
        rewards = torch.where(place, wide, 0.0)
    if logprobs is not None and ref_logprobs is not None:
        counted = live | place if placement == "deepspeed-end" else live
        policy, reference = (torch.where(counted, x.to(real), 0.0) for x in (logprobs, ref_logprobs))
        estimate = torch.where(counted, OBJECTIVES[kl].function(policy, reference)[0], 0.0)
        factor = kl_coef.clamp(min=0).to(real) if isinstance(kl_coef, Tensor) else max(kl_coef, 0.0)
        # Selected, because 0 times the infinite KL of a token of probability 0 is NaN.
        if isinstance(factor, Tensor):
            rewards = rewards - torch.where(factor == 0, 0.0, factor * estimate)
        elif factor:
            rewards = rewards - factor * estimate
    return rewards


@takes_one_row(per_token=True)
@without_gradient
def extended_mask(mask: Mask, cu_seqlens: Offsets | None = None) -> Tensor:
    r"""Marks the live tokens and the one behind the last of them, where a sequence has room.

    DeepSpeed-Chat and TRL before 1.0 put the score there, so that values, rewards and ``gae`` go one token further than
    the policy's loss.

    Args:
        mask: live tokens, ``[B, L]`` or packed ``[N]`` with ``cu_seqlens``, any pattern. A sequence without a live
            token stays one.

    Returns:
        bool, shaped like ``mask``.

    Raises:
        TypeError, ValueError: as ``assemble_rewards``.

    Example:
        >>> extended_mask(torch.tensor([[1, 0, 1, 0, 0]]))
        tensor([[ True, False,  True,  True, False]])
    """
    live, offsets = _tokens("extended_mask", mask, cu_seqlens)
    at = _score_index(live, offsets, behind=True)
    positions = torch.arange(live.shape[-1], device=live.device)
    if offsets is None:
        return live | (positions == at[:, None]) & live.any(-1, keepdim=True)
    ids = segment_ids(offsets, live.shape[0])
    return live | (positions == at[ids]) & (segment_reduce(live.double(), offsets) > 0)[ids]


class ProcessedSequences(NamedTuple):
    """The token ids of a rollout with their end, and the masks of attention and of actions.

    Example:
        >>> process_sequences(torch.tensor([[5, 7, 2, 0]]), 1, eos_id=2, pad_id=0).action_mask
        tensor([[ True,  True, False]])
    """

    sequences: Tensor
    attention_mask: Tensor
    action_mask: Tensor


@torch.no_grad()
def process_sequences(sequences: TokenIds, prompt_length: int, *, eos_id: int, pad_id: int) -> ProcessedSequences:
    r"""Ends each sampled sequence with EOS, and marks its tokens and its actions.

    A real token is neither EOS nor PAD. EOS stands right behind the last real token; a sequence that was cut off loses
    its last token to it. Attention goes from the first real token to that EOS. The action at ``t`` takes token ``t +
    1`` after ``t``; it is live where token ``t`` is real. The first action is live in any case, and that of EOS is,
    too.

    Args:
        sequences: token ids ``[B, L]``, integers: prompts padded on the left, answers on the right.
        prompt_length: tokens of the padded prompt, from 1 to ``L - 1``.

    Returns:
        ``(sequences, attention_mask, action_mask)``: ids like ``sequences``, bool ``[B, L]``, and bool ``[B, L -
            prompt_length]``, over the positions of log-probabilities of the answer.

    Raises:
        TypeError: ids that are no integers. ValueError: ``sequences`` not ``[B, L]``; ``prompt_length`` outside of it;
            an id that the dtype of ``sequences`` does not have.

    Example:
        >>> found = process_sequences(torch.tensor([[0, 5, 7, 8, 2, 0], [5, 6, 7, 8, 9, 4]]), 2, eos_id=2, pad_id=0)
        >>> found.sequences
        tensor([[0, 5, 7, 8, 2, 0],
                [5, 6, 7, 8, 9, 2]])
        >>> found.action_mask
        tensor([[ True,  True,  True, False],
                [ True,  True,  True,  True]])

    OpenRLHF v0.5.5, ``Actor.process_sequences``.
    """
    caller = "process_sequences"
    checks.tensor(caller, "sequences", sequences)
    checks_tokens.ids(caller, "sequences", sequences, sequences.shape)
    if sequences.dim() != 2:
        raise ValueError(f"{caller}: sequences has shape {tuple(sequences.shape)}, expected [B, L]")
    length = sequences.shape[1]
    prompt_length = checks.integer(caller, "prompt_length", prompt_length)
    if not 1 <= prompt_length < length:
        raise ValueError(f"{caller}: prompt_length must be from 1 to {length - 1}, got {prompt_length}")
    eos_id, pad_id = (checks.integer(caller, name, x) for name, x in (("eos_id", eos_id), ("pad_id", pad_id)))
    held = torch.iinfo(sequences.dtype)
    for name, x in (("eos_id", eos_id), ("pad_id", pad_id)):
        if not held.min <= x <= held.max:  # because torch would compare the last bits alone
            raise ValueError(f"{caller}: {name} is {x}, which {sequences.dtype} does not have; cast sequences")
    real = (sequences != eos_id) & (sequences != pad_id)
    place = torch.arange(length, device=sequences.device)
    # A sequence without a real token is one from its first token to its last.
    first = torch.where(real, place, length).amin(-1, keepdim=True) % length
    end = (last_live_index(real, real.shape)[:, None] + 1).clamp(max=length - 1)
    ended = torch.where(place == end, eos_id, sequences)
    # The end that was written is no real token, and what it replaced is none any more.
    actions = (real & (place != end))[:, prompt_length - 1 : -1]
    return ProcessedSequences(ended, (place >= first) & (place <= end), actions | (place[: actions.shape[1]] == 0))


def _tokens(caller: str, mask: Mask, cu_seqlens: Offsets | None) -> tuple[Tensor, Tensor | None]:
    """Checks a mask and its layout; returns it as bool, and the offsets."""
    checks.tensor(caller, "mask", mask)
    checks.mask(caller, mask, mask.shape)
    checks_tokens.layout(caller, "mask", mask, cu_seqlens)
    offsets = None if cu_seqlens is None else checks_tokens.segments(caller, cu_seqlens, mask)
    return (mask != 0).contiguous(), offsets


def _score_index(live: Tensor, offsets: Tensor | None, behind: bool) -> Tensor:
    """Returns the position of each sequence's last live token, or of the one ``behind`` it where there is room."""
    if offsets is None and live.shape[-1] == 0:
        return live.new_zeros(live.shape[:1], dtype=torch.int64)
    if offsets is None:
        last, final = last_live_index(live, live.shape), live.shape[-1] - 1
        return (last + 1).clamp(max=final) if behind else last
    final = offsets[1:] - 1
    places = torch.where(live, torch.arange(live.shape[0], device=live.device), -1)
    last = segment_reduce(places.double(), offsets, "max", -1.0).long()
    last = torch.where(last < 0, final, last)
    return torch.minimum(last + 1, final) if behind else last


def _bounds(caller: str, pair: tuple[Number, Number]) -> tuple[float, float]:
    """Returns the bounds of scores as floats."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise ValueError(f"{caller}: score_clip must be a pair (low, high) or None, got {pair!r}")
    low, high = (checks.real(caller, "score_clip", x) for x in pair)
    if not low <= high:
        raise ValueError(f"{caller}: score_clip must be a pair (low, high), low <= high, got {pair!r}")
    return low, high
