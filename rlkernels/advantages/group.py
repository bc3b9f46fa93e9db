"""Advantages of whole responses, each against the others that answer the same prompt."""

from collections.abc import Callable
from typing import get_args

import torch
from torch import Tensor

from rlkernels import checks
from rlkernels.advantages.moments import Moments, given_moments, masked_moments, over_ranks
from rlkernels.checks import tokens as checks_tokens
from rlkernels.sequences import groups_of, result_dtype
from rlkernels.types import Baseline, Mask, Number, PerResponse, Scale

BASELINES, SCALES = get_args(Baseline), get_args(Scale)


def group_advantages(
    rewards: PerResponse,
    group_ids: PerResponse,
    *,
    baseline: Baseline = "mean",
    scale: Scale = "std",
    eps: Number = 1e-6,
    unbiased: bool = True,
    lengths: PerResponse | None = None,
    moments: Moments | None = None,
    process_group: "torch.distributed.ProcessGroup | None" = None,
) -> PerResponse:
    r"""Advantage of each response within its group: the reward less a baseline, over a scale.

    ``A_i = (R_i - b_i) / (s_i + eps)``, with sums over the ``n`` scorable responses ``j`` of the group of ``i``:

    * baseline ``"mean"``: ``b = sum_j R_j / n`` (GRPO); ``"leave-one-out"``: the mean of the others (RLOO);
      ``"length-mean"``: ``sum_j l_j R_j / sum_j l_j`` (OPO); ``"batch-mean"``: the mean over all groups; None: 0
    * scale ``"std"``: ``sqrt(sum_j (R_j - mean)^2 / (n - 1))``; ``"batch-std"``: the same over all groups; ``"mean"``:
      the group's mean (MaxRL), of rewards that are not negative; None: no division (Dr. GRPO)

    With the scale ``"mean"`` and a baseline of the group (or None) no advantage is larger than ``n``, however small the
    mean. With the baseline ``"batch-mean"`` a group whose mean is near 0 gets about ``-b / eps``.

    Args:
        rewards: ``R``, ``[N]``; any float dtype, bool or integers. NaN is a response that could not be scored: it
            counts nowhere and gets 0.
        group_ids: integers ``[N]``, in any order; groups may differ in size.
        eps: added to the scale.
        unbiased: False divides the variance by ``n`` instead of ``n - 1``.
        lengths: ``l``, ``[N]``, live tokens of each response, for ``"length-mean"`` alone; finite and not negative.
            That of a NaN reward is not read.
        moments: those of the scorable rewards of the whole batch, where ``rewards`` are a part of it, for
            ``"batch-mean"`` and ``"batch-std"`` alone.
        process_group: the ranks over which the batch lies, instead of ``moments``.

    Returns:
        ``[N]``: float32, float64 for float64; not differentiable. A group of one, or of equal rewards, has nothing to
            compare: 0.

    Raises:
        TypeError: ``rewards`` not real, ``group_ids`` not integers.
        ValueError: shapes differ; unknown ``baseline`` or ``scale``; ``eps`` negative; ``lengths`` missing, or given
            where it is not used. On a CPU: a negative reward with the scale ``"mean"``, a length that is negative or
            not finite; elsewhere, and in a compiled program, where values are not read, its whole group gets NaN.

    Example:
        >>> group_advantages(torch.tensor([1.0, 5.0, 0.0]), torch.tensor([3, 7, 3]), scale=None)
        tensor([ 0.5000,  0.0000, -0.5000])

    Shao et al. 2024, arXiv:2402.03300, section 4.1.2; Ahmadian et al. 2024, arXiv:2402.14740; Liu et al. 2025,
    arXiv:2503.20783.
    """
    caller = "group_advantages"
    checks_tokens.numbers(caller, "rewards", rewards)
    if rewards.dim() != 1:
        raise ValueError(
            f"{caller}: rewards has shape {tuple(rewards.shape)}, expected [N], one per response; flatten it"
        )
    checks_tokens.ids(caller, "group_ids", group_ids, rewards.shape)
    checks.choice(caller, "baseline", baseline, BASELINES)
    checks.choice(caller, "scale", scale, SCALES)
    eps = checks_tokens.not_negative(caller, "eps", eps, rewards)
    if (lengths is not None) != (baseline == "length-mean"):
        raise ValueError(f"{caller}: baseline {baseline!r} {'takes no' if lengths is not None else 'needs'} lengths")
    if lengths is not None:
        checks.mask(caller, lengths, rewards.shape, name="lengths", counts=True)
    checks.one_device(caller, "rewards", rewards, group_ids=group_ids, lengths=lengths)
    checks.no_forward_ad(caller, rewards, lengths)
    known = moments is not None or process_group is not None
    if known and baseline != "batch-mean" and scale != "batch-std":
        name = "process_group" if moments is None else "moments"
        raise ValueError(f"{caller}: {name} is read with baseline 'batch-mean' or scale 'batch-std' alone")
    if moments is not None and process_group is not None:
        raise ValueError(f"{caller}: moments and process_group both give the statistics; pass one of them")

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
        None: lambda: wide,
    }[baseline]()
    if scale is not None:
        size = {
            "std": lambda: group.spread(fewer),
            "batch-std": lambda: batch.spread(fewer),
            "mean": lambda: torch.where(group.base < 0, torch.nan, group.base + group.centre),
        }[scale]()
        centred = torch.where(size == 0, 0.0, centred / torch.where(size == 0, 1.0, size + eps))
    of_group = baseline in ("mean", "leave-one-out", "length-mean") or scale in ("std", "mean")
    alone = (group.count < 2) if of_group else torch.zeros_like(scored)
    return torch.where(scored & ~alone, centred, 0.0).to(result_dtype(rewards))


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
    checks.mask(caller, is_last_step, row_advantages.shape, name="is_last_step")
    checks_tokens.ids(caller, "trajectory_ids", trajectory_ids, row_advantages.shape)
    if row_advantages.dim() != 1:
        raise ValueError(f"{caller}: row_advantages has shape {tuple(row_advantages.shape)}, expected [N], one per row")
    checks.one_device(
        caller, "row_advantages", row_advantages, is_last_step=is_last_step, trajectory_ids=trajectory_ids
    )
    last = torch.where(is_last_step != 0, row_advantages.detach(), 0.0).double()
    return groups_of(trajectory_ids).reduce_each(last).to(result_dtype(row_advantages))
