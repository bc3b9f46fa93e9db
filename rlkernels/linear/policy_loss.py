"""Policy losses from hidden states and the lm_head to the scalar, without ``[T, V]`` logits.

Three matmuls, because the gradient is made in the forward.
"""

from typing import Literal, NamedTuple, overload

import torch

from rlkernels import ops
from rlkernels.checks import tokens as checks_tokens
from rlkernels.linear.chunked_loss import chunked_loss, detached_for_loss, differentiable
from rlkernels.linear.head import HeadOptions, linear_head
from rlkernels.linear.rank_agreement import same_on_every_rank
from rlkernels.linear.sequence_chunks import SequencePlan, WholeBatchPlan, plan_sequences
from rlkernels.linear.token_loss import PolicyTerms, check_batch, token_loss
from rlkernels.linear.token_stats import head_stats
from rlkernels.losses.policy import policy_terms, ratio_term
from rlkernels.losses.policy_arguments import ROW, check_terms, objective_columns, resolve_either
from rlkernels.losses.policy_factors import policy_factors
from rlkernels.losses.policy_metrics import policy_metrics
from rlkernels.losses.token_weights import (
    TokenWeights,
    aggregation_of_sequences,
    aggregation_of_units,
    live_tokens,
    loss_weights,
    token_weights_of,
)
from rlkernels.losses.weighted_sum import parameters
from rlkernels.rollout.correction import CorrectionLike
from rlkernels.sequences import segment_ids, sums
from rlkernels.types import (
    KL,
    Aggregation,
    HeadBias,
    HeadWeight,
    HiddenStates,
    Mask,
    Metrics,
    Normalizers,
    Number,
    ObjectiveOption,
    Offsets,
    PerToken,
    PerTokenOrSequence,
    RatioLevel,
    Scalar,
    Targets,
    Temperature,
)


@overload
def linear_policy_loss(
    hidden: HiddenStates,
    weight: HeadWeight,
    targets: Targets,
    old_logprobs: PerToken | None,
    advantages: PerTokenOrSequence | None,
    mask: Mask | None = None,
    *,
    bias: HeadBias | None = None,
    temperature: Temperature = 1.0,
    softcap: Number | None = None,
    logit_scale: Number = 1.0,
    ignore_index: int = -100,
    logits_dtype: torch.dtype = torch.float32,
    chunk_tokens: int | None = None,
    logits_budget: int | None = None,
    max_live_tokens: int | None = None,
    valid_vocab: int | None = None,
    process_group: "torch.distributed.ProcessGroup | None" = None,
    vocab_start: int | None = None,
    objective: str = "ppo_clip",
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    ref_logprobs: PerToken | None = None,
    kl: KL = "k3",
    kl_coef: Number = 0.0,
    entropy_coef: Number = 0.0,
    top_entropy_fraction: Number | None = None,
    cu_seqlens: Offsets | None = None,
    ratio_level: RatioLevel = "token",
    rollout_logprobs: PerToken | None = None,
    correction: CorrectionLike | None = None,
    normalizers: Normalizers | None = None,
    return_metrics: Literal[False] = False,
    **params: ObjectiveOption,
) -> Scalar: ...


@overload
def linear_policy_loss(
    hidden: HiddenStates,
    weight: HeadWeight,
    targets: Targets,
    old_logprobs: PerToken | None,
    advantages: PerTokenOrSequence | None,
    mask: Mask | None = None,
    *,
    bias: HeadBias | None = None,
    temperature: Temperature = 1.0,
    softcap: Number | None = None,
    logit_scale: Number = 1.0,
    ignore_index: int = -100,
    logits_dtype: torch.dtype = torch.float32,
    chunk_tokens: int | None = None,
    logits_budget: int | None = None,
    max_live_tokens: int | None = None,
    valid_vocab: int | None = None,
    process_group: "torch.distributed.ProcessGroup | None" = None,
    vocab_start: int | None = None,
    objective: str = "ppo_clip",
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    ref_logprobs: PerToken | None = None,
    kl: KL = "k3",
    kl_coef: Number = 0.0,
    entropy_coef: Number = 0.0,
    top_entropy_fraction: Number | None = None,
    cu_seqlens: Offsets | None = None,
    ratio_level: RatioLevel = "token",
    rollout_logprobs: PerToken | None = None,
    correction: CorrectionLike | None = None,
    normalizers: Normalizers | None = None,
    return_metrics: Literal[True],
    **params: ObjectiveOption,
) -> tuple[Scalar, Metrics]: ...


@overload
def linear_policy_loss(
    hidden: HiddenStates,
    weight: HeadWeight,
    targets: Targets,
    old_logprobs: PerToken | None,
    advantages: PerTokenOrSequence | None,
    mask: Mask | None = None,
    *,
    bias: HeadBias | None = None,
    temperature: Temperature = 1.0,
    softcap: Number | None = None,
    logit_scale: Number = 1.0,
    ignore_index: int = -100,
    logits_dtype: torch.dtype = torch.float32,
    chunk_tokens: int | None = None,
    logits_budget: int | None = None,
    max_live_tokens: int | None = None,
    valid_vocab: int | None = None,
    process_group: "torch.distributed.ProcessGroup | None" = None,
    vocab_start: int | None = None,
    objective: str = "ppo_clip",
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    ref_logprobs: PerToken | None = None,
    kl: KL = "k3",
    kl_coef: Number = 0.0,
    entropy_coef: Number = 0.0,
    top_entropy_fraction: Number | None = None,
    cu_seqlens: Offsets | None = None,
    ratio_level: RatioLevel = "token",
    rollout_logprobs: PerToken | None = None,
    correction: CorrectionLike | None = None,
    normalizers: Normalizers | None = None,
    return_metrics: bool,
    **params: ObjectiveOption,
) -> Scalar | tuple[Scalar, Metrics]: ...


@same_on_every_rank
def linear_policy_loss(
    hidden: HiddenStates,
    weight: HeadWeight,
    targets: Targets,
    old_logprobs: PerToken | None,
    advantages: PerTokenOrSequence | None,
    mask: Mask | None = None,
    *,
    bias: HeadBias | None = None,
    temperature: Temperature = 1.0,
    softcap: Number | None = None,
    logit_scale: Number = 1.0,
    ignore_index: int = -100,
    logits_dtype: torch.dtype = torch.float32,
    chunk_tokens: int | None = None,
    logits_budget: int | None = None,
    max_live_tokens: int | None = None,
    valid_vocab: int | None = None,
    process_group: "torch.distributed.ProcessGroup | None" = None,
    vocab_start: int | None = None,
    objective: str = "ppo_clip",
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    ref_logprobs: PerToken | None = None,
    kl: KL = "k3",
    kl_coef: Number = 0.0,
    entropy_coef: Number = 0.0,
    top_entropy_fraction: Number | None = None,
    cu_seqlens: Offsets | None = None,
    ratio_level: RatioLevel = "token",
    rollout_logprobs: PerToken | None = None,
    correction: CorrectionLike | None = None,
    normalizers: Normalizers | None = None,
    return_metrics: bool = False,
    **params: ObjectiveOption,
) -> Scalar | tuple[Scalar, Metrics]:
    r"""``policy_loss`` from hidden states and the lm_head, in three matmuls: the logits of a chunk become their own
    gradient.

    Tokens whose weights are all 0 enter no matmul. Tokens without advantage, KL and entropy term skip the two matmuls
    of the gradient, where the objective's source shows that their gradient is 0. On the CPU so do all tokens whose
    gradient turns out to be 0 (clipped ones). With sequence-level ratios a chunk holds whole sequences; a sequence that
    outgrows a chunk is multiplied once more, but for its last part. Under ``torch.compile``, and with objectives of
    sequences, groups and batches, ``top_entropy_fraction`` and ``opsm_delta``, the loss is ``policy_loss`` of
    ``linear_token_stats``: four matmuls.

    Args:
        hidden, weight, bias: as for ``linear_token_logprobs``; all three get gradients where they require them, scaled
            by the upstream gradient in the backward.
        targets, temperature, softcap, logit_scale, ignore_index, logits_dtype, chunk_tokens, logits_budget,
            valid_vocab, process_group, vocab_start: as for ``linear_token_logprobs``.
        max_live_tokens: a bound on the tokens with a weight, as for ``linear_token_logprobs``. With sequence-level
            ratios it bounds the live tokens; where it does not fit in one chunk, they take four matmuls.
        the rest: as for ``logits_policy_loss``; ``old_logprobs`` and ``ref_logprobs`` under the same temperature.

    Returns:
        Scalar, fp32 (fp64 for fp64 hidden states); with ``return_metrics``, ``(loss, dict)``.

    Raises:
        TypeError, ValueError, IndexError: as ``linear_token_logprobs`` and ``policy_loss``.

    Example:
        >>> hidden, weight = torch.zeros(1, 2, 3, requires_grad=True), torch.ones(4, 3)
        >>> old = torch.full((1, 2), 0.25).log()
        >>> round(linear_policy_loss(hidden, weight, torch.tensor([[3, 0]]), old, torch.tensor([2.0])).item(), 4)
        -2.0
    """
    caller = "linear_policy_loss"
    options: HeadOptions = {
        "bias": bias,
        "temperature": temperature,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "ignore_index": ignore_index,
        "logits_dtype": logits_dtype,
        "chunk_tokens": chunk_tokens,
        "logits_budget": logits_budget,
        "max_live_tokens": max_live_tokens,
        "valid_vocab": valid_vocab,
        "process_group": process_group,
        "vocab_start": vocab_start,
    }
    head = linear_head(caller, hidden, weight, targets, options)
    check_batch(caller, hidden)
    ignore_index = head.ignore_index
    targets = checks_tokens.holding(caller, targets, ignore_index)
    like = targets.new_empty(targets.shape, dtype=head.result_dtype())
    cu_seqlens = checks_tokens.rows(caller, "targets", targets, cu_seqlens)
    entry, values, choice = resolve_either(
        caller, objective, params, like, cu_seqlens, ratio_level, advantages, ref_logprobs
    )
    columns = objective_columns(caller, entry, like, old_logprobs, advantages, cu_seqlens, ratio_level)
    kl_coef, entropy_coef = check_terms(caller, like, ref_logprobs, kl, kl_coef, ROW, entropy_coef)
    live = live_tokens(caller, like, mask) & (targets != ignore_index)
    factors = policy_factors(
        caller, correction, top_entropy_fraction, like, old_logprobs, rollout_logprobs, ratio_level, entry, choice
    )
    if choice is not None:
        aggregation, normalizers = aggregation_of_units(
            caller, choice.kind.unit, choice.groups, aggregation, weights, normalizers
        )
    elif ratio_level == "sequence_sum":
        aggregation = aggregation_of_sequences(aggregation, weights)
    if choice is not None and process_group is not None and choice.draws():
        raise ValueError(
            f"{caller}: objective {objective!r} draws tokens, which every rank of process_group must do alike; pass "
            "clip_cov_tokens, or a generator in the same state on every rank"
        )
    of_factors: Metrics = {}
    if torch.compiler.is_compiling() or choice is not None or factors is not None and factors.of_policy():
        share = token_weights_of(caller, like, live, aggregation, weights, cu_seqlens, normalizers)
        stats = head_stats(head.without(~live.reshape(-1)), ("entropy",), like.shape)
        logp, entropy = stats.logprobs, stats.entropy
        loss, columns, of_factors = policy_terms(
            caller,
            objective,
            logp,
            entropy,
            columns,
            values,
            share,
            (live, cu_seqlens, ratio_level),
            choice,
            factors,
            ref_logprobs,
            kl,
            (kl_coef, entropy_coef),
        )
    else:
        weights = loss_weights(caller, like, live, aggregation, weights, cu_seqlens, normalizers)
        kl_weight, entropy_weight = (None if c is None else head.per_row(weights * c) for c in (kl_coef, entropy_coef))
        if factors is not None:
            columns = factors.columns(caller, columns, live, cu_seqlens)
            factor, of_factors = factors.fixed(live, cu_seqlens, like.dtype)
            weights = weights if factor is None else weights * factor
        terms = PolicyTerms(
            objective,
            [head.per_row(c) for c in columns],
            parameters(values),
            head.per_row(weights),
            entropy_weight,
            None if kl_weight is None else kl,
            None if kl_weight is None else head.per_row(ref_logprobs),
            kl_weight,
        )
        backend = ops.serving("fused_policy", hidden)
        needs_entropy = return_metrics or entropy_weight is not None
        if ratio_level == "token":
            loss, logp, entropy = token_loss(head, terms, needs_entropy, backend)
            if return_metrics:
                live = live & terms.live().view(like.shape)  # the other rows are not read, so they have no metrics
        else:
            loss, logp, entropy = _sequence_loss(head, terms, live, cu_seqlens, ratio_level, needs_entropy, backend)
    if not return_metrics:
        return loss
    logp, entropy = logp.view(like.shape), entropy.view(like.shape)
    metrics = policy_metrics(logp, columns, live, ref_logprobs, kl, entropy, entry, values, ratio_level, cu_seqlens)
    return loss, {**metrics, **of_factors}


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
        loss = ratio_term(
            self.caller,
            terms.objective,
            stats.logp,
            terms.columns,
            terms.params,
            TokenWeights(terms.weight),
            rows.live(stats.logp),
            self.plan.cu_seqlens(first, last),
            self.ratio_level,
        )
        return loss + terms.kl_and_entropy(stats)

    def gradient_scale(self):
        sequences = self.live.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1
        if self.ratio_level != "sequence_sum" or not sequences:
            return self.terms.gradient_scale()
        # The derivative of a sum by each of its tokens is that of the whole sequence.
        return sums(self.terms.weight.view(self.live.shape), self.live, self.cu_seqlens).abs().amax()


def _sequence_loss(head, terms, live, cu_seqlens, ratio_level, needs_entropy, backend):
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
    rows = live.reshape(-1)
    if cu_seqlens is None:
        count, sequence = shape[0], torch.arange(rows.shape[0], device=live.device) // max(shape[-1], 1)
    else:
        count, sequence = cu_seqlens.shape[0] - 1, segment_ids(cu_seqlens, rows.shape[0])
    work = detached_for_loss(head, rows)
    plan = plan_sequences(rows, sequence, count, bound=work.max_live_tokens, zero_gradient=terms.zero_gradient())
    loss = SequenceLoss(head.caller, terms, plan, ratio_level, live, cu_seqlens, needs_entropy)
    return differentiable(head, backend, chunked_loss, work, plan, loss)
