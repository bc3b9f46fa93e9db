"""Every check of a public argument: types, shapes, dtypes and devices, never a value on a device.

Messages start with the function's name.
"""

import math
import os

import torch

from rlkernels.checks.names import NAMED, choice, known_names, named, several
from rlkernels.checks.numbers import finite, flag, integer, interval, positive, positive_integer, real
from rlkernels.tracing import has_values

# Checks, too.
__all__ = [
    "NAMED",
    "choice",
    "finite",
    "flag",
    "integer",
    "interval",
    "known_names",
    "named",
    "positive",
    "positive_integer",
    "real",
    "several",
]

CHECK_VALUES = os.environ.get("RLKERNELS_CHECK") == "1"
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FLOAT_NAMES = "float32, bfloat16, float16, float64"
WHOLE = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
"""Those that torch can compare and add: of uint16 to uint64 it cannot."""
WHOLE_NAMES = "uint8, int8, int16, int32, int64"
KEPT_ELSEWHERE = (
    "a tensor subclass that keeps its data in other tensors; pass a plain tensor, such as its "
    "dequantize(), to_local() or full_tensor()"
)
COLDEST, HOTTEST = 2.0**-40, 2.0**40
"""Temperatures: a gradient of entropies holds ``1/T**2`` in fp32.

At 1e-20 it was NaN; at 1e-40 the best token had the log-probability -log V.
"""


def tensor(where, name, x):
    """A dense strided tensor."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{where}: {name} must be a torch.Tensor, got {type(x).__name__}")
    if x.layout != torch.strided or x.is_quantized or x.is_nested:
        raise TypeError(
            f"{where}: {name} must be a dense strided tensor, got "
            f"{'quantized' if x.is_quantized else x.layout}; call to_dense() first"
        )


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


def readable(where, name, x):
    """Integers that are read: a tensor that keeps its data in others holds none."""
    if type(x) is not torch.Tensor and hasattr(x, "__tensor_flatten__"):
        raise TypeError(f"{where}: {name} is a {type(x).__name__}, {KEPT_ELSEWHERE}")


def targets(where, x, rows):
    tensor(where, "targets", x)
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{where}: targets must be int32 or int64, got {x.dtype}")
    shape(where, "targets", x, rows)


def temperature(where, x, rows):
    """``x`` as a float, or as a tensor of shape ``rows``: given so, or one for each sequence (``rows`` without or with
    a last 1), or one for all.

    A tensor of one number is read on the CPU alone.
    """
    if not isinstance(x, torch.Tensor) or (
        x.dim() == 0 and x.device.type == "cpu" and not torch.compiler.is_compiling()
    ):
        x = positive(where, "temperature", x)
        within_reach(where, "temperature", x)
        return x
    floating(where, "temperature", x)
    no_gradient(where, temperature=x)
    if x.shape == rows:
        return x.resolve_neg()
    of_sequences = rows[:-1]
    if x.shape not in ((), of_sequences, (*of_sequences, 1)):
        raise ValueError(
            f"{where}: temperature has shape {tuple(x.shape)}, expected {tuple(rows)}, or "
            f"{tuple(of_sequences)} or {(*of_sequences, 1)}: one for "
            "each sequence; or a number"
        )
    return (x.unsqueeze(-1) if x.dim() and x.shape == of_sequences else x).resolve_neg().expand(rows)


def within_reach(where, name, x, limit="a bound"):
    """A positive factor or divisor of logits that fp32 can take; ``limit``: what is as good as one that is not."""
    if not COLDEST <= x <= HOTTEST:
        raise ValueError(
            f"{where}: {name} must be from 2**-40 (9.1e-13) to 2**40 (1.1e12), got {x}; {limit} is as good as its limit"
        )


def host_reads(x):
    """Tell whether the host may read values of ``x`` here and now: it is free, or was asked for, and there are some."""
    return (CHECK_VALUES or x.device.type == "cpu") and has_values(x)  # not those of a compiled, traced or fake program


def coefficient(check, where, name, x, like, *more, **options):
    """A number as ``check`` gives it; a tensor of one number that the host may not read stays a tensor, and its range
    is not looked at.

    ``like``: a tensor on the device of the data.
    """
    if (
        type(x) is float
        or not isinstance(x, torch.Tensor)
        or x.dim()
        or x.dtype == torch.bool
        or x.dtype.is_complex
        or host_reads(x)
    ):
        return check(where, name, x, *more, **options)
    no_gradient(where, **{name: x})
    beside(where, name, x, like)
    return x


def beside(where, name, x, like):
    """A tensor of one number lies where the data does, or on the CPU: torch computes with one on ``meta``, and the
    result is what memory held.
    """
    if x.device != like.device and x.device.type != "cpu":
        raise RuntimeError(f"{where}: {name} is on {x.device}, the data on {like.device}; move it")


def mask(where, x, expected, name="mask", counts=False):
    """A mask: bool; integers, of which those that are not 0 are live; or floats, which must be 0 and 1 unless they are
    ``counts``.
    """
    if x is None:
        return
    tensor(where, name, x)
    if x.dtype not in (*FLOATS, *WHOLE):
        raise TypeError(
            f"{where}: {name} must be bool, integer or floating, got {x.dtype}; supported: bool, "
            f"{WHOLE_NAMES}, {FLOAT_NAMES}"
        )
    shape(where, name, x, expected)
    if x.dtype.is_floating_point and not counts:
        _zeros_and_ones(where, name, x)


def labels(where, name, x, expected):
    """Labels of two classes: bool, or 0 and 1."""
    mask(where, x, expected, name)
    if x.dtype != torch.bool:
        _zeros_and_ones(where, name, x)


def counts(where, name, x, expected):
    """Numbers of tokens."""
    mask(where, x, expected, name, counts=True)
    if host_reads(x) and not (x >= 0).all():
        raise ValueError(f"{where}: {name} holds {x[~(x >= 0)][0].item()}, expected numbers of tokens, at least 0")


def _zeros_and_ones(where, name, x):
    if host_reads(x) and not torch.equal((x != 0).to(x.dtype), x):
        raise ValueError(
            f"{where}: {name} holds {x[(x != 0) & (x != 1)][0].item()}, expected 0 and 1 alone; weights "
            "of tokens go into weights=, an "
            f"additive mask is {name} == 0"
        )


def vocab_mask(where, x, logits_shape):
    if x is None:
        return
    tensor(where, "vocab_mask", x)
    if x.dtype != torch.bool:
        raise TypeError(f"{where}: vocab_mask must be bool, got {x.dtype}; True keeps a column")
    if x.shape != logits_shape[-1:] and x.shape != logits_shape:
        raise ValueError(
            f"{where}: vocab_mask has shape {tuple(x.shape)}, expected {tuple(logits_shape[-1:])} or "
            f"{tuple(logits_shape)}"
        )


def no_gradient(where, **tensors):
    """Neither by a backward nor forwards."""
    for name, x in tensors.items():
        if isinstance(x, torch.Tensor) and x.requires_grad:
            raise ValueError(f"{where}: {name} gets no gradient; detach it")
    # Asked here too: a call would cost more than the question.
    if getattr(torch.autograd.forward_ad, "_current_level", 0) >= 0:
        no_forward_ad(where, *tensors.values())


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
    known_names(where, "outputs", names, known)


# Private, so looked for: without it torch itself refuses, in words of its own.
_transform = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: None)


def no_forward_ad(where, *tensors):
    """Ops of ours have no forward-mode formula, and none for torch.func: tangents would be zero without a word.

    So would those of what is detached.
    """
    # Outside of every level nothing need be unpacked.
    forward = getattr(torch.autograd.forward_ad, "_current_level", 0) >= 0
    if not forward and (torch.compiler.is_compiling() or _transform() is None):
        return
    for x in tensors:
        if forward and isinstance(x, torch.Tensor) and torch.autograd.forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError(
                f"{where}: forward-mode AD is not supported by rlkernels; use reverse mode, or plain torch operations"
            )
        while isinstance(x, torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(x):
            if torch._C._functorch.is_gradtrackingtensor(x):
                raise RuntimeError(
                    f"{where}: torch.func.grad, vjp and jacrev are not supported by rlkernels; use "
                    "backward() or torch.autograd.grad"
                )
            x = torch._C._functorch.get_unwrapped(x)


def inplace(where, x):
    """The gradient may be written over ``x`` only where nobody else can see it."""
    if not x.requires_grad:
        return
    if x.is_leaf:
        raise RuntimeError(
            f"{where}: inplace_backward needs a non-leaf tensor: a leaf's value would be lost to its "
            "own gradient; leave it out"
        )
    base = x._base  # of a view of a view, the first of them
    of_a_leaf = base is not None and base.is_leaf and base.requires_grad
    if of_a_leaf or not torch.compiler.is_compiling() and _lies_in_a_leaf(x):
        raise RuntimeError(
            f"{where}: inplace_backward needs non-leaf memory, got a view of a leaf: its value would be "
            "lost to its own gradient; "
            "leave it out, or pass a copy"
        )
    if x.numel() == 0:  # nothing overlaps, whatever the strides
        return
    spans = sorted((stride, size) for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1)
    reach = 1
    for stride, size in spans:
        if stride < reach:
            raise RuntimeError(
                f"{where}: inplace_backward needs non-overlapping memory, got shape {tuple(x.shape)} "
                f"with strides {x.stride()}"
            )
        reach = stride * size


def _lies_in_a_leaf(x):
    """The same by the graph: unsafe_chunk, a view that was made a leaf and a Function that returns a detached input
    have no base that says so.
    """
    nodes = [x.grad_fn]
    while nodes:
        node = nodes.pop()
        inputs = [] if node is None else [found for found, _ in node.next_functions if found is not None]
        leaves = [getattr(found, "variable", None) for found in inputs]
        if any(
            isinstance(leaf, torch.Tensor) and leaf.layout == x.layout and torch._C._is_alias_of(leaf, x)
            for leaf in leaves
        ):
            return True
        # A view of torch's has one input, a user's Function any.
        if len(inputs) == 1 or isinstance(node, torch.autograd.function.BackwardCFunction):
            nodes += inputs
    return False


def pairs(where, chosen, rejected, names=("chosen", "rejected")):
    for name, x in zip(names, (chosen, rejected), strict=True):
        floating(where, name, x)
    if chosen.shape != rejected.shape:
        raise ValueError(
            f"{where}: {names[0]} has {chosen.numel()} pairs, {names[1]} has {rejected.numel()}; one "
            "score each per pair, got shapes "
            f"{tuple(chosen.shape)} and {tuple(rejected.shape)}"
        )
    one_device(where, names[0], chosen, **{names[1]: rejected})


def params(where, objective, entry, given, defaults, like):
    """The objective's parameters in its own order, from keywords and the defaults that the field agrees on."""
    for name in given:
        if name not in entry.params:
            known = f"it takes {', '.join(entry.params)}" if entry.params else "it takes no parameters"
            raise TypeError(f"{where}: objective {objective!r} takes no {name!r}; {known}")
    values, plain = {**defaults.get(objective, {}), **given}, True
    for name in entry.params:
        if name not in values:
            raise TypeError(f"{where}: objective {objective!r} needs {name!r}")
        if type(values[name]) is not float:
            values[name] = coefficient(real, where, name, values[name], like)
            plain = plain and not isinstance(values[name], torch.Tensor)
    known = values if plain else {name: x for name, x in values.items() if not isinstance(x, torch.Tensor)}
    for name, low, high in (("clip_low", 0, 1), ("clip_high", 0, math.inf)):
        # CISPO's paper has no lower bound: clip_low = 1 there, so 1 is in.
        if name in known and not (low <= known[name] <= high if objective == "cispo" else low <= known[name] < high):
            raise ValueError(f"{where}: {name} must be in [{low}, {high}), got {known[name]}")
    if "dual_clip" in known and not known["dual_clip"] > 1:
        raise ValueError(f"{where}: dual_clip must be > 1, got {values['dual_clip']}")
    for name in ("beta", "tau_pos", "tau_neg", "clip_range"):
        if name in known and name in entry.params:
            positive(where, name, known[name])
    return [values[name] for name in entry.params]
