"""Native CPU kernels: addresses, sizes and strides across, nothing else. Python owns shapes, dtypes and allocation."""
import importlib.util
import math
import sys
from contextlib import contextmanager

import torch

from rlkernels.backends import eager
from rlkernels.backends.eager import ENTROPY, IS_TOP1, KL, LOG_SUM_SQ, MEAN_LOGITS, real_dtype

# find_spec, not try/except ImportError: a module that is absent is a fact, one that is present and broken is an error.
# torch is imported first: its libgomp then serves our parallel loops too, and no second pool of threads competes with it.
if importlib.util.find_spec("rlkernels._cpu") is None:
    _cpu = None
else:
    from rlkernels import _cpu

ABSENT = ("rlkernels._cpu was not built: no C++ compiler, or no Python headers, was found at install time; "
          "install g++ (and python3-dev) and run pip install again")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
# Bytes. From 32 MiB on the C library maps fresh pages for every allocation; half of it, so that a head's rounded gradient (31 MiB at 32000 x 512) comes
# from what was kept, not on top of it.
LARGE = 16 << 20
NOWHERE = (0, 0, 0, 1)
MASKED = {"skip": 0, "zero": 1, "none": 2}


def available():
    """``(True, "")`` where the compiled module is present, else ``(False, why not)``."""
    return (False, ABSENT) if _cpu is None else (True, "")


def isa():
    """The instruction set in use: ``"avx512"``, ``"avx2"`` or ``"baseline"``; ``RLKERNELS_CPU_ISA`` asks for a lower one."""
    return _cpu.isa()


def kept_bytes():
    """Bytes of freed gradients (three at most) that are kept for the next ones; the kernel may take them back at any time."""
    return _cpu.kept_bytes()


def release_memory():
    """Gives that memory back at once."""
    _cpu.release()


def token_stats(logits, targets, temperature, ignore_index, vocab_mask, ref_logits, wanted):
    vocab_mask = eager.unit_stride(vocab_mask)
    batch = _batch(logits, targets, temperature, ignore_index, vocab_mask, ref_logits)
    like, rows, ref = _like(logits), targets.shape[0], ref_logits is not None
    present = (True, True, True, wanted & ENTROPY, wanted & LOG_SUM_SQ, wanted & MEAN_LOGITS, wanted & IS_TOP1, ref, ref, ref, ref and wanted & KL)
    outputs = [like.new_empty(rows if p else 0, dtype=torch.bool if k == 6 else None) for k, p in enumerate(present)]
    _cpu.token_stats(batch, [x.data_ptr() if p else 0 for x, p in zip(outputs, present, strict=True)])
    return tuple(outputs)


def token_stats_backward(dlogp, dentropy, dkl, logits, targets, temperature, ignore_index, vocab_mask, ref_logits, shift, sum_exp, entropy,
                         ref_shift, ref_sum_exp, kl, out, unless=None):
    if unless is not None and unless.item() == 1.0:
        return out
    vocab_mask = eager.unit_stride(vocab_mask)
    batch = _batch(logits, targets, temperature, ignore_index, vocab_mask, ref_logits)
    gradient = _fresh_gradient(logits, targets) if out is None else out
    _cpu.token_stats_backward(
        batch, [_address(x) for x in (dlogp, dentropy, dkl, shift, sum_exp, entropy, ref_shift, ref_sum_exp, kl)], _place(gradient))
    return gradient


def fused_policy(objective, logits, targets, temperature, ignore_index, vocab_mask, columns, params, weight, entropy_weight, kl, ref_logp,
                 kl_weight, with_grad, out):
    if objective not in _cpu.OBJECTIVES:  # a user's objective is not compiled in: our two passes around its Python function
        return eager.fused_policy(objective, logits, targets, temperature, ignore_index, vocab_mask, columns, params, weight, entropy_weight, kl,
                                  ref_logp, kl_weight, with_grad, out, native=sys.modules[__name__])
    vocab_mask = eager.unit_stride(vocab_mask)
    batch = _batch(logits, targets, temperature, ignore_index, vocab_mask, None)
    like = _like(logits)
    outputs = [like.new_empty(targets.shape[0]) for _ in range(5)]
    gradient = logits.new_empty((0, 0))
    if with_grad:
        gradient = _fresh_gradient(logits, targets) if out is None else out
    kl_inputs = (_address(ref_logp), _address(kl_weight)) if kl is not None else (0, 0)
    loss = _cpu.fused_policy(
        batch, objective, [x.data_ptr() for x in columns], params, weight.data_ptr(), _address(entropy_weight), kl, *kl_inputs,
        [x.data_ptr() for x in outputs], _place(gradient) if with_grad else NOWHERE)
    return like.new_full((), loss), gradient, *outputs


def elementwise(objective, columns, params, weight):
    if objective not in _cpu.OBJECTIVES:
        return eager.elementwise(objective, columns, params, weight)
    first = columns[0]
    kernel = eager.column_kernel("cpu", "columns", first.dtype, _cpu.elementwise_f32, _cpu.elementwise_f64)
    value, derivative = torch.empty_like(first), torch.empty_like(first)
    loss = kernel(objective, [x.data_ptr() for x in columns], params, _address(weight), value.data_ptr(), derivative.data_ptr(), first.numel(),
                  torch.get_num_threads())
    return first.new_full((), loss), value, derivative


def weighted_loss(objective, first, minus, others, params, weight, total, share):
    if objective not in _cpu.OBJECTIVES:
        return eager.weighted_loss(objective, first, minus, others, params, weight, total, share)
    kernel = eager.column_kernel("cpu", "columns", first.dtype, _cpu.weighted_loss_f32, _cpu.weighted_loss_f64)
    n, masked, slopes = first.numel(), weight is not None and weight.dtype == torch.bool, first.new_empty((2 if minus else 1, *first.shape))
    at, slope = 0 if weight is None else weight.data_ptr(), slopes.data_ptr()
    taken = minus[0].data_ptr() if minus else 0, minus[1].data_ptr() if len(minus) > 1 else 0
    loss = kernel(objective, [x.data_ptr() for x in (first, *others)], taken, params, 0 if masked else at, at if masked else 0,
                  0 if total is None else total.data_ptr(), share, slope, slope + n * first.element_size() if minus else 0, n, torch.get_num_threads())
    return first.new_full((), loss), slopes


def gae(rewards, values, mask, cu_seqlens, gamma, lam, masked):
    kernel = eager.column_kernel("cpu", "rewards", rewards.dtype, _cpu.gae_f32, _cpu.gae_f64)
    mask = None if mask is None else mask.contiguous()
    segments, length = rewards.shape if cu_seqlens is None else (cu_seqlens.numel() - 1, 0)
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    kernel(rewards.data_ptr(), values.data_ptr(), _address(mask), _address(cu_seqlens), segments, length, gamma, lam, MASKED[masked],
           advantages.data_ptr(), returns.data_ptr(), torch.get_num_threads())
    return advantages, returns


def _batch(logits, targets, temperature, ignore_index, vocab_mask, ref_logits):
    dtype = DTYPES.get(logits.dtype)
    if dtype is None:
        raise NotImplementedError(f"logits of dtype {logits.dtype} are not supported by backend 'cpu'; cast to float32 or use_backend(\"eager\")")
    if ref_logits is not None and ref_logits.dtype != logits.dtype:
        raise NotImplementedError(f"ref_logits of dtype {ref_logits.dtype} beside logits of dtype {logits.dtype} are not supported by backend 'cpu'; "
                                  "cast one of them")
    per_row = isinstance(temperature, torch.Tensor)
    mask_stride = 0 if vocab_mask is None or vocab_mask.dim() == 1 else vocab_mask.stride(0)
    return _cpu.Batch(dtype, targets.shape[0], logits.shape[-1], _place(logits), NOWHERE if ref_logits is None else _place(ref_logits),
                      targets.data_ptr(), targets.stride(0), targets.element_size(), ignore_index, 1.0 if per_row else temperature,
                      temperature.data_ptr() if per_row else 0, _address(vocab_mask), mask_stride, torch.get_num_threads())


def _place(rows):
    """``(address, outer stride, inner stride, level)`` of [T, V] or [B, L, V]: row r is at ``(r // level) outer + (r % level) inner``."""
    if rows.dim() == 2:
        return rows.data_ptr(), rows.stride(0), 0, 1
    return rows.data_ptr(), rows.stride(0), rows.stride(1), max(rows.shape[1], 1)


def _fresh_gradient(logits, targets):
    return fresh((targets.shape[0], logits.shape[-1]), logits.dtype)


def fresh(shape, dtype):
    """An uninitialised tensor. The memory of a large one goes to the next when it is freed: page faults would cost as much as the work."""
    size = math.prod(shape) * dtype.itemsize
    if size < LARGE or _cpu is None:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.frombuffer(_cpu.Buffer(size), dtype=dtype).view(shape)  # the tensor owns the buffer


@contextmanager
def torchs_memory():
    """Inside, large tensors come from torch's allocator like any other: for a measurement of memory that would not see ours."""
    global LARGE
    before, LARGE = LARGE, math.inf
    try:
        yield
    finally:
        LARGE = before


def _like(logits):
    return logits.new_empty(0, dtype=real_dtype(logits.dtype))


def _address(tensor):
    return 0 if tensor is None else tensor.data_ptr()
