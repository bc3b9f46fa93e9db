"""The accelerator as the benchmark sees it: clocks of its queue, memory, launches, and what it is.

Tests put a fake one in its place.
"""

import re
import shutil
import subprocess
import time
from collections.abc import Callable

import torch

QUERY = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu")
ANNOTATION = re.compile(r"^(## |Torch-Compiled|ProfilerStep|autograd::|Optimizer)")
"""Ranges that the profiler draws on the device's timeline beside what ran there."""


CYCLES = 2e9
"""Clocks of a second on a fast device. A slower one is busy for longer, which does no harm."""


class Cuda:
    """The current CUDA (or ROCm) device."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.properties = torch.cuda.get_device_properties(self.device)

    @property
    def name(self) -> str:
        return self.properties.name

    @property
    def cache_bytes(self) -> int:
        """The level-2 cache; 50 MiB where torch does not tell."""
        return getattr(self.properties, "L2_cache_size", 0) or 50 * 2**20

    @property
    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0]

    def event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: torch.cuda.Event, stop: torch.cuda.Event) -> float:
        """Between two events that have passed."""
        return start.elapsed_time(stop) * 1e-3

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def busy(self) -> None:
        """Keeps the device busy for about two milliseconds, so that what is launched meanwhile queues behind."""
        torch.cuda._sleep(int(2e-3 * CYCLES))

    def peak(self, function: Callable[[], object]) -> int:
        """Bytes that torch's allocator held at most above its level before the call; what the call
        returns is counted.
        """
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        outputs = function()
        self.synchronize()
        del outputs
        return torch.cuda.max_memory_allocated(self.device) - before

    def launches(self, function: Callable[[], object]) -> dict[str, int] | None:
        """Kernels, copies and fills of one call, counted by the profiler on the device's timeline; None where it saw
        none.
        """
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        self.synchronize()
        with torch.profiler.profile(activities=activities) as profile:
            function()
            self.synchronize()
        on_device = [
            e.name()
            for e in profile.profiler.kineto_results.events()
            if e.device_type() == torch.autograd.DeviceType.CUDA
        ]
        return count_launches(on_device)

    def graph(self, function: Callable[[], object]) -> Callable[[], None]:
        """The call captured in a CUDA graph, after three warm-up runs on a side stream; returns what replays it."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        return graph.replay

    def release(self) -> None:
        """Gives cached memory back: what one contender held must not be missing for the next."""
        torch.cuda.empty_cache()

    def state(self) -> dict[str, str]:
        """Driver, clocks, power and temperature as ``nvidia-smi`` reads them now; empty where it is absent."""
        return smi(self.device.index)

    def describe(self) -> dict[str, object]:
        p = self.properties
        return {
            "name": p.name,
            "capability": [p.major, p.minor],
            "multiprocessors": p.multi_processor_count,
            "memory_bytes": p.total_memory,
            "cache_bytes": self.cache_bytes,
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "state": self.state(),
        }


def count_launches(names: list[str]) -> dict[str, int] | None:
    """Work on the device, by kind, from the names that the profiler gives."""
    ran = [n for n in names if not ANNOTATION.match(n)]
    if not ran:
        return None
    copies, fills = (sum(n.lower().startswith(kind) for n in ran) for kind in ("memcpy", "memset"))
    return {"kernels": len(ran) - copies - fills, "copies": copies, "fills": fills}


def smi(index: int | None) -> dict[str, str]:
    """One line of ``nvidia-smi``; it only reads."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--id={index or 0}", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (subprocess.SubprocessError, OSError):
        return {}
    values = [v.strip() for v in done.stdout.strip().splitlines()[0].split(",")] if done.stdout.strip() else []
    return dict(zip(QUERY, values, strict=False))


def host_seconds(
    device: "Cuda", run: Callable[[object], object], prepare: Callable[[int], object], runs: int = 30
) -> float:
    """Median of the host's time from call to return, the queue being empty before each: what a launch costs Python."""
    times = []
    for _ in range(runs):
        state = prepare(0)
        device.synchronize()
        start = time.perf_counter()
        outputs = run(state)
        times.append(time.perf_counter() - start)
        del outputs, state
    device.synchronize()
    return sorted(times)[len(times) // 2]
