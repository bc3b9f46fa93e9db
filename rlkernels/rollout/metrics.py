"""Metrics of the distance between rollout engine and trainer: detached, and without a host synchronisation."""

import torch
from torch import Tensor

from rlkernels.packed_rows import takes_one_row
from rlkernels.rollout.log_ratios import LogRatios, log_ratios
from rlkernels.sequences import sums
from rlkernels.tracing import without_gradient
from rlkernels.types import Mask, Metrics, Number, Offsets, PerToken


@takes_one_row()
@without_gradient
def rollout_metrics(
    old_logprobs: PerToken,
    rollout_logprobs: PerToken,
    mask: Mask | None = None,
    *,
    nan_ratio: Number = 1.0,
    cu_seqlens: Offsets | None = None,
) -> Metrics:
    r"""Tells how far the rollout engine and the trainer are apart on the tokens that the engine sampled.

    With ``q = log pi_old - log pi_rollout`` and ``r = e^q``, over live tokens:

    * ``rollout_kl``: ``mean(-q)``, and ``rollout_k3``: ``mean(r - 1 - q)``, estimates of ``KL(rollout || old)``; the
      second is never negative
    * ``rollout_ratio``, ``rollout_ratio_min``, ``rollout_ratio_max``: mean and extremes of ``r``; the mean is 1 where
      both use one temperature and vocabulary
    * ``rollout_tv``: ``mean |r - 1| / 2``, an estimate of the total variation; ``rollout_chi2``: ``mean r^2 - 1``
    * ``rollout_ess``: ``(mean r)^2 / mean r^2``, the share of tokens that an average over weights ``r`` is worth
    * ``rollout_prob_gap``, ``rollout_prob_gap_max``: of ``|pi_old - pi_rollout|``
    * ``rollout_unscored``: the share of NaN in ``rollout_logprobs``
    * where sequences are known, ``rollout_sequence_kl``: the mean over sequences of ``-sum_t q_t``, and
      ``rollout_sequence_ratio_max``: the largest ``exp(sum_t q_t)``

    Args:
        old_logprobs, rollout_logprobs, mask, nan_ratio, cu_seqlens: as for ``rollout_weights``.

    Returns:
        Scalars by their names: float32, float64 for float64. Without a live token they are 0.

    Raises:
        TypeError, ValueError: dtypes or shapes that do not match.

    Example:
        >>> found = rollout_metrics(torch.tensor([-1.0, -0.5]), torch.tensor([-1.0, -1.5]))
        >>> found["rollout_kl"], found["rollout_ratio_max"]
        (tensor(-0.5000), tensor(2.7183))

    Schulman 2020, "Approximating KL divergence" (k1, k3).
    """
    return mismatch(log_ratios("rollout_metrics", old_logprobs, rollout_logprobs, mask, cu_seqlens, nan_ratio))


@torch.no_grad()
def mismatch(ratios: LogRatios) -> Metrics:
    """Computes ``rollout_metrics`` of checked arguments."""
    ratio, prob_gap = ratios.gap.exp(), (ratios.old.exp() - ratios.rollout.exp()).abs()
    mean, square, some = ratios.mean(ratio), ratios.mean(ratio * ratio), ratios.live.any()
    found = {
        "rollout_kl": ratios.mean(-ratios.gap),
        "rollout_k3": ratios.mean(ratios.gap.expm1() - ratios.gap),
        "rollout_ratio": mean,
        "rollout_ratio_min": -_largest(torch.where(ratios.live, -ratio, -torch.inf)),
        "rollout_ratio_max": _largest(torch.where(ratios.live, ratio, -torch.inf)),
        "rollout_tv": ratios.mean(0.5 * (ratio - 1.0).abs()),
        "rollout_chi2": square - 1.0,
        "rollout_ess": mean * mean / square,
        "rollout_prob_gap": ratios.mean(prob_gap),
        "rollout_prob_gap_max": _largest(torch.where(ratios.live, prob_gap, -torch.inf)),
        "rollout_unscored": ratios.mean(ratios.unscored.double()),
    }
    if ratios.has_sequences():
        of_sequences, filled = sums(ratios.gap, ratios.live, ratios.offsets), ratios.filled()
        found["rollout_sequence_kl"] = -of_sequences.sum() / filled.sum().clamp(min=1)
        found["rollout_sequence_ratio_max"] = _largest(torch.where(filled > 0, of_sequences.exp(), -torch.inf))
    return {name: torch.where(some, x, 0.0).to(ratios.dtype) for name, x in found.items()}


def _largest(x: Tensor) -> Tensor:
    """Returns the largest element, minus infinity where there is none."""
    return torch.cat([x.reshape(-1), x.new_full((1,), -torch.inf)]).amax()
