"""The ratio of a policy loss: what it divides by, its level, and the bounds of its logarithm."""

from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from rlkernels import checks
from rlkernels.logits_layout import dense
from rlkernels.losses.policy_arguments import LOG_PROBABILITIES, column, present
from rlkernels.losses.token_weights import TokenWeights, full_mask
from rlkernels.losses.weighted_sum import Params, weighted_sum
from rlkernels.objectives import Objective
from rlkernels.objectives.log_ratio import log_ratio
from rlkernels.sequences import means, spread, sums
from rlkernels.types import LogRatioClamp, Number, PerToken, RatioDenominator, RatioLevel

DENOMINATORS = get_args(RatioDenominator)
SQUARE = "k2"
"""The objective of ``log_ratio_sq_coef``, which is half a square: its coefficient is twice the caller's."""


class Clamp(NamedTuple):
    """The bounds of a log-ratio, and how the objective depends on it."""

    low: float | None
    high: float | None
    column: str
    alone: bool

    def of(self, gap: Tensor) -> Tensor:
        """Returns the log-ratio inside its bounds, without a gradient beyond them."""
        return torch.clamp(gap, self.low, self.high)

    def applied(self, logp: Tensor, columns: list[Tensor], entry: Objective) -> tuple[Tensor, list[Tensor]]:
        """Returns the first column and the others such that the objective sees the clamped log-ratio."""
        at, columns = entry.columns.index(self.column) - 1, list(columns)
        if self.alone:
            gap = self.of(logp - columns[at])
            columns[at] = torch.zeros_like(gap)
            return gap, columns
        fixed, other = logp.detach(), columns[at]
        gap = fixed - other
        # The column itself where nothing is clamped, because logp - (logp - old) rounds.
        if self.low is not None:
            other = torch.where(gap < self.low, fixed - self.low, other)
        if self.high is not None:
            other = torch.where(gap > self.high, fixed - self.high, other)
        columns[at] = other
        return logp, columns


class RatioOptions(NamedTuple):
    """The columns and terms that the options of the ratio make of a loss.

    ``old``, ``rollout``: the columns ``old_logp`` and ``rollout_logp`` of the objective, None where the caller gave
    none. ``square``: the coefficient of ``SQUARE``, or None. ``divides``: whether the rollout stands for ``old``.
    """

    old: PerToken | None
    rollout: PerToken | None
    clamp: Clamp | None = None
    square: Number | None = None
    divides: bool = False

    def in_one_launch(self, entry: Objective, kl_coef: Number | None) -> bool:
        """Tells whether the kernels over rows serve the loss: they hold no clamp, and one term beside the objective."""
        current = self.old is None and "old_logp" in entry.columns
        return self.clamp is None and not current and (self.square is None or kl_coef is None)

    def engine(
        self, caller: str, entry: Objective, correction: Any, rollout_logprobs: PerToken | None
    ) -> PerToken | None:
        """Returns the engine's log-probabilities for a correction; a tensor of factors takes none.

        They stay where nothing else takes them, so that the correction refuses them.

        Raises:
            ValueError: a correction with weights, where the engine is the denominator of the ratio already.
        """
        mode = correction.get("mode", "clip") if isinstance(correction, Mapping) else getattr(correction, "mode", None)
        if self.divides and mode is not None and not isinstance(correction, Tensor):
            raise ValueError(
                f"{caller}: ratio_denominator='rollout' and a correction of mode {mode!r} would each correct the "
                "mismatch; leave one of them out"
            )
        taken = self.square is not None or self.divides or "rollout_logp" in entry.columns
        return None if taken and isinstance(correction, Tensor) else rollout_logprobs


def ratio_options(
    caller: str,
    entry: Objective,
    like: Tensor,
    old_logprobs: PerToken | None,
    rollout_logprobs: PerToken | None,
    ratio_denominator: RatioDenominator,
    log_ratio_clamp: LogRatioClamp,
    log_ratio_sq_coef: Number,
) -> RatioOptions:
    """Returns the RatioOptions of checked arguments.

    Raises:
        ValueError: an option without ``rollout_logprobs``, or one that the objective cannot honour.
        TypeError: bounds that are neither a number nor a pair.
    """
    if (
        type(ratio_denominator) is str  # because an array compares each of its elements
        and ratio_denominator == "old"
        and log_ratio_clamp is None
        and type(log_ratio_sq_coef) is float
        and log_ratio_sq_coef == 0.0
    ):
        return RatioOptions(old_logprobs, rollout_logprobs)
    checks.choice(caller, "ratio_denominator", ratio_denominator, DENOMINATORS)
    square = checks.coefficient(checks.finite, caller, "log_ratio_sq_coef", log_ratio_sq_coef, like)
    square = 2 * square if present(square) else None
    divides = ratio_denominator == "rollout"
    if divides and "old_logp" not in entry.columns:
        raise ValueError(
            f"{caller}: ratio_denominator='rollout' needs an objective with the column 'old_logp'; "
            f"{entry.function.__name__!r} has {', '.join(entry.columns)}"
        )
    if (divides or square is not None) and rollout_logprobs is None:
        option = "ratio_denominator='rollout'" if divides else "log_ratio_sq_coef"
        raise ValueError(f"{caller}: {option} needs rollout_logprobs")
    of_column = rollout_logprobs
    if (divides or square is not None) and "rollout_logp" not in entry.columns:
        column(caller, "rollout_logprobs", rollout_logprobs, like)
        of_column = None
    clamp = _clamp(caller, entry, log_ratio_clamp)
    return RatioOptions(rollout_logprobs if divides else old_logprobs, of_column, clamp, square, divides)


def _clamp(caller: str, entry: Objective, bounds: Any) -> Clamp | None:
    """Returns the bounds of a log-ratio, or None without any."""
    if bounds is None:
        return None
    if isinstance(bounds, (tuple, list)):
        if len(bounds) != 2:
            raise ValueError(f"{caller}: log_ratio_clamp must be a number or a pair (low, high), got {bounds}")
        low, high = (None if x is None else checks.real(caller, "log_ratio_clamp", x) for x in bounds)
    else:
        high = checks.positive(caller, "log_ratio_clamp", bounds)
        low = -high
    if low is None and high is None:
        return None
    if not (-torch.inf if low is None else low) < (torch.inf if high is None else high):  # NaN fails too
        raise ValueError(f"{caller}: log_ratio_clamp must be a pair low < high, got {bounds}")
    if entry.tree is None:
        raise ValueError(
            f"{caller}: an objective of sequences, groups or batches takes no log_ratio_clamp; leave it out"
        )
    found = log_ratio(entry)
    if found is None:
        raise ValueError(
            f"{caller}: log_ratio_clamp needs an objective of a log-ratio alone, such as 'ppo_clip' or 'cispo'; "
            f"{entry.function.__name__!r} depends on its log-probabilities in another way, too"
        )
    return Clamp(low, high, found[0], found[1] == "alone")


def with_current(columns: list[Tensor | None], logp: Tensor) -> list[Tensor]:
    """Returns the columns with the current policy in the place of a behaviour policy that was not given."""
    return [logp.detach() if x is None else x for x in columns]


def ratio_term(
    caller: str,
    entry: Objective,
    logp: Tensor,
    columns: list[Tensor],
    params: Params,
    weights: TokenWeights,
    live: Tensor | None,
    cu_seqlens: Tensor | None,
    level: RatioLevel,
    clamp: Clamp | None = None,
) -> Tensor:
    """Computes the weighted sum of a policy objective whose ratio is that of a token or of a sequence."""
    objective = entry.function.__name__
    if level == "token":
        if clamp is not None:
            logp, columns = clamp.applied(logp, [dense(x, logp.dtype) for x in columns], entry)
        return weighted_sum(objective, logp, columns, params, weights)
    live = full_mask(logp, live)
    if cu_seqlens is None and logp.dim() != 2:
        raise ValueError(
            f"{caller}: ratio_level {level!r} needs logprobs [B, L], or packed [T] with cu_seqlens; got "
            f"shape {tuple(logp.shape)}"
        )
    # float64 to the end, because a log-ratio is the small difference of large numbers. Sums over 32768 tokens that are
    # rounded to fp32 miss it by 4e-3.
    now, wide = logp.double(), dict(zip(entry.columns[1:], (x.double() for x in columns), strict=True))
    if level == "sequence_sum":
        # One loss per sequence. An advantage per token enters as its mean, because it is constant along the sequence in
        # every published use. So does every other column that is no log-probability.
        for name, x in wide.items():
            wide[name] = (sums if name in LOG_PROBABILITIES else means)(x, live, cu_seqlens)
        now = sums(now, live, cu_seqlens)
        of_tokens = (live if weights.values is None else weights.values).double()
        # A loss that is not summed has the mean factor of its tokens, which their equal weights would give it.
        weights = TokenWeights((means if weights.each else sums)(of_tokens, live, cu_seqlens), each=weights.each)
    else:
        fixed = now.detach()
        for name in LOG_PROBABILITIES:
            if name not in wide:
                continue
            if level == "sequence":
                wide[name] = spread(means(wide[name], live, cu_seqlens), live, cu_seqlens)
            else:
                wide[name] = fixed - spread(means(fixed - wide[name], live, cu_seqlens), live, cu_seqlens)
        if level == "sequence":
            now = spread(means(now, live, cu_seqlens), live, cu_seqlens)
    reduced = list(wide.values())
    if clamp is not None:
        now, reduced = clamp.applied(now, reduced, entry)
    return weighted_sum(objective, now, reduced, params, weights).to(logp.dtype)
