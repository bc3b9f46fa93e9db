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
def cispo(logp, old_logp, advantage, clip_low, clip_high):
    r"""CISPO: ``-sg[clip(rho, 1-clip_low, 1+clip_high)] A log pi``; every token keeps a gradient.

    MiniMax-M1 2025, arXiv:2506.13585, eq. 4-5. The bounds are distances from 1; the paper sets no lower one:
    ``clip_low=1``. TRL's bound is the cap itself: ``clip_high = cap - 1``.
    """
    weight = clip(exp(logp - old_logp), 1.0 - clip_low, 1.0 + clip_high) * advantage
    return -weight * logp, -weight


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
