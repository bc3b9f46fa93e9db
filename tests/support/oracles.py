"""Every objective again, in autograd, by hand from the paper.

Imports torch alone: an oracle that shares code proves nothing.
"""

import torch
from torch.nn.functional import logsigmoid


def reinforce(logp, advantage):
    return -advantage * logp


def surrogate(logp, old_logp, advantage):
    return -(logp - old_logp).exp() * advantage


def ppo_clip(logp, old_logp, advantage, clip_low, clip_high):
    ratio = (logp - old_logp).exp()
    return -torch.min(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage)


def dual_clip(logp, old_logp, advantage, clip_low, clip_high, dual_clip):
    loss = ppo_clip(logp, old_logp, advantage, clip_low, clip_high)
    return torch.where(advantage < 0, torch.min(loss, -dual_clip * advantage), loss)


def ppo_clip_cap(logp, old_logp, advantage, ratio_cap, clip_low, clip_high):
    ratio = (logp - old_logp).exp()
    held = ratio.clamp(1 - clip_low, 1 + clip_high) * advantage
    return -torch.min(ratio.clamp(max=ratio_cap) * advantage, held)


def cispo(logp, old_logp, advantage, clip_low, clip_high):
    return -(logp - old_logp).exp().clamp(1 - clip_low, 1 + clip_high).detach() * advantage * logp


def cispo_max_only(logp, old_logp, advantage, clip_high):
    return -(logp - old_logp).exp().clamp(max=1 + clip_high).detach() * advantage * logp


def cispo_absolute(logp, old_logp, advantage, ratio_max):
    return -(logp - old_logp).exp().clamp(max=ratio_max).detach() * advantage * logp


def dro(logp, old_logp, advantage, beta):
    return -(advantage * logp - beta / 2 * (logp - old_logp).square())


def rollout_is(logp, rollout_logp, advantage, clip_low, clip_high):
    ratio = (logp - rollout_logp).exp().detach()
    out = (ratio <= 1 - clip_low) | (ratio >= 1 + clip_high)
    return -torch.where(out, 0.0, ratio) * advantage * logp


def _left_by_tv(logp, old_logp, advantage, delta_low, delta_high):
    shift = (logp.exp() - old_logp.exp()).detach()
    return torch.where(advantage > 0, shift > delta_high, shift < -delta_low)


def _left_by_kl(logp, old_logp, advantage, delta_low, delta_high):
    p, q = logp.detach().exp(), old_logp.exp()
    kl = q * (old_logp - logp.detach()) + (1 - q) * torch.log((1 - q + 1e-8) / (1 - p + 1e-8))
    return torch.where(advantage > 0, (kl > delta_high) & (p > q), (kl > delta_low) & (p < q))


def dppo_tv(logp, old_logp, advantage, delta_low, delta_high, ratio_max):
    weight = (logp - old_logp).exp().clamp(max=ratio_max).detach() * advantage
    return -torch.where(_left_by_tv(logp, old_logp, advantage, delta_low, delta_high), 0.0, weight) * logp


def dppo_tv_surrogate(logp, old_logp, advantage, delta_low, delta_high):
    free = (logp - old_logp).exp() * advantage
    return -torch.where(_left_by_tv(logp, old_logp, advantage, delta_low, delta_high), 0.0, free)


def dppo_kl(logp, old_logp, advantage, delta_low, delta_high, ratio_max):
    weight = (logp - old_logp).exp().clamp(max=ratio_max).detach() * advantage
    return -torch.where(_left_by_kl(logp, old_logp, advantage, delta_low, delta_high), 0.0, weight) * logp


def dppo_kl_surrogate(logp, old_logp, advantage, delta_low, delta_high):
    free = (logp - old_logp).exp() * advantage
    return -torch.where(_left_by_kl(logp, old_logp, advantage, delta_low, delta_high), 0.0, free)


def tv_symmetric(logp, rollout_logp, advantage, delta):
    far = (logp.exp() - rollout_logp.exp()).abs() > delta
    return -torch.where(far, 0.0, (logp - rollout_logp).exp() * advantage)


def ref_kl(logp, rollout_logp, ref_logp, delta_low):
    out = logp.exp() - rollout_logp.exp() < -delta_low
    return -torch.where(out, 0.0, (logp - rollout_logp).exp() * (ref_logp - logp).detach())


def sapo(logp, old_logp, advantage, tau_pos, tau_neg):
    tau = torch.full_like(advantage, tau_neg).masked_fill(advantage > 0, tau_pos)
    return -4 / tau * torch.sigmoid(tau * ((logp - old_logp).exp() - 1)) * advantage


def k1(logp, ref_logp):
    return logp - ref_logp


def k2(logp, ref_logp):
    return (logp - ref_logp).square() / 2


def k3(logp, ref_logp):
    return (ref_logp - logp).exp() - 1 - (ref_logp - logp)


def value_plain(value, returns):
    return (value - returns).square() / 2


def value_clip(value, old_value, returns, clip_range):
    clipped = old_value + (value - old_value).clamp(-clip_range, clip_range)
    return torch.max((value - returns).square(), (clipped - returns).square()) / 2


def pairwise(margin):
    return -logsigmoid(margin)


def dpo_sigmoid(margin, beta, label_smoothing):
    return -(1 - label_smoothing) * logsigmoid(beta * margin) - label_smoothing * logsigmoid(-beta * margin)


def robust(margin, beta, label_smoothing):
    clean, flipped = -logsigmoid(beta * margin), -logsigmoid(-beta * margin)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def exo_pair(margin, beta, label_smoothing):
    log_p = torch.log_softmax(torch.stack([beta * margin, torch.zeros_like(margin)]), 0)
    log_q = torch.tensor([1 - label_smoothing, label_smoothing], dtype=margin.dtype).log()[:, None]
    return (log_p.exp() * (log_p - log_q)).sum(0)


def hinge(margin, beta):
    return torch.relu(1 - beta * margin)


def ipo(margin, beta):
    return (margin - 1 / (2 * beta)).square()


def kto(margin, beta):
    return 1 - torch.sigmoid(beta * margin)


def discopop(margin, beta, tau):
    x, share = beta * margin, torch.sigmoid(beta * margin / tau)
    # exp(-x) share, where exp(-x) alone would be inf.
    return -logsigmoid(x) * (1 - share) + (logsigmoid(x / tau) - x).exp()


def alpha_divergence(log_ratio, alpha):
    ratio = log_ratio.exp()
    return (ratio ** (alpha - 1) - 1) / (alpha - 1)


def js_divergence(log_ratio):
    ratio = log_ratio.exp()
    return (2 * ratio / (1 + ratio)).log()


def log_odds(mean_logp):
    prob = mean_logp.exp()
    return (prob / (1 - prob)).log()


def nll(logp):
    return -logp


def dft(logp):
    return -logp.exp().detach() * logp
