"""Advantages that differ within a response: steps with rewards, states that repeat, the optimal baseline of a token."""

from typing import get_args

import torch
from torch import Tensor

from rlkernels import checks
from rlkernels.advantages.gae import discounted_returns
from rlkernels.advantages.group import check_singleton, group_advantages
from rlkernels.advantages.recurrence import running_sums
from rlkernels.checks import tokens as checks_tokens
from rlkernels.packed_rows import takes_one_row
from rlkernels.sequences import groups_of, result_dtype, segment_ids
from rlkernels.tracing import without_gradient
from rlkernels.types import Alignment, Mask, Number, Offsets, PerResponse, PerSequence, PerToken, Singleton, StepScale

ALIGNMENTS, STEP_SCALES = get_args(Alignment), get_args(StepScale)


@takes_one_row(per_token=True)
@without_gradient
def step_advantages(
    step_rewards: PerToken,
    step_ends: Mask,
    group_ids: PerSequence,
    mask: Mask | None = None,
    *,
    scale: StepScale = "std",
    eps: Number = 1e-6,
    unbiased: bool = True,
    cu_seqlens: Offsets | None = None,
) -> PerToken:
    r"""Advantages of tokens from rewards of steps: each step against all steps of its group.

    ``A_t = sum_{s: e(s) >= t} (r_s - mean) / (std + eps)``;  ``e(s)``: the last token of step ``s``; mean and spread
    over every step of every response of the group.

    Args:
        step_rewards: ``r``, at the last token of each step: ``[B, L]``, or packed ``[N]`` with ``cu_seqlens``; any
            float dtype, bool or integers. NaN is a step that could not be scored: it counts nowhere.
        step_ends: mask of these tokens, shaped like ``step_rewards``.
        group_ids: integers ``[B]``, or ``[S]`` when packed, in any order.
        mask: live tokens, any pattern. A step that ends at a dead token does not count.
        scale: ``"std"``, or None for no division.
        eps, unbiased: as for ``group_advantages``.

    Returns:
        shaped like ``step_rewards``: float32, float64 for float64; 0 at dead tokens and behind the last step; not
            differentiable. A group of one step has nothing to compare: 0.

    Raises:
        TypeError: ``step_rewards`` not real, ``group_ids`` not integers. ValueError: shapes differ; another ``scale``.

    Example:
        >>> rewards, ends = torch.tensor([[0.0, 1.0, 3.0], [0.0, 0.0, 2.0]]), torch.tensor([[0, 1, 1], [0, 0, 1]])
        >>> step_advantages(rewards, ends, torch.tensor([7, 7]), scale=None)
        tensor([[0., 0., 1.],
                [0., 0., 0.]])

    Shao et al. 2024 (process supervision), arXiv:2402.03300, section 4.1.3.
    """
    caller = "step_advantages"
    unbiased = checks.flag(caller, "unbiased", unbiased)
    checks_tokens.numbers(caller, "step_rewards", step_rewards)
    checks_tokens.layout(caller, "step_rewards", step_rewards, cu_seqlens)
    offsets = None if cu_seqlens is None else checks_tokens.segments(caller, cu_seqlens, step_rewards, mask=mask)
    checks.tensor(caller, "step_ends", step_ends)
    checks.mask(caller, step_ends, step_rewards.shape, name="step_ends")
    checks.mask(caller, mask, step_rewards.shape)
    checks.choice(caller, "scale", scale, STEP_SCALES)
    groups = _of_tokens(caller, "group_ids", group_ids, step_rewards, offsets)
    checks.one_device(caller, "step_rewards", step_rewards, step_ends=step_ends, mask=mask, group_ids=group_ids)
    checks.no_forward_ad(caller, step_rewards)
    eps = checks_tokens.not_negative(caller, "eps", eps, step_rewards)
    live = step_ends != 0 if mask is None else (step_ends != 0) & (mask != 0)
    # Tokens without a reward are responses that could not be scored.
    rewards = torch.where(live, step_rewards.to(result_dtype(step_rewards)), torch.nan)
    normalised = group_advantages(rewards.reshape(-1), groups.reshape(-1), scale=scale, eps=eps, unbiased=unbiased)
    return discounted_returns(normalised.view(rewards.shape), mask, cu_seqlens=offsets)


@torch.no_grad()
def gigpo_advantages(
    episode_rewards: PerResponse,
    step_rewards: PerResponse,
    group_ids: PerResponse,
    anchor_ids: PerResponse,
    *,
    step_weight: Number = 1.0,
    scale: StepScale = None,
    eps: Number = 1e-6,
    unbiased: bool = True,
    singleton: Singleton = "zero",
    trajectory_ids: PerResponse | None = None,
) -> PerResponse:
    r"""Advantages of the steps of agents: the episode within its group, and the step among those of the same state.

    ``A = A^E + step_weight A^S``. ``A^E`` compares ``episode_rewards`` within a group. ``A^S`` compares
    ``step_rewards`` of the rows of a group that share a state.

    Args:
        episode_rewards: ``[N]``, one per row, a row being a step of an episode; the same for each row of an episode.
        step_rewards: ``[N]``, such as discounted returns over the steps.
        group_ids: integers ``[N]``, in any order: rows of the same task.
        anchor_ids: integers ``[N]``: the state in which a row starts. They are compared within a group.
        step_weight: the weight of ``A^S``.
        scale: None, or ``"std"``, the spread of the group, and of the rows of a state.
        eps, unbiased: as for ``group_advantages``.
        singleton: ``A^E`` of a group of one row, or of one episode, as for ``group_advantages``. A state of one row has
            ``A^S = 0``.
        trajectory_ids: integers ``[N]``; with them each episode counts once in mean and spread. None: once per row.

    Returns:
        ``[N]``: float32, float64 for float64; not differentiable.

    Raises:
        TypeError: rewards not real, ids not integers. ValueError: shapes differ; another ``scale``.

    Example:
        >>> episode, step = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0.5, 9.0, 0.1])
        >>> gigpo_advantages(episode, step, torch.tensor([0, 0, 0]), torch.tensor([4, 7, 4]))
        tensor([ 0.5333,  0.3333, -0.8667])

    Feng et al. 2025, arXiv:2505.10978.
    """
    caller = "gigpo_advantages"
    unbiased = checks.flag(caller, "unbiased", unbiased)
    for name, x in (("episode_rewards", episode_rewards), ("step_rewards", step_rewards)):
        checks_tokens.numbers(caller, name, x)
        if x.dim() != 1:
            raise ValueError(f"{caller}: {name} has shape {tuple(x.shape)}, expected [N], one per row")
    checks.shape(caller, "step_rewards", step_rewards, episode_rewards.shape)
    given = {"group_ids": group_ids, "anchor_ids": anchor_ids}
    given |= {} if trajectory_ids is None else {"trajectory_ids": trajectory_ids}
    for name, x in given.items():
        checks_tokens.ids(caller, name, x, episode_rewards.shape)
    checks.one_device(caller, "episode_rewards", episode_rewards, step_rewards=step_rewards, **given)
    checks.no_forward_ad(caller, episode_rewards, step_rewards)
    checks.choice(caller, "scale", scale, STEP_SCALES)
    check_singleton(caller, singleton, scale)
    step_weight = checks.coefficient(checks.finite, caller, "step_weight", step_weight, episode_rewards)
    eps = checks_tokens.not_negative(caller, "eps", eps, episode_rewards)

    real = result_dtype(episode_rewards, step_rewards)
    episode_rewards, step_rewards = episode_rewards.to(real), step_rewards.to(real)
    options = {"scale": scale, "eps": eps, "unbiased": unbiased}
    if trajectory_ids is None:
        episodes = group_advantages(episode_rewards, group_ids, singleton=singleton, **options)
    else:
        place = torch.arange(episode_rewards.shape[0], device=episode_rewards.device)
        trajectories = groups_of(trajectory_ids)
        first = trajectories.reduce_each(place.double(), "min", torch.inf) == place
        once = torch.where(first, episode_rewards, torch.nan)
        episodes = trajectories.reduce_each(group_advantages(once, group_ids, singleton=singleton, **options))
    steps = group_advantages(step_rewards, _both(group_ids, anchor_ids), **options)
    return (episodes.double() + step_weight * steps.double()).to(real)


@takes_one_row(per_token=True)
@without_gradient
def optimal_token_advantages(
    token_rewards: PerToken,
    logprobs: PerToken,
    log_sum_sq_probs: PerToken,
    group_ids: PerSequence,
    mask: Mask | None = None,
    *,
    weights: PerToken | None = None,
    alignment: Alignment = "position",
    singleton: Singleton = "zero",
    eps: Number = 1e-8,
    cu_seqlens: Offsets | None = None,
) -> tuple[PerToken, PerToken]:
    r"""Returns less the baseline of least variance, which the group's responses give at each position.

    ``A_it = G_it - b_t``,  ``b_t = sum_j G_jt W_jt / (sum_j W_jt + eps)``,  ``W_it = sum_{s <= t} w_is^2 (1 - 2 p_is +
    sum_v p_isv^2)``;  ``G``: the rewards from ``t`` on, ``j``: the responses of the group that are live at ``t``.
    Behind the last position at which another response is live there is no baseline.

    Args:
        token_rewards: ``[B, L]``, or packed ``[N]`` with ``cu_seqlens``; any float dtype, bool or integers.
        logprobs, log_sum_sq_probs: ``log p`` of the token and ``log sum_v p_v^2`` of its row, as ``token_stats``
            returns them.
        group_ids: integers ``[B]``, or ``[S]`` when packed, in any order.
        mask: live tokens, any pattern. What a dead token holds is not looked at.
        weights: ``w``, importance weights per token, such as those of ``rollout_weights``.
        alignment: ``"position"`` compares tokens of the same column, ``"live"`` the k-th live tokens, for responses of
            several turns.
        singleton: a group in which no two responses are live at one position, such as a group of one: ``"zero"``, or
            ``"raw"``, its returns.

    Returns:
        ``(advantages, returns)`` shaped like ``token_rewards``: float32, float64 for float64; 0 at dead tokens; not
            differentiable.

    Raises:
        TypeError: dtypes. ValueError: shapes differ; unknown ``alignment``; ``singleton`` not one of these two.

    Example:
        >>> rewards, logprobs = torch.tensor([[0.0, 1.0], [0.0, 0.0]]), torch.full((2, 2), 0.5).log()
        >>> optimal_token_advantages(rewards, logprobs, logprobs, torch.tensor([3, 3]))[0]
        tensor([[ 0.5000,  0.5000],
                [-0.5000, -0.5000]])

    verl 0.9, ``optimal_token_baseline``; with ``"live"`` its form for several turns.
    """
    caller = "optimal_token_advantages"
    checks_tokens.numbers(caller, "token_rewards", token_rewards)
    checks_tokens.layout(caller, "token_rewards", token_rewards, cu_seqlens)
    offsets = None if cu_seqlens is None else checks_tokens.segments(caller, cu_seqlens, token_rewards, mask=mask)
    columns = {"logprobs": logprobs, "log_sum_sq_probs": log_sum_sq_probs}
    columns |= {} if weights is None else {"weights": weights}
    for name, x in columns.items():
        checks.floating(caller, name, x)
        checks.shape(caller, name, x, token_rewards.shape)
    checks.mask(caller, mask, token_rewards.shape)
    checks.choice(caller, "alignment", alignment, ALIGNMENTS)
    checks.choice(caller, "singleton", singleton, ("zero", "raw"))
    eps = checks_tokens.not_negative(caller, "eps", eps, token_rewards)
    groups = _of_tokens(caller, "group_ids", group_ids, token_rewards, offsets)
    checks.one_device(caller, "token_rewards", token_rewards, mask=mask, group_ids=group_ids, **columns)
    checks.no_forward_ad(caller, token_rewards, *columns.values())

    real = result_dtype(token_rewards, *columns.values())
    live = torch.ones_like(token_rewards, dtype=torch.bool) if mask is None else mask != 0
    live = live.contiguous()
    returns = discounted_returns(torch.where(live, token_rewards.to(real), 0.0), live, cu_seqlens=offsets)
    chance, squares = (torch.where(live, x.double(), 0.0).exp() for x in (logprobs, log_sum_sq_probs))
    growth = 1.0 - 2.0 * chance + squares
    if weights is not None:
        growth = growth * torch.where(live, weights.double(), 0.0).square()
    size = live.shape[-1]
    firsts = torch.zeros((), dtype=torch.int64, device=live.device)
    if offsets is not None:
        firsts = offsets[segment_ids(offsets, size)]
    variance = running_sums(torch.where(live, growth, 0.0), offsets)
    column = torch.arange(size, device=live.device) - firsts
    if alignment == "live":
        column = running_sums(live.double(), offsets).long()
    flat = live.reshape(-1)
    places = groups_of(torch.where(flat, _both(groups.reshape(-1), column.expand(live.shape).reshape(-1)), -1))
    gain, factor, responses = (
        places.reduce_each(torch.where(flat, x.reshape(-1), 0.0)).view(live.shape)
        for x in (returns.double() * variance, variance, torch.ones_like(variance))
    )
    # The longest response is alone behind the end of the others, where it would be its own baseline.
    last = _last_company(groups, column, live, responses > 1)
    baseline = torch.where(live & (column <= last), gain / (factor + eps), 0.0)
    counted = live & (last >= 0) if singleton == "zero" else live
    advantages = torch.where(counted, returns.double() - baseline, 0.0)
    return advantages.to(real), returns


def _of_tokens(caller: str, name: str, ids: PerSequence, tokens: Tensor, offsets: Tensor | None) -> Tensor:
    """Checks ids of sequences and returns them as ids of tokens."""
    if offsets is None:
        checks_tokens.ids(caller, name, ids, tokens.shape[:1])
        return ids[:, None].expand(tokens.shape)
    checks_tokens.ids(caller, name, ids, (offsets.shape[0] - 1,))
    checks.one_device(caller, "cu_seqlens", offsets, **{name: ids})
    return ids[segment_ids(offsets, tokens.shape[0])] if tokens.shape[0] else ids.new_zeros(0)


def _both(first: Tensor, second: Tensor) -> Tensor:
    """Returns one id for each pair of ids, not negative."""
    # By the index of the group, because a pair of arbitrary ids has no place in 64 bits.
    return groups_of(first).index * first.shape[0] + groups_of(second).index


def _last_company(groups: Tensor, column: Tensor, live: Tensor, shared: Tensor) -> Tensor:
    """Returns for each token the group's last column with two live responses, -1 where there is none."""
    flat = torch.where(shared & live, column, -1).double().reshape(-1)
    return groups_of(groups.reshape(-1)).reduce_each(flat, "max", -1.0).view(live.shape)
