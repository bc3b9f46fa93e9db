"""Sampled estimators of ``KL(pi || ref)``, each once: ``logp, ref_logp -> (value, d value / d logp)``.

A good estimate may have a bad gradient. As a loss, in expectation, the gradient of k1 is 0, that of k2 is the gradient
of the KL, and that of k3 is the gradient of the other direction, ``KL(ref || pi)``. Schulman 2020, "Approximating KL
divergence".
"""

from rlkernels.objectives.functions import expm1
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
