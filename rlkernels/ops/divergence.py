"""The op of a divergence of two models over the vocabulary: that of each row, its weighted sum, and their gradient."""

from typing import NamedTuple

import torch

from rlkernels.backends.eager_divergence import topk_divergence
from rlkernels.backends.protocol import RowBatch, real_dtype
from rlkernels.ops import register
from rlkernels.ops.policy import known_to_be_one
from rlkernels.ops.rows import ROWS, divisor, nothing_fake
from rlkernels.tracing import value

TEACHER = "Tensor? teacher_ids, Tensor? teacher_logprobs, str kind, Tensor beta"


class Teacher(NamedTuple):
    """A teacher, beside ``ref_logits`` of a ``RowBatch``, and the kind of the comparison.

    ``ids``, ``logprobs``: ``[T, K]``, in place of ``ref_logits``. ``beta``: read for ``kind="jsd"`` alone.
    """

    ids: torch.Tensor | None
    logprobs: torch.Tensor | None
    kind: str
    beta: float


class WeightedDivergence(NamedTuple):
    """The weighted sum of the divergences, and each of them, ``[T]``."""

    loss: torch.Tensor
    value: torch.Tensor


def divergences(rows, teacher, weight, with_grad, backend):
    """Computes the ``WeightedDivergence`` of a ``RowBatch`` from a ``Teacher``.

    With ``weight`` its ``loss`` is differentiable in the logits; without, its ``value`` is, and ``loss`` is 0.
    ``with_grad``: the gradient of the loss is made in the forward, in the same pass.
    """
    return WeightedDivergence(*divergence_op(*rows, *teacher, weight, with_grad, backend)[:2])


def run_divergence(backend, rows, teacher, weight, out=None, unless=None):
    """Calls the backend's kernel, or the passes over rows that serve a teacher of top log-probabilities."""
    ids, logprobs, kind, beta = teacher
    if ids is None:
        return register.run("divergence", backend, rows, kind, beta, weight, out, unless)

    def statistics(*arguments):
        return register.run("token_stats", backend, *arguments)

    def backward(*arguments):
        return register.run("token_stats_backward", backend, *arguments)

    return topk_divergence(rows, ids, logprobs, kind, beta, weight, out, unless, passes=(statistics, backward))


def _split(arguments):
    """Returns the ``RowBatch`` and the ``Teacher`` that the first ten arguments of a registered op stand for."""
    logits, targets, temperature, *rest = arguments[:6]
    rows = tuple.__new__(RowBatch, (logits, targets, value(temperature), *rest))
    ids, logprobs, kind, beta = arguments[6:10]
    return rows, Teacher(ids, logprobs, kind, value(beta))


def _divergence(*arguments):
    (rows, teacher), (weight, with_grad, backend) = _split(arguments), arguments[10:]
    found = run_divergence(backend, rows, teacher, weight if with_grad else None)
    loss = found.value.new_zeros(()) if weight is None else weighted(found.value, weight)
    return loss, found.value, found.dlogits


def weighted(values, weight):
    """Returns the sum of values times their weights; one of weight 0 is not looked at."""
    return torch.where(weight != 0, values * weight, 0.0).sum(dtype=torch.float64).to(values.dtype)


def _fake(logits, targets, *arguments):
    with_grad, real = arguments[-2], real_dtype(logits.dtype)
    shape = (targets.shape[0], logits.shape[-1]) if with_grad else (0, 0)
    return logits.new_empty((), dtype=real), logits.new_empty(targets.shape, dtype=real), logits.new_empty(shape)


def _setup(ctx, inputs, output):
    logits, targets, temperature, ctx.ignore_index, vocab_mask, teacher, *of_teacher = inputs[:8]
    ctx.kind, beta, weight, with_grad, ctx.backend = inputs[8:]
    (ctx.temperature, per_row), (ctx.beta, held_beta) = divisor(temperature), divisor(beta)
    loss, values, dlogits = output
    ctx.mark_non_differentiable(dlogits, loss if weight is None else values)
    ctx.set_materialize_grads(False)
    ctx.dlogits = dlogits if with_grad else None
    ctx.save_for_backward(logits, targets, per_row, vocab_mask, teacher, *of_teacher, held_beta, weight)


def _gradient(ctx, dloss, dvalues, _):
    nothing = (None,) * 12
    logits, targets, per_row, vocab_mask, teacher, ids, logprobs, held_beta, weight = ctx.saved_tensors
    upstream = dvalues if weight is None else dloss
    if upstream is None:
        return None, *nothing
    # The gradient is returned as it was made where the upstream gradient is exactly 1. Else it is made anew in the same
    # memory, because scaling would round a second time.
    ready, ctx.dlogits = None if torch.is_grad_enabled() else ctx.dlogits, None
    if ready is not None and known_to_be_one(upstream):
        return ready.view(logits.shape), *nothing
    temperature = ctx.temperature if per_row is None else per_row
    beta = ctx.beta if held_beta is None else held_beta
    of_rows = logits, targets, temperature, ctx.ignore_index, vocab_mask, teacher, ids, logprobs, ctx.kind, beta
    weight = upstream.contiguous() if weight is None else weight * upstream
    if ready is None:
        return divergence_backward(*of_rows, weight, ctx.backend), *nothing
    divergence_backward_into(*of_rows, weight, ctx.backend, ready, upstream)
    return ready.view(logits.shape), *nothing


def _backward(*arguments, out=None, unless=None):
    (rows, teacher), (weight, backend) = _split(arguments), arguments[10:]
    gradient = run_divergence(backend, rows, teacher, weight, out, unless).dlogits
    return gradient if gradient.shape == rows.logits.shape else gradient.view(rows.logits.shape)


def _backward_into(*arguments):
    *arguments, out, unless = arguments
    _backward(*arguments, out=out, unless=unless)


def _backward_fake(logits, *arguments):
    return logits.new_empty(logits.shape)


divergence_op = register.define(
    "divergence",
    f"({ROWS}, {TEACHER}, Tensor? weight, bool with_grad, str backend) -> (Tensor, Tensor, Tensor)",
    _divergence,
    _fake,
    _gradient,
    _setup,
)
divergence_backward = register.define(
    "divergence_backward", f"({ROWS}, {TEACHER}, Tensor weight, str backend) -> Tensor", _backward, _backward_fake
)
divergence_backward_into = register.define(
    "divergence_backward_into",
    f"({ROWS}, {TEACHER}, Tensor weight, str backend, Tensor(a!) out, Tensor unless) -> ()",
    _backward_into,
    nothing_fake,
)
