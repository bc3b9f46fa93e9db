"""Advantages of whole responses, each against the others that answer the same prompt."""

from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor

from rlkernels import checks
from rlkernels.advantages.moments import Moments, given_moments, masked_moments, over_ranks
from rlkernels.checks import tokens as checks_tokens
from rlkernels.sequences import groups_of, result_dtype
from rlkernels.types import Baseline, Mask, Number, PerResponse, Rewards, RewardWeights, Scale, Singleton

BASELINES, SCALES, SINGLETONS = get_args(Baseline), get_args(Scale), get_args(Singleton)
OF_A_GROUP = "mean", "leave-one-out", "length-mean", "runner-up"
"""The baselines that compare a response with the others of its group."""


def group_advantages(
    rewards: Rewards,
    group_ids: PerResponse,
    *,
    baseline: Baseline = "mean",
    scale: Scale = "std",
    eps: Number = 1e-6,
    unbiased: bool = True,
    singleton: Singleton = "zero",
    reward_weights: RewardWeights | None = None,
    lengths: PerResponse | None = None,
    moments: Moments | None = None,
    process_group: "torch.distributed.ProcessGroup | None" = None,
) -> PerResponse:
    r"""Computes the advantage of each response within its group: the reward less a baseline, over a scale.

    ``A_i = (R_i - b_i) / (s_i + eps)``, with sums over the ``n`` scorable responses ``j`` of the group of ``i``:

    * baseline ``"mean"``: ``b = sum_j R_j / n`` (GRPO); ``"leave-one-out"``: the mean of the others (RLOO);
      ``"length-mean"``: ``sum_j l_j R_j / sum_j l_j`` (OPO); ``"batch-mean"``: the mean over all groups; None: 0
    * baseline ``"runner-up"`` (pass@k): the second largest reward of the group for its best response, and every other
      one gets 0
    * scale ``"std"``: ``sqrt(sum_j (R_j - mean)^2 / (n - 1))``; ``"batch-std"``: the same over all groups; ``"mean"``:
      the group's mean (MaxRL), of rewards that are not negative; ``"nonzero-share"``: the share of all rewards that are
      not 0 (GPG); None: no division (Dr. GRPO)

    With the scale ``"mean"`` and a baseline of the group (or None) no advantage is larger than ``n``, however small the
    mean. With the baseline ``"batch-mean"`` a group whose mean is near 0 gets about ``-b / eps``.

    Several rewards, ``[N, K]``, become advantages one by one, and these are added with ``reward_weights``. GDPO then
    takes the baseline ``"batch-mean"`` and the scale ``"batch-std"`` of the sum, or whitens its tokens.

    Args:
        rewards: ``R``, ``[N]`` or ``[N, K]``; any float dtype, bool or integers. NaN is a response that could not be
            scored: it counts nowhere and gets 0.
        group_ids: integers ``[N]``, in any order; groups may differ in size.
        eps: added to the scale.
        unbiased: False divides the variance by ``n`` instead of ``n - 1``.
        singleton: the advantage of the only scorable response of a group, where it is to be compared with its group:
            ``"zero"``; ``"raw"``: its reward, not divided by a scale of the group; ``"scaled"``: ``R / (1 + eps)``, for
            the scale ``"std"`` (GRPO of verl).
        reward_weights: ``K`` numbers, or a tensor ``[K]``, for rewards ``[N, K]``, which need them.
        lengths: ``l``, ``[N]``, live tokens of each response, for ``"length-mean"`` alone; finite and not negative.
            That of a NaN reward is not read.
        moments: those of the scorable rewards of the whole batch, where ``rewards`` are a part of it, for
            ``"batch-mean"`` and ``"batch-std"`` alone.
        process_group: the ranks over which the batch lies, instead of ``moments``.

    Returns:
        ``[N]``: float32, float64 for float64; not differentiable. A group of equal rewards has nothing to compare: 0.

    Raises:
        TypeError: ``rewards`` not real, ``group_ids`` not integers.
        ValueError: shapes differ; unknown ``baseline``, ``scale`` or ``singleton``; ``eps`` negative; ``lengths``
            missing, or given where it is not used; ``reward_weights`` likewise. On a CPU: a negative reward with the
            scale ``"mean"``, a length that is negative or not finite; elsewhere, and in a compiled program, where
            values are not read, its whole group gets NaN.

    Example:
        >>> group_advantages(torch.tensor([1.0, 5.0, 0.0]), torch.tensor([3, 7, 3]), scale=None)
        tensor([ 0.5000,  0.0000, -0.5000])

    Shao et al. 2024, arXiv:2402.03300, section 4.1.2; Ahmadian et al. 2024, arXiv:2402.14740; Liu et al. 2025,
    arXiv:2503.20783; Chen et al. 2025 (pass@k), arXiv:2503.19595; Chu et al. 2025 (GPG), arXiv:2504.02546.
    """
    caller = "group_advantages"
    unbiased = checks.flag(caller, "unbiased", unbiased)
    checks_tokens.numbers(caller, "rewards", rewards)
    if rewards.dim() != (1 if reward_weights is None else 2):
        # [N, K] by the weights alone, because rewards of tokens would pass for K rewards, too.
        expected = "[N], one per response, or [N, K] with reward_weights" if reward_weights is None else "[N, K]"
        raise ValueError(f"{caller}: rewards has shape {tuple(rewards.shape)}, expected {expected}; flatten it")
    checks_tokens.ids(caller, "group_ids", group_ids, rewards.shape[:1])
    checks.choice(caller, "baseline", baseline, BASELINES)
    checks.choice(caller, "scale", scale, SCALES)
    check_singleton(caller, singleton, scale)
    weights = _reward_weights(caller, rewards, reward_weights)
    eps = checks_tokens.not_negative(caller, "eps", eps, rewards)
    if (lengths is not None) != (baseline == "length-mean"):
        raise ValueError(f"{caller}: baseline {baseline!r} {'takes no' if lengths is not None else 'needs'} lengths")
    if lengths is not None:
        checks.mask(caller, lengths, rewards.shape[:1], name="lengths", counts=True)
    checks.one_device(caller, "rewards", rewards, group_ids=group_ids, lengths=lengths)
    checks.no_forward_ad(caller, rewards, lengths)
    known = moments is not None or process_group is not None
    if known and baseline != "batch-mean" and scale != "batch-std":
        name = "process_group" if moments is None else "moments"
        raise ValueError(f"{caller}: {name} is read with baseline 'batch-mean' or scale 'batch-std' alone")
    if moments is not None and process_group is not None:
        raise ValueError(f"{caller}: moments and process_group both give the statistics; pass one of them")
    if weights is not None:
        if moments is not None:
            raise ValueError(f"{caller}: moments are those of one reward; call it for each column of rewards")
        columns = [
            group_advantages(
                column,
                group_ids,
                baseline=baseline,
                scale=scale,
                eps=eps,
                unbiased=unbiased,
                singleton=singleton,
                lengths=lengths,
                process_group=process_group,
            )
            for column in rewards.detach().unbind(-1)
        ]
        stacked = torch.stack(columns, -1) if columns else rewards.detach().to(result_dtype(rewards))
        return (stacked.double() * weights).sum(-1).to(stacked.dtype)

    scored = ~rewards.isnan()
    wide = torch.where(scored, rewards.detach().double(), 0.0)
    if scale == "mean":
        # A mean over both signs may be negative or as near to 0 as it likes, so that it is no scale.
        _refuse(caller, "rewards", wide, wide < 0, "rewards >= 0 for scale 'mean'; shift them, or take scale 'std'")
    if lengths is not None:
        lengths = torch.where(scored, lengths.double(), 0.0)
        good = (lengths >= 0) & (lengths < torch.inf)
        _refuse(caller, "lengths", lengths, ~good, "finite lengths >= 0")
        lengths = torch.where(good, lengths, torch.nan)
    groups = groups_of(group_ids)
    group = _Population(wide, scored, groups.reduce_each)
    batch: _Population | _Batch = _Population(wide, scored, _reduce_all)
    if known:
        if moments is None:
            moments = over_ranks(caller, masked_moments(wide, scored), process_group)
        batch = _Batch(wide, scored, given_moments(caller, moments, (), rewards))

    fewer = 1 if unbiased else 0
    centred = {
        "mean": lambda: group.gap,
        "leave-one-out": lambda: group.gap * group.count / (group.count - 1).clamp(min=1),
        "length-mean": lambda: group.offset - group.weighted_mean(lengths),
        "batch-mean": lambda: batch.gap,
        "runner-up": lambda: group.lead(),
        None: lambda: wide,
    }[baseline]()
    of_group = baseline in OF_A_GROUP or scale in ("std", "mean")
    alone = (group.count < 2) if of_group else torch.zeros_like(scored)
    if singleton != "zero":
        centred = torch.where(alone, wide, centred)
    if scale is not None:
        size = {
            "std": lambda: group.spread(fewer),
            "nonzero-share": lambda: (wide != 0).sum().clamp(min=1).double() / scored.sum().clamp(min=1),
            "batch-std": lambda: batch.spread(fewer),
            "mean": lambda: torch.where(group.base < 0, torch.nan, group.base + group.centre),
        }[scale]()
        divided = torch.where(size == 0, 0.0, centred / torch.where(size == 0, 1.0, size + eps))
        if scale in ("std", "mean") and singleton != "zero":  # one response has no spread
            divided = torch.where(alone, centred / (1.0 + eps) if singleton == "scaled" else centred, divided)
        centred = divided
    kept = scored if singleton != "zero" else scored & ~alone
    return torch.where(kept, centred, 0.0).to(result_dtype(rewards))


def check_singleton(caller: str, singleton: Singleton, scale: Scale) -> None:
    """Refuses an unknown advantage of a group of one, and the scaled one without a scale."""
    checks.choice(caller, "singleton", singleton, SINGLETONS)
    if singleton == "scaled" and scale != "std":
        raise ValueError(f"{caller}: singleton 'scaled' needs scale 'std', got {scale!r}")


def _reward_weights(caller: str, rewards: Tensor, weights: RewardWeights | None) -> Tensor | None:
    """Returns the weight of each column of ``rewards`` in float64, or None where there is one reward."""
    if weights is None:
        return None
    if isinstance(weights, (tuple, list)):
        numbers = [checks.finite(caller, "reward_weights", x) for x in weights]
        weights = torch.tensor(numbers, dtype=torch.float64, device="cpu").to(rewards.device)
    checks.floating(caller, "reward_weights", weights)
    checks.shape(caller, "reward_weights", weights, rewards.shape[1:])
    checks.one_device(caller, "rewards", rewards, reward_weights=weights)
    checks.no_forward_ad(caller, weights)
    return weights.detach().double()


def _refuse(caller: str, name: str, x: Tensor, bad: Tensor, needed: str) -> None:
    """Raises ValueError for the first entry that is ``bad``, where the host may read it.

    ``needed``: the words for what ``x`` must hold.
    """
    if checks.host_reads(bad) and bad.any():
        at = int(bad.nonzero()[0, 0])
        raise ValueError(f"{caller}: {name} holds {x[at].item()} at entry {at}; it needs {needed}")


def _reduce_all(values: Tensor, how: str = "sum", initial: float = 0.0) -> Tensor:
    """Reduces all values to one number, as ``Groups.reduce_each`` reduces those of a group."""
    if values.numel() == 0:
        return values
    return values.sum() if how == "sum" else values.amin()


class _Population:
    """The scored rewards of each element's group, or of the batch: count, mean and spread.

    They are measured from the smallest one, because equal rewards are then exactly 0 and stay so.
    """

    def __init__(self, wide: Tensor, scored: Tensor, reduce: Callable[..., Tensor]) -> None:
        self.scored, self.reduce = scored, reduce
        self.count = reduce(scored.double())
        lowest = reduce(torch.where(scored, wide, torch.inf), "min", torch.inf)
        self.base = torch.where(self.count > 0, lowest, 0.0)
        self.offset = torch.where(scored, wide - self.base, 0.0)
        self.centre = reduce(self.offset) / self.count.clamp(min=1)
        self.gap = torch.where(scored, self.offset - self.centre, 0.0)

    def spread(self, fewer: int) -> Tensor:
        return (self.reduce(self.gap * self.gap) / (self.count - fewer).clamp(min=1)).sqrt()

    def lead(self) -> Tensor:
        """Returns the distance of the largest reward to the second largest one, at the largest one; elsewhere 0."""
        best = self.reduce(self.offset, "max", 0.0)
        at_best = self.scored & (self.offset == best)
        second = self.reduce(torch.where(self.scored & ~at_best, self.offset, 0.0), "max", 0.0)
        # Two best ones have no lead, and neither has a response without another one.
        ahead = (self.reduce(at_best.double()) == 1) & (self.count > 1)
        return torch.where(at_best & ahead, best - second, 0.0)

    def weighted_mean(self, weights: Tensor) -> Tensor:
        weights = torch.where(self.scored, weights, 0.0)
        total = self.reduce(weights)
        return torch.where(total == 0, 0.0, self.reduce(weights * self.offset) / torch.where(total == 0, 1.0, total))


class _Batch:
    """The scored rewards of a batch of which only a part is here, by its moments."""

    def __init__(self, wide: Tensor, scored: Tensor, moments: tuple[Tensor, Tensor, Tensor]) -> None:
        self.count, mean, self.squares = moments
        self.gap = torch.where(scored, wide - mean, 0.0)

    def spread(self, fewer: int) -> Tensor:
        return (self.squares / (self.count - fewer).clamp(min=1)).sqrt()


def broadcast_advantages(row_advantages: Tensor, is_last_step: Mask, trajectory_ids: Tensor) -> Tensor:
    r"""Gives every row of a trajectory, a rollout of several rows, the advantage of its last step.

    Args:
        row_advantages: ``[N]``; any float dtype. Only those of last steps are read.
        is_last_step: mask ``[N]``, one row per trajectory.
        trajectory_ids: integers ``[N]``; rows of a trajectory need not be adjacent.

    Returns:
        ``[N]``: float32, float64 for float64; not differentiable. A trajectory without a last step gets 0.

    Raises:
        TypeError: ``row_advantages`` not floating, ``trajectory_ids`` not integers. ValueError: shapes differ.

    Example:
        >>> broadcast_advantages(torch.tensor([9.0, 0.5, -1.0]), torch.tensor([0, 1, 1]), torch.tensor([4, 4, 2]))
        tensor([ 0.5000,  0.5000, -1.0000])
    """
    caller = "broadcast_advantages"
    checks.floating(caller, "row_advantages", row_advantages)
    checks.tensor(caller, "is_last_step", is_last_step)
    checks.mask(caller, is_last_step, row_advantages.shape, name="is_last_step")
    checks_tokens.ids(caller, "trajectory_ids", trajectory_ids, row_advantages.shape)
    if row_advantages.dim() != 1:
        raise ValueError(f"{caller}: row_advantages has shape {tuple(row_advantages.shape)}, expected [N], one per row")
    checks.one_device(
        caller, "row_advantages", row_advantages, is_last_step=is_last_step, trajectory_ids=trajectory_ids
    )
    checks.no_forward_ad(caller, row_advantages)
    last = torch.where(is_last_step != 0, row_advantages.detach(), 0.0).double()
    return groups_of(trajectory_ids).reduce_each(last).to(result_dtype(row_advantages))
