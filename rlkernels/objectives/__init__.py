"""The objectives of the library, the decorator that registers one, and the functions that an objective may call."""

from rlkernels.objectives import kl, policy, policy_gates, preference, sft, value  # noqa: F401  (registers the built-in objectives)
from rlkernels.objectives.check import check_objective
from rlkernels.objectives.functions import (
    abs,
    clip,
    exp,
    expm1,
    log,
    log_sigmoid,
    maximum,
    minimum,
    sigmoid,
    sqrt,
    tanh,
    where,
)
from rlkernels.objectives.language import OBJECTIVES, Objective, objective, registered

__all__ = [
    "OBJECTIVES",
    "Objective",
    "abs",
    "check_objective",
    "clip",
    "exp",
    "expm1",
    "log",
    "log_sigmoid",
    "maximum",
    "minimum",
    "objective",
    "registered",
    "sigmoid",
    "sqrt",
    "tanh",
    "where",
]
