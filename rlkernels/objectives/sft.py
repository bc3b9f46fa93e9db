"""Objectives of supervised fine-tuning, on the log-probability of the target alone: ``logp -> (value, d value / d
logp)``.
"""

from rlkernels.objectives.functions import exp
from rlkernels.objectives.language import objective


@objective
def nll(logp):
    r"""Negative log-likelihood: ``-log pi``."""
    return -logp, -1.0


@objective
def dft(logp):
    r"""DFT: ``-sg[pi] log pi``; tokens that the model finds unlikely pull less. Wu et al. 2025, arXiv:2508.05629."""
    prob = exp(logp)
    return -prob * logp, -prob
