"""A policy loss straight from logits: statistics, objective and gradient in one pass over each row."""

from typing import Literal, overload

import torch

from rlkernels import checks, ops
from rlkernels.backends.protocol import PolicyInputs
from rlkernels.checks import tokens as checks_tokens
from rlkernels.logits_layout import flatten_logits
from rlkernels.losses.policy import policy_loss
from rlkernels.losses.policy_arguments import ROW, check_terms, objective_columns, resolve
from rlkernels.losses.policy_metrics import policy_metrics
from rlkernels.losses.policy_ratio import SQUARE, ratio_options
from rlkernels.losses.token_weights import live_tokens, loss_weights
from rlkernels.losses.weighted_sum import parameters
from rlkernels.types import (
    KL,
    Aggregation,
    Logits,
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
    inplace_backward: bool = False,
    return_metrics: Literal[False] = False,
    **params: Number | PerToken,
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
    inplace_backward: bool = False,
    return_metrics: Literal[True],
    **params: Number | PerToken,
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
    inplace_backward: bool = False,
    return_metrics: bool,
    **params: Number | PerToken,
) -> Scalar | tuple[Scalar, Metrics]: ...


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
    inplace_backward: bool = False,
    return_metrics: bool = False,
    **params: Number | PerToken,
) -> Scalar | tuple[Scalar, Metrics]:
    r"""``policy_loss`` straight from logits: statistics, objective and the gradient with respect to the logits in one
    pass over each row.

    The row of a token of weight 0 is never read, nor its target and temperature: any id will do. Sequence-level ratios
    need every row before any gradient: they take the two passes of ``token_stats``. So do ``old_logprobs=None``,
    ``log_ratio_clamp``, ``reduction="none"``, and ``log_ratio_sq_coef`` beside a KL term.

    Args:
        logits, targets, temperature, ignore_index, vocab_mask: as for ``token_logprobs``; ``old_logprobs`` and
            ``ref_logprobs`` under the same temperature and mask.
        inplace_backward: the backward writes the gradient over ``logits``; nothing of their size is allocated.
        the rest: as for ``policy_loss``; the entropy is that of the row.

    Returns:
        Scalar, or one number per token, fp32 (fp64 for fp64 logits); with ``return_metrics``, ``(loss, dict)``.

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
    flat = flatten_logits(caller, logits, targets, temperature, ignore_index, vocab_mask, inplace_backward)
    ignore_index = flat.rows.ignore_index
    if not flat.shape:
        raise ValueError(
            f"{caller}: logits has shape {tuple(logits.shape)}, expected [T, V] or [B, L, V]; unsqueeze the one row"
        )
    entry, values, further = resolve(caller, objective, params, logits)
    targets = checks_tokens.holding(caller, targets, ignore_index)
    like = targets.new_empty(targets.shape, dtype=flat.real)
    cu_seqlens = checks_tokens.rows(caller, "targets", targets, cu_seqlens)
    ratio = ratio_options(
        caller, entry, like, old_logprobs, rollout_logprobs, ratio_denominator, log_ratio_clamp, log_ratio_sq_coef
    )
    columns = objective_columns(
        caller, entry, like, ratio.old, advantages, ref_logprobs, ratio.rollout, further, cu_seqlens, ratio_level
    )
    penalty, bonus = check_terms(caller, like, ref_logprobs, kl, kl_coef, ROW, entropy_coef)
    scored = targets != ignore_index
    live = scored if mask is None else live_tokens(caller, like, mask) & scored
    if ratio_level != "token" or reduction != "aggregation" or not ratio.in_one_launch(entry, penalty):
        flat = flat.without(~live)
        stats = ops.token_stats(flat.rows, ops.ENTROPY, inplace_backward, ops.serving("token_stats", logits))
        try:
            return policy_loss(
                stats.logp.view(flat.shape),
                old_logprobs,
                advantages,
                live,
                objective=objective,
                aggregation=aggregation,
                weights=weights,
                ref_logprobs=ref_logprobs,
                kl=kl,
                kl_coef=kl_coef,
                entropy=stats.entropy.view(flat.shape),
                entropy_coef=entropy_coef,
                cu_seqlens=cu_seqlens,
                ratio_level=ratio_level,
                ratio_denominator=ratio_denominator,
                rollout_logprobs=rollout_logprobs,
                log_ratio_clamp=log_ratio_clamp,
                log_ratio_sq_coef=log_ratio_sq_coef,
                normalizers=normalizers,
                reduction=reduction,
                return_metrics=return_metrics,
                **params,
            )
        except checks.NAMED as error:
            if type(error) not in checks.NAMED:
                raise
            raise checks.named(error, "policy_loss") from error
    everywhere = mask is None and weights is None and not isinstance(flat.rows.temperature, torch.Tensor)
    weights = loss_weights(caller, like, live, aggregation, weights, cu_seqlens, normalizers)
    flat = flat if everywhere else flat.without(weights == 0)
    # The forward writes the gradient, a second tensor of the logits' size, only where the backward will hand it out.
    with_grad = (
        torch.is_grad_enabled() and logits.requires_grad and not inplace_backward and not torch.compiler.is_compiling()
    )
    # The square of the log-ratio takes the place of the KL, because it is another KL's k2.
    estimator, reference = kl, ref_logprobs
    if ratio.square is not None:
        penalty, estimator, reference = ratio.square, SQUARE, rollout_logprobs
    policy = PolicyInputs(
        entry.function.__name__,
        [flat.per_row(c) for c in columns],
        parameters(values),
        flat.per_row(weights),
        None if bonus is None else flat.per_row(weights * bonus),
        None if penalty is None else estimator,
        None if penalty is None else flat.per_row(reference),
        None if penalty is None else flat.per_row(weights * penalty),
    )
    of_rows = ops.fused_policy(flat.rows, policy, with_grad, inplace_backward, ops.serving("fused_policy", logits))
    if not return_metrics:
        return of_rows.loss
    shape = flat.shape
    read = live & (weights != 0)  # a row of weight 0 is not read, and has no metrics
    logp, entropy = of_rows.logp.view(shape), of_rows.entropy.view(shape)
    return of_rows.loss, policy_metrics(logp, columns, read, ref_logprobs, kl, entropy, entry, values)
