"""Divergences of two models over the vocabulary in plain torch: the definition of correct for the op ``divergence``.

``P`` is the student, ``Q`` the teacher, over outcomes ``o``: the columns of the vocabulary, or the teacher's top ones
and one more for all others.
"""

import math

import torch

from rlkernels.backends.protocol import DivergenceRows, RowBatch, SavedRows, Upstream, check_rows, real_dtype

CHUNK_BYTES = 16 * 2**20
"""Bytes of one temporary of the arithmetic: rows are worked on so many at a time."""


def divergence(rows, kind, beta, weight, out=None, unless=None):
    """Computes the divergence of each row from ``rows.ref_logits``, and the gradient of the logits.

    Of everything in the dtype of the arithmetic only a chunk of rows exists at a time.
    """
    logits, targets, temperature, ignore_index, vocab_mask, teacher = rows
    targets = targets.clone() if targets.device.type == "cpu" else targets
    vocab, count = logits.shape[-1], targets.shape[0]
    vocab_mask = vocab_mask if vocab_mask is None else vocab_mask.contiguous()
    check_rows(targets, vocab, ignore_index, temperature)
    live, real = targets != ignore_index, real_dtype(logits.dtype)
    value = logits.new_empty(count, dtype=real)
    gradient = _memory(logits, count, weight, out)
    size = max(1, CHUNK_BYTES // (vocab * real.itemsize))
    for start in range(0, count, size):
        here = slice(start, min(start + size, count))
        alive, factor = live[here, None], temperature
        if isinstance(temperature, torch.Tensor):
            factor = torch.where(live[here], temperature[here], 1.0)[:, None]
        keep = vocab_mask if vocab_mask is None or vocab_mask.dim() == 1 else vocab_mask[here]
        student, other = (_log_softmax(_part(x, here), alive, keep, factor, real) for x in (logits, teacher))
        distance, slope = terms(kind, beta, student, other)
        value[here] = torch.where(live[here], distance, 0.0)
        if weight is not None:
            moves = live[here] & (weight[here] != 0)
            slope = torch.where(moves[:, None], slope * weight[here, None] / factor, 0.0)
            if keep is not None:  # 0 outside of the support, also in a row whose statistics are NaN
                slope = torch.where(keep, slope, 0.0)
            _store(gradient, here, slope, unless)
    return DivergenceRows(value, _given(gradient, out))


def topk_divergence(rows, ids, logprobs, kind, beta, weight, out=None, unless=None, *, passes, places=None):
    """Computes the same for a teacher of whom the ``K`` likeliest ids and their log-probabilities are known,
    ``[T, K]``.

    All other columns are one outcome. An entry of log-probability -inf stands for nothing. ``passes``: ``token_stats``
    and ``token_stats_backward`` of a backend. ``places``: where the vocabulary lies in parts, a function from ids to
    columns of ``logits``, and one that fills in the logits at the ids of other parts; else an id is its column.
    """
    statistics, backward = passes
    logits, targets, temperature, ignore_index, vocab_mask, _ = rows
    live, real = targets != ignore_index, real_dtype(logits.dtype)
    ids, logprobs = torch.where(live[:, None], ids.long(), 0), torch.where(live[:, None], logprobs.double(), -math.inf)
    known = logprobs > -math.inf
    # An entry that stands for nothing repeats the likeliest one: its id is then written twice with one value.
    likeliest = logprobs.argmax(-1, keepdim=True)
    ids = torch.where(known, ids, ids.gather(1, likeliest))
    targets = torch.where(live, ids.gather(1, likeliest)[:, 0].to(targets.dtype), targets)
    rows = RowBatch(logits, targets, temperature, ignore_index, vocab_mask)
    stats = statistics(rows, 0)
    factor = temperature
    if isinstance(temperature, torch.Tensor):
        factor = torch.where(live, temperature, 1.0).double()[:, None]
    column_of, complete = (None, None) if places is None else places
    columns = ids if column_of is None else column_of(ids)
    chosen = logits.gather(-1, columns.view(*logits.shape[:-1], ids.shape[1])).view(ids.shape)
    chosen = (chosen if complete is None else complete(ids, chosen)).double()
    student = (chosen - stats.row_max.double()[:, None]) / factor - stats.sum_exp.double().log()[:, None]
    least = torch.finfo(real).eps
    outcomes = [_with_tail(torch.where(known, x, -math.inf), least) for x in (student, logprobs)]
    distance, slope = terms(kind, beta, *outcomes)
    value = torch.where(live, distance, 0.0).to(real)
    if weight is None:
        return DivergenceRows(value, logits.new_empty((0, 0)))
    # Every other column has the slope p times that of the tail over its mass. The statistics' own backward writes
    # -dlogp p there.
    moves = live & (weight != 0)
    rest = torch.where(moves, slope[:, -1] / outcomes[0][:, -1].exp() * weight, 0.0)
    gradient = _memory(logits, targets.shape[0], weight, out)
    kept = None if unless is None else gradient.clone()
    gradient = backward(Upstream((-rest).to(real)), rows, SavedRows(stats.row_max, stats.sum_exp, None), gradient)
    at_ids = torch.where(moves[:, None], slope[:, :-1] * weight[:, None] / factor, 0.0)
    at_ids = torch.where(known, at_ids, at_ids.gather(1, likeliest))
    gradient.view(ids.shape[0], logits.shape[-1]).scatter_(1, columns, at_ids.to(gradient.dtype))
    if kept is not None:
        gradient.copy_(torch.where(unless == 1.0, kept, gradient))
    return DivergenceRows(value, _given(gradient, out))


def terms(kind, beta, student, teacher, total=None):
    """Computes the divergence of each row, and its derivative by the logits of the student.

    ``student``, ``teacher``: log-probabilities of the outcomes, the last dimension. An outcome without mass counts for
    nothing where its mass is a factor. ``total``: adds up the sums of rows whose other outcomes lie elsewhere.
    """
    p, q = student.exp(), teacher.exp()

    def expected(mass, x):
        found = torch.where(mass == 0, 0.0, mass * x).sum(-1)
        return found if total is None else total(found)

    if kind in ("forward_kl", "cross_entropy"):
        inner = -student if kind == "cross_entropy" else teacher - student
        mass = q.sum(-1, keepdim=True)
        return expected(q, inner), p * (mass if total is None else total(mass)) - q
    if kind == "reverse_kl":
        distance = expected(p, student - teacher)
        return distance, torch.where(p == 0, 0.0, p * (student - teacher - distance[..., None]))
    mixture = torch.logaddexp(student + math.log1p(-beta), teacher + math.log(beta))
    own, others = expected(p, student - mixture), expected(q, teacher - mixture)
    slope = torch.where(p == 0, 0.0, p * (student - mixture - own[..., None]))
    return beta * others + (1.0 - beta) * own, (1.0 - beta) * slope


def _with_tail(logprobs, least):
    """Returns log-probabilities with that of all other outcomes behind them, ``least`` of it at the least."""
    tail = (1.0 - logprobs.exp().sum(-1, keepdim=True)).clamp(min=least)
    return torch.cat([logprobs, tail.log()], -1)


def _log_softmax(x, alive, keep, temperature, real):
    x = torch.where(alive, x.to(real).contiguous(), 0.0)  # torch sums in the order of memory
    if keep is not None:
        x = torch.where(keep | ~alive, x, -math.inf)
    x = (x - x.amax(-1, keepdim=True)) / temperature
    return x - x.exp().sum(-1, keepdim=True).log()


def _part(x, here):
    """Returns some rows of ``[T, V]`` or ``[B, L, V]``, of which nothing else is copied."""
    if x.dim() == 2:
        return x[here]
    row = torch.arange(here.start, here.stop, device=x.device)
    return x[row // max(x.shape[1], 1), row % max(x.shape[1], 1)]


def _memory(logits, count, weight, out):
    """Returns the rows that take the gradient: those of ``out`` where it is a matrix."""
    if weight is None:
        return logits.new_empty((0, 0))
    return logits.new_empty((count, logits.shape[-1])) if out is None or out.dim() != 2 else out


def _store(gradient, here, slope, unless):
    slope = slope.to(gradient.dtype)
    gradient[here] = slope if unless is None else torch.where(unless == 1.0, gradient[here], slope)


def _given(gradient, out):
    return gradient if out is None or gradient is out else out.copy_(gradient.view(out.shape))
