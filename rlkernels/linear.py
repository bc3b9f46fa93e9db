"""The same statistics from hidden states and the lm_head: one loop over chunks of rows, no ``[T, V]`` tensor.

The forward keeps a few numbers per token; the backward forms the logits of each chunk again, writes their gradient over them and
feeds it to two matmuls. Rows with an ignored target never enter a matmul.
"""
import functools

import torch

from rlkernels import checks, ops
from rlkernels.backends.eager import real_dtype
from rlkernels.logprobs import collect
from rlkernels.rows import Rows

LOGITS_BYTES = 256 * 2**20
"""Of a chunk's logits: rows by the byte, so that a large vocabulary cannot make a chunk outgrow memory. Not tuned."""


def linear_token_logprobs(hidden, weight, targets, *, bias=None, temperature=1.0, softcap=None, logit_scale=1.0, ignore_index=-100,
                          logits_dtype=torch.float32, chunk_tokens=None):
    r"""Log-probability of each target from hidden states and the lm_head, without ever holding ``[T, V]`` logits.

    ``token_logprobs`` of ``z / temperature``, ``z = softcap tanh(u / softcap)`` (``z = u`` without), ``u = logit_scale (hidden weight^T + bias)``.

    Args:
        hidden: ``[..., H]``. weight: ``[V, H]``, same dtype. bias: ``[V]``. All three get gradients where they require them.
        targets, temperature, ignore_index: as for ``token_logprobs``.
        logits_dtype: float32 keeps the matmul's accumulator; bfloat16 or float16 rounds the logits as an inference engine may.
        chunk_tokens: rows per chunk; by default what fits in 256 MiB of logits.

    Returns:
        Tensor ``[...]``, fp32 (fp64 for fp64 hidden states).

    Raises:
        TypeError, ValueError: shapes or dtypes do not fit; a sharded weight without elements.
        IndexError: on the CPU, a target outside ``[0, V)`` that is not ``ignore_index``.
    """
    return _stats("linear_token_logprobs", hidden, weight, targets, bias, temperature, softcap, logit_scale, ignore_index, logits_dtype,
                  chunk_tokens, ()).logprobs


def linear_token_stats(hidden, weight, targets, *, bias=None, temperature=1.0, softcap=None, logit_scale=1.0, ignore_index=-100,
                       logits_dtype=torch.float32, chunk_tokens=None, outputs=("entropy",)):
    r"""``token_stats`` from hidden states and the lm_head, without ever holding ``[T, V]`` logits.

    Args:
        outputs: as for ``token_stats``; the rest as for ``linear_token_logprobs``.

    Returns:
        TokenStats of tensors ``[...]``; ``logprobs`` and ``entropy`` are differentiable.

    Raises:
        TypeError, ValueError, IndexError: as for ``linear_token_logprobs``; an unknown output.
    """
    return _stats("linear_token_stats", hidden, weight, targets, bias, temperature, softcap, logit_scale, ignore_index, logits_dtype,
                  chunk_tokens, outputs)


def _stats(where, hidden, weight, targets, bias, temperature, softcap, logit_scale, ignore_index, logits_dtype, chunk_tokens, outputs):
    hidden, weight, bias = _operands(where, hidden, weight, bias)
    shape = hidden.shape[:-1]
    checks.targets(where, targets, shape)
    checks.temperature(where, temperature, shape)
    checks.integer(where, "ignore_index", ignore_index)
    checks.outputs(where, outputs, ops.FLAGS)
    checks.finite(where, "logit_scale", logit_scale)
    if softcap is not None:
        checks.positive(where, "softcap", softcap)
    if logits_dtype not in checks.FLOATS:
        raise TypeError(f"{where}: logits_dtype must be floating, one of {checks.FLOAT_NAMES}; got {logits_dtype}")
    if chunk_tokens is not None and not isinstance(chunk_tokens, int):
        raise TypeError(f"{where}: chunk_tokens must be a positive int or None, got {type(chunk_tokens).__name__}")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"{where}: chunk_tokens must be a positive int or None, got {chunk_tokens}")
    checks.one_device(where, "hidden", hidden, weight=weight, targets=targets, bias=bias, temperature=temperature)
    checks.no_forward_ad(where, hidden, weight, bias)
    if hidden.dtype == torch.float64:
        logits_dtype = torch.float64
    real = real_dtype(hidden.dtype)
    per_row = isinstance(temperature, torch.Tensor)
    temperature = temperature.reshape(-1).to(real).contiguous() if per_row else ops.number(temperature)
    wanted = 0
    for name in outputs:
        wanted |= ops.FLAGS[name]
    chunk = chunk_tokens or max(1, LOGITS_BYTES // (weight.shape[0] * logits_dtype.itemsize))
    flat, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    found = linear_stats(flat, weight, bias, targets, temperature, ops.number(float("nan") if softcap is None else softcap), ops.number(logit_scale),
                         ignore_index, wanted, logits_dtype, chunk, ops.serving("token_stats", hidden))
    return collect(found, Rows(flat, targets, temperature, ignore_index, None, shape), outputs, False, None)


def _operands(where, hidden, weight, bias):
    checks.floating(where, "hidden", hidden)
    if type(weight).__name__ == "DTensor":
        raise TypeError(f"{where}: weight is a DTensor; pass weight.full_tensor()")
    checks.floating(where, "weight", weight)
    if weight.numel() == 0:
        raise ValueError(f"{where}: weight has 0 elements; gather it first (ZeRO-3: deepspeed.zero.GatheredParameters)")
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(f"{where}: hidden has {hidden.shape[-1] if hidden.dim() else 'no'} features, weight has {weight.shape[-1]}; "
                         f"expected [..., H] and [V, H], got {tuple(hidden.shape)} and {tuple(weight.shape)}")
    if bias is not None:
        checks.floating(where, "bias", bias)
        checks.shape(where, "bias", bias, weight.shape[:1])
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.dtype != hidden.dtype:
            raise TypeError(f"{where}: {name} has dtype {x.dtype}, hidden has {hidden.dtype}; cast one of them, or use autocast")
    return hidden, weight, bias


class _Head:
    """``hidden -> logits`` of one chunk, and back."""

    def __init__(self, weight, bias, softcap, logit_scale, dtype):
        self.softcap, self.scale, self.dtype = softcap.item(), logit_scale.item(), dtype
        # A CPU has no bf16 matmul that keeps its accumulator: the operands are widened, once per call.
        self.compute = dtype if weight.device.type == "cpu" or weight.dtype == dtype else weight.dtype
        self.weight, self.bias = weight.to(self.compute), None if bias is None else bias.to(dtype)

    def logits(self, hidden):
        hidden = hidden.to(self.compute)
        if self.compute == self.dtype:
            x = hidden @ self.weight.t()
        else:
            x = torch.mm(hidden, self.weight.t(), out_dtype=self.dtype)
        x = x if self.bias is None else x.add_(self.bias)
        x = x if self.scale == 1.0 else x.mul_(self.scale)
        return x if self.softcap != self.softcap else x.div_(self.softcap).tanh_().mul_(self.softcap)

    def through(self, dlogits, logits):
        """The gradient with respect to ``hidden weight^T + bias``."""
        if self.softcap == self.softcap:
            dlogits = dlogits * (1 - (logits / self.softcap).square())
        return dlogits if self.scale == 1.0 else dlogits * self.scale


def _own_dtypes(function):
    """Autocast would run the matmuls of the op in bf16 again, after ``_operands`` has cast what the caller wants cast."""
    @functools.wraps(function)
    def call(*arguments):
        with torch.autocast(next(x for x in arguments if isinstance(x, torch.Tensor)).device.type, enabled=False):
            return function(*arguments)
    return call


def _live_rows(targets, ignore_index, chunk, *upstream):
    """Indices of the rows that are scored and, in the backward, that anything depends on, chunk by chunk."""
    live = targets != ignore_index
    wanted = [d != 0 for d in upstream if d is not None]
    if wanted:  # prompt and padding rows arrive with a gradient of exactly 0: they cost no matmul
        live = live & torch.stack(wanted).any(0)
    return live.nonzero()[:, 0].split(chunk)


def _per_row(x, rows):
    return x[rows] if x.dim() and x.numel() else x


def _temperature(temperature, rows):
    return temperature[rows] if temperature.dim() else temperature.item()


@_own_dtypes
def _linear_stats(hidden, weight, bias, targets, temperature, softcap, logit_scale, ignore_index, wanted, logits_dtype, chunk, backend):
    head = _Head(weight, bias, softcap, logit_scale, logits_dtype)
    found = _linear_stats_fake(hidden, weight, bias, targets, temperature, softcap, logit_scale, ignore_index, wanted, logits_dtype, chunk, backend)
    found = tuple(x.zero_() for x in found)
    for rows in _live_rows(targets, ignore_index, chunk):
        part = ops.run("token_stats", backend, head.logits(hidden[rows]), targets[rows], _temperature(temperature, rows), ignore_index, None, None, wanted)
        for whole, values in zip(found, part, strict=True):
            if whole.numel():
                whole[rows] = values
    return found


def _linear_stats_fake(hidden, weight, bias, targets, temperature, softcap, logit_scale, ignore_index, wanted, logits_dtype, chunk, backend):
    return ops.token_stats_fake(hidden, targets, temperature, ignore_index, None, None, wanted, False, backend)


def _linear_setup(ctx, inputs, output):
    (hidden, weight, bias, targets, temperature, softcap, logit_scale, ctx.ignore_index, wanted, ctx.logits_dtype, ctx.chunk, ctx.backend) = inputs
    logp, shift, sum_exp, entropy, *rest = output
    ctx.mark_non_differentiable(shift, sum_exp, *rest, *(() if wanted & ops.ENTROPY else (entropy,)))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, targets, temperature, softcap, logit_scale, shift, sum_exp, entropy)


def _linear_grad(ctx, dlogp, dshift, dsum, dentropy, *_):
    hidden, weight, bias, targets, temperature, softcap, logit_scale, shift, sum_exp, entropy = ctx.saved_tensors
    if dlogp is None and dentropy is None:
        return (None,) * 12
    needs = ctx.needs_input_grad
    grads = linear_stats_backward(dlogp, dentropy, hidden, weight, bias, targets, temperature, softcap, logit_scale, ctx.ignore_index, shift, sum_exp,
                                  entropy, ctx.logits_dtype, ctx.chunk, needs[0], needs[1], needs[2], ctx.backend)
    return *(g if need else None for g, need in zip(grads, needs[:3], strict=True)), *(None,) * 9


@_own_dtypes
def _linear_backward(dlogp, dentropy, hidden, weight, bias, targets, temperature, softcap, logit_scale, ignore_index, shift, sum_exp, entropy,
                     logits_dtype, chunk, need_hidden, need_weight, need_bias, backend):
    head = _Head(weight, bias, softcap, logit_scale, logits_dtype)
    real = real_dtype(hidden.dtype)
    dhidden = torch.zeros_like(hidden) if need_hidden else hidden.new_empty(0)
    # fp32 whatever the weight is: accumulated over 1024 chunks in bf16 the gradient is 3.7 % off.
    dweight = torch.zeros(weight.shape, dtype=real, device=weight.device) if need_weight else weight.new_empty(0)
    dbias = torch.zeros(weight.shape[:1], dtype=real, device=weight.device) if need_bias else weight.new_empty(0)
    for rows in _live_rows(targets, ignore_index, chunk, dlogp, dentropy):
        h = hidden[rows].to(head.compute)
        x = head.logits(h)
        upstream = (None if d is None else d[rows].contiguous() for d in (dlogp, dentropy))
        out = x if head.softcap != head.softcap else None
        dx = ops.run("token_stats_backward", backend, *upstream, None, x, targets[rows], _temperature(temperature, rows), ignore_index, None, None,
                     shift[rows], sum_exp[rows], _per_row(entropy, rows), None, None, None, out)
        dx = head.through(dx, x).to(head.compute)
        if need_hidden:
            dhidden[rows] = (dx @ head.weight).to(hidden.dtype)
        if need_weight:
            dweight += (dx.t() @ h).to(real)
        if need_bias:
            dbias += dx.sum(0, dtype=real)
    return dhidden, dweight.to(weight.dtype), dbias.to(weight.dtype)


_OPERANDS = "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor temperature, Tensor softcap, Tensor logit_scale, int ignore_index"
linear_stats = ops.define(
    "linear_stats", f"({_OPERANDS}, int wanted, ScalarType logits_dtype, int chunk, str backend) -> ({', '.join(['Tensor'] * 11)})", _linear_stats,
    _linear_stats_fake, _linear_grad, _linear_setup)
linear_stats_backward = ops.define(
    "linear_stats_backward", f"(Tensor? dlogp, Tensor? dentropy, {_OPERANDS}, Tensor shift, Tensor sum_exp, Tensor entropy, ScalarType logits_dtype, "
    "int chunk, bool need_hidden, bool need_weight, bool need_bias, str backend) -> (Tensor, Tensor, Tensor)", _linear_backward,
    lambda dlogp, dentropy, hidden, weight, *rest: (
        torch.empty_like(hidden) if rest[-4] else hidden.new_empty(0), torch.empty_like(weight) if rest[-3] else weight.new_empty(0),
        weight.new_empty(weight.shape[:1] if rest[-2] else (0,))))
