"""Packed batches that lie as one row, ``[1, T]``, as models without padding take and return them."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import torch

P = ParamSpec("P")
R = TypeVar("R")
NOT_OF_TOKENS = (
    "weight",
    "bias",
    "ref_weight",
    "ref_bias",
    "teacher_weight",
    "teacher_bias",
    "value_pool",
    "cu_seqlens",
)
"""Arguments that have no dimension of tokens, whatever their shape."""


def is_one_row(x: Any, rank: int = 1) -> bool:
    """Tells whether what has ``rank`` dimensions in a packed batch, such as a column of tokens, lies as one row."""
    # A nested tensor has no shape to look at; the checks of the function refuse it.
    return isinstance(x, torch.Tensor) and not x.is_nested and x.dim() == rank + 1 and x.shape[0] == 1


def on_one_row(function: Callable[..., R], arguments: dict[str, Any], main: str, per_token: bool = True) -> R:
    """Calls a function of packed tokens with its ``arguments`` as they stand without the row; ``main``: a column.

    ``per_token``: the results have an entry per token, not per sequence.

    What ``takes_one_row`` does, for a function that asks in its first line. A decorator takes two microseconds of each
    call, 4 % of a small policy loss.
    """
    row = arguments[main].shape
    named = {name: x if name in NOT_OF_TOKENS else _flat(x, row) for name, x in arguments.items()}
    named |= {name: _flat(x, row) for name, x in named.pop("params").items()}
    found = function(**named)
    return cast(R, _rows_of(found)) if per_token else found


class Decorator(Protocol):
    """A decorator that keeps the type of its function."""

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]: ...


def takes_one_row(
    rank: int = 1, *, main: str | None = None, per_token: bool | Callable[[dict[str, Any]], bool] = False
) -> Decorator:
    """Lets a function of packed tokens take ``[1, T, ...]`` beside ``[T, ...]``.

    ``rank``: the dimensions of the argument ``main``, else of the first one, in a packed batch. ``per_token``: the
    results have an entry per token, and come back as one row where that argument did; or a function of the keywords
    that tells.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        names = tuple(inspect.signature(function).parameters)
        of_offsets, of_main = names.index("cu_seqlens"), 0 if main is None else names.index(main)

        @functools.wraps(function)
        def with_one_row(*args: P.args, **kwargs: P.kwargs) -> R:
            offsets = args[of_offsets] if len(args) > of_offsets else kwargs.get("cu_seqlens")
            if offsets is None:
                return function(*args, **kwargs)
            x = args[of_main] if len(args) > of_main else kwargs.get(names[of_main])
            if not is_one_row(x, rank):
                return function(*args, **kwargs)
            row = cast(torch.Tensor, x).shape[:2]
            flat = [y if name in NOT_OF_TOKENS else _flat(y, row) for name, y in zip(names, args, strict=False)]
            named = {name: y if name in NOT_OF_TOKENS else _flat(y, row) for name, y in kwargs.items()}
            found = cast(Callable[..., Any], function)(*flat, **named)
            of_tokens = per_token if isinstance(per_token, bool) else per_token(kwargs)
            return cast(R, _rows_of(found)) if of_tokens else cast(R, found)

        return with_one_row

    return decorate


def _flat(x: Any, row: torch.Size) -> Any:
    """Returns a tensor ``[1, T, ...]`` as ``[T, ...]``, and all else as it is.

    An option with such fields, and a tuple of such tensors, are taken apart.
    """
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return dataclasses.replace(x, **{f.name: _flat(getattr(x, f.name), row) for f in dataclasses.fields(x)})
    if type(x) is tuple:
        return tuple(_flat(y, row) for y in x)
    if not isinstance(x, torch.Tensor) or x.is_nested or x.dim() < 2 or x.shape[:2] != row:
        return x
    return x[0]


def _rows_of(found: Any) -> Any:
    """Returns the results of a function with those per token as one row."""
    return tuple(_as_row(x) for x in found) if type(found) is tuple else _as_row(found)


def _as_row(x: Any) -> Any:
    """Returns a result per token as one row, and a scalar, such as a loss that is summed, as it is."""
    return x[None] if isinstance(x, torch.Tensor) and x.dim() else x
