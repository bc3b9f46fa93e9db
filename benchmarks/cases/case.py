"""A case: contenders that compute the same, the floor of their time, and how far they may err."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.timing.contender import Contender

if TYPE_CHECKING:
    from benchmarks.timing.gpu import Roofline

OURS, EAGER, COMPILED = "rlkernels", "torch eager", "torch.compile"
IN_PLACE = ", in place"


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
