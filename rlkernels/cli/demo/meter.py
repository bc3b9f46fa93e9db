"""Time and memory of a seam, measured by the same instrument around TRL's function and around ours.

Time: a clock around the call gives the forward. For the backward the clock starts when autograd is about to enter the
node that made the log-probabilities and stops when the gradient of the seam's first input has been formed; a GPU is
synchronised at each of these four points.

The largest call of the run is repeated after training, forward and backward, on tensors of the same shapes. Speed-up:
TRL's function and ours take turns, so that whatever else the machine does meets both. Peak extra memory: the most that
torch's allocator held above the level at entry, gradients included; on a CPU the events come from torch.profiler.
"""

import json
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import torch

from rlkernels.backends import cpu_memory
from rlkernels.integrations._patching import Namespace


class Stopwatch:
    """Stands around ``function``, passes every call through and sums the seconds of its forwards and backwards, lap by
    lap.
    """

    def __init__(self, function):
        self.function, self.seconds, self.laps, self.largest = function, 0.0, [], None

    def lap(self):
        """Ends a training step: its seconds are appended to ``laps``."""
        self.laps.append(self.seconds)
        self.seconds = 0.0

    def __call__(self, *args):
        start = _now(args[0].device)
        result = self.function(*args)
        self.seconds += _now(args[0].device) - start
        shapes = tuple(_Shape(a) if isinstance(a, torch.Tensor) else a for a in args)
        if self.largest is None or shapes[0].size() > self.largest[0].size():
            self.largest = shapes
        output = result[0] if isinstance(result, tuple) else result
        if output.requires_grad and args[0].requires_grad:
            output.grad_fn.register_prehook(self._start)
            args[0].register_hook(self._stop)
        return result

    apply = __call__

    def _start(self, gradients):
        self.began = _now(next(g.device for g in gradients if g is not None))

    def _stop(self, gradient):
        self.seconds += _now(gradient.device) - self.began


class _Shape:
    """Facts that are needed to make a tensor like the one that was seen, without keeping it alive."""

    def __init__(self, tensor):
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self.learns = tensor.requires_grad and torch.is_grad_enabled()

    def size(self):
        return self.learns, self.shape.numel()

    def make(self):
        if not self.dtype.is_floating_point:
            return torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        return torch.randn(self.shape, dtype=self.dtype, device=self.device, requires_grad=self.learns)


@contextmanager
def around(module, attribute: str):
    """Puts a stopwatch around the seam ``attribute`` of ``module``, whatever stands there, and takes it away again."""
    held = getattr(module, attribute)
    if attribute == "nn":
        watch = Stopwatch(held.functional.logsigmoid)
        functional = Namespace("functional", held.functional, None, logsigmoid=watch)
        setattr(module, attribute, Namespace("nn", held, None, functional=functional))
    else:
        watch = Stopwatch(held.apply)
        setattr(module, attribute, watch)
    try:
        yield watch
    finally:
        setattr(module, attribute, held)


def _again(watch: Stopwatch):
    """A function that repeats the largest call that ``watch`` saw, and the device that it runs on."""
    args = [a.make() if isinstance(a, _Shape) else a for a in watch.largest]

    def once():
        result = watch.function(*args)
        output = result[0] if isinstance(result, tuple) else result
        if output.requires_grad:
            output.sum().backward()
        for a in args:
            if isinstance(a, torch.Tensor):
                a.grad = None

    return once, args[0].device


def in_turns(watches: list[Stopwatch], rounds: int = 7) -> list[float]:
    """Seconds of the largest call of each stopwatch, forward and backward, the functions taking turns; the best of
    ``rounds``.

    The best and not the median: one other process on two cores delays a thread at every barrier, and only the best is
    free of it.
    """
    repeats = [_again(watch) for watch in watches]
    seconds = [[] for _ in watches]
    for turn in range(rounds + 1):
        for (once, device), taken in zip(repeats, seconds, strict=True):
            start = _now(device)
            once()
            if turn > 0:  # the first turn warms both
                taken.append(_now(device) - start)
    return [min(taken) for taken in seconds]


def peak_extra_bytes(watch: Stopwatch) -> int:
    """The most that one call and its backward hold above the level at entry, for the shapes of the largest call that
    ``watch`` saw.
    """
    once, device = _again(watch)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        level = torch.cuda.memory_allocated()
        once()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - level
    with (
        cpu_memory.torchs_memory(),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile,
    ):
        once()
    with tempfile.TemporaryDirectory() as directory:
        trace = Path(directory) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    held = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def _now(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
