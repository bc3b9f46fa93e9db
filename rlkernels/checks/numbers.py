"""Checks of numbers: what a config file or another library calls a number becomes the Python number that the rest of
the package uses.
"""

import math
import numbers

import torch
from torch.autograd import forward_ad

SYMBOLS = (torch.SymInt, torch.SymFloat)
FAR = 2**63  # beyond a 64-bit integer


def real(where, name, x):
    """``x`` as a float (a symbol of a compiler stays one): a Python or numpy number, or a tensor of one on the CPU."""
    if type(x) is float:
        return x
    x = _plain(where, name, x)
    if isinstance(x, (bool, str)) or not isinstance(x, (numbers.Real, *SYMBOLS)):
        raise TypeError(f"{where}: {name} must be a number, got {_kind(x)}")
    if isinstance(x, SYMBOLS):
        return x
    try:
        return float(x)
    except OverflowError:
        return math.inf if x > 0 else -math.inf


def positive(where, name, x):
    """``0 < x < inf``, as ``real`` gives it."""
    x = real(where, name, x)
    if not 0 < x < math.inf:  # NaN fails too
        raise ValueError(f"{where}: {name} must be positive and finite, got {x}")
    return x


def finite(where, name, x):
    """``-inf < x < inf``, as ``real`` gives it."""
    x = real(where, name, x)
    if not -math.inf < x < math.inf:
        raise ValueError(f"{where}: {name} must be finite, got {x}")
    return x


def interval(where, name, x, low, high, closed=True):
    """``low <= x <= high``, or ``low <= x < high`` where ``closed`` is False, as ``real`` gives it."""
    x = real(where, name, x)
    if not (low <= x <= high if closed else low <= x < high):
        raise ValueError(f"{where}: {name} must be in [{low}, {high}{']' if closed else ')'}, got {x}")
    return x


def integer(where, name, x):
    """``x`` as an int: one of Python or numpy, or a tensor of one on the CPU."""
    if type(x) is not int:
        x = _plain(where, name, x)
        if isinstance(x, bool) or not isinstance(x, (numbers.Integral, torch.SymInt)):
            raise TypeError(f"{where}: {name} must be int, got {_kind(x)}")
        x = x if isinstance(x, torch.SymInt) else int(x)
    if not -FAR <= x < FAR:
        raise ValueError(f"{where}: {name} must be a 64-bit integer, got {x}")
    return x


def positive_integer(where, name, x):
    """The same of what is at least 1; None stays None."""
    if x is None:
        return None
    x = _plain(where, name, x)
    if isinstance(x, bool) or not isinstance(x, (numbers.Integral, torch.SymInt)):
        raise TypeError(f"{where}: {name} must be a positive int or None, got {_kind(x)}")
    x = x if isinstance(x, torch.SymInt) else int(x)
    if not 1 <= x < FAR:
        raise ValueError(f"{where}: {name} must be a positive int or None, got {x}")
    return x


def flag(where, name, x):
    """``x`` as True or False: one of Python or numpy."""
    x = x.item() if type(x).__module__ == "numpy" and getattr(x, "ndim", None) == 0 else x
    if not isinstance(x, bool):
        raise TypeError(f"{where}: {name} must be True or False, got {_kind(x)}")
    return x


def _plain(where, name, x):
    """A tensor of one number, or what numpy has, as that number."""
    if not isinstance(x, torch.Tensor):
        return x.item() if getattr(x, "ndim", None) == 0 and hasattr(x, "item") else x
    if x.requires_grad:
        raise ValueError(f"{where}: {name} gets no gradient; detach it")
    if getattr(forward_ad, "_current_level", 0) >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise RuntimeError(
            f"{where}: forward-mode AD is not supported by rlkernels; use reverse mode, or plain torch operations"
        )
    if x.dim() or x.device.type != "cpu" or x.layout != torch.strided:
        raise TypeError(
            f"{where}: {name} must be a number, got a tensor of shape {tuple(x.shape)} on {x.device}; pass "
            "a Python number, as x.item() gives it"
        )
    return x.item()


def _kind(x):
    return f"str {x!r}; convert it to a number" if isinstance(x, str) else type(x).__name__
