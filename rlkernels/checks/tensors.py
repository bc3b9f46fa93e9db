"""The checks of any tensor: type, dtype, shape, device, gradient, memory.

None of them reads a value on a device.
"""

import os

import torch

from rlkernels.tracing import has_values

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


def head(caller, hidden, weight, bias, prefix="", other=None):
    """Refuses hidden states, a weight and a bias that do not make up a head; their names begin with ``prefix``.

    ``other``: the hidden states of the trained model, named ``hidden``, which must be of the same tokens.
    """
    floating(caller, f"{prefix}weight", weight)
    if weight.numel() == 0:
        raise ValueError(
            f"{caller}: {prefix}weight has 0 elements; gather it first (ZeRO-3: deepspeed.zero.GatheredParameters)"
        )
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{caller}: {prefix}hidden has {hidden.shape[-1] if hidden.dim() else 'no'} features, {prefix}weight has "
            f"{weight.shape[-1] if weight.dim() else 'no'}; "
            f"expected [..., H] and [V, H], got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None:
        floating(caller, f"{prefix}bias", bias)
        shape(caller, f"{prefix}bias", bias, weight.shape[:1])
    if other is not None and hidden.shape[:-1] != other.shape[:-1]:
        raise ValueError(
            f"{caller}: {prefix}hidden has shape {tuple(hidden.shape)}, hidden {tuple(other.shape)}; expected the "
            "same shape, the last dimension apart"
        )


def fits(x, like, dtype):
    """Tells whether ``x`` is plainly of this dtype and of the shape and device of ``like``, with no gradient to lose.

    One question in place of four calls, because these take 1.5 us of the 50 of a small loss. What does not fit plainly
    goes to them, for their answer and their words.
    """
    return (
        type(x) is torch.Tensor
        and x.layout is torch.strided
        and not x.is_nested
        and x.dtype is dtype
        and x.shape == like.shape
        and x.device == like.device
        and not x.requires_grad
        and getattr(torch.autograd.forward_ad, "_current_level", 0) < 0
    )


def one_device(caller, first, x, **others):
    """Refuses a tensor that lies on another device than ``x``, the argument named ``first``.

    ``others``: the name of each further argument to its tensor; None and numbers lie nowhere.
    """
    for name, other in others.items():
        if isinstance(other, torch.Tensor) and other.device != x.device:
            raise RuntimeError(f"{caller}: {first} and {name} must be on one device, got {x.device} and {other.device}")


def readable(caller, name, x):
    """Refuses integers in a subclass that keeps its data in other tensors, because these integers become addresses."""
    if type(x) is not torch.Tensor and hasattr(x, "__tensor_flatten__"):
        raise TypeError(f"{caller}: {name} is a {type(x).__name__}, {KEPT_ELSEWHERE}")


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


def no_gradient(caller, **tensors):
    """Refuses tensors that require a gradient or carry a tangent, because the function would drop both in silence."""
    for name, x in tensors.items():
        if isinstance(x, torch.Tensor) and x.requires_grad:
            raise ValueError(f"{caller}: {name} gets no gradient; detach it")
    # Asked here, too, because a call would cost more than the question.
    if getattr(torch.autograd.forward_ad, "_current_level", 0) >= 0:
        no_forward_ad(caller, *tensors.values())


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
