"""A stand-in for the device: the CPU, so that the first quarter of an hour can be rehearsed without a GPU.

    python -m benchmarks.gpu_machine.stand_in --device cuda --tokens 32 --vocab 131   # the benchmark on it

Its times are those of a CPU at sizes without a meaning, and no figure of anything.
"""

import argparse
import sys
import time

import torch

from benchmarks import __main__ as command
from benchmarks import run_gpu
from benchmarks.gpu_machine.choices import REHEARSAL

SMALL = {"small": 128, "size": 2**14, "side": 16}
"""The sizes that ``run_gpu`` takes in a rehearsal."""


class StandIn:
    """The CPU with the interface of ``timing.device.Cuda``."""

    name, device, cache_bytes = REHEARSAL, torch.device("cpu"), 2**12

    def event(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, stop: float) -> float:
        return max(stop - start, 1e-9)

    def busy(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def release(self) -> None:
        pass

    def peak(self, function) -> int:
        function()
        return 0

    def launches(self, function) -> None:
        function()

    def graph(self, function):
        return function

    def state(self) -> dict[str, str]:
        return {}

    def describe(self) -> dict[str, object]:
        return {"name": REHEARSAL}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    command.add_arguments(parser)
    return run_gpu.run(parser.parse_args(argv), StandIn(), **SMALL)


if __name__ == "__main__":
    sys.exit(main())
