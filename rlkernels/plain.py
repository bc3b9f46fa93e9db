"""Plain calls and plain numbers: what may skip torch's dispatcher, and what it must be given where it may not be skipped.

A registered op costs 20 us in the dispatcher, 70 with a gradient: more than a small loss itself. Whatever records, replaces or wraps calls
(dispatch modes, functorch, tracing, fake and functional tensors) sits there, and shows as a key of this thread or in the type of a tensor.
"""
import torch

# Private, so looked for: where a version of torch has no such function, every call takes the dispatcher.
_included = getattr(torch._C, "_dispatch_tls_local_include_set", None)


def _keys(*names):
    found = torch._C.DispatchKeySet(torch._C.DispatchKey.BackendSelect)
    for name in names:
        found = found | torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name))
    return found.raw_repr()


_PLAIN = (_keys("ADInplaceOrView"), _keys()) if _included else ()  # the second one: inference mode
_TYPES = (torch.Tensor, torch.nn.Parameter)


def gradient_wanted(arguments):
    """Whether autograd records a call with these arguments; None where the dispatcher must see the call."""
    if _included is None or _included().raw_repr() not in _PLAIN:
        return None
    wanted = False
    for x in arguments:
        kind = type(x)
        if kind in _TYPES:
            # The dispatcher carries out a pending negation, and on "meta" it chooses the fake.
            if x.is_neg() or x.is_meta:
                return None
            wanted = wanted or x.requires_grad
        elif kind is list:
            one = gradient_wanted(x)
            if one is None:
                return None
            wanted = wanted or one
        elif isinstance(x, torch.Tensor):
            return None
    return wanted and torch.is_grad_enabled()


def number(x):
    """A run-time number as the 0-d float64 tensor that a registered op takes."""
    # zeros + x, not full: torch 2.13 turns the sum into a graph input, but specialises the fill value.
    return torch.zeros((), dtype=torch.float64, device="cpu") + x if torch.compiler.is_compiling() else torch.full((), x, dtype=torch.float64, device="cpu")


def numbers(values):
    """Run-time numbers as one float64 tensor."""
    return torch.stack([number(x) for x in values]) if values else torch.empty(0, dtype=torch.float64, device="cpu")


def registered(arguments):
    """The arguments as a registered op takes them: numbers as tensors."""
    return [number(x) if isinstance(x, (float, torch.SymFloat)) else numbers(x) if isinstance(x, tuple) else x for x in arguments]


def value(x):
    """A number that may have come as a tensor; a tensor of one number per row stays one."""
    return x.item() if isinstance(x, torch.Tensor) and x.dim() == 0 else x


def values(x):
    return x.tolist() if isinstance(x, torch.Tensor) else [float(p) for p in x]
