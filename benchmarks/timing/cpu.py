"""The clock, the peak of memory, and the read bandwidth of this machine."""

import contextlib
import gc
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.timing.contender import Contender
from rlkernels.backends import cpu, cpu_memory
from rlkernels.cli import machine


def race(contenders: Sequence[Contender], rounds: int, warmup: int = 2) -> None:
    """Times every contender once per round, in turn (A B C A B C), so that drift of the machine meets all alike."""
    for contender in contenders:
        for _ in range(warmup):
            once(contender)
    for _ in range(rounds):
        gc.collect()
        for contender in contenders:
            contender.samples.append(once(contender))


def once(contender: Contender) -> float:
    """Seconds of one run.

    The outputs are freed after the clock has stopped: they are needed by whoever asked for them.
    """
    state = contender.prepare(0)
    enabled = gc.isenabled()
    gc.disable()
    try:
        start = time.perf_counter()
        outputs = contender.run(state)
        seconds = time.perf_counter() - start
    finally:
        if enabled:
            gc.enable()
    del outputs, state
    return seconds


def first_run(contender: Contender) -> None:
    """One run outside the clock: builds what is built lazily, then errors against float64."""
    contender.errors = contender.check(contender.run(contender.prepare(0)))


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Drops what is written to file descriptor 2: the profiler's native code announces its start and stop there."""
    sys.stderr.flush()
    kept = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def memory(contender: Contender) -> None:
    """Peak of extra memory in one run outside the clock.

    ``peak_bytes`` is the high-water mark of torch's allocator above its level at the start (``torch.profiler`` with
    ``profile_memory``); ``resident_bytes`` is the growth of the process's resident set (Linux), which also sees memory
    that a kernel takes behind torch's back.
    """
    state = contender.prepare(0)
    with (
        silent(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        outputs = contender.run(state)
    level = peak = 0
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(changes, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    contender.peak_bytes = peak
    del outputs, state, profile, changes
    contender.resident_bytes = _resident_growth(contender)


def _resident_growth(contender: Contender) -> int | None:
    state = contender.prepare(0)
    if cpu.available()[0]:
        cpu_memory.release_memory()  # a gradient kept from the run before would hide that this one needs its own
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark of the resident set
        before = _status("VmRSS")
        contender.run(state)
        return max(0, _status("VmHWM") - before)
    except OSError:
        return None  # not Linux, or a container that forbids it


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}")


def reader(quick: bool = False, rounds: int = 5) -> Contender:
    """The fastest read-only reduction of torch over a buffer of at least four last-level caches: this machine's read
    bandwidth.
    """
    size = max(2**26 if quick else 2**28, 4 * (machine.last_level_cache() or 2**25))
    # 1.0 twice: no subnormals for the fp32 view.
    words = torch.full((size // 8,), 0x3F8000003F800000, dtype=torch.int64)
    floats = words.view(torch.float32)
    reductions = {"int64 sum": words.sum, "int64 max": words.max, "fp32 amax": floats.amax}
    contenders = [Contender(f"read only ({name})", lambda _, f=f: f(), moved=size) for name, f in reductions.items()]
    race(contenders, rounds, warmup=1)
    best = min(contenders, key=lambda c: c.median)
    best.samples.clear()
    return best
