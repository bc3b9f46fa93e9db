"""Plain calls and plain numbers: what may skip torch's dispatcher, and what it must be given where it may not be
skipped.

A registered op costs 20 us in the dispatcher, 70 with a gradient: more than a small loss itself. Whatever records,
replaces or wraps calls (dispatch modes, functorch, tracing, fake and functional tensors) sits there, and shows as a key
of this thread or in the type of a tensor.
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
    """Tell whether autograd records a call with these arguments; None where the dispatcher must see the call."""
    if _included is None or _included().raw_repr() not in _PLAIN:
        return None
    wanted = False
    for x in arguments:
        kind = type(x)
        if kind in _TYPES:
            if x.is_meta:  # there the dispatcher chooses the fake
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


def has_values(x):
    """Tell whether a tensor has values here and now: not in a compiled, traced, transformed or fake program."""
    if (
        type(x) not in _TYPES
        and not torch.compiler.is_compiling()
        and type(x).__torch_dispatch__ is torch.Tensor.__torch_dispatch__
    ):
        x = x.as_subclass(torch.Tensor)  # a subclass that only adds to a tensor, as another name or a method
    return not torch.compiler.is_compiling() and gradient_wanted((x,)) is not None


def replaced(record, **fields):
    """A named tuple with other values in some of its fields.

    Not ``_replace``, and no property of a named tuple where a graph is traced: the Dynamo of torch 2.8 follows neither
    (F141).
    """
    kind = type(record)
    return kind(*[fields.get(name, held) for name, held in zip(kind._fields, record, strict=True)])


def number(x):
    """A run-time number as the 0-d float64 tensor that a registered op takes."""
    # zeros + x, not full: torch 2.13 turns the sum into a graph input, but specialises the fill value.
    return (
        torch.zeros((), dtype=torch.float64, device="cpu") + x
        if torch.compiler.is_compiling()
        else torch.full((), x, dtype=torch.float64, device="cpu")
    )


def product(x, y):
    """Multiply two run-time numbers; in a graph a 0-d tensor, because torch 2.11 compiles a graph for each value of a
    number times a size (F141).
    """
    return number(x) * number(y) if torch.compiler.is_compiling() and not isinstance(x, torch.Tensor) else x * y


def numbers(values):
    """Run-time numbers as one float64 tensor."""
    return torch.stack([number(x) for x in values]) if values else torch.empty(0, dtype=torch.float64, device="cpu")


def registered(arguments):
    """The arguments as a registered op takes them: numbers as tensors."""
    return [
        number(x) if isinstance(x, (float, torch.SymFloat)) else numbers(x) if isinstance(x, tuple) else x
        for x in arguments
    ]


def value(x):
    """A number that may have come as a tensor; a tensor of one number per row stays one."""
    return x.item() if isinstance(x, torch.Tensor) and x.dim() == 0 else x


def values(x):
    """Run-time numbers as a list of floats; those of a device stay tensors."""
    if isinstance(x, torch.Tensor):
        return list(x.unbind()) if on_device(x) else x.tolist()
    return [float(p) for p in x]


def on_device(x):
    """Tell whether run-time numbers came as a tensor that no host knows."""
    return isinstance(x, torch.Tensor) and x.device.type != "cpu"
