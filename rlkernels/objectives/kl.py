"""Sampled estimators of ``KL(pi || ref)``: ``logp, ref_logp -> (value, d value / d logp)``.

A good estimate may have a bad gradient. As a loss, in expectation, the gradient of k1 is 0, that of k2 is the gradient
of the KL, and that of k3 is the gradient of the other direction, ``KL(ref || pi)``. Schulman 2020, "Approximating KL
divergence".
"""

from rlkernels.objectives.functions import clip, exp, expm1, where
from rlkernels.objectives.language import objective


@objective
def k1(logp, ref_logp):
    r"""k1: ``log pi - log ref``; unbiased, either sign."""
    return logp - ref_logp, 1.0


@objective
def k2(logp, ref_logp):
    r"""k2: ``(log pi - log ref)^2 / 2``; its gradient is that of the KL in expectation."""
    gap = logp - ref_logp
    return 0.5 * gap * gap, gap


@objective
def k3(logp, ref_logp):
    r"""k3: ``e^g - 1 - g``, ``g = log ref - log pi``; unbiased, never negative."""
    gap = ref_logp - logp
    return expm1(gap) - gap, -expm1(gap)


@objective
def kl_abs(logp, ref_logp):
    r"""abs: ``|log pi - log ref|``; never negative, biased upwards. Its slope is 0 where both are equal."""
    gap = logp - ref_logp
    return where(gap < 0.0, -gap, gap), where(gap > 0.0, 1.0, where(gap < 0.0, -1.0, gap))


@objective
def kl_term(logp, ref_logp, old_logp, order, low, high, value_low, value_high, cap, moving, straight):
    r"""A KL term: ``w clip(k(clip(d, low, high)), value_low, value_high)``, ``d = log pi - log ref``, ``w = min(rho,
    cap)``, ``rho = exp(logp - old_logp)``.

    ``k`` is the estimator of number ``order``: k1, k2, k3, and abs for 0. Beyond a bound its slope is 0. ``moving`` is
    1 where the gradient flows through ``rho``, and 0 where ``w`` is a constant. ``straight``, 1: the value is that of
    the estimator without ``w``, and the slope is ``w d``, that of k2. A term without a ratio has ``old_logp = logp``.

    The estimators stand side by side, because one function with a number serves every combination of options with one
    kernel. Zeros are kept from ``w``, because an infinite ratio times 0 is NaN.
    """
    gap = logp - ref_logp
    held = where(gap < low, low, where(gap > high, high, gap))
    tail = expm1(-held)
    first = where(order < 0.5, where(held < 0.0, -held, held), held)
    first_slope = where(order < 0.5, where(held > 0.0, 1.0, where(held < 0.0, -1.0, held)), 1.0)
    second = where(order < 2.5, 0.5 * held * held, tail + held)
    second_slope = where(order < 2.5, held, -tail)
    estimate = where(order < 1.5, first, second)
    inner = where(order < 1.5, first_slope, second_slope)
    bounded = clip(estimate, value_low, value_high)
    inside = where(gap < low, 0.0, where(gap > high, 0.0, inner))
    slope = where(estimate < value_low, 0.0, where(estimate > value_high, 0.0, inside))
    ratio = exp(logp - old_logp)
    weight = where(ratio > cap, cap, ratio)
    through = where(ratio > cap, slope, slope + moving * bounded)
    push = where(straight > 0.5, gap, through)
    value = where(bounded > 0.0, weight * bounded, where(bounded < 0.0, weight * bounded, bounded))
    grown = where(push > 0.0, weight * push, where(push < 0.0, weight * push, push))
    return where(straight > 0.5, bounded, value), grown
