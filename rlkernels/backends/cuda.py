"""CUDA kernels: addresses, sizes, strides, a device and a stream across, nothing else.

Python owns shapes, dtypes and allocation.

Protocol: see ``rlkernels.backends.eager``. Values are not read on the host: a target outside the vocabulary makes its
row NaN.
"""

import importlib.util

import torch

from rlkernels.backends import built, eager, gate
from rlkernels.backends.eager import ENTROPY, IS_TOP1, KL, LOG_SUM_SQ, MEAN_LOGITS
from rlkernels.objectives import OBJECTIVES

# find_spec, not try/except ImportError: a module that is absent is a fact, one that is present and broken is an error.
# It carries its own CUDA runtime and no driver: it loads anywhere, and says what is missing when it is used.
ABSENT = "rlkernels._cuda was not built; where nvcc is installed, RLKERNELS_CUDA=1 pip install builds it"
if importlib.util.find_spec("rlkernels._cuda") is None:
    _cuda, ABSENT = None, built.why_not("_cuda", ABSENT)
else:
    from rlkernels import _cuda

    if reason := gate.disagreement(_cuda):
        _cuda, ABSENT = None, reason
    else:
        _cuda.know(torch.Tensor, torch.nn.Parameter)
NO_DEVICE = "torch sees no CUDA device here"
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NOWHERE = (0, 0, 0, 1)
MASKED = {"skip": 0, "zero": 1, "none": 2}
# Private, so looked for: the public way builds an object of Python for every launch. Builds of torch without CUDA have
# none.
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def available():
    """``(True, "")`` where the compiled module is present and torch sees a CUDA device, else ``(False, why not)``."""
    if _cuda is None:
        return False, ABSENT
    return (True, "") if torch.cuda.is_available() else (False, NO_DEVICE)


def token_stats(logits, targets, temperature, ignore_index, vocab_mask, ref_logits, wanted):
    taken = logits, targets, temperature, vocab_mask, ref_logits = _taken(
        "token_stats", logits, targets, temperature, vocab_mask, ref_logits
    )
    tokens, ref = targets.shape[0], ref_logits is not None
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
    outputs = [
        _per_row(logits, tokens if p else 0, torch.bool if k == 6 else torch.float32) for k, p in enumerate(present)
    ]
    _cuda.token_stats(_rows(*taken, ignore_index), gate.present(outputs, present), *_where(logits))
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
    where = "token_stats_backward"
    taken = logits, targets, temperature, vocab_mask, ref_logits = _taken(
        where, logits, targets, temperature, vocab_mask, ref_logits
    )
    per_row = gate.of_backward(
        where, dlogp, dentropy, dkl, ref_logits, shift, sum_exp, entropy, ref_shift, ref_sum_exp, kl
    )
    per_row, at = _addresses(where, gate.BACKWARD, per_row, logits, targets)
    unless = None if unless is None else gate.taken(where, "unless", unless, torch.float32, (), logits.device)
    gradient = _gradient(where, logits, targets, out)
    if unless is not None and gradient is not out:
        gradient.copy_(out.view(gradient.shape))  # what stays as it is must be there
    _cuda.token_stats_backward(
        _rows(*taken, ignore_index),
        [*at, gate.address(unless)],
        gate.place(gradient),
        DTYPES[gradient.dtype],
        *_where(logits),
    )
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
    import sys

    _available_or_raise()
    # What is not compiled into the row kernels, such as a user's objective, takes our two passes around its Python
    # function.
    if objective not in _cuda.OBJECTIVES or OBJECTIVES[objective].columns[0] != "logp":
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
    taken = logits, targets, *_ = _taken(where, logits, targets, temperature, vocab_mask, None)
    per_row = gate.of_policy(where, columns, weight, entropy_weight, kl, ref_logp, kl_weight)
    per_row, at = _addresses(where, gate.POLICY, per_row, logits, targets)
    tokens = targets.shape[0]
    outputs = [_per_row(logits, tokens) for _ in range(5)]
    # Per call, not kept: two streams must not share a ticket. The count of finished rows lies behind their losses.
    losses = _per_row(logits, tokens + 1, torch.float64)
    loss = _scalar(logits, tokens)
    gradient = _gradient(where, logits, targets, out) if with_grad else logits.new_empty((0, 0))
    if tokens:
        losses_at = gate.address(losses)
        _cuda.fused_policy(
            _rows(*taken, ignore_index),
            objective,
            at[4:],
            params,
            at[0],
            at[1],
            kl or "",
            at[2],
            at[3],
            [*gate.addresses(outputs), losses_at, losses_at + 8 * tokens, gate.address(loss)],
            gate.place(gradient) if with_grad else NOWHERE,
            DTYPES[gradient.dtype],
            *_where(logits),
        )
    return loss, gate.stored(gradient, out if with_grad else None), *outputs


def elementwise(objective, columns, params, weight):
    _available_or_raise()
    if objective not in _cuda.OBJECTIVES:
        return eager.elementwise(objective, columns, params, weight)
    first = columns[0]
    kernel = eager.column_kernel(
        "cuda", "columns", first.dtype, {torch.float32: _cuda.elementwise_f32, torch.float64: _cuda.elementwise_f64}
    )
    at = _cuda.addresses(first.dtype, first, weight, *columns)
    if at is None:
        weight, *columns = gate.weighted_columns("elementwise", weight, columns)
        first, at = columns[0], gate.addresses((weight, *columns))
    n = first.numel()
    value, derivative, loss = torch.empty_like(first), torch.empty_like(first), _scalar(first, n, first.dtype)
    parts = _parts(first, n)
    if n:
        kernel(
            objective,
            at[1:],
            params,
            at[0],
            gate.address(value),
            gate.address(derivative),
            gate.address(loss),
            *_places(parts),
            n,
            *_where(first),
        )
    return loss, value, derivative


def weighted_loss(objective, first, minus, others, params, weight, total, share):
    _available_or_raise()
    if objective not in _cuda.OBJECTIVES:
        return eager.weighted_loss(objective, first, minus, others, params, weight, total, share)
    kernel = eager.column_kernel(
        "cuda", "columns", first.dtype, {torch.float32: _cuda.weighted_loss_f32, torch.float64: _cuda.weighted_loss_f64}
    )
    columns, masked = [first, *minus, *others], weight is not None and weight.dtype is torch.bool
    at = _cuda.addresses(first.dtype, first, None if masked else weight, *columns)
    mask = _cuda.addresses(torch.bool, first, weight) if masked else (0,)
    if at is None or mask is None:
        columns = gate.columns("weighted_loss", first, columns[1:])
        weight, _ = gate.weights("weighted_loss", weight, None, first)
        at, mask = gate.addresses((None if masked else weight, *columns)), [gate.address(weight) if masked else 0]
    total = None if total is None else gate.taken("weighted_loss", "total", total, torch.int64, (), first.device)
    n, taken = first.numel(), len(minus)
    slopes, loss, parts = (
        first.new_empty((2 if minus else 1, *first.shape)),
        _scalar(first, n, first.dtype),
        _parts(first, n),
    )
    if n:
        slope = gate.address(slopes)
        kernel(
            objective,
            (at[1], *at[2 + taken :]),
            at[2 : 2 + taken],
            params,
            at[0],
            mask[0],
            gate.address(total),
            share,
            slope,
            slope + n * first.element_size() if minus else 0,
            gate.address(loss),
            *_places(parts),
            n,
            *_where(first),
        )
    return loss, slopes


def _parts(first, n):
    """Parts that the blocks leave for the last one, and behind them the count of those done; None for one block.

    Per call: streams must not share it.
    """
    count = _cuda.elementwise_parts(n)
    return None if count <= 1 else _per_row(first, count + 1, torch.float64)


def _places(parts):
    at = gate.address(parts)
    return at, at + 8 * (parts.numel() - 1) if at else 0


def gae(rewards, values, mask, cu_seqlens, gamma, lam, masked):
    _available_or_raise()
    kernel = eager.column_kernel(
        "cuda", "rewards", rewards.dtype, {torch.float32: _cuda.gae_f32, torch.float64: _cuda.gae_f64}
    )
    rewards, values, mask, cu_seqlens = gate.scan(
        "gae", rewards, values, None if masked == "none" else mask, cu_seqlens
    )
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
        *_where(rewards),
    )
    return advantages, returns


def _available_or_raise():
    if _cuda is None:
        raise RuntimeError(f"backend 'cuda' is unavailable: {ABSENT}")


def _where(tensor):
    """``(device index, stream)``: the launch goes to the tensor's device, whichever is current, and onto its current
    stream.
    """
    index = tensor.device.index
    if index is None:
        raise RuntimeError(f"backend 'cuda' got tensors on {tensor.device}; move them, or leave use_backend")
    return index, torch.cuda.current_stream(index).cuda_stream if _raw_stream is None else _raw_stream(index)


def _taken(where, logits, targets, temperature, vocab_mask, ref_logits):
    _available_or_raise()
    if logits.dtype not in DTYPES:
        raise NotImplementedError(
            f"logits of dtype {logits.dtype} are not supported by backend 'cuda'; cast to "
            'float32 or use_backend("eager")'
        )
    if ref_logits is not None and ref_logits.dtype != logits.dtype:
        raise NotImplementedError(
            f"ref_logits of dtype {ref_logits.dtype} beside logits of dtype {logits.dtype} are "
            "not supported by backend 'cuda'; "
            "cast one of them"
        )
    return gate.rows(where, logits, targets, temperature, vocab_mask, ref_logits, torch.float32)


def _addresses(where, names, tensors, logits, targets):
    """Tensors of one number per row, and their addresses; the caller holds on to them, since one may be a copy."""
    at = _cuda.addresses(torch.float32, targets, *tensors)
    if at is None:
        tensors = gate.per_row(where, names, tensors, torch.float32, targets.shape[0], logits.device)
        at = gate.addresses(tensors)
    return tensors, at


def _rows(logits, targets, temperature, vocab_mask, ref_logits, ignore_index):
    """The rows that passed the gate, as numbers."""
    per_row = isinstance(temperature, torch.Tensor)
    mask_stride = 0 if vocab_mask is None or vocab_mask.dim() == 1 else vocab_mask.stride(0)
    return _cuda.Rows(
        DTYPES[logits.dtype],
        targets.shape[0],
        logits.shape[-1],
        gate.place(logits),
        NOWHERE if ref_logits is None else gate.place(ref_logits),
        gate.address(targets),
        targets.stride(0),
        targets.element_size(),
        ignore_index,
        1.0 if per_row else 1.0 / temperature,
        gate.address(temperature) if per_row else 0,
        gate.address(vocab_mask),
        mask_stride,
    )


def _gradient(where, logits, targets, out):
    """The place of the gradient of the logits: ``out``, unless there is none or its layout is not one that kernels
    write.
    """
    shape = targets.shape[0], logits.shape[-1]
    dtypes = tuple(DTYPES) if logits.dtype == torch.float32 else (logits.dtype,)
    found = None if out is None else gate.writable(where, out, dtypes, shape, logits.device)
    return logits.new_empty(shape, dtype=logits.dtype if out is None else out.dtype) if found is None else found


def _per_row(like, count, dtype=torch.float32):
    return torch.empty(count, dtype=dtype, device=like.device)


def _scalar(like, count, dtype=torch.float32):
    """Memory in which a kernel over ``count`` rows leaves its sum; without rows there is no kernel, and
    the sum is 0.
    """
    return (torch.empty if count else torch.zeros)((), dtype=dtype, device=like.device)
