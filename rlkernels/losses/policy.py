"""The policy loss over log-probabilities, and the ratio term that policy losses share.

The objective is an argument by name, and so is the aggregation: no loss here is written for one of them.
"""

from typing import Literal, overload

from rlkernels import checks
from rlkernels.backends.protocol import real_dtype
from rlkernels.checks import tokens as checks_tokens
from rlkernels.logits_layout import dense
from rlkernels.losses.kl_penalty import kl_penalty
from rlkernels.losses.kl_term import KLTerm, simplified
from rlkernels.losses.policy_arguments import check_terms, objective_columns, resolve_either
from rlkernels.losses.policy_factors import policy_factors
from rlkernels.losses.policy_metrics import policy_metrics
from rlkernels.losses.policy_ratio import ratio_options
from rlkernels.losses.policy_terms import policy_terms
from rlkernels.losses.row_options import per_token
from rlkernels.losses.token_weights import (
    aggregation_of_sequences,
    aggregation_of_units,
    counted_tokens,
    full_mask,
    live_mask,
    losses_of_tokens,
    summed,
    token_weights_of,
)
from rlkernels.packed_rows import is_one_row, on_one_row
from rlkernels.rollout.correction import CorrectionLike
from rlkernels.types import (
    KL,
    Aggregation,
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
)


@overload
def policy_loss(
    logprobs: PerToken,
    old_logprobs: PerToken | None,
    advantages: PerTokenOrSequence | None,
    mask: Mask | None = None,
    *,
    objective: ObjectiveLike = "ppo_clip",
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    ref_logprobs: PerToken | None = None,
    kl: KL | KLTerm = "k3",
    kl_coef: Number = 0.0,
    entropy: PerToken | None = None,
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
def policy_loss(
    logprobs: PerToken,
    old_logprobs: PerToken | None,
    advantages: PerTokenOrSequence | None,
    mask: Mask | None = None,
    *,
    objective: ObjectiveLike = "ppo_clip",
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    ref_logprobs: PerToken | None = None,
    kl: KL | KLTerm = "k3",
    kl_coef: Number = 0.0,
    entropy: PerToken | None = None,
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
def policy_loss(
    logprobs: PerToken,
    old_logprobs: PerToken | None,
    advantages: PerTokenOrSequence | None,
    mask: Mask | None = None,
    *,
    objective: ObjectiveLike = "ppo_clip",
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    ref_logprobs: PerToken | None = None,
    kl: KL | KLTerm = "k3",
    kl_coef: Number = 0.0,
    entropy: PerToken | None = None,
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


def policy_loss(
    logprobs: PerToken,
    old_logprobs: PerToken | None,
    advantages: PerTokenOrSequence | None,
    mask: Mask | None = None,
    *,
    objective: ObjectiveLike = "ppo_clip",
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    ref_logprobs: PerToken | None = None,
    kl: KL | KLTerm = "k3",
    kl_coef: Number = 0.0,
    entropy: PerToken | None = None,
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
    r"""Computes a policy objective over log-probabilities, with a KL and an entropy term.

    One launch per term, and one to count the tokens of a masked mean.

    ``sum_t w_t (l(logp_t, old_t, A_t) + kl_coef KL_t - entropy_coef H_t)``;  ``w``: the aggregation's weights. Every
    term has the same ones, so the losses of micro-batches and ranks, with the normalisers of the whole batch, add up to
    the loss of the batch. TRL's bonus is a token mean in every aggregation: for that one leave ``entropy_coef`` out and
    subtract ``entropy_coef * aggregate(entropy, mask)``.

    Args:
        logprobs: ``[B, L]``, or packed ``[T]``; the log-probabilities under the policy, the only argument besides
            ``entropy`` that gets a gradient.
        old_logprobs: same shape, under the behaviour policy. None stands for the current policy, detached: every ratio
            is then 1 and has its gradient. An objective without this column (``reinforce``) ignores it.
        advantages: same shape, or one per sequence: ``[B]``, ``[B, 1]``, or, with ``cu_seqlens``, ``[S, 1]`` or
            ``[S]``. Where ``[S]`` could be ``[T]``, too, it raises. None for an objective without an
            advantage (``ref_kl``).
        mask: live tokens, same shape, any pattern: bool, integers (not 0: live), or floats that are 0 and 1. A dead
            token touches neither loss nor gradient, whatever it holds.
        objective: the name of a registered objective with first column ``logp``, or its function. Its parameters are
            further keywords (``clip_low``, ``clip_high``, ...), with the defaults of its signature. So are the columns
            that no argument here fills: tensors shaped like ``logprobs``, without gradient. Or an objective of
            sequences, groups or batches: ``"gmpo"``, ``"vespo"``, ``"fipo"``, ``"real"``, ``"kl_cov"``, ``"clip_cov"``,
            ``"a2po"``; docs/objectives.md has their formulas and options. The mean of a loss per sequence (``"gmpo"``,
            ``"a2po"``) or per group (``"real"``) is one over these: ``"token-mean"`` stands for ``"seq-mean"`` or
            ``"group-mean"`` there.
        aggregation, normalizers: mode and keyword arguments of ``token_weights``: totals of the whole batch, where this
            call sees a part of it.
        weights: per-token weights, same shape, instead of an aggregation.
        ref_logprobs, kl, kl_coef: reference log-probabilities, the estimator (``"k1"``, ``"k2"``, ``"k3"``, ``"abs"``,
            or a ``KLTerm`` with clamps, another gradient, the ratio, a mask of its own), and its coefficient. With a
            coefficient of 0 they are for the metric alone. An objective with the column ``ref_logp`` takes them, too.
        entropy, entropy_coef: per-token entropies and the coefficient of their bonus; with 0, for the metric alone.
        top_entropy_fraction: the objective and the bonus keep the tokens of ``top_entropy_mask(entropy, mask,
            fraction)`` alone; the KL term and the count of a mean keep all. None keeps all everywhere.
        cu_seqlens: ``[S + 1]`` offsets of a packed batch, int32, int64 or a list. On a CPU wrong ones raise, in a
            compiled program, too.
        ratio_level: ``"token"``; ``"sequence"``: one ratio ``exp(mean_t d_t)`` per sequence (GSPO);
            ``"sequence_token"``: its value with a gradient per token (GSPO-token); ``"sequence_sum"``: ``exp(sum_t
            d_t)``, one loss per sequence, which weighs what its live tokens weigh together. The mean of such losses is
            one over sequences: ``"token-mean"`` stands for ``"seq-mean"`` there.
        ratio_denominator: ``"old"``; ``"rollout"``: ``rollout_logprobs`` take the place of ``old_logprobs``, which
            corrects the mismatch, so that no ``Correction`` with weights goes with it.
        rollout_logprobs: same shape, the log-probabilities that the rollout engine reported, for an objective with the
            column ``rollout_logp`` and for the options that name them. Log-probabilities of all kinds are reduced alike
            at a sequence level.
        log_ratio_clamp: bounds of the log-ratio, behind its reduction at a sequence level: a number ``c`` for ``[-c,
            c]``, or a pair in which None is no bound. Beyond them the log-ratio has no gradient; the constant weight of
            CISPO and of ``rollout_is`` is bounded, and their gradient stays. For objectives of the log-ratio alone.
            OpenRLHF and verl take 20.
        log_ratio_sq_coef: adds ``log_ratio_sq_coef (logp_t - rollout_t)^2`` on the tokens of the loss, with its
            weights. Kimi K2.5, arXiv:2602.02276.
        correction: a ``Correction`` of ``rollout_logprobs`` or a dict of its options; or, without these, a tensor of
            factors, same shape, bool or floating, such as ``rho_correction`` and ``rejection_mask`` return. The
            objective's loss of a token is multiplied by it; KL, bonus and the count of a mean are not. With the ratio
            of ``"sequence"`` and ``"sequence_token"`` a ``Correction`` multiplies nothing: the engine takes the place
            of the behaviour policy in the ratio (OpenRLHF's GSPO).
        reduction: ``"none"``: the loss of each token in place of the sum, shaped like ``logprobs`` and 0 at dead
            tokens; with ``"sequence_sum"`` and an objective of sequences or groups that of each sequence, ``[B]`` or
            ``[S]``, where KL and bonus enter as means over its tokens, and a group's loss stands at each of its
            sequences. It has no weights, so that none may be given.
        Coefficients and parameters: numbers, or tensors of shape ``()`` without gradient. One on a device is never
            read: its range is not checked, and an objective with such a parameter runs in plain torch between the
            kernels (for a schedule or a learned bound).

    Returns:
        Scalar, or one number per token or sequence, fp32 (fp64 for fp64 inputs); with ``return_metrics``, ``(loss,
        dict)`` of detached means over live tokens of another weight than 0, factors apart:

        - ``ppo_kl`` and ``approx_kl``: k1 and k2 of the old against the new policy; ``entropy`` where it is known.
        - ``ratio``, ``ratio_min``, ``ratio_max``: mean and extremes of the ratio that the loss clips.
        - ``clip_fraction``: the tokens whose clipped surrogate is the smaller one, or which a gate leaves out; of a
          bounded objective its parts ``clip_fraction_low`` and ``clip_fraction_high``; ``clip_fraction_dual`` and
          ``clip_fraction_cap`` of such bounds. At a sequence level ``seq_clip_fraction``, ``seq_clip_fraction_low`` and
          ``seq_clip_fraction_high``: shares of sequences with a live token.
        - ``kl``: the mean of the KL term over its own tokens, where there is a reference.
        - ``rollout_weight``, ``rollout_weight_ess``, ``rollout_filtered`` of a ``Correction`` with weights, as
          ``rollout_weights`` has them.

    Raises:
        ValueError: shapes that do not match, unknown names, a coefficient or a column of the objective without its
            input, ``rollout_logprobs`` or advantages that nothing takes, two sources of weights; on a CPU (elsewhere
            with ``RLKERNELS_CHECK=1``) a float mask of other values than 0 and 1.
        TypeError: a parameter that the objective does not take, or one it needs.

    Example:
        >>> logprobs = torch.tensor([[-1.0, -2.0, -0.5]], requires_grad=True)
        >>> old, advantages = torch.tensor([[-1.0, -2.5, -0.5]]), torch.tensor([1.0])
        >>> loss = policy_loss(logprobs, old, advantages, torch.tensor([[1, 1, 0]]))
        >>> loss.backward()
        >>> round(loss.item(), 4), logprobs.grad
        (-1.1, tensor([[-0.5000, -0.0000,  0.0000]]))

    Every objective with its parameters, of which one without a value has no default: ``reinforce``, ``surrogate``,
    ``ppo_clip(clip_low=0.2, clip_high=0.2)``, ``dual_clip(clip_low=0.2, clip_high=0.2, dual_clip=3.0)``,
    ``ppo_clip_cap(ratio_cap, clip_low=0.2, clip_high=0.2)``, ``cispo(clip_low, clip_high)``,
    ``cispo_max_only(clip_high)``, ``cispo_absolute(ratio_max)``, ``dro(beta)``, ``sapo(tau_pos=1.0, tau_neg=1.05)``,
    ``rollout_is(clip_low, clip_high)``, ``dppo_tv(delta_low=0.2, delta_high=0.2, ratio_max=20.0)``,
    ``dppo_tv_surrogate(delta_low=0.2, delta_high=0.2)``, ``dppo_kl(delta_low=0.2, delta_high=0.2, ratio_max=20.0)``,
    ``dppo_kl_surrogate(delta_low=0.2, delta_high=0.2)``, ``tv_symmetric(delta=0.1)``, ``ref_kl(delta_low=0.2)``,
    ``gmpo(clip_low=0.4, clip_high=0.4)``, ``vespo(k_pos=2.0, lambda_pos=3.0, k_neg=3.0, lambda_neg=2.0)``,
    ``fipo(clip_low=0.2, clip_high=0.2, half_life=32.0, influence_clip=0.2, influence_high_only=True,
    safety_threshold=4.0, ratio_cap=None)``, ``real(tau=0.5, group_size=None, group_ids)``,
    ``kl_cov(kl_cov_ratio=0.0002, kl_cov_coef=1.0)``, ``clip_cov(clip_low=0.2, clip_high=0.2, clip_cov_low=1.0,
    clip_cov_high=5.0, clip_cov_ratio=0.0002, generator=None, clip_cov_tokens)``, ``a2po(beta1=0.5, beta2=0.001,
    rewards, value_pool)``.

    Others by their names: GRPO and DAPO are ``ppo_clip``, with ``clip_high=0.28`` for the latter. LUSPO is
    ``ratio_level="sequence"`` with ``"seq-mean-token-sum"``, and PPO of whole sequences (RLOO) is ``"sequence_sum"``.
    The likelihood of good answers (VAPO) is another term: add ``mu * logprobs_sft_loss(logprobs, mask_of_them)``.

    Schulman et al. 2017, arXiv:1707.06347 (PPO); Shao et al. 2024, arXiv:2402.03300 (GRPO); Zheng et al. 2025,
    arXiv:2507.18071 (GSPO).
    """
    if cu_seqlens is not None and is_one_row(logprobs):
        return on_one_row(policy_loss, locals(), "logprobs", per_token(locals()))
    caller = "policy_loss"
    checks.flags(caller, return_metrics=return_metrics)
    checks.floating(caller, "logprobs", logprobs)
    checks.no_forward_ad(caller, logprobs, entropy)
    cu_seqlens = checks_tokens.rows(caller, "logprobs", logprobs, cu_seqlens, mask)
    entry, values, further, choice = resolve_either(
        caller, objective, params, logprobs, cu_seqlens, ratio_level, advantages, ref_logprobs
    )
    ratio = ratio_options(
        caller, entry, logprobs, old_logprobs, rollout_logprobs, ratio_denominator, log_ratio_clamp, log_ratio_sq_coef
    )
    columns = objective_columns(
        caller,
        entry,
        logprobs,
        ratio.old,
        advantages,
        ref_logprobs,
        ratio.rollout,
        further,
        cu_seqlens,
        ratio_level,
        correction is not None,
    )
    live = live_mask(caller, logprobs, mask)
    kl = simplified(kl)
    is_sum = summed(caller, reduction)
    if not is_sum:
        token_weights = losses_of_tokens(caller, live, aggregation, weights, normalizers)
    elif choice is not None:
        aggregation, normalizers = aggregation_of_units(
            caller, choice.kind.unit, choice.groups, aggregation, weights, normalizers
        )
    elif ratio_level == "sequence_sum":
        aggregation = aggregation_of_sequences(aggregation, weights)
    if is_sum:
        token_weights = token_weights_of(caller, logprobs, live, aggregation, weights, cu_seqlens, normalizers)
    kl_coef, entropy_coef = check_terms(caller, logprobs, ref_logprobs, kl, kl_coef, entropy, entropy_coef)
    engine = None if correction is None else ratio.engine(caller, entry, correction, rollout_logprobs)
    factors = policy_factors(
        caller, correction, top_entropy_fraction, logprobs, old_logprobs, engine, ratio_level, entry, choice
    )
    if top_entropy_fraction is not None and entropy is None:
        raise ValueError(f"{caller}: top_entropy_fraction needs entropy")
    penalty = None
    if ref_logprobs is not None and (kl_coef is not None or isinstance(kl, KLTerm)):
        shared = token_weights, aggregation, cu_seqlens, normalizers, weights is not None, ratio_level
        penalty = kl_penalty(caller, kl, logprobs, ref_logprobs, ratio.old, None, live, *shared)

    real = real_dtype(logprobs.dtype)
    logp = dense(logprobs, real)
    loss, columns, of_factors = policy_terms(
        caller,
        entry,
        logp,
        entropy if entropy is None else dense(entropy, real),
        columns,
        values,
        token_weights,
        (live, cu_seqlens, ratio_level),
        ratio,
        rollout_logprobs,
        choice,
        factors,
        ref_logprobs,
        penalty,
        (kl_coef, entropy_coef),
    )
    if not return_metrics:
        return loss
    live = full_mask(logprobs, live)
    counted = counted_tokens(live, token_weights.values)
    metrics = policy_metrics(
        logp, columns, live, ref_logprobs, kl, entropy, entry, values, ratio_level, cu_seqlens, ratio.clamp, counted
    )
    if penalty is not None and isinstance(kl, KLTerm):
        metrics |= penalty.metrics(logp, counted)
    return loss, metrics | of_factors
