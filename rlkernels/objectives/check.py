"""``check_objective``: the derivative of an objective against central differences of its value."""

import ast
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlkernels import checks
from rlkernels.objectives.functions import FUNCTIONS
from rlkernels.objectives.language import Objective, registered
from rlkernels.objectives.zero_gradient import OPERATIONS
from rlkernels.types import Number, ObjectiveLike

LOG_PROBABILITIES = (-6.3, -2.1, -0.71, -0.13)
NEAR = (-5.2, -1.93, -0.64, -0.21)
GRID = {
    "logp": LOG_PROBABILITIES,
    "mean_logp": LOG_PROBABILITIES,
    "old_logp": NEAR,
    "ref_logp": NEAR,
    "rollout_logp": NEAR,
    "advantage": (-1.7, -0.4, 0.0, 0.3, 2.3),
}
"""The numbers of a column. They are uneven, because equal columns and round numbers are where objectives have kinks."""
ANY = (-1.9, -0.37, 0.43, 1.6)
"""The numbers of any other column."""
MOST = 2**16
"""The number of points beyond which a sample of the grid is tried."""
STEP = 1e-5
KINK = 1e-3
"""Slopes on both sides of a point that differ by more, relatively, are those of a kink."""


def check_objective(
    objective: ObjectiveLike,
    *,
    grid: Mapping[str, Sequence[float]] | None = None,
    stop_gradient: Sequence[str] = (),
    tolerance: float = 1e-6,
    **params: Number,
) -> None:
    r"""Checks the derivative of a registered objective against central differences of its value, in float64.

    ``|l'(x) - (l(x + h) - l(x - h)) / 2h| <= tolerance (1 + |l'(x)|)`` at every point of a grid, ``x`` the first
    column. Advantages have both signs and 0. Points are left out where the value has a kink or is not finite.

    Args:
        objective: the function that ``@objective`` returned, or its name.
        grid: numbers to try, by the names of columns, in place of those that this check has.
        stop_gradient: names that the objective assigns and that its paper takes as constants in the derivative, such
            as the weight of CISPO.
        tolerance: the error that is allowed, > 0.
        params: parameters of the objective, with the defaults of its signature.

    Raises:
        ValueError: a wrong derivative, with the columns and parameters of the worst place, what was expected there and
            what the objective gave; an objective that is not registered; no point at which there is a derivative.
        TypeError: a parameter that the objective does not take, or one it needs.

    Example:
        >>> import rlkernels
        >>> @rlkernels.objective
        ... def halved(logp, advantage):
        ...     "Half of REINFORCE, with the derivative of the whole."
        ...     return -0.5 * advantage * logp, -advantage
        >>> check_objective(halved)
        Traceback (most recent call last):
        ValueError: check_objective: objective 'halved' has a wrong derivative at logp=-0.13, advantage=2.3: got -2.3, expected -1.15 by central differences; 16 of 20 points are wrong
        >>> check_objective("cispo", stop_gradient=["weight"], clip_low=1.0, clip_high=0.3)
        >>> del rlkernels.objectives.OBJECTIVES["halved"]
    """  # noqa: E501  (the message is one line)
    caller = "check_objective"
    entry = registered(objective)
    if entry is None:
        raise ValueError(f"{caller}: objective must be registered, got {objective!r}; decorate it with @objective")
    tolerance = checks.positive(caller, "tolerance", tolerance)
    name = entry.function.__name__
    points = _points(caller, entry, {} if grid is None else grid)
    taken = checks.params(caller, name, entry, params, points)
    values = [checks.real(caller, k, x) for k, x in zip(entry.params, taken, strict=True)]
    for assigned in stop_gradient:
        names = [x.targets[0].id for x in entry.tree.body[1:-1]]  # type: ignore[attr-defined]
        if assigned not in names:
            raise ValueError(
                f"{caller}: stop_gradient has {assigned!r}, expected a name that the objective assigns: "
                f"{', '.join(names) or 'it assigns none'}"
            )
    known = {k: points.new_full((), x) for k, x in zip(entry.params, values, strict=True)}
    known |= dict(zip(entry.columns, points.unbind(1), strict=True))
    first, x = entry.columns[0], points[:, 0]
    results = _results(entry, known, {})
    constants = {k: results[k] for k in stop_gradient}
    derivative = results["return derivative"].expand(x.shape)
    h = STEP * x.abs().clamp(min=1.0)

    def value(shift: float) -> Tensor:
        return _results(entry, known | {first: x + shift * h}, constants)["return value"].expand(x.shape)

    far, near, here = [value(-1.0), value(1.0)], [value(-0.5), value(0.5)], value(0.0)
    wide, narrow = (far[1] - far[0]) / (2 * h), (near[1] - near[0]) / h
    expected = (4 * narrow - wide) / 3
    size = 1 + expected.abs()
    sides = (far[1] - here) / h - (here - far[0]) / h
    # The last term, because a difference of values has their rounding errors.
    smooth = (sides.abs() < KINK * size) & ((wide - narrow).abs() < tolerance * size + 1e-10 * here.abs())
    if not smooth.any():
        raise ValueError(
            f"{caller}: objective {name!r} has no derivative at any of {len(x)} points: its value is not finite, or "
            "has a kink; pass a grid"
        )
    error = (derivative - expected).abs() / (size + 1e-4 * here.abs())
    error = torch.where(smooth, error.nan_to_num(nan=math.inf), 0.0)
    wrong = error > tolerance
    if not wrong.any():
        return
    worst = int(error.argmax())
    place = [f"{k}={v:.6g}" for k, v in zip(entry.columns, points[worst].tolist(), strict=True)]
    place += [f"{k}={v:.6g}" for k, v in zip(entry.params, values, strict=True)]
    raise ValueError(
        f"{caller}: objective {name!r} has a wrong derivative at {', '.join(place)}: got "
        f"{derivative[worst].item():.6g}, expected {expected[worst].item():.6g} by central "
        f"differences; {int(wrong.sum())} of {int(smooth.sum())} points are wrong"
    )


def _points(caller: str, entry: Objective, grid: Mapping[str, Sequence[float]]) -> Tensor:
    """Returns the points of the grid as rows, one entry for each column of the objective."""
    if not isinstance(grid, Mapping):
        raise TypeError(f"{caller}: grid must be a dict of numbers by the names of columns, got {type(grid).__name__}")
    for name in grid:
        if name not in entry.columns:
            raise ValueError(f"{caller}: grid has {name!r}, expected columns: {', '.join(entry.columns)}")
    axes = [torch.as_tensor(grid.get(name, GRID.get(name, ANY)), dtype=torch.float64) for name in entry.columns]
    for name, axis in zip(entry.columns, axes, strict=True):
        if axis.dim() != 1 or not len(axis):
            raise ValueError(f"{caller}: grid[{name!r}] has shape {tuple(axis.shape)}, expected at least one number")
    count = math.prod(map(len, axes))
    if count <= MOST:
        return torch.stack([x.reshape(-1) for x in torch.meshgrid(*axes, indexing="ij")], 1)  # type: ignore[attr-defined]
    draw = torch.Generator().manual_seed(0)
    return torch.stack([x[torch.randint(len(x), (MOST,), generator=draw)] for x in axes], 1)


def _results(entry: Objective, known: dict[str, Tensor], constants: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns value and derivative, and every name that the objective assigns, from its columns and parameters.

    ``constants``: names that keep these numbers instead of what is assigned to them.
    """
    *assignments, last = entry.tree.body[1:]
    known = dict(known)
    for name, node in ((s.targets[0].id, s.value) for s in assignments):  # type: ignore[attr-defined]
        known[name] = constants[name] if name in constants else _number(node, known)
    value, derivative = (_number(node, known) for node in last.value.elts)  # type: ignore[attr-defined]
    return {**known, "return value": value, "return derivative": derivative}  # no names, because of the space


def _number(node: ast.expr, known: Mapping[str, Tensor]) -> Tensor:
    """Evaluates an expression of the language in float64."""
    match node:
        case ast.Name(id=name):
            return known[name]
        case ast.Constant(value=x):
            return torch.tensor(x, dtype=torch.float64)
        case ast.UnaryOp(operand=x):
            return -_number(x, known)
        case ast.BinOp(left=a, op=op, right=b) | ast.Compare(left=a, ops=[op], comparators=[b]):
            return OPERATIONS[type(op)](_number(a, known), _number(b, known))
        case ast.Call(func=ast.Name(id=f), args=args):
            function: Callable[..., Any] = FUNCTIONS[f]
            return function(*(_number(x, known) for x in args))
    # Unreachable for a registered objective, because the checker of the language admits no other expression.
    raise SyntaxError(f"not in the language: {ast.unparse(node)!r}")
