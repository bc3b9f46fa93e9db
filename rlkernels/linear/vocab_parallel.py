"""A head whose rows are spread over a process group: every rank has the hidden states and some columns of the logits.

Each rank reduces its own columns; what travels is a few numbers per token and rank, in one collective, added in the
order of the vocabulary on every rank: the result is the same everywhere, and does not depend on the rows that came
along.
"""

from typing import NamedTuple

import torch

from rlkernels import checks, ops
from rlkernels.backends.protocol import RowBatch, RowStats, SavedRows, Upstream
from rlkernels.linear.rank_agreement import gathered


class Shard(NamedTuple):
    """The columns of the logits that are here. ``group``: the process group's name, by which an op can find it."""

    group: str
    start: int
    columns: int
    vocab: int

    def process_group(self):
        return torch.distributed.distributed_c10d._resolve_process_group(self.group)


def shard(where, weight, process_group, vocab_start, valid_vocab):
    """The columns that ``weight`` ``[V_local, H]`` stands for, or None without a group."""
    if process_group is None:
        if vocab_start is not None:
            raise ValueError(f"{where}: vocab_start says where a shard begins; it needs process_group")
        return None
    distributed = torch.distributed
    rank, ranks, rows = distributed.get_rank(process_group), distributed.get_world_size(process_group), weight.shape[0]
    if rank < 0:
        raise ValueError(f"{where}: this process is not in process_group, so it has no vocabulary shard")
    if vocab_start is None:
        start, vocab = rank * rows, ranks * rows if valid_vocab is None else valid_vocab
    elif valid_vocab is None:
        raise ValueError(
            f"{where}: with vocab_start the shards may differ in size; pass the whole vocabulary as valid_vocab"
        )
    else:
        start, vocab = checks.integer(where, "vocab_start", vocab_start), valid_vocab
    return Shard(process_group.group_name, start, max(0, min(rows, vocab - start)), vocab)


def absent(dtype):
    """The number that stands in the column behind a shard's own: below every logit but -inf, so that a row of -inf is
    told from a row with a NaN.
    """
    return torch.finfo(dtype).min


def local_targets(shard, targets, ignore_index):
    """Targets as columns of this shard: those of other shards point to the column behind the last, which holds
    ``absent``.
    """
    here = (targets >= shard.start) & (targets < shard.start + shard.columns)
    return torch.where(
        targets == ignore_index, ignore_index, torch.where(here, targets - shard.start, shard.columns)
    ), here


def token_stats(shard, backend, x, targets, temperature, ignore_index, wanted):
    """``token_stats`` of whole rows from this rank's columns ``x``; one collective."""
    local, here = local_targets(shard, targets, ignore_index)
    rows = RowBatch(x, local, temperature, ignore_index)
    stats = ops.run("token_stats", backend, rows, wanted & ~ops.FLAGS["mean_logits"])
    logp, shift, sum_exp, entropy, log_sum_sq, _, is_top1, *rest = stats
    # Then the column that is not ours counts as 1.
    live, lowest = targets != ignore_index, (shift == absent(x.dtype)).to(shift.dtype)
    own = sum_exp - lowest
    parts = [torch.where(own == 0, -torch.inf, shift), own, torch.where(here, logp + sum_exp.log(), 0.0)]
    if wanted & ops.ENTROPY:  # sum_v e^(z_v - shift) (z_v - shift)
        parts += [sum_exp * (sum_exp.log() - entropy)]
    if wanted & ops.FLAGS["log_sum_sq_probs"]:
        parts += [log_sum_sq.exp() * sum_exp * sum_exp - lowest]
    if wanted & ops.FLAGS["mean_logits"]:
        parts += [(x[:, :-1].sum(-1, dtype=torch.float64) / temperature).to(shift.dtype)]
    if wanted & ops.FLAGS["is_top1"]:
        parts += [(is_top1 & here).to(shift.dtype)]
    parts += [here.to(shift.dtype)]
    return _combine(gathered(torch.stack(parts), shard.process_group()), live, temperature, shard.vocab, wanted, rest)


def _combine(gathered, live, temperature, vocab, wanted, rest):
    shifts, sums, targets, *more, here = gathered.unbind(1)
    # A NaN on one rank is in its sum too, so it does not matter whether this maximum keeps it.
    shift = shifts.amax(0)
    gap = torch.where(sums == 0, -torch.inf, (shifts - shift) / temperature)
    scale = gap.exp()
    sum_exp = torch.where(shift == -torch.inf, torch.nan, _in_order(sums * scale))  # no finite logit in the row
    owned = here != 0
    log_sum = sum_exp.log()

    def per_row(x):
        return torch.where(live, x, 0.0)

    # On the owner's rank the target is measured from that rank's maximum; where no rank owns it (an accelerator,
    # unchecked) the row is NaN.
    centred = _in_order(
        torch.where(owned, targets + torch.where(targets == -torch.inf, 0.0, (shifts - shift) / temperature), 0.0)
    )
    logp = torch.where(owned.any(0), centred - log_sum, torch.nan)
    nothing = shift.new_empty(0)
    entropy, log_sum_sq, mean_logits, is_top1 = nothing, nothing, nothing, nothing.bool()
    if wanted & ops.ENTROPY:
        moment = more.pop(0)
        total = _in_order(torch.where(scale == 0, 0.0, scale * (moment + sums * gap)))
        entropy = per_row(log_sum - total / sum_exp)
    if wanted & ops.FLAGS["log_sum_sq_probs"]:
        log_sum_sq = per_row(_in_order(more.pop(0) * scale * scale).log() - 2 * log_sum)
    if wanted & ops.FLAGS["mean_logits"]:
        mean_logits = per_row(_in_order(more.pop(0)) / vocab)
    if wanted & ops.FLAGS["is_top1"]:
        first = (shifts == shift).to(torch.uint8).argmax(0)  # the first rank with the maximum has its first column
        is_top1 = live & (more.pop(0).gather(0, first[None])[0] != 0) & shift.isfinite()
    return RowStats(per_row(logp), per_row(shift), per_row(sum_exp), entropy, log_sum_sq, mean_logits, is_top1, *rest)


def _in_order(x):
    """Sum over ranks, first to last: torch's own order may depend on the shape."""
    total = x[0]
    for part in x[1:]:
        total = total + part
    return total


def token_stats_backward(
    shard, backend, dlogp, dentropy, x, targets, temperature, ignore_index, shift, sum_exp, entropy, out
):
    """The gradient of this rank's columns; no communication."""
    local, _ = local_targets(shard, targets, ignore_index)
    rows, saved = RowBatch(x, local, temperature, ignore_index), SavedRows(shift, sum_exp, entropy)
    return ops.run("token_stats_backward", backend, Upstream(dlogp, dentropy), rows, saved, out)
