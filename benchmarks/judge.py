"""The judgement of answers: their errors against float64, and the policy that says how far ours may err."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases.case import EAGER, Case

EPS = torch.finfo(torch.float32).eps
Index = Tensor | slice


def relative(got: Tensor, expected: Tensor) -> float:
    """The error of a tensor over the norm of what was expected (Frobenius)."""
    return ((got.double() - expected).norm() / expected.norm()).item()


class Judge:
    """Errors against float64: the largest of a row quantity, absolute of a loss, relative of a gradient.

    Attributes:
        values: the expected row quantities and losses, by name.
        gradients: the expected gradients by name, each with the index of what it is within the whole gradient.
        slack: how far an answer may err beside torch's own error, and a gradient beside its one rounding.
    """

    def __init__(
        self,
        values: Mapping[str, Tensor],
        gradients: Mapping[str, tuple[Index, Tensor]] | None = None,
        rows: Index = slice(None),
        further: float = 0.0,
    ) -> None:
        """``rows``: those of an answer that ``values`` are of. ``further``: slack of a loss and of gradients on top."""
        self.values, self.gradients, self.rows = values, gradients or {}, rows
        self.slack = {"gradient": 4e-6 + further}
        for name, value in values.items():
            size = max(1.0, value.abs().max().item())
            self.slack[name] = 2e-6 * size + further if name == "loss" else 4 * EPS * size

    def value(self, name: str, got: Tensor) -> float:
        """The largest error of a row quantity or a loss."""
        got, expected = got.detach(), self.values[name]
        return ((got[self.rows] if expected.dim() else got).double() - expected).abs().max().item()

    def gradient(self, name: str, got: Tensor) -> tuple[float, float]:
        """The error of a gradient, and that of float64 rounded once to its dtype."""
        index, expected = self.gradients[name]
        return relative(got[index], expected), relative(expected.to(got.dtype), expected)

    def check(self, *names: str, gradients: tuple[str, ...] = ()) -> Callable[[Any], dict[str, float]]:
        """The check of the values of these names, in this order; with gradients, of ``(values, gradients)``.

        An output of None is not judged. The errors of a single gradient are called ``gradient`` and ``rounding``, those
        of several by their names, as in ``dweight`` and ``dweight rounding``.
        """

        def run(outputs: Any) -> dict[str, float]:
            values, grads = outputs if gradients else (outputs, ())
            values = values if isinstance(values, tuple) else (values,)
            pairs = zip(names, values[: len(names)], strict=True)
            errors = {name: self.value(name, got) for name, got in pairs if got is not None}
            for name, got in zip(gradients, grads, strict=True):
                prefix = f"{name} " if len(gradients) > 1 else ""
                error, errors[f"{prefix}rounding"] = self.gradient(name, got)
                errors[prefix.strip() or "gradient"] = error
            return errors

        return run

    def everything(self, outputs: Any) -> dict[str, float]:
        """The check of all values and all gradients, in the order in which the judge holds them."""
        return self.check(*self.values, gradients=tuple(self.gradients))(outputs)


def wrong(case: Case, title: str = "") -> list[str]:
    """Each answer of ours outside the error policy, and each of ours that failed; empty when all is right.

    A row quantity or a loss may err by the slack, and besides twice as far as torch's fp32 path where
    ``beside_torch``. A gradient may err ``roundings`` times as far as its one rounding to its dtype, plus the slack.

    Args:
        title: names the case; default its name.
    """
    title, eager, found = title or case.name, case.named(EAGER), []
    theirs = eager.errors if eager and case.beside_torch else {}
    for c in (c for c in case.contenders if c.ours):
        if c.failed:
            found.append(f"{title}, {c.name}: failed: {c.remark}")
            continue
        slack = {**case.slack, **c.slack}
        for quantity, error in c.errors.items():
            if quantity.endswith("rounding"):
                continue
            once = c.errors.get("rounding" if quantity == "gradient" else f"{quantity} rounding")
            if once is None:
                bound = 2 * theirs.get(quantity, 0.0) + slack[quantity]
            else:
                bound = case.roundings * once + slack["gradient"]
            if not error <= bound:
                found.append(f"{title}, {c.name}: error of {quantity} is {error:.3g}, allowed is {bound:.3g}")
    return found
