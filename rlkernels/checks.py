"""Every check of a public argument: types, shapes, dtypes and devices, never a value on a device. Messages start with the function's name."""
import math

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FLOAT_NAMES = "float32, bfloat16, float16, float64"


def tensor(where, name, x):
    """A dense strided tensor."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{where}: {name} must be a torch.Tensor, got {type(x).__name__}")
    if x.layout != torch.strided or x.is_quantized or x.is_nested:
        raise TypeError(f"{where}: {name} must be a dense strided tensor, got {'quantized' if x.is_quantized else x.layout}; call to_dense() first")


def floating(where, name, x):
    tensor(where, name, x)
    if x.dtype not in FLOATS:
        raise TypeError(f"{where}: {name} has dtype {x.dtype}; supported: {FLOAT_NAMES}")


def shape(where, name, x, expected):
    if x.shape != torch.Size(expected):
        raise ValueError(f"{where}: {name} has shape {tuple(x.shape)}, expected {tuple(expected)}")


def one_device(where, first, x, **others):
    """``others``: name to tensor or None; all on the device of ``x``, which is called ``first``."""
    for name, other in others.items():
        if isinstance(other, torch.Tensor) and other.device != x.device:
            raise RuntimeError(f"{where}: {first} and {name} must be on one device, got {x.device} and {other.device}")


def logits(where, x, name="logits"):
    floating(where, name, x)
    if x.dim() < 1:
        raise ValueError(f"{where}: {name} has shape {tuple(x.shape)}, expected [..., V]")
    if x.shape[-1] == 0:
        raise ValueError(f"{where}: {name} has shape {tuple(x.shape)}: the vocabulary dimension is empty")


def targets(where, x, rows):
    tensor(where, "targets", x)
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{where}: targets must be int32 or int64, got {x.dtype}")
    shape(where, "targets", x, rows)


def integer(where, name, x):
    if not isinstance(x, int) or isinstance(x, bool):
        raise TypeError(f"{where}: {name} must be int, got {type(x).__name__}")


def temperature(where, x, rows):
    if isinstance(x, torch.Tensor):
        floating(where, "temperature", x)
        shape(where, "temperature", x, rows)
        no_gradient(where, temperature=x)
    else:
        positive(where, "temperature", x)


def real(where, name, x):
    if isinstance(x, (bool, str)) or not isinstance(x, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{where}: {name} must be a number, got {type(x).__name__}")


def positive(where, name, x):
    real(where, name, x)
    if not 0 < x < math.inf:  # NaN fails too
        raise ValueError(f"{where}: {name} must be positive and finite, got {x}")


def finite(where, name, x):
    real(where, name, x)
    if not -math.inf < x < math.inf:
        raise ValueError(f"{where}: {name} must be finite, got {x}")


def interval(where, name, x, low, high, closed=True):
    """``low <= x <= high``, or ``low <= x < high`` where ``closed`` is False."""
    real(where, name, x)
    if not (low <= x <= high if closed else low <= x < high):
        raise ValueError(f"{where}: {name} must be in [{low}, {high}{']' if closed else ')'}, got {x}")


def choice(where, name, x, known):
    if x not in known:
        raise ValueError(f"{where}: {name} must be one of {', '.join(map(str, known))}; got {x!r}")


def mask(where, x, expected, name="mask"):
    if x is None:
        return
    tensor(where, name, x)
    if x.dtype.is_complex:
        raise TypeError(f"{where}: {name} must be bool, integer or floating, got {x.dtype}")
    shape(where, name, x, expected)


def vocab_mask(where, x, logits_shape):
    if x is None:
        return
    tensor(where, "vocab_mask", x)
    if x.dtype != torch.bool:
        raise TypeError(f"{where}: vocab_mask must be bool, got {x.dtype}; True keeps a column")
    if x.shape != logits_shape[-1:] and x.shape != logits_shape:
        raise ValueError(f"{where}: vocab_mask has shape {tuple(x.shape)}, expected {tuple(logits_shape[-1:])} or {tuple(logits_shape)}")


def no_gradient(where, **tensors):
    for name, x in tensors.items():
        if isinstance(x, torch.Tensor) and x.requires_grad:
            raise ValueError(f"{where}: {name} gets no gradient; detach it")


def reference(where, x, logits_, kl):
    """``ref_logits`` beside ``logits``, and the estimator that they are for."""
    if kl is not None:
        choice(where, "kl", kl, ("k1", "k2", "k3", "exact"))
        if x is None:
            raise ValueError(f"{where}: kl={kl!r} needs ref_logits")
    if x is None:
        return
    floating(where, "ref_logits", x)
    shape(where, "ref_logits", x, logits_.shape)
    if x.dtype != logits_.dtype:
        raise TypeError(f"{where}: ref_logits has dtype {x.dtype}, logits {logits_.dtype}; cast one of them")
    no_gradient(where, ref_logits=x)


def outputs(where, names, known):
    if isinstance(names, str):
        raise TypeError(f"{where}: outputs must be a tuple of names, got the string {names!r}")
    for name in names:
        if name not in known:
            raise ValueError(f"{where}: outputs: unknown {name!r}; known: {', '.join(known)}")


def no_forward_ad(where, *tensors):
    """Custom ops have no forward-mode formula: ``torch.func.jvp`` would return zero tangents without a word."""
    if getattr(torch.autograd.forward_ad, "_current_level", 0) < 0:  # private, so looked for: outside of every level nothing need be unpacked
        return
    for x in tensors:
        if isinstance(x, torch.Tensor) and torch.autograd.forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError(f"{where}: forward-mode AD is not supported by rlkernels")


def inplace(where, x):
    """The gradient may be written over ``x`` only where nobody else can see it."""
    if not x.requires_grad:
        return
    if x.is_leaf:
        raise RuntimeError(f"{where}: inplace_backward needs a non-leaf tensor: a leaf's value would be lost to its own gradient; leave it out")
    base = x._base  # of a view of a view, the first of them
    of_a_leaf = base is not None and base.is_leaf and base.requires_grad
    if of_a_leaf or not torch.compiler.is_compiling() and _lies_in_a_leaf(x):
        raise RuntimeError(f"{where}: inplace_backward needs non-leaf memory, got a view of a leaf: its value would be lost to its own gradient; "
                           "leave it out, or pass a copy")
    spans = sorted((stride, size) for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1)
    reach = 1
    for stride, size in spans:
        if stride < reach:
            raise RuntimeError(f"{where}: inplace_backward needs non-overlapping memory, got shape {tuple(x.shape)} with strides {x.stride()}")
        reach = stride * size


def _lies_in_a_leaf(x):
    """The same by the graph: unsafe_chunk, a view that was made a leaf and a Function that returns a detached input have no base that says so."""
    node = x.grad_fn
    while node is not None:
        inputs = [found for found, _ in node.next_functions if found is not None]
        leaves = [getattr(found, "variable", None) for found in inputs]
        if any(isinstance(leaf, torch.Tensor) and leaf.layout == x.layout and torch._C._is_alias_of(leaf, x) for leaf in leaves):
            return True
        node = inputs[0] if len(inputs) == 1 else None  # a view has one input
    return False


def pairs(where, chosen, rejected, names=("chosen", "rejected")):
    for name, x in zip(names, (chosen, rejected), strict=True):
        floating(where, name, x)
    if chosen.shape != rejected.shape:
        raise ValueError(f"{where}: {names[0]} has {chosen.numel()} pairs, {names[1]} has {rejected.numel()}; one score each per pair, got shapes "
                         f"{tuple(chosen.shape)} and {tuple(rejected.shape)}")
    one_device(where, names[0], chosen, **{names[1]: rejected})


def params(where, objective, entry, given, defaults):
    """The objective's parameters in its own order, from keywords and the defaults that the field agrees on."""
    for name in given:
        if name not in entry.params:
            known = f"it takes {', '.join(entry.params)}" if entry.params else "it takes no parameters"
            raise TypeError(f"{where}: objective {objective!r} takes no {name!r}; {known}")
    values = {**defaults.get(objective, {}), **given}
    for name in entry.params:
        if name not in values:
            raise TypeError(f"{where}: objective {objective!r} needs {name!r}")
        real(where, name, values[name])
    for name, low, high in (("clip_low", 0, 1), ("clip_high", 0, math.inf)):
        # CISPO's paper has no lower bound: clip_low = 1 there, so 1 is in.
        if name in values and not (low <= values[name] <= high if objective == "cispo" else low <= values[name] < high):
            raise ValueError(f"{where}: {name} must be in [{low}, {high}), got {values[name]}")
    if "dual_clip" in values and not values["dual_clip"] > 1:
        raise ValueError(f"{where}: dual_clip must be > 1, got {values['dual_clip']}")
    for name in ("beta", "tau_pos", "tau_neg", "clip_range"):
        if name in values and name in entry.params:
            positive(where, name, values[name])
    return [values[name] for name in entry.params]


def positive_integer(where, name, x):
    """None will do."""
    if x is not None and (not isinstance(x, (int, torch.SymInt)) or isinstance(x, bool)):
        raise TypeError(f"{where}: {name} must be a positive int or None, got {type(x).__name__}")
    if x is not None and x < 1:
        raise ValueError(f"{where}: {name} must be a positive int or None, got {x}")
