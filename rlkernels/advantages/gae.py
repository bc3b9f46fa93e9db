"""Advantages and returns per token: GAE and discounted returns by one reverse scan, and whitening.

Advantages of whole responses within a group are in ``rlkernels.advantages.group``.
"""

from typing import get_args

import torch
from torch import Tensor

from rlkernels import checks, ops
from rlkernels.checks import tokens as checks_tokens
from rlkernels.logits_layout import dense
from rlkernels.sequences import result_dtype, segment_ids
from rlkernels.types import EpsMode, Mask, Masked, Number, Offsets, PerSequence, PerToken

MASKED, EPS_MODES = get_args(Masked), get_args(EpsMode)


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
    gamma, lam = (checks.interval(caller, name, x, 0, 1) for name, x in (("gamma", gamma), ("lam", lam)))
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
    offsets = None if cu_seqlens is None else checks_tokens.segments(caller, cu_seqlens, rewards)
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


def _dimensions(caller: str, dim: int | tuple[int, ...] | list[int], count: int) -> tuple[int, ...]:
    """Returns ``dim``, one dimension or several, as a tuple; refuses what does not name dimensions of ``x``."""
    dims = tuple(checks.integer(caller, "dim", axis) for axis in (dim if isinstance(dim, (tuple, list)) else (dim,)))
    if any(not -count <= axis < count for axis in dims) or len({axis % count for axis in dims}) < len(dims):
        raise ValueError(
            f"{caller}: dim must name dimensions of x, each once, from {-count} to {count - 1}; got {dim!r}"
        )
    return dims


def masked_whiten(
    x: Tensor,
    mask: Mask | None = None,
    *,
    shift_mean: bool = True,
    unbiased: bool = True,
    eps: Number = 1e-8,
    eps_mode: EpsMode = "add",
    dim: int | tuple[int, ...] | list[int] | None = None,
) -> Tensor:
    r"""Zero mean and unit variance over live elements; dead ones return 0.

    ``y = (x - mean) / sqrt(var + eps)``, or ``/ sqrt(max(var, eps))`` with ``eps_mode="clamp"``;  ``var = sum (x -
    mean)^2 / (n - 1)``.

    Args:
        x: any float dtype and shape.
        mask: live elements, shaped like ``x``, any pattern; None: all.
        shift_mean: False adds the mean back: only the spread is normalised.
        unbiased: False divides by ``n`` instead of ``n - 1``.
        eps, eps_mode: what keeps a small variance from dividing by 0.
        dim: statistics along these dimensions; None: one mean and variance for all of ``x``.

    Returns:
        shaped like ``x``: float32, float64 for float64. Equal elements, or one, have no spread: 0 (the mean without
            ``shift_mean``).

    Raises:
        TypeError: ``x`` not floating, ``mask`` complex. ValueError: shapes differ; ``eps`` negative; unknown
            ``eps_mode``.

    Example:
        >>> masked_whiten(torch.tensor([1.0, 3.0, float("nan")]), torch.tensor([1, 1, 0]), unbiased=False)
        tensor([-1.,  1.,  0.])

    Schulman et al. 2017 (reference code); unbiased as in TRL and verl, population and clamp as in OpenRLHF.
    """
    caller = "masked_whiten"
    checks.floating(caller, "x", x)
    checks.mask(caller, mask, x.shape)
    checks.one_device(caller, "x", x, mask=mask)
    checks.choice(caller, "eps_mode", eps_mode, EPS_MODES)
    eps = checks_tokens.not_negative(caller, "eps", eps, x)
    live = (
        torch.ones_like(x, dtype=torch.bool, memory_format=torch.contiguous_format)
        if mask is None
        else (mask != 0).contiguous()
    )
    dim = tuple(range(x.dim())) if dim is None else _dimensions(caller, dim, x.dim())

    def mean(values: Tensor, fewer: int = 0) -> Tensor:
        # sum, not nansum, because the caller must see a NaN in a live element.
        return values.sum(dim, keepdim=True) / (live.sum(dim, keepdim=True) - fewer).clamp(min=1)

    # Measured from the smallest live element, because equal elements are then exactly 0. x - mean may leave 1e-17, and
    # a division by that spread makes 1 of it where eps is 0.
    wide = x.double().contiguous()  # torch adds in the order of memory
    base = torch.where(live, wide.detach(), torch.inf).amin(dim, keepdim=True) if x.numel() else wide.new_zeros(())
    offset = torch.where(live, wide - base, 0.0)
    centre = mean(offset)
    gap = torch.where(live, offset - centre, 0.0)
    variance = mean(gap * gap, fewer=1 if unbiased else 0)
    floor = variance + eps if eps_mode == "add" else variance.clamp(min=eps)
    scale = torch.where(variance == 0, 0.0, torch.where(variance == 0, 1.0, floor).rsqrt())
    whitened = gap * scale if shift_mean else gap * scale + (base + centre)
    return torch.where(live, whitened, 0.0).to(result_dtype(x))
