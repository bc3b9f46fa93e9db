"""verl's bypass mode: the rollout correction inside of the loss, and REINFORCE or PPO behind it."""

from typing import Any

import torch
from torch import Tensor

from rlkernels.integrations.verl.options import required, setting
from rlkernels.integrations.verl.policy_losses import (
    Metrics,
    compute_policy_loss_reinforce,
    compute_policy_loss_vanilla,
)

LOSSES = ("ppo_clip", "reinforce")


def compute_policy_loss_bypass_mode(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """Computes PPO's or REINFORCE's loss with weights and mask of verl's own rollout correction.

    Correction and metrics are verl's ``compute_rollout_correction_and_rejection_mask``, which reads its numbers to the
    host. Where ``patch`` has replaced ``compute_rollout_correction_weights``, its weights are ours.

    Args:
        old_log_prob: ``[B, L]``, the log-probabilities of the rollout engine.
        rollout_is_weights: not read, as in verl, because the weights are computed here.
        the rest: as for ``compute_policy_loss_vanilla``; ``config.policy_loss.rollout_correction`` holds the options
            and ``loss_type``.

    Returns:
        ``(loss, metrics)``: those of the loss, and verl's of the correction.

    Raises:
        ImportError: verl is not installed. ValueError: no ``rollout_correction``, an unknown ``loss_type``.
    """
    from verl.trainer.ppo import rollout_corr_helper

    caller = "compute_policy_loss_bypass_mode"
    options = setting(required(caller, config).policy_loss, "rollout_correction", None)
    if options is None:
        raise ValueError(
            f"{caller}: rollout_correction config not found in policy_loss; loss_mode='bypass_mode' needs it"
        )
    loss_type = options.get("loss_type", "ppo_clip")
    if loss_type not in LOSSES:
        raise ValueError(f"{caller}: Invalid loss_type: {loss_type!r}, expected one of {', '.join(LOSSES)}")
    with torch.no_grad():
        weights, kept, metrics = rollout_corr_helper.compute_rollout_correction_and_rejection_mask(
            old_log_prob=log_prob.detach(),
            rollout_log_prob=old_log_prob,
            response_mask=response_mask,
            rollout_is=options.get("rollout_is", None),
            rollout_is_threshold=options.get("rollout_is_threshold", 2.0),
            rollout_is_batch_normalize=options.get("rollout_is_batch_normalize", False),
            rollout_rs=options.get("rollout_rs", None),
            rollout_rs_threshold=options.get("rollout_rs_threshold", None),
        )
    columns = old_log_prob, log_prob, advantages, kept, loss_agg_mode, config
    if loss_type == "reinforce":
        loss, found = compute_policy_loss_reinforce(
            *columns, None if weights is None else weights.batch["rollout_is_weights"]
        )
    else:
        # Without the weights, because the ratio to the engine is in the clip.
        loss, found = compute_policy_loss_vanilla(*columns)
    return loss, {**found, **metrics}
