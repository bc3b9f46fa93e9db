"""The choice of who is measured: our backends, torch, and other libraries."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import rlkernels
from benchmarks.cases.case import COMPILED, EAGER, OURS
from benchmarks.timing.contender import Contender
from rlkernels.backends import DEVICES, absent


@dataclass
class Score:
    """Another library's log-probabilities from logits: a function of ``(logits [T, V], targets [T])``.

    Attributes:
        logprobs: returns them alone; None where the library has ``stats`` only, which returns their entropy too.
        writes: the function may write over the logits.
    """

    name: str
    logprobs: Callable[[Tensor, Tensor], Tensor] | None = None
    stats: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    writes: bool = False
    remark: str = ""


@dataclass
class Lineup:
    """Who is measured.

    Attributes:
        ours: label to the backend that is forced; ``auto`` forces none and is what a caller gets.
        peers: functions of other libraries, by their keys in ``peers.PEERS``; ``scores``: those from logits.
        compile_too: torch.compile takes part.
    """

    ours: dict[str, str] = field(default_factory=lambda: {OURS: "auto"})
    peers: dict[str, Callable] = field(default_factory=dict)
    scores: list[Score] = field(default_factory=list)
    compile_too: bool = False

    def fused(self, function: Callable) -> dict[str, Callable]:
        """Our function by label, each with its backend."""
        return {label: on(name, function) for label, name in self.ours.items()}

    def torch(self, function: Callable) -> dict[str, Callable]:
        """The composition in torch, and the same compiled."""
        return {EAGER: function, **({COMPILED: compiled(function)} if self.compile_too else {})}

    def contenders(
        self, make: Callable[..., Contender], fused: Callable, composed: Callable, others: Iterable[Contender] = ()
    ) -> list[Contender]:
        """Ours, the others, and torch; ``make`` takes a name and a function."""
        mine = [make(label, function, ours=True) for label, function in self.fused(fused).items()]
        return [*mine, *others, *(make(label, function) for label, function in self.torch(composed).items())]


def compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False, fullgraph=True)


def backends_of(device_type: str) -> dict[str, str]:
    """Label to backend: the automatic choice, and every native one that is present, forced."""
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
