"""CUDA kernels: addresses, sizes, strides, a device and a stream across, nothing else. Python owns shapes, dtypes and allocation.

Protocol: see ``rlkernels.backends.eager``. Values are not read on the host: a target outside the vocabulary makes its row NaN.
"""
import importlib.util

import torch

from rlkernels.backends import eager
from rlkernels.backends.eager import ENTROPY, IS_TOP1, KL, LOG_SUM_SQ, MEAN_LOGITS
from rlkernels.objectives import OBJECTIVES

# find_spec, not try/except ImportError: a module that is absent is a fact, one that is present and broken is an error.
# It carries its own CUDA runtime and no driver: it loads anywhere, and says what is missing when it is used.
if importlib.util.find_spec("rlkernels._cuda") is None:
    _cuda = None
else:
    from rlkernels import _cuda

ABSENT = "rlkernels._cuda was not built; where nvcc is installed, RLKERNELS_CUDA=1 pip install builds it"
NO_DEVICE = "torch sees no CUDA device here"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NOWHERE = (0, 0, 0, 1)
MASKED = {"skip": 0, "zero": 1, "none": 2}
# Private, so looked for: the public way builds an object of Python for every launch. Builds of torch without CUDA have none.
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def available():
    """``(True, "")`` where the compiled module is present and torch sees a CUDA device, else ``(False, why not)``."""
    if _cuda is None:
        return False, ABSENT
    return (True, "") if torch.cuda.is_available() else (False, NO_DEVICE)


def token_stats(logits, targets, temperature, ignore_index, vocab_mask, ref_logits, wanted):
    vocab_mask = eager.unit_stride(vocab_mask)
    rows = _rows(logits, targets, temperature, ignore_index, vocab_mask, ref_logits)
    tokens, ref = targets.shape[0], ref_logits is not None
    present = (True, True, True, wanted & ENTROPY, wanted & LOG_SUM_SQ, wanted & MEAN_LOGITS, wanted & IS_TOP1, ref, ref, ref, ref and wanted & KL)
    outputs = [_per_row(logits, tokens if p else 0, torch.bool if k == 6 else torch.float32) for k, p in enumerate(present)]
    _cuda.token_stats(rows, [x.data_ptr() if p else 0 for x, p in zip(outputs, present, strict=True)], *_where(logits))
    return tuple(outputs)


def token_stats_backward(dlogp, dentropy, dkl, logits, targets, temperature, ignore_index, vocab_mask, ref_logits, shift, sum_exp, entropy,
                         ref_shift, ref_sum_exp, kl, out, unless=None):
    vocab_mask = eager.unit_stride(vocab_mask)
    rows = _rows(logits, targets, temperature, ignore_index, vocab_mask, ref_logits)
    gradient = _fresh_gradient(logits, targets) if out is None else out
    inputs = [_address(x) for x in (dlogp, dentropy, dkl, shift, sum_exp, entropy, ref_shift, ref_sum_exp, kl, unless)]
    _cuda.token_stats_backward(rows, inputs, _place(gradient), DTYPES[gradient.dtype], *_where(logits))
    return gradient


def fused_policy(objective, logits, targets, temperature, ignore_index, vocab_mask, columns, params, weight, entropy_weight, kl, ref_logp,
                 kl_weight, with_grad, out):
    import sys

    _available_or_raise()
    # What is not compiled into the row kernels, such as a user's objective, takes our two passes around its Python function.
    if objective not in _cuda.OBJECTIVES or OBJECTIVES[objective].columns[0] != "logp":
        return eager.fused_policy(objective, logits, targets, temperature, ignore_index, vocab_mask, columns, params, weight, entropy_weight, kl,
                                  ref_logp, kl_weight, with_grad, out, native=sys.modules[__name__])
    vocab_mask = eager.unit_stride(vocab_mask)
    rows = _rows(logits, targets, temperature, ignore_index, vocab_mask, None)
    tokens = targets.shape[0]
    outputs = [_per_row(logits, tokens) for _ in range(5)]
    # Per call, not kept: two streams must not share a ticket. The count of finished rows lies behind their losses.
    losses = _per_row(logits, tokens + 1, torch.float64)
    loss = _scalar(logits, tokens)
    gradient = logits.new_empty((0, 0))
    if with_grad:
        gradient = _fresh_gradient(logits, targets) if out is None else out
    kl_inputs = (kl, _address(ref_logp), _address(kl_weight)) if kl is not None else ("", 0, 0)
    if tokens:
        _cuda.fused_policy(
            rows, objective, [x.data_ptr() for x in columns], params, weight.data_ptr(), _address(entropy_weight), *kl_inputs,
            [*(x.data_ptr() for x in outputs), losses.data_ptr(), losses.data_ptr() + 8 * tokens, loss.data_ptr()],
            _place(gradient) if with_grad else NOWHERE, DTYPES[gradient.dtype], *_where(logits))
    return loss, gradient, *outputs


def elementwise(objective, columns, params, weight):
    _available_or_raise()
    if objective not in _cuda.OBJECTIVES:
        return eager.elementwise(objective, columns, params, weight)
    first = columns[0]
    kernel = eager.column_kernel("cuda", "columns", first.dtype, _cuda.elementwise_f32, _cuda.elementwise_f64)
    n = first.numel()
    value, derivative, loss = torch.empty_like(first), torch.empty_like(first), _scalar(first, n, first.dtype)
    parts = _parts(first, n)
    if n:
        kernel(objective, [x.data_ptr() for x in columns], params, _address(weight), value.data_ptr(), derivative.data_ptr(), loss.data_ptr(),
               *_places(parts), n, *_where(first))
    return loss, value, derivative


def weighted_loss(objective, first, minus, others, params, weight, total, share):
    _available_or_raise()
    if objective not in _cuda.OBJECTIVES:
        return eager.weighted_loss(objective, first, minus, others, params, weight, total, share)
    kernel = eager.column_kernel("cuda", "columns", first.dtype, _cuda.weighted_loss_f32, _cuda.weighted_loss_f64)
    n, masked = first.numel(), weight is not None and weight.dtype == torch.bool
    slopes, loss, parts = first.new_empty((2 if minus else 1, *first.shape)), _scalar(first, n, first.dtype), _parts(first, n)
    if n:
        weights, slope = (0, _address(weight)) if masked else (_address(weight), 0), slopes.data_ptr()
        kernel(objective, [x.data_ptr() for x in (first, *others)], [x.data_ptr() for x in minus], params, *weights, _address(total), share,
               slope, slope + n * first.element_size() if minus else 0, loss.data_ptr(), *_places(parts), n, *_where(first))
    return loss, slopes


def _parts(first, n):
    """What the blocks leave for the last one, with the count of those that are done behind it; None for one block. Per call: streams must not share it."""
    count = _cuda.elementwise_parts(n)
    return None if count <= 1 else _per_row(first, count + 1, torch.float64)


def _places(parts):
    return (0, 0) if parts is None else (parts.data_ptr(), parts.data_ptr() + 8 * (parts.numel() - 1))


def gae(rewards, values, mask, cu_seqlens, gamma, lam, masked):
    _available_or_raise()
    kernel = eager.column_kernel("cuda", "rewards", rewards.dtype, _cuda.gae_f32, _cuda.gae_f64)
    mask = None if mask is None or masked == "none" else mask.contiguous()
    segments, length = rewards.shape if cu_seqlens is None else (cu_seqlens.numel() - 1, 0)
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    kernel(rewards.data_ptr(), values.data_ptr(), _address(mask), _address(cu_seqlens), segments, length, gamma, lam, MASKED[masked],
           advantages.data_ptr(), returns.data_ptr(), *_where(rewards))
    return advantages, returns


def _available_or_raise():
    if _cuda is None:
        raise RuntimeError(f"backend 'cuda' is unavailable: {ABSENT}")


def _where(tensor):
    """``(device index, stream)``: the launch goes to the tensor's device, whichever is current, and onto its current stream."""
    index = tensor.device.index
    return index, torch.cuda.current_stream(index).cuda_stream if _raw_stream is None else _raw_stream(index)


def _rows(logits, targets, temperature, ignore_index, vocab_mask, ref_logits):
    _available_or_raise()
    dtype = DTYPES.get(logits.dtype)
    if dtype is None:
        raise NotImplementedError(f"logits of dtype {logits.dtype} are not supported by backend 'cuda'; cast to float32 or use_backend(\"eager\")")
    if ref_logits is not None and ref_logits.dtype != logits.dtype:
        raise NotImplementedError(f"ref_logits of dtype {ref_logits.dtype} beside logits of dtype {logits.dtype} are not supported by backend 'cuda'; "
                                  "cast one of them")
    per_row = isinstance(temperature, torch.Tensor)
    mask_stride = 0 if vocab_mask is None or vocab_mask.dim() == 1 else vocab_mask.stride(0)
    return _cuda.Rows(dtype, targets.shape[0], logits.shape[-1], _place(logits), NOWHERE if ref_logits is None else _place(ref_logits),
                      targets.data_ptr(), targets.stride(0), targets.element_size(), ignore_index, 1.0 if per_row else 1.0 / temperature,
                      temperature.data_ptr() if per_row else 0, _address(vocab_mask), mask_stride)


def _place(rows):
    """``(address, outer stride, inner stride, level)`` of [T, V] or [B, L, V]: row r is at ``(r // level) outer + (r % level) inner``."""
    if rows.dim() == 2:
        return rows.data_ptr(), rows.stride(0), 0, 1
    return rows.data_ptr(), rows.stride(0), rows.stride(1), max(rows.shape[1], 1)


def _fresh_gradient(logits, targets):
    return logits.new_empty((targets.shape[0], logits.shape[-1]))


def _per_row(like, count, dtype=torch.float32):
    return torch.empty(count, dtype=dtype, device=like.device)


def _scalar(like, count, dtype=torch.float32):
    """Where a kernel over ``count`` rows leaves its sum; without rows there is no kernel, and the sum is 0."""
    return (torch.empty if count else torch.zeros)((), dtype=dtype, device=like.device)


def _address(tensor):
    return 0 if tensor is None else tensor.data_ptr()
