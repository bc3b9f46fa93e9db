"""Preference objectives on a margin: ``margin, parameters -> (value, d value / d margin)``."""
from rlkernels._math import log_sigmoid, sigmoid
from rlkernels.objectives.language import objective


@objective
def pairwise(margin):
    r"""Bradley-Terry: ``-log sigmoid(m)``, ``m = r_chosen - r_rejected``. Ouyang et al. 2022, arXiv:2203.02155, eq. 1."""
    return -log_sigmoid(margin), -sigmoid(-margin)


@objective
def dpo_sigmoid(margin, beta, label_smoothing):
    r"""DPO: ``-(1-e) log sigmoid(beta m) - e log sigmoid(-beta m)``, ``m`` the difference of log-ratios.

    Rafailov et al. 2023, arXiv:2305.18290, eq. 7; ``e = label_smoothing`` (conservative DPO) after Mitchell 2023.
    """
    scaled = beta * margin
    value = (label_smoothing - 1.0) * log_sigmoid(scaled) - label_smoothing * log_sigmoid(-scaled)
    return value, beta * (label_smoothing * sigmoid(scaled) - (1.0 - label_smoothing) * sigmoid(-scaled))
