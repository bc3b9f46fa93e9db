"""Whole answers of a batch: their rows, and losses of the summed log-probabilities of an answer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from rlkernels import ops
from rlkernels.checks import tokens as checks_tokens
from rlkernels.linear.chunked_loss import chunked_loss, detached_for_loss, differentiable
from rlkernels.linear.head import LinearHead
from rlkernels.linear.sequence_chunks import SequencePlan, WholeBatchPlan, plan_sequences
from rlkernels.linear.token_stats import head_logprobs, head_stats
from rlkernels.losses.token_weights import live_tokens
from rlkernels.sequences import segment_ids, sums, token_counts
from rlkernels.tracing import replaced


class Answers(NamedTuple):
    """A head, and for each row whether it is live and which of ``count`` answers it belongs to.

    ``offsets``: the ends of the answers.
    """

    head: LinearHead
    live: torch.Tensor
    answer: torch.Tensor
    offsets: torch.Tensor
    count: int
    row_weights: torch.Tensor | None = None
    watched: dict | None = None

    def sums(self, logp):
        """Returns the sum over each answer, ``[count]``.

        In float64, because a loss looks at small differences of large sums.
        """
        logp = logp.double() if self.row_weights is None else logp.double() * self.row_weights
        return sums(logp, self.live, self.offsets)

    def watching(self, *names):
        """Returns the answers whose chunks write these statistics of the live rows to ``watched``, ``[T]``."""
        like = self.head.hidden.new_zeros(self.live.shape, dtype=self.head.result_dtype())
        return replaced(self, watched={name: torch.zeros_like(like) for name in names})

    def statistics(self, *names):
        """Returns the log-probabilities ``[T]`` of the live rows, differentiable, and other statistics, detached."""
        stats = head_stats(self.head.without(~self.live), names, self.live.shape)
        return stats.logprobs, {name: getattr(stats, name).detach() for name in names}

    def weighing(self, row_weights):
        """Returns the answers whose sums weigh each row, float64 ``[T]``."""
        return replaced(self, row_weights=row_weights)

    def lengths(self):
        """Returns the number of live tokens of each answer, ``[count]``."""
        return token_counts(self.live, self.offsets)

    def logprobs(self):
        """Returns the log-probabilities ``[T]`` of the live rows, differentiable, by four matmuls."""
        return head_logprobs(self.head.without(~self.live))

    def rounded(self, result):
        """Returns a loss, or a loss and its metrics, in the dtype of the losses of a head."""
        if isinstance(result, tuple):
            return self.rounded(result[0]), {name: self.rounded(x) for name, x in result[1].items()}
        return result.to(self.head.result_dtype())

    def where(self, kept):
        """Returns the answers without the rows where ``kept`` does not hold; these enter no matmul."""
        return replaced(self, live=self.live & kept)

    def chunked(self, place, per_unit, loss, *fields):
        """Returns the loss of a subclass of AnswerLoss, whole units per chunk, and the log-probabilities ``[T]``.

        Args:
            place: int ``[T]``, the position of a row's answer in the order of the units, ``per_unit`` answers to a
                unit. loss: the class. fields: its own.
        """
        work = detached_for_loss(self.head, self.live)
        plan = plan_sequences(self.live, place, self.count, per_unit, work.max_live_tokens)
        backend = ops.serving("fused_policy", self.head.hidden)
        of_answers = loss(plan, self.count, self.row_weights, self.watched, *fields)
        loss, logp, _ = differentiable(self.head, backend, chunked_loss, work, plan, of_answers)
        return loss, logp

    def in_one_chunk(self, of_batch):
        """Returns the same for ``of_batch(logps)``, a loss that looks at all answers at once."""
        return self.chunked(self.answer, max(self.count, 1), BatchLoss, of_batch)


@dataclass
class AnswerLoss:
    """A ChunkedLoss of the summed log-probabilities of ``count`` answers; a base class.

    ``row_weights``: of each token in the sum, ``[T]``, or None. ``watched``: as a ChunkedLoss may have it.
    """

    plan: SequencePlan | WholeBatchPlan
    count: int
    row_weights: torch.Tensor | None
    watched: dict | None
    needs_entropy: ClassVar[bool] = False

    def loss_of_answers(self, logps, first, last):
        """Returns the loss of the units ``[first, last)``, differentiable.

        logps: the summed log-probabilities of their answers, in the order of the plan.
        """
        raise NotImplementedError

    def loss_of_chunk(self, rows, stats, first, last):
        logp = stats.logp.double()
        if self.row_weights is not None:
            logp = logp * self.row_weights[rows.index]
        logps = sums(logp, rows.live(stats.logp), self.plan.cu_seqlens(first, last))
        return self.loss_of_answers(logps, first, last)

    def gradient_scale(self):
        return 1.0 / max(self.count, 1)


@dataclass
class BatchLoss(AnswerLoss):
    """A loss that looks at all answers at once: ``of_batch(logps)``."""

    of_batch: Callable

    def loss_of_answers(self, logps, first, last):
        return self.of_batch(logps)


def answers_of(head, hidden, targets, mask, cu_seqlens):
    """Returns the Answers that the rows of a head belong to; ``hidden``, ``targets``: the caller's.

    Raises:
        TypeError, ValueError: a mask or offsets that do not fit; hidden states that hold no answers.
    """
    caller = head.caller
    if hidden.dim() != (3 if cu_seqlens is None else 2):
        raise ValueError(
            f"{caller}: hidden has shape {tuple(hidden.shape)}, expected [B, L, H], or [T, H] together with cu_seqlens"
        )
    targets = checks_tokens.holding(caller, targets, head.ignore_index)
    like = targets.new_empty(targets.shape, dtype=head.result_dtype())
    live = live_tokens(caller, like, mask) & (targets != head.ignore_index)
    rows = torch.arange(targets.numel(), device=targets.device)
    if cu_seqlens is None:
        count, answer = hidden.shape[0], rows // max(hidden.shape[1], 1)
        offsets = torch.arange(count + 1, device=targets.device) * hidden.shape[1]
    else:
        offsets = checks_tokens.segments(caller, cu_seqlens, targets, mask=mask)
        count, answer = offsets.shape[0] - 1, segment_ids(offsets, targets.shape[0])
    return Answers(head, live.reshape(-1), answer, offsets, count)
