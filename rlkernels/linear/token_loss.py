"""Losses of tokens: a weighted objective with a KL and an entropy term, in one launch per chunk."""

from typing import NamedTuple

import torch

from rlkernels import ops
from rlkernels.backends.protocol import PolicyInputs, RowBatch
from rlkernels.linear.chunked_loss import ChunkLoop, chunked_loss, detached_for_loss, differentiable
from rlkernels.linear.chunking import live_rows, rows_by_gradient
from rlkernels.linear.sequence_chunks import RowPlan
from rlkernels.losses.kl_penalty import KLSequences, kl_sum
from rlkernels.losses.kl_term import PLAIN, KLObjective
from rlkernels.losses.policy_ratio import SQUARE, Clamp, ratio_term, with_current
from rlkernels.losses.token_weights import TokenWeights
from rlkernels.losses.weighted_sum import weighted_sum
from rlkernels.objectives import OBJECTIVES
from rlkernels.objectives.zero_gradient import still_where_zero


class PolicyTerms(NamedTuple):
    """A loss of tokens: ``sum_t weight_t l_t + kl_weight_t KL_t - entropy_weight_t H_t``; everything ``[T]``.

    ``kl``, ``kl_params``: a ``KLObjective``. ``kl_old_logp``: None where no ratio weighs the KL.
    A column that is None is the current policy. ``square_weight``: of half the squared log-ratio to ``square_logp``.
    """

    objective: str
    columns: list
    params: tuple | torch.Tensor
    weight: torch.Tensor
    entropy_weight: torch.Tensor | None
    kl: str | None
    ref_logp: torch.Tensor | None
    kl_weight: torch.Tensor | None
    kl_params: tuple = ()
    kl_old_logp: torch.Tensor | None = None
    clamp: Clamp | None = None
    square_logp: torch.Tensor | None = None
    square_weight: torch.Tensor | None = None
    kl_sequences: KLSequences | None = None

    def live(self):
        """Returns bool ``[T]``: the rows with a weight in any term."""
        live = self.weight != 0
        for weight in (self.entropy_weight, self.kl_weight, self.square_weight):
            live = live if weight is None else live | (weight != 0)
        return live

    def zero_gradient(self):
        """Returns bool ``[T]``: the rows that provably have no gradient, or None where there is no such proof.

        They have no advantage, and the loss has neither a KL nor an entropy term.
        """
        others = self.kl, self.entropy_weight, self.square_weight
        if any(x is not None for x in others) or not still_where_zero(self.objective, "advantage"):
            return None
        return self.columns[OBJECTIVES[self.objective].columns.index("advantage") - 1] == 0

    def gradient_scale(self):
        """Returns the largest weight, by which a gradient of 1 per token is multiplied."""
        weights = [
            x.abs().amax()
            for x in (self.weight, self.entropy_weight, self.kl_weight, self.square_weight)
            if x is not None and x.numel()
        ]
        return torch.stack(weights).amax() if weights else 1.0

    def at(self, index):
        """Returns the terms of the rows ``index``."""
        return PolicyTerms(
            self.objective,
            [None if c is None else c[index] for c in self.columns],
            self.params,
            *(x[index] if isinstance(x, torch.Tensor) else x for x in self[3:]),
        )

    def in_one_launch(self):
        """Tells whether the kernels over rows serve the loss.

        They hold no clamp, no KL term of other options, and one term beside the objective.
        """
        plain = self.clamp is None and self.square_weight is None and (self.kl is None or self.kl in PLAIN)
        return plain and all(c is not None for c in self.columns)

    def other_terms(self, stats, sequences=None):
        """Returns what is added to the objective: the KL, the squared log-ratio and the entropy term.

        Differentiable in ``stats``. ``sequences``: of these rows, where their ratio weighs the KL.
        """
        total = stats.logp.new_zeros(())
        if self.square_weight is not None:
            total = total + weighted_sum(SQUARE, stats.logp, [self.square_logp], (), TokenWeights(self.square_weight))
        if self.kl is not None:
            columns = self.ref_logp, self.kl_old_logp, TokenWeights(self.kl_weight), sequences
            total = total + kl_sum(KLObjective(self.kl, self.kl_params), stats.logp, *columns)
        if self.entropy_weight is not None:
            total = total + weighted_sum("nll", stats.entropy, [], (), TokenWeights(self.entropy_weight))
        return total


class TokenLoss(NamedTuple):
    """The ChunkedLoss of tokens, for a head over a process group and for terms that no kernel holds."""

    terms: PolicyTerms
    needs_entropy: bool

    def loss_of_chunk(self, rows, stats, first, last):
        terms = self.terms.at(rows.index)
        columns, weights = with_current(terms.columns, stats.logp), TokenWeights(terms.weight)
        loss = ratio_term(
            "linear_policy_loss",
            OBJECTIVES[terms.objective],
            stats.logp,
            columns,
            terms.params,
            weights,
            None,
            None,
            "token",
            terms.clamp,
        )
        return loss + terms.other_terms(stats)

    def gradient_scale(self):
        return self.terms.gradient_scale()


def check_batch(caller, hidden):
    """Raises ValueError for hidden states of a single row: a loss takes a batch."""
    if hidden.dim() < 2:
        raise ValueError(
            f"{caller}: hidden has shape {tuple(hidden.shape)}, expected [T, H] or [B, L, H]; unsqueeze the one row"
        )


def token_loss(head, terms, needs_entropy, backend):
    """Returns the loss of PolicyTerms, differentiable in the head, and its log-probabilities and entropies ``[T]``.

    Raises:
        IndexError, ValueError: as ``detached_for_loss`` and ``live_rows``.
    """
    work = detached_for_loss(head, terms.live() & (head.targets != head.ignore_index))
    if work.shard is None and terms.in_one_launch():
        return differentiable(head, backend, _fused_loss, work, terms)
    plan = RowPlan(live_rows(work.targets != work.ignore_index, work.max_live_tokens))
    return differentiable(head, backend, chunked_loss, work, plan, TokenLoss(terms, needs_entropy))


@torch.no_grad()
def _fused_loss(head, terms, backend, needs):
    """Returns the LossAndGradients by one launch per chunk: statistics, loss and the gradient of the logits."""
    live, zero_gradient = terms.live() & (head.targets != head.ignore_index), terms.zero_gradient()
    if zero_gradient is None or head.max_live_tokens is not None:
        selections = [(live_rows(live, head.max_live_tokens), any(needs))]
    else:  # also where nothing needs a gradient, because in another order the loss would have other bits
        selections = list(zip(rows_by_gradient(live, zero_gradient), (any(needs), False), strict=True))
    loop = ChunkLoop(head, needs, [len(rows) for rows, _ in selections], backend, terms, keeps=True)
    for rows, has_gradient in selections:
        for part in loop.parts(rows):
            _launch(loop, part, terms, has_gradient)
    return loop.result()


def _launch(loop, rows, terms, has_gradient):
    """Adds the loss of one chunk and its gradients."""
    logits, hidden = loop.logits(rows)
    weight, entropy_weight, kl_weight = (
        loop.scaled(rows.select(x)) for x in (terms.weight, terms.entropy_weight, terms.kl_weight)
    )
    out = loop.projection.gradient_buffer(logits) if has_gradient else None
    policy = PolicyInputs(
        terms.objective,
        [rows.select(c) for c in terms.columns],
        terms.params,
        weight,
        entropy_weight,
        terms.kl,
        rows.select(terms.ref_logp),
        kl_weight,
    )
    batch = RowBatch(logits, *loop.head.row_arguments(rows))
    of_rows = ops.run_fused(loop.backend, batch, policy, has_gradient, out)
    loop.loss += of_rows.loss if loop.scale is None else of_rows.loss / loop.scale
    loop.logp[rows.index], loop.entropy[rows.index] = of_rows.logp, of_rows.entropy
    if has_gradient:
        moves = of_rows.dlogp != 0
        moves = moves if entropy_weight is None else moves | (entropy_weight != 0)
        loop.add(rows, out, logits, hidden, moves)
