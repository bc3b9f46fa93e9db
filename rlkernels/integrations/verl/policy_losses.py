"""verl's policy losses under their names: old log-probabilities first, metrics under verl's keys as tensors."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlkernels import checks
from rlkernels.aggregation import aggregate
from rlkernels.integrations.verl.options import clip_widths, reduction, required, setting
from rlkernels.losses.covariance import clip_cov_tokens
from rlkernels.losses.kl_estimate import kl_estimate
from rlkernels.losses.policy import policy_loss
from rlkernels.sequences import broadcast_to_tokens, sequence_means

FARTHEST = 20.0
"""The log-ratio that verl clamps to before most of its exponentials."""
FARTHEST_OF_SEQUENCES = (None, 10.0)
"""The bounds of the log-ratio in verl's GSPO."""
SMALLEST = 1e-10
"""The summand of a rollout weight before its logarithm, in verl's GMPO alone."""

Metrics = dict[str, Tensor]
PolicyLoss = Callable[..., tuple[Tensor, Metrics]]


def compute_policy_loss_vanilla(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    r"""Computes PPO's clipped loss with verl's dual clip: ``policy_loss(objective="dual_clip", log_ratio_clamp=20)``.

    Args:
        old_log_prob, log_prob, advantages, response_mask: ``[B, L]``. The behaviour policy comes first, as in verl.
            ``log_prob`` alone gets a gradient. A masked token touches nothing, whatever it holds.
        loss_agg_mode: ``"token-mean"``, ``"token-sum"``, ``"seq-mean-token-mean"``, ``"seq-mean-token-sum"`` or
            ``"seq-mean-token-sum-norm"``.
        config: verl's ActorConfig. ``clip_ratio``, ``clip_ratio_low``, ``clip_ratio_high``, ``clip_ratio_c`` and
            ``global_batch_info`` are read, the latter for ``dp_size``, ``batch_num_tokens``, ``global_batch_size`` and
            ``loss_scale_factor``.
        rollout_is_weights: ``[B, L]``, or None; the loss of a token is multiplied by it, the count of a mean is not.

    Returns:
        ``(loss, metrics)``: a scalar, and ``actor/pg_clipfrac``, ``actor/ppo_kl``, ``actor/pg_clipfrac_lower`` as
        detached scalars on the device. verl's own are floats, read by the host three times per micro-batch.

    Raises:
        TypeError: ``config`` is no ActorConfig. ValueError: shapes; an unknown mode; ``dp_size > 1`` without the total;
            ``clip_ratio_c`` of 1 or less.

    verl 0.9, ``verl.trainer.ppo.core_algos``.
    """
    caller = "compute_policy_loss_vanilla"
    config = required(caller, config)
    low, high = clip_widths(config)
    cap = setting(config, "clip_ratio_c", 3.0)
    if not cap > 1.0:
        raise ValueError(f"{caller}: clip_ratio_c must be greater than 1, got {cap}")
    loss, found = policy_loss(
        log_prob,
        old_log_prob,
        advantages,
        response_mask,
        objective="dual_clip",
        clip_low=low,
        clip_high=high,
        dual_clip=cap,
        log_ratio_clamp=FARTHEST,
        correction=rollout_is_weights,
        return_metrics=True,
        **reduction(caller, loss_agg_mode, config),
    )
    return loss, {
        "actor/pg_clipfrac": found["clip_fraction"],
        "actor/ppo_kl": _mean_kl(old_log_prob, log_prob, response_mask),
        "actor/pg_clipfrac_lower": found["clip_fraction_dual"],
    }


def _dppo(
    caller: str,
    objective: str,
    columns: tuple[Tensor, Tensor, Tensor, Tensor],
    loss_agg_mode: str,
    config: Any,
    rollout_is_weights: Tensor | None,
) -> tuple[Tensor, Metrics]:
    """Computes a loss of DPPO.

    The metrics are those of the signs of the advantages, because verl counts a token without advantage among the bad
    ones. Its log-ratio has no clamp, because the cut of the ratio lies below verl's.
    """
    config = required(caller, config)
    low, high = clip_widths(config)
    options: dict[str, Any] = {"delta_low": low, "delta_high": high, "ratio_max": setting(config, "clip_ratio_c", 20.0)}
    old, new, advantages, mask = columns
    reduced = reduction(caller, loss_agg_mode, config)
    loss = policy_loss(
        new, old, advantages, mask, objective=objective, correction=rollout_is_weights, **options, **reduced
    )
    with torch.no_grad():
        signs = torch.where(advantages > 0, 1.0, -1.0)
        _, found = policy_loss(new, old, signs, mask, objective=objective, return_metrics=True, **options)
    return loss, {
        "actor/pg_clipfrac": found["clip_fraction"],
        "actor/ppo_kl": _mean_kl(old, new, mask),
        "actor/pg_clipfrac_lower": found["clip_fraction_cap"],
    }


def compute_policy_loss_dppo_tv(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Computes DPPO with the total variation of a token: the objective ``dppo_tv``, its widths those of the clip.

    Arguments, results and errors are those of ``compute_policy_loss_vanilla``. ``clip_ratio_c`` cuts the ratio.
    """
    columns = old_log_prob, log_prob, advantages, response_mask
    return _dppo("compute_policy_loss_dppo_tv", "dppo_tv", columns, loss_agg_mode, config, rollout_is_weights)


def compute_policy_loss_dppo_kl(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Computes DPPO with the KL of a token: the objective ``dppo_kl``, its widths those of the clip.

    Arguments, results and errors are those of ``compute_policy_loss_vanilla``. ``clip_ratio_c`` cuts the ratio.
    """
    columns = old_log_prob, log_prob, advantages, response_mask
    return _dppo("compute_policy_loss_dppo_kl", "dppo_kl", columns, loss_agg_mode, config, rollout_is_weights)


def compute_policy_loss_gspo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Computes GSPO with a gradient per token: ``policy_loss(ratio_level="sequence_token", log_ratio_clamp=(None,
    10))``.

    Arguments, results and errors are those of ``compute_policy_loss_vanilla``; ``clip_ratio_c`` is not read.
    """
    caller = "compute_policy_loss_gspo"
    config = required(caller, config)
    low, high = clip_widths(config)
    loss, found = policy_loss(
        log_prob,
        old_log_prob,
        advantages,
        response_mask,
        objective="ppo_clip",
        ratio_level="sequence_token",
        clip_low=low,
        clip_high=high,
        log_ratio_clamp=FARTHEST_OF_SEQUENCES,
        correction=rollout_is_weights,
        return_metrics=True,
        **reduction(caller, loss_agg_mode, config),
    )
    return loss, {
        "actor/pg_clipfrac": found["clip_fraction"],
        "actor/ppo_kl": found["ppo_kl"],
        "actor/pg_clipfrac_lower": torch.zeros_like(found["ppo_kl"]),
    }


def compute_policy_loss_sapo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Computes SAPO: the objective ``sapo`` with ``tau_pos`` and ``tau_neg`` of the configuration.

    Arguments, results and errors are those of ``compute_policy_loss_vanilla``. The aggregation is always
    ``"seq-mean-token-mean"``, as in verl, whatever ``loss_agg_mode`` says.
    """
    caller = "compute_policy_loss_sapo"
    config = required(caller, config)
    loss = policy_loss(
        log_prob,
        old_log_prob,
        advantages,
        response_mask,
        objective="sapo",
        tau_pos=config.tau_pos,
        tau_neg=config.tau_neg,
        log_ratio_clamp=FARTHEST,
        correction=rollout_is_weights,
        **reduction(caller, "seq-mean-token-mean", config),
    )
    kl = _mean_kl(old_log_prob, log_prob, response_mask)
    nothing = torch.zeros_like(kl)
    return loss, {"actor/pg_clipfrac": nothing, "actor/ppo_kl": kl, "actor/pg_clipfrac_lower": nothing}


def compute_policy_loss_gpg(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Computes GPG: the objective ``reinforce``; ``old_log_prob`` is not read, and there are no metrics.

    Arguments, results and errors are those of ``compute_policy_loss_vanilla``.
    """
    caller = "compute_policy_loss_gpg"
    return _reinforce(caller, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights), {}


def compute_policy_loss_reinforce(
    rollout_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "seq-mean-token-sum",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Computes REINFORCE, of which verl's bypass mode makes use; ``rollout_log_prob`` is for the metric alone.

    Arguments, results and errors are those of ``compute_policy_loss_vanilla``; the metric is ``actor/ppo_kl``. verl
    registers no such name, and calls it with the engine's log-probabilities in the place of the old ones.
    """
    caller = "compute_policy_loss_reinforce"
    loss = _reinforce(caller, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights)
    return loss, {"actor/ppo_kl": _mean_kl(rollout_log_prob, log_prob, response_mask, None)}


def _reinforce(
    caller: str,
    log_prob: Tensor,
    advantages: Tensor,
    mask: Tensor,
    loss_agg_mode: str,
    config: Any,
    weights: Tensor | None,
) -> Tensor:
    reduced = reduction(caller, loss_agg_mode, required(caller, config))
    return policy_loss(log_prob, None, advantages, mask, objective="reinforce", correction=weights, **reduced)


def compute_policy_loss_clip_cov(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Computes Clip-Cov: PPO's clipped loss without some tokens whose covariance lies between two bounds.

    Arguments, results and errors are those of ``compute_policy_loss_vanilla``; of ``config.policy_loss`` are read
    ``clip_cov_ratio``, ``clip_cov_lb`` and ``clip_cov_ub``. The tokens are drawn on the device by torch's generator:
    as many as verl draws, from the same ones, but others.
    """
    caller = "compute_policy_loss_clip_cov"
    config = required(caller, config)
    (low, high), own = clip_widths(config), config.policy_loss
    share = _positive_share(caller, "clip_cov_ratio", setting(own, "clip_cov_ratio", 2e-4))
    columns = log_prob, old_log_prob, advantages, response_mask
    tokens = clip_cov_tokens(
        *columns,
        clip_low=low,
        clip_high=high,
        clip_cov_low=setting(own, "clip_cov_lb", 1.0),
        clip_cov_high=setting(own, "clip_cov_ub", 5.0),
        clip_cov_ratio=share,
    )
    loss, found = policy_loss(
        *columns,
        objective="clip_cov",
        clip_low=low,
        clip_high=high,
        clip_cov_tokens=tokens,
        correction=rollout_is_weights,
        return_metrics=True,
        **reduction(caller, loss_agg_mode, config),
    )
    return loss, {"actor/pg_clipfrac": _share(tokens, response_mask), "actor/ppo_kl": found["ppo_kl"]}


def compute_policy_loss_kl_cov(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Computes KL-Cov: ``-rho A``, and a penalty of the absolute log-ratio on the tokens of the largest covariance.

    Arguments, results and errors are those of ``compute_policy_loss_vanilla``; of ``config.policy_loss`` are read
    ``kl_cov_ratio`` and ``ppo_kl_coef``. The metric ``actor/ppo_kl`` is the mean absolute log-ratio, as in verl.
    """
    caller = "compute_policy_loss_kl_cov"
    config = required(caller, config)
    own = config.policy_loss
    loss = policy_loss(
        log_prob,
        old_log_prob,
        advantages,
        response_mask,
        objective="kl_cov",
        kl_cov_ratio=_positive_share(caller, "kl_cov_ratio", setting(own, "kl_cov_ratio", 2e-4)),
        kl_cov_coef=setting(own, "ppo_kl_coef", 1.0),
        correction=rollout_is_weights,
        **reduction(caller, loss_agg_mode, config),
    )
    return loss, {"actor/ppo_kl": _mean_kl(old_log_prob, log_prob, response_mask, None, "abs")}


def compute_policy_loss_geo_mean(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Computes GMPO: the geometric mean of clipped ratios, one loss per sequence; the widths clip log-ratios.

    Arguments, results and errors are those of ``compute_policy_loss_vanilla``. As in verl the loss is the plain mean
    over all rows, empty ones among them: neither ``loss_agg_mode`` nor the totals of the batch are read, so that with
    several micro-batches each one counts alike. A sequence's rollout weight is the geometric mean of its tokens'.
    """
    caller = "compute_policy_loss_geo_mean"
    config = required(caller, config)
    low, high = clip_widths(config)
    if rollout_is_weights is not None:
        of_rows = sequence_means((rollout_is_weights + SMALLEST).log(), response_mask).exp()
        rollout_is_weights = broadcast_to_tokens(of_rows, response_mask)
    columns = log_prob, old_log_prob, advantages, response_mask
    loss, found = policy_loss(
        *columns,
        objective="gmpo",
        clip_low=low,
        clip_high=high,
        correction=rollout_is_weights,
        return_metrics=True,
        aggregation="seq-mean",
        normalizers={"count_empty_rows": True},
    )
    gap = log_prob.detach() - old_log_prob
    clipped = (gap < -low) | (gap > high)
    return loss, {
        "actor/pg_clipfrac": _share(clipped & (advantages > 0), response_mask),
        "actor/ppo_kl": found["ppo_kl"],
        "actor/pg_clipfrac_lower": _share(clipped & (advantages < 0), response_mask),
    }


def compute_policy_loss_dro(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Computes DRO: the objective ``dro`` with ``config.policy_loss.dro_beta``.

    Arguments, results and errors are those of ``compute_policy_loss_vanilla``; ValueError where the coefficient is not
    positive.
    """
    caller = "compute_policy_loss_dro"
    config = required(caller, config)
    beta = config.policy_loss.dro_beta
    if beta is None or beta <= 0:
        raise ValueError(
            f"{caller}: policy_loss.dro_beta must be a positive value when using DRO, got {beta}; set it in the "
            "configuration of the actor"
        )
    loss, found = policy_loss(
        log_prob,
        old_log_prob,
        advantages,
        response_mask,
        objective="dro",
        beta=beta,
        correction=rollout_is_weights,
        return_metrics=True,
        **reduction(caller, loss_agg_mode, config),
    )
    return loss, {"actor/ppo_kl": found["ppo_kl"]}


def compute_policy_loss_cispo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Computes CISPO: the objective ``cispo`` with the widths of the clip.

    Arguments, results and errors are those of ``compute_policy_loss_vanilla``; ``clip_ratio_c`` is not read.
    """
    caller = "compute_policy_loss_cispo"
    config = required(caller, config)
    low, high = clip_widths(config)
    loss, found = policy_loss(
        log_prob,
        old_log_prob,
        advantages,
        response_mask,
        objective="cispo",
        clip_low=low,
        clip_high=high,
        log_ratio_clamp=FARTHEST,
        correction=rollout_is_weights,
        return_metrics=True,
        **reduction(caller, loss_agg_mode, config),
    )
    kl = _mean_kl(old_log_prob, log_prob, response_mask)
    return loss, {
        "actor/pg_clipfrac": found["clip_fraction"],
        "actor/ppo_kl": kl,
        "actor/pg_clipfrac_lower": torch.zeros_like(kl),
    }


def _mean_kl(old: Tensor, new: Tensor, mask: Tensor, clamp: float | None = FARTHEST, kind: Any = "k1") -> Tensor:
    """Returns the mean over live tokens of an estimate of the KL of the old against the new policy."""
    return aggregate(kl_estimate(old.detach(), new.detach(), kind, mask=mask, diff_clamp=clamp), mask)


def _share(tokens: Tensor, mask: Tensor) -> Tensor:
    """Returns the share of the live tokens that are among ``tokens``."""
    return aggregate(tokens.float(), mask)


def _positive_share(caller: str, name: str, x: Any) -> float:
    """Returns a share of the tokens, which verl wants above 0."""
    return checks.interval(caller, name, checks.positive(caller, name, x), 0, 1)


POLICY_LOSSES: dict[str, PolicyLoss] = {
    "vanilla": compute_policy_loss_vanilla,
    "dppo_tv": compute_policy_loss_dppo_tv,
    "dppo_kl": compute_policy_loss_dppo_kl,
    "gspo": compute_policy_loss_gspo,
    "sapo": compute_policy_loss_sapo,
    "gpg": compute_policy_loss_gpg,
    "clip_cov": compute_policy_loss_clip_cov,
    "kl_cov": compute_policy_loss_kl_cov,
    "geo_mean": compute_policy_loss_geo_mean,
    "dro": compute_policy_loss_dro,
    "cispo": compute_policy_loss_cispo,
    "reinforce": compute_policy_loss_reinforce,
}
"""verl's names of losses to ours; the plugin registers each one as ``rlk_<name>``."""
