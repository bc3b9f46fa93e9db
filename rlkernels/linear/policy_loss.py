"""Policy losses from hidden states and the lm_head to the scalar, without ``[T, V]`` logits.

Three matmuls, because the gradient is made in the forward.
"""

from typing import Literal, overload

import torch

from rlkernels import checks, ops
from rlkernels.checks import tokens as checks_tokens
from rlkernels.linear.exact_kl import check_reference_head, kl_of_reference
from rlkernels.linear.head import HeadOptions, linear_head
from rlkernels.linear.rank_agreement import same_on_every_rank
from rlkernels.linear.sequence_loss import sequence_loss
from rlkernels.linear.token_loss import PolicyTerms, check_batch, token_loss
from rlkernels.linear.token_stats import head_stats
from rlkernels.losses.kl_penalty import kl_penalty, tokens_of_sequences
from rlkernels.losses.kl_term import KLObjective, KLTerm, exact_kind, simplified
from rlkernels.losses.policy_arguments import ROW, check_terms, objective_columns, resolve_either
from rlkernels.losses.policy_factors import policy_factors
from rlkernels.losses.policy_metrics import policy_metrics
from rlkernels.losses.policy_ratio import SQUARE, ratio_options, with_current
from rlkernels.losses.policy_terms import policy_terms
from rlkernels.losses.row_options import per_token
from rlkernels.losses.token_weights import (
    TokenWeights,
    aggregation_of_sequences,
    aggregation_of_units,
    counted_tokens,
    live_tokens,
    loss_weights,
    losses_of_sequences,
    losses_of_tokens,
    summed,
    token_weights_of,
)
from rlkernels.losses.weighted_sum import parameters
from rlkernels.packed_rows import takes_one_row
from rlkernels.rollout.correction import CorrectionLike
from rlkernels.sequences import means
from rlkernels.tracing import replaced
from rlkernels.types import (
    KL,
    Aggregation,
    ExactKL,
    HeadBias,
    HeadWeight,
    HiddenStates,
    LogRatioClamp,
    Mask,
    Metrics,
    Normalizers,
    Number,
    ObjectiveLike,
    ObjectiveOption,
    Offsets,
    PerToken,
    PerTokenOrSequence,
    PolicyReduction,
    RatioDenominator,
    RatioLevel,
    Scalar,
    Targets,
    Temperature,
    VocabMask,
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
    vocab_mask: VocabMask | None = None,
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
    ref_hidden: HiddenStates | None = None,
    ref_weight: HeadWeight | None = None,
    ref_bias: HeadBias | None = None,
    kl: KL | ExactKL | KLTerm = "k3",
    kl_coef: Number = 0.0,
    entropy_coef: Number = 0.0,
    top_entropy_fraction: Number | None = None,
    cu_seqlens: Offsets | None = None,
    ratio_level: RatioLevel = "token",
    ratio_denominator: RatioDenominator = "old",
    rollout_logprobs: PerToken | None = None,
    log_ratio_clamp: LogRatioClamp = None,
    log_ratio_sq_coef: Number = 0.0,
    correction: CorrectionLike | None = None,
    normalizers: Normalizers | None = None,
    reduction: PolicyReduction = "aggregation",
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
    vocab_mask: VocabMask | None = None,
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
    ref_hidden: HiddenStates | None = None,
    ref_weight: HeadWeight | None = None,
    ref_bias: HeadBias | None = None,
    kl: KL | ExactKL | KLTerm = "k3",
    kl_coef: Number = 0.0,
    entropy_coef: Number = 0.0,
    top_entropy_fraction: Number | None = None,
    cu_seqlens: Offsets | None = None,
    ratio_level: RatioLevel = "token",
    ratio_denominator: RatioDenominator = "old",
    rollout_logprobs: PerToken | None = None,
    log_ratio_clamp: LogRatioClamp = None,
    log_ratio_sq_coef: Number = 0.0,
    correction: CorrectionLike | None = None,
    normalizers: Normalizers | None = None,
    reduction: PolicyReduction = "aggregation",
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
    vocab_mask: VocabMask | None = None,
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
    ref_hidden: HiddenStates | None = None,
    ref_weight: HeadWeight | None = None,
    ref_bias: HeadBias | None = None,
    kl: KL | ExactKL | KLTerm = "k3",
    kl_coef: Number = 0.0,
    entropy_coef: Number = 0.0,
    top_entropy_fraction: Number | None = None,
    cu_seqlens: Offsets | None = None,
    ratio_level: RatioLevel = "token",
    ratio_denominator: RatioDenominator = "old",
    rollout_logprobs: PerToken | None = None,
    log_ratio_clamp: LogRatioClamp = None,
    log_ratio_sq_coef: Number = 0.0,
    correction: CorrectionLike | None = None,
    normalizers: Normalizers | None = None,
    reduction: PolicyReduction = "aggregation",
    return_metrics: bool,
    **params: ObjectiveOption,
) -> Scalar | tuple[Scalar, Metrics]: ...


@takes_one_row(2, per_token=per_token)
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
    vocab_mask: VocabMask | None = None,
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
    ref_hidden: HiddenStates | None = None,
    ref_weight: HeadWeight | None = None,
    ref_bias: HeadBias | None = None,
    kl: KL | ExactKL | KLTerm = "k3",
    kl_coef: Number = 0.0,
    entropy_coef: Number = 0.0,
    top_entropy_fraction: Number | None = None,
    cu_seqlens: Offsets | None = None,
    ratio_level: RatioLevel = "token",
    ratio_denominator: RatioDenominator = "old",
    rollout_logprobs: PerToken | None = None,
    log_ratio_clamp: LogRatioClamp = None,
    log_ratio_sq_coef: Number = 0.0,
    correction: CorrectionLike | None = None,
    normalizers: Normalizers | None = None,
    reduction: PolicyReduction = "aggregation",
    return_metrics: bool = False,
    **params: ObjectiveOption,
) -> Scalar | tuple[Scalar, Metrics]:
    r"""Computes ``policy_loss`` from hidden states and the lm_head, in three matmuls: the logits of a chunk become
    their own gradient.

    ``sum_t w_t (l(logp_t, old_t, A_t) + kl_coef KL_t - entropy_coef H_t)``, with the letters of ``policy_loss``, and
    ``logp``, ``H`` those of ``linear_token_stats``. ``policy_loss`` lists the objectives with their parameters.

    Tokens whose weights are all 0 enter no matmul; those of factor 0 enter one, for the metrics alone. Tokens without
    advantage, KL and entropy term skip the two matmuls of the gradient, where the objective's source shows that their
    gradient is 0. On the CPU so do all tokens whose gradient turns out to be 0 (clipped ones). With sequence-level
    ratios a chunk holds whole sequences; a sequence that outgrows a chunk is multiplied once more, but for its last
    part. ``old_logprobs=None`` costs no matmul, because a chunk knows its own log-probabilities. It and
    ``log_ratio_clamp`` take a few launches more per chunk, and so does ``log_ratio_sq_coef`` beside a KL term. Under
    ``torch.compile``, and with objectives of sequences, groups and batches, ``top_entropy_fraction``, ``opsm_delta``
    and ``reduction="none"``, the loss is ``policy_loss`` of ``linear_token_stats``: four matmuls.

    Args:
        hidden, weight, bias: as for ``linear_token_logprobs``; all three get gradients where they require them, scaled
            by the upstream gradient in the backward.
        targets, temperature, softcap, logit_scale, ignore_index, vocab_mask, logits_dtype, chunk_tokens, logits_budget,
            valid_vocab, process_group, vocab_start: as for ``linear_token_logprobs``.
        max_live_tokens: a bound on the tokens with a weight, as for ``linear_token_logprobs``. With sequence-level
            ratios it bounds the live tokens; where it does not fit in one chunk, they take four matmuls.
        ref_hidden, ref_weight, ref_bias: ``[..., H']``, ``[V', H']`` and ``[V']`` of the reference's head, without
            gradient, for ``kl="reverse_kl"`` and ``"forward_kl"``. Softcap, scale and temperature are the policy's. The
            exact KL takes three matmuls of the policy's head and one of the reference's beside those of the loss. Over
            a process group the reference's head is cut like the policy's.
        the rest: as for ``logits_policy_loss``; ``old_logprobs`` and ``ref_logprobs`` under the same temperature.

    Returns:
        Scalar, or one number per token, fp32 (fp64 for fp64 hidden states); with ``return_metrics``, ``(loss, dict)``,
        the metrics of ``policy_loss``.

    Raises:
        TypeError, ValueError, IndexError: as ``linear_token_logprobs`` and ``policy_loss``.

    Example:
        >>> hidden, weight = torch.zeros(1, 2, 3, requires_grad=True), torch.ones(4, 3)
        >>> old = torch.full((1, 2), 0.25).log()
        >>> round(linear_policy_loss(hidden, weight, torch.tensor([[3, 0]]), old, torch.tensor([2.0])).item(), 4)
        -2.0
    """
    caller = "linear_policy_loss"
    checks.flags(caller, return_metrics=return_metrics)
    options: HeadOptions = {
        "bias": bias,
        "temperature": temperature,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "ignore_index": ignore_index,
        "vocab_mask": vocab_mask,
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
    cu_seqlens = checks_tokens.rows(caller, "targets", targets, cu_seqlens, mask)
    entry, values, further, choice = resolve_either(
        caller, objective, params, like, cu_seqlens, ratio_level, advantages, ref_logprobs
    )
    ratio = ratio_options(
        caller, entry, like, old_logprobs, rollout_logprobs, ratio_denominator, log_ratio_clamp, log_ratio_sq_coef
    )
    columns = objective_columns(
        caller,
        entry,
        like,
        ratio.old,
        advantages,
        ref_logprobs,
        ratio.rollout,
        further,
        cu_seqlens,
        ratio_level,
        correction is not None,
    )
    kl = simplified(kl)
    _check_reference(caller, kl, hidden, ref_hidden, ref_weight, ref_bias)
    reference = "ref_hidden", ref_hidden
    kl_coef, entropy_coef = check_terms(caller, like, ref_logprobs, kl, kl_coef, ROW, entropy_coef, reference)
    scored = targets != ignore_index
    live = live_tokens(caller, like, mask) & scored
    engine = None if correction is None else ratio.engine(caller, entry, correction, rollout_logprobs)
    factors = policy_factors(
        caller, correction, top_entropy_fraction, like, old_logprobs, engine, ratio_level, entry, choice
    )
    apart = not summed(caller, reduction)
    if choice is not None and not apart:
        aggregation, normalizers = aggregation_of_units(
            caller, choice.kind.unit, choice.groups, aggregation, weights, normalizers
        )
    elif ratio_level == "sequence_sum" and not apart:
        aggregation = aggregation_of_sequences(aggregation, weights)
    if choice is not None and process_group is not None and choice.draws():
        raise ValueError(
            f"{caller}: objective {objective!r} draws tokens, which every rank of process_group must do alike; pass "
            "clip_cov_tokens, or a generator in the same state on every rank"
        )
    penalty, of_tokens = None, weights is not None
    shared = aggregation, cu_seqlens, normalizers, of_tokens, ratio_level
    exact, exact_coef = exact_kind(kl), None
    if exact is not None:  # a term by itself: the rest has no KL
        exact_coef, kl_coef = kl_coef, None
        has_penalty = ref_hidden is not None and (exact_coef is not None or return_metrics)
    else:
        has_penalty = ref_logprobs is not None and (kl_coef is not None or isinstance(kl, KLTerm))
    of_factors: Metrics = {}
    composed = torch.compiler.is_compiling() or choice is not None or apart
    if composed or factors is not None and factors.of_policy():
        if apart:
            share = losses_of_tokens(caller, live, aggregation, weights, normalizers)
        else:
            share = token_weights_of(caller, like, live, aggregation, weights, cu_seqlens, normalizers)
        if has_penalty:
            penalty = kl_penalty(caller, kl, like, ref_logprobs, ratio.old, scored, live, share, *shared)
        rows = live if penalty is None or exact is not None else live | penalty.live
        stats = head_stats(head.without(~rows.reshape(-1)), ("entropy",), like.shape)
        logp, entropy = stats.logprobs, stats.entropy
        loss, columns, of_factors = policy_terms(
            caller,
            entry,
            logp,
            entropy,
            columns,
            values,
            share,
            (live, cu_seqlens, ratio_level),
            ratio,
            rollout_logprobs,
            choice,
            factors,
            ref_logprobs,
            penalty,
            (kl_coef, entropy_coef),
        )
    else:
        weights = loss_weights(caller, like, live, aggregation, weights, cu_seqlens, normalizers)
        share = TokenWeights(weights)
        if has_penalty:
            penalty = kl_penalty(caller, kl, like, ref_logprobs, ratio.old, scored, live, share, *shared)
        entropy_weight, square_weight = (
            None if c is None else head.per_row(weights * c) for c in (entropy_coef, ratio.square)
        )
        kl_weight, estimator, reference, kl_old = None, KLObjective(SQUARE), rollout_logprobs, None
        if kl_coef is not None:
            kl_weight = head.per_row(penalty.weight_of_each(like) * kl_coef)
            estimator, reference, kl_old = penalty.objective, ref_logprobs, penalty.old_logp
        elif square_weight is not None:  # a KL, too, and without another one it needs no launch
            kl_weight, square_weight = square_weight, None
        if factors is not None:
            columns = factors.columns(caller, columns, live, cu_seqlens)
            factor, of_factors = factors.fixed(live, cu_seqlens, like.dtype)
            weights = weights if factor is None else weights * factor
        terms = PolicyTerms(
            entry.function.__name__,
            [head.per_row(c) for c in columns],
            parameters(values),
            head.per_row(weights),
            entropy_weight,
            None if kl_weight is None else estimator.name,
            None if kl_weight is None else head.per_row(reference),
            kl_weight,
            () if kl_weight is None else estimator.params,
            None if kl_old is None else head.per_row(kl_old),
            ratio.clamp,
            None if square_weight is None else head.per_row(rollout_logprobs),
            square_weight,
            None if kl_coef is None else penalty.sequences,
        )
        backend = ops.serving("fused_policy", hidden, objective=terms.objective)
        needs_entropy = return_metrics or entropy_weight is not None
        if ratio_level == "token":
            loss, logp, entropy = token_loss(head, terms, needs_entropy, backend)
            own = penalty is not None and penalty.own and kl_coef is None and exact is None
            if return_metrics and (factors is not None or own):
                wanted = counted_tokens(live, share.values)
                wanted = wanted | penalty.live if own else wanted
                logp, entropy = _with_rest(head, wanted.reshape(-1) & ~terms.live(), logp, entropy)
        else:
            loss, logp, entropy = sequence_loss(head, terms, live, cu_seqlens, ratio_level, needs_entropy, backend)
    own_metrics = {}
    if exact is not None and has_penalty:
        term, mean_kl = kl_of_reference(
            hidden,
            weight,
            (ref_hidden, ref_weight, ref_bias),
            options,
            exact,
            penalty.weight_of_each(like),
            exact_coef,
            apart,
        )
        own_metrics = {"kl": mean_kl}
        if exact_coef is not None:
            if apart and losses_of_sequences(share, ratio_level, "token" if choice is None else choice.kind.unit):
                tokens_of_sequences(caller, penalty, live)
                term = means(term, live, cu_seqlens)
            loss = loss + term
    if not return_metrics:
        return loss
    logp, entropy = logp.view(like.shape), entropy.view(like.shape)
    columns, counted = with_current(columns, logp), counted_tokens(live, share.values)
    if exact is None and penalty is not None and isinstance(kl, KLTerm):
        own_metrics = penalty.metrics(logp, counted)
    reference = ref_logprobs if exact is None else None
    metrics = policy_metrics(
        logp, columns, live, reference, kl, entropy, entry, values, ratio_level, cu_seqlens, ratio.clamp, counted
    )
    return loss, metrics | own_metrics | of_factors


@torch.no_grad()
def _with_rest(head, missing, logp, entropy):
    """Returns log-probabilities and entropies ``[T]`` with those of the ``missing`` rows, which no term reads.

    Metrics count these rows: of factor 0, or of a KL term without a coefficient.
    """
    if head.max_live_tokens is not None:  # which bounds the rows with a weight
        head = replaced(head, max_live_tokens=max(missing.numel(), 1))
    stats = head_stats(head.without(~missing), ("entropy",), missing.shape)
    return torch.where(missing, stats.logprobs, logp), torch.where(missing, stats.entropy, entropy)


def _check_reference(caller, kl, hidden, ref_hidden, ref_weight, ref_bias):
    """Refuses a reference's head that an exact KL cannot take, or that nothing would look at."""
    if ref_hidden is None:
        for name, x in (("ref_weight", ref_weight), ("ref_bias", ref_bias)):
            if x is not None:
                raise ValueError(f"{caller}: {name} belongs to ref_hidden, got ref_hidden=None; pass both")
        return
    if exact_kind(kl) is None:
        name = kl.estimator if isinstance(kl, KLTerm) else kl
        raise ValueError(
            f"{caller}: ref_hidden belongs to kl='reverse_kl' or 'forward_kl', got kl={name!r}; pass ref_logprobs, as "
            "linear_token_logprobs gives them"
        )
    check_reference_head(caller, hidden, ref_hidden, ref_weight, ref_bias)
