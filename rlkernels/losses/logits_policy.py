"""A policy loss straight from logits: statistics, objective and gradient in one pass over each row."""

from typing import Any, Literal, cast, overload

import torch
from torch import Tensor

from rlkernels import checks, ops
from rlkernels.backends.protocol import PolicyInputs, RowStats
from rlkernels.checks import tokens as checks_tokens
from rlkernels.logits_layout import FlatLogits, flatten_logits, matrix
from rlkernels.losses.kl_penalty import kl_penalty, own_tokens, tokens_of_sequences
from rlkernels.losses.kl_term import KLTerm, exact_kind, named_objective, simplified
from rlkernels.losses.policy import policy_loss
from rlkernels.losses.policy_arguments import ROW, check_terms, objective_columns, resolve_either
from rlkernels.losses.policy_factors import policy_factors
from rlkernels.losses.policy_metrics import policy_metrics
from rlkernels.losses.policy_ratio import SQUARE, ratio_options
from rlkernels.losses.row_options import per_token
from rlkernels.losses.token_weights import (
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
    Logits,
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
def logits_policy_loss(
    logits: Logits,
    targets: Targets,
    old_logprobs: PerToken | None,
    advantages: PerTokenOrSequence | None,
    mask: Mask | None = None,
    *,
    temperature: Temperature = 1.0,
    ignore_index: int = -100,
    vocab_mask: VocabMask | None = None,
    objective: ObjectiveLike = "ppo_clip",
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    ref_logprobs: PerToken | None = None,
    ref_logits: Logits | None = None,
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
    inplace_backward: bool = False,
    return_metrics: Literal[False] = False,
    **params: ObjectiveOption,
) -> Scalar: ...


@overload
def logits_policy_loss(
    logits: Logits,
    targets: Targets,
    old_logprobs: PerToken | None,
    advantages: PerTokenOrSequence | None,
    mask: Mask | None = None,
    *,
    temperature: Temperature = 1.0,
    ignore_index: int = -100,
    vocab_mask: VocabMask | None = None,
    objective: ObjectiveLike = "ppo_clip",
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    ref_logprobs: PerToken | None = None,
    ref_logits: Logits | None = None,
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
    inplace_backward: bool = False,
    return_metrics: Literal[True],
    **params: ObjectiveOption,
) -> tuple[Scalar, Metrics]: ...


@overload
def logits_policy_loss(
    logits: Logits,
    targets: Targets,
    old_logprobs: PerToken | None,
    advantages: PerTokenOrSequence | None,
    mask: Mask | None = None,
    *,
    temperature: Temperature = 1.0,
    ignore_index: int = -100,
    vocab_mask: VocabMask | None = None,
    objective: ObjectiveLike = "ppo_clip",
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    ref_logprobs: PerToken | None = None,
    ref_logits: Logits | None = None,
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
    inplace_backward: bool = False,
    return_metrics: bool,
    **params: ObjectiveOption,
) -> Scalar | tuple[Scalar, Metrics]: ...


@takes_one_row(2, per_token=per_token)
def logits_policy_loss(
    logits: Logits,
    targets: Targets,
    old_logprobs: PerToken | None,
    advantages: PerTokenOrSequence | None,
    mask: Mask | None = None,
    *,
    temperature: Temperature = 1.0,
    ignore_index: int = -100,
    vocab_mask: VocabMask | None = None,
    objective: ObjectiveLike = "ppo_clip",
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    ref_logprobs: PerToken | None = None,
    ref_logits: Logits | None = None,
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
    inplace_backward: bool = False,
    return_metrics: bool = False,
    **params: ObjectiveOption,
) -> Scalar | tuple[Scalar, Metrics]:
    r"""Computes ``policy_loss`` straight from logits: statistics, objective and the gradient with respect to the logits
    in one pass over each row.

    ``sum_t w_t (l(logp_t, old_t, A_t) + kl_coef KL_t - entropy_coef H_t)``, with the letters of ``policy_loss``, and
    ``logp``, ``H`` those of ``token_stats``. ``policy_loss`` lists the objectives with their parameters.

    The row of a token of weight 0 is never read, nor its target and temperature: any id will do. A token of factor 0 is
    read for the metrics alone. What needs every row before any gradient takes the two passes of ``token_stats``:
    sequence-level ratios, objectives of sequences, groups and batches, a ``KLTerm``, ``ref_logits``,
    ``old_logprobs=None``, ``log_ratio_clamp``, ``top_entropy_fraction``, an ``opsm_delta``, ``reduction="none"``, and
    ``log_ratio_sq_coef`` beside a KL term.

    Args:
        logits, targets, temperature, ignore_index, vocab_mask: as for ``token_logprobs``; ``old_logprobs`` and
            ``ref_logprobs`` under the same temperature and mask.
        ref_logits: ``[..., V]`` of the reference, same dtype, no gradient, under the same temperature and mask, in
            place of ``ref_logprobs``. ``kl`` may be the exact KL then: ``"reverse_kl"``, ``KL(pi || ref)``, read in the
            same pass, or ``"forward_kl"``, ``KL(ref || pi)``, in a pass of its own. The penalty of PPO's paper,
            ``KL(old || pi)``, is the forward KL with the logits of the old policy.
        inplace_backward: the backward writes the gradient over ``logits``; nothing of their size is allocated.
        the rest: as for ``policy_loss``; the entropy is that of the row.

    Returns:
        Scalar, or one number per token, fp32 (fp64 for fp64 logits); with ``return_metrics``, ``(loss, dict)``, the
        metrics of ``policy_loss``.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as ``token_logprobs`` and ``policy_loss``.

    Example:
        >>> logits = torch.zeros(1, 2, 4, requires_grad=True)
        >>> old = torch.full((1, 2), 0.25).log()
        >>> loss = logits_policy_loss(logits, torch.tensor([[3, 0]]), old, torch.tensor([2.0]))
        >>> loss.backward()
        >>> round(loss.item(), 4), logits.grad[0, 0]
        (-2.0, tensor([ 0.2500,  0.2500,  0.2500, -0.7500]))
    """
    caller = "logits_policy_loss"
    checks.flags(caller, return_metrics=return_metrics)
    flat = flatten_logits(caller, logits, targets, temperature, ignore_index, vocab_mask, inplace_backward)
    ignore_index = flat.rows.ignore_index
    if not flat.shape:
        raise ValueError(
            f"{caller}: logits has shape {tuple(logits.shape)}, expected [T, V] or [B, L, V]; unsqueeze the one row"
        )
    targets = checks_tokens.holding(caller, targets, ignore_index)
    like = targets.new_empty(targets.shape, dtype=flat.real)
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
    checks.reference(caller, ref_logits, logits, None)
    checks.one_device(caller, "logits", logits, ref_logits=ref_logits)
    reference = "ref_logits", ref_logits
    penalty, bonus = check_terms(caller, like, ref_logprobs, kl, kl_coef, ROW, entropy_coef, reference)
    engine = None if correction is None else ratio.engine(caller, entry, correction, rollout_logprobs)
    factors = policy_factors(
        caller, correction, top_entropy_fraction, like, old_logprobs, engine, ratio_level, entry, choice
    )
    scored = targets != ignore_index
    live = scored if mask is None else live_tokens(caller, like, mask) & scored
    two_passes = ratio_level != "token" or choice is not None or isinstance(kl, KLTerm) or ref_logits is not None
    two_passes = two_passes or not ratio.in_one_launch(entry, penalty) or not summed(caller, reduction)
    if two_passes or factors is not None and factors.of_policy():
        kl, read = own_tokens(caller, kl, like, scored, live)
        exact = None if ref_logits is None else exact_kind(kl)
        if exact == "forward_kl" and inplace_backward:
            raise ValueError(
                f"{caller}: inplace_backward=True with kl='forward_kl': two gradients meet in the logits; leave "
                "inplace_backward out"
            )
        flat = flat.without(~read)
        stats, divergences = _two_passes(flat, ref_logits, exact, inplace_backward)
        if ref_logits is not None and exact is None:
            ref_logprobs = stats.ref_logp.view(flat.shape)
        estimate = cast("KL | KLTerm", "k3" if exact_kind(kl) else kl)
        try:
            result: Any = policy_loss(
                stats.logp.view(flat.shape),
                old_logprobs,
                advantages,
                live,
                objective=objective,
                aggregation=aggregation,
                weights=weights,
                ref_logprobs=ref_logprobs,
                kl=estimate,
                kl_coef=0.0 if exact_kind(kl) else kl_coef,
                entropy=stats.entropy.view(flat.shape),
                entropy_coef=entropy_coef,
                top_entropy_fraction=top_entropy_fraction,
                cu_seqlens=cu_seqlens,
                ratio_level=ratio_level,
                ratio_denominator=ratio_denominator,
                rollout_logprobs=rollout_logprobs,
                log_ratio_clamp=log_ratio_clamp,
                log_ratio_sq_coef=log_ratio_sq_coef,
                correction=correction,
                normalizers=normalizers,
                reduction=reduction,
                return_metrics=return_metrics,
                **params,
            )
        except checks.NAMED as error:
            if type(error) not in checks.NAMED:
                raise
            raise checks.named(error, "policy_loss") from error
        if divergences is None:
            return result
        unit, groups = ("token", None) if choice is None else (choice.kind.unit, choice.groups)
        if not summed(caller, reduction):
            shared = losses_of_tokens(caller, live, aggregation, weights, normalizers)
        else:
            if choice is not None:
                aggregation, normalizers = aggregation_of_units(caller, unit, groups, aggregation, weights, normalizers)
            elif ratio_level == "sequence_sum":
                aggregation = aggregation_of_sequences(aggregation, weights)
            shared = token_weights_of(caller, like, live, aggregation, weights, cu_seqlens, normalizers)
        of_loss = shared, aggregation, cu_seqlens, normalizers, weights is not None
        term = kl_penalty(caller, kl, like, None, None, scored, live, *of_loss)
        loss, metrics = result if isinstance(result, tuple) else (result, {})
        if penalty is not None:
            of_kl = term.exact_loss(divergences, penalty)
            if losses_of_sequences(shared, ratio_level, unit):
                tokens_of_sequences(caller, term, live)
                of_kl = means(of_kl, live, cu_seqlens)
            loss = loss + of_kl
        if not return_metrics:
            return loss
        return loss, metrics | term.exact_metrics(divergences, counted_tokens(live, shared.values))
    everywhere = mask is None and weights is None and not isinstance(flat.rows.temperature, torch.Tensor)
    weights = loss_weights(caller, like, live, aggregation, weights, cu_seqlens, normalizers)
    flat = flat if everywhere else flat.without(weights == 0)
    factor, of_factors = (None, {}) if factors is None else factors.fixed(live, cu_seqlens, flat.real)
    # The forward writes the gradient, a second tensor of the logits' size, only where the backward will hand it out.
    with_grad = (
        torch.is_grad_enabled() and logits.requires_grad and not inplace_backward and not torch.compiler.is_compiling()
    )
    # The square of the log-ratio takes the place of the KL, because it is another KL's k2.
    estimator, reference = named_objective(kl), ref_logprobs
    if ratio.square is not None:
        penalty, estimator, reference = ratio.square, SQUARE, rollout_logprobs
    policy = PolicyInputs(
        entry.function.__name__,
        [flat.per_row(c) for c in columns],
        parameters(values),
        flat.per_row(weights if factor is None else weights * factor),
        None if bonus is None else flat.per_row(weights * bonus),
        None if penalty is None else estimator,
        None if penalty is None else flat.per_row(reference),
        None if penalty is None else flat.per_row(weights * penalty),
    )
    serving = ops.serving("fused_policy", logits, objective=policy.objective)
    of_rows = ops.fused_policy(flat.rows, policy, with_grad, inplace_backward, serving)
    if not return_metrics:
        return of_rows.loss
    shape = flat.shape
    logp, entropy = of_rows.logp.view(shape), of_rows.entropy.view(shape)
    counted = counted_tokens(live, weights)
    if factor is not None:  # a row of factor 0 was not read, and the metrics count it
        missing = counted & ~policy.read().view(shape)
        with torch.no_grad():
            rows = flat.without(~missing).rows
            stats = ops.token_stats(rows, ops.ENTROPY, False, ops.serving("token_stats", logits))
        logp = torch.where(missing, stats.logp.view(shape), logp)
        entropy = torch.where(missing, stats.entropy.view(shape), entropy)
    metrics = policy_metrics(logp, columns, counted, ref_logprobs, kl, entropy, entry, values)
    return of_rows.loss, {**metrics, **of_factors}


def _two_passes(
    flat: FlatLogits, ref_logits: Logits | None, exact: ExactKL | None, inplace_backward: bool
) -> tuple[RowStats, Tensor | None]:
    """Returns the RowStats of a batch, and the KL of each row in the caller's shape, None without an ``exact`` one."""
    rows, models = flat.rows, 1 if ref_logits is None or exact == "forward_kl" else 2
    serving = ops.serving("token_stats", rows.logits, models=models)
    both = rows if ref_logits is None else replaced(rows, ref_logits=matrix(ref_logits))
    if exact == "forward_kl":
        stats = ops.token_stats(rows, ops.ENTROPY, inplace_backward, serving)
        of_reference = ops.Teacher(None, None, exact, 0.5)
        found = ops.divergences(both, of_reference, None, False, ops.serving("divergence", rows.logits))
        return stats, found.value.view(flat.shape)
    wanted = ops.ENTROPY if exact is None else ops.ENTROPY | ops.KL
    stats = ops.token_stats(both, wanted, inplace_backward, serving)
    return stats, None if exact is None else stats.kl.view(flat.shape)
