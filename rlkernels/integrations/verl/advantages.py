"""verl's advantage estimators under their names; advantages and returns are 0 at masked tokens."""

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from rlkernels import checks
from rlkernels.advantages.gae import discounted_returns, gae
from rlkernels.advantages.group import group_advantages
from rlkernels.advantages.steps import optimal_token_advantages
from rlkernels.advantages.whitening import masked_whiten
from rlkernels.integrations.verl.options import setting
from rlkernels.sequences import broadcast_to_tokens, sequence_sums
from rlkernels.types import Number

Estimate = tuple[Tensor, Tensor]
Index = Tensor | Iterable[Any]


def compute_gae_advantage_return(
    token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: Number, lam: Number
) -> Estimate:
    r"""Computes whitened advantages and returns: ``gae(masked="skip")``, then ``masked_whiten``.

    Args:
        token_level_rewards, values, response_mask: ``[B, L]``. A masked token passes value and trace on, undiscounted.
        gamma, lam: discount and decay.

    Returns:
        ``(advantages, returns)``, ``[B, L]``, 0 at masked tokens, where verl leaves numbers that nobody reads. The
        returns are those before whitening.

    Raises:
        TypeError, ValueError: as ``gae``.

    Example:
        >>> rewards, values, mask = torch.tensor([[0.0, 0.0, 1.0]]), torch.zeros(1, 3), torch.tensor([[1, 0, 1]])
        >>> compute_gae_advantage_return(rewards, values, mask, 0.5, 1.0)[1]
        tensor([[0.5000, 0.0000, 1.0000]])

    verl 0.9, ``verl.trainer.ppo.core_algos``.
    """
    advantages, returns = gae(token_level_rewards, values, response_mask, gamma=gamma, lam=lam, masked="skip")
    return masked_whiten(advantages, response_mask), returns


def compute_grpo_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Index,
    epsilon: Number = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    config: Any = None,
) -> Estimate:
    r"""Computes GRPO's advantages: ``group_advantages`` of the sum of each response's rewards.

    Args:
        token_level_rewards: ``[B, L]``. Those of masked tokens count, as in verl, because a score may stand there.
        response_mask: ``[B, L]``.
        index: the prompt of each response: integers, or any array of hashable ids, such as verl's ``uid``.
        epsilon: added to the standard deviation.
        norm_adv_by_std_in_grpo: False leaves the division out (Dr. GRPO).
        config: not read, as in verl.

    Returns:
        ``(advantages, returns)``, ``[B, L]``, twice the same tensor. A group of one keeps its reward, divided by ``1 +
        epsilon`` where there is a division.

    Raises:
        TypeError, ValueError: as ``group_advantages``.

    Example:
        >>> rewards, mask = torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.tensor([[1, 1], [1, 0]])
        >>> compute_grpo_outcome_advantage(rewards, mask, ["a", "a"], norm_adv_by_std_in_grpo=False)[0]
        tensor([[ 0.5000,  0.5000],
                [-0.5000,  0.0000]])

    verl 0.9, ``verl.trainer.ppo.core_algos``; Shao et al. 2024, arXiv:2402.03300.
    """
    options = _grpo_options(norm_adv_by_std_in_grpo)
    return _outcome("compute_grpo_outcome_advantage", token_level_rewards, response_mask, index, eps=epsilon, **options)


compute_grpo_vectorized_outcome_advantage = compute_grpo_outcome_advantage


def _grpo_options(divided: bool) -> dict[str, Any]:
    """Returns the options of ``group_advantages`` for GRPO with and without a division by the standard deviation."""
    return {"scale": "std", "singleton": "scaled"} if divided else {"scale": None, "singleton": "raw"}


def compute_rloo_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Index,
    epsilon: Number = 1e-6,
    config: Any = None,
    **kwargs: Any,
) -> Estimate:
    """Computes RLOO's advantages: the reward less the mean of the others of the group. A group of one keeps its reward.

    Arguments, results and errors are those of ``compute_grpo_outcome_advantage``; ``epsilon`` is not read, as in verl.
    """
    return _outcome(
        "compute_rloo_outcome_advantage",
        token_level_rewards,
        response_mask,
        index,
        baseline="leave-one-out",
        scale=None,
        singleton="raw",
    )


def compute_rloo_vectorized_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Index,
    epsilon: Number = 1e-6,
    config: Any = None,
    **kwargs: Any,
) -> Estimate:
    """Computes RLOO's advantages as ``compute_rloo_outcome_advantage`` does, but a group of one gets 0."""
    return _outcome(
        "compute_rloo_vectorized_outcome_advantage",
        token_level_rewards,
        response_mask,
        index,
        baseline="leave-one-out",
        scale=None,
    )


def compute_opo_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Index,
    epsilon: Number = 1e-6,
    config: Any = None,
    **kwargs: Any,
) -> Estimate:
    """Computes OPO's advantages: the reward less the group's mean weighted by lengths. A group of one keeps its reward.

    Arguments, results and errors are those of ``compute_grpo_outcome_advantage``; ``epsilon`` is not read, as in verl.
    """
    return _outcome(
        "compute_opo_outcome_advantage",
        token_level_rewards,
        response_mask,
        index,
        baseline="length-mean",
        scale=None,
        singleton="raw",
        lengths=None if response_mask is None else response_mask.sum(-1),
    )


def compute_gpg_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Index,
    epsilon: Number = 1e-6,
    f_norm: Number = 1.0,
    alpha: Number = 1.0,
    config: Any = None,
    **kwargs: Any,
) -> Estimate:
    """Computes GPG's advantages: the gap to the group's mean over the share of rewards that are not 0.

    Arguments, results and errors are those of ``compute_grpo_outcome_advantage``. ``f_norm`` divides the advantages;
    ``epsilon`` and ``alpha`` are not read, because verl computes the factor from the batch.
    """
    advantages, _ = _outcome(
        "compute_gpg_outcome_advantage",
        token_level_rewards,
        response_mask,
        index,
        scale="nonzero-share",
        eps=0.0,
        singleton="raw",
    )
    advantages = advantages / f_norm
    return advantages, advantages


def compute_grpo_passk_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Index,
    epsilon: Number = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    config: Any = None,
    **kwargs: Any,
) -> Estimate:
    """Computes the advantages of pass@k: the lead of the best response of each group, and 0 for the others.

    Arguments and results are those of ``compute_grpo_outcome_advantage``. As in verl ``norm_adv_by_std_in_grpo`` is
    that of ``config``.

    Raises:
        TypeError: no ``config``. ValueError: a group of one, where ``index`` lies on the host.
    """
    caller = "compute_grpo_passk_outcome_advantage"
    if config is None:
        raise TypeError(f"{caller}: config must be verl's AlgoConfig, got None")
    if not isinstance(index, Tensor):
        index = list(index)
        for prompt, count in Counter(index).items():
            if count < 2:
                raise ValueError(
                    f"{caller}: Pass@k requires at least 2 samples per group. Got {count} for group {prompt!r}."
                )
    scale = "std" if setting(config, "norm_adv_by_std_in_grpo", True) else None
    return _outcome(
        "compute_grpo_passk_outcome_advantage",
        token_level_rewards,
        response_mask,
        index,
        baseline="runner-up",
        scale=scale,
        eps=epsilon,
    )


def compute_gdpo_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Index,
    epsilon: Number = 1e-6,
    norm_adv_by_std_in_grpo: bool = True,
    config: Any = None,
    non_tensor_batch: Any = None,
    batch: Any = None,
    **kwargs: Any,
) -> Estimate:
    """Computes GDPO's advantages: those of GRPO for each reward, added with weights and whitened over the tokens.

    Arguments and results are those of ``compute_grpo_outcome_advantage``. The rewards are the entries of
    ``non_tensor_batch`` that ``config.gdpo_reward_keys`` names, with ``config.gdpo_reward_weights``. Without ``batch``
    or ``non_tensor_batch`` there is one reward, ``token_level_rewards``, as in verl.

    Raises:
        ValueError: no ``gdpo_reward_keys``, or an entry that is missing.
    """
    caller = "compute_gdpo_outcome_advantage"
    options = _grpo_options(norm_adv_by_std_in_grpo)
    if config is None or non_tensor_batch is None or batch is None:
        advantages, _ = _outcome(
            "compute_gdpo_outcome_advantage", token_level_rewards, response_mask, index, eps=epsilon, **options
        )
    else:
        keys = list(setting(config, "gdpo_reward_keys", ()))
        missing = [key for key in keys if key not in non_tensor_batch]
        if not keys or missing:
            raise ValueError(
                f"{caller}: algorithm.gdpo_reward_keys must name entries of non_tensor_batch, got {keys}; it holds "
                f"{sorted(non_tensor_batch)}"
            )
        weights = setting(config, "gdpo_reward_weights", [1.0] * len(keys))
        columns = [torch.as_tensor([float(x) for x in non_tensor_batch[key]]) for key in keys]
        rewards = torch.stack(columns, -1).to(token_level_rewards.device)
        ids = group_ids(index, rewards.device)
        rows = group_advantages(rewards, ids, eps=epsilon, reward_weights=list(weights), **options)
        advantages = broadcast_to_tokens(rows, response_mask)
    advantages = masked_whiten(advantages, response_mask)
    return advantages, advantages


def compute_reinforce_plus_plus_outcome_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, **kwargs: Any
) -> Estimate:
    """Computes REINFORCE++: discounted returns, and the same whitened; ``config.gamma`` is the discount.

    A masked token passes the return on, undiscounted. Results are those of ``compute_gae_advantage_return``.

    Raises:
        TypeError: no ``config``.
    """
    if config is None:
        raise TypeError("compute_reinforce_plus_plus_outcome_advantage: config must be verl's AlgoConfig, got None")
    returns = discounted_returns(token_level_rewards, response_mask, gamma=config.gamma, masked="skip")
    return masked_whiten(returns, response_mask), returns


def compute_reinforce_plus_plus_baseline_outcome_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Index,
    epsilon: Number = 1e-6,
    config: Any = None,
    **kwargs: Any,
) -> Estimate:
    """Computes REINFORCE++ with a baseline: the gap to the group's mean, whitened over the tokens.

    Arguments, results and errors are those of ``compute_grpo_outcome_advantage``; ``epsilon`` is not read, as in verl.
    """
    advantages, _ = _outcome(
        "compute_reinforce_plus_plus_baseline_outcome_advantage",
        token_level_rewards,
        response_mask,
        index,
        scale=None,
        singleton="raw",
    )
    advantages = masked_whiten(advantages, response_mask)
    return advantages, advantages


def compute_remax_outcome_advantage(
    token_level_rewards: Tensor, reward_baselines: Tensor, response_mask: Tensor, config: Any = None, **kwargs: Any
) -> Estimate:
    """Computes ReMax: the rewards from each token on, less the reward ``[B]`` of the greedy response.

    Returns:
        ``(advantages, returns)``, ``[B, L]``, 0 at masked tokens, whose rewards do not count.
    """
    returns = discounted_returns(token_level_rewards, response_mask)
    return returns - broadcast_to_tokens(reward_baselines, response_mask), returns


def compute_optimal_token_baseline_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Index,
    old_log_probs: Tensor,
    sum_pi_squared: Tensor,
    rollout_is_weights: Tensor | None = None,
    handle_zero_tail: bool = True,
    epsilon: Number = 1e-8,
    **kwargs: Any,
) -> Estimate:
    """Computes returns less the optimal baseline of each position: ``optimal_token_advantages``.

    Args:
        token_level_rewards, response_mask, old_log_probs, sum_pi_squared: ``[B, L]``. The mask has no holes: verl
            compares columns with counts of tokens.
        index: as for ``compute_grpo_outcome_advantage``.
        rollout_is_weights: ``[B, L]``, or None.
        handle_zero_tail: True; behind the end of all others a response has no baseline.

    Returns:
        ``(advantages, returns)``, ``[B, L]``, 0 at masked tokens. A group of one has no baseline.

    Raises:
        ValueError: ``handle_zero_tail=False``, with which a response alone is its own baseline.
    """
    caller = "compute_optimal_token_baseline_advantage"
    columns = token_level_rewards, old_log_probs, sum_pi_squared, response_mask
    return _optimal(caller, columns, index, "position", rollout_is_weights, handle_zero_tail, epsilon)


def compute_multi_turn_optimal_token_baseline_advantage(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: Index,
    old_log_probs: Tensor,
    sum_pi_squared: Tensor,
    rollout_is_weights: Tensor | None = None,
    handle_zero_tail: bool = True,
    epsilon: Number = 1e-8,
    **kwargs: Any,
) -> Estimate:
    """Computes ``compute_optimal_token_baseline_advantage`` with the k-th live tokens side by side, for several turns.

    Arguments, results and errors are the same; the mask may have holes.
    """
    caller = "compute_multi_turn_optimal_token_baseline_advantage"
    columns = token_level_rewards, old_log_probs, sum_pi_squared, response_mask
    return _optimal(caller, columns, index, "live", rollout_is_weights, handle_zero_tail, epsilon)


def _optimal(
    caller: str,
    columns: tuple[Tensor, Tensor, Tensor, Tensor],
    index: Index,
    alignment: Any,
    weights: Tensor | None,
    handle_zero_tail: bool,
    epsilon: Number,
) -> Estimate:
    if not handle_zero_tail:
        raise ValueError(
            f"{caller}: handle_zero_tail must be True, got False; without it the longest response of a group is its "
            "own baseline behind the others' end"
        )
    rewards, logprobs, squares, mask = columns
    return optimal_token_advantages(
        rewards,
        logprobs,
        squares.log(),
        group_ids(index, rewards.device),
        mask,
        weights=weights,
        alignment=alignment,
        singleton="raw",
        eps=epsilon,
    )


def _outcome(caller: str, rewards: Tensor, mask: Tensor, index: Index, **options: Any) -> Estimate:
    """Computes the advantage of each response and gives it to its live tokens."""
    checks.tensor(caller, "token_level_rewards", rewards)
    checks.tensor(caller, "response_mask", mask)
    checks.shape(caller, "response_mask", mask, rewards.shape)
    if index is None:
        raise TypeError(f"{caller}: index must hold the prompt of each response, got None")
    scores = sequence_sums(rewards.detach())
    rows = group_advantages(scores, group_ids(index, scores.device), **options)
    advantages = broadcast_to_tokens(rows, mask)
    return advantages, advantages


def group_ids(index: Index, device: torch.device) -> Tensor:
    """Returns verl's index of prompts, an array of any hashable ids, as integers on the device."""
    if isinstance(index, Tensor):
        return index.to(device)
    seen: dict[Any, int] = {}
    return torch.tensor([seen.setdefault(prompt, len(seen)) for prompt in index], dtype=torch.int64, device=device)


ADVANTAGES: dict[str, Callable[..., Estimate]] = {
    "gae": compute_gae_advantage_return,
    "grpo": compute_grpo_outcome_advantage,
    "grpo_vectorized": compute_grpo_vectorized_outcome_advantage,
    "grpo_passk": compute_grpo_passk_outcome_advantage,
    "gdpo": compute_gdpo_outcome_advantage,
    "gpg": compute_gpg_outcome_advantage,
    "opo": compute_opo_outcome_advantage,
    "optimal_token_baseline": compute_optimal_token_baseline_advantage,
    "tir_optimal_token_baseline": compute_multi_turn_optimal_token_baseline_advantage,
    "reinforce_plus_plus": compute_reinforce_plus_plus_outcome_advantage,
    "reinforce_plus_plus_baseline": compute_reinforce_plus_plus_baseline_outcome_advantage,
    "remax": compute_remax_outcome_advantage,
    "rloo": compute_rloo_outcome_advantage,
    "rloo_vectorized": compute_rloo_vectorized_outcome_advantage,
}
"""verl's names of estimators to ours."""
