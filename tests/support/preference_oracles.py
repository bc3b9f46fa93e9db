"""Every paired loss again, by hand from its formula in autograd; imports torch alone. Arguments are sums, ``[B]``.

``c, r`` are the log-ratios of the chosen and the rejected answer, ``C, R`` their log-probabilities, ``b`` is beta,
``e`` the smoothing.
"""

import torch
from torch import sigmoid
from torch.nn.functional import logsigmoid as ls


def smoothed(x, e):
    return -(1 - e) * ls(x) - e * ls(-x)


def discopop(x, tau=0.05):
    return -ls(x) * (1 - sigmoid(x / tau)) + (-x).exp() * sigmoid(x / tau)


def reward_gaps(pairs):
    """The differences of the rewards that ``further`` gives."""
    return torch.linspace(-1.0, 2.0, pairs, dtype=torch.float64)


def further(names, pairs):
    """The options without which some of the losses are refused."""
    rewards = {"chosen_rewards": reward_gaps(pairs), "rejected_rewards": torch.zeros(pairs, dtype=torch.float64)}
    without_gold = {"tpo_alpha": 0.0} if any(name.startswith("tpo") for name in names) else {}
    return (rewards if "rpo" in names else {}) | without_gold


def divergence(p, q):
    """KL of two coins."""
    return p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()


# Losses of a margin D.
OF_MARGIN = {
    "sigmoid": lambda D, b, e: smoothed(b * D, e),
    "hinge": lambda D, b, e: torch.relu(1 - b * D),
    "ipo": lambda D, b, e: (D - 1 / (2 * b)) ** 2,
    "exo_pair": lambda D, b, e: (
        sigmoid(b * D) * (ls(b * D) - torch.tensor(1 - e, dtype=D.dtype).log())
        + sigmoid(-b * D) * (ls(-b * D) - torch.tensor(e, dtype=D.dtype).log())
    ),
    "robust": lambda D, b, e: (-(1 - e) * ls(b * D) + e * ls(-b * D)) / (1 - 2 * e),
    "discopop": lambda D, b, e: discopop(b * D),
    "rpo": lambda D, b, e: divergence(torch.sigmoid(reward_gaps(len(D))), sigmoid(b * D)),
}
AVERAGED = {"sigmoid_norm": "sigmoid", "ipo_norm": "ipo"}
"""Losses of the difference of averages, and those whose formula they have."""
# Losses of the two log-ratios.
OF_RATIOS = {
    "nca_pair": lambda c, r, b: -ls(b * c) - 0.5 * ls(-b * c) - 0.5 * ls(-b * r),
    "bco_pair": lambda c, r, b: -ls(b * c) - ls(-b * r),
    "sppo_hard": lambda c, r, b: (c - 0.5 / b) ** 2 + (r + 0.5 / b) ** 2,
    "apo_zero": lambda c, r, b: 1 - sigmoid(b * c) + sigmoid(b * r),
    "apo_down": lambda c, r, b: sigmoid(b * c) + 1 - sigmoid(b * (c - r)),
    "dpop": lambda c, r, b: -ls(b * (c - r - 50.0 * torch.relu(-c))),
}
# f-divergences.
SCORES = {
    "reverse_kl": lambda rho: rho,
    "forward_kl": lambda rho: 1 - (-rho).exp(),
    "js_divergence": lambda rho: (2 * rho.exp() / (rho.exp() + 1)).log(),
    "alpha_divergence": lambda rho: (rho.exp() ** -0.5 - 1) / -0.5,
}


def log_odds(mean):
    return mean - (-torch.expm1(mean)).log()


# Losses without a reference, of log-probabilities and lengths (n, m), without the likelihood term of CPO.
OF_POLICY = {
    "cpo": lambda C, R, n, m, b, e: smoothed(b * (C - R), e),
    "cpo_hinge": lambda C, R, n, m, b, e: torch.relu(1 - b * (C - R)),
    "cpo_ipo": lambda C, R, n, m, b, e: (C - R - 1 / (2 * b)) ** 2,
    "simpo": lambda C, R, n, m, b, e: smoothed(b * (C / n - R / m) - 0.5, e),
    "orpo": lambda C, R, n, m, b, e: -C / n - b * ls(log_odds(C / n) - log_odds(R / m)),
    "orpo_odds_ratio": lambda C, R, n, m, b, e: -b * ls(log_odds(C / n) - log_odds(R / m)),
}
OF_POLICY |= {name.replace("cpo", "tpo"): OF_POLICY[name] for name in ("cpo", "cpo_hinge", "cpo_ipo")}
OF_POLICY["tpo_l"] = OF_POLICY["simpo"]
SMOOTHED = {"tpo", "tpo_l", "sigmoid", "exo_pair", "robust", "cpo", "simpo", "aot", "aot_unpaired", "sigmoid_norm"}


def aot(C, R, f, g, b, e):
    return smoothed(b * ((C - R).sort().values - (f - g).sort().values), e)


def aot_unpaired(C, R, f, g, b, e):
    return smoothed(b * ((C - f).sort().values - (R - g).sort().values), e)


# Losses of answers without pairs: log-ratio, whether it is desirable.
OF_ONE = {
    "kto": lambda rho, good, b, kl, delta: torch.where(good, 1 - sigmoid(b * (rho - kl)), 1 - sigmoid(b * (kl - rho))),
    "apo_zero_unpaired": lambda rho, good, b, kl, delta: torch.where(good, 1 - sigmoid(b * rho), sigmoid(b * rho)),
    "bco": lambda rho, good, b, kl, delta: torch.where(good, -ls(b * rho - delta), -ls(-(b * rho - delta))),
}
