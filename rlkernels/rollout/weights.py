"""Importance weights of the rollout mismatch: truncated, masked, per token or per sequence."""

from typing import Literal, get_args, overload

import torch
from torch import Tensor

from rlkernels import checks
from rlkernels.checks import tokens as checks_tokens
from rlkernels.packed_rows import takes_one_row
from rlkernels.rollout.log_ratios import LogRatios, bound, clamped, log_ratios, ordered, outside
from rlkernels.sequences import means, per_token
from rlkernels.tracing import without_gradient
from rlkernels.types import (
    Mask,
    Metrics,
    Number,
    Offsets,
    PerToken,
    PerTokenOrSequence,
    RhoGate,
    RolloutGate,
    RolloutLevel,
    RolloutMode,
)

LEVELS, MODES, GATES, RHO_GATES = (get_args(x) for x in (RolloutLevel, RolloutMode, RolloutGate, RhoGate))
NEAREST = 1e-6
"""The distance that a probability of a divergence gate keeps from 0 and 1, because its logarithm must be finite."""


@overload
def rollout_weights(
    old_logprobs: PerToken,
    rollout_logprobs: PerToken,
    mask: Mask | None = None,
    *,
    level: RolloutLevel = "token",
    mode: RolloutMode = "clip",
    low: Number | None = None,
    high: Number | None = None,
    gate: RolloutGate = "ratio",
    gate_level: RolloutLevel | None = None,
    batch_normalize: bool = False,
    batch_mean: Number | None = None,
    nan_ratio: Number = 1.0,
    cu_seqlens: Offsets | None = None,
    return_metrics: Literal[False] = False,
) -> PerToken: ...


@overload
def rollout_weights(
    old_logprobs: PerToken,
    rollout_logprobs: PerToken,
    mask: Mask | None = None,
    *,
    level: RolloutLevel = "token",
    mode: RolloutMode = "clip",
    low: Number | None = None,
    high: Number | None = None,
    gate: RolloutGate = "ratio",
    gate_level: RolloutLevel | None = None,
    batch_normalize: bool = False,
    batch_mean: Number | None = None,
    nan_ratio: Number = 1.0,
    cu_seqlens: Offsets | None = None,
    return_metrics: Literal[True],
) -> tuple[PerToken, Metrics]: ...


@overload
def rollout_weights(
    old_logprobs: PerToken,
    rollout_logprobs: PerToken,
    mask: Mask | None = None,
    *,
    level: RolloutLevel = "token",
    mode: RolloutMode = "clip",
    low: Number | None = None,
    high: Number | None = None,
    gate: RolloutGate = "ratio",
    gate_level: RolloutLevel | None = None,
    batch_normalize: bool = False,
    batch_mean: Number | None = None,
    nan_ratio: Number = 1.0,
    cu_seqlens: Offsets | None = None,
    return_metrics: bool,
) -> PerToken | tuple[PerToken, Metrics]: ...


@takes_one_row(per_token=True)
@without_gradient
def rollout_weights(
    old_logprobs: PerToken,
    rollout_logprobs: PerToken,
    mask: Mask | None = None,
    *,
    level: RolloutLevel = "token",
    mode: RolloutMode = "clip",
    low: Number | None = None,
    high: Number | None = None,
    gate: RolloutGate = "ratio",
    gate_level: RolloutLevel | None = None,
    batch_normalize: bool = False,
    batch_mean: Number | None = None,
    nan_ratio: Number = 1.0,
    cu_seqlens: Offsets | None = None,
    return_metrics: bool = False,
) -> PerToken | tuple[PerToken, Metrics]:
    r"""Weighs tokens by how likely the trainer's policy is to sample them, over how likely the rollout engine was.

    ``w_t = exp(q_t)``,  ``q = log pi_old - log pi_rollout``, at the level of a token, or ``exp(sum_t q_t)`` and
    ``exp(mean_t q_t)`` of its sequence. ``"clip"`` brings the weight into ``[low, high]``; ``"mask"`` makes it 0 where
    the gate lies outside. The names of the field:

    * TIS: ``high=2.0``; IcePop, MIS: ``mode="mask"`` with both bounds
    * sequence TIS and MIS: ``level="sequence"``; TRL's default is ``mode="mask", high=3.0`` of it
    * masked sequences with weights per token: ``mode="mask", gate_level="sequence_mean"``
    * trust region: ``mode="mask", gate="kl", high=...``, per token or as a mean of the sequence

    Args:
        old_logprobs, rollout_logprobs: ``[B, L]``, or packed ``[T]``: the sampled tokens under the policy that sampled
            them, as the trainer and as the engine computed it, with one temperature and vocabulary.
        mask: live tokens, same shape, any pattern. A dead token weighs 0, whatever it holds.
        level: ``"token"``, ``"sequence"`` (sum of log-ratios) or ``"sequence_mean"`` (their mean).
        mode, low, high: as above; None is no bound.
        gate: the number that ``"mask"`` compares with the bounds: the ``"ratio"``; ``"kl"``, the KL of a token taken or
            not taken, engine to trainer; ``"tv"``, ``|p_rollout - p_old|``. The last two have an upper bound alone.
        gate_level: that of the gate where it is not the weight's own.
        batch_normalize: divides by the mean weight of live tokens, or of sequences that have some.
        batch_mean: that mean over the whole batch, where this call sees a part of it.
        nan_ratio: the ratio of a token whose rollout log-probability is NaN, because the engine could not score it.
        cu_seqlens: offsets ``[S + 1]`` of a packed batch.

    Returns:
        Weights shaped like ``old_logprobs``: float32, float64 for float64; not differentiable. With
        ``return_metrics``, ``(weights, dict)``: ``rollout_weight`` (the mean, before normalisation),
        ``rollout_weight_ess`` (``(mean w)^2 / mean w^2``) and ``rollout_filtered``, the share of live tokens outside
        the bounds.

    Raises:
        TypeError, ValueError: dtypes or shapes that do not match; unknown names; ``"mask"`` without a bound; bounds in
            the wrong order; an option that the mode does not look at.

    Example:
        >>> old, rollout = torch.tensor([-1.0, -0.5, -0.2]), torch.tensor([-1.0, float("nan"), -1.2])
        >>> rollout_weights(old, rollout, high=2.0)
        tensor([1., 1., 2.])

    Yao et al. 2025 (truncated importance sampling); IcePop, arXiv:2510.18855.
    """
    caller = "rollout_weights"
    checks.choice(caller, "level", level, LEVELS)
    checks.choice(caller, "mode", mode, MODES)
    checks.choice(caller, "gate", gate, GATES)
    if gate_level is not None:
        checks.choice(caller, "gate_level", gate_level, LEVELS)
    batch_normalize = checks.flag(caller, "batch_normalize", batch_normalize)
    levels = {"level": level, "gate_level": gate_level}
    above = [f"{name}={x!r}" for name, x in levels.items() if x not in (None, "token")]
    ratios = log_ratios(
        caller, old_logprobs, rollout_logprobs, mask, cu_seqlens, nan_ratio, above[0] if above else None
    )
    low, high = bound(caller, "low", low, old_logprobs), bound(caller, "high", high, old_logprobs)
    ordered(caller, low, high)
    if mode == "clip" and (gate != "ratio" or gate_level is not None):
        name = "gate_level" if gate == "ratio" else "gate"
        raise ValueError(f"{caller}: mode 'clip' takes no {name}; it bounds the weight itself, so pass mode='mask'")
    if mode == "mask" and low is None and high is None:
        raise ValueError(f"{caller}: mode 'mask' needs low or high; without them it drops nothing")
    if gate != "ratio" and (low is not None or high is None):
        raise ValueError(f"{caller}: gate {gate!r} is a divergence; it needs high and takes no low")
    if batch_mean is not None:
        if not batch_normalize:
            raise ValueError(f"{caller}: batch_mean is read with batch_normalize=True alone")
        batch_mean = checks_tokens.not_negative(caller, "batch_mean", batch_mean, old_logprobs)

    weights = ratios.at(level, ratios.gap).exp()
    compared = weights if mode == "clip" else _gate(ratios, gate, level if gate_level is None else gate_level)
    beyond = outside(compared, low, high)
    weights = clamped(weights, low, high) if mode == "clip" else torch.where(beyond, 0.0, weights)
    weights = torch.where(ratios.live, weights, 0.0)
    normalized = weights
    if batch_normalize:
        mean = _batch_mean(ratios, level, weights) if batch_mean is None else batch_mean
        normalized = weights / _or_one(mean)
    if not checks.flag(caller, "return_metrics", return_metrics):
        return normalized.to(ratios.dtype)
    return normalized.to(ratios.dtype), weight_metrics(ratios, weights, beyond)


def weight_metrics(ratios: LogRatios, weights: Tensor, beyond: Tensor) -> Metrics:
    """Computes the metrics of ``rollout_weights``; ``beyond``: the tokens outside of the bounds."""
    mean, square = ratios.mean(weights), ratios.mean(weights * weights)
    found = {
        "rollout_weight": mean,
        "rollout_weight_ess": torch.where(square == 0, 0.0, mean * mean / _or_one(square)),
        "rollout_filtered": ratios.mean(beyond.double()),
    }
    return {name: x.to(ratios.dtype) for name, x in found.items()}


def _or_one(x: Number) -> Number:
    """Returns ``x``, or 1 where it is 0, as a divisor of what is 0 there."""
    if isinstance(x, torch.Tensor):
        return torch.where(x == 0, 1.0, x.double())
    return 1.0 if x == 0 else x


def _batch_mean(ratios: LogRatios, level: RolloutLevel, weights: Tensor) -> Tensor:
    """Returns the mean weight of live tokens, or of sequences that have a live token."""
    if level == "token":
        return ratios.mean(weights)
    # The weights of an empty sequence are 0.
    return means(weights, ratios.live, ratios.offsets).sum() / ratios.filled().sum().clamp(min=1)


def _gate(ratios: LogRatios, gate: RolloutGate, level: RolloutLevel) -> Tensor:
    """Returns, for each token, the number that the bounds are compared with."""
    if gate == "ratio":
        return ratios.at(level, ratios.gap).exp()
    p_rollout, p_old = (x.exp().clamp(NEAREST, 1 - NEAREST) for x in (ratios.rollout, ratios.old))
    if gate == "tv":
        return ratios.at(level, (p_rollout - p_old).abs())
    taken, other = p_rollout * (p_rollout / p_old).log(), (1 - p_rollout) * ((1 - p_rollout) / (1 - p_old)).log()
    return ratios.at(level, taken + other)


@takes_one_row(per_token=True)
@without_gradient
def rho_correction(
    old_logprobs: PerToken,
    rollout_logprobs: PerToken,
    mask: Mask | None = None,
    *,
    advantages: PerTokenOrSequence | None = None,
    level: RolloutLevel = "token",
    gate: RhoGate = "ratio",
    mask_low: Number | None = None,
    mask_high: Number | None = None,
    clamp_low: Number | None = None,
    clamp_high: Number | None = None,
    log_ratio_clamp: Number | None = 10.0,
    nan_ratio: Number = 1.0,
    cu_seqlens: Offsets | None = None,
) -> PerToken:
    r"""Weighs tokens by the ratio ``rho`` of trainer and engine: first some are dropped, then the others are clamped.

    ``rho = exp(clip(q, -c, c))``,  ``q = log pi_old - log pi_rollout``, or that of its sequence. A token is dropped
    (weight 0) where ``rho`` lies outside of ``[mask_low, mask_high]``. With ``gate="tv"`` the bounds are for the
    sequence's mean of ``|rho_t - 1|``, and of such a sequence the tokens with ``sign(q_t) A_t > 0`` are dropped: those
    that would move further away (VACO).

    Args:
        old_logprobs, rollout_logprobs, mask, level, nan_ratio, cu_seqlens: as for ``rollout_weights``.
        advantages: ``A``, same shape or one per sequence, for ``gate="tv"`` alone.
        gate: ``"ratio"`` or ``"tv"``.
        mask_low, mask_high, clamp_low, clamp_high: bounds; None is no bound.
        log_ratio_clamp: ``c``; None does not clamp.

    Returns:
        Weights shaped like ``old_logprobs``: float32, float64 for float64; not differentiable; 0 at dead tokens.

    Raises:
        TypeError, ValueError: dtypes or shapes that do not match; unknown names; bounds in the wrong order;
            ``advantages`` missing, or given where they are not read.

    Example:
        >>> old, rollout = torch.tensor([-1.0, -0.5, -0.2]), torch.tensor([-1.0, -0.9, -1.2])
        >>> rho_correction(old, rollout, mask_high=2.0, clamp_high=1.25)
        tensor([1.0000, 1.2500, 0.0000])

    open-instruct (AI2), 2026; VACO, arXiv:2603.01365.
    """
    caller = "rho_correction"
    checks.choice(caller, "level", level, LEVELS)
    checks.choice(caller, "gate", gate, RHO_GATES)
    of_sequences = "gate='tv'" if gate == "tv" else None if level == "token" else f"level={level!r}"
    ratios = log_ratios(caller, old_logprobs, rollout_logprobs, mask, cu_seqlens, nan_ratio, of_sequences)
    names = "mask_low", "mask_high", "clamp_low", "clamp_high"
    given = (mask_low, mask_high, clamp_low, clamp_high)
    bounds = [bound(caller, name, x, old_logprobs) for name, x in zip(names, given, strict=True)]
    ordered(caller, bounds[0], bounds[1], names[:2])
    ordered(caller, bounds[2], bounds[3], names[2:])
    if (advantages is not None) != (gate == "tv"):
        raise ValueError(f"{caller}: gate {gate!r} {'needs' if gate == 'tv' else 'takes no'} advantages")
    gap = ratios.gap
    if log_ratio_clamp is not None:
        limit = checks_tokens.not_negative(caller, "log_ratio_clamp", log_ratio_clamp, old_logprobs)
        gap = clamped(gap, -limit, limit)
    rho = ratios.at(level, gap).exp()
    if advantages is None:
        dropped = outside(rho, bounds[0], bounds[1])
    else:
        checks.floating(caller, "advantages", advantages)
        checks.no_gradient(caller, advantages=advantages)
        advantages = per_token(caller, "advantages", advantages, old_logprobs, ratios.offsets)
        checks.shape(caller, "advantages", advantages, old_logprobs.shape)
        checks.one_device(caller, "old_logprobs", old_logprobs, advantages=advantages)
        away = torch.where(ratios.live, gap.sign() * advantages.double(), 0.0) > 0
        dropped = away & outside(ratios.at("sequence_mean", (gap.exp() - 1.0).abs()), bounds[0], bounds[1])
    return torch.where(ratios.live & ~dropped, clamped(rho, bounds[2], bounds[3]), 0.0).to(ratios.dtype)
