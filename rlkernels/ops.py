"""The boundary between functions and backends: every op is registered here, with its fake and its autograd formula, and nowhere else.

Run-time numbers (temperature, clip bounds, beta) travel as float64 CPU tensors: ``torch.compile`` specialises a Python float that
reaches a custom op and compiles again for each value. The backend is an argument, chosen where the function was called: the
backward of an accelerator runs in another thread.

Protocol of a backend module (logits ``[T, V]`` or ``[B, L, V]`` with unit last stride, everything else ``[T]``): see ``backends/eager.py``.
"""
from collections import Counter

import torch

from rlkernels.backends import BACKENDS
from rlkernels.backends import serving as backend_serving  # rlkernels.backends itself is the public function
from rlkernels.backends.eager import ENTROPY, IS_TOP1, KL, LOG_SUM_SQ, MEAN_LOGITS, real_dtype

FLAGS = {"entropy": ENTROPY, "log_sum_sq_probs": LOG_SUM_SQ, "mean_logits": MEAN_LOGITS, "is_top1": IS_TOP1}
DOUBLE_BACKWARD = "double backward is not supported by rlkernels; use plain torch operations where second derivatives are needed"

_library = torch.library.Library("rlkernels", "DEF")
_calls = Counter()


def calls():
    """How often each ``(op, backend)`` has run in this process; a snapshot."""
    return Counter(_calls)


def number(x):
    """A run-time number as the 0-d float64 tensor that the ops take."""
    # zeros + x, not full: torch 2.13 turns the sum into a graph input, but specialises the fill value.
    return torch.zeros((), dtype=torch.float64) + x if torch.compiler.is_compiling() else torch.full((), x, dtype=torch.float64)


def numbers(values):
    """Run-time numbers as one float64 tensor."""
    return torch.stack([number(x) for x in values]) if values else torch.empty(0, dtype=torch.float64)


def serving(op, tensor):
    """The backend for ``op`` on this tensor; of logits, the last dimension counts too."""
    return backend_serving(op, tensor.device.type, tensor.dtype, tensor.shape[-1] if tensor.dim() > 1 else None)


def run(op, backend, *arguments):
    """Calls the backend's function; counted."""
    _calls[op, backend] += 1
    return getattr(BACKENDS[backend], op)(*arguments)


def _temperature(temperature):
    return temperature.item() if temperature.dim() == 0 else temperature


def define(name, schema, implementation, fake, formula=None, setup=None):
    """Registers an op with its fake and, unless it mutates, its autograd formula. Without one, a derivative of it is an error."""
    _library.define(f"{name}{schema}")
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rlkernels::{name}", fake, lib=_library)
    if "!" not in schema:
        # For the backward ops this makes the second derivative an error: autograd would treat the first one as a constant.
        torch.library.register_autograd(f"rlkernels::{name}", formula or _raises, setup_context=setup or _nothing, lib=_library)
    return getattr(torch.ops.rlkernels, name).default


def _raises(ctx, *grads):
    raise RuntimeError(DOUBLE_BACKWARD)


def _nothing(ctx, inputs, output):
    pass


# token_stats -----------------------------------------------------------------------------------------------------------------------

ROWS = "Tensor logits, Tensor targets, Tensor temperature, int ignore_index, Tensor? vocab_mask, Tensor? ref_logits"


def _token_stats(logits, targets, temperature, ignore_index, vocab_mask, ref_logits, wanted, inplace, backend):
    return run("token_stats", backend, logits, targets, _temperature(temperature), ignore_index, vocab_mask, ref_logits, wanted)


def token_stats_fake(logits, targets, temperature, ignore_index, vocab_mask, ref_logits, wanted, inplace, backend):
    real = real_dtype(logits.dtype)

    def row(present=True, dtype=real):
        return logits.new_empty(targets.shape if present else (0,), dtype=dtype)

    ref = ref_logits is not None
    return (row(), row(), row(), row(wanted & ENTROPY), row(wanted & LOG_SUM_SQ), row(wanted & MEAN_LOGITS),
            row(wanted & IS_TOP1, torch.bool), row(ref), row(ref), row(ref), row(wanted & KL))


def _token_stats_setup(ctx, inputs, output):
    logits, targets, temperature, ctx.ignore_index, vocab_mask, ref_logits, wanted, ctx.inplace, ctx.backend = inputs
    _, shift, sum_exp, entropy, log_sum_sq, mean_logits, is_top1, ref_logp, ref_shift, ref_sum_exp, kl = output
    # An absent output must not be differentiable: AOTAutograd would send it a gradient of shape (0,).
    unwanted = [x for flag, x in ((ENTROPY, entropy), (KL, kl)) if not wanted & flag]
    ctx.mark_non_differentiable(shift, sum_exp, log_sum_sq, mean_logits, is_top1, ref_logp, ref_shift, ref_sum_exp, *unwanted)
    ctx.set_materialize_grads(False)
    reference = (ref_logits, ref_shift, ref_sum_exp, kl) if wanted & KL else (None,) * 4
    ctx.save_for_backward(logits, targets, temperature, vocab_mask, shift, sum_exp, entropy, *reference)


def _token_stats_grad(ctx, dlogp, dshift, dsum, dentropy, dsq, dmean, dtop1, dref, dref_shift, dref_sum, dkl):
    logits, targets, temperature, vocab_mask, shift, sum_exp, entropy, ref_logits, ref_shift, ref_sum_exp, kl = ctx.saved_tensors
    if dlogp is None and dentropy is None and dkl is None:
        return (None,) * 9
    return _dlogits(ctx, dlogp, dentropy, dkl, logits, targets, temperature, vocab_mask, ref_logits, shift, sum_exp, entropy, ref_shift,
                    ref_sum_exp, kl), *(None,) * 8


def _dlogits(ctx, dlogp, dentropy, dkl, logits, targets, temperature, vocab_mask, ref_logits, *saved):
    if not ctx.inplace:
        return token_stats_backward(dlogp, dentropy, dkl, logits, targets, temperature, ctx.ignore_index, vocab_mask, ref_logits, *saved,
                                    ctx.backend)
    if torch.is_grad_enabled():
        raise RuntimeError(DOUBLE_BACKWARD)
    logits = logits.detach()
    token_stats_backward_(dlogp, dentropy, dkl, logits, targets, temperature, ctx.ignore_index, vocab_mask, ref_logits, *saved, ctx.backend)
    torch.autograd.graph.increment_version(logits)  # a later use of the logits raises instead of reading their gradient
    return logits


SAVED = "Tensor shift, Tensor sum_exp, Tensor entropy, Tensor? ref_shift, Tensor? ref_sum_exp, Tensor? kl, str backend"
UPSTREAM = "Tensor? dlogp, Tensor? dentropy, Tensor? dkl"


def _upstream(*grads):
    return (None if g is None else g.contiguous() for g in grads)  # .sum() sends a gradient of stride 0


def _token_stats_backward(dlogp, dentropy, dkl, logits, targets, temperature, *rest):
    grad = run("token_stats_backward", rest[-1], *_upstream(dlogp, dentropy, dkl), logits, targets, _temperature(temperature), *rest[:-1], None)
    return grad.view(logits.shape)


def _token_stats_backward_(dlogp, dentropy, dkl, logits, targets, temperature, *rest):
    run("token_stats_backward", rest[-1], *_upstream(dlogp, dentropy, dkl), logits, targets, _temperature(temperature), *rest[:-1], logits)


token_stats = define("token_stats", f"({ROWS}, int wanted, bool inplace, str backend) -> ({', '.join(['Tensor'] * 11)})", _token_stats,
                     token_stats_fake, _token_stats_grad, _token_stats_setup)
token_stats_backward = define(
    "token_stats_backward", f"({UPSTREAM}, {ROWS}, {SAVED}) -> Tensor", _token_stats_backward,
    lambda dlogp, dentropy, dkl, logits, *rest: logits.new_empty(logits.shape))
token_stats_backward_ = define(
    "token_stats_backward_", f"({UPSTREAM}, {ROWS}, {SAVED}) -> ()".replace("Tensor logits", "Tensor(a!) logits"), _token_stats_backward_,
    lambda *arguments: None)


# fused_policy ----------------------------------------------------------------------------------------------------------------------

def _fused_policy(objective, logits, targets, temperature, ignore_index, vocab_mask, columns, params, weight, entropy_weight, kl, ref_logp,
                  kl_weight, with_grad, inplace, backend):
    return run("fused_policy", backend, objective, logits, targets, _temperature(temperature), ignore_index, vocab_mask, columns,
                params.tolist(), weight, entropy_weight, kl, ref_logp, kl_weight, with_grad, None)


def _fused_policy_fake(objective, logits, targets, temperature, ignore_index, vocab_mask, columns, params, weight, entropy_weight, kl, ref_logp,
                       kl_weight, with_grad, inplace, backend):
    real = real_dtype(logits.dtype)
    dlogits = logits.new_empty((targets.shape[0], logits.shape[-1]) if with_grad else (0, 0))
    return logits.new_empty((), dtype=real), dlogits, *(logits.new_empty(targets.shape, dtype=real) for _ in range(5))


def _fused_policy_setup(ctx, inputs, output):
    (_, logits, targets, temperature, ctx.ignore_index, vocab_mask, columns, _, _, entropy_weight, _, _, _, ctx.with_grad, ctx.inplace,
     ctx.backend) = inputs
    ctx.others = [None] * len(columns), *(None,) * 9  # the gradients of what follows vocab_mask
    _, dlogits, logp, shift, sum_exp, entropy, dlogp = output
    ctx.mark_non_differentiable(dlogits, logp, shift, sum_exp, entropy, dlogp)
    ctx.set_materialize_grads(False)
    ctx.dlogits = dlogits if ctx.with_grad else None
    ctx.save_for_backward(logits, targets, temperature, vocab_mask, entropy_weight, shift, sum_exp, entropy, dlogp)


def _fused_policy_grad(ctx, dloss, *_):
    logits, targets, temperature, vocab_mask, entropy_weight, shift, sum_exp, entropy, dlogp = ctx.saved_tensors
    if dloss is None:
        return *(None,) * 6, *ctx.others
    # The gradient made in the forward is given away once, and only for an upstream gradient of exactly 1: scaled copies would round
    # twice (and fp16 would underflow before the loss scale arrives), a kept one would alias what the caller may edit.
    held, ctx.dlogits = ctx.dlogits, None
    if held is not None and not torch.is_grad_enabled() and dloss.item() == 1.0:
        return None, held.view(logits.shape), *(None,) * 4, *ctx.others
    dentropy = None if entropy_weight is None else -entropy_weight * dloss
    dlogits = _dlogits(ctx, dlogp * dloss, dentropy, None, logits, targets, temperature, vocab_mask, None, shift, sum_exp, entropy, None, None, None)
    return None, dlogits, *(None,) * 4, *ctx.others


fused_policy = define(
    "fused_policy", "(str objective, Tensor logits, Tensor targets, Tensor temperature, int ignore_index, Tensor? vocab_mask, Tensor[] columns, "
    "Tensor params, Tensor weight, Tensor? entropy_weight, str? kl, Tensor? ref_logp, Tensor? kl_weight, bool with_grad, bool inplace, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)", _fused_policy, _fused_policy_fake, _fused_policy_grad, _fused_policy_setup)


# elementwise -----------------------------------------------------------------------------------------------------------------------

def _elementwise(objective, first, others, params, weight, backend):
    return run("elementwise", backend, objective, [first, *others], params.tolist(), weight)


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
    return grad if weight is None else torch.where(weight != 0, grad, 0.0)


elementwise = define(
    "elementwise", "(str objective, Tensor first, Tensor[] others, Tensor params, Tensor? weight, str backend) -> (Tensor, Tensor, Tensor)",
    _elementwise, lambda objective, first, *rest: (first.new_empty(()), torch.empty_like(first), torch.empty_like(first)),
    _elementwise_grad, _elementwise_setup)
elementwise_backward = define(
    "elementwise_backward", "(Tensor? dloss, Tensor? dvalue, Tensor first, Tensor? weight, Tensor derivative) -> Tensor", _elementwise_backward,
    lambda dloss, dvalue, first, *rest: torch.empty_like(first))


# gae -------------------------------------------------------------------------------------------------------------------------------

def _gae(rewards, values, mask, cu_seqlens, gamma, lam, masked, backend):
    return run("gae", backend, rewards, values, mask, cu_seqlens, gamma.item(), lam.item(), masked)


gae = define(
    "gae", "(Tensor rewards, Tensor values, Tensor? mask, Tensor? cu_seqlens, Tensor gamma, Tensor lam, str masked, str backend) -> (Tensor, Tensor)",
    _gae, lambda rewards, *rest: (torch.empty_like(rewards), torch.empty_like(rewards)))
