"""Preference objectives of one number per pair or per sequence: ``column, parameters -> (value, d value / d column)``.

``margin`` is a difference of log-ratios, or of scores. A loss of two log-ratios (NCA, BCO, SPPO, APO) is a sum of such
terms. The last objectives of the file transform a log-ratio or a log-probability before the difference: the scores of
f-divergences and of AlphaPO, and the log-odds of ORPO.
"""

from rlkernels.objectives.functions import exp, expm1, log, log_sigmoid, sigmoid, where
from rlkernels.objectives.language import objective


@objective
def pairwise(margin):
    r"""Bradley-Terry: ``-log sigmoid(m)``, ``m = r_chosen - r_rejected``.

    Ouyang et al. 2022, arXiv:2203.02155, eq. 1.
    """
    return -log_sigmoid(margin), -sigmoid(-margin)


@objective
def dpo_sigmoid(margin, beta, label_smoothing):
    r"""DPO: ``-(1-e) log sigmoid(beta m) - e log sigmoid(-beta m)``, ``m`` the difference of log-ratios.

    Rafailov et al. 2023, arXiv:2305.18290, eq. 7; ``e = label_smoothing`` (conservative DPO) after Mitchell 2023.
    """
    scaled = beta * margin
    value = (label_smoothing - 1.0) * log_sigmoid(scaled) - label_smoothing * log_sigmoid(-scaled)
    return value, beta * (label_smoothing * sigmoid(scaled) - (1.0 - label_smoothing) * sigmoid(-scaled))


@objective
def robust(margin, beta, label_smoothing):
    r"""Robust DPO: ``(-(1-e) log sigmoid(beta m) + e log sigmoid(-beta m)) / (1 - 2e)``, unbiased under a share ``e``
    of flipped labels.

    Chowdhury et al. 2024, arXiv:2403.00409.
    """
    scaled = beta * margin
    clean = 1.0 - label_smoothing
    spread = 1.0 - 2.0 * label_smoothing
    value = (label_smoothing * log_sigmoid(-scaled) - clean * log_sigmoid(scaled)) / spread
    return value, -beta * (clean * sigmoid(-scaled) + label_smoothing * sigmoid(scaled)) / spread


@objective
def exo_pair(margin, beta, label_smoothing):
    r"""EXO: ``KL(p || [1-e, e])``, ``p = (sigmoid(beta m), sigmoid(-beta m))``.

    Ji et al. 2024, arXiv:2402.00856, eq. 16.
    """
    scaled = beta * margin
    win = sigmoid(scaled)
    lose = sigmoid(-scaled)
    log_win = log(1.0 - label_smoothing)
    log_lose = log(label_smoothing)
    value = win * (log_sigmoid(scaled) - log_win) + lose * (log_sigmoid(-scaled) - log_lose)
    return value, beta * win * lose * (scaled - log_win + log_lose)


@objective
def hinge(margin, beta):
    r"""SLiC and RSO: ``max(0, 1 - beta m)``. Zhao et al. 2023, arXiv:2305.10425; Liu et al. 2023, arXiv:2309.06657."""
    slack = 1.0 - beta * margin
    return where(slack <= 0.0, 0.0, slack), where(slack <= 0.0, 0.0, 0.0 * slack - beta)  # 0.0 * slack: a NaN stays NaN


@objective
def ipo(margin, beta):
    r"""IPO: ``(m - 1/(2 beta))^2``; SPPO is the sum of its values at ``m = rho_c`` and ``m = -rho_r``.

    Azar et al. 2023, arXiv:2310.12036, eq. 17.
    """
    gap = margin - 0.5 / beta
    return gap * gap, 2.0 * gap


@objective
def kto(margin, beta):
    r"""KTO and APO: ``1 - sigmoid(beta m)``, bounded.

    Ethayarajh et al. 2024, arXiv:2402.01306; D'Oosterlinck et al. 2024, arXiv:2408.06266.
    """
    tail = sigmoid(-beta * margin)
    return tail, -beta * tail * sigmoid(beta * margin)


@objective
def discopop(margin, beta, tau):
    r"""DiscoPOP: ``-log sigmoid(x) (1-u) + e^-x u``, ``x = beta m``, ``u = sigmoid(x / tau)``.

    Lu et al. 2024, arXiv:2406.08414, eq. 5.

    ``e^-x u`` is formed as ``exp(log sigmoid(x / tau) - x)``: the factors alone are inf and 0 from ``x = -89`` on.
    """
    scaled = beta * margin
    sharp = scaled / tau
    rest = sigmoid(-sharp)
    slope = rest / tau
    tail = log_sigmoid(scaled)
    power = exp(log_sigmoid(sharp) - scaled)
    return power - tail * rest, beta * (power * (slope - 1.0) - sigmoid(-scaled) * rest + tail * sigmoid(sharp) * slope)


@objective
def alpha_divergence(log_ratio, alpha):
    r"""Score of a log-ratio under an alpha-divergence: ``(e^((alpha-1) rho) - 1) / (alpha-1)``, the exponent capped at
    80.

    Wang et al. 2023, arXiv:2309.16240; ``alpha = 0``: the forward KL, ``1 - e^-rho``. On log-probabilities, ``alpha = 1
    - a``: AlphaPO, arXiv:2501.03884. Beyond the cap, where fp32 is about to overflow, the derivative is 0.
    """
    reach = (alpha - 1.0) * log_ratio
    return expm1(where(reach > 80.0, 80.0, reach)) / (alpha - 1.0), where(reach > 80.0, 0.0, exp(reach))


@objective
def js_divergence(log_ratio):
    r"""Score of a log-ratio under the Jensen-Shannon divergence: ``log 2 + log sigmoid(rho)``.

    Wang et al. 2023, arXiv:2309.16240.
    """
    return 0.6931471805599453 + log_sigmoid(log_ratio), sigmoid(-log_ratio)


@objective
def log_odds(mean_logp):
    r"""Log-odds of a likelihood: ``l - log(1 - e^l)``, ``l`` the mean log-probability.

    Hong et al. 2024, arXiv:2403.07691, eq. 4 (ORPO).

    ``1 - e^l`` is ``-expm1(l)``, which keeps its digits up to ``l = 0-``. At ``l = 0`` the odds are infinite and the
    derivative is taken as 0: ORPO's loss of a certain chosen answer is then 0 and moves nothing.
    """
    return mean_logp - log(-expm1(mean_logp)), where(mean_logp >= 0.0, 0.0, -1.0 / expm1(mean_logp))
