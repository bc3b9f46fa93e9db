"""Native CPU kernels: addresses, sizes and strides across, nothing else. Python owns shapes, dtypes and allocation."""

import importlib.util
import math
import os
import sys
from contextlib import contextmanager

import torch

from rlkernels.backends import built, eager, gate
from rlkernels.backends.eager import ENTROPY, IS_TOP1, KL, LOG_SUM_SQ, MEAN_LOGITS, real_dtype

# find_spec, not try/except ImportError: a module that is absent is a fact, one that is present and broken is an error.
# torch is imported first: its libgomp then serves our parallel loops too, and no second pool of threads competes with
# it.
ABSENT = (
    "rlkernels._cpu was not built: no C++ compiler, or no Python headers, was found at install time; "
    "install g++ (and python3-dev) and run pip install again"
)
if os.environ.get("RLKERNELS_CPU") == "0":
    _cpu, ABSENT = None, "RLKERNELS_CPU=0 is set; unset it before the import"
elif importlib.util.find_spec("rlkernels._cpu") is None:
    _cpu, ABSENT = None, built.why_not("_cpu", ABSENT)
else:
    from rlkernels import _cpu

    # It would take addresses for what they are not, or compute what an objective was.
    if reason := gate.disagreement(_cpu):
        _cpu, ABSENT = None, reason
    else:
        _cpu.know(torch.Tensor, torch.nn.Parameter)
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
# Bytes. From 32 MiB on the C library maps fresh pages for every allocation; half of it, so that a head's rounded
# gradient (31 MiB at 32000 x 512) comes from what was kept, not on top of it.
LARGE = 16 << 20
NOWHERE, NO_ADDRESS = (0, 0, 0, 1), (0,)
NUMBER = torch.zeros(())  # what a count is shaped like
MASKED = {"skip": 0, "zero": 1, "none": 2}
ELEMENTWISE, WEIGHTED_LOSS, GAE = (
    {} if _cpu is None else {torch.float32: getattr(_cpu, f"{name}_f32"), torch.float64: getattr(_cpu, f"{name}_f64")}
    for name in ("elementwise", "weighted_loss", "gae")
)


def available():
    """``(True, "")`` where the compiled module is present, else ``(False, why not)``."""
    return (False, ABSENT) if _cpu is None else (True, "")


def isa():
    """The instruction set in use: ``"avx512"``, ``"avx2"`` or ``"baseline"``; ``RLKERNELS_CPU_ISA`` asks for a lower
    one.
    """
    return _cpu.isa()


def kept_bytes():
    """Bytes of freed gradients (three at most) that are kept for the next ones; the kernel may take them back at any
    time.
    """
    return _cpu.kept_bytes()


def release_memory():
    """Gives that memory back at once."""
    _cpu.release()


def token_stats(logits, targets, temperature, ignore_index, vocab_mask, ref_logits, wanted):
    logits, targets, temperature, vocab_mask, ref_logits = _rows(
        "token_stats", logits, targets, temperature, vocab_mask, ref_logits
    )
    batch = _batch(logits, targets, temperature, ignore_index, vocab_mask, ref_logits)
    like, rows, ref = _like(logits), targets.shape[0], ref_logits is not None
    present = (
        True,
        True,
        True,
        wanted & ENTROPY,
        wanted & LOG_SUM_SQ,
        wanted & MEAN_LOGITS,
        wanted & IS_TOP1,
        ref,
        ref,
        ref,
        ref and wanted & KL,
    )
    outputs = [like.new_empty(rows if p else 0) for p in present[:6]]
    outputs += [
        like.new_empty(rows if present[6] else 0, dtype=torch.bool),
        *(like.new_empty(rows if p else 0) for p in present[7:]),
    ]
    _cpu.token_stats(batch, gate.present(outputs, present))
    return tuple(outputs)


def token_stats_backward(
    dlogp,
    dentropy,
    dkl,
    logits,
    targets,
    temperature,
    ignore_index,
    vocab_mask,
    ref_logits,
    shift,
    sum_exp,
    entropy,
    ref_shift,
    ref_sum_exp,
    kl,
    out,
    unless=None,
):
    if unless is not None and unless.item() == 1.0:
        return out
    where = "token_stats_backward"
    logits, targets, temperature, vocab_mask, ref_logits = _rows(
        where, logits, targets, temperature, vocab_mask, ref_logits
    )
    per_row = gate.of_backward(
        where, dlogp, dentropy, dkl, ref_logits, shift, sum_exp, entropy, ref_shift, ref_sum_exp, kl
    )
    per_row, at = _per_row(where, gate.BACKWARD, per_row, logits, targets)
    batch = _batch(logits, targets, temperature, ignore_index, vocab_mask, ref_logits)
    gradient = _gradient(where, logits, targets, out)
    _cpu.token_stats_backward(batch, at, gate.place(gradient))
    return gate.stored(gradient, out)


def fused_policy(
    objective,
    logits,
    targets,
    temperature,
    ignore_index,
    vocab_mask,
    columns,
    params,
    weight,
    entropy_weight,
    kl,
    ref_logp,
    kl_weight,
    with_grad,
    out,
):
    # A user's objective is not compiled in: our two passes around its Python function.
    if objective not in _cpu.OBJECTIVES:
        return eager.fused_policy(
            objective,
            logits,
            targets,
            temperature,
            ignore_index,
            vocab_mask,
            columns,
            params,
            weight,
            entropy_weight,
            kl,
            ref_logp,
            kl_weight,
            with_grad,
            out,
            native=sys.modules[__name__],
        )
    where = "fused_policy"
    logits, targets, temperature, vocab_mask, _ = _rows(where, logits, targets, temperature, vocab_mask, None)
    per_row = gate.of_policy(where, columns, weight, entropy_weight, kl, ref_logp, kl_weight)
    per_row, at = _per_row(where, gate.POLICY, per_row, logits, targets)
    batch = _batch(logits, targets, temperature, ignore_index, vocab_mask, None)
    like = _like(logits)
    outputs = [like.new_empty(targets.shape[0]) for _ in range(5)]
    gradient = _gradient(where, logits, targets, out) if with_grad else logits.new_empty(0, 0)
    loss = _cpu.fused_policy(
        batch,
        objective,
        at[4:],
        params,
        at[0],
        at[1],
        kl,
        at[2],
        at[3],
        gate.addresses(outputs),
        gate.place(gradient) if with_grad else NOWHERE,
    )
    return like.new_full((), loss), gate.stored(gradient, out if with_grad else None), *outputs


def elementwise(objective, columns, params, weight):
    if objective not in _cpu.OBJECTIVES:
        return eager.elementwise(objective, columns, params, weight)
    first = columns[0]
    kernel = _kernel(ELEMENTWISE, "columns", first)
    at = _cpu.addresses(first.dtype, first, weight, *columns)
    if at is None:
        weight, *columns = gate.weighted_columns("elementwise", weight, columns)
        first, at = columns[0], gate.addresses((weight, *columns))
    value, derivative = torch.empty_like(first), torch.empty_like(first)
    loss = kernel(
        objective,
        at[1:],
        params,
        at[0],
        gate.address(value),
        gate.address(derivative),
        first.numel(),
        torch.get_num_threads(),
    )
    return first.new_full((), loss), value, derivative


def weighted_loss(objective, first, minus, others, params, weight, total, share):
    if objective not in _cpu.OBJECTIVES:
        return eager.weighted_loss(objective, first, minus, others, params, weight, total, share)
    kernel = _kernel(WEIGHTED_LOSS, "columns", first)
    taken, masked = len(minus), weight is not None and weight.dtype is torch.bool
    at = _cpu.addresses(first.dtype, first, None if masked else weight, first, *minus, *others)
    mask = _cpu.addresses(torch.bool, first, weight) if masked else NO_ADDRESS
    count = NO_ADDRESS if total is None else _cpu.addresses(torch.int64, NUMBER, total)
    if at is None or mask is None or count is None:
        columns = gate.columns("weighted_loss", first, [*minus, *others])
        weight, total = gate.weights("weighted_loss", weight, total, first)
        at, mask, count = (
            gate.addresses((None if masked else weight, *columns)),
            [gate.address(weight) if masked else 0],
            [gate.address(total)],
        )
    # Not as one tuple: that takes torch 0.3 us more.
    n, slopes = first.numel(), first.new_empty(2 if taken else 1, *first.shape)
    slope = gate.address(slopes)
    loss = kernel(
        objective,
        (at[1], *at[2 + taken :]),
        (*at[2 : 2 + taken], 0, 0)[:2],
        params,
        at[0],
        mask[0],
        count[0],
        share,
        slope,
        slope + n * first.itemsize if taken else 0,
        n,
        torch.get_num_threads(),
    )
    return first.new_full((), loss), slopes


def gae(rewards, values, mask, cu_seqlens, gamma, lam, masked):
    kernel = _kernel(GAE, "rewards", rewards)
    rewards, values, mask, cu_seqlens = gate.scan("gae", rewards, values, mask, cu_seqlens)
    if cu_seqlens is not None:
        cu_seqlens = gate.offsets("gae", cu_seqlens, rewards.shape[0])
    segments, length = rewards.shape if cu_seqlens is None else (cu_seqlens.numel() - 1, rewards.shape[0])
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    kernel(
        gate.address(rewards),
        gate.address(values),
        gate.address(mask),
        gate.address(cu_seqlens),
        segments,
        length,
        gamma,
        lam,
        MASKED[masked],
        gate.address(advantages),
        gate.address(returns),
        torch.get_num_threads(),
    )
    return advantages, returns


def _kernel(kernels, what, first):
    """The one for columns of this dtype."""
    if not first.is_cpu:
        raise RuntimeError(f"backend 'cpu' got {what} on {first.device}; move them, or leave use_backend")
    return eager.column_kernel("cpu", what, first.dtype, kernels)


def _rows(where, logits, targets, temperature, vocab_mask, ref_logits):
    if logits.dtype not in DTYPES:
        raise NotImplementedError(
            f"logits of dtype {logits.dtype} are not supported by backend 'cpu'; cast to float32 "
            'or use_backend("eager")'
        )
    if ref_logits is not None and ref_logits.dtype != logits.dtype:
        raise NotImplementedError(
            f"ref_logits of dtype {ref_logits.dtype} beside logits of dtype {logits.dtype} are "
            "not supported by backend 'cpu'; "
            "cast one of them"
        )
    if not logits.is_cpu:
        raise RuntimeError(f"backend 'cpu' got logits on {logits.device}; move them, or leave use_backend")
    return gate.rows(where, logits, targets, temperature, vocab_mask, ref_logits, real_dtype(logits.dtype))


def _per_row(where, names, tensors, logits, targets):
    """Tensors of one number per row, and their addresses; the caller holds on to them, since one may be a copy."""
    real = real_dtype(logits.dtype)
    at = _cpu.addresses(real, targets, *tensors)
    if at is None:
        tensors = gate.per_row(where, names, tensors, real, targets.shape[0], logits.device)
        at = gate.addresses(tensors)
    return tensors, at


def _batch(logits, targets, temperature, ignore_index, vocab_mask, ref_logits):
    """The batch that passed the gate, as numbers; the targets and temperatures are copied, and looked at."""
    per_row = isinstance(temperature, torch.Tensor)
    mask_stride = 0 if vocab_mask is None or vocab_mask.dim() == 1 else vocab_mask.stride()[0]
    return _cpu.Batch(
        DTYPES[logits.dtype],
        targets.shape[0],
        logits.shape[-1],
        gate.place(logits),
        NOWHERE if ref_logits is None else gate.place(ref_logits),
        gate.address(targets),
        targets.stride()[0],
        targets.itemsize,
        ignore_index,
        1.0 if per_row else temperature,
        gate.address(temperature) if per_row else 0,
        gate.address(vocab_mask),
        mask_stride,
        torch.get_num_threads(),
    )


def _gradient(where, logits, targets, out):
    """The place of the gradient of the logits: ``out``, unless there is none or it lies in a way that kernels do not
    write.
    """
    shape = targets.shape[0], logits.shape[-1]
    found = None if out is None else gate.writable(where, out, (logits.dtype,), shape, logits.device)
    if found is not None:
        return found
    return logits.new_empty(*shape) if shape[0] * shape[1] * logits.itemsize < LARGE else fresh(shape, logits.dtype)


def fresh(shape, dtype):
    """An uninitialised tensor.

    The memory of a large one goes to the next when it is freed: page faults would cost as much as the work.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < LARGE or _cpu is None:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.frombuffer(_cpu.Buffer(size), dtype=dtype).view(shape)  # the tensor owns the buffer


@contextmanager
def torchs_memory():
    """Inside, large tensors come from torch's allocator like any other: for a measurement of memory that would not see
    ours.
    """
    global LARGE
    before, LARGE = LARGE, math.inf
    try:
        yield
    finally:
        LARGE = before


def _like(logits):
    return logits.new_empty(0, dtype=real_dtype(logits.dtype))
