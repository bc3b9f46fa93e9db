"""A head whose vocabulary is spread over a process group: every rank has the hidden states and some of the columns.

Each rank reduces its own columns. A few numbers per token and rank travel, in one collective. Every rank adds them in
the order of the vocabulary, so the result is the same everywhere and does not depend on the rows that came along.
"""

from typing import NamedTuple

import torch

from rlkernels import checks, ops
from rlkernels.backends.eager_divergence import terms
from rlkernels.backends.eager_divergence import topk_divergence as topk_of_rows
from rlkernels.backends.protocol import DivergenceRows, RowBatch, RowStats, SavedRows, Upstream, real_dtype
from rlkernels.linear.rank_agreement import all_gather


class Shard(NamedTuple):
    """The columns of the logits that this rank has.

    ``group``: the process group's name, by which an op finds it.
    """

    group: str
    start: int
    columns: int
    vocab: int

    def process_group(self):
        return torch.distributed.distributed_c10d._resolve_process_group(self.group)


def shard_of(caller, weight, process_group, vocab_start, valid_vocab):
    """Returns the Shard that ``weight`` ``[V_local, H]`` stands for, or None without a group.

    Raises:
        ValueError: ``vocab_start`` without a group or without ``valid_vocab``; a process outside of the group.
    """
    if process_group is None:
        if vocab_start is not None:
            raise ValueError(f"{caller}: vocab_start says where a shard begins; it needs process_group")
        return None
    distributed = torch.distributed
    rank, ranks, rows = distributed.get_rank(process_group), distributed.get_world_size(process_group), weight.shape[0]
    if rank < 0:
        raise ValueError(f"{caller}: this process is not in process_group, so it has no vocabulary shard")
    if vocab_start is None:
        start, vocab = rank * rows, ranks * rows if valid_vocab is None else valid_vocab
    elif valid_vocab is None:
        raise ValueError(
            f"{caller}: with vocab_start the shards may differ in size; pass the whole vocabulary as valid_vocab"
        )
    else:
        start, vocab = checks.integer(caller, "vocab_start", vocab_start), valid_vocab
    return Shard(process_group.group_name, start, max(0, min(rows, vocab - start)), vocab)


def absent_logit(dtype):
    """Returns the logit of the column behind a shard's own, to which the targets of other shards point.

    It is the lowest finite number, because only -inf lies below it. Where all logits of a shard are -inf, the row
    maximum is this number and the sum over the shard's own columns is 0. Without this column such a row would be NaN,
    and nobody could tell it from a row that holds a NaN.
    """
    return torch.finfo(dtype).min


def local_targets(shard, targets, ignore_index):
    """Returns targets as columns of this shard, and a bool tensor: whether the target is one of them.

    The targets of other shards point to the column behind the last, which holds ``absent_logit``.
    """
    here = (targets >= shard.start) & (targets < shard.start + shard.columns)
    return torch.where(
        targets == ignore_index, ignore_index, torch.where(here, targets - shard.start, shard.columns)
    ), here


def local_mask(shard, vocab_mask):
    """Returns a mask of the whole vocabulary as that of this shard's columns, and of the column behind the last.

    That column stays in the support, because the targets of other shards point to it.
    """
    if vocab_mask is None:
        return None
    own = vocab_mask[..., shard.start : shard.start + shard.columns]
    return torch.cat([own, torch.ones_like(vocab_mask[..., :1])], -1)


def _outside(targets, ignore_index, vocab_mask):
    """Tells of which rows the vocabulary mask leaves out the target."""
    known = (targets != ignore_index) & (targets >= 0) & (targets < vocab_mask.shape[-1])
    of_rows = vocab_mask.expand(targets.shape[0], -1)
    return known & ~of_rows.gather(1, torch.where(known, targets, 0).long()[:, None])[:, 0]


def token_stats(shard, backend, logits, targets, temperature, ignore_index, vocab_mask, wanted):
    """Returns ``token_stats`` of whole rows from this rank's columns of the logits; one collective.

    ``vocab_mask``: of the whole vocabulary, the same on every rank, or None.
    """
    local, here = local_targets(shard, targets, ignore_index)
    mask = local_mask(shard, vocab_mask)
    rows = RowBatch(logits, local, temperature, ignore_index, mask)
    stats = ops.run("token_stats", backend, rows, wanted & ~ops.FLAGS["mean_logits"])
    logp, row_max, sum_exp, entropy, log_sum_sq, _, is_top1, *rest = stats
    live = targets != ignore_index
    # Where the row maximum is the absent column's, that column adds e^0 = 1 to the sums.
    extra = (row_max == absent_logit(logits.dtype)).to(row_max.dtype)
    own = sum_exp - extra
    parts = [torch.where(own == 0, -torch.inf, row_max), own, torch.where(here, logp + sum_exp.log(), 0.0)]
    if wanted & ops.ENTROPY:  # sum_v e^(z_v - row_max) (z_v - row_max)
        parts += [sum_exp * (sum_exp.log() - entropy)]
    if wanted & ops.FLAGS["log_sum_sq_probs"]:
        parts += [log_sum_sq.exp() * sum_exp * sum_exp - extra]
    if wanted & ops.FLAGS["mean_logits"]:
        columns = logits[:, :-1] if mask is None else torch.where(mask[..., :-1], logits[:, :-1], 0.0)
        parts += [(columns.sum(-1, dtype=torch.float64) / temperature).to(row_max.dtype)]
    if wanted & ops.FLAGS["is_top1"]:
        parts += [(is_top1 & here).to(row_max.dtype)]
    parts += [here.to(row_max.dtype)]
    everyone = all_gather(torch.stack(parts), shard.process_group())
    support = shard.vocab if vocab_mask is None else vocab_mask.sum(-1)
    return _combine(everyone, live, temperature, support, wanted, rest)


def _combine(everyone, live, temperature, support, wanted, rest):
    """Returns the statistics of whole rows from those of every rank, ``[ranks, parts, rows]``; ``rest``: as it is.

    ``support``: the number of columns that take part.
    """
    maxima, sums, targets, *more, here = everyone.unbind(1)
    # It does not matter whether this maximum keeps a NaN, because a NaN on one rank is in that rank's sum too.
    row_max = maxima.amax(0)
    gap = torch.where(sums == 0, -torch.inf, (maxima - row_max) / temperature)
    scale = gap.exp()
    sum_exp = torch.where(row_max == -torch.inf, torch.nan, _in_order(sums * scale))  # no finite logit in the row
    owned = here != 0
    log_sum = sum_exp.log()

    def per_row(x):
        return torch.where(live, x, 0.0)

    # The owner's rank measures the logit of the target from that rank's own maximum. A row whose target no rank owns
    # (possible on an accelerator, where targets are not checked) is NaN.
    centred = _in_order(
        torch.where(owned, targets + torch.where(targets == -torch.inf, 0.0, (maxima - row_max) / temperature), 0.0)
    )
    logp = torch.where(owned.any(0), centred - log_sum, torch.nan)
    nothing = row_max.new_empty(0)
    entropy, log_sum_sq, mean_logits, is_top1 = nothing, nothing, nothing, nothing.bool()
    if wanted & ops.ENTROPY:
        moment = more.pop(0)
        moment = _in_order(torch.where(scale == 0, 0.0, scale * (moment + sums * gap)))
        entropy = per_row(log_sum - moment / sum_exp)
    if wanted & ops.FLAGS["log_sum_sq_probs"]:
        log_sum_sq = per_row(_in_order(more.pop(0) * scale * scale).log() - 2 * log_sum)
    if wanted & ops.FLAGS["mean_logits"]:
        mean_logits = per_row(_in_order(more.pop(0)) / support)
    if wanted & ops.FLAGS["is_top1"]:
        first = (maxima == row_max).to(torch.uint8).argmax(0)  # the first rank with the maximum has its first column
        is_top1 = live & (more.pop(0).gather(0, first[None])[0] != 0) & row_max.isfinite()
    sums = per_row(row_max), per_row(sum_exp)
    return RowStats(per_row(logp), *sums, entropy, log_sum_sq, mean_logits, is_top1, *rest)


def _in_order(x):
    """Returns the sum over ranks, first to last, because the order of torch's own sum may depend on the shape."""
    total = x[0]
    for part in x[1:]:
        total = total + part
    return total


def token_stats_backward(
    shard,
    backend,
    dlogp,
    dentropy,
    logits,
    targets,
    temperature,
    ignore_index,
    vocab_mask,
    row_max,
    sum_exp,
    entropy,
    out,
):
    """Returns the gradient of this rank's columns; no communication."""
    local, _ = local_targets(shard, targets, ignore_index)
    if vocab_mask is not None and dlogp is not None:
        # The owner's kernel makes nothing of such a target, and the kernels of the other ranks do not see it.
        dlogp = torch.where(_outside(targets, ignore_index, vocab_mask), 0.0, dlogp)
    rows = RowBatch(logits, local, temperature, ignore_index, local_mask(shard, vocab_mask))
    saved = SavedRows(row_max, sum_exp, entropy)
    return ops.run("token_stats_backward", backend, Upstream(dlogp, dentropy), rows, saved, out)


def divergence(shard, rows, numbers, weight, out):
    """Returns the DivergenceRows of whole rows from this rank's columns of both models; three collectives, or four.

    In plain torch, because no kernel stops between a row's sums and its divergence. ``rows``: with the column behind
    the shard's own, in both models. ``numbers``: kind and beta. ``weight``, ``out``: of the gradient and its memory;
    None where none is wanted.
    """
    logits, targets, temperature, ignore_index, vocab_mask, teacher = rows
    group, real, live = shard.process_group(), real_dtype(logits.dtype), targets != ignore_index
    keep = local_mask(shard, vocab_mask)
    factor = temperature[:, None] if isinstance(temperature, torch.Tensor) and temperature.dim() else temperature
    parts, columns = [], []
    for x in (logits, teacher):
        x = torch.where(live[:, None], x.to(real), 0.0)
        x = x if keep is None else torch.where(keep, x, -torch.inf)
        x[:, -1] = -torch.inf  # a column of no mass, which a shard without a column has, too
        row_max = x.amax(-1)
        # No difference of infinities, because a shard may have no column in the support.
        from_max = x - torch.where(row_max == -torch.inf, 0.0, row_max)[:, None]
        parts += [row_max, (from_max / factor).exp().sum(-1)]
        columns.append(x)
    everyone = all_gather(torch.stack(parts), group)
    student, other = (
        _log_softmax(x, factor, *everyone[:, at : at + 2].unbind(1)) for x, at in zip(columns, (0, 2), strict=True)
    )
    value, slope = terms(*numbers, student, other, lambda x: _in_order(all_gather(x, group)))
    if out is not None:
        moves = (live & (weight != 0))[:, None]
        slope = torch.where(moves, slope * weight[:, None] / factor, 0.0)
        out.copy_(slope if keep is None else torch.where(keep, slope, 0.0))
    return DivergenceRows(torch.where(live, value, 0.0), out)


def topk_divergence(shard, backend, rows, teacher, weight, out):
    """Returns the DivergenceRows of whole rows from this rank's columns of the student; two collectives.

    ``teacher``: an ``ops.Teacher`` of top log-probabilities, the same on every rank. One collective completes the
    statistics of the rows, and one brings every rank the student's logits at the ids, of which each lies on one rank.
    What remains is arithmetic of ``K + 1`` numbers per row, which every rank does alike.
    """
    group, real = shard.process_group(), real_dtype(rows.logits.dtype)

    def statistics(rows, wanted):
        return token_stats(shard, backend, *rows[:5], wanted)

    def backward(upstream, rows, saved, memory):
        return token_stats_backward(shard, backend, *upstream[:2], *rows[:5], *saved[:3], memory)

    def column_of(ids):
        # The ids of other shards share the column behind the last, which enters no matmul.
        here = (ids >= shard.start) & (ids < shard.start + shard.columns)
        return torch.where(here, ids - shard.start, shard.columns)

    def complete(ids, chosen):
        # An id that no rank has (possible on an accelerator, where ids are not checked) makes its row NaN.
        absent = torch.where((ids >= 0) & (ids < shard.vocab), -torch.inf, torch.nan)
        own = torch.where(column_of(ids) < shard.columns, chosen.to(real), absent.to(real))
        return all_gather(own, group).amax(0)

    passes, places = (statistics, backward), (column_of, complete)
    return topk_of_rows(rows, *teacher, weight, out, passes=passes, places=places)


def _log_softmax(x, temperature, maxima, sums):
    """Returns log-probabilities from the row maxima and the sums of exponentials of every rank, ``[ranks, rows]``."""
    row_max = maxima.amax(0)
    of_rows = temperature.reshape(-1) if isinstance(temperature, torch.Tensor) else temperature
    scale = torch.where(maxima == -torch.inf, 0.0, ((maxima - row_max) / of_rows).exp())
    return (x - row_max[:, None]) / temperature - _in_order(sums * scale).log()[:, None]
