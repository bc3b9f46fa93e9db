"""A loss over chunks of rows that makes its gradients in the forward: three matmuls, and no logits made twice.

A loss of whole sequences or pairs is scored when all rows of a unit are in the chunk. A unit that outgrows a chunk is
multiplied once more: four matmuls. Over a process group every loss is scored this way, because a row's statistics are
complete only when the ranks have exchanged theirs.
"""

import functools
import operator
from typing import NamedTuple, Protocol

import torch

from rlkernels import ops
from rlkernels.backends.protocol import RowStats
from rlkernels.linear.gradients import Gradients
from rlkernels.linear.head import without_autocast
from rlkernels.linear.projection import keeps_gradients, planned_projection
from rlkernels.linear.rank_agreement import meeting, pattern, ranks_compare
from rlkernels.linear.sequence_chunks import RowPlan
from rlkernels.tracing import replaced


class ChunkStats(NamedTuple):
    """Log-probabilities and entropies of the rows of a chunk, ``[m]``; the entropies are None unless the loss needs
    them.
    """

    logp: torch.Tensor
    entropy: torch.Tensor | None


class ChunkedLoss(Protocol):
    """A loss that is a sum over units, of which a chunk scores some.

    ``needs_entropy``: whether the statistics of a chunk hold entropies. A loss may have ``watched``, a dict from the
    name of a statistic to memory ``[T]`` that takes it.
    """

    needs_entropy: bool

    def loss_of_chunk(self, rows, stats, first, last) -> torch.Tensor:
        """Returns the loss of the units ``[first, last)``, differentiable in ``stats``.

        rows: RowSelection of these units. stats: ChunkStats of these rows.
        """

    def gradient_scale(self) -> torch.Tensor | float:
        """Returns the size of the largest derivative of the loss by a log-probability, more or less.

        Asked only where the gradient of the logits is rounded to fp16.
        """


class LossAndGradients(NamedTuple):
    """``gradients``: of hidden states, weight and bias, None where frozen.

    ``logp``, ``entropy``: ``[T]``, 0 in the rows that were not worked on.
    """

    loss: torch.Tensor
    gradients: tuple
    logp: torch.Tensor
    entropy: torch.Tensor


class ChunkLoop:
    """State that all chunks of a call share: the projection with its buffer, the sums, and the outputs per row.

    Args:
        needs: which of hidden states, weight and bias get a gradient. counts: the rows that ``parts`` is asked for.
        loss: asked for ``gradient_scale()``. keeps: let gradients wait for those of later chunks, where they can.
    """

    def __init__(self, head, needs, counts, backend, loss, keeps=False):
        self.head, self.needs, self.backend = head, needs, backend
        self.gradients = Gradients(head, needs, backend, keep_wide=True)
        self.keeps = keeps and keeps_gradients(head, backend, needs)
        self.projection = planned_projection(head, counts, backend, needs, self.keeps)
        narrow = self.projection.matmul.gradient_dtype == torch.float16
        self.scale = _loss_scale(loss.gradient_scale(), head) if narrow else None
        self.loss = torch.zeros((), dtype=torch.float64, device=head.hidden.device)
        self.logp, self.entropy = (
            torch.zeros(head.targets.shape, dtype=head.result_dtype(), device=head.hidden.device) for _ in range(2)
        )

    def parts(self, rows):
        """Returns the selected rows, cut into parts of at most one chunk."""
        return rows.cut(self.head.chunk_sizes(len(rows), self.keeps))

    def scaled(self, x):
        """Returns a weight or an upstream gradient times the loss scale, if there is one; None stays None."""
        return x if x is None or self.scale is None else x * self.scale

    def logits(self, rows):
        """Returns the logits of the selected rows, in the buffer, and their hidden states."""
        hidden = rows.hidden(self.head.hidden)
        return self.projection.logits(hidden)[: len(rows)], hidden

    def add(self, rows, dlogits, logits, hidden, has_gradient):
        """Adds to the gradients what ``dlogits`` of the selected rows gives.

        On a CPU, where the host knows ``has_gradient``, the rows without a gradient enter no matmul: the others close
        up in the buffers.
        """
        if has_gradient.device.type == "cpu" and not has_gradient.all():
            kept = has_gradient.nonzero()[:, 0]
            for buffer in {id(logits): logits, id(dlogits): dlogits}.values():
                for to, row in enumerate(kept.tolist()):
                    if to != row:
                        buffer[to].copy_(buffer[row])
            rows = rows.at(kept)
            hidden, dlogits, logits = hidden[kept], dlogits[: len(rows)], logits[: len(rows)]
        if len(rows):
            self.gradients.add(self.projection, rows, dlogits, logits, hidden)

    def result(self):
        self.gradients.finish(self.projection)
        gradients = self.gradients.summed() if any(self.needs) else (None, None, None)
        if self.scale is not None:
            for gradient in gradients:
                if gradient is not None:
                    gradient.div_(self.scale)
        return LossAndGradients(self.loss.to(self.head.result_dtype()), gradients, self.logp, self.entropy)


def _loss_scale(size, head):
    """Returns the power of two that brings ``size`` to between 1 and 2, as a tensor that the host does not read.

    Times this number the gradient of the logits is in reach of fp16, and dividing by it is exact.
    """
    size = head.hidden.new_full((), size, dtype=head.result_dtype()) if isinstance(size, float) else size
    usable = (size > 0) & (size < torch.inf)
    return torch.exp2(-torch.floor(torch.log2(torch.where(usable, size, 1.0))))


@torch.no_grad()
def chunked_loss(head, plan, loss, backend, needs):
    """Returns the LossAndGradients of a ChunkedLoss: autograd over a few numbers per row, matmuls for the rest.

    Args:
        head: of ``detached_for_loss``. plan: SequencePlan, WholeBatchPlan or RowPlan.
        needs: which of hidden states, weight and bias get a gradient.
    """
    of_rows = isinstance(plan, RowPlan)
    if of_rows:
        plan = plan.in_chunks(head.chunk_sizes(len(plan.selection), keeps_gradients(head, backend, needs)))
    chunks = [(first, last, plan.rows(first, last)) for first, last in plan.chunks(head.chunk_rows)]
    counts = [len(rows) for _, _, rows in chunks]
    if head.shard is not None:
        compare_ranks(head, counts, plan.offsets, needs, loss.needs_entropy)
    loop = ChunkLoop(head, needs, [len(plan.selection)] if of_rows else counts, backend, loss, keeps=of_rows)
    for first, last, rows in chunks:
        _work_on_units(loop, loss, rows, first, last, any(needs) and plan.has_gradient(first))
    return loop.result()


def _work_on_units(loop, loss, rows, first, last, has_gradient):
    """Adds the loss of the units ``[first, last)`` and its gradients; ``rows``: theirs."""
    parts = loop.parts(rows)
    watched = getattr(loss, "watched", None)
    wanted = (ops.ENTROPY if loss.needs_entropy else 0) | (0 if watched is None else _flags(watched))
    stats, buffered = _statistics(loop, parts, wanted)
    logp, row_max, sum_exp, entropy, *_ = stats
    for name, x in (watched or {}).items():
        x[rows.index] = getattr(stats, name).to(x.dtype)
    value, dlogp, dentropy = _score(
        loss, rows, logp, entropy if loss.needs_entropy else None, first, last, has_gradient
    )
    loop.loss += value
    loop.logp[rows.index] = logp
    if loss.needs_entropy:
        loop.entropy[rows.index] = entropy
    if not has_gradient:
        return
    end = len(rows)
    # From the last part back, because the buffer still holds its logits.
    for part in reversed(parts):
        here = slice(end - len(part), end)
        end -= len(part)
        logits, hidden = buffered or loop.logits(part)
        buffered = None
        upstream = [None if d is None else loop.scaled(d[here]).contiguous() for d in (dlogp, dentropy)]
        dlogits = loop.projection.dlogits(
            *upstream, logits, loop.head.row_arguments(part), [x[here] for x in (row_max, sum_exp, entropy)]
        )
        loop.add(part, dlogits, logits, hidden, torch.stack([d != 0 for d in upstream if d is not None]).any(0))


def _flags(watched):
    """Returns the bits of the statistics by these names."""
    return functools.reduce(operator.or_, (ops.FLAGS[name] for name in watched))


def _statistics(loop, parts, wanted):
    """Returns the RowStats of all parts, and the logits and hidden states of the last part."""
    statistics, buffered = [], None
    for part in parts:
        buffered = loop.logits(part)
        statistics.append(loop.projection.statistics(buffered[0], loop.head.row_arguments(part), wanted))
    if not parts:
        return RowStats.empty(loop.logp.new_empty(0), 0, wanted, False), None
    return RowStats(*(torch.cat(x) for x in zip(*statistics, strict=True))), buffered


def _score(loss, rows, logp, entropy, first, last, has_gradient):
    """Returns the loss of a chunk, and its derivatives by log-probabilities and entropies (None without these)."""
    with torch.set_grad_enabled(has_gradient):
        leaves = [x.detach().requires_grad_(has_gradient) for x in (logp, entropy) if x is not None]
        stats = ChunkStats(leaves[0], None if entropy is None else leaves[1])
        value = loss.loss_of_chunk(rows, stats, first, last)
        gradients = (
            torch.autograd.grad(value, leaves, allow_unused=True)
            if has_gradient and value.requires_grad
            else [None] * len(leaves)
        )
    dlogp = torch.zeros_like(logp) if gradients[0] is None else gradients[0]
    return value.detach(), dlogp, gradients[1] if len(gradients) > 1 else None


def compare_ranks(head, sizes, offsets, needs, needs_entropy, further=None):
    """Compares the ranks of a process group before anything that they do together.

    ``further``: returns facts and one sum more. It is called where ranks compare alone, because to sum is to wait for
    the device.
    """
    with meeting(head.caller, head.shard.process_group(), head.hidden.device) as now:
        if ranks_compare(head.hidden.device):
            facts, sums = head.in_common()
            sequences = None if offsets is None else pattern(offsets >= 0, offsets)
            facts += [
                ("rows of each chunk", sizes),
                ("digest of sequences", sequences),
                ("gradients of hidden, weight, bias", needs),
                ("entropy", needs_entropy),
            ]
            more, near = ([], []) if further is None else further()
            now.compare(head.shard[1:], [*facts, *more], [*sums, *near])


def differentiable(head, backend, function, *arguments):
    """Calls ``function(*arguments, backend, needs)`` and hands the gradients that it returns to autograd.

    ``needs``: which of the hidden states, the weight and the bias of ``head`` get a gradient. A second backward calls
    the function again.

    Returns:
        The loss, log-probabilities and entropies of the function's LossAndGradients.
    """
    inputs = head.hidden, head.weight, head.bias
    needs = tuple(x is not None and x.requires_grad and torch.is_grad_enabled() for x in inputs)

    def result():
        with without_autocast(head.hidden.device.type):  # it may be on in the backward too
            return function(*arguments, backend, needs)

    first = result()
    if not any(needs):
        return first.loss, first.logp, first.entropy
    return (
        ops.with_gradients(first.loss, first.gradients, lambda: result().gradients, backend, *inputs),
        first.logp,
        first.entropy,
    )


def detached_for_loss(head, live):
    """Detaches the head and replaces the targets of rows that are not ``live``, bool ``[T]``, by ``ignore_index``.

    Targets, temperature and vocabulary mask are copies, because a second backward works on them again.

    Raises:
        IndexError: on the CPU, a live target outside the vocabulary.
        ValueError: on the CPU, a temperature of a live row that is not positive.
    """
    temperature = head.temperature
    ignored = head.without(~live)
    head = replaced(
        ignored,
        hidden=head.hidden.detach(),
        weight=head.weight.detach(),
        bias=None if head.bias is None else head.bias.detach(),
        vocab_mask=None if head.vocab_mask is None else head.vocab_mask.clone(),
        temperature=temperature.clone() if ignored.temperature is temperature else ignored.temperature,
    )
    head.check_targets()
    return head
