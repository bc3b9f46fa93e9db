"""The normalisation of rewards: their mean and spread over an evaluation, and rewards of mean 0 and spread 1."""

from typing import Any

import torch
from torch import Tensor

from rlkernels import checks
from rlkernels.sequences import result_dtype
from rlkernels.types import Mask, Scalar


class RewardNormalizer:
    r"""A running mean and standard deviation of rewards, and their removal from further rewards.

    ``(r - mean) / max(std, std_min)``. The state is one float64 tensor, which no host reads: the count, the mean and
    the sum of squared deviations. Any split of the rewards into updates, micro-batches and ranks gives the same state.

    Args:
        unbiased: the variance divides by ``n - 1``; False: by ``n``.
        std_min: the smallest standard deviation.
        device: the device of the state.

    Raises:
        ValueError: ``std_min`` not positive.

    Example:
        >>> normalizer = RewardNormalizer()
        >>> normalizer.update(torch.tensor([1.0, 3.0]))
        >>> normalizer.update(torch.tensor([2.0, 99.0]), torch.tensor([1, 0]))
        >>> normalizer.mean, normalizer.std
        (tensor(2., dtype=torch.float64), tensor(1., dtype=torch.float64))
        >>> normalizer.normalize(torch.tensor([4.0]))
        tensor([2.])

    OpenRLHF v0.5.5, ``rm_trainer.py``: statistics over the chosen and rejected rewards of an evaluation.
    """

    def __init__(
        self, *, unbiased: bool = True, std_min: float = 1e-8, device: torch.device | str | None = None
    ) -> None:
        self.unbiased = checks.flag("RewardNormalizer", "unbiased", unbiased)
        self.std_min = checks.positive("RewardNormalizer", "std_min", std_min)
        self.moments = torch.zeros(3, dtype=torch.float64, device=device)

    @property
    def mean(self) -> Scalar:
        """Returns the mean of all rewards so far, 0 before the first one; float64."""
        return self.moments[1]

    @property
    def std(self) -> Scalar:
        """Returns the standard deviation of all rewards so far, at least ``std_min``; 1 of fewer than two; float64."""
        count, _, squares = self.moments.unbind(0)
        spread = (squares / (count - (1 if self.unbiased else 0)).clamp(min=1)).sqrt().clamp(min=self.std_min)
        return torch.where(count < 2, 1.0, spread)

    @torch.no_grad()
    def update(self, rewards: Tensor, mask: Mask | None = None) -> None:
        """Takes in further rewards, of any shape and float dtype; dead ones, where ``mask`` is 0, are not looked at."""
        caller = "RewardNormalizer.update"
        checks.floating(caller, "rewards", rewards)
        checks.mask(caller, mask, rewards.shape)
        checks.one_device(caller, "rewards", rewards, mask=mask, moments=self.moments)
        live = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask != 0
        count = live.sum().double()
        mean = torch.where(live, rewards.double(), 0.0).sum() / count.clamp(min=1)
        gap = torch.where(live, rewards.double() - mean, 0.0)
        self.merge(torch.stack([count, mean, (gap * gap).sum()]))

    @torch.no_grad()
    def merge(self, moments: Tensor) -> None:
        """Takes in the ``moments`` of another normaliser, or ``[n, 3]`` of several, as ranks gather them."""
        caller = "RewardNormalizer.merge"
        checks.floating(caller, "moments", moments)
        if moments.dim() not in (1, 2) or moments.shape[-1] != 3:
            raise ValueError(f"{caller}: moments has shape {tuple(moments.shape)}, expected [3] or [n, 3]")
        checks.one_device(caller, "moments", self.moments, moments=moments)
        # All parts at once, from their common mean, because a difference of large sums of squares loses its digits.
        counts, means, squares = torch.cat([self.moments[None], moments.double().view(-1, 3)]).unbind(-1)
        count = counts.sum()
        mean = (counts * means).sum() / count.clamp(min=1)
        self.moments = torch.stack([count, mean, (squares + counts * (means - mean).square()).sum()])

    def normalize(self, rewards: Tensor) -> Tensor:
        """Returns ``(rewards - mean) / std``: float32, float64 for float64, differentiable in the rewards."""
        checks.floating("RewardNormalizer.normalize", "rewards", rewards)
        checks.one_device("RewardNormalizer.normalize", "rewards", rewards, moments=self.moments)
        real = result_dtype(rewards)
        return (rewards.to(real) - self.mean.to(real)) / self.std.to(real)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state, for a checkpoint."""
        return {"moments": self.moments.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over the state of ``state_dict``."""
        moments = state["moments"]
        checks.floating("RewardNormalizer.load_state_dict", "moments", moments)
        checks.shape("RewardNormalizer.load_state_dict", "moments", moments, (3,))
        self.moments = moments.detach().to(self.moments.device, torch.float64).clone()
