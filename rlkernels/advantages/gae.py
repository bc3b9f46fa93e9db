"""Advantages and returns per token: GAE and discounted returns by one reverse scan.

Advantages of whole responses within a group are in ``rlkernels.advantages.group``.
"""

from typing import get_args

import torch
from torch import Tensor

from rlkernels import checks, ops
from rlkernels.checks import tokens as checks_tokens
from rlkernels.logits_layout import dense
from rlkernels.packed_rows import takes_one_row
from rlkernels.sequences import result_dtype, segment_ids
from rlkernels.types import Mask, Masked, Number, Offsets, PerSequence, PerToken

MASKED = get_args(Masked)


@takes_one_row(per_token=True)
def gae(
    rewards: PerToken,
    values: PerToken,
    mask: Mask | None = None,
    *,
    gamma: Number = 1.0,
    lam: Number = 0.95,
    masked: Masked = "skip",
    cu_seqlens: Offsets | None = None,
    bootstrap_values: PerSequence | None = None,
) -> tuple[PerToken, PerToken]:
    r"""Generalised advantage estimation by one reverse scan.

    ``A_t = d_t + gamma lam A_{t+1}``,  ``d_t = r_t + gamma V_{t+1} - V_t``,  ``R_t = A_t + V_t``; after the last live
    token ``A = 0`` and ``V`` is the bootstrap value, 0 without one.

    Args:
        rewards, values: ``r``, ``V`` per token, ``[B, L]`` or packed ``[N]`` with ``cu_seqlens``; any float dtype,
            rewards also bool or integers.
        mask: live tokens, any pattern. Dead positions return 0 in both outputs; what they hold changes nothing.
        gamma, lam: discount and trace decay per live token.
        masked: what a dead token between live ones does: ``"skip"`` carries value and trace over it undiscounted,
            ``"zero"`` is a step with reward and value 0, ``"none"`` ignores the mask.
        bootstrap_values: ``[B]``, or ``[S]`` when packed: value of the state after each sequence's last live token,
            where it was cut off.

    Returns:
        ``(advantages, returns)`` shaped like ``rewards``: float32, float64 for float64; not whitened, not
            differentiable.

    Raises:
        TypeError: an argument is not a tensor of such a dtype, or ``cu_seqlens`` neither int32 or int64 nor a list of
            ints.
        ValueError: shapes differ; ``gamma`` or ``lam`` outside [0, 1]; unknown ``masked``; ``cu_seqlens`` does not
            cover the tokens.

    Example:
        >>> gae(torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 9.0, 0.5]]), torch.tensor([[1, 0, 1]]), lam=1.0)
        (tensor([[0.5000, 0.0000, 0.5000]]), tensor([[1., 0., 1.]]))

    Schulman et al. 2016, arXiv:1506.02438, eq. 16.
    """
    caller = "gae"
    gamma, lam = checks.interval(caller, "gamma", gamma, 0, 1), checks.interval(caller, "lam", lam, 0, 1)
    checks.floating(caller, "values", values)
    checks_tokens.numbers(caller, "rewards", rewards)
    checks.shape(caller, "values", values, rewards.shape)
    checks.one_device(caller, "rewards", rewards, values=values, bootstrap_values=bootstrap_values)
    checks.no_forward_ad(caller, rewards, values, bootstrap_values)
    live, offsets = _checked(caller, rewards, mask, masked, cu_seqlens)
    real = result_dtype(rewards, values)
    rewards, values = dense(rewards.detach(), real), dense(values.detach(), real)
    if bootstrap_values is not None:
        checks.floating(caller, "bootstrap_values", bootstrap_values)
        checks.shape(
            caller,
            "bootstrap_values",
            bootstrap_values,
            rewards.shape[:1] if offsets is None else (offsets.shape[0] - 1,),
        )
        rewards = _bootstrap(
            rewards, gamma * bootstrap_values.detach().to(real), live if masked != "none" else None, offsets
        )
    return _scan(rewards, values, live, offsets, gamma, lam, masked)


@takes_one_row(per_token=True)
def discounted_returns(
    rewards: PerToken,
    mask: Mask | None = None,
    *,
    gamma: Number = 1.0,
    masked: Masked = "skip",
    cu_seqlens: Offsets | None = None,
) -> PerToken:
    r"""Discounted sum of the rewards from each token to the end of its sequence.

    ``G_t = r_t + gamma G_{t+1}``.

    Args:
        rewards: ``r`` per token, ``[B, L]`` or packed ``[N]`` with ``cu_seqlens``; any float dtype, bool or integers.
        mask: live tokens, any pattern. Dead positions return 0; what they hold changes nothing.
        gamma: discount per live token.
        masked: what a dead token between live ones does: ``"skip"`` carries the return over it undiscounted, ``"zero"``
            is a step without reward, ``"none"`` ignores the mask.

    Returns:
        shaped like ``rewards``: float32, float64 for float64; not differentiable.

    Raises:
        TypeError, ValueError: as ``gae``.

    Example:
        >>> discounted_returns(torch.tensor([[0.0, 0.0, 0.0, 0.0, 2.0]]), torch.tensor([[1, 1, 0, 0, 1]]), gamma=0.5)
        tensor([[0.5000, 1.0000, 0.0000, 0.0000, 2.0000]])

    REINFORCE++, arXiv:2501.03262, eq. 5, with KL in the reward.
    """
    caller = "discounted_returns"
    checks_tokens.numbers(caller, "rewards", rewards)
    checks.no_forward_ad(caller, rewards)
    gamma = checks.interval(caller, "gamma", gamma, 0, 1)
    live, offsets = _checked(caller, rewards, mask, masked, cu_seqlens)
    rewards = rewards.detach().to(result_dtype(rewards))
    # The scan of GAE, because its returns with V = 0 and lam = 1 are the discounted sums.
    return _scan(rewards, torch.zeros_like(rewards), live, offsets, gamma, 1.0, masked)[1]


def _checked(
    caller: str, rewards: PerToken, mask: Mask | None, masked: Masked, cu_seqlens: Offsets | None
) -> tuple[Tensor | None, Tensor | None]:
    """Checks the arguments that both scans share; returns the mask as bool, and the offsets."""
    checks.choice(caller, "masked", masked, MASKED)
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
    masked: Masked,
) -> tuple[Tensor, Tensor]:
    """Runs the scan of GAE; returns advantages and returns."""
    live = None if live is None else live.contiguous()
    return ops.gae(
        rewards.contiguous(), values.contiguous(), live, offsets, gamma, lam, masked, ops.serving("gae", rewards)
    )


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
