"""The timing protocol of an accelerator: hot and cold, contenders in turn, and the roofline of the same run.

Hot: launches queue behind one another at sustained clocks and rotate through buffers of more than four level-2 caches
in total. Cold: the queue is empty before each run and two level-2 caches are overwritten outside the clock.
"""

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing.device import host_seconds

LEAST, MOST = 5, 400
"""Runs of a contender in one protocol, whatever the seconds say."""


@dataclass
class Entry:
    """Something that is timed.

    Attributes:
        run: the timed call; receives what ``prepare`` returned.
        prepare: gets the number of the buffer to use; called before each run, outside the clock.
        check: outputs of a run to ``{quantity: error against float64}``.
        ours: judged by the error policy; a peer that errs is shown with a remark.
        graph: the call may be captured in a CUDA graph.
    """

    name: str
    run: Callable[[Any], Any]
    prepare: Callable[[int], Any] = lambda buffer: None
    check: Callable[[Any], dict[str, float]] = lambda outputs: {}
    ours: bool = False
    graph: bool = False
    remark: str = ""
    hot: list[float] = field(default_factory=list)
    cold: list[float] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    first_call_s: float | None = None
    peak_bytes: int | None = None
    launches: dict[str, int] | None = None
    host_s: float | None = None
    graph_s: float | None = None
    failed: bool = False

    @property
    def median(self) -> float:
        return statistics.median(self.hot)


def summary(samples: Sequence[float]) -> dict[str, float | int] | None:
    """Median, quartiles, least and count, never a mean."""
    if not samples:
        return None
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else (samples[0],) * 3
    return {
        "median_s": statistics.median(samples),
        "low_s": low,
        "high_s": high,
        "least_s": min(samples),
        "runs": len(samples),
    }


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class DeviceLost(RuntimeError):
    """The process cannot use the device any more."""


def ready(device, entries: Sequence[Entry], count: bool) -> None:
    """First call (compiles), error, peak memory and, with ``count``, launches and host time: all outside the clock.

    A peer that fails is marked, with its reason. One of ours that fails is marked too: the caller reports it as a
    fault.

    Raises:
        DeviceLost: after a failure that the device does not survive.
    """
    for entry in entries:
        try:
            start = time.perf_counter()
            outputs = entry.run(entry.prepare(0))
            device.synchronize()
            entry.first_call_s = time.perf_counter() - start
            entry.errors = entry.check(outputs)
            outputs = None
            state = entry.prepare(0)
            entry.peak_bytes = device.peak(lambda entry=entry, state=state: entry.run(state))
            if count:
                state = entry.prepare(0)
                entry.launches = device.launches(lambda entry=entry, state=state: entry.run(state))
                if entry.graph or entry.ours:
                    entry.host_s = host_seconds(device, entry.run, entry.prepare)
                if entry.graph:
                    replay_time(device, entry)
            state = None
        except Exception as error:  # a peer that fails is shown with its reason
            entry.failed, entry.remark = True, first_line(error)
            state = outputs = None
            gc.collect()
            try:
                device.synchronize()
            except Exception as lost:  # an illegal access: every later call of this process fails too
                raise DeviceLost(f"{entry.name} left the device unusable: {entry.remark}") from lost
        device.release()


def replay_time(device, entry: Entry, replays: int = 20) -> None:
    """Time of one call inside a CUDA graph: what is left when the host costs nothing.

    A call that cannot be captured says why.
    """
    state = entry.prepare(0)
    try:
        replay = device.graph(lambda: entry.run(state))
        replay()
        start = device.event()
        for _ in range(replays):
            replay()
        stop = device.event()
        device.synchronize()
        entry.graph_s = device.seconds(start, stop) / replays
    except Exception as error:
        entry.remark = "; ".join(filter(None, (entry.remark, f"no CUDA graph: {first_line(error)}")))
        device.synchronize()


def race(device, entries: Sequence[Entry], buffers: int, seconds: float, flush: Tensor) -> None:
    """Times the entries in turn (A B C A B C), each until it has had ``seconds`` hot, and a quarter of that cold.

    Every run takes the next buffer: with four caches of them in total, the last use of a buffer has been evicted by the
    others.
    """
    alive = [e for e in entries if not e.failed]
    warm = time.perf_counter() + seconds
    for buffer in range(1000):  # sustained clocks: one published kernel ran 24.9 ms cold and 28.2 ms hot
        for entry in alive:
            entry.run(entry.prepare(buffer % buffers))
        device.synchronize()
        if time.perf_counter() > warm or not alive:
            break
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        _rounds(device, alive, "hot", buffers, seconds, lambda: None)
        _rounds(device, alive, "cold", buffers, seconds / 4, lambda: (flush.zero_(), device.synchronize()))
    finally:
        if enabled:
            gc.enable()


def _rounds(
    device, entries: Sequence[Entry], which: str, buffers: int, seconds: float, before: Callable[[], object]
) -> None:
    pending: list[tuple[Entry, Any, Any]] = []
    turns = itertools.count()
    spent = dict.fromkeys((e.name for e in entries), 0.0)

    def collect() -> None:
        device.synchronize()
        for entry, start, stop in pending:
            took = device.seconds(start, stop)
            getattr(entry, which).append(took)
            spent[entry.name] += took
        pending.clear()

    for number in range(MOST):
        turn = [e for e in entries if number < LEAST or spent[e.name] < seconds]
        if not turn:
            break
        for entry in turn:
            state = entry.prepare(next(turns) % buffers)
            before()
            start = device.event()
            outputs = entry.run(state)
            pending.append((entry, start, device.event()))
            del outputs, state
        if number < LEAST or number % 8 == 7:  # rarely: a queue that runs dry is not hot
            collect()
    collect()


def measured(device, run: Callable[[], object], seconds: float) -> list[float]:
    """Hot times of one call by itself."""
    entry = Entry("", lambda _: run())
    run()
    _rounds(device, [entry], "hot", 1, seconds, lambda: None)
    return entry.hot


@dataclass
class Roofline:
    """Speeds of this device in this run: bytes per second of reading and of copying, operations per second of a matrix
    product.
    """

    read: float
    copy: float
    matmul: float
    read_by: str = ""
    copy_bytes: int = 0

    @property
    def reading(self) -> float:
        """Bandwidth of the floor of work that only reads: the faster of the two, or a slow reduction
        would flatter us.
        """
        return max(self.read, self.copy)

    def floor(self, reads: int, writes: int) -> float:
        """Seconds that moving these bytes takes at least."""
        return (reads + writes) / (self.copy if writes else self.reading)


def roofline(device, seconds: float = 0.3, size: int = 2**31, side: int = 8192) -> Roofline:
    """A copy and read-only reductions of ``size`` bytes, and a bf16 product of ``side``-sized random matrices."""
    read, by, copied = _memory(device, seconds, size)
    device.release()
    a, b = (torch.randn(side, side, device=device.device, dtype=torch.float32).to(torch.bfloat16) for _ in range(2))
    product = statistics.median(measured(device, lambda: a @ b, seconds))
    device.release()
    return Roofline(size / read, 2 * size / copied, 2 * side**3 / product, by, size)


def _memory(device, seconds: float, size: int) -> tuple[float, str, float]:
    """Seconds of the fastest reduction, its name, and seconds of a copy."""
    # 1.0 twice: no subnormals in the fp32 view.
    words = torch.full((size // 8,), 0x3F8000003F800000, dtype=torch.int64, device=device.device)
    floats, other = words.view(torch.float32), torch.empty_like(words)
    reductions = {"fp32 sum": floats.sum, "fp32 amax": floats.amax, "int64 sum": words.sum}
    times = {name: statistics.median(measured(device, f, seconds / 3)) for name, f in reductions.items()}
    best = min(times, key=times.get)
    return times[best], best, statistics.median(measured(device, lambda: other.copy_(words), seconds))
