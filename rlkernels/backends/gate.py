"""The one gate to native code: what a kernel may assume of a tensor, made so or refused, and the only place that takes
addresses.

A kernel sees numbers and believes them. So here a tensor is one of torch's own, without a pending negation, on the
device of the others, of the dtype and shape that the kernel was compiled for, and side by side in memory where the
kernel counts elements. What only lies in another way is copied; the caller holds on to what he gets back until the
kernel has run. Anything else raises. What a device alone knows is not asked.
"""

import torch

from rlkernels.backends.protocol import RowBatch, SavedRows, Upstream
from rlkernels.checks import KEPT_ELSEWHERE
from rlkernels.checks.tokens import read_offsets
from rlkernels.objectives.cxx import digest

PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
INDICES = (torch.int64, torch.int32)
INTERFACE = "0.2.0/4"
"""The text that ``csrc/interface.h`` holds too: the release that the package is of or comes before, and a number that
rises with every change of what crosses.
"""


def disagreement(module):
    """Why a compiled module does not belong to this Python code; "" where it does."""
    theirs, ours = (
        (getattr(module, "INTERFACE", "none"), getattr(module, "OBJECTIVES_DIGEST", "none")),
        (INTERFACE, digest()),
    )
    if theirs == ours:
        return ""
    what = "interface" if theirs[0] != ours[0] else "objectives"
    return (
        f"{module.__name__} was built from other sources than the Python code beside it ({what} "
        f"{theirs[what != 'interface']}, expected "
        f"{ours[what != 'interface']}); run pip install again, or python setup.py build_ext --inplace in a "
        "checkout"
    )


def own(where, name, x):
    """``x`` as a tensor whose memory is its own data, a pending negation carried out.

    Raises:
        TypeError: a subclass that keeps its data in other tensors: it has an address, and nothing is there.
    """
    if type(x) not in PLAIN:
        if type(x).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
            raise TypeError(f"{where}: {name} is a {type(x).__name__}, {KEPT_ELSEWHERE}")
        x = x.as_subclass(torch.Tensor)
    if x.layout != torch.strided:
        raise TypeError(
            f"{where}: {name} has layout {x.layout}, expected a dense strided tensor; call to_dense() first"
        )
    return x.resolve_neg() if x.is_neg() else x  # functorch would wrap it anew


def taken(where, name, x, dtype, shape, device):
    """``x`` side by side in memory: itself, or a copy."""
    if (
        type(x) in PLAIN
        and x.is_contiguous()
        and x.dtype is dtype
        and x.shape == shape
        and x.device == device
        and not x.is_neg()
    ):
        return x
    x = own(where, name, x)
    if x.dtype != dtype:
        raise TypeError(f"{where}: {name} has dtype {x.dtype}, expected {dtype}; cast it")
    if x.shape != torch.Size(shape):
        raise ValueError(f"{where}: {name} has shape {tuple(x.shape)}, expected {tuple(shape)}")
    if x.device != device:
        raise RuntimeError(f"{where}: {name} is on {x.device}, expected {device}; move it")
    return x.contiguous()


def columns(where, first, others):
    """``[first, *others]`` side by side in memory each, all of one dtype, shape and device."""
    return [
        taken(where, f"column {k}", x, first.dtype, first.shape, first.device) for k, x in enumerate((first, *others))
    ]


def weighted_columns(where, weight, columns_):
    """``[weight, *columns]``; the weight has their dtype, or is None."""
    first, *others = columns_
    weight = None if weight is None else taken(where, "weight", weight, first.dtype, first.shape, first.device)
    return [weight, *columns(where, first, others)]


def weights(where, weight, total, first):
    """The weight of each element, in the dtype of the columns or bool, and the count that divides them; None stays
    None.
    """
    if weight is not None:
        weight = taken(
            where,
            "weight",
            weight,
            torch.bool if weight.dtype is torch.bool else first.dtype,
            first.shape,
            first.device,
        )
    if total is not None:
        total = taken(where, "total", total, torch.int64, (), first.device)
    return weight, total


def per_row(where, names, tensors, dtype, count, device):
    """One number per row each; None stays None."""
    return [
        None if x is None else taken(where, name, x, dtype, (count,), device)
        for name, x in zip(names, tensors, strict=False)
    ]


def of_backward(where, upstream, ref_logits, saved):
    """The per-row inputs of a gradient in the kernels' order: those of ``Upstream``, then those of ``SavedRows``.

    What belongs to a term without an upstream gradient is left out: it may be empty.
    """
    dlogp, dentropy, dkl = upstream
    row_max, sum_exp, entropy, ref_row_max, ref_sum_exp, kl = saved
    # The gradient of a sum comes expanded. Copied here, it spares the slow way of ``per_row``, which takes 4 us more.
    if type(dlogp) is torch.Tensor and dlogp.layout is torch.strided and not dlogp.is_contiguous():
        dlogp = dlogp.contiguous()
    if dentropy is None:
        entropy = None
    elif entropy is None:
        raise ValueError(f"{where}: entropy is missing; dentropy needs it")
    if dkl is None:
        ref_row_max = ref_sum_exp = kl = None
    elif ref_logits is None or ref_row_max is None or ref_sum_exp is None or kl is None:
        raise ValueError(f"{where}: ref_logits, ref_row_max, ref_sum_exp or kl is missing; dkl needs them")
    return dlogp, dentropy, dkl, row_max, sum_exp, entropy, ref_row_max, ref_sum_exp, kl


BACKWARD = (*Upstream._fields, *SavedRows._fields)


def of_policy(where, policy):
    """``weight, entropy_weight, ref_logp, kl_weight, *columns``; the middle two are None without a KL term."""
    _, columns, _, weight, entropy_weight, kl, ref_logp, kl_weight = policy
    if kl is None:
        ref_logp = kl_weight = None
    elif ref_logp is None or kl_weight is None:
        raise ValueError(f"{where}: ref_logp or kl_weight is missing; kl={kl!r} needs them")
    return weight, entropy_weight, ref_logp, kl_weight, *columns


POLICY = "weight", "entropy_weight", "ref_logp", "kl_weight", *(f"column {k}" for k in range(1, 9))


def rows(where, batch, real):
    """The ``RowBatch`` as kernels read it: ``[T, V]`` or ``[B, L, V]`` with the columns of a row side by side, targets
    of any stride.
    """
    logits, targets, temperature, ignore_index, vocab_mask, ref_logits = batch
    logits, device = _side_by_side(where, "logits", logits), logits.device
    vocab, count = logits.shape[-1], targets.numel()
    if logits.dim() not in (2, 3) or count * vocab != logits.numel():
        raise ValueError(
            f"{where}: logits has shape {tuple(logits.shape)} and targets {tuple(targets.shape)}, "
            "expected [T, V] or [B, L, V] and one target "
            "a row"
        )
    if not (
        type(targets) in PLAIN
        and targets.dtype in INDICES
        and targets.dim() == 1
        and targets.device == device
        and not targets.is_neg()
    ):
        targets = own(where, "targets", targets)
        if targets.dtype not in INDICES:
            raise TypeError(f"{where}: targets must be int32 or int64, got {targets.dtype}")
        targets = taken(where, "targets", targets, targets.dtype, (count,), device)
    if isinstance(temperature, torch.Tensor):
        temperature = taken(where, "temperature", temperature, real, (count,), device)
    if vocab_mask is not None:
        vocab_mask = _mask(where, vocab_mask, (count, vocab), device)
    if ref_logits is not None:
        ref_logits = _side_by_side(where, "ref_logits", ref_logits)
        if ref_logits.shape != logits.shape or ref_logits.device != device:
            raise ValueError(
                f"{where}: ref_logits has shape {tuple(ref_logits.shape)} on {ref_logits.device}, "
                f"expected that of logits, {tuple(logits.shape)} "
                f"on {device}"
            )
    return tuple.__new__(RowBatch, (logits, targets, temperature, ignore_index, vocab_mask, ref_logits))


def _side_by_side(where, name, x):
    if type(x) not in PLAIN or x.is_neg():
        x = own(where, name, x)
    return x if x.dim() == 0 or x.stride()[-1] == 1 or x.shape[-1] == 1 else x.contiguous()


def _mask(where, mask, shape, device):
    mask = _side_by_side(where, "vocab_mask", mask)
    if mask.dtype is not torch.bool:
        raise TypeError(f"{where}: vocab_mask must be bool, got {mask.dtype}; True keeps a column")
    if mask.shape not in (torch.Size(shape), torch.Size(shape[1:])) or mask.device != device:
        raise ValueError(
            f"{where}: vocab_mask has shape {tuple(mask.shape)} on {mask.device}, expected {shape[1:]} or "
            f"{shape} on {device}"
        )
    return mask


def writable(where, out, dtypes, shape, device):
    """The place of a gradient of rows: ``out`` itself, or None where its layout is not one that kernels write: then it
    takes a copy.

    Raises:
        RuntimeError: two elements of ``out`` share memory: one would be lost to the other.
    """
    if (
        type(out) not in PLAIN
        or out.dtype not in dtypes
        or out.device != device
        or out.numel() != shape[0] * shape[1]
        or out.shape[-1] != shape[1]
    ):
        raise TypeError(
            f"{where}: the gradient goes to a {type(out).__name__} of shape {tuple(out.shape)} and dtype "
            f"{out.dtype} on {out.device}, expected a "
            f"plain tensor of {tuple(shape)} and {' or '.join(map(str, dtypes))} on {device}"
        )
    reach = 1
    for stride, size in sorted(
        (stride, size) for size, stride in zip(out.shape, out.stride(), strict=True) if size > 1
    ):
        if stride < reach and out.numel():
            raise RuntimeError(
                f"{where}: the gradient goes to memory that overlaps, of shape {tuple(out.shape)} with "
                f"strides {out.stride()}; pass a clone"
            )
        reach = stride * size
    return out if out.dim() in (2, 3) and (out.stride()[-1] == 1 or shape[1] == 1) and not out.is_neg() else None


def stored(gradient, out):
    """The gradient, copied to ``out`` where that is another place than the one that it was written to."""
    return gradient if out is None or gradient is out else out.copy_(gradient.view(out.shape))


def _integers(where, cu_seqlens):
    cu_seqlens = own(where, "cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in INDICES:
        raise TypeError(f"{where}: cu_seqlens must be an int32 or int64 tensor, got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(
            f"{where}: cu_seqlens has shape {tuple(cu_seqlens.shape)}, expected [S + 1]: a 0, then the "
            "end of each sequence"
        )
    return cu_seqlens.long().contiguous()


def offsets(where, cu_seqlens, tokens):
    """Offsets of packed sequences as int64; on a CPU a copy that was looked at, since another thread may write to the
    caller's.

    Raises:
        ValueError: on a CPU, offsets that do not begin at 0, that decrease, or that do not end at the number of tokens.
    """
    cu_seqlens = _integers(where, cu_seqlens)
    return read_offsets(cu_seqlens, tokens, False, where) if cu_seqlens.is_cpu else cu_seqlens


def scan(where, rewards, values, mask, cu_seqlens):
    """The arguments of a reverse scan: columns ``[B, L]``, or ``[N]`` with offsets; the mask is bool.

    The values of the offsets: see ``offsets``.
    """
    if rewards.dim() != (2 if cu_seqlens is None else 1):
        raise ValueError(
            f"{where}: rewards has shape {tuple(rewards.shape)}, expected [B, L], or [N] together with cu_seqlens"
        )
    rewards, values = columns(where, rewards, [values])
    mask = None if mask is None else taken(where, "mask", mask, torch.bool, rewards.shape, rewards.device)
    if cu_seqlens is not None and cu_seqlens.device != rewards.device:
        raise RuntimeError(f"{where}: cu_seqlens is on {cu_seqlens.device}, expected {rewards.device}; move it")
    return rewards, values, mask, None if cu_seqlens is None else _integers(where, cu_seqlens)


def matrix(where, name, x, dtypes):
    """An operand of a product, of one of these dtypes, on the CPU; of any strides.

    The product itself compares shapes.
    """
    if type(x) not in PLAIN or x.is_neg() or x.layout is not torch.strided:
        x = own(where, name, x)
    if x.dtype not in dtypes or not x.is_cpu:
        raise TypeError(
            f"{where}: {name} must be {' or '.join(map(str, dtypes))} on the CPU, got {x.dtype} on {x.device}; cast it"
        )
    return x


def address(x):
    """The address at which a tensor begins; 0 for None, and for one without elements.

    Raises:
        TypeError: the tensor keeps its elements in a way of its own.
        RuntimeError: it has elements and no memory: its storage was freed, as a sharded parameter's is between uses.
    """
    if x is None:
        return 0
    try:
        at = x.data_ptr()
    except RuntimeError as error:
        if x.layout == torch.strided:  # torch's own words, as under vmap
            raise
        # Of oneDNN's layout, in a compiled program, whose checks saw a dense one.
        raise TypeError(
            f"a tensor of shape {tuple(x.shape)} and layout {x.layout} has no memory that a kernel can "
            "read; call to_dense() first"
        ) from error
    if at == 0 and x.numel():
        raise RuntimeError(
            f"a tensor of shape {tuple(x.shape)} on {x.device} has no memory; gather it first, or pass "
            "one that holds data"
        )
    return at


def addresses(tensors):
    return [address(x) for x in tensors]


def present(tensors, wanted):
    """Addresses of outputs; 0 for those that are not wanted."""
    return [x.data_ptr() if w else 0 for x, w in zip(tensors, wanted, strict=True)]


def place(rows):
    """``(address, outer stride, inner stride, level)`` of [T, V] or [B, L, V]: row r is at ``(r // level) outer + (r %
    level) inner``.
    """
    stride = rows.stride()
    if len(stride) == 2:
        return address(rows), stride[0], 0, 1
    return address(rows), stride[0], stride[1], max(rows.shape[1], 1)


def grid(x):
    """``(address, row stride, column stride)`` of a matrix."""
    return address(x), *x.stride()
