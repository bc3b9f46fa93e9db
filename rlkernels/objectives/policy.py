"""Policy objectives, each once: ``columns, parameters -> (value, d value / d logp)``.

Each objective names its surrogates ``free`` (not clipped) and ``held`` (clipped).

* NaN: a comparison is written so that NaN takes the branch with a gradient. ``where(held < free, 0.0, free)`` keeps a
  NaN, but ``where(free <= held, free, 0.0)`` would return a zero gradient beside a NaN loss.
* Zero advantage: its loss must be 0 for every ratio. From a log-ratio of 89 on the ratio is infinite in fp32, and
  ``inf * 0`` is NaN. The objectives use ``advantage * gap`` there, which is 0, and NaN only for a NaN.
* Ties: where both surrogates are equal, the derivative is the unclipped one on every backend. ``torch.min`` would
  return half of it.
* Defaults: those that papers and trainers agree on. CISPO has none, because three conventions are in use.
"""

from rlkernels.objectives.functions import clip, exp, sigmoid, where
from rlkernels.objectives.language import objective


@objective
def reinforce(logp, advantage):
    r"""REINFORCE: ``-A log pi``. Williams 1992."""
    return -advantage * logp, -advantage


@objective
def surrogate(logp, old_logp, advantage):
    r"""Surrogate without a clip: ``-rho A``, ``rho = exp(logp - old_logp)``.

    Schulman et al. 2017, arXiv:1707.06347, eq. 6.
    """
    gap = logp - old_logp
    ratio = exp(gap)
    free = where(advantage > 0.0, ratio * advantage, where(advantage < 0.0, ratio * advantage, advantage * gap))
    return -free, -free


@objective
def ppo_clip(logp, old_logp, advantage, clip_low=0.2, clip_high=0.2):
    r"""PPO: ``-min(rho A, clip(rho, 1-clip_low, 1+clip_high) A)``, ``rho = exp(logp - old_logp)``.

    Schulman et al. 2017, arXiv:1707.06347, eq. 7; two bounds ("clip-higher") after DAPO, arXiv:2503.14476.
    """
    gap = logp - old_logp
    ratio = exp(gap)
    free = where(advantage > 0.0, ratio * advantage, where(advantage < 0.0, ratio * advantage, advantage * gap))
    held = clip(ratio, 1.0 - clip_low, 1.0 + clip_high) * advantage
    return -where(held < free, held, free), -where(held < free, 0.0, free)


@objective
def dual_clip(logp, old_logp, advantage, clip_low=0.2, clip_high=0.2, dual_clip=3.0):
    r"""PPO with a floor for bad actions: where ``A < 0`` the loss is at most ``-dual_clip * A``.

    Ye et al. 2020, arXiv:1912.09729.
    """
    gap = logp - old_logp
    ratio = exp(gap)
    free = where(advantage > 0.0, ratio * advantage, where(advantage < 0.0, ratio * advantage, advantage * gap))
    held = clip(ratio, 1.0 - clip_low, 1.0 + clip_high) * advantage
    gain = where(held < free, held, free)
    slope = where(held < free, 0.0, free)
    bound = where(advantage < 0.0, dual_clip * advantage, gain)
    return -where(gain < bound, bound, gain), -where(gain < bound, 0.0, slope)


@objective
def ppo_clip_cap(logp, old_logp, advantage, ratio_cap, clip_low=0.2, clip_high=0.2):
    r"""PPO with a cap on the ratio that is not clipped: ``-min(min(rho, ratio_cap) A, clip(rho, 1-clip_low,
    1+clip_high) A)``.

    TRL's ``delta``, after Prime Intellect 2025, arXiv:2505.07291. The cap holds for both signs of ``A``. A cap above
    ``1 + clip_high`` is that of ``dual_clip`` where ``A < 0``, and changes nothing where ``A > 0``.
    """
    ratio = exp(logp - old_logp)
    free = where(ratio > ratio_cap, ratio_cap, ratio) * advantage
    held = clip(ratio, 1.0 - clip_low, 1.0 + clip_high) * advantage
    slope = where(ratio > ratio_cap, 0.0 * advantage, free)
    # The clipped surrogate has a gradient inside the bounds, because a cap below them makes it the smaller one there.
    inside = where(ratio < 1.0 - clip_low, 0.0, where(ratio > 1.0 + clip_high, 0.0, held))
    return -where(held < free, held, free), -where(held < free, inside, slope)


@objective
def cispo(logp, old_logp, advantage, clip_low, clip_high):
    r"""CISPO: ``-sg[clip(rho, 1-clip_low, 1+clip_high)] A log pi``; every token keeps a gradient.

    MiniMax-M1 2025, arXiv:2506.13585, eq. 4-5. The bounds are distances from 1. The paper sets no lower one, which is
    ``cispo_max_only``. TRL's bound is the cap itself, which is ``cispo_absolute``.
    """
    weight = clip(exp(logp - old_logp), 1.0 - clip_low, 1.0 + clip_high) * advantage
    return -weight * logp, -weight


@objective
def cispo_max_only(logp, old_logp, advantage, clip_high):
    r"""CISPO without a lower bound: ``-sg[min(rho, 1+clip_high)] A log pi``. ScaleRL 2025, arXiv:2510.13786."""
    ratio = exp(logp - old_logp)
    cap = 1.0 + clip_high
    weight = where(ratio > cap, cap, ratio) * advantage
    return -weight * logp, -weight


@objective
def cispo_absolute(logp, old_logp, advantage, ratio_max):
    r"""CISPO with the cap itself, below 1 too: ``-sg[min(rho, ratio_max)] A log pi``; TRL's convention."""
    ratio = exp(logp - old_logp)
    weight = where(ratio > ratio_max, ratio_max, ratio) * advantage
    return -weight * logp, -weight


@objective
def dro(logp, old_logp, advantage, beta):
    r"""DRO: ``-(A log pi - beta/2 (logp - old_logp)^2)``. Richemond et al. 2024, arXiv:2405.19107."""
    gap = logp - old_logp
    return 0.5 * beta * gap * gap - advantage * logp, beta * gap - advantage


@objective
def sapo(logp, old_logp, advantage, tau_pos=1.0, tau_neg=1.05):
    r"""SAPO: ``-(4/tau) sigmoid(tau (rho - 1)) A``, ``tau`` by the sign of ``A``. 2025, arXiv:2511.20347.

    The slope ``4 g (1-g) rho`` is formed as ``4 sigmoid(u) sigmoid(-u) rho``: ``1 - g`` has no digits once ``g`` is
    near 1.
    """
    ratio = exp(logp - old_logp)
    tau = where(advantage > 0.0, tau_pos, tau_neg)
    reach = tau * (ratio - 1.0)
    gate = sigmoid(reach)
    tail = sigmoid(-reach)
    slope = where(tail <= 0.0, 0.0 * advantage, tail * ratio)
    return -4.0 / tau * gate * advantage, -4.0 * gate * slope * advantage
