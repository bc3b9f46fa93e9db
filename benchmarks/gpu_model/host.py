"""The host's time from a public call to its return, with stand-ins for the CUDA runtime and for Triton's driver.

Everything up to the driver is the shipped code, and the driver does nothing: a real one adds some microseconds per
launch. Nothing of a GPU is in these figures. They are of this processor and of what else it does.
"""

import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

import rlkernels
from benchmarks import ROOT
from rlkernels.backends import BACKENDS

CALLS, ROUNDS = 100, 9


class HostCost(NamedTuple):
    """Microseconds of the calling thread per call, the median of some rounds."""

    call: str
    backend: str
    microseconds: float


def calls() -> dict[str, Callable[[], object]]:
    """Calls so small that only the host's part of them matters. Gradients are taken where there are any."""
    logits = torch.zeros(8, 32000, dtype=torch.bfloat16)
    targets = torch.zeros(8, dtype=torch.long)
    old, advantages = torch.zeros(2, 8)
    trained, logp = logits.clone().requires_grad_(), torch.zeros(64, 32, requires_grad=True)
    column = torch.zeros(64, 32)
    mask = torch.ones(64, 32, dtype=torch.bool)

    def logits_policy() -> object:
        loss = rlkernels.logits_policy_loss(trained, targets, old, advantages)
        return torch.autograd.grad(loss, trained)

    def policy() -> object:
        return torch.autograd.grad(rlkernels.policy_loss(logp, column, column, mask), logp)

    return {
        "token_stats [8, 32000]": lambda: rlkernels.token_stats(logits, targets),
        "logits_policy_loss [8, 32000], both ways": logits_policy,
        "policy_loss [64, 32], both ways": policy,
        "gae [64, 32]": lambda: rlkernels.gae(column, column, mask),
    }


@contextlib.contextmanager
def stand_in(backend: str, folder: Path) -> Iterator[object]:
    """The backend on CPU tensors. For ``cuda`` its sources are built for the CPU under ``folder``, which takes a minute
    or two when they have changed.

    Raises:
        RuntimeError: a compiler or Triton is not here.
    """
    places = ["tests/support", "tests/backends/cuda_backend", "tests/backends/triton_backend/tools"]
    sys.path[:0] = [str(ROOT / place) for place in places]
    try:
        if backend == "cuda":
            import host_build

            from rlkernels.backends import cuda

            if host_build.CXX is None:
                raise RuntimeError("no C++ compiler: the CUDA sources cannot be built for the CPU")
            path = host_build.build(folder / "cuda_host")
            module, _ = host_build.load(path)
            runtime = host_build.Runtime(path)
            runtime.runs(False)
            yield host_build.install(cuda, module)
        else:
            import stand_in_driver

            from rlkernels.backends.triton import launch

            launch.warp_width = lambda device: 32
            with tempfile.TemporaryDirectory() as made, stand_in_driver.StandIn(made).active(noted=False):
                yield launch
    except ImportError as error:
        raise RuntimeError(f"the host's time of {backend} cannot be taken here: {error}") from error
    finally:
        del sys.path[: len(places)]


def measure(backend: str, folder: Path) -> list[HostCost]:
    """The host's time of every call."""
    found = []
    with stand_in(backend, folder) as served:
        before, BACKENDS["eager"] = BACKENDS["eager"], served
        try:
            with rlkernels.use_backend("eager"):
                for name, run in calls().items():
                    run()
                    samples = []
                    for _ in range(ROUNDS):
                        start = time.thread_time()
                        for _ in range(CALLS):
                            run()
                        samples.append((time.thread_time() - start) / CALLS * 1e6)
                    found.append(HostCost(name, backend, round(statistics.median(samples), 1)))
        finally:
            BACKENDS["eager"] = before
    return found
