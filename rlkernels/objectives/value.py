"""Value-function objectives: ``columns, parameters -> (value, d value / d value prediction)``."""

from rlkernels.objectives.functions import clip, where
from rlkernels.objectives.language import objective


@objective
def value_plain(value, returns):
    r"""Squared error: ``(V - R)^2 / 2``. Schulman et al. 2017, arXiv:1707.06347, eq. 9, with the customary half."""
    gap = value - returns
    return 0.5 * gap * gap, gap


@objective
def value_clip(value, old_value, returns, clip_range):
    r"""Clipped value loss: ``max((V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2) / 2``, ``c = clip_range``.

    Dhariwal et al. 2017, OpenAI Baselines (ppo2). At an exact tie, and inside the clip, the derivative is the unclipped
    one.
    """
    gap = value - old_value
    free = value - returns
    # Added to free, because the sum is then exactly free inside the clip. old_value + gap rounds away from value, and
    # 1 fp32 token in 1500 would lose its gradient.
    held = free + (clip(gap, -clip_range, clip_range) - gap)
    keep = where(held * held <= free * free, free, 0.0 * held)  # 0.0 * held: a NaN in old_value stays NaN
    return 0.5 * where(held * held <= free * free, free * free, held * held), keep
