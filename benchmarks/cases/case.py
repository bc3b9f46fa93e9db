"""A case: contenders that compute the same, the floor of their time, and how far they may err."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

import rlkernels
from benchmarks.timing.contender import Contender
from rlkernels.backends import DEVICES, absent

if TYPE_CHECKING:
    from benchmarks.timing.gpu import Roofline

OURS, EAGER, COMPILED = "rlkernels", "torch eager", "torch.compile"
IN_PLACE = ", in place"
GRADIENT_SLACK = 4e-6
"""How far a gradient may err beside its rounding, where a case says nothing else."""


@dataclass
class Case:
    """Contenders beside one another.

    Attributes:
        slack: how far a row quantity or a loss may err beside torch's own error, and a gradient beside its rounding.
        passes: the bytes that the work must move, in words; ``reads`` and ``writes``: in numbers.
        flops: products and sums in it.
        buffers: equal copies of the inputs, which runs take in turn.
        roundings: how many times its one rounding to its dtype a gradient may err.
        beside_torch: torch's own error counts, twice, for row quantities and losses.
        kind, dtype, products: of a fused head: its function, and the matrix products that it takes at least.
    """

    name: str
    contenders: list[Contender]
    slack: dict[str, float] = field(default_factory=dict)
    shape: tuple[int, ...] = ()
    passes: str = ""
    reads: int = 0
    writes: int = 0
    flops: int = 0
    buffers: int = 1
    roundings: float = 1.05
    beside_torch: bool = True
    kind: str = ""
    dtype: str = ""
    products: int = 0

    def __post_init__(self) -> None:
        for contender in self.contenders:
            contender.moved = contender.moved or self.reads + self.writes

    def named(self, name: str) -> Contender | None:
        """The contender of this name, None where there is none or it failed."""
        return next((c for c in self.contenders if c.name == name and not c.failed), None)

    def floor(self, roof: "Roofline") -> float:
        """Seconds that this work takes at least on the device whose roofline was measured."""
        return max(roof.floor(self.reads, self.writes), self.flops / roof.matmul)


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
        slack = {"gradient": GRADIENT_SLACK, **case.slack, **c.slack}
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


def compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False, fullgraph=True)


def differentiated(function: Callable, upstream: object = None) -> Callable[[Sequence], tuple]:
    """Forward and backward of a function of leaves: ``(outputs, gradients)``.

    Through ``torch.autograd.grad``, so that no copy into ``.grad`` hides or adds an allocation, or is timed.
    """

    def run(leaves: Sequence) -> tuple:
        outputs = function(*leaves)
        return outputs, torch.autograd.grad(outputs, leaves, upstream)

    return run


def without_grad(function: Callable) -> Callable[[Sequence], Any]:
    """Forward alone of a function of inputs, without a graph."""

    def run(inputs: Sequence) -> Any:
        with torch.no_grad():
            return function(*inputs)

    return run


def ours(device_type: str) -> dict[str, str]:
    """Label to the backend that is forced; ``auto`` forces none and is what a caller gets."""
    present = [name for name in DEVICES[device_type] if name != "eager" and absent(name) is None]
    return {"rlkernels auto": "auto", **{f"rlkernels {name}": name for name in present}}


def on(name: str, function: Callable) -> Callable:
    """``function`` with backend ``name`` serving. The backward keeps the backend of its forward."""
    if name == "auto":
        return function

    def run(*arguments: object) -> object:
        with rlkernels.use_backend(name):
            return function(*arguments)

    return run
