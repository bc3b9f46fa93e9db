"""The KL term within a loss: its objective, its columns, and the weights of its tokens."""

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor

from rlkernels import checks, ops
from rlkernels.aggregation import takes
from rlkernels.backends.protocol import real_dtype
from rlkernels.logits_layout import dense
from rlkernels.losses.kl_term import KLObjective, KLTerm, named_objective
from rlkernels.losses.policy_arguments import column
from rlkernels.losses.token_weights import TokenWeights, counted_tokens, full_mask, live_mask, token_weights_of
from rlkernels.losses.weighted_sum import scaled_sum, weighted_sum
from rlkernels.sequences import means, spread, sums
from rlkernels.types import KL, Aggregation, ExactKL, Metrics, Normalizers, Number, PerToken, RatioLevel

IDS = ("group_ids", "rollout_ids")
"""The normalisers that say which sequences belong together."""


class KLSequences(NamedTuple):
    """The sequences whose ratio weighs a KL term; ``live``: bool, the tokens of the objective."""

    live: Tensor
    cu_seqlens: Tensor | None
    level: RatioLevel

    def reduced(self, x: Tensor) -> Tensor:
        """Returns the sum or the mean of a column over each sequence, at every token of it."""
        reduce = sums if self.level == "sequence_sum" else means
        return spread(reduce(x, self.live, self.cu_seqlens), torch.ones_like(self.live), self.cu_seqlens)


def kl_sum(
    objective: KLObjective,
    logp: Tensor,
    ref_logp: Tensor,
    old_logp: Tensor | None,
    weights: TokenWeights,
    sequences: KLSequences | None,
) -> Tensor:
    """Computes the weighted sum of a KL estimator, weighed by the ratio of a token or of its sequence."""
    others = objective.others(logp, ref_logp, old_logp)
    if sequences is None:
        return weighted_sum(objective.name, logp, others, objective.params, weights)
    fixed, now = logp.detach().double(), logp.double()  # float64 as in ratio_term
    drift = sequences.reduced(fixed - others[1].double())
    columns = [others[0].double(), fixed - drift]
    if not objective.moving() or sequences.level == "sequence_token":
        return weighted_sum(objective.name, now, columns, objective.params, weights).to(logp.dtype)
    constant = objective.with_constant_ratio()
    loss = weighted_sum(constant.name, now, columns, constant.params, weights)
    # The gradient through the ratio of a sequence, which each of its tokens gets from all others, with the value 0.
    values = _values(constant, fixed, columns)
    carried = torch.where(drift.exp() > objective.cap(), 0.0, values * each_weight(weights, fixed))
    carried = torch.where(each_weight(weights, fixed) != 0, carried, 0.0)
    of_sequence = sequences.reduced(now)
    carried = carried * (of_sequence - of_sequence.detach())
    return (loss + (carried if weights.each else carried.sum())).to(logp.dtype)


def _values(objective: KLObjective, logp: Tensor, others: list[Tensor]) -> Tensor:
    """Returns the value of an estimator at each token, without gradient."""
    others = [dense(x, logp.dtype) for x in others]
    serving = ops.serving("elementwise", logp)
    return ops.elementwise(objective.name, logp, others, objective.params, None, serving)[1].detach()


def each_weight(weights: TokenWeights, like: Tensor) -> Tensor:
    """Returns TokenWeights as one tensor, shaped like ``like``."""
    values, count, scale = weights.values, weights.count, weights.scale
    real = real_dtype(like.dtype)
    values = torch.ones_like(like, dtype=real) if values is None else values.to(real)
    if isinstance(scale, torch.Tensor) or scale != 1.0:
        values = values * scale
    return values if count is None else values / count.clamp(min=1).to(real)


class KLPenalty(NamedTuple):
    """The KL term of a loss; of an exact KL, which has no columns, its weights.

    ``old_logp``: None where the ratio is 1, or no ratio weighs the term. ``weights``: without the coefficient.
    ``live``: the tokens of the term; None: all.
    """

    objective: KLObjective
    ref_logp: Tensor | None
    old_logp: Tensor | None
    weights: TokenWeights
    live: Tensor | None
    sequences: KLSequences | None = None
    own: bool = False  # its tokens are not those of the loss

    def loss(self, logp: Tensor, coefficient: Number) -> Tensor:
        """Computes the term, differentiable in ``logp``."""
        if self.sequences is not None:
            columns = self.ref_logp, self.old_logp, self.weights, self.sequences
            return kl_sum(self.objective, logp, *columns) * coefficient
        others = self.objective.others(logp, self.ref_logp, self.old_logp)
        return scaled_sum(coefficient, self.objective.name, logp, others, self.weights, self.objective.params)

    def exact_loss(self, values: Tensor, coefficient: Number) -> Tensor:
        """Computes the term from exact divergences ``values``, differentiable in them."""
        return -scaled_sum(coefficient, "nll", values, [], self.weights)  # nll is minus its column

    def counted(self, like: Tensor, of_loss: Tensor) -> Tensor:
        """Returns the tokens of the term's mean; ``of_loss``: those of the metrics of the loss."""
        return counted_tokens(full_mask(like, self.live), self.weights.values) if self.own else of_loss

    def exact_metrics(self, values: Tensor, of_loss: Tensor) -> Metrics:
        """Computes the mean of exact divergences over the tokens of the term."""
        live = self.counted(values, of_loss)
        return {"kl": torch.where(live, values.detach(), 0.0).sum() / live.sum().clamp(min=1)}

    def weight_of_each(self, like: Tensor) -> Tensor:
        """Returns the weights as one tensor, shaped like ``like``."""
        return each_weight(self.weights, like)

    def metrics(self, logp: Tensor, of_loss: Tensor) -> Metrics:
        """Computes the mean of the term over its tokens, under the name ``kl``."""
        # No decorator, because Dynamo cannot trace a decorated method of a NamedTuple.
        logp = logp.detach()
        live = self.counted(logp, of_loss)
        others = self.objective.others(logp, self.ref_logp, self.old_logp)
        if self.sequences is not None:
            others[1] = logp - self.sequences.reduced((logp - others[1]).double())
        values = _values(self.objective, logp, others)
        return {"kl": torch.where(live, values, 0.0).sum() / live.sum().clamp(min=1)}


def kl_penalty(
    caller: str,
    kl: KL | ExactKL | KLTerm,
    like: Tensor,
    ref_logprobs: PerToken | None,
    old_logprobs: PerToken | None,
    scored: Tensor | None,
    live: Tensor | None,
    weights: TokenWeights,
    aggregation: Aggregation,
    cu_seqlens: Tensor | None,
    normalizers: Normalizers | None,
    of_tokens: bool,
    ratio_level: RatioLevel = "token",
) -> KLPenalty:
    """Returns the KL term of a loss, checked.

    Args:
        scored: the tokens that have a log-probability; None: all. live: those of the objective.
        weights, aggregation, normalizers: those of the loss. of_tokens: whether the caller gave its weights per token.
        ratio_level: that of the loss.
    """
    if not isinstance(kl, KLTerm):
        return KLPenalty(KLObjective(named_objective(kl)), ref_logprobs, None, weights, live)
    objective = kl.objective()
    if not kl.ratio_weighted and not objective.of_a_user():
        old_logprobs = None  # only the ratio looks at it
    elif old_logprobs is not None:
        column(caller, "old_logprobs", old_logprobs, like)
    sequences = None
    if kl.ratio_level == "loss" and ratio_level != "token":
        sequences = KLSequences(full_mask(like, live), cu_seqlens, ratio_level)
    if kl.has_own_weights():
        checks.mask(caller, kl.mask, like.shape, "kl.mask")
        live = live if kl.mask is None else _both(live_mask(caller, like, kl.mask), scored)
        if weights.each:
            each = _each(caller, kl, live)
            return KLPenalty(objective, ref_logprobs, old_logprobs, each, live, sequences, kl.mask is not None)
        if kl.weights is not None:
            column(caller, "kl.weights", kl.weights, like)
            live = counted_tokens(full_mask(like, live), kl.weights)
        elif of_tokens and (kl.aggregation is None or kl.mask is None):
            raise ValueError(
                f"{caller}: kl has weights of its own beside weights of the loss; pass kl.weights, or kl.mask with "
                "kl.aggregation"
            )
        own = kl.normalizers
        mode = "token-mean" if kl.weights is not None else kl.aggregation or aggregation
        if own is None and normalizers and kl.weights is None:
            # Ids belong to the aggregation of the loss, and count no tokens.
            of_loss = {name: x for name, x in normalizers.items() if name not in IDS or takes(mode, name)}
            if kl.mask is not None and not of_loss.keys() <= set(IDS):
                raise ValueError(
                    f"{caller}: kl has a mask of its own, and normalizers of the loss count other tokens; pass "
                    "kl.normalizers"
                )
            beyond = [name for name in of_loss if not takes(mode, name)]
            if kl.aggregation is not None and beyond:
                raise ValueError(
                    f"{caller}: kl.aggregation={mode!r} takes no {beyond[0]} of the normalizers of the loss; "
                    "pass kl.normalizers"
                )
            own = of_loss
        weights = token_weights_of(caller, like, live, mode, kl.weights, cu_seqlens, own)
    own = kl.mask is not None or kl.weights is not None
    return KLPenalty(objective, ref_logprobs, old_logprobs, weights, live, sequences, own)


def _each(caller: str, kl: KLTerm, live: Tensor | None) -> TokenWeights:
    """Returns the weights of a term that is not summed, ``live`` its tokens; refuses what would weigh them."""
    if kl.weights is not None or kl.aggregation is not None or kl.normalizers:
        raise ValueError(
            f"{caller}: reduction='none' weighs no token; leave out kl.weights, kl.aggregation and kl.normalizers"
        )
    return TokenWeights(live, each=True)


def tokens_of_sequences(caller: str, penalty: KLPenalty, live: Tensor | None) -> None:
    """Refuses a KL term whose tokens are others than those of the sequences that have one loss each."""
    if penalty.live is not live:
        raise ValueError(
            f"{caller}: reduction='none' with one loss per sequence averages the KL over the tokens of the objective; "
            "leave out kl.mask, or compute the KL by itself with kl_estimate"
        )


def _both(mask: Tensor, scored: Tensor | None) -> Tensor:
    """Returns the tokens of both masks; None holds all."""
    return mask if scored is None else mask & scored


def own_tokens(
    caller: str, kl: KL | ExactKL | KLTerm, like: Tensor, scored: Tensor, live: Tensor
) -> tuple[KL | ExactKL | KLTerm, Tensor]:
    """Returns the KL term with a mask of scored tokens alone, and the tokens that the loss reads in any term."""
    if not isinstance(kl, KLTerm) or kl.mask is None:
        return kl, live
    checks.mask(caller, kl.mask, like.shape, "kl.mask")
    mask = _both(live_mask(caller, like, kl.mask), scored)
    return dataclasses.replace(kl, mask=mask), live | mask
