"""verl: losses and estimators under names of their own, and ``patch()`` to put our kernels under verl's.

Installing ``rlkernels`` beside verl is enough for the names: ``import verl`` loads the plugin in every process. Then
``actor.policy_loss.loss_mode=rlk_vanilla`` and ``algorithm.adv_estimator=rlk_grpo`` choose ours, and verl's own stay as
they are. ``patch()``, or ``RLKERNELS_PATCH=verl`` in the environment of every process, replaces these, too:

* ``"logits"``: ``verl.utils.torch_functional``: ``logprobs_from_logits``, ``entropy_from_logits``,
  ``entropy_from_logits_with_chunking``, ``calculate_sum_pi_squared_from_logits``.
* ``"fused"``: ``FusedLinearForPPO`` and ``linear_cross_entropy``, from hidden states and head to log-probabilities.
* ``"losses"``: ``agg_loss``, ``compute_value_loss``, ``kl_penalty``, ``compute_entropy_loss``.
* ``"advantages"``: every estimator of ``ADV_ESTIMATOR_REGISTRY`` and its function.
* ``"rollout"``: ``compute_rollout_correction_weights``.
* ``"names"``: the names ``rlk_*`` alone.

verl's own policy losses are never replaced. Every function is here under verl's name, too, and needs no verl.
"""

from typing import Literal, get_args

from rlkernels.integrations._patching import PatchReport, PatchStatus
from rlkernels.integrations.verl.advantages import (
    compute_gae_advantage_return,
    compute_gdpo_outcome_advantage,
    compute_gpg_outcome_advantage,
    compute_grpo_outcome_advantage,
    compute_grpo_passk_outcome_advantage,
    compute_grpo_vectorized_outcome_advantage,
    compute_multi_turn_optimal_token_baseline_advantage,
    compute_opo_outcome_advantage,
    compute_optimal_token_baseline_advantage,
    compute_reinforce_plus_plus_baseline_outcome_advantage,
    compute_reinforce_plus_plus_outcome_advantage,
    compute_remax_outcome_advantage,
    compute_rloo_outcome_advantage,
    compute_rloo_vectorized_outcome_advantage,
)
from rlkernels.integrations.verl.bypass import compute_policy_loss_bypass_mode
from rlkernels.integrations.verl.logprobs import (
    FusedLinearForPPO,
    calculate_sum_pi_squared_from_logits,
    entropy_from_logits,
    entropy_from_logits_with_chunking,
    linear_cross_entropy,
    logprobs_from_logits,
)
from rlkernels.integrations.verl.losses import agg_loss, compute_entropy_loss, compute_value_loss, kl_penalty
from rlkernels.integrations.verl.policy_losses import (
    compute_policy_loss_cispo,
    compute_policy_loss_clip_cov,
    compute_policy_loss_dppo_kl,
    compute_policy_loss_dppo_tv,
    compute_policy_loss_dro,
    compute_policy_loss_geo_mean,
    compute_policy_loss_gpg,
    compute_policy_loss_gspo,
    compute_policy_loss_kl_cov,
    compute_policy_loss_reinforce,
    compute_policy_loss_sapo,
    compute_policy_loss_vanilla,
)
from rlkernels.integrations.verl.rollout import compute_rollout_correction_weights
from rlkernels.integrations.verl.seams import PLANNERS, host

VerlLevel = Literal["names", "logits", "fused", "losses", "advantages", "rollout", "all"]
LEVELS = tuple(name for name in get_args(VerlLevel) if name != "all")

__all__ = [
    "FusedLinearForPPO",
    "agg_loss",
    "calculate_sum_pi_squared_from_logits",
    "compute_entropy_loss",
    "compute_gae_advantage_return",
    "compute_gdpo_outcome_advantage",
    "compute_gpg_outcome_advantage",
    "compute_grpo_outcome_advantage",
    "compute_grpo_passk_outcome_advantage",
    "compute_grpo_vectorized_outcome_advantage",
    "compute_multi_turn_optimal_token_baseline_advantage",
    "compute_opo_outcome_advantage",
    "compute_optimal_token_baseline_advantage",
    "compute_policy_loss_bypass_mode",
    "compute_policy_loss_cispo",
    "compute_policy_loss_clip_cov",
    "compute_policy_loss_dppo_kl",
    "compute_policy_loss_dppo_tv",
    "compute_policy_loss_dro",
    "compute_policy_loss_geo_mean",
    "compute_policy_loss_gpg",
    "compute_policy_loss_gspo",
    "compute_policy_loss_kl_cov",
    "compute_policy_loss_reinforce",
    "compute_policy_loss_sapo",
    "compute_policy_loss_vanilla",
    "compute_reinforce_plus_plus_baseline_outcome_advantage",
    "compute_reinforce_plus_plus_outcome_advantage",
    "compute_remax_outcome_advantage",
    "compute_rloo_outcome_advantage",
    "compute_rloo_vectorized_outcome_advantage",
    "compute_rollout_correction_weights",
    "compute_value_loss",
    "entropy_from_logits",
    "entropy_from_logits_with_chunking",
    "kl_penalty",
    "linear_cross_entropy",
    "logprobs_from_logits",
    "patch",
    "status",
    "unpatch",
]


def patch(level: VerlLevel = "all", strict: bool = True) -> PatchReport:
    """Puts our kernels into verl's seams, in this process.

    Works before and after verl's modules are imported; twice is once. An engine that was built before keeps what it
    compiled, so call it first. ``RLKERNELS_PATCH=verl`` does so in every process.

    Args:
        level: ``"names"``, ``"logits"``, ``"fused"``, ``"losses"``, ``"advantages"``, ``"rollout"``, or ``"all"``.
        strict: an input outside our domain raises. Otherwise it is handed to verl's own function and counted with the
            reason. A verl newer than 0.9 is refused under ``strict``; otherwise it is accepted if every signature is a
            known one.

    Returns:
        One line per attribute and key of a registry that holds ours.

    Raises:
        ValueError: ``level`` is not one of the above.
        ImportError: verl is not installed.
        RuntimeError: this verl's version or a signature is unknown, or another library has replaced an attribute or
            taken a name. Nothing is replaced then.
    """
    if level not in (*LEVELS, "all"):
        raise ValueError(f"level must be one of {(*LEVELS, 'all')}, got {level!r}")
    return host.patch({name: PLANNERS[name] for name in (LEVELS if level == "all" else (level,))}, strict)


def unpatch() -> None:
    """Restores every attribute to the object that ``patch`` found there, and takes the names out of the registries.

    Raises:
        RuntimeError: another library has since replaced an attribute; undo its patch first. Nothing is restored then.
    """
    host.unpatch()


def status() -> PatchStatus:
    """Returns what is replaced now, and the calls and delegations counted since; the counts outlive ``unpatch`` until
    the next ``patch``.
    """
    return host.status()
