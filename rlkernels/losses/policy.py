"""The policy loss over log-probabilities, and the ratio term that policy losses share.

The objective is an argument by name, and so is the aggregation: no loss here is written for one of them.
"""

from typing import Literal, overload

from torch import Tensor

from rlkernels import checks
from rlkernels.backends.protocol import real_dtype
from rlkernels.checks import tokens as checks_tokens
from rlkernels.logits_layout import dense
from rlkernels.losses.kl_penalty import KLPenalty, kl_penalty
from rlkernels.losses.kl_term import KLTerm, simplified
from rlkernels.losses.policy_arguments import LOG_PROBABILITIES, check_terms, objective_columns, resolve_either
from rlkernels.losses.policy_factors import PolicyFactors, policy_factors
from rlkernels.losses.policy_metrics import policy_metrics
from rlkernels.losses.row_objectives import row_term
from rlkernels.losses.row_options import RowChoice
from rlkernels.losses.token_weights import (
    TokenWeights,
    aggregation_of_sequences,
    aggregation_of_units,
    full_mask,
    live_mask,
    token_weights_of,
)
from rlkernels.losses.weighted_sum import Params, scaled_sum, weighted_sum
from rlkernels.objectives import Objective
from rlkernels.rollout.correction import CorrectionLike
from rlkernels.sequences import means, spread, sums
from rlkernels.types import (
    KL,
    Aggregation,
    Mask,
    Metrics,
    Normalizers,
    Number,
    ObjectiveLike,
    ObjectiveOption,
    Offsets,
    PerToken,
    PerTokenOrSequence,
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
    rollout_logprobs: PerToken | None = None,
    correction: CorrectionLike | None = None,
    normalizers: Normalizers | None = None,
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
    rollout_logprobs: PerToken | None = None,
    correction: CorrectionLike | None = None,
    normalizers: Normalizers | None = None,
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
    rollout_logprobs: PerToken | None = None,
    correction: CorrectionLike | None = None,
    normalizers: Normalizers | None = None,
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
    rollout_logprobs: PerToken | None = None,
    correction: CorrectionLike | None = None,
    normalizers: Normalizers | None = None,
    return_metrics: bool = False,
    **params: ObjectiveOption,
) -> Scalar | tuple[Scalar, Metrics]:
    r"""A policy objective over log-probabilities, with a KL and an entropy term.

    One launch per term, and one to count the tokens of a masked mean.

    ``sum_t w_t (l(logp_t, old_t, A_t) + kl_coef KL_t - entropy_coef H_t)``;  ``w``: the aggregation's weights. Every
    term has the same ones, so the losses of micro-batches and ranks, with the normalisers of the whole batch, add up to
    the loss of the batch. TRL's bonus is a token mean in every aggregation: for that one leave ``entropy_coef`` out and
    subtract ``entropy_coef * aggregate(entropy, mask)``.

    Args:
        logprobs: ``[B, L]``, or packed ``[T]``; the log-probabilities under the policy, the only argument besides
            ``entropy`` that gets a gradient.
        old_logprobs: same shape, under the behaviour policy. An objective without this column (``reinforce``) ignores
            it; None will do there.
        advantages: same shape, or one per sequence: ``[B]``, ``[B, 1]``, or, with ``cu_seqlens``, ``[S, 1]`` or
            ``[S]``. Where ``[S]`` could be ``[T]``, too, it raises.
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
        rollout_logprobs, correction: log-probabilities of the rollout engine, same shape, for an objective with the
            column ``rollout_logp`` (reduced like the others at a sequence level), or with a ``Correction`` or a dict of
            its options; or, without the former, a tensor of factors, same shape, bool or floating, such as
            ``rho_correction`` and ``rejection_mask`` return. The objective's loss of a token is multiplied by it; KL,
            bonus and the count of a mean are not. With the ratio of ``"sequence"`` and ``"sequence_token"`` a
            ``Correction`` multiplies nothing: the engine takes the place of the behaviour policy in the ratio
            (OpenRLHF's GSPO).
        Coefficients and parameters: numbers, or tensors of shape ``()`` without gradient. One on a device is never
            read: its range is not checked, and an objective with such a parameter runs in plain torch between the
            kernels (for a schedule or a learned bound).

    Returns:
        Scalar, fp32 (fp64 for fp64 inputs); with ``return_metrics``, ``(loss, dict)`` of masked, detached scalars.

    Raises:
        ValueError: shapes that do not match, unknown names, a coefficient or a column of the objective without its
            input, ``rollout_logprobs`` that the objective does not take, two sources of weights; on a CPU (elsewhere
            with ``RLKERNELS_CHECK=1``) a float mask of other values than 0 and 1.
        TypeError: a parameter that the objective does not take, or one it needs.

    Example:
        >>> logprobs = torch.tensor([[-1.0, -2.0, -0.5]], requires_grad=True)
        >>> old, advantages = torch.tensor([[-1.0, -2.5, -0.5]]), torch.tensor([1.0])
        >>> loss = policy_loss(logprobs, old, advantages, torch.tensor([[1, 1, 0]]))
        >>> loss.backward()
        >>> round(loss.item(), 4), logprobs.grad
        (-1.1, tensor([[-0.5000, -0.0000,  0.0000]]))

    Schulman et al. 2017, arXiv:1707.06347 (PPO); Shao et al. 2024, arXiv:2402.03300 (GRPO); Zheng et al. 2025,
    arXiv:2507.18071 (GSPO).
    """
    caller = "policy_loss"
    checks.floating(caller, "logprobs", logprobs)
    checks.no_forward_ad(caller, logprobs, entropy)
    cu_seqlens = checks_tokens.rows(caller, "logprobs", logprobs, cu_seqlens)
    entry, values, further, choice = resolve_either(
        caller, objective, params, logprobs, cu_seqlens, ratio_level, advantages, ref_logprobs
    )
    columns = objective_columns(
        caller,
        entry,
        logprobs,
        old_logprobs,
        advantages,
        ref_logprobs,
        rollout_logprobs,
        further,
        cu_seqlens,
        ratio_level,
        correction is not None,
    )
    live = live_mask(caller, logprobs, mask)
    if choice is not None:
        aggregation, normalizers = aggregation_of_units(
            caller, choice.kind.unit, choice.groups, aggregation, weights, normalizers
        )
    elif ratio_level == "sequence_sum":
        aggregation = aggregation_of_sequences(aggregation, weights)
    token_weights = token_weights_of(caller, logprobs, live, aggregation, weights, cu_seqlens, normalizers)
    kl = simplified(kl)
    kl_coef, entropy_coef = check_terms(caller, logprobs, ref_logprobs, kl, kl_coef, entropy, entropy_coef)
    factors = policy_factors(
        caller, correction, top_entropy_fraction, logprobs, old_logprobs, rollout_logprobs, ratio_level, entry, choice
    )
    if top_entropy_fraction is not None and entropy is None:
        raise ValueError(f"{caller}: top_entropy_fraction needs entropy")
    penalty = None
    if ref_logprobs is not None and (kl_coef is not None or isinstance(kl, KLTerm)):
        shared = token_weights, aggregation, cu_seqlens, normalizers, weights is not None
        penalty = kl_penalty(caller, kl, logprobs, ref_logprobs, old_logprobs, None, live, *shared)

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
        choice,
        factors,
        ref_logprobs,
        penalty,
        (kl_coef, entropy_coef),
    )
    if not return_metrics:
        return loss
    live = full_mask(logprobs, live)
    metrics = policy_metrics(logp, columns, live, ref_logprobs, kl, entropy, entry, values, ratio_level, cu_seqlens)
    if penalty is not None and isinstance(kl, KLTerm):
        metrics |= penalty.metrics(logp)
    return loss, metrics | of_factors


def policy_terms(
    caller: str,
    entry: Objective,
    logp: Tensor,
    entropy: Tensor | None,
    columns: list[Tensor],
    params: Params,
    weights: TokenWeights,
    sequences: tuple[Tensor | None, Tensor | None, RatioLevel],
    choice: RowChoice | None,
    factors: PolicyFactors | None,
    ref_logprobs: PerToken | None,
    penalty: KLPenalty | None,
    coefficients: tuple[Number | None, Number | None],
) -> tuple[Tensor, list[Tensor], Metrics]:
    """Computes the sum of the terms of a policy loss of checked arguments.

    ``sequences``: live tokens, offsets and ratio level. ``coefficients``: of the KL and the entropy term, or None.

    Returns:
        the loss, the columns of its ratio, and the metrics of its factors.
    """
    live, cu_seqlens, level = sequences
    kl_coef, entropy_coef = coefficients
    policy = bonus = weights
    engine: Tensor | None = None
    metrics: Metrics = {}
    if factors is not None:
        every = full_mask(logp, live)
        columns = factors.columns(caller, columns, every, cu_seqlens)
        policy, bonus, engine, metrics = factors.weights(weights, logp, entropy, columns, every, cu_seqlens)
    if choice is None:
        loss = ratio_term(caller, entry, logp, columns, params, policy, live, cu_seqlens, level)
    else:
        loss = row_term(choice, logp, columns, policy, full_mask(logp, live), cu_seqlens, ref_logprobs, engine)
    if kl_coef is not None:
        loss = loss + penalty.loss(logp, kl_coef)
    if entropy_coef is not None:
        # By the objective "nll", which is minus its column, because it takes one launch and plain torch takes six.
        loss = loss + scaled_sum(entropy_coef, "nll", entropy, [], bonus)
    return loss, columns, metrics


def ratio_term(
    caller: str,
    entry: Objective,
    logp: Tensor,
    columns: list[Tensor],
    params: Params,
    weights: TokenWeights,
    live: Tensor | None,
    cu_seqlens: Tensor | None,
    level: RatioLevel,
) -> Tensor:
    """Computes the weighted sum of a policy objective whose ratio is that of a token or of a sequence."""
    objective = entry.function.__name__
    if level == "token":
        return weighted_sum(objective, logp, columns, params, weights)
    live = full_mask(logp, live)
    if cu_seqlens is None and logp.dim() != 2:
        raise ValueError(
            f"{caller}: ratio_level {level!r} needs logprobs [B, L], or packed [T] with cu_seqlens; got "
            f"shape {tuple(logp.shape)}"
        )
    # float64 to the end, because a log-ratio is the small difference of large numbers. Sums over 32768 tokens that are
    # rounded to fp32 miss it by 4e-3.
    now, wide = logp.double(), dict(zip(entry.columns[1:], (x.double() for x in columns), strict=True))
    if level == "sequence_sum":
        # One loss per sequence. An advantage per token enters as its mean, because it is constant along the sequence in
        # every published use. So does every other column that is no log-probability.
        for name, x in wide.items():
            wide[name] = (sums if name in LOG_PROBABILITIES else means)(x, live, cu_seqlens)
        now, weights = sums(now, live, cu_seqlens), TokenWeights(sums(weights.values.double(), live, cu_seqlens))
    else:
        fixed = now.detach()
        for name in LOG_PROBABILITIES:
            if name not in wide:
                continue
            if level == "sequence":
                wide[name] = spread(means(wide[name], live, cu_seqlens), live, cu_seqlens)
            else:
                wide[name] = fixed - spread(means(fixed - wide[name], live, cu_seqlens), live, cu_seqlens)
        if level == "sequence":
            now = spread(means(now, live, cu_seqlens), live, cu_seqlens)
    return weighted_sum(objective, now, list(wide.values()), params, weights).to(logp.dtype)
