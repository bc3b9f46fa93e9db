"""The policy loss over log-probabilities, and the ratio term that policy losses share.

The objective is an argument by name, and so is the aggregation: no loss here is written for one of them.
"""

from typing import Literal, overload

from torch import Tensor

from rlkernels import checks
from rlkernels.backends.protocol import real_dtype
from rlkernels.checks import tokens as checks_tokens
from rlkernels.logits_layout import dense
from rlkernels.losses.policy_arguments import check_terms, objective_columns, resolve
from rlkernels.losses.policy_metrics import policy_metrics
from rlkernels.losses.token_weights import (
    TokenWeights,
    aggregation_of_sequences,
    full_mask,
    live_mask,
    token_weights_of,
)
from rlkernels.losses.weighted_sum import Params, scaled_sum, weighted_sum
from rlkernels.packed_rows import takes_one_row
from rlkernels.sequences import means, spread, sums
from rlkernels.types import (
    KL,
    Aggregation,
    Mask,
    Metrics,
    Normalizers,
    Number,
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
    advantages: PerTokenOrSequence,
    mask: Mask | None = None,
    *,
    objective: str = "ppo_clip",
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    ref_logprobs: PerToken | None = None,
    kl: KL = "k3",
    kl_coef: Number = 0.0,
    entropy: PerToken | None = None,
    entropy_coef: Number = 0.0,
    cu_seqlens: Offsets | None = None,
    ratio_level: RatioLevel = "token",
    normalizers: Normalizers | None = None,
    return_metrics: Literal[False] = False,
    **params: Number,
) -> Scalar: ...


@overload
def policy_loss(
    logprobs: PerToken,
    old_logprobs: PerToken | None,
    advantages: PerTokenOrSequence,
    mask: Mask | None = None,
    *,
    objective: str = "ppo_clip",
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    ref_logprobs: PerToken | None = None,
    kl: KL = "k3",
    kl_coef: Number = 0.0,
    entropy: PerToken | None = None,
    entropy_coef: Number = 0.0,
    cu_seqlens: Offsets | None = None,
    ratio_level: RatioLevel = "token",
    normalizers: Normalizers | None = None,
    return_metrics: Literal[True],
    **params: Number,
) -> tuple[Scalar, Metrics]: ...


@overload
def policy_loss(
    logprobs: PerToken,
    old_logprobs: PerToken | None,
    advantages: PerTokenOrSequence,
    mask: Mask | None = None,
    *,
    objective: str = "ppo_clip",
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    ref_logprobs: PerToken | None = None,
    kl: KL = "k3",
    kl_coef: Number = 0.0,
    entropy: PerToken | None = None,
    entropy_coef: Number = 0.0,
    cu_seqlens: Offsets | None = None,
    ratio_level: RatioLevel = "token",
    normalizers: Normalizers | None = None,
    return_metrics: bool,
    **params: Number,
) -> Scalar | tuple[Scalar, Metrics]: ...


@takes_one_row()
def policy_loss(
    logprobs: PerToken,
    old_logprobs: PerToken | None,
    advantages: PerTokenOrSequence,
    mask: Mask | None = None,
    *,
    objective: str = "ppo_clip",
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    ref_logprobs: PerToken | None = None,
    kl: KL = "k3",
    kl_coef: Number = 0.0,
    entropy: PerToken | None = None,
    entropy_coef: Number = 0.0,
    cu_seqlens: Offsets | None = None,
    ratio_level: RatioLevel = "token",
    normalizers: Normalizers | None = None,
    return_metrics: bool = False,
    **params: Number,
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
        objective: a registered name with first column ``logp``; its parameters are further keywords (``clip_low``,
            ``clip_high``, ...).
        aggregation, normalizers: mode and keyword arguments of ``token_weights``: totals of the whole batch, where this
            call sees a part of it.
        weights: per-token weights, same shape, instead of an aggregation.
        ref_logprobs, kl, kl_coef: reference log-probabilities, the estimator ``"k1"``, ``"k2"`` or ``"k3"``, and its
            coefficient. With a coefficient of 0 they are for the metric alone.
        entropy, entropy_coef: per-token entropies and the coefficient of their bonus; with 0, for the metric alone.
        cu_seqlens: ``[S + 1]`` offsets of a packed batch, int32, int64 or a list. On a CPU wrong ones raise, in a
            compiled program, too.
        ratio_level: ``"token"``; ``"sequence"``: one ratio ``exp(mean_t d_t)`` per sequence (GSPO);
            ``"sequence_token"``: its value with a gradient per token (GSPO-token); ``"sequence_sum"``: ``exp(sum_t
            d_t)``, one loss per sequence, which weighs what its live tokens weigh together. The mean of such losses is
            one over sequences: ``"token-mean"`` stands for ``"seq-mean"`` there.
        Coefficients and parameters: numbers, or tensors of shape ``()`` without gradient. One on a device is never
            read: its range is not checked, and an objective with such a parameter runs in plain torch between the
            kernels (for a schedule or a learned bound).

    Returns:
        Scalar, fp32 (fp64 for fp64 inputs); with ``return_metrics``, ``(loss, dict)`` of masked, detached scalars.

    Raises:
        ValueError: shapes that do not match, unknown names, a coefficient without its input, two sources of weights; on
            a CPU (elsewhere with ``RLKERNELS_CHECK=1``) a float mask of other values than 0 and 1.
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
    cu_seqlens = checks_tokens.rows(caller, "logprobs", logprobs, cu_seqlens, mask)
    entry, values = resolve(caller, objective, params, logprobs)
    columns = objective_columns(caller, entry, logprobs, old_logprobs, advantages, cu_seqlens, ratio_level)
    live = live_mask(caller, logprobs, mask)
    if ratio_level == "sequence_sum":
        aggregation = aggregation_of_sequences(aggregation, weights)
    token_weights = token_weights_of(caller, logprobs, live, aggregation, weights, cu_seqlens, normalizers)
    kl_coef, entropy_coef = check_terms(caller, logprobs, ref_logprobs, kl, kl_coef, entropy, entropy_coef)

    real = real_dtype(logprobs.dtype)
    logp = dense(logprobs, real)
    loss = ratio_term(caller, objective, logp, columns, values, token_weights, live, cu_seqlens, ratio_level)
    if kl_coef is not None:
        loss = loss + scaled_sum(kl_coef, kl, logp, [ref_logprobs], token_weights)
    if entropy_coef is not None:
        # By the objective "nll", which is minus its column, because it takes one launch and plain torch takes six.
        loss = loss + scaled_sum(entropy_coef, "nll", dense(entropy, real), [], token_weights)
    if not return_metrics:
        return loss
    return loss, policy_metrics(
        logp, columns, full_mask(logprobs, live), ref_logprobs, kl, entropy, entry, values, ratio_level, cu_seqlens
    )


def ratio_term(
    caller: str,
    objective: str,
    logp: Tensor,
    columns: list[Tensor],
    params: Params,
    weights: TokenWeights,
    live: Tensor | None,
    cu_seqlens: Tensor | None,
    level: RatioLevel,
) -> Tensor:
    """Computes the weighted sum of a policy objective whose ratio is that of a token or of a sequence."""
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
    now, old, advantage = (x.double() for x in (logp, *columns))
    if level == "sequence_sum":
        # One loss per sequence. An advantage per token enters as its mean, because it is constant along the sequence in
        # every published use.
        now, old, of_sequences = (sums(x, live, cu_seqlens) for x in (now, old, weights.values.double()))
        advantage, weights = means(advantage, live, cu_seqlens), TokenWeights(of_sequences)
    elif level == "sequence":
        now, old = (spread(means(x, live, cu_seqlens), live, cu_seqlens) for x in (now, old))
    else:
        fixed = now.detach()
        old = fixed - spread(means(fixed - old, live, cu_seqlens), live, cu_seqlens)
    return weighted_sum(objective, now, [old, advantage], params, weights).to(logp.dtype)
