"""Checks of numbers: a number of a config file or of another library becomes a Python number, which the rest of the
package uses.
"""

import math
import numbers

import torch
from torch.autograd import forward_ad

SYMBOLS = (torch.SymInt, torch.SymFloat)
FAR = 2**63  # the first number that a 64-bit integer cannot hold


def real(caller, name, x):
    """Returns ``x`` as a float: a Python or numpy number, or a tensor of one number on the CPU.

    A symbol of a compiler stays a symbol.
    """
    if type(x) is float:
        return x
    x = _plain(caller, name, x)
    if isinstance(x, (bool, str)) or not isinstance(x, (numbers.Real, *SYMBOLS)):
        raise TypeError(f"{caller}: {name} must be a number, got {_kind(x)}")
    if isinstance(x, SYMBOLS):
        return x
    try:
        return float(x)
    except OverflowError:
        return math.inf if x > 0 else -math.inf


def positive(caller, name, x):
    """Returns ``x`` as ``real`` does; refuses it unless ``0 < x < inf``."""
    x = real(caller, name, x)
    if not 0 < x < math.inf:  # NaN fails too
        raise ValueError(f"{caller}: {name} must be positive and finite, got {x}")
    return x


def finite(caller, name, x):
    """Returns ``x`` as ``real`` does; refuses it unless ``-inf < x < inf``."""
    x = real(caller, name, x)
    if not -math.inf < x < math.inf:
        raise ValueError(f"{caller}: {name} must be finite, got {x}")
    return x


def interval(caller, name, x, low, high, closed=True):
    """Returns ``x`` as ``real`` does; refuses it unless ``low <= x <= high``, or ``< high`` where not ``closed``."""
    x = real(caller, name, x)
    if not (low <= x <= high if closed else low <= x < high):
        raise ValueError(f"{caller}: {name} must be in [{low}, {high}{']' if closed else ')'}, got {x}")
    return x


def integer(caller, name, x):
    """Returns ``x`` as an int: an integer of Python or numpy, or a tensor of one on the CPU."""
    if type(x) is not int:
        x = _plain(caller, name, x)
        if isinstance(x, bool) or not isinstance(x, (numbers.Integral, torch.SymInt)):
            raise TypeError(f"{caller}: {name} must be int, got {_kind(x)}")
        x = x if isinstance(x, torch.SymInt) else int(x)
    if not -FAR <= x < FAR:
        raise ValueError(f"{caller}: {name} must be a 64-bit integer, got {x}")
    return x


def positive_integer(caller, name, x):
    """Returns ``x`` as ``integer`` does; refuses it below 1. None stays None."""
    if x is None:
        return None
    x = _plain(caller, name, x)
    if isinstance(x, bool) or not isinstance(x, (numbers.Integral, torch.SymInt)):
        raise TypeError(f"{caller}: {name} must be a positive int or None, got {_kind(x)}")
    x = x if isinstance(x, torch.SymInt) else int(x)
    if not 1 <= x < FAR:
        raise ValueError(f"{caller}: {name} must be a positive int or None, got {x}")
    return x


def flag(caller, name, x):
    """Returns ``x`` as True or False: a bool of Python or numpy."""
    x = x.item() if type(x).__module__ == "numpy" and getattr(x, "ndim", None) == 0 else x
    if not isinstance(x, bool):
        raise TypeError(f"{caller}: {name} must be True or False, got {_kind(x)}")
    return x


def flags(caller, **switches):
    """Refuses switches that are neither True nor False.

    A text such as "False", which a config file may hold, would count as True.
    """
    for name, x in switches.items():
        if x is not True and x is not False:
            flag(caller, name, x)


def _plain(caller, name, x):
    """Returns the Python number in a number of numpy or in a tensor of one number; other objects stay as they are."""
    if not isinstance(x, torch.Tensor):
        return x.item() if getattr(x, "ndim", None) == 0 and hasattr(x, "item") else x
    if x.requires_grad:
        raise ValueError(f"{caller}: {name} gets no gradient; detach it")
    if getattr(forward_ad, "_current_level", 0) >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise RuntimeError(
            f"{caller}: forward-mode AD is not supported by rlkernels; use reverse mode, or plain torch operations"
        )
    if x.dim() or x.device.type != "cpu" or x.layout != torch.strided:
        raise TypeError(
            f"{caller}: {name} must be a number, got a tensor of shape {tuple(x.shape)} on {x.device}; pass "
            "a Python number, as x.item() gives it"
        )
    return x.item()


def _kind(x):
    """Returns the words for the type of ``x`` in a message."""
    return f"str {x!r}; convert it to a number" if isinstance(x, str) else type(x).__name__
