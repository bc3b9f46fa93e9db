"""The timing protocol of an accelerator: hot and cold, contenders in turn, and the roofline of the same run.

Hot: launches queue behind one another at sustained clocks and rotate through buffers of more than four level-2 caches
in total. Cold: two level-2 caches are overwritten outside the clock before each run. A device without work is first
kept busy, because events around a run would else time the host. The profiler comes last: once attached, it slows every
launch.
"""

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing.contender import Contender
from benchmarks.timing.device import host_seconds

LEAST, MOST = 5, 400
"""Runs of a contender in one protocol, whatever the seconds say."""


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class DeviceLost(RuntimeError):
    """The process cannot use the device any more."""


def ready(device, contenders: Sequence[Contender], count: bool) -> None:
    """First call (compiles), error, peak memory and, with ``count``, host time and graphs: all outside the clock.

    A peer that fails is marked, with its reason. One of ours that fails is marked too: the caller reports it as a
    fault.

    Raises:
        DeviceLost: after a failure that the device does not survive.
    """
    for contender in contenders:
        try:
            start = time.perf_counter()
            outputs = contender.run(contender.prepare(0))
            device.synchronize()
            contender.first_call_s = time.perf_counter() - start
            contender.errors = contender.check(outputs)
            outputs = None
            state = contender.prepare(0)
            contender.peak_bytes = device.peak(lambda contender=contender, state=state: contender.run(state))
            if count:
                if contender.graph or contender.ours:
                    contender.host_s = host_seconds(device, contender.run, contender.prepare)
                if contender.graph:
                    replay_time(device, contender)
            state = None
        except Exception as error:  # a peer that fails is shown with its reason
            contender.failed, contender.remark = True, first_line(error)
            state = outputs = None
            gc.collect()
            try:
                device.synchronize()
            except Exception as lost:  # an illegal access: every later call of this process fails too
                raise DeviceLost(f"{contender.name} left the device unusable: {contender.remark}") from lost
        device.release()


def launches(device, contender: Contender) -> dict[str, int] | None:
    """Work of one call on the device, by kind. To be asked when nothing will be timed any more."""
    contender.run(contender.prepare(0))
    state = contender.prepare(0)
    return device.launches(lambda: contender.run(state))


def replay_time(device, contender: Contender, replays: int = 20) -> None:
    """Time of one call inside a CUDA graph: what is left when the host costs nothing.

    A call that cannot be captured says why.
    """
    state = contender.prepare(0)
    try:
        replay = device.graph(lambda: contender.run(state))
        replay()
        start = device.event()
        for _ in range(replays):
            replay()
        stop = device.event()
        device.synchronize()
        contender.graph_s = device.seconds(start, stop) / replays
    except Exception as error:
        contender.remark = "; ".join(filter(None, (contender.remark, f"no CUDA graph: {first_line(error)}")))
        device.synchronize()


def race(device, contenders: Sequence[Contender], buffers: int, seconds: float, flush: Tensor) -> None:
    """Times the contenders in turn (A B C A B C), each until it has had ``seconds`` hot, and a quarter of that cold.

    Every run takes the next buffer: with four caches of them in total, the last use of a buffer has been evicted by the
    others.
    """
    alive = [c for c in contenders if not c.failed]
    warm = time.perf_counter() + seconds
    for buffer in range(1000):  # sustained clocks: one published kernel ran 24.9 ms cold and 28.2 ms hot
        for contender in alive:
            contender.run(contender.prepare(buffer % buffers))
        device.synchronize()
        if time.perf_counter() > warm or not alive:
            break
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        _rounds(device, alive, "samples", buffers, seconds, lambda: False)

        def emptied() -> bool:
            flush.zero_()
            device.synchronize()
            return True

        _rounds(device, alive, "cold", buffers, seconds / 4, emptied)
    finally:
        if enabled:
            gc.enable()


def _rounds(
    device, contenders: Sequence[Contender], which: str, buffers: int, seconds: float, before: Callable[[], bool]
) -> None:
    """``before`` runs before each run, outside the clock, and says whether it has left the device without work."""
    pending: list[tuple[Contender, Any, Any]] = []
    turns = itertools.count()
    spent = dict.fromkeys((c.name for c in contenders), 0.0)

    def collect() -> None:
        device.synchronize()
        for contender, start, stop in pending:
            took = device.seconds(start, stop)
            getattr(contender, which).append(took)
            spent[contender.name] += took
        pending.clear()

    for number in range(MOST):
        turn = [c for c in contenders if number < LEAST or spent[c.name] < seconds]
        if not turn:
            break
        for contender in turn:
            state = contender.prepare(next(turns) % buffers)
            if before() or not pending:
                device.busy()
            start = device.event()
            outputs = contender.run(state)
            pending.append((contender, start, device.event()))
            del outputs, state
        if number < LEAST or number % 8 == 7:  # rarely: a queue that runs dry is not hot
            collect()
    collect()


def measured(device, run: Callable[[], object], seconds: float) -> list[float]:
    """Hot times of one call by itself."""
    contender = Contender("", lambda _: run())
    run()
    _rounds(device, [contender], "samples", 1, seconds, lambda: False)
    return contender.samples


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
