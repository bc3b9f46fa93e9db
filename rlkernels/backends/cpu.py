"""Native CPU kernels: addresses, sizes and strides across, nothing else. Python owns shapes, dtypes and allocation."""

from typing import get_args

import torch

from rlkernels.backends import cpu_memory, eager, gate, native
from rlkernels.backends.cpu_module import ABSENT, _cpu
from rlkernels.backends.protocol import DivergenceRows, PolicyRows, RowStats, column_kernel, presence, real_dtype
from rlkernels.types import DivergenceKind

KINDS = get_args(DivergenceKind)
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
NO_ADDRESS = (0,)
NUMBER = torch.zeros(())  # what a count is shaped like
ELEMENTWISE, WEIGHTED_LOSS, GAE = (
    {} if _cpu is None else {torch.float32: getattr(_cpu, f"{name}_f32"), torch.float64: getattr(_cpu, f"{name}_f64")}
    for name in ("elementwise", "weighted_loss", "gae")
)


def available():
    """``(True, "")`` where the compiled module is present, else ``(False, why not)``."""
    return (False, ABSENT) if _cpu is None else (True, "")


def isa():
    """The instruction set in use: ``"amx"``, ``"avx512"``, ``"avx2"`` or ``"baseline"``; ``RLKERNELS_CPU_ISA`` asks
    for a lower one. ``"amx"`` is AVX-512 with tiles for the matmuls of bf16.
    """
    return _cpu.isa()


def token_stats(rows, wanted):
    rows = _rows("token_stats", rows)
    batch, reference = _batch(rows), rows.ref_logits is not None
    stats = RowStats.empty(_like(rows.logits), rows.targets.shape[0], wanted, reference)
    _cpu.token_stats(batch, gate.present(stats, presence(wanted, reference)))
    return stats


def token_stats_backward(upstream, rows, saved, out=None, unless=None):
    if unless is not None and unless.item() == 1.0:
        return out
    caller = "token_stats_backward"
    rows = _rows(caller, rows)
    per_row, at = _per_row(caller, gate.BACKWARD, gate.of_backward(caller, upstream, rows.ref_logits, saved), rows)
    batch = _batch(rows)
    gradient = _gradient(caller, rows, out)
    _cpu.token_stats_backward(batch, at, gate.place(gradient))
    return gate.stored(gradient, out)


def fused_policy(rows, policy, with_grad, out):
    # A user's objective is not compiled in: our two passes around its Python function.
    if policy.objective not in _cpu.OBJECTIVES:
        return eager.fused_policy(rows, policy, with_grad, out, (token_stats, token_stats_backward))
    caller = "fused_policy"
    rows = _rows(caller, rows)
    per_row, at = _per_row(caller, gate.POLICY, gate.of_policy(caller, policy), rows)
    batch = _batch(rows)
    like = _like(rows.logits)
    outputs = [like.new_empty(rows.targets.shape[0]) for _ in range(5)]
    gradient = _gradient(caller, rows, out) if with_grad else rows.logits.new_empty(0, 0)
    loss = _cpu.fused_policy(
        batch,
        policy.objective,
        at[4:],
        policy.params,
        at[0],
        at[1],
        policy.kl,
        at[2],
        at[3],
        gate.addresses(outputs),
        gate.place(gradient) if with_grad else native.NOWHERE,
    )
    return PolicyRows(like.new_full((), loss), gate.stored(gradient, out if with_grad else None), *outputs)


def divergence(rows, kind, beta, weight, out=None, unless=None):
    caller = "divergence"
    rows = _rows(caller, rows)
    value = _like(rows.logits).new_empty(rows.targets.shape[0])
    if weight is None:
        _cpu.divergence(_batch(rows), KINDS.index(kind), beta, 0, gate.address(value), native.NOWHERE)
        return DivergenceRows(value, rows.logits.new_empty(0, 0))
    per_row, at = _per_row(caller, ("weight",), (weight,), rows)
    kept = None if unless is None or unless.item() != 1.0 else out
    gradient = _gradient(caller, rows, None if kept is not None else out)
    _cpu.divergence(_batch(rows), KINDS.index(kind), beta, at[0], gate.address(value), gate.place(gradient))
    return DivergenceRows(value, gate.stored(gradient, out) if kept is None else kept)


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
    return native.gae(kernel, rewards, values, mask, cu_seqlens, gamma, lam, masked, torch.get_num_threads())


def _kernel(kernels, what, first):
    """The kernel over columns of this dtype."""
    if not first.is_cpu:
        raise RuntimeError(f"backend 'cpu' got {what} on {first.device}; move them, or leave use_backend")
    return kernels.get(first.dtype) or column_kernel("cpu", what, first.dtype, kernels)


def _rows(caller, rows):
    logits = rows.logits
    if not logits.is_cpu and logits.dtype in DTYPES:
        raise RuntimeError(f"backend 'cpu' got logits on {logits.device}; move them, or leave use_backend")
    return native.rows("cpu", caller, rows, DTYPES, real_dtype(logits.dtype))


def _per_row(caller, names, tensors, rows):
    logits = rows.logits
    return native.per_row(_cpu, caller, names, tensors, rows.targets, real_dtype(logits.dtype), logits.device)


def _batch(rows):
    """The rows that passed the gate, as numbers; the module copies the targets and temperatures, and looks at them."""
    return _cpu.Batch(*native.numbers(rows, DTYPES), torch.get_num_threads())


def _gradient(caller, rows, out):
    """The memory for the gradient of the logits: ``out``, unless there is none or kernels do not write its layout."""
    logits, shape = rows.logits, (rows.targets.shape[0], rows.logits.shape[-1])
    memory = None if out is None else gate.writable(caller, out, (logits.dtype,), shape, logits.device)
    if memory is not None:
        return memory
    if shape[0] * shape[1] * logits.itemsize < cpu_memory.LARGE:
        return logits.new_empty(shape)  # 2 us less
    return cpu_memory.empty(shape, logits.dtype)


def _like(logits):
    return logits.new_empty(0, dtype=real_dtype(logits.dtype))
