"""Advantages and returns per token: GAE and discounted returns by one reverse scan.

Advantages of whole responses within a group are in ``rlkernels.advantages.group``.
"""

from typing import get_args

import torch
from torch import Tensor

from rlkernels import checks, ops
from rlkernels.advantages.recurrence import Steps, steps_of
from rlkernels.checks import tokens as checks_tokens
from rlkernels.logits_layout import dense
from rlkernels.packed_rows import takes_one_row
from rlkernels.sequences import result_dtype, segment_ids
from rlkernels.types import Mask, Masked, Number, Offsets, PerSequence, PerToken, ReturnsMasked

MASKED, RETURNS_MASKED = get_args(Masked), get_args(ReturnsMasked)


@takes_one_row(per_token=True)
def gae(
    rewards: PerToken,
    values: PerToken,
    mask: Mask | None = None,
    *,
    gamma: Number = 1.0,
    lam: Number | PerSequence = 0.95,
    masked: Masked = "skip",
    cu_seqlens: Offsets | None = None,
    bootstrap_values: PerSequence | None = None,
    turn_ends: Mask | None = None,
    turn_gamma: Number | None = None,
    turn_lam: Number | PerSequence | None = None,
) -> tuple[PerToken, PerToken]:
    r"""Computes generalised advantage estimation by one reverse scan.

    ``A_t = d_t + gamma lam A_{t+1}``,  ``d_t = r_t + gamma V_{t+1} - V_t``,  ``R_t = A_t + V_t``; after the last live
    token ``A = 0`` and ``V`` is the bootstrap value, 0 without one.

    With ``turn_ends`` there are two levels. The same over the ends of the turns alone, with ``turn_gamma`` and
    ``turn_lam``, gives each turn a return. That return then replaces the reward of the turn's end, and each turn is a
    sequence of its own, with ``gamma`` and ``lam``.

    Args:
        rewards, values: ``r``, ``V`` per token, ``[B, L]`` or packed ``[N]`` with ``cu_seqlens``; any float dtype,
            rewards also bool or integers.
        mask: live tokens, any pattern. Dead positions return 0 in both outputs; what they hold changes nothing.
        gamma, lam: discount and trace decay per live token; ``lam`` also ``[B]``, or ``[S]`` when packed: that of each
            sequence, such as one that grows with its length.
        masked: what a dead token between live ones does: ``"skip"`` carries value and trace over it undiscounted,
            ``"zero"`` is a step with reward and value 0, ``"none"`` ignores the mask.
        bootstrap_values: ``[B]``, or ``[S]`` when packed: value of the state after each sequence's last live token,
            where it was cut off.
        turn_ends: the last live token of each turn, a mask shaped like ``rewards``, for ``masked="skip"``. The last
            live token of a sequence ends a turn in any case.
        turn_gamma, turn_lam: discount and trace decay from turn to turn; None: ``gamma``, ``lam``.

    Returns:
        ``(advantages, returns)`` shaped like ``rewards``: float32, float64 for float64; not whitened, not
            differentiable.

    Raises:
        TypeError: an argument is not a tensor of such a dtype, ``lam`` neither a number nor one of each sequence, or
            ``cu_seqlens`` neither int32 or int64 nor a list of ints.
        ValueError: shapes differ; a discount or decay outside [0, 1], be it of one sequence where the host reads it;
            unknown ``masked``; ``cu_seqlens`` does not cover the tokens; ``turn_ends`` with another ``masked``, or
            ``turn_gamma`` or ``turn_lam`` without it.

    Example:
        >>> gae(torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 9.0, 0.5]]), torch.tensor([[1, 0, 1]]), lam=1.0)
        (tensor([[0.5000, 0.0000, 0.5000]]), tensor([[1., 0., 1.]]))

    Schulman et al. 2016, arXiv:1506.02438, eq. 16; turns as in RAGEN, which takes tokens with a reward for their ends.
    """
    caller = "gae"
    gamma = checks.interval(caller, "gamma", gamma, 0, 1)
    checks.floating(caller, "values", values)
    checks_tokens.numbers(caller, "rewards", rewards)
    checks.shape(caller, "values", values, rewards.shape)
    checks.one_device(caller, "rewards", rewards, values=values, bootstrap_values=bootstrap_values)
    checks.no_forward_ad(caller, rewards, values, bootstrap_values)
    live, offsets = _checked(caller, rewards, mask, masked, cu_seqlens, MASKED)
    real = result_dtype(rewards, values)
    rewards, values = dense(rewards.detach(), real), dense(values.detach(), real)
    sequences = rewards.shape[:1] if offsets is None else (offsets.shape[0] - 1,)
    lam = _decay(caller, "lam", lam, rewards, sequences)
    if bootstrap_values is not None:
        checks.floating(caller, "bootstrap_values", bootstrap_values)
        checks.shape(caller, "bootstrap_values", bootstrap_values, sequences)
        bootstrap_values = bootstrap_values.detach().to(real)
    if turn_ends is not None:
        turns = checks.interval(caller, "turn_gamma", gamma if turn_gamma is None else turn_gamma, 0, 1)
        across = lam if turn_lam is None else _decay(caller, "turn_lam", turn_lam, rewards, sequences)
        checks.mask(caller, turn_ends, rewards.shape, name="turn_ends")
        checks.one_device(caller, "rewards", rewards, turn_ends=turn_ends)
        if masked != "skip":
            raise ValueError(f"{caller}: turn_ends takes masked 'skip', got {masked!r}")
        steps = _steps(rewards, live, offsets, masked)
        ends = steps.live & ((turn_ends != 0) | ~steps.follows)
        of_turns = _general(rewards, values, ends, steps_of(ends, offsets), turns, across, bootstrap_values)[1]
        rewards = torch.where(ends, of_turns, rewards)
        return _general(rewards, values, steps.live, steps.cut(ends), gamma, lam, None)
    for name, x in (("turn_gamma", turn_gamma), ("turn_lam", turn_lam)):
        if x is not None:
            raise ValueError(f"{caller}: {name} needs turn_ends, the last token of each turn")
    if isinstance(lam, Tensor):
        steps = _steps(rewards, live, offsets, masked)
        live = steps.live if live is None or masked == "none" else live
        return _general(rewards, values, live, steps, gamma, lam, bootstrap_values)
    if bootstrap_values is not None:
        rewards = _bootstrap(rewards, gamma * bootstrap_values, live if masked != "none" else None, offsets)
    return _scan(rewards, values, live, offsets, gamma, lam, masked)


@takes_one_row(per_token=True)
def discounted_returns(
    rewards: PerToken,
    mask: Mask | None = None,
    *,
    gamma: Number = 1.0,
    masked: ReturnsMasked = "skip",
    cu_seqlens: Offsets | None = None,
) -> PerToken:
    r"""Computes the discounted sum of the rewards from each token to the end of its sequence.

    ``G_t = r_t + gamma G_{t+1}``.

    Args:
        rewards: ``r`` per token, ``[B, L]`` or packed ``[N]`` with ``cu_seqlens``; any float dtype, bool or integers.
        mask: live tokens, any pattern. Dead positions return 0; what they hold changes nothing.
        gamma: discount per live token.
        masked: what a dead token between live ones does: ``"skip"`` carries the return over it undiscounted, ``"zero"``
            is a step without reward, ``"none"`` ignores the mask, ``"reset"`` starts again at 0, so that no reward
            passes a gap.

    Returns:
        shaped like ``rewards``: float32, float64 for float64; not differentiable.

    Raises:
        TypeError, ValueError: as ``gae``.

    Example:
        >>> discounted_returns(torch.tensor([[0.0, 0.0, 0.0, 0.0, 2.0]]), torch.tensor([[1, 1, 0, 0, 1]]), gamma=0.5)
        tensor([[0.5000, 1.0000, 0.0000, 0.0000, 2.0000]])

    REINFORCE++, arXiv:2501.03262, eq. 5, with KL in the reward; ``"reset"`` as in SkyRL.
    """
    caller = "discounted_returns"
    checks_tokens.numbers(caller, "rewards", rewards)
    checks.no_forward_ad(caller, rewards)
    gamma = checks.interval(caller, "gamma", gamma, 0, 1)
    live, offsets = _checked(caller, rewards, mask, masked, cu_seqlens, RETURNS_MASKED)
    rewards = rewards.detach().to(result_dtype(rewards))
    if masked == "reset":
        steps = _steps(rewards, live, offsets, "skip")
        place = torch.arange(rewards.shape[-1], device=rewards.device)
        steps = steps.cut(steps.index != place + 1)
        return steps.scan(rewards.double(), gamma).to(rewards.dtype)
    # The scan of GAE, because its returns with V = 0 and lam = 1 are the discounted sums.
    return _scan(rewards, torch.zeros_like(rewards), live, offsets, gamma, 1.0, masked)[1]


def _checked(
    caller: str,
    rewards: PerToken,
    mask: Mask | None,
    masked: ReturnsMasked,
    cu_seqlens: Offsets | None,
    known: tuple[str, ...],
) -> tuple[Tensor | None, Tensor | None]:
    """Checks the arguments that both scans share; returns the mask as bool, and the offsets."""
    checks.choice(caller, "masked", masked, known)
    checks_tokens.layout(caller, "rewards", rewards, cu_seqlens)
    checks.mask(caller, mask, rewards.shape)
    checks.one_device(caller, "rewards", rewards, mask=mask)
    # Without the mask where it is ignored, because padding would then be tokens of the last sequence.
    padding = mask if masked != "none" else None
    offsets = None if cu_seqlens is None else checks_tokens.segments(caller, cu_seqlens, rewards, mask=padding)
    return None if mask is None else mask != 0, offsets


def _scan(
    rewards: PerToken,
    values: Tensor,
    live: Tensor | None,
    offsets: Tensor | None,
    gamma: float,
    lam: float,
    masked: ReturnsMasked,
) -> tuple[Tensor, Tensor]:
    """Runs the scan of GAE; returns advantages and returns."""
    live = None if live is None else live.contiguous()
    return ops.gae(
        rewards.contiguous(), values.contiguous(), live, offsets, gamma, lam, masked, ops.serving("gae", rewards)
    )


def _decay(caller: str, name: str, x: Number | PerSequence, like: Tensor, sequences: tuple[int, ...]) -> float | Tensor:
    """Returns a trace decay as a number, or as float64 of each sequence."""
    if not isinstance(x, Tensor) or x.dim() == 0:
        return checks.interval(caller, name, x, 0, 1)
    if x.shape != torch.Size(sequences):
        raise TypeError(
            f"{caller}: {name} must be a number, or one of each sequence, {tuple(sequences)}; got a tensor of shape "
            f"{tuple(x.shape)} on {x.device}"
        )
    checks.floating(caller, name, x)
    checks.one_device(caller, "rewards", like, **{name: x})
    checks.no_forward_ad(caller, x)
    x = x.detach().double()
    bad = ~((x >= 0) & (x <= 1))
    if checks.host_reads(bad) and bad.any():
        raise ValueError(f"{caller}: {name} must be in [0, 1], got {x[bad][0].item()}")
    return x


def _steps(rewards: PerToken, live: Tensor | None, offsets: Tensor | None, masked: Masked) -> Steps:
    """Returns the steps that ``masked`` makes of a mask."""
    if live is None or masked == "none":
        return steps_of(torch.ones_like(rewards, dtype=torch.bool, memory_format=torch.contiguous_format), offsets)
    steps = steps_of(live.contiguous(), offsets)
    # With "zero" the dead tokens up to the last live one are steps, too, because behind it the
    # bootstrap value stands.
    return steps if masked == "skip" else steps_of(steps.live | steps.follows, offsets)


def _general(
    rewards: PerToken,
    values: Tensor,
    live: Tensor,
    steps: Steps,
    gamma: float,
    lam: float | Tensor,
    bootstrap_values: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Computes GAE over ``steps`` where a sequence has a decay of its own, or an end inside."""
    wide, before = (torch.where(live, x.double(), 0.0) for x in (rewards, values))
    at_end = 0.0 if bootstrap_values is None else steps.expand(bootstrap_values.double())
    decay = gamma * (steps.expand(lam) if isinstance(lam, Tensor) else lam)
    advantages = steps.scan(wide + gamma * steps.ahead(before, at_end) - before, decay)
    returns = torch.where(live, advantages + before, 0.0)
    return torch.where(live, advantages, 0.0).to(rewards.dtype), returns.to(rewards.dtype)


def _bootstrap(rewards: PerToken, gains: Tensor, live: Tensor | None, offsets: Tensor | None) -> Tensor:
    """Adds ``gains``, one per sequence, to the reward of the sequence's last live token.

    GAE sees nothing of the state behind a cut but ``r + gamma V_next``, so that ``gamma V_next`` may be part of ``r``.
    """
    live = torch.ones_like(rewards, dtype=torch.bool) if live is None else live
    count = live.cumsum(-1)
    if offsets is None:
        count_at_end, gains = count[..., -1:], gains[..., None]
    else:
        ids = segment_ids(offsets, rewards.shape[0])
        count_at_end, gains = count[(offsets[1:][ids] - 1).clamp(min=0)], gains[ids]
    # Dead tokens behind the last live one get the gain, too, but the scan does not read them.
    return torch.where(count == count_at_end, rewards + gains, rewards)
