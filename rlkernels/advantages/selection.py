"""The selection of responses by their rewards."""

import torch
from torch import Tensor

from rlkernels import checks
from rlkernels.checks import tokens as checks_tokens
from rlkernels.sequences import groups_of
from rlkernels.types import PerResponse


def best_of_n(rewards: PerResponse, group_ids: PerResponse, *, count: int = 1) -> Tensor:
    r"""Selects the responses of each group with the largest rewards; of equal ones the first.

    Response ``i`` is selected where ``rank_i <= count``, ``rank_i`` its place by reward in its group, from 1 on.
    As ``sample_weights`` of ``sft_loss`` the selection is rejection-sampling fine-tuning on the best of n.

    Args:
        rewards: ``[N]``; any float dtype, bool or integers. NaN is a response that could not be scored: it is never
            selected.
        group_ids: integers ``[N]``, in any order; groups may differ in size.
        count: responses to select from each group, at least 1. A smaller group is selected whole.

    Returns:
        bool ``[N]``.

    Raises:
        TypeError: ``rewards`` not real, ``group_ids`` not integers.
        ValueError: shapes differ; ``count`` below 1.

    Example:
        >>> best_of_n(torch.tensor([1.0, 5.0, 2.0, 2.0]), torch.tensor([3, 7, 3, 3]))
        tensor([False,  True,  True, False])

    Yuan et al. 2023, arXiv:2308.01825; Touvron et al. 2023, arXiv:2307.09288, section 3.2.3.
    """
    caller = "best_of_n"
    checks_tokens.numbers(caller, "rewards", rewards)
    if rewards.dim() != 1:
        raise ValueError(
            f"{caller}: rewards has shape {tuple(rewards.shape)}, expected [N], one per response; flatten it"
        )
    checks_tokens.ids(caller, "group_ids", group_ids, rewards.shape)
    checks.one_device(caller, "rewards", rewards, group_ids=group_ids)
    count = checks.integer(caller, "count", count)
    if count < 1:
        raise ValueError(f"{caller}: count must be at least 1, got {count}; it counts the responses of a group")
    scored = ~rewards.isnan()
    # Two stable sorts, because the second keeps the order of rewards within a group.
    by_reward = torch.where(scored, -rewards.detach().double(), torch.inf).argsort(stable=True)
    by_reward = by_reward[scored[by_reward].logical_not().byte().argsort(stable=True)]
    groups = groups_of(group_ids[by_reward])
    place = torch.arange(rewards.shape[0], device=rewards.device)
    rank = place - groups.cu_seqlens[groups.index[groups.order]]
    selected = torch.zeros_like(scored).scatter(0, by_reward[groups.order], rank < count)
    return selected & scored
