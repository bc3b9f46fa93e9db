"""Policy objectives that leave a token out where policy and behaviour policy are too far apart.

``gate``: each compares with ``>`` or ``<``, so that a NaN passes and keeps its gradient. ``p = exp(logp)`` is the
probability of the taken token.
"""

from rlkernels.objectives.functions import exp, expm1, log, where
from rlkernels.objectives.language import objective


@objective
def rollout_is(logp, rollout_logp, advantage, clip_low, clip_high):
    r"""Double-sided mask: ``-sg[rho 1(1-clip_low < rho < 1+clip_high)] A log pi``, ``rho = exp(logp - rollout_logp)``.

    GLM-5 2026, arXiv:2602.15763.
    """
    ratio = exp(logp - rollout_logp)
    inside = where(ratio <= 1.0 - clip_low, 0.0 * advantage, ratio * advantage)
    weight = where(ratio >= 1.0 + clip_high, 0.0 * advantage, inside)
    return -weight * logp, -weight


@objective
def dppo_tv(logp, old_logp, advantage, delta_low=0.2, delta_high=0.2, ratio_max=20.0):
    r"""DPPO with total variation: ``-sg[min(rho, ratio_max)] A log pi`` where ``p - p_old <= delta_high`` (``A > 0``)
    or ``p - p_old >= -delta_low`` (else), and 0 elsewhere.

    2026, arXiv:2602.04879; verl's form.
    """
    ratio = exp(logp - old_logp)
    shift = exp(logp) - exp(old_logp)
    gate = where(advantage > 0.0, shift - delta_high, -shift - delta_low)
    weight = where(gate > 0.0, 0.0 * advantage, where(ratio > ratio_max, ratio_max, ratio) * advantage)
    return -weight * logp, -weight


@objective
def dppo_tv_surrogate(logp, old_logp, advantage, delta_low=0.2, delta_high=0.2):
    r"""DPPO with total variation and a ratio with a gradient: ``-rho A`` where ``dppo_tv`` keeps the token, else 0.

    2026, arXiv:2602.04879; the form of SkyRL and prime-rl.
    """
    gap = logp - old_logp
    ratio = exp(gap)
    free = where(advantage > 0.0, ratio * advantage, where(advantage < 0.0, ratio * advantage, advantage * gap))
    shift = exp(logp) - exp(old_logp)
    gate = where(advantage > 0.0, shift - delta_high, -shift - delta_low)
    kept = where(gate > 0.0, 0.0 * advantage, free)
    return -kept, -kept


@objective
def dppo_kl(logp, old_logp, advantage, delta_low=0.2, delta_high=0.2, ratio_max=20.0):
    r"""DPPO with a binary KL: ``-sg[min(rho, ratio_max)] A log pi``, and 0 where ``D > delta_high`` with ``A > 0``
    and ``p > p_old``, or ``D > delta_low`` with another ``A`` and ``p < p_old``.

    ``D = p_old (log p_old - log p) + (1-p_old) log((1-p_old+e) / (1-p+e))``, ``e = 1e-8``. 2026, arXiv:2602.04879;
    verl's form. ``1 - p`` is ``-expm1(logp)``, because fp32 has no digits of it near ``p = 1``.
    """
    gap = logp - old_logp
    ratio = exp(gap)
    other = -expm1(old_logp)
    divergence = other * log((other + 1e-8) / (1e-8 - expm1(logp))) - exp(old_logp) * gap
    gate = where(advantage > 0.0, divergence - delta_high, divergence - delta_low)
    away = where(advantage > 0.0, gap, -gap)
    far = where(away > 0.0, gate, -1.0)
    weight = where(far > 0.0, 0.0 * advantage, where(ratio > ratio_max, ratio_max, ratio) * advantage)
    return -weight * logp, -weight


@objective
def dppo_kl_surrogate(logp, old_logp, advantage, delta_low=0.2, delta_high=0.2):
    r"""DPPO with a binary KL and a ratio with a gradient: ``-rho A`` where ``dppo_kl`` keeps the token, else 0.

    2026, arXiv:2602.04879; the form of SkyRL and prime-rl.
    """
    gap = logp - old_logp
    ratio = exp(gap)
    free = where(advantage > 0.0, ratio * advantage, where(advantage < 0.0, ratio * advantage, advantage * gap))
    other = -expm1(old_logp)
    divergence = other * log((other + 1e-8) / (1e-8 - expm1(logp))) - exp(old_logp) * gap
    gate = where(advantage > 0.0, divergence - delta_high, divergence - delta_low)
    away = where(advantage > 0.0, gap, -gap)
    far = where(away > 0.0, gate, -1.0)
    kept = where(far > 0.0, 0.0 * advantage, free)
    return -kept, -kept


@objective
def tv_symmetric(logp, rollout_logp, advantage, delta=0.1):
    r"""Surrogate within a trust region of total variation: ``-rho A`` where ``|p - p_rollout| <= delta``, else 0.

    prime-rl's ``ipo``; ``rho = exp(logp - rollout_logp)``.
    """
    gap = logp - rollout_logp
    ratio = exp(gap)
    free = where(advantage > 0.0, ratio * advantage, where(advantage < 0.0, ratio * advantage, advantage * gap))
    shift = exp(logp) - exp(rollout_logp)
    kept = where(shift > delta, 0.0 * advantage, where(-shift > delta, 0.0 * advantage, free))
    return -kept, -kept


@objective
def ref_kl(logp, rollout_logp, ref_logp, delta_low=0.2):
    r"""Distillation on own samples: ``-rho sg[log ref - log pi]`` where ``p - p_rollout >= -delta_low``, else 0.

    prime-rl; ``rho = exp(logp - rollout_logp)``. The gap to the reference takes the advantage's place, so the loss has
    none. Its gradient is that of ``KL(pi || ref)``, corrected for the rollout.
    """
    gap = logp - rollout_logp
    ratio = exp(gap)
    gain = ref_logp - logp
    free = where(gain > 0.0, ratio * gain, where(gain < 0.0, ratio * gain, gain * gap))
    gate = exp(rollout_logp) - exp(logp) - delta_low
    kept = where(gate > 0.0, 0.0 * gain, free)
    return -kept, -kept
