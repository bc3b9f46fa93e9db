"""The way in which an objective depends on its log-ratio, which decides what a clamp of it does to the gradient."""

import ast
import functools
from typing import Literal

from rlkernels.objectives.language import Objective

OF_A_WEIGHT = ("cispo", "cispo_max_only", "cispo_absolute", "rollout_is")
"""The objectives whose ratio is a constant weight beside ``log pi``.

The gradient passes by the ratio, and a clamp of the log-ratio leaves it there.
"""


@functools.cache
def log_ratio(entry: Objective) -> tuple[str, Literal["alone", "weight"]] | None:
    """Returns the column that an objective compares ``logp`` with, and how it does; None where that is not shown.

    ``"alone"``: the two columns occur in the objective's source as ``logp - column`` alone. ``"weight"``: as
    ``OF_A_WEIGHT`` says. An objective of probabilities (DPPO), or of a ratio and something else (DRO), is neither.
    """
    for column in ("old_logp", "rollout_logp"):
        if column in entry.columns:
            if entry.function.__name__ in OF_A_WEIGHT:
                return column, "weight"
            return (column, "alone") if _of_difference(entry, column) else None
    return None


def _of_difference(entry, column):
    """Tells whether every ``logp`` and every ``column`` of an objective's source stands in ``logp - column``."""
    nodes = [n for statement in entry.tree.body for n in ast.walk(statement)]
    single = [n.id for n in nodes if isinstance(n, ast.Name) and n.id in ("logp", column)]
    # By its parts, because a compiled program traces this and cannot trace ast.unparse.
    differences = [n for n in nodes if isinstance(n, ast.BinOp) and isinstance(n.op, ast.Sub)]
    pairs = sum(_is_name(n.left, "logp") and _is_name(n.right, column) for n in differences)
    return pairs > 0 and len(single) == 2 * pairs


def _is_name(node, name):
    return isinstance(node, ast.Name) and node.id == name
