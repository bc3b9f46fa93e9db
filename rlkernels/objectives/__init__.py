"""The objectives of the library, the decorator that registers one, and the functions that an objective may call."""

from rlkernels.objectives import kl, policy, policy_gates, preference, sft, value  # noqa: F401  (registers the built-in objectives)
from rlkernels.objectives.functions import clip, exp, expm1, log, log_sigmoid, sigmoid, where
from rlkernels.objectives.language import OBJECTIVES, Objective, objective, registered

__all__ = [
    "OBJECTIVES",
    "Objective",
    "clip",
    "exp",
    "expm1",
    "log",
    "log_sigmoid",
    "objective",
    "registered",
    "sigmoid",
    "where",
]
