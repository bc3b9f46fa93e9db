"""The checks of public arguments: types, shapes, dtypes and devices, never a value on a device.

A check's first parameter, ``caller``, is the name of the public function, and every message begins with it. Its second
one, ``name``, is the name of the argument.
"""

import math
import os
import sys
from typing import get_args

import torch

from rlkernels.checks.names import NAMED, choice, known_names, named, several
from rlkernels.checks.numbers import finite, flag, integer, interval, positive, positive_integer, real
from rlkernels.tracing import has_values
from rlkernels.types import RowKL

# The checks of numbers and names, which callers reach through this module, too.
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
"""The integer dtypes that torch can compare and add; those from uint16 to uint64 it cannot."""
WHOLE_NAMES = "uint8, int8, int16, int32, int64"
KEPT_ELSEWHERE = (
    "a tensor subclass that keeps its data in other tensors; pass a plain tensor, such as its "
    "dequantize(), to_local() or full_tensor()"
)
ROW_KLS = get_args(RowKL)
COLDEST, HOTTEST = 2.0**-40, 2.0**40
"""The limits of a temperature ``T``, because the gradient of an entropy holds ``1/T**2`` in fp32.

At 1e-20 that gradient was NaN, and at 1e-40 the best token had the log-probability -log V.
"""


def tensor(caller, name, x):
    """Refuses what is not a dense strided tensor."""
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{caller}: {name} must be a torch.Tensor, got {type(x).__name__}")
    if x.layout != torch.strided or x.is_quantized or x.is_nested:
        raise TypeError(
            f"{caller}: {name} must be a dense strided tensor, got "
            f"{'quantized' if x.is_quantized else x.layout}; call to_dense() first"
        )


def floating(caller, name, x):
    """Refuses what is not a dense tensor of a supported float dtype."""
    tensor(caller, name, x)
    if x.dtype not in FLOATS:
        raise TypeError(f"{caller}: {name} has dtype {x.dtype}; supported: {FLOAT_NAMES}")


def shape(caller, name, x, expected):
    """Refuses a tensor of another shape than ``expected``."""
    if x.shape != torch.Size(expected):
        raise ValueError(f"{caller}: {name} has shape {tuple(x.shape)}, expected {tuple(expected)}")


def one_device(caller, first, x, **others):
    """Refuses a tensor that lies on another device than ``x``, the argument named ``first``.

    ``others``: the name of each further argument to its tensor; None and numbers lie nowhere.
    """
    for name, other in others.items():
        if isinstance(other, torch.Tensor) and other.device != x.device:
            raise RuntimeError(f"{caller}: {first} and {name} must be on one device, got {x.device} and {other.device}")


def logits(caller, x, name="logits"):
    """Refuses logits that are not ``[..., V]`` with at least one column."""
    floating(caller, name, x)
    if x.dim() < 1:
        raise ValueError(f"{caller}: {name} has shape {tuple(x.shape)}, expected [..., V]")
    if x.shape[-1] == 0:
        raise ValueError(f"{caller}: {name} has shape {tuple(x.shape)}: the vocabulary dimension is empty")


def readable(caller, name, x):
    """Refuses integers in a subclass that keeps its data in other tensors, because these integers become addresses."""
    if type(x) is not torch.Tensor and hasattr(x, "__tensor_flatten__"):
        raise TypeError(f"{caller}: {name} is a {type(x).__name__}, {KEPT_ELSEWHERE}")


def targets(caller, x, rows):
    """Refuses targets that are not int32 or int64 of the shape ``rows``."""
    tensor(caller, "targets", x)
    if x.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{caller}: targets must be int32 or int64, got {x.dtype}")
    shape(caller, "targets", x, rows)


def temperature(caller, x, rows):
    """Returns a temperature as a float, or as a tensor of shape ``rows``.

    A tensor may hold one temperature per row, one per sequence (``rows`` without its last size, or with a 1 in its
    place), or one for all. That one is read on a CPU alone.
    """
    if not isinstance(x, torch.Tensor) or (
        x.dim() == 0 and x.device.type == "cpu" and not torch.compiler.is_compiling()
    ):
        x = positive(caller, "temperature", x)
        within_reach(caller, "temperature", x)
        return x
    floating(caller, "temperature", x)
    no_gradient(caller, temperature=x)
    if x.shape == rows:
        return x.resolve_neg()
    of_sequences = rows[:-1]
    if x.shape not in ((), of_sequences, (*of_sequences, 1)):
        raise ValueError(
            f"{caller}: temperature has shape {tuple(x.shape)}, expected {tuple(rows)}, or "
            f"{tuple(of_sequences)} or {(*of_sequences, 1)}: one for "
            "each sequence; or a number"
        )
    return (x.unsqueeze(-1) if x.dim() and x.shape == of_sequences else x).resolve_neg().expand(rows)


def within_reach(caller, name, x, limit="a bound"):
    """Refuses a factor or divisor of logits that fp32 cannot take.

    ``limit``: the words for what the caller of the library may pass instead of a value beyond the limit.
    """
    if not COLDEST <= x <= HOTTEST:
        raise ValueError(
            f"{caller}: {name} must be from 2**-40 (9.1e-13) to 2**40 (1.1e12), got {x}; {limit} is as good as its "
            "limit"
        )


def host_reads(x):
    """Tells whether the host may read the values of ``x`` now.

    It may where that is free (on a CPU) or was asked for (``RLKERNELS_CHECK=1``), and where ``x`` has values: in a
    compiled, traced or fake program it has none.
    """
    return (CHECK_VALUES or x.device.type == "cpu") and has_values(x)


def coefficient(check, caller, name, x, like, *more, **options):
    """Returns the number that ``check`` makes of ``x``.

    A tensor of one number that the host may not read stays a tensor, and its range is not checked. ``like``: a tensor
    on the device of the data.
    """
    if (
        type(x) is float
        or not isinstance(x, torch.Tensor)
        or x.dim()
        or x.dtype == torch.bool
        or x.dtype.is_complex
        or host_reads(x)
    ):
        return check(caller, name, x, *more, **options)
    no_gradient(caller, **{name: x})
    beside(caller, name, x, like)
    return x


def beside(caller, name, x, like):
    """Refuses a tensor of one number that lies neither on the device of the data, ``like``, nor on the CPU.

    torch would compute with a number on ``meta``, and the result would be whatever the memory held.
    """
    if x.device != like.device and x.device.type != "cpu":
        raise RuntimeError(f"{caller}: {name} is on {x.device}, the data on {like.device}; move it")


def mask(caller, x, expected, name="mask", counts=False):
    """Refuses what is no mask of the shape ``expected``; None is a mask of all tokens.

    A mask is bool, or integers (not 0: live), or floats that are 0 and 1. ``counts``: floats may have other values,
    because they count tokens.
    """
    if x is None:
        return
    tensor(caller, name, x)
    if x.dtype not in (*FLOATS, *WHOLE):
        raise TypeError(
            f"{caller}: {name} must be bool, integer or floating, got {x.dtype}; supported: bool, "
            f"{WHOLE_NAMES}, {FLOAT_NAMES}"
        )
    shape(caller, name, x, expected)
    if x.dtype.is_floating_point and not counts:
        _zeros_and_ones(caller, name, x)


def labels(caller, name, x, expected):
    """Refuses labels of two classes that are not bool, or 0 and 1."""
    mask(caller, x, expected, name)
    if x.dtype != torch.bool:
        _zeros_and_ones(caller, name, x)


def counts(caller, name, x, expected):
    """Refuses numbers of tokens that are below 0 or NaN, where the host reads them."""
    mask(caller, x, expected, name, counts=True)
    if host_reads(x) and not (x >= 0).all():
        raise ValueError(f"{caller}: {name} holds {x[~(x >= 0)][0].item()}, expected numbers of tokens, at least 0")


def _zeros_and_ones(caller, name, x):
    """Refuses values other than 0 and 1, where the host reads them."""
    if host_reads(x) and not torch.equal((x != 0).to(x.dtype), x):
        raise ValueError(
            f"{caller}: {name} holds {x[(x != 0) & (x != 1)][0].item()}, expected 0 and 1 alone; weights "
            "of tokens go into weights=, an "
            f"additive mask is {name} == 0"
        )


def vocab_mask(caller, x, logits_shape):
    """Refuses a vocabulary mask that is not bool, ``[V]`` or shaped like the logits."""
    if x is None:
        return
    tensor(caller, "vocab_mask", x)
    if x.dtype != torch.bool:
        raise TypeError(f"{caller}: vocab_mask must be bool, got {x.dtype}; True keeps a column")
    if x.shape != logits_shape[-1:] and x.shape != logits_shape:
        raise ValueError(
            f"{caller}: vocab_mask has shape {tuple(x.shape)}, expected {tuple(logits_shape[-1:])} or "
            f"{tuple(logits_shape)}"
        )


def no_gradient(caller, **tensors):
    """Refuses tensors that require a gradient or carry a tangent, because the function would drop both in silence."""
    for name, x in tensors.items():
        if isinstance(x, torch.Tensor) and x.requires_grad:
            raise ValueError(f"{caller}: {name} gets no gradient; detach it")
    # Asked here, too, because a call would cost more than the question.
    if getattr(torch.autograd.forward_ad, "_current_level", 0) >= 0:
        no_forward_ad(caller, *tensors.values())


def reference(caller, x, logits_, kl):
    """Refuses ``ref_logits`` that do not match ``logits``, and a ``kl`` that is unknown or lacks them."""
    if kl is not None:
        choice(caller, "kl", kl, ROW_KLS)
        if x is None:
            raise ValueError(f"{caller}: kl={kl!r} needs ref_logits")
    if x is None:
        return
    floating(caller, "ref_logits", x)
    shape(caller, "ref_logits", x, logits_.shape)
    if x.dtype != logits_.dtype:
        raise TypeError(f"{caller}: ref_logits has dtype {x.dtype}, logits {logits_.dtype}; cast one of them")
    no_gradient(caller, ref_logits=x)


def outputs(caller, names, known):
    """Refuses names of outputs that are not among the ``known`` ones."""
    known_names(caller, "outputs", names, known)


# By getattr, because the function is private: with a torch that has none, torch refuses the call in its own words.
_transform = getattr(torch._C._functorch, "peek_interpreter_stack", lambda: None)


def no_forward_ad(caller, *tensors):
    """Refuses tensors with a tangent, and those that ``torch.func`` differentiates.

    Our ops have no formula for either, so that tangents would be zero without a word. A detached input loses its
    tangent in the same way.
    """
    # Asked first, because outside of every level of forward-mode AD no tensor has a tangent.
    forward = getattr(torch.autograd.forward_ad, "_current_level", 0) >= 0
    if not forward and (torch.compiler.is_compiling() or _transform() is None):
        return
    for x in tensors:
        if forward and isinstance(x, torch.Tensor) and torch.autograd.forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError(
                f"{caller}: forward-mode AD is not supported by rlkernels; use reverse mode, or plain torch operations"
            )
        while isinstance(x, torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(x):
            if torch._C._functorch.is_gradtrackingtensor(x):
                raise RuntimeError(
                    f"{caller}: torch.func.grad, vjp and jacrev are not supported by rlkernels; use "
                    "backward() or torch.autograd.grad"
                )
            x = torch._C._functorch.get_unwrapped(x)


def inplace(caller, x):
    """Refuses an ``x`` that the gradient must not overwrite, because somebody else could see it."""
    if not x.requires_grad:
        return
    if x.is_leaf:
        raise RuntimeError(
            f"{caller}: inplace_backward needs a non-leaf tensor: a leaf's value would be lost to its "
            "own gradient; leave it out"
        )
    base = x._base  # torch names the first tensor of a chain of views
    of_a_leaf = base is not None and base.is_leaf and base.requires_grad
    if of_a_leaf or not torch.compiler.is_compiling() and _lies_in_a_leaf(x):
        raise RuntimeError(
            f"{caller}: inplace_backward needs non-leaf memory, got a view of a leaf: its value would be "
            "lost to its own gradient; "
            "leave it out, or pass a copy"
        )
    if x.numel() == 0:  # no elements overlap, whatever the strides are
        return
    spans = sorted((stride, size) for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1)
    reach = 1
    for stride, size in spans:
        if stride < reach:
            raise RuntimeError(
                f"{caller}: inplace_backward needs non-overlapping memory, got shape {tuple(x.shape)} "
                f"with strides {x.stride()}"
            )
        reach = stride * size


def _lies_in_a_leaf(x):
    """Tells whether ``x`` shares memory with a leaf that its graph ends in.

    Some views have no base that says so: those of ``unsafe_chunk``, a view that was made a leaf, and the result of a
    Function that returns its input detached.
    """
    nodes = [x.grad_fn]
    while nodes:
        node = nodes.pop()
        inputs = [] if node is None else [source for source, _ in node.next_functions if source is not None]
        leaves = [getattr(source, "variable", None) for source in inputs]
        if any(
            isinstance(leaf, torch.Tensor) and leaf.layout == x.layout and torch._C._is_alias_of(leaf, x)
            for leaf in leaves
        ):
            return True
        # Only such nodes can hand on memory: a view of torch's has one input, a user's Function any number.
        if len(inputs) == 1 or isinstance(node, torch.autograd.function.BackwardCFunction):
            nodes += inputs
    return False


def pairs(caller, chosen, rejected, names=("chosen", "rejected")):
    """Refuses numbers of pairs that differ in shape or device, or are not floats."""
    for name, x in zip(names, (chosen, rejected), strict=True):
        floating(caller, name, x)
    if chosen.shape != rejected.shape:
        raise ValueError(
            f"{caller}: {names[0]} has {chosen.numel()} pairs, {names[1]} has {rejected.numel()}; one "
            "score each per pair, got shapes "
            f"{tuple(chosen.shape)} and {tuple(rejected.shape)}"
        )
    one_device(caller, names[0], chosen, **{names[1]: rejected})


def params(caller, objective, entry, keywords, like):
    """Returns the values of the objective's parameters, in the order in which the objective takes them.

    ``keywords``: the caller's; without one, the default of the objective's signature stands.
    """
    for name in keywords:
        if name not in entry.params:
            known = f"it takes {', '.join(entry.params)}" if entry.params else "it takes no parameters"
            raise TypeError(f"{caller}: objective {objective!r} takes no {name!r}; {known}")
    values, plain = {**dict(entry.defaults), **keywords}, True
    for name in entry.params:
        if name not in values:
            raise TypeError(f"{caller}: objective {objective!r} needs {name!r}")
        if type(values[name]) is not float:
            values[name] = coefficient(real, caller, name, values[name], like)
            plain = plain and not isinstance(values[name], torch.Tensor)
    known = values if plain else {name: x for name, x in values.items() if not isinstance(x, torch.Tensor)}
    # clip_low = 1 is no lower bound, because a ratio is never below 0.
    if "clip_low" in known and not 0 <= known["clip_low"] <= 1:
        raise ValueError(f"{caller}: clip_low must be in [0, 1], got {known['clip_low']}")
    # CISPO's weight may have no upper bound either.
    top = math.inf if objective == "cispo" else sys.float_info.max
    if "clip_high" in known and not 0 <= known["clip_high"] <= top:
        raise ValueError(f"{caller}: clip_high must be in [0, inf), got {known['clip_high']}")
    if "dual_clip" in known and not known["dual_clip"] > 1:
        raise ValueError(f"{caller}: dual_clip must be > 1, got {values['dual_clip']}")
    for name in ("delta", "delta_low", "delta_high"):
        if name in known and name in entry.params and not known[name] >= 0:
            raise ValueError(f"{caller}: {name} must be >= 0, got {known[name]}")
    for name in ("beta", "tau_pos", "tau_neg", "clip_range", "ratio_cap", "ratio_max"):
        if name in known and name in entry.params:
            positive(caller, name, known[name])
    return [values[name] for name in entry.params]
