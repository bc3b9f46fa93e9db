"""The op of a policy objective over rows of logits: the loss, and the gradient of the logits, in one pass."""

import torch

from rlkernels import checks
from rlkernels.backends import BACKENDS
from rlkernels.backends.protocol import PolicyInputs, PolicyRows, RowBatch, real_dtype
from rlkernels.ops import register
from rlkernels.ops.rows import divisor, logits_gradient
from rlkernels.tracing import on_device, value, values


def fused_policy(rows, policy, with_grad, inplace, backend):
    """Computes the ``PolicyRows`` of a ``RowBatch`` (no reference) and ``PolicyInputs``; the loss is differentiable in
    the logits.
    """
    objective, *terms = policy
    return PolicyRows(*fused_policy_op(objective, *rows[:5], *terms, with_grad, inplace, backend))


def run_fused(backend, rows, policy, with_grad, out):
    """Calls the backend's kernel; its two passes where a parameter is a tensor on a device: a kernel takes numbers."""
    if not on_device(policy.params):
        policy = PolicyInputs(policy.objective, policy.columns, values(policy.params), *policy[3:])
        return register.run("fused_policy", backend, rows, policy, with_grad, out)

    def statistics(*arguments):
        return register.run("token_stats", backend, *arguments)

    def backward(*arguments):
        return register.run("token_stats_backward", backend, *arguments)

    return BACKENDS["eager"].fused_policy(rows, policy, with_grad, out, (statistics, backward))


def _fused_policy(objective, logits, targets, temperature, ignore_index, vocab_mask, *rest):
    *terms, with_grad, inplace, backend = rest
    rows = tuple.__new__(RowBatch, (logits, targets, value(temperature), ignore_index, vocab_mask, None))
    return run_fused(backend, rows, tuple.__new__(PolicyInputs, (objective, *terms)), with_grad, None)


def fused_policy_fake(objective, logits, targets, *rest):
    with_grad, real = rest[-3], real_dtype(logits.dtype)
    dlogits = logits.new_empty((targets.shape[0], logits.shape[-1]) if with_grad else (0, 0))
    return logits.new_empty((), dtype=real), dlogits, *(logits.new_empty(targets.shape, dtype=real) for _ in range(5))


def _setup(ctx, inputs, output):
    objective, logits, targets, temperature, ctx.ignore_index, vocab_mask, *terms = inputs
    *terms, ctx.with_grad, ctx.inplace, ctx.backend = terms
    policy = tuple.__new__(PolicyInputs, (objective, *terms))
    if ctx.inplace:
        checks.inplace("fused_policy", logits)
    ctx.temperature, per_row = divisor(temperature)
    ctx.others = [None] * len(policy.columns), *(None,) * 9  # the gradients of what follows vocab_mask
    found = tuple.__new__(PolicyRows, output)
    ctx.mark_non_differentiable(*found[1:])
    ctx.set_materialize_grads(False)
    ctx.dlogits = found.dlogits if ctx.with_grad else None
    saved = found.row_max, found.sum_exp, found.entropy
    ctx.save_for_backward(logits, targets, per_row, vocab_mask, policy.entropy_weight, found.dlogp, *saved)


def known_to_be_one(x):
    """Tells whether the host sees, without waiting for a device, that a number is 1."""
    return x.device.type == "cpu" and x.item() == 1.0


def _gradient(ctx, dloss, *_):
    logits, targets, per_row, vocab_mask, entropy_weight, dlogp, *saved = ctx.saved_tensors
    if dloss is None:
        return *(None,) * 6, *ctx.others
    # The forward has already written d loss / d logits, for an upstream gradient of 1. That tensor is returned when the
    # upstream gradient is exactly 1. Otherwise it is computed again, in the same memory, because scaling it would round
    # twice and underflow in fp16. It is returned once only, because a second caller would share memory with the first.
    # The host reads the upstream gradient where that is free. Elsewhere the kernel does.
    ready, ctx.dlogits = None if torch.is_grad_enabled() else ctx.dlogits, None
    if ready is not None and known_to_be_one(dloss):
        return None, ready.view(logits.shape), *(None,) * 4, *ctx.others
    upstream = dlogp * dloss, None if entropy_weight is None else -entropy_weight * dloss, None
    saved = *saved, None, None, None
    dlogits = logits_gradient(
        ctx, upstream, logits, targets, per_row, vocab_mask, None, saved, ready=ready, unless=dloss
    )
    return None, dlogits, *(None,) * 4, *ctx.others


fused_policy_op = register.define(
    "fused_policy",
    "(str objective, Tensor logits, Tensor targets, Tensor temperature, int ignore_index, Tensor? vocab_mask, "
    "Tensor[] columns, Tensor params, Tensor weight, Tensor? entropy_weight, str? kl, Tensor? ref_logp, "
    "Tensor? kl_weight, bool with_grad, bool inplace, str backend) "
    f"-> ({', '.join(['Tensor'] * len(PolicyRows._fields))})",
    _fused_policy,
    fused_policy_fake,
    _gradient,
    _setup,
)
