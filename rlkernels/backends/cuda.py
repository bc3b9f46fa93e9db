"""CUDA kernels: addresses, sizes, strides, a device and a stream across, nothing else.

Python owns shapes, dtypes and allocation.

Protocol: ``rlkernels.backends.protocol``. Values are not read on the host: a target outside the vocabulary makes its
row NaN.
"""

import importlib.util

import torch

from rlkernels.backends import built, eager, gate, native
from rlkernels.backends.protocol import PolicyRows, RowStats, column_kernel, presence
from rlkernels.objectives import OBJECTIVES

# find_spec, not try/except ImportError: a module that is absent is a fact, one that is present and broken is an error.
# It carries its own CUDA runtime and no driver: it loads anywhere, and says what is missing when it is used.
ABSENT = (
    "rlkernels._cuda was not built; pip install builds it where nvcc and an NVIDIA driver are found, and "
    "RLKERNELS_CUDA=1 where nvcc alone is"
)
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
# Private, so looked for: the public way builds an object of Python for every launch. Builds of torch without CUDA have
# none.
_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def available():
    """``(True, "")`` where the compiled module is present and torch sees a CUDA device, else ``(False, why not)``."""
    if _cuda is None:
        return False, ABSENT
    return (True, "") if torch.cuda.is_available() else (False, NO_DEVICE)


def token_stats(rows, wanted):
    rows = _rows("token_stats", rows)
    reference = rows.ref_logits is not None
    stats = RowStats.empty(_per_row(rows.logits, 0), rows.targets.shape[0], wanted, reference)
    _cuda.token_stats(_batch(rows), gate.present(stats, presence(wanted, reference)), *_stream(rows.logits))
    return stats


def token_stats_backward(upstream, rows, saved, out=None, unless=None):
    caller = "token_stats_backward"
    rows = _rows(caller, rows)
    per_row, at = _addresses(caller, gate.BACKWARD, gate.of_backward(caller, upstream, rows.ref_logits, saved), rows)
    unless = None if unless is None else gate.taken(caller, "unless", unless, torch.float32, (), rows.logits.device)
    gradient = _gradient(caller, rows, out)
    if unless is not None and gradient is not out:
        gradient.copy_(out.view(gradient.shape))  # what stays as it is must be there
    _cuda.token_stats_backward(
        _batch(rows), [*at, gate.address(unless)], gate.place(gradient), DTYPES[gradient.dtype], *_stream(rows.logits)
    )
    return gate.stored(gradient, out)


def in_row_kernels(objective):
    """Tells whether an objective is compiled into the kernels over rows."""
    return objective in _cuda.OBJECTIVES and OBJECTIVES[objective].columns[0] == "logp"


def fused_policy(rows, policy, with_grad, out):
    _available_or_raise()
    # What is not compiled into the row kernels, such as a user's objective, takes our two passes around its Python
    # function.
    if not in_row_kernels(policy.objective):
        return eager.fused_policy(rows, policy, with_grad, out, (token_stats, token_stats_backward))
    caller = "fused_policy"
    rows = _rows(caller, rows)
    logits, tokens = rows.logits, rows.targets.shape[0]
    per_row, at = _addresses(caller, gate.POLICY, gate.of_policy(caller, policy), rows)
    outputs = [_per_row(logits, tokens) for _ in range(5)]
    # Per call, not kept: two streams must not share a ticket. The count of finished rows lies behind their losses.
    losses = _per_row(logits, tokens + 1, torch.float64)
    loss = _scalar(logits, tokens)
    gradient = _gradient(caller, rows, out) if with_grad else logits.new_empty((0, 0))
    if tokens:
        losses_at = gate.address(losses)
        _cuda.fused_policy(
            _batch(rows),
            policy.objective,
            at[4:],
            policy.params,
            at[0],
            at[1],
            policy.kl or "",
            at[2],
            at[3],
            [*gate.addresses(outputs), losses_at, losses_at + 8 * tokens, gate.address(loss)],
            gate.place(gradient) if with_grad else native.NOWHERE,
            DTYPES[gradient.dtype],
            *_stream(logits),
        )
    return PolicyRows(loss, gate.stored(gradient, out if with_grad else None), *outputs)


divergence = eager.divergence  # because no kernel of it is written in CUDA C++


def elementwise(objective, columns, params, weight):
    _available_or_raise()
    if objective not in _cuda.OBJECTIVES:
        return eager.elementwise(objective, columns, params, weight)
    first = columns[0]
    kernel = column_kernel(
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
            *_stream(first),
        )
    return loss, value, derivative


def weighted_loss(objective, first, minus, others, params, weight, total, share):
    _available_or_raise()
    if objective not in _cuda.OBJECTIVES:
        return eager.weighted_loss(objective, first, minus, others, params, weight, total, share)
    kernel = column_kernel(
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
            *_stream(first),
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
    kernel = column_kernel(
        "cuda", "rewards", rewards.dtype, {torch.float32: _cuda.gae_f32, torch.float64: _cuda.gae_f64}
    )
    mask = None if masked == "none" else mask
    return native.gae(kernel, rewards, values, mask, cu_seqlens, gamma, lam, masked, *_stream(rewards))


def _available_or_raise():
    if _cuda is None:
        raise RuntimeError(f"backend 'cuda' is unavailable: {ABSENT}")


def _stream(tensor):
    """``(device index, stream)``: the launch goes to the tensor's device, whichever is current, and onto its current
    stream.
    """
    index = tensor.device.index
    if index is None:
        raise RuntimeError(f"backend 'cuda' got tensors on {tensor.device}; move them, or leave use_backend")
    return index, torch.cuda.current_stream(index).cuda_stream if _raw_stream is None else _raw_stream(index)


def _rows(caller, rows):
    _available_or_raise()
    return native.rows("cuda", caller, rows, DTYPES, torch.float32)


def _addresses(caller, names, tensors, rows):
    return native.per_row(_cuda, caller, names, tensors, rows.targets, torch.float32, rows.logits.device)


def _batch(rows):
    """The rows that passed the gate, as numbers."""
    return _cuda.Rows(*native.numbers(rows, DTYPES, inverse=True))


def _gradient(caller, rows, out):
    """The memory for the gradient of the logits: ``out``, unless there is none or kernels do not write its layout."""
    logits, shape = rows.logits, (rows.targets.shape[0], rows.logits.shape[-1])
    dtypes = tuple(DTYPES) if logits.dtype == torch.float32 else (logits.dtype,)
    memory = None if out is None else gate.writable(caller, out, dtypes, shape, logits.device)
    return logits.new_empty(shape, dtype=logits.dtype if out is None else out.dtype) if memory is None else memory


def _per_row(like, count, dtype=torch.float32):
    return torch.empty(count, dtype=dtype, device=like.device)


def _scalar(like, count, dtype=torch.float32):
    """Memory in which a kernel over ``count`` rows leaves its sum; without rows there is no kernel, and
    the sum is 0.
    """
    return (torch.empty if count else torch.zeros)((), dtype=dtype, device=like.device)
