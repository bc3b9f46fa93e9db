"""The log-ratio of trainer and rollout engine, checked once, and its values for tokens and sequences.

``q = log pi_old - log pi_rollout``: both are the policy that sampled, computed by the trainer and by the engine. All of
it is float64 inside, because a log-ratio is the small difference of large numbers.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rlkernels import checks
from rlkernels.checks import tokens as checks_tokens
from rlkernels.sequences import means, result_dtype, segment_reduce, spread, sums
from rlkernels.types import Mask, Number, Offsets, PerToken


class LogRatios(NamedTuple):
    """Checked log-probabilities of old policy and rollout engine, float64 and 0 at dead tokens, and their difference.

    A token that the engine could not score (NaN) has the log-ratio ``log nan_ratio``.
    """

    gap: Tensor
    old: Tensor
    rollout: Tensor
    unscored: Tensor  # bool: live tokens that the engine could not score
    live: Tensor
    offsets: Tensor | None
    dtype: torch.dtype  # of results

    def at(self, level: str, values: Tensor) -> Tensor:
        """Reduces ``values`` per token to the level, and gives the result to every live token."""
        if level == "token":
            return values
        reduce = sums if level == "sequence" else means
        return spread(reduce(values, self.live, self.offsets), self.live, self.offsets)

    def mean(self, values: Tensor) -> Tensor:
        """Returns the mean over live tokens, 0 where there is none."""
        return torch.where(self.live, values, 0.0).sum() / self.live.sum().clamp(min=1)

    def has_sequences(self) -> bool:
        """Tells whether it is known where a sequence ends."""
        return self.offsets is not None or self.live.dim() > 1

    def filled(self) -> Tensor:
        """Returns a float64 1 for each sequence with a live token, and 0 for the others."""
        return (sums(self.live.double(), self.live, self.offsets) > 0).double()

    def maxima(self, values: Tensor) -> Tensor:
        """Returns the largest of each sequence's ``values``, which are not negative; 0 for an empty one."""
        values = torch.where(self.live, values, 0.0)
        if self.offsets is not None:
            return segment_reduce(values, self.offsets, "max")
        return torch.cat([values, values.new_zeros((*values.shape[:-1], 1))], -1).amax(-1)


def log_ratios(
    caller: str,
    old_logprobs: PerToken,
    rollout_logprobs: PerToken,
    mask: Mask | None,
    cu_seqlens: Offsets | None,
    nan_ratio: Number = 1.0,
    sequences: str | None = None,
) -> LogRatios:
    """Checks the arguments of a public function and returns their LogRatios.

    ``sequences``: the words for what needs sequences in this call, or None.
    """
    for name, x in (("old_logprobs", old_logprobs), ("rollout_logprobs", rollout_logprobs)):
        checks.floating(caller, name, x)
        checks.shape(caller, name, x, old_logprobs.shape)
    checks.no_gradient(caller, old_logprobs=old_logprobs, rollout_logprobs=rollout_logprobs)
    offsets = checks_tokens.rows(caller, "old_logprobs", old_logprobs, cu_seqlens, mask)
    checks.mask(caller, mask, old_logprobs.shape)
    checks.one_device(caller, "old_logprobs", old_logprobs, rollout_logprobs=rollout_logprobs, mask=mask)
    needs_sequences(caller, sequences, old_logprobs, offsets)
    missing = log_of(checks_tokens.not_negative(caller, "nan_ratio", nan_ratio, old_logprobs))
    live = all_live(old_logprobs) if mask is None else (mask != 0).contiguous()
    # Contiguous, because torch adds in the order of memory.
    old, rollout = (torch.where(live, x.double(), 0.0).contiguous() for x in (old_logprobs, rollout_logprobs))
    unscored = rollout.isnan()
    gap = torch.where(unscored, missing, old - rollout)
    rollout = torch.where(unscored, old - missing, rollout)
    return LogRatios(gap, old, rollout, unscored, live, offsets, result_dtype(old_logprobs, rollout_logprobs))


def needs_sequences(caller: str, what: str | None, x: Tensor, offsets: Tensor | None) -> None:
    """Refuses tokens of unknown sequences where ``what`` needs to know them."""
    if what is not None and offsets is None and x.dim() < 2:
        raise ValueError(
            f"{caller}: {what} needs sequences: old_logprobs [B, L], or packed [T] with cu_seqlens; got shape "
            f"{tuple(x.shape)}"
        )


def all_live(like: Tensor) -> Tensor:
    """Returns a mask of which every token is live."""
    return torch.ones_like(like, dtype=torch.bool, requires_grad=False, memory_format=torch.contiguous_format)


def log_of(x: Number) -> Number:
    """Returns the logarithm of a number that is not negative."""
    if isinstance(x, torch.Tensor):
        return x.double().log()
    return math.log(x) if x > 0 else -math.inf


def bound(caller: str, name: str, x: Number | None, like: Tensor) -> Number | None:
    """Returns a bound of ratios: None, a number from 0 on, or a tensor that the host does not read."""
    return None if x is None else checks_tokens.not_negative(caller, name, x, like)


def ordered(caller: str, low: Number | None, high: Number | None, names: tuple[str, ...] = ("low", "high")) -> None:
    """Refuses a lower bound above the upper one, where the host knows both."""
    if isinstance(low, float) and isinstance(high, float) and low > high:
        raise ValueError(f"{caller}: {names[0]} must not be above {names[1]}, got {low} and {high}")


def outside(x: Tensor, low: Number | None, high: Number | None) -> Tensor:
    """Tells which ``x`` lie outside of the bounds; NaN is not outside, so that it reaches the loss and is seen."""
    below = torch.zeros_like(x, dtype=torch.bool) if low is None else x < low
    return below if high is None else below | (x > high)


def clamped(x: Tensor, low: Number | None, high: Number | None) -> Tensor:
    """Returns ``x`` brought into the bounds; NaN stays."""
    x = x if low is None else torch.where(x < low, low, x)
    return x if high is None else torch.where(x > high, high, x)
