"""The op of several targets per row: their log-probabilities from one read of the row."""

import torch

from rlkernels import checks
from rlkernels.backends.protocol import RowBatch, check_rows, real_dtype
from rlkernels.ops import register
from rlkernels.ops.rows import divisor, logits_gradient
from rlkernels.tracing import value


def target_logprobs(rows, inplace, backend):
    """Computes the log-probabilities ``[T, K]`` of a ``RowBatch`` whose ``targets`` are ``[T, K]``, differentiable."""
    return target_logprobs_op(*rows[:5], inplace, backend)[0]


def _scored(targets, ignore_index, vocab, vocab_mask):
    """Tells which targets are in the support, bool ``[T, K]``, and returns a column per row that the kernels may take.

    The column is that of the first such target, else some column of the support, else ``ignore_index``, where all
    targets of a row are ignored.
    """
    read = targets != ignore_index
    scored = read & (targets >= 0) & (targets < vocab)
    fallback = targets.new_zeros(targets.shape[:1])
    if vocab_mask is not None:
        kept = vocab_mask.expand(targets.shape[0], -1)
        scored = scored & kept.gather(1, torch.where(scored, targets, 0).long())
        fallback = vocab_mask.byte().argmax(-1).to(targets.dtype).expand(targets.shape[0])
    place = scored.byte().argmax(-1, keepdim=True)
    first = torch.where(scored.any(-1), targets.gather(1, place)[:, 0], fallback)
    return scored, torch.where(read.any(-1), first, ignore_index)


def _centred(logits, index, temperature, row_max):
    """Returns the logits of columns ``[T, K]``, less the row maximum, over the temperature."""
    x = logits.gather(-1, index.view(*logits.shape[:-1], index.shape[-1])).to(row_max.dtype).view(index.shape)
    x = x - row_max[:, None]
    return x / (temperature[:, None] if isinstance(temperature, torch.Tensor) and temperature.dim() else temperature)


def _target_logprobs(logits, targets, temperature, ignore_index, vocab_mask, inplace, backend):
    temperature, vocab = value(temperature), logits.shape[-1]
    targets = targets.clone()  # because another thread may write to the caller's between two looks at them
    bad = (targets != ignore_index) & ((targets < 0) | (targets >= vocab))
    worst = targets.gather(1, bad.byte().argmax(-1, keepdim=True))[:, 0]
    check_rows(torch.where(bad.any(-1), worst, ignore_index), vocab, ignore_index, 1.0)
    vocab_mask = vocab_mask if vocab_mask is None else vocab_mask.contiguous()
    scored, first = _scored(targets, ignore_index, vocab, vocab_mask)
    rows = tuple.__new__(RowBatch, (logits, first.contiguous(), temperature, ignore_index, vocab_mask, None))
    stats = register.run("token_stats", backend, rows, 0)
    index = torch.where(scored, targets, 0).long()
    logp = _centred(logits, index, temperature, stats.row_max) - stats.sum_exp.log()[:, None]
    # A target outside of the support has probability 0. One outside of the vocabulary is met on an accelerator only.
    absent = torch.where((targets >= 0) & (targets < vocab), -torch.inf, torch.nan).to(logp.dtype)
    absent = torch.where(logp.isnan().any(-1, keepdim=True) & scored.any(-1, keepdim=True), torch.nan, absent)
    logp = torch.where(targets == ignore_index, 0.0, torch.where(scored, logp, absent))
    return logp.contiguous(), first.contiguous(), stats.row_max, stats.sum_exp


def target_logprobs_fake(logits, targets, temperature, ignore_index, vocab_mask, inplace, backend):
    real, count = real_dtype(logits.dtype), targets.shape[0]
    per_row = [logits.new_empty(count, dtype=dtype) for dtype in (targets.dtype, real, real)]
    return logits.new_empty(targets.shape, dtype=real), *per_row


def _setup(ctx, inputs, output):
    logits, targets, temperature, ctx.ignore_index, vocab_mask, ctx.inplace, ctx.backend = inputs
    ctx.temperature, per_row = divisor(temperature)
    if ctx.inplace:
        checks.inplace("token_logprobs", logits)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, targets, per_row, vocab_mask, *output[1:])


def _gradient(ctx, dlogp, *_):
    if dlogp is None:
        return (None,) * 7
    logits, targets, per_row, vocab_mask, first, row_max, sum_exp = ctx.saved_tensors
    temperature = ctx.temperature if per_row is None else per_row.to(row_max.dtype).expand(row_max.shape)
    scored, _ = _scored(targets, ctx.ignore_index, logits.shape[-1], vocab_mask)
    dlogp = torch.where(scored, dlogp, 0.0)
    total, live = dlogp.sum(-1), first != ctx.ignore_index
    # sum_k a_k (1[v = y_k] - p_v): the kernel makes it for one target with the sum of all a_k. The columns of the
    # targets are written once more. A target that is not scored writes what its row's first one does.
    index = torch.where(scored, targets, torch.where(live, first, 0)[:, None]).long()
    p = _centred(logits, index, temperature, row_max).exp() / sum_exp[:, None]
    own = torch.where(index[:, :, None] == index[:, None, :], dlogp[:, None, :], 0.0).sum(-1)
    columns = own - total[:, None] * p
    columns = columns / (temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature)
    columns = torch.where((live & (dlogp != 0).any(-1))[:, None], columns, 0.0)
    saved = row_max, sum_exp, row_max.new_empty(0), None, None, None
    gradient = logits_gradient(ctx, (total, None, None), logits, first, per_row, vocab_mask, None, saved)
    columns = columns.to(gradient.dtype).view(*logits.shape[:-1], columns.shape[-1])
    return gradient.scatter_(-1, index.view(columns.shape), columns), *(None,) * 6


target_logprobs_op = register.define(
    "target_logprobs",
    "(Tensor logits, Tensor targets, Tensor temperature, int ignore_index, Tensor? vocab_mask, bool inplace, "
    "str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _target_logprobs,
    target_logprobs_fake,
    _gradient,
    _setup,
)
