"""Ops over rows of logits: their statistics and the gradient of these."""

import torch

from rlkernels import checks
from rlkernels.backends.protocol import ENTROPY, KL, RowBatch, RowStats, SavedRows, Upstream, presence, real_dtype
from rlkernels.ops import register
from rlkernels.tracing import value

ROWS = "Tensor logits, Tensor targets, Tensor temperature, int ignore_index, Tensor? vocab_mask, Tensor? ref_logits"
UPSTREAM = "Tensor? dlogp, Tensor? dentropy, Tensor? dkl"
SAVED = "Tensor row_max, Tensor sum_exp, Tensor entropy, Tensor? ref_row_max, Tensor? ref_sum_exp, Tensor? kl"
"""Schemas of a ``RowBatch``, an ``Upstream`` and ``SavedRows``, in the order of their fields."""


def token_stats(rows, wanted, inplace, backend):
    """The ``RowStats`` of a ``RowBatch``; log-probability, entropy and KL are differentiable in the logits.

    ``wanted``: bits of ``backends.protocol``. ``inplace``: the backward writes the gradient over the logits.
    """
    return RowStats(*token_stats_op(*rows, wanted, inplace, backend))


def _token_stats(logits, targets, temperature, ignore_index, vocab_mask, ref_logits, wanted, inplace, backend):
    rows = tuple.__new__(RowBatch, (logits, targets, value(temperature), ignore_index, vocab_mask, ref_logits))
    return register.run("token_stats", backend, rows, wanted)


def _dispatched_token_stats(*arguments):
    """The same with an empty tensor of its own for each absent output, because an op's outputs must not be aliases."""
    first, *rest = _token_stats(*arguments)
    return first, *(x if x.numel() else torch.empty_like(x) for x in rest)


def token_stats_fake(logits, targets, temperature, ignore_index, vocab_mask, ref_logits, wanted, inplace, backend):
    like = logits.new_empty(0, dtype=real_dtype(logits.dtype))
    present = presence(wanted, ref_logits is not None)
    return tuple(
        like.new_empty(targets.shape if p else (0,), dtype=torch.bool if name == "is_top1" else None)
        for name, p in zip(RowStats._fields, present, strict=True)
    )


def _setup(ctx, inputs, output):
    logits, targets, temperature, ctx.ignore_index, vocab_mask, ref_logits, wanted, ctx.inplace, ctx.backend = inputs
    ctx.temperature, per_row = divisor(temperature)
    if ctx.inplace:  # a compiled program has met no leaf before
        checks.inplace("token_stats", logits)
    stats = tuple.__new__(RowStats, output)
    # An absent output must not be differentiable: AOTAutograd would send it a gradient of shape (0,).
    constant = [stats.row_max, stats.sum_exp, stats.log_sum_sq, stats.mean_logits, stats.is_top1]
    constant += [stats.ref_logp, stats.ref_row_max, stats.ref_sum_exp]
    constant += [x for flag, x in ((ENTROPY, stats.entropy), (KL, stats.kl)) if not wanted & flag]
    ctx.mark_non_differentiable(*constant)
    ctx.set_materialize_grads(False)
    reference = (ref_logits, stats.ref_row_max, stats.ref_sum_exp, stats.kl) if wanted & KL else (None,) * 4
    saved = stats.row_max, stats.sum_exp, stats.entropy, *reference[1:]
    ctx.save_for_backward(logits, targets, per_row, vocab_mask, reference[0], *saved)


def _gradient(ctx, *arrived):
    arrived = tuple.__new__(RowStats, arrived)
    upstream = arrived.logp, arrived.entropy, arrived.kl
    if upstream[0] is None and upstream[1] is None and upstream[2] is None:
        return (None,) * 9
    logits, targets, per_row, vocab_mask, ref_logits, *saved = ctx.saved_tensors
    return logits_gradient(ctx, upstream, logits, targets, per_row, vocab_mask, ref_logits, saved), *(None,) * 8


def divisor(temperature):
    """The part of a temperature that a context keeps: the number itself, or the tensor to save."""
    return (temperature, None) if isinstance(temperature, float) else (None, temperature)


def logits_gradient(ctx, upstream, logits, targets, per_row, vocab_mask, ref_logits, saved, ready=None, unless=None):
    """The gradient of the logits, in the logits' own memory where ``ctx`` says so.

    ``ready``: the gradient that the forward made, for an upstream gradient of 1; it is kept where ``unless`` is 1, and
    made anew in its memory elsewhere.
    """
    temperature = ctx.temperature if per_row is None else per_row
    rest = (targets, temperature, ctx.ignore_index, vocab_mask, ref_logits, *saved, ctx.backend)
    if ready is not None:
        token_stats_backward_into(*upstream, logits, *rest, ready, unless)
        return ready.view(logits.shape)
    if not ctx.inplace:
        return token_stats_backward(*upstream, logits, *rest)
    if torch.is_grad_enabled():
        raise RuntimeError(register.DOUBLE_BACKWARD)
    logits = logits.detach()
    token_stats_backward_(*upstream, logits, *rest)
    torch.autograd.graph.increment_version(logits)  # a later use of the logits raises instead of reading their gradient
    return logits


def _token_stats_backward(*arguments, out=None, unless=None):
    """``arguments``: the fields of an ``Upstream``, a ``RowBatch`` and ``SavedRows``, then the backend."""
    upstream = tuple.__new__(Upstream, arguments[:3])
    logits, targets, temperature, *rest = arguments[3:9]
    rows = tuple.__new__(RowBatch, (logits, targets, value(temperature), *rest))
    saved = tuple.__new__(SavedRows, arguments[9:15])
    gradient = register.run("token_stats_backward", arguments[15], upstream, rows, saved, out, unless)
    return gradient if gradient.shape == logits.shape else gradient.view(logits.shape)


def _token_stats_backward_(*arguments):
    _token_stats_backward(*arguments, out=arguments[3])


def _token_stats_backward_into(*arguments):
    *arguments, out, unless = arguments
    _token_stats_backward(*arguments, out=out, unless=unless)


def gradient_fake(dlogp, dentropy, dkl, logits, *rest):
    return logits.new_empty(logits.shape)


def nothing_fake(*arguments):
    """The fake of an op that writes into an argument."""


token_stats_op = register.define(
    "token_stats",
    f"({ROWS}, int wanted, bool inplace, str backend) -> ({', '.join(['Tensor'] * len(RowStats._fields))})",
    _token_stats,
    token_stats_fake,
    _gradient,
    _setup,
    _dispatched_token_stats,
)
token_stats_backward = register.define(
    "token_stats_backward",
    f"({UPSTREAM}, {ROWS}, {SAVED}, str backend) -> Tensor",
    _token_stats_backward,
    gradient_fake,
)
token_stats_backward_ = register.define(
    "token_stats_backward_",
    f"({UPSTREAM}, {ROWS}, {SAVED}, str backend) -> ()".replace("Tensor logits", "Tensor(a!) logits"),
    _token_stats_backward_,
    nothing_fake,
)
token_stats_backward_into = register.define(
    "token_stats_backward_into",
    f"({UPSTREAM}, {ROWS}, {SAVED}, str backend, Tensor(a!) out, Tensor unless) -> ()",
    _token_stats_backward_into,
    nothing_fake,
)
