"""Coefficients that change from step to step, and the moving average of weights; no host reads their state."""

from collections.abc import Iterable
from typing import Any, get_args

import torch
from torch import Tensor

from rlkernels import checks
from rlkernels.types import KLControl, Number, Scalar

KINDS = get_args(KLControl)
FAR_FROM_TARGET = 1.5
"""The factor between the KL and its target from which on the rule of the PPO paper moves."""


class KLController:
    r"""The coefficient of a KL penalty, moved after each step by the KL that the step had.

    * ``"fixed"``: never
    * ``"adaptive"``: ``coef *= 1 + clip(kl / target - 1, -0.2, 0.2) n / horizon``
    * ``"ppo-paper"``: half of it where ``kl < target / 1.5``, twice where ``kl > 1.5 target``

    A KL that is NaN moves nothing.

    Args:
        coef: the first coefficient, not negative.
        kind: the rule.
        target: the KL that is aimed at; for the rules that move.
        horizon: ``"adaptive"`` alone: samples after which an error of the KL has its whole effect.
        device: the device of the state.

    Raises:
        ValueError: unknown ``kind``; ``coef`` negative; ``target`` or ``horizon`` not positive, missing, or given where
            it is not used.

    Example:
        >>> controller = KLController(0.2, kind="ppo-paper", target=0.01)
        >>> controller.update(torch.tensor(0.03))
        >>> controller.coef
        tensor(0.4000, dtype=torch.float64)

    Ziegler et al. 2019, arXiv:1909.08593, section 2.2; Schulman et al. 2017, arXiv:1707.06347, section 4.
    """

    def __init__(
        self,
        coef: float,
        *,
        kind: KLControl = "fixed",
        target: float | None = None,
        horizon: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        caller = "KLController"
        checks.choice(caller, "kind", kind, KINDS)
        for name, x, used in (("target", target, kind != "fixed"), ("horizon", horizon, kind == "adaptive")):
            if (x is not None) != used:
                raise ValueError(f"{caller}: kind {kind!r} {'needs' if used else 'takes no'} {name}")
        self.kind = kind
        self.target = None if target is None else checks.positive(caller, "target", target)
        self.horizon = None if horizon is None else checks.positive(caller, "horizon", horizon)
        self.coef: Scalar = _state(device, coef=_not_negative(caller, "coef", coef))[0]

    @torch.no_grad()
    def update(self, kl: Number, n_steps: int = 1) -> None:
        """Moves the coefficient by a step's mean KL; ``n_steps``: the samples that it is the mean of."""
        caller = "KLController.update"
        kl, n_steps = _number(caller, "kl", kl, self.coef), checks.positive(caller, "n_steps", n_steps)
        if self.target is None:
            return
        if self.horizon is not None:
            error = (kl / self.target - 1.0).clamp(-0.2, 0.2)
            factor = 1.0 + error * (n_steps / self.horizon)
        else:
            far, near = kl > FAR_FROM_TARGET * self.target, kl < self.target / FAR_FROM_TARGET
            factor = torch.where(far, 2.0, torch.where(near, 0.5, 1.0))
        self.coef = self.coef * torch.where(kl.isnan(), 1.0, factor)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state, for a checkpoint."""
        return {"coef": self.coef.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over the state of ``state_dict``."""
        self.coef = _loaded("KLController.load_state_dict", "coef", state["coef"], self.coef)


class EntropyController:
    r"""The coefficient of an entropy bonus, moved by the entropy after each optimiser step.

    ``coef + delta``, at most ``high``, where ``entropy <= target``; else ``coef - delta``, at least ``low``. The bonus
    of a step has the coefficient ``applied``: that of the step before, where its entropy was at most the target, else
    0. A NaN entropy moves nothing.

    Args:
        coef: the first coefficient.
        target: the entropy below which the bonus is on.
        delta: the change of one step, not negative.
        low, high: the limits of the coefficient.
        device: the device of the state.

    Raises:
        ValueError: a number that is not finite; ``delta`` negative; not ``low <= coef <= high``.

    Example:
        >>> controller = EntropyController(target=0.2, delta=0.005)
        >>> controller.update(torch.tensor(0.15))
        >>> controller.coef, controller.applied
        (tensor(0.0050, dtype=torch.float64), tensor(0.0050, dtype=torch.float64))
        >>> controller.update(torch.tensor(0.30))
        >>> controller.applied
        tensor(0., dtype=torch.float64)

    He et al. 2025 (Skywork-OR1), arXiv:2505.22312, section 4; as in TRL 1.16.
    """

    def __init__(
        self,
        coef: float = 0.0,
        *,
        target: float = 0.2,
        delta: float = 0.005,
        low: float = 0.0,
        high: float = 1.0,
        device: torch.device | str | None = None,
    ) -> None:
        caller = "EntropyController"
        self.target, self.delta = checks.finite(caller, "target", target), _not_negative(caller, "delta", delta)
        self.low, self.high = checks.finite(caller, "low", low), checks.finite(caller, "high", high)
        coef = checks.finite(caller, "coef", coef)
        if not self.low <= coef <= self.high:
            raise ValueError(f"{caller}: coef must be in [low, high] = [{self.low}, {self.high}], got {coef}")
        self.coef, self.below = _state(device, coef=coef, below=0.0)

    @property
    def applied(self) -> Scalar:
        """Returns the coefficient of the next step's bonus; float64."""
        return torch.where(self.below != 0, self.coef, 0.0)

    @torch.no_grad()
    def update(self, entropy: Number) -> None:
        """Moves the coefficient by the mean entropy of an optimiser step."""
        given = _number("EntropyController.update", "entropy", entropy, self.coef)
        # In the dtype of the entropy, because a float32 at the target is not above it.
        below = (entropy <= self.target if isinstance(entropy, Tensor) else given <= self.target).to(given.device)
        up, down = (self.coef + self.delta).clamp(max=self.high), (self.coef - self.delta).clamp(min=self.low)
        unknown = given.isnan()
        self.coef = torch.where(unknown, self.coef, torch.where(below, up, down))
        self.below = torch.where(unknown, self.below, below.double())

    def state_dict(self) -> dict[str, Any]:
        """Returns the state, for a checkpoint."""
        return {"coef": self.coef.clone(), "below": self.below.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over the state of ``state_dict``."""
        caller = "EntropyController.load_state_dict"
        coef, below = (_loaded(caller, name, state[name], self.coef) for name in ("coef", "below"))
        self.coef, self.below = coef, below


class WeightAverage:
    r"""The exponential moving average of a model's parameters.

    ``average = decay average + (1 - decay) w``. It is held in float32, float64 for float64, because 16 bits round most
    steps of such an average away.

    Args:
        parameters: the model's parameters, as ``model.parameters()`` gives them; the average starts as their copy.
        decay: the share of the average that a step keeps, from 0 to 1.

    Raises:
        TypeError: a parameter that is no floating tensor. ValueError: ``decay`` outside [0, 1].

    Example:
        >>> weight = torch.tensor([1.0])
        >>> average = WeightAverage([weight], decay=0.75)
        >>> average.update([weight + 4.0])
        >>> average.tensors
        [tensor([2.])]

    Polyak and Juditsky 1992; 0.992 as in OpenRLHF v0.5.5 and DeepSpeed-Chat.
    """

    def __init__(self, parameters: Iterable[Tensor], *, decay: float = 0.992) -> None:
        caller = "WeightAverage"
        self.decay = checks.interval(caller, "decay", decay, 0, 1)
        given = list(parameters)
        for x in given:
            checks.floating(caller, "parameters", x)
        self.tensors = [x.detach().to(_average_dtype(x), copy=True) for x in given]

    @torch.no_grad()
    def update(self, parameters: Iterable[Tensor]) -> None:
        """Moves the average towards the parameters, which come in the same order."""
        for average, x in zip(self.tensors, self._same("WeightAverage.update", parameters), strict=True):
            average.lerp_(x.detach().to(average.dtype), 1.0 - self.decay)

    @torch.no_grad()
    def copy_to(self, parameters: Iterable[Tensor]) -> None:
        """Writes the average into the parameters, which come in the same order."""
        for average, x in zip(self.tensors, self._same("WeightAverage.copy_to", parameters), strict=True):
            x.copy_(average)

    def _same(self, caller: str, parameters: Iterable[Tensor]) -> list[Tensor]:
        """Returns the parameters as a list; refuses other ones than those of the average."""
        given = list(parameters)
        if len(given) != len(self.tensors):
            raise ValueError(f"{caller}: parameters has {len(given)} tensors, expected {len(self.tensors)}")
        for k, (average, x) in enumerate(zip(self.tensors, given, strict=True)):
            checks.floating(caller, f"parameters[{k}]", x)
            checks.shape(caller, f"parameters[{k}]", x, average.shape)
            checks.one_device(caller, "average", average, **{f"parameters[{k}]": x})
        return given

    def state_dict(self) -> dict[str, Any]:
        """Returns the state, for a checkpoint."""
        return {"tensors": [x.clone() for x in self.tensors]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over the state of ``state_dict``."""
        given = self._same("WeightAverage.load_state_dict", state["tensors"])
        self.tensors = [x.detach().to(mine.dtype, copy=True) for x, mine in zip(given, self.tensors, strict=True)]


def _average_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _state(device: torch.device | str | None, **numbers: float) -> list[Scalar]:
    """Returns numbers as float64 tensors of shape ``()``."""
    return [torch.full((), x, dtype=torch.float64, device=device) for x in numbers.values()]


def _not_negative(caller: str, name: str, x: float) -> float:
    x = checks.finite(caller, name, x)
    if x < 0:
        raise ValueError(f"{caller}: {name} must not be negative, got {x}")
    return x


def _number(caller: str, name: str, x: Number, like: Tensor) -> Scalar:
    """Returns a number, or a tensor of shape ``()``, as float64 on the device of ``like``, unread."""
    if not isinstance(x, Tensor):
        return torch.full_like(like, checks.real(caller, name, x))
    checks.floating(caller, name, x)
    checks.shape(caller, name, x, ())
    return x.detach().to(like.device, torch.float64)


def _loaded(caller: str, name: str, x: Tensor, mine: Tensor) -> Scalar:
    """Returns a number of a checkpoint on the device of the state that it replaces."""
    checks.floating(caller, name, x)
    checks.shape(caller, name, x, ())
    return x.detach().to(mine.device, torch.float64).clone()
