"""Policy losses from hidden states and the lm_head to the scalar, without ``[T, V]`` logits.

Three matmuls, because the gradient is made in the forward.
"""

from typing import Literal, NamedTuple, overload

import torch

from rlkernels import checks, ops
from rlkernels.checks import tokens as checks_tokens
from rlkernels.linear.chunked_loss import chunked_loss, detached_for_loss, differentiable
from rlkernels.linear.head import HeadOptions, linear_head
from rlkernels.linear.rank_agreement import same_on_every_rank
from rlkernels.linear.sequence_chunks import SequencePlan, WholeBatchPlan, plan_sequences
from rlkernels.linear.token_loss import PolicyTerms, check_batch, token_loss
from rlkernels.linear.token_stats import head_stats
from rlkernels.losses.policy_arguments import ROW, check_terms, objective_columns, resolve
from rlkernels.losses.policy_metrics import policy_metrics
from rlkernels.losses.policy_ratio import SQUARE, ratio_options, ratio_term, with_current
from rlkernels.losses.token_weights import (
    REDUCTIONS,
    TokenWeights,
    aggregation_of_sequences,
    live_tokens,
    loss_weights,
    losses_of_tokens,
    token_weights_of,
)
from rlkernels.losses.weighted_sum import parameters, scaled_sum
from rlkernels.objectives import OBJECTIVES
from rlkernels.sequences import segment_ids, sums
from rlkernels.types import (
    KL,
    Aggregation,
    HeadBias,
    HeadWeight,
    HiddenStates,
    LogRatioClamp,
    Mask,
    Metrics,
    Normalizers,
    Number,
    ObjectiveLike,
    Offsets,
    PerToken,
    PerTokenOrSequence,
    PolicyReduction,
    RatioDenominator,
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
    objective: ObjectiveLike = "ppo_clip",
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    ref_logprobs: PerToken | None = None,
    kl: KL = "k3",
    kl_coef: Number = 0.0,
    entropy_coef: Number = 0.0,
    cu_seqlens: Offsets | None = None,
    ratio_level: RatioLevel = "token",
    ratio_denominator: RatioDenominator = "old",
    rollout_logprobs: PerToken | None = None,
    log_ratio_clamp: LogRatioClamp = None,
    log_ratio_sq_coef: Number = 0.0,
    normalizers: Normalizers | None = None,
    reduction: PolicyReduction = "aggregation",
    return_metrics: Literal[False] = False,
    **params: Number | PerToken,
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
    objective: ObjectiveLike = "ppo_clip",
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    ref_logprobs: PerToken | None = None,
    kl: KL = "k3",
    kl_coef: Number = 0.0,
    entropy_coef: Number = 0.0,
    cu_seqlens: Offsets | None = None,
    ratio_level: RatioLevel = "token",
    ratio_denominator: RatioDenominator = "old",
    rollout_logprobs: PerToken | None = None,
    log_ratio_clamp: LogRatioClamp = None,
    log_ratio_sq_coef: Number = 0.0,
    normalizers: Normalizers | None = None,
    reduction: PolicyReduction = "aggregation",
    return_metrics: Literal[True],
    **params: Number | PerToken,
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
    objective: ObjectiveLike = "ppo_clip",
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    ref_logprobs: PerToken | None = None,
    kl: KL = "k3",
    kl_coef: Number = 0.0,
    entropy_coef: Number = 0.0,
    cu_seqlens: Offsets | None = None,
    ratio_level: RatioLevel = "token",
    ratio_denominator: RatioDenominator = "old",
    rollout_logprobs: PerToken | None = None,
    log_ratio_clamp: LogRatioClamp = None,
    log_ratio_sq_coef: Number = 0.0,
    normalizers: Normalizers | None = None,
    reduction: PolicyReduction = "aggregation",
    return_metrics: bool,
    **params: Number | PerToken,
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
    objective: ObjectiveLike = "ppo_clip",
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    ref_logprobs: PerToken | None = None,
    kl: KL = "k3",
    kl_coef: Number = 0.0,
    entropy_coef: Number = 0.0,
    cu_seqlens: Offsets | None = None,
    ratio_level: RatioLevel = "token",
    ratio_denominator: RatioDenominator = "old",
    rollout_logprobs: PerToken | None = None,
    log_ratio_clamp: LogRatioClamp = None,
    log_ratio_sq_coef: Number = 0.0,
    normalizers: Normalizers | None = None,
    reduction: PolicyReduction = "aggregation",
    return_metrics: bool = False,
    **params: Number | PerToken,
) -> Scalar | tuple[Scalar, Metrics]:
    r"""``policy_loss`` from hidden states and the lm_head, in three matmuls: the logits of a chunk become their own
    gradient.

    Tokens whose weights are all 0 enter no matmul. Tokens without advantage, KL and entropy term skip the two matmuls
    of the gradient, where the objective's source shows that their gradient is 0. On the CPU so do all tokens whose
    gradient turns out to be 0 (clipped ones). With sequence-level ratios a chunk holds whole sequences; a sequence that
    outgrows a chunk is multiplied once more, but for its last part. ``old_logprobs=None`` costs no matmul, because a
    chunk knows its own log-probabilities. It and ``log_ratio_clamp`` take a few launches more per chunk, and so does
    ``log_ratio_sq_coef`` beside a KL term. Under ``torch.compile``, and with ``reduction="none"``, the loss is
    ``policy_loss`` of ``linear_token_stats``: four matmuls.

    Args:
        hidden, weight, bias: as for ``linear_token_logprobs``; all three get gradients where they require them, scaled
            by the upstream gradient in the backward.
        targets, temperature, softcap, logit_scale, ignore_index, logits_dtype, chunk_tokens, logits_budget,
            valid_vocab, process_group, vocab_start: as for ``linear_token_logprobs``.
        max_live_tokens: a bound on the tokens with a weight, as for ``linear_token_logprobs``. With sequence-level
            ratios it bounds the live tokens; where it does not fit in one chunk, they take four matmuls.
        the rest: as for ``logits_policy_loss``; ``old_logprobs`` and ``ref_logprobs`` under the same temperature.

    Returns:
        Scalar, or one number per token, fp32 (fp64 for fp64 hidden states); with ``return_metrics``, ``(loss, dict)``.

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
    entry, values, further = resolve(caller, objective, params, hidden)
    ignore_index = head.ignore_index
    targets = checks_tokens.holding(caller, targets, ignore_index)
    like = targets.new_empty(targets.shape, dtype=head.result_dtype())
    cu_seqlens = checks_tokens.rows(caller, "targets", targets, cu_seqlens)
    ratio = ratio_options(
        caller, entry, like, old_logprobs, rollout_logprobs, ratio_denominator, log_ratio_clamp, log_ratio_sq_coef
    )
    columns = objective_columns(
        caller, entry, like, ratio.old, advantages, ref_logprobs, ratio.rollout, further, cu_seqlens, ratio_level
    )
    kl_coef, entropy_coef = check_terms(caller, like, ref_logprobs, kl, kl_coef, ROW, entropy_coef)
    live = live_tokens(caller, like, mask) & (targets != ignore_index)
    apart = reduction != "aggregation"
    if ratio_level == "sequence_sum" and not apart:
        aggregation = aggregation_of_sequences(aggregation, weights)
    if apart:
        checks.choice(caller, "reduction", reduction, REDUCTIONS)
    if apart or torch.compiler.is_compiling():
        share = (
            losses_of_tokens(caller, live, aggregation, weights, normalizers, ratio_level)
            if apart
            else token_weights_of(caller, like, live, aggregation, weights, cu_seqlens, normalizers)
        )
        stats = head_stats(head.without(~live.reshape(-1)), ("entropy",), like.shape)
        coefficients = kl_coef, entropy_coef
        sequences = live, cu_seqlens, ratio_level, ratio.clamp
        loss = _composed_policy_loss(
            caller, stats, entry, columns, values, share, sequences, ref_logprobs, kl, coefficients
        )
        if ratio.square is not None:
            loss = loss + scaled_sum(ratio.square, SQUARE, stats.logprobs, [rollout_logprobs], share)
        logp, entropy = stats.logprobs, stats.entropy
    else:
        weights = loss_weights(caller, like, live, aggregation, weights, cu_seqlens, normalizers)
        kl_weight, entropy_weight, square_weight = (
            None if c is None else head.per_row(weights * c) for c in (kl_coef, entropy_coef, ratio.square)
        )
        estimator, reference = kl, ref_logprobs
        if kl_weight is None and square_weight is not None:  # a KL, too, and without another one it needs no launch
            kl_weight, square_weight, estimator, reference = square_weight, None, SQUARE, rollout_logprobs
        terms = PolicyTerms(
            entry.function.__name__,
            [head.per_row(c) for c in columns],
            parameters(values),
            head.per_row(weights),
            entropy_weight,
            None if kl_weight is None else estimator,
            None if kl_weight is None else head.per_row(reference),
            kl_weight,
            ratio.clamp,
            None if square_weight is None else head.per_row(rollout_logprobs),
            square_weight,
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
    columns = with_current(columns, logp)
    return loss, policy_metrics(
        logp, columns, live, ref_logprobs, kl, entropy, entry, values, ratio_level, cu_seqlens, ratio.clamp
    )


def _composed_policy_loss(caller, stats, entry, columns, values, share, sequences, ref_logprobs, kl, coefficients):
    """Returns ``policy_loss`` of the TokenStats of a whole batch, without its checks; differentiable in them.

    sequences: live tokens, ``cu_seqlens``, ``ratio_level`` and the clamp of the log-ratio. coefficients: of the KL and
    the entropy term, or None.
    """
    columns = with_current(columns, stats.logprobs)
    loss = ratio_term(caller, entry, stats.logprobs, columns, values, share, *sequences)
    kl_coef, entropy_coef = coefficients
    if kl_coef is not None:
        loss = loss + scaled_sum(kl_coef, kl, stats.logprobs, [ref_logprobs], share)
    if entropy_coef is not None:
        loss = loss + scaled_sum(entropy_coef, "nll", stats.entropy, [], share)
    return loss


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
            OBJECTIVES[terms.objective],
            stats.logp,
            with_current(terms.columns, stats.logp),
            terms.params,
            TokenWeights(terms.weight),
            rows.live(stats.logp),
            self.plan.cu_seqlens(first, last),
            self.ratio_level,
            terms.clamp,
        )
        return loss + terms.other_terms(stats)

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
