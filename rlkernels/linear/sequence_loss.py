"""The policy loss of whole sequences, whose ratio is a sequence's, over chunks of the head."""

from typing import NamedTuple

import torch

from rlkernels.linear.chunked_loss import chunked_loss, detached_for_loss, differentiable
from rlkernels.linear.sequence_chunks import SequencePlan, WholeBatchPlan, plan_sequences
from rlkernels.linear.token_loss import PolicyTerms
from rlkernels.losses.kl_penalty import KLSequences
from rlkernels.losses.policy_ratio import ratio_term, with_current
from rlkernels.losses.token_weights import TokenWeights
from rlkernels.objectives import OBJECTIVES
from rlkernels.sequences import segment_ids, sums


class SequenceLoss(NamedTuple):
    """The ChunkedLoss of whole sequences: a policy loss whose ratio is a sequence's."""

    caller: str
    terms: PolicyTerms
    plan: SequencePlan | WholeBatchPlan
    ratio_level: str
    live: torch.Tensor  # shaped as the caller's targets
    cu_seqlens: torch.Tensor | None
    needs_entropy: bool

    def loss_of_chunk(self, rows, stats, first, last):
        terms = self.terms.at(rows.index)
        live = rows.live(stats.logp) & self.live.reshape(-1)[rows.index]
        loss = ratio_term(
            self.caller,
            OBJECTIVES[terms.objective],
            stats.logp,
            with_current(terms.columns, stats.logp),
            terms.params,
            TokenWeights(terms.weight),
            live,
            self.plan.cu_seqlens(first, last),
            self.ratio_level,
            terms.clamp,
        )
        sequences = None
        if self.terms.kl_sequences is not None:
            sequences = KLSequences(live, self.plan.cu_seqlens(first, last), self.ratio_level)
        return loss + terms.other_terms(stats, sequences)

    def gradient_scale(self):
        sequences = self.live.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1
        if self.ratio_level != "sequence_sum" or not sequences:
            return self.terms.gradient_scale()
        # The derivative of a sum by each of its tokens is that of the whole sequence.
        return sums(self.terms.weight.view(self.live.shape), self.live, self.cu_seqlens).abs().amax()


def sequence_loss(head, terms, live, cu_seqlens, ratio_level, needs_entropy, backend):
    """Returns the loss of whole sequences, differentiable in the head, and log-probabilities and entropies ``[T]``.

    Raises:
        ValueError: rows that are in no sequence; as ``detached_for_loss`` and ``plan_sequences``.
    """
    shape = live.shape
    if cu_seqlens is None and len(shape) != 2:
        raise ValueError(
            f"{head.caller}: ratio_level {ratio_level!r} needs hidden [B, L, H], or packed [T, H] with cu_seqlens; "
            f"got targets of shape {tuple(shape)}"
        )
    rows = live.reshape(-1) | terms.live()  # those of a KL term with a mask of its own, too
    if cu_seqlens is None:
        count, sequence = shape[0], torch.arange(rows.shape[0], device=live.device) // max(shape[-1], 1)
    else:
        count, sequence = cu_seqlens.shape[0] - 1, segment_ids(cu_seqlens, rows.shape[0])
    work = detached_for_loss(head, rows)
    plan = plan_sequences(rows, sequence, count, bound=work.max_live_tokens, zero_gradient=terms.zero_gradient())
    loss = SequenceLoss(head.caller, terms, plan, ratio_level, live, cu_seqlens, needs_entropy)
    return differentiable(head, backend, chunked_loss, work, plan, loss)
