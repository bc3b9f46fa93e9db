"""The names that the plugin adds to verl's registries, ``rlk_*``, beside verl's own and never over them.

``actor.policy_loss.loss_mode=rlk_vanilla`` and ``algorithm.adv_estimator=rlk_grpo`` choose them. verl hands an
estimator whose name it does not know the rewards, the mask, the index and the configuration alone. So an option that
verl reads from the configuration for its own name is read from it here, and a name that needs more says so.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from rlkernels.integrations.verl import advantages as estimators
from rlkernels.integrations.verl.advantages import ADVANTAGES, Estimate, Index
from rlkernels.integrations.verl.bypass import compute_policy_loss_bypass_mode
from rlkernels.integrations.verl.options import setting
from rlkernels.integrations.verl.policy_losses import POLICY_LOSSES, PolicyLoss
from rlkernels.types import Number

PREFIX = "rlk_"


def _needed(name: str, **given: Any) -> None:
    """Raises where verl has not handed over what an estimator needs."""
    for argument, x in given.items():
        if x is None:
            raise ValueError(
                f"{PREFIX}{name}: needs {argument}, which verl passes to its own name alone; set "
                f"algorithm.adv_estimator={name} and call rlkernels.integrations.verl.patch('advantages')"
            )


def _divided(config: Any, given: bool | None) -> bool:
    """Returns whether the standard deviation divides: the argument, else the configuration, else True."""
    return bool(setting(config, "norm_adv_by_std_in_grpo", True)) if given is None else given


def rlk_gae(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    values: Any = None,
    gamma: Number | None = None,
    lam: Number | None = None,
    config: Any = None,
    **kwargs: Any,
) -> Estimate:
    """Computes ``compute_gae_advantage_return``; without values it raises ValueError and says what to do."""
    _needed("gae", values=values)
    gamma = setting(config, "gamma", 1.0) if gamma is None else gamma
    lam = setting(config, "lam", 1.0) if lam is None else lam
    return estimators.compute_gae_advantage_return(token_level_rewards, values, response_mask, gamma, lam)


def rlk_grpo(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Index,
    epsilon: Number = 1e-6,
    norm_adv_by_std_in_grpo: bool | None = None,
    config: Any = None,
    **kwargs: Any,
) -> Estimate:
    """Computes ``compute_grpo_outcome_advantage``, divided where ``config.norm_adv_by_std_in_grpo`` says so."""
    divided = _divided(config, norm_adv_by_std_in_grpo)
    return estimators.compute_grpo_outcome_advantage(token_level_rewards, response_mask, index, epsilon, divided)


def rlk_gdpo(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Index,
    epsilon: Number = 1e-6,
    norm_adv_by_std_in_grpo: bool | None = None,
    config: Any = None,
    non_tensor_batch: Any = None,
    batch: Any = None,
    **kwargs: Any,
) -> Estimate:
    """Computes ``compute_gdpo_outcome_advantage``; it raises ValueError where the rewards of the keys do not come."""
    if setting(config, "gdpo_reward_keys", None):
        _needed("gdpo", non_tensor_batch=non_tensor_batch, batch=batch)
    divided = _divided(config, norm_adv_by_std_in_grpo)
    columns = token_level_rewards, response_mask, index, epsilon, divided
    return estimators.compute_gdpo_outcome_advantage(*columns, config, non_tensor_batch, batch)


def _baseline(name: str) -> Callable[..., Estimate]:
    """Returns an estimator with the optimal token baseline that says what verl did not pass."""

    def estimator(
        token_level_rewards: Tensor,
        response_mask: Tensor,
        index: Index,
        old_log_probs: Tensor | None = None,
        sum_pi_squared: Tensor | None = None,
        **kwargs: Any,
    ) -> Estimate:
        _needed(name, old_log_probs=old_log_probs, sum_pi_squared=sum_pi_squared)
        columns = token_level_rewards, response_mask, index, old_log_probs, sum_pi_squared
        return ADVANTAGES[name](*columns, **kwargs)

    estimator.__name__ = estimator.__qualname__ = f"{PREFIX}{name}"
    return estimator


NAMED_LOSSES: dict[str, PolicyLoss] = {
    f"{PREFIX}{name}": loss for name, loss in {**POLICY_LOSSES, "bypass_mode": compute_policy_loss_bypass_mode}.items()
}
NAMED_ADVANTAGES: dict[str, Callable[..., Estimate]] = {
    **{f"{PREFIX}{name}": estimator for name, estimator in ADVANTAGES.items()},
    "rlk_gae": rlk_gae,
    "rlk_grpo": rlk_grpo,
    "rlk_grpo_vectorized": rlk_grpo,
    "rlk_gdpo": rlk_gdpo,
    "rlk_optimal_token_baseline": _baseline("optimal_token_baseline"),
    "rlk_tir_optimal_token_baseline": _baseline("tir_optimal_token_baseline"),
}
