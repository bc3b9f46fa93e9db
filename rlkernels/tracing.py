"""The question whether a call may skip torch's dispatcher, numbers in the form that the dispatcher takes, and results
without a gradient.

A registered op costs 20 us in the dispatcher, 70 with a gradient: more than a small loss itself. A plain call skips it.
A call is not plain where something records, replaces or wraps it: a dispatch mode, functorch, tracing, a fake or a
functional tensor. Each of these shows as a dispatch key of this thread or in the type of a tensor.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch

P = ParamSpec("P")
R = TypeVar("R")

# By getattr, because the function is private: with a torch that has none, every call takes the dispatcher.
_included = getattr(torch._C, "_dispatch_tls_local_include_set", None)


def _keys(*names):
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect)
    for name in names:
        keys = keys | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))
    return keys.raw_repr()


_PLAIN = (_keys("ADInplaceOrView"), _keys()) if _included else ()  # outside of inference mode, and in it
_TYPES = (torch.Tensor, torch.nn.Parameter)
_NO_TENSORS = frozenset((type(None), bool, int, float, str, tuple))
"""Types of arguments that hold no tensor; a tuple is a row of numbers."""


def gradient_wanted(arguments):
    """Tells whether autograd records a call with these arguments; None where the dispatcher must see the call."""
    if _included is None or _included().raw_repr() not in _PLAIN:
        return None
    recording, wanted, groups = torch.is_grad_enabled(), False, [arguments]
    for group in groups:  # which grows by the lists that it holds
        for x in group:
            kind = type(x)
            if kind in _NO_TENSORS:  # asked first, because half of the arguments are such
                continue
            if kind in _TYPES:
                if x.is_meta:  # because the dispatcher chooses the fake implementation
                    return None
                if recording and x.requires_grad:
                    wanted = True
            elif kind is list:
                groups.append(x)
            elif isinstance(x, torch.Tensor):
                return None
    return wanted


def has_values(x):
    """Tells whether a tensor has values now, as it has none in a compiled, traced, transformed or fake program."""
    if (
        type(x) not in _TYPES
        and not torch.compiler.is_compiling()
        and type(x).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
    ):
        x = x.as_subclass(torch.Tensor)  # because such a subclass only adds to a tensor, as a name or a method
    return not torch.compiler.is_compiling() and gradient_wanted((x,)) is not None


def replaced(record, **fields):
    """Returns a named tuple with other values in some of its fields.

    It stands for ``_replace``, because the Dynamo of torch 2.8 follows neither that nor a property of a named tuple
    (F141).
    """
    kind = type(record)
    return kind(*[fields.get(name, held) for name, held in zip(kind._fields, record, strict=True)])


def number(x):
    """Returns a run-time number as the 0-d float64 tensor that a registered op takes."""
    # zeros + x, not full, because torch 2.13 makes an input of the graph of the sum, and a constant of a fill value.
    return (
        torch.zeros((), dtype=torch.float64, device="cpu") + x
        if torch.compiler.is_compiling()
        else torch.full((), x, dtype=torch.float64, device="cpu")
    )


def product(x, y):
    """Multiplies two run-time numbers.

    In a graph the result is a 0-d tensor, because torch 2.11 compiles a graph for each value of a number times a size
    (F141).
    """
    return number(x) * number(y) if torch.compiler.is_compiling() and not isinstance(x, torch.Tensor) else x * y


def numbers(values):
    """Returns run-time numbers as one float64 tensor."""
    return torch.stack([number(x) for x in values]) if values else torch.empty(0, dtype=torch.float64, device="cpu")


def registered(arguments):
    """Returns the arguments in the form that a registered op takes: numbers as tensors."""
    return [
        number(x) if isinstance(x, (float, torch.SymFloat)) else numbers(x) if isinstance(x, tuple) else x
        for x in arguments
    ]


def value(x):
    """Returns the number that a 0-d tensor holds; a number, or a tensor of one number per row, stays as it is."""
    return x.item() if isinstance(x, torch.Tensor) and x.dim() == 0 else x


def values(x):
    """Returns run-time numbers as a list of floats; those on a device stay tensors, because nobody may read them."""
    if isinstance(x, torch.Tensor):
        return list(x.unbind()) if on_device(x) else x.tolist()
    return [float(p) for p in x]


def on_device(x):
    """Tells whether run-time numbers came as a tensor on a device, whose values the host does not know."""
    return isinstance(x, torch.Tensor) and x.device.type != "cpu"


def without_gradient(function: Callable[P, R]) -> Callable[P, R]:
    """Decorates a function whose results get no gradient and whose offsets are checked while it runs.

    A compiled program with ``torch.no_grad`` inside that raises leaves gradients off for the rest of the thread (torch
    2.13), because it never comes to its second switch. So it computes with them, and its results are detached.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return cast(R, _detached(function(*args, **kwargs)))
        with torch.no_grad():
            return function(*args, **kwargs)

    return call


def _detached(found: Any) -> Any:
    """Returns a result, tensors in tuples and dicts included, without its gradient."""
    if isinstance(found, torch.Tensor):
        return found.detach()
    if isinstance(found, dict):
        return {name: _detached(x) for name, x in found.items()}
    return tuple(_detached(x) for x in found) if type(found) is tuple else found
