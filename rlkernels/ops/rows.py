"""Ops over rows of logits: their statistics and the gradient of these."""

import functools

import torch

from rlkernels import checks
from rlkernels.backends import BACKENDS
from rlkernels.backends.protocol import (
    ENTROPY,
    KL,
    MEAN_LOGITS,
    RowBatch,
    RowStats,
    SavedRows,
    Upstream,
    presence,
    real_dtype,
)
from rlkernels.ops import register
from rlkernels.tracing import value

ROWS = "Tensor logits, Tensor targets, Tensor temperature, int ignore_index, Tensor? vocab_mask, Tensor? ref_logits"
UPSTREAM = "Tensor? dlogp, Tensor? dentropy, Tensor? dkl"
SAVED = "Tensor row_max, Tensor sum_exp, Tensor entropy, Tensor? ref_row_max, Tensor? ref_sum_exp, Tensor? kl"
"""Schemas of a ``RowBatch``, an ``Upstream`` and ``SavedRows``, in the order of their fields."""


def token_stats(rows, wanted, inplace, backend):
    """Computes the ``RowStats`` of a ``RowBatch``; log-probability, entropy, KL, mean of the logits and sum of
    exponentials are differentiable in the logits. The sum is differentiated as if the row maximum were constant, which
    is exact for ``row_max / T + log(sum_exp)``.

    ``wanted``: bits of ``backends.protocol``. ``inplace``: the backward writes the gradient over the logits.
    """
    return RowStats(*token_stats_op(*rows, wanted, inplace, backend))


def _token_stats(logits, targets, temperature, ignore_index, vocab_mask, ref_logits, wanted, inplace, backend):
    rows = tuple.__new__(RowBatch, (logits, targets, value(temperature), ignore_index, vocab_mask, ref_logits))
    return register.run("token_stats", backend, rows, wanted)


def _dispatched_token_stats(*arguments):
    """Computes the same with an empty tensor of its own for each absent output, because an op's outputs must not be
    aliases.
    """
    first, *rest = _token_stats(*arguments)
    return first, *(x if x.numel() else torch.empty_like(x) for x in rest)


def token_stats_fake(logits, targets, temperature, ignore_index, vocab_mask, ref_logits, wanted, inplace, backend):
    like = logits.new_empty(0, dtype=real_dtype(logits.dtype))
    present = presence(wanted, ref_logits is not None)
    return tuple(
        like.new_empty(targets.shape if p else (0,), dtype=torch.bool if name == "is_top1" else None)
        for name, p in zip(RowStats._fields, present, strict=True)
    )


@functools.cache
def _constant(wanted):
    """Returns the places in ``RowStats`` of what has no gradient.

    An absent output must have none: AOTAutograd would send it a gradient of shape (0,).
    """
    names = {"row_max", "log_sum_sq", "is_top1", "ref_logp", "ref_row_max", "ref_sum_exp"}
    names |= {
        name for flag, name in ((ENTROPY, "entropy"), (KL, "kl"), (MEAN_LOGITS, "mean_logits")) if not wanted & flag
    }
    return tuple(k for k, name in enumerate(RowStats._fields) if name in names)


def _setup(ctx, inputs, output):
    logits, targets, temperature, ctx.ignore_index, vocab_mask, ref_logits, wanted, ctx.inplace, ctx.backend = inputs
    ctx.temperature, per_row = divisor(temperature)
    if ctx.inplace:  # a compiled program has met no leaf before
        checks.inplace("token_stats", logits)
    stats = tuple.__new__(RowStats, output)
    ctx.mark_non_differentiable(*[output[k] for k in _constant(wanted)])
    ctx.set_materialize_grads(False)
    reference = (ref_logits, stats.ref_row_max, stats.ref_sum_exp, stats.kl) if wanted & KL else (None,) * 4
    saved = stats.row_max, stats.sum_exp, stats.entropy, *reference[1:]
    ctx.save_for_backward(logits, targets, per_row, vocab_mask, reference[0], *saved)


def _gradient(ctx, *arrived):
    arrived = tuple.__new__(RowStats, arrived)
    upstream, further = (arrived.logp, arrived.entropy, arrived.kl), (arrived.sum_exp, arrived.mean_logits)
    if upstream[0] is upstream[1] is upstream[2] is further[0] is further[1] is None:
        return (None,) * 9
    logits, targets, per_row, vocab_mask, ref_logits, *saved = ctx.saved_tensors
    rows = targets, per_row, vocab_mask, ref_logits, saved
    if further[0] is None and further[1] is None:
        return logits_gradient(ctx, upstream, logits, *rows), *(None,) * 8
    return _gradient_of_all(ctx, upstream, *further, logits, *rows), *(None,) * 8


def _gradient_of_all(ctx, upstream, dsum, dmean, logits, targets, per_row, vocab_mask, ref_logits, saved):
    """Returns the gradient of the logits where the sum of exponentials or the mean of the logits has an upstream
    gradient.

    With ``b`` that of the logsumexp, ``a (1[v = y] - p_v) + b p_v = (a - b) (1[v = y] - p_v) + b 1[v = y]``. The kernel
    makes the first term. The column of the target is written once more, because a sum of two rounded terms would be
    rounded twice.
    """
    dlogp, dentropy, dkl = upstream
    saved, live = tuple.__new__(SavedRows, saved), targets != ctx.ignore_index
    zero = torch.zeros_like(saved.row_max)
    dlogp = zero if dlogp is None else dlogp
    dlse = zero if dsum is None else torch.where(live, dsum * saved.sum_exp, 0.0)
    targets = torch.where(live & (targets >= 0) & (targets < logits.shape[-1]), targets, 0).long()
    support = logits.shape[-1]
    if vocab_mask is not None:  # a target outside the support moves nothing, so the kernel gets a column inside
        support = vocab_mask.sum(-1)
        inside = vocab_mask.expand(targets.shape[0], -1).gather(1, targets[:, None])[:, 0]
        dlogp, targets = torch.where(inside, dlogp, 0.0), torch.where(inside, targets, vocab_mask.byte().argmax(-1))
    temperature = ctx.temperature if per_row is None else per_row.to(zero.dtype).expand(zero.shape)
    shift = zero if dmean is None else torch.where(live, dmean / support / temperature, 0.0)
    leading = (*logits.shape[:-1], 1)
    index = targets.view(leading)
    upstream = Upstream(dlogp - dlse, dentropy, dkl)
    reference = None if ref_logits is None else ref_logits.gather(-1, index)
    at_target = target_gradient(upstream, dlse, logits.gather(-1, index), live, temperature, saved, reference)
    at_target = torch.where(live, at_target + shift, 0.0)
    targets = torch.where(live, targets, ctx.ignore_index)
    gradient = logits_gradient(ctx, upstream, logits, targets, per_row, vocab_mask, ref_logits, saved)
    if dmean is not None:
        shift = shift.view(leading)
        if vocab_mask is not None:
            shift = torch.where(vocab_mask if vocab_mask.dim() == 1 else vocab_mask.view(logits.shape), shift, 0.0)
        gradient.add_(shift)
    return gradient.scatter_(-1, index, at_target.to(gradient.dtype).view(leading))


def target_gradient(upstream, dlse, column, live, temperature, saved, reference=None):
    """Returns the gradient of the logit of each row's target, ``[T]``, 0 where the row is not ``live``.

    ``upstream``: what a kernel gets, in which that of the log-probability is less ``dlse``, that of the logsumexp.
    ``column``, ``reference``: the logits of the targets, ``[T, 1]`` or ``[..., 1]``.
    """
    column = column.to(saved.row_max.dtype).view(-1, 1)
    reference = None if reference is None else reference.to(saved.row_max.dtype).view(-1, 1)
    rows = RowBatch(column, torch.where(live, 0, -1), temperature, -1, None, reference)
    made = BACKENDS["eager"].token_stats_backward(upstream, rows, saved)[:, 0]
    return torch.where(live, made + dlse / temperature, 0.0)


def divisor(temperature):
    """Returns the part of a temperature that a context keeps: the number itself, or the tensor to save."""
    return (temperature, None) if isinstance(temperature, float) else (None, temperature)


def logits_gradient(ctx, upstream, logits, targets, per_row, vocab_mask, ref_logits, saved, ready=None, unless=None):
    """Returns the gradient of the logits, in the logits' own memory where ``ctx`` says so.

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
    """Differentiates rows. ``arguments``: the fields of an ``Upstream``, a ``RowBatch`` and ``SavedRows``, then the
    backend.
    """
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
    """Stands for an op that writes into an argument."""


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
