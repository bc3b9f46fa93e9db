"""Something that is timed, on a CPU or an accelerator, and the summary of its times."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Contender:
    """Something that is timed.

    Attributes:
        run: the timed call; receives what ``prepare`` returned.
        prepare: gets the number of the buffer to use; called before each run, outside the clock.
        check: outputs of a run to ``{quantity: error against float64}``; it raises nothing.
        moved: bytes that this work must move at least, 0 for those of its case; GB/s are counted with it.
        ours: judged by the error policy; a peer that errs is shown with a remark.
        graph: the call may be captured in a CUDA graph.
        slack: how far its errors may go, where that is not what its case says.
        samples, cold: seconds of each run; on an accelerator the hot ones and the cold ones.
        peak_bytes, resident_bytes: extra memory by torch's allocator, and by the resident set of the process.
        launches: work on the device by kind; ``host_s``: from call to return; ``graph_s``: inside a CUDA graph.
    """

    name: str
    run: Callable[[Any], Any]
    prepare: Callable[[int], Any] = lambda buffer: None
    check: Callable[[Any], dict[str, float]] = lambda outputs: {}
    moved: int = 0
    ours: bool = False
    graph: bool = False
    remark: str = ""
    slack: dict[str, float] = field(default_factory=dict)
    samples: list[float] = field(default_factory=list)
    cold: list[float] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    first_call_s: float | None = None
    peak_bytes: int | None = None
    resident_bytes: int | None = None
    launches: dict[str, int] | None = None
    host_s: float | None = None
    graph_s: float | None = None
    failed: bool = False

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        return quartiles(self.samples)

    @property
    def extra_bytes(self) -> int | None:
        """The larger of the two measures of memory, None where neither was taken."""
        return max((b for b in (self.peak_bytes, self.resident_bytes) if b is not None), default=None)

    @property
    def bandwidth(self) -> float:
        """Bytes per second at the median."""
        return self.moved / self.median


def quartiles(samples: Sequence[float]) -> tuple[float, float]:
    if len(samples) < 2:
        return samples[0], samples[0]
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, high


def summary(samples: Sequence[float]) -> dict[str, float | int] | None:
    """Median, quartiles, least and count, never a mean."""
    if not samples:
        return None
    low, high = quartiles(samples)
    return {
        "median_s": statistics.median(samples),
        "low_s": low,
        "high_s": high,
        "least_s": min(samples),
        "runs": len(samples),
    }
