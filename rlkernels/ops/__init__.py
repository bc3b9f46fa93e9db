"""The boundary between functions and backends: every op with its autograd formula.

Run-time numbers (temperature, clip bounds, beta) reach a registered op as float64 CPU tensors: ``torch.compile``
specialises a Python float and compiles again for each value. The backend is an argument, chosen where the function was
called: the backward of an accelerator runs in another thread.

Protocol of a backend module (logits ``[T, V]`` or ``[B, L, V]`` with unit last stride, everything else ``[T]``): see
``backends/eager.py``.
"""

from typing import NamedTuple

import torch

from rlkernels import checks
from rlkernels.backends import BACKENDS
from rlkernels.backends import serving as backend_serving  # rlkernels.backends itself is the public function
from rlkernels.backends.eager import ENTROPY, IS_TOP1, KL, LOG_SUM_SQ, MEAN_LOGITS
from rlkernels.checks.tokens import read_offsets
from rlkernels.ops.fake import (
    elementwise_backward_fake,
    elementwise_fake,
    fused_policy_fake,
    gae_fake,
    gradient_fake,
    nothing_fake,
    offsets_fake,
    weighted_loss_backward_fake,
    weighted_loss_fake,
)
from rlkernels.ops.fake import token_stats_fake as token_stats_fake
from rlkernels.ops.register import DOUBLE_BACKWARD
from rlkernels.ops.register import calls as calls
from rlkernels.ops.register import define as define
from rlkernels.ops.register import run as run
from rlkernels.ops.register import with_gradients as with_gradients
from rlkernels.tracing import number as number
from rlkernels.tracing import numbers as numbers
from rlkernels.tracing import on_device, value, values

FLAGS = {"entropy": ENTROPY, "log_sum_sq_probs": LOG_SUM_SQ, "mean_logits": MEAN_LOGITS, "is_top1": IS_TOP1}


def serving(op, tensor):
    """The backend for ``op`` on this tensor; of logits, the last dimension counts too."""
    if tensor.is_cpu:
        return backend_serving(op, "cpu")
    return backend_serving(op, tensor.device.type, tensor.dtype, tensor.shape[-1] if tensor.dim() > 1 else None)


# token_stats ----------------------------------------------------------------------------------------------------------

ROWS = "Tensor logits, Tensor targets, Tensor temperature, int ignore_index, Tensor? vocab_mask, Tensor? ref_logits"


def _token_stats(logits, targets, temperature, ignore_index, vocab_mask, ref_logits, wanted, inplace, backend):
    return run(
        "token_stats", backend, logits, targets, value(temperature), ignore_index, vocab_mask, ref_logits, wanted
    )


def _token_stats_setup(ctx, inputs, output):
    logits, targets, temperature, ctx.ignore_index, vocab_mask, ref_logits, wanted, ctx.inplace, ctx.backend = inputs
    ctx.temperature, per_row = _divisor(temperature)
    if ctx.inplace:  # a compiled program has met no leaf before
        checks.inplace("token_stats", logits)
    _, shift, sum_exp, entropy, log_sum_sq, mean_logits, is_top1, ref_logp, ref_shift, ref_sum_exp, kl = output
    # An absent output must not be differentiable: AOTAutograd would send it a gradient of shape (0,).
    unwanted = [x for flag, x in ((ENTROPY, entropy), (KL, kl)) if not wanted & flag]
    ctx.mark_non_differentiable(
        shift, sum_exp, log_sum_sq, mean_logits, is_top1, ref_logp, ref_shift, ref_sum_exp, *unwanted
    )
    ctx.set_materialize_grads(False)
    reference = (ref_logits, ref_shift, ref_sum_exp, kl) if wanted & KL else (None,) * 4
    ctx.save_for_backward(logits, targets, per_row, vocab_mask, shift, sum_exp, entropy, *reference)


def _token_stats_grad(ctx, dlogp, dshift, dsum, dentropy, dsq, dmean, dtop1, dref, dref_shift, dref_sum, dkl):
    logits, targets, per_row, vocab_mask, shift, sum_exp, entropy, ref_logits, ref_shift, ref_sum_exp, kl = (
        ctx.saved_tensors
    )
    if dlogp is None and dentropy is None and dkl is None:
        return (None,) * 9
    return _dlogits(
        ctx,
        dlogp,
        dentropy,
        dkl,
        logits,
        targets,
        per_row,
        vocab_mask,
        ref_logits,
        shift,
        sum_exp,
        entropy,
        ref_shift,
        ref_sum_exp,
        kl,
    ), *(None,) * 8


def _divisor(temperature):
    """The part of a temperature that a context keeps: the number itself, or the tensor to save."""
    return (temperature, None) if isinstance(temperature, float) else (None, temperature)


def _dlogits(
    ctx, dlogp, dentropy, dkl, logits, targets, per_row, vocab_mask, ref_logits, *saved, held=None, unless=None
):
    temperature = ctx.temperature if per_row is None else per_row
    arguments = (
        dlogp,
        dentropy,
        dkl,
        logits,
        targets,
        temperature,
        ctx.ignore_index,
        vocab_mask,
        ref_logits,
        *saved,
        ctx.backend,
    )
    if held is not None:
        token_stats_backward_into(*arguments, held, unless)
        return held.view(logits.shape)
    if not ctx.inplace:
        return token_stats_backward(*arguments)
    if torch.is_grad_enabled():
        raise RuntimeError(DOUBLE_BACKWARD)
    logits = logits.detach()
    token_stats_backward_(*arguments[:3], logits, *arguments[4:])
    torch.autograd.graph.increment_version(logits)  # a later use of the logits raises instead of reading their gradient
    return logits


SAVED = "Tensor shift, Tensor sum_exp, Tensor entropy, Tensor? ref_shift, Tensor? ref_sum_exp, Tensor? kl, str backend"
UPSTREAM = "Tensor? dlogp, Tensor? dentropy, Tensor? dkl"


def _token_stats_backward(*arguments, out=None, unless=None):
    logits = arguments[3]
    grad = run(
        "token_stats_backward", arguments[-1], *arguments[:5], value(arguments[5]), *arguments[6:-1], out, unless
    )
    return grad if grad.shape == logits.shape else grad.view(logits.shape)


def _token_stats_backward_(*arguments):
    _token_stats_backward(*arguments, out=arguments[3])


def _token_stats_backward_into(*arguments):
    _token_stats_backward(*arguments[:-2], out=arguments[-2], unless=arguments[-1])


token_stats = define(
    "token_stats",
    f"({ROWS}, int wanted, bool inplace, str backend) -> ({', '.join(['Tensor'] * 11)})",
    _token_stats,
    token_stats_fake,
    _token_stats_grad,
    _token_stats_setup,
)
token_stats_backward = define(
    "token_stats_backward", f"({UPSTREAM}, {ROWS}, {SAVED}) -> Tensor", _token_stats_backward, gradient_fake
)
token_stats_backward_ = define(
    "token_stats_backward_",
    f"({UPSTREAM}, {ROWS}, {SAVED}) -> ()".replace("Tensor logits", "Tensor(a!) logits"),
    _token_stats_backward_,
    nothing_fake,
)
token_stats_backward_into = define(
    "token_stats_backward_into",
    f"({UPSTREAM}, {ROWS}, {SAVED}, Tensor(a!) out, Tensor unless) -> ()",
    _token_stats_backward_into,
    nothing_fake,
)


# fused_policy ---------------------------------------------------------------------------------------------------------


class _Passes(NamedTuple):
    """A backend's two passes over rows, around an objective in plain torch."""

    backend: str

    def token_stats(self, *arguments):
        return run("token_stats", self.backend, *arguments)

    def token_stats_backward(self, *arguments):
        return run("token_stats_backward", self.backend, *arguments)


def run_fused(backend, objective, logits, targets, temperature, ignore_index, vocab_mask, columns, params, *rest):
    """The op itself; with a parameter that is a tensor on a device, the backend's two passes: its
    kernel takes numbers.
    """
    arguments = objective, logits, targets, temperature, ignore_index, vocab_mask, columns, values(params), *rest
    return (
        BACKENDS["eager"].fused_policy(*arguments, native=_Passes(backend))
        if on_device(params)
        else run("fused_policy", backend, *arguments)
    )


def _fused_policy(
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
    inplace,
    backend,
):
    return run_fused(
        backend,
        objective,
        logits,
        targets,
        value(temperature),
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
        None,
    )


def _fused_policy_setup(ctx, inputs, output):
    (
        _,
        logits,
        targets,
        temperature,
        ctx.ignore_index,
        vocab_mask,
        columns,
        _,
        _,
        entropy_weight,
        _,
        _,
        _,
        ctx.with_grad,
        ctx.inplace,
        ctx.backend,
    ) = inputs
    if ctx.inplace:
        checks.inplace("fused_policy", logits)
    ctx.temperature, per_row = _divisor(temperature)
    ctx.others = [None] * len(columns), *(None,) * 9  # the gradients of what follows vocab_mask
    _, dlogits, logp, shift, sum_exp, entropy, dlogp = output
    ctx.mark_non_differentiable(dlogits, logp, shift, sum_exp, entropy, dlogp)
    ctx.set_materialize_grads(False)
    ctx.dlogits = dlogits if ctx.with_grad else None
    ctx.save_for_backward(logits, targets, per_row, vocab_mask, entropy_weight, shift, sum_exp, entropy, dlogp)


def _known_to_be_one(x):
    return x.device.type == "cpu" and x.item() == 1.0


def _fused_policy_grad(ctx, dloss, *_):
    logits, targets, per_row, vocab_mask, entropy_weight, shift, sum_exp, entropy, dlogp = ctx.saved_tensors
    if dloss is None:
        return *(None,) * 6, *ctx.others
    # The gradient made in the forward is given away once, and as it is only for an upstream gradient of exactly 1:
    # scaled copies would round twice (and fp16 would underflow before the loss scale arrives), a kept one would alias
    # what the caller may edit. Otherwise it is made anew, in the same memory. The host reads the upstream gradient
    # where that is free; elsewhere
    # the kernel does.
    held, ctx.dlogits = None if torch.is_grad_enabled() else ctx.dlogits, None
    if held is not None and _known_to_be_one(dloss):
        dlogits = held.view(logits.shape)
    else:
        dentropy = None if entropy_weight is None else -entropy_weight * dloss
        dlogits = _dlogits(
            ctx,
            dlogp * dloss,
            dentropy,
            None,
            logits,
            targets,
            per_row,
            vocab_mask,
            None,
            shift,
            sum_exp,
            entropy,
            None,
            None,
            None,
            held=held,
            unless=dloss,
        )
    return None, dlogits, *(None,) * 4, *ctx.others


fused_policy = define(
    "fused_policy",
    "(str objective, Tensor logits, Tensor targets, Tensor temperature, int ignore_index, Tensor? "
    "vocab_mask, Tensor[] columns, "
    "Tensor params, Tensor weight, Tensor? entropy_weight, str? kl, Tensor? ref_logp, Tensor? kl_weight, bool "
    "with_grad, bool inplace, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
    "Tensor)",
    _fused_policy,
    fused_policy_fake,
    _fused_policy_grad,
    _fused_policy_setup,
)


# elementwise ----------------------------------------------------------------------------------------------------------


def _elementwise(objective, first, others, params, weight, backend):
    return run(
        "elementwise", "eager" if on_device(params) else backend, objective, [first, *others], values(params), weight
    )


def _elementwise_setup(ctx, inputs, output):
    _, first, others, _, weight, _ = inputs
    _, _, derivative = output
    ctx.others = [None] * len(others), None, None, None
    ctx.mark_non_differentiable(derivative)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(first, weight, derivative)


def _elementwise_grad(ctx, dloss, dvalue, _):
    first, weight, derivative = ctx.saved_tensors
    if dloss is None and dvalue is None:
        return None, None, *ctx.others
    return None, elementwise_backward(dloss, dvalue, first, weight, derivative), *ctx.others


def _elementwise_backward(dloss, dvalue, first, weight, derivative):
    upstream = dvalue
    if dloss is not None:
        share = dloss if weight is None else dloss * weight
        upstream = share if dvalue is None else share + dvalue
    grad = upstream * derivative
    return (grad if weight is None else grad.masked_fill_(weight == 0, 0.0)).contiguous()  # where, but 2 us less


elementwise = define(
    "elementwise",
    "(str objective, Tensor first, Tensor[] others, Tensor params, Tensor? weight, str backend) -> "
    "(Tensor, Tensor, Tensor)",
    _elementwise,
    elementwise_fake,
    _elementwise_grad,
    _elementwise_setup,
)
elementwise_backward = define(
    "elementwise_backward",
    "(Tensor? dloss, Tensor? dvalue, Tensor first, Tensor? weight, Tensor derivative) -> Tensor",
    _elementwise_backward,
    elementwise_backward_fake,
)


# weighted_loss --------------------------------------------------------------------------------------------------------


def _weighted_loss(objective, first, minus, minus_too, others, params, weight, total, share, backend):
    taken = [] if minus is None else [minus] if minus_too is None else [minus, minus_too]
    return run(
        "weighted_loss",
        "eager" if on_device(params) else backend,
        objective,
        first,
        taken,
        others,
        values(params),
        weight,
        total,
        value(share),
    )


def _weighted_loss_setup(ctx, inputs, output):
    _, first, minus, minus_too, others, *_ = inputs
    _, slopes = output
    ctx.others = [None] * len(others), *(None,) * 5
    ctx.mark_non_differentiable(slopes)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(slopes, first, minus, minus_too)


def _weighted_loss_grad(ctx, dloss, _):
    slopes, *inputs = ctx.saved_tensors
    if dloss is None:
        return (None,) * 4 + ctx.others
    gradients = weighted_loss_backward(dloss, slopes, *inputs)  # one launch for all
    opposite = None if inputs[1] is None else gradients[1]
    return None, gradients[0], opposite, None if inputs[2] is None else opposite, *ctx.others


def _weighted_loss_backward(dloss, slopes, *inputs):
    return (dloss * slopes).contiguous()


weighted_loss = define(
    "weighted_loss",
    "(str objective, Tensor first, Tensor? minus, Tensor? minus_too, Tensor[] others, Tensor params, "
    "Tensor? weight, Tensor? total, "
    "Tensor share, str backend) -> (Tensor, "
    "Tensor)",
    _weighted_loss,
    weighted_loss_fake,
    _weighted_loss_grad,
    _weighted_loss_setup,
)
# The inputs take no part: a second derivative asks them, and is refused.
weighted_loss_backward = define(
    "weighted_loss_backward",
    "(Tensor dloss, Tensor slopes, Tensor first, Tensor? minus, Tensor? minus_too) -> Tensor",
    _weighted_loss_backward,
    weighted_loss_backward_fake,
)


# gae ------------------------------------------------------------------------------------------------------------------


def _gae(rewards, values, mask, cu_seqlens, gamma, lam, masked, backend):
    return run("gae", backend, rewards, values, mask, cu_seqlens, value(gamma), value(lam), masked)


gae = define(
    "gae",
    "(Tensor rewards, Tensor values, Tensor? mask, Tensor? cu_seqlens, Tensor gamma, Tensor lam, str masked, "
    "str backend) -> (Tensor, Tensor)",
    _gae,
    gae_fake,
)


# offsets --------------------------------------------------------------------------------------------------------------

# Of a compiled program, whose values are there at run time alone; ``checks.tokens.segments`` calls it.
offsets = define(
    "offsets", "(Tensor cu_seqlens, SymInt tokens, bool filled, str where) -> Tensor", read_offsets, offsets_fake
)
