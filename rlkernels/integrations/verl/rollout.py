"""verl's weights of the rollout correction under their name, with verl's metrics as tensors."""

import math
from typing import Any

import torch
from torch import Tensor

from rlkernels import checks
from rlkernels.advantages.moments import masked_moments
from rlkernels.aggregation import aggregate
from rlkernels.rollout.weights import rollout_weights
from rlkernels.sequences import sequence_means, sequence_sums

FARTHEST = 20.0
"""The log-ratio beyond which verl takes no exponential."""
LEVELS = ("token", "sequence")


@torch.no_grad()
def compute_rollout_correction_weights(
    log_ratio: Tensor,
    response_mask: Tensor,
    rollout_is: str = "token",
    rollout_is_threshold: str | float = 2.0,
    rollout_is_batch_normalize: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""Weighs tokens by the ratio of trainer and rollout engine: ``rollout_weights`` with verl's names.

    Args:
        log_ratio: ``[B, L]``, ``log pi_train - log pi_rollout``. response_mask: ``[B, L]``.
        rollout_is: ``"token"``, or ``"sequence"``: one weight for a response, of its summed log-ratio.
        rollout_is_threshold: a number, or a string of one, above which a weight is cut; or ``"low_high"``, outside of
            which it is 0 (IcePop).
        rollout_is_batch_normalize: divides by the mean weight, over all ranks where torch.distributed is initialised.

    Returns:
        ``(weights, metrics)``: ``[B, L]``, 0 at masked tokens; scalars under verl's keys, detached, on the device. A
        log-ratio beyond 20 counts as 20.

    Raises:
        ValueError: an unknown level; a threshold that is not positive, or whose bounds are in the wrong order.
        TypeError: a threshold that is neither a number nor a string.

    Example:
        >>> ratio, mask = torch.tensor([[0.0, 1.0]]), torch.tensor([[1, 1]])
        >>> weights, metrics = compute_rollout_correction_weights(ratio, mask)
        >>> weights, metrics["rollout_is_mean"]
        (tensor([[1., 2.]]), tensor(1.5000))

    verl 0.9, ``verl.trainer.ppo.rollout_corr_helper``.
    """
    caller = "compute_rollout_correction_weights"
    if rollout_is not in LEVELS:
        raise ValueError(f"{caller}: Invalid rollout_is: {rollout_is!r}, expected one of {', '.join(LEVELS)}")
    low, high = _bounds(caller, rollout_is_threshold)
    checks.tensor(caller, "log_ratio", log_ratio)
    checks.tensor(caller, "response_mask", response_mask)
    gap = log_ratio.detach()
    columns = gap, torch.zeros_like(gap), response_mask
    nearest, farthest = math.exp(-FARTHEST), math.exp(FARTHEST)
    level: Any = rollout_is
    raw = rollout_weights(*columns, level=level, low=nearest, high=farthest)
    options: dict[str, Any] = {"level": level, "high": high}
    options |= {"low": min(nearest, high)} if low is None else {"low": low, "mode": "mask"}
    weights, found = rollout_weights(*columns, **options, return_metrics=True)
    metrics = _metrics(weights, raw, gap, response_mask, rollout_is, 1.0 / high if low is None else low, high)
    metrics["rollout_is_eff_sample_size"] = found["rollout_weight_ess"]
    if low is not None:
        metrics["rollout_is_oob_ratio"] = found["rollout_filtered"]
    if rollout_is_batch_normalize:
        mean = _mean_weight(weights, response_mask, rollout_is)
        # Not below verl's 1e-8, where it leaves the weights as they are.
        mean = torch.where(mean > 1e-8, mean, 1.0)
        weights = rollout_weights(*columns, **options, batch_normalize=True, batch_mean=mean)
        metrics["rollout_is_batch_norm_factor"] = mean
    return weights, metrics


def _bounds(caller: str, threshold: Any) -> tuple[float | None, float]:
    """Returns the lower bound, None without one, and the upper one of verl's threshold."""
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float, str)):
        got = "not a boolean" if isinstance(threshold, bool) else f"got {type(threshold).__name__}"
        raise TypeError(f"{caller}: rollout_is_threshold must be a number or a string, {got}")
    parts = threshold.strip().split("_", 1) if isinstance(threshold, str) else [threshold]
    try:
        bounds = [float(part) for part in parts]
    except ValueError as error:
        raise ValueError(
            f"{caller}: Invalid rollout_is_threshold {threshold!r}, expected a number or 'low_high'"
        ) from error
    if not all(0 < bound < math.inf for bound in bounds) or bounds != sorted(bounds):
        raise ValueError(
            f"{caller}: rollout_is_threshold must be positive, its lower bound not above the other, got {threshold!r}"
        )
    return (None, bounds[0]) if len(bounds) == 1 else (bounds[0], bounds[1])


def _mean_weight(weights: Tensor, mask: Tensor, level: str) -> Tensor:
    """Returns the mean weight of live tokens, or of sequences that have some, over all ranks."""
    group = torch.distributed.group.WORLD if _has_ranks() else None
    if level == "token":
        return masked_moments(weights, mask, process_group=group).mean
    filled = sequence_sums(torch.ones_like(weights), mask) > 0
    return masked_moments(sequence_means(weights, mask), filled, process_group=group).mean


def _has_ranks() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _metrics(
    weights: Tensor, raw: Tensor, gap: Tensor, mask: Tensor, level: str, low: float, high: float
) -> dict[str, Tensor]:
    """Returns verl's statistics of the weights; ``raw``: the weights before the bounds."""
    live = mask != 0
    if level == "sequence":
        of_rows = sequence_sums(gap, mask)
        largest, smallest = of_rows.amax().clamp(max=FARTHEST).exp(), of_rows.amin().exp()
        above, below = (x.float().mean() for x in (of_rows > math.log(high), of_rows < math.log(low)))
    else:
        largest = torch.where(live, weights, -torch.inf).amax()
        smallest = torch.where(live, weights, torch.inf).amin()
        above, below = (aggregate(x.float(), mask) for x in (raw > high, raw < low))
    moments = masked_moments(weights, mask)
    means, raw_means = sequence_means(weights, mask), sequence_means(raw, mask)
    rows = masked_moments(means)
    return {
        "rollout_is_max": largest,
        "rollout_is_min": smallest,
        "rollout_is_mean": moments.mean.to(weights.dtype),
        "rollout_is_ratio_fraction_high": above,
        "rollout_is_ratio_fraction_low": below,
        "rollout_is_std": _deviation(moments.squares, moments.count).to(weights.dtype),
        "rollout_is_seq_mean": rows.mean.to(weights.dtype),
        "rollout_is_seq_std": _deviation(rows.squares, rows.count - 1).to(weights.dtype),
        "rollout_is_seq_max": means.amax(),
        "rollout_is_seq_min": means.amin(),
        "rollout_is_seq_max_deviation": (means - 1.0).abs().amax(),
        "rollout_is_seq_fraction_high": (raw_means > high).float().mean(),
        "rollout_is_seq_fraction_low": (raw_means < low).float().mean(),
    }


def _deviation(squares: Tensor, count: Tensor) -> Tensor:
    """Returns a standard deviation, 0 of one element or none."""
    return (squares / count.clamp(min=1)).sqrt()
