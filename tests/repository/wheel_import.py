"""The last step of ``make wheel``: the installed package, without its sources, gives a right number from native code.

python -I tests/repository/wheel_import.py
"""

import re
import sys
from pathlib import Path

import torch

import rlkernels
from rlkernels.backends import cpu


def worst_error():
    """The largest error of a log-probability and its gradient against float64 torch, on the native CPU backend."""
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(8, 1000, generator=generator), torch.randint(1000, (8,), generator=generator)
    ours, truth = logits.clone().requires_grad_(), logits.double().requires_grad_()
    with rlkernels.use_backend("cpu"):
        got = rlkernels.token_logprobs(ours, targets)
        got.sum().backward()
    expected = truth.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    expected.sum().backward()
    return max((got - expected).abs().max().item(), (ours.grad - truth.grad).abs().max().item())


def openmp_runtimes():
    """The OpenMP libraries of this process; two of them are two pools of threads that fight for the cores."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    return {line.split()[-1] for line in lines if re.search(r"lib(gomp|omp|iomp5)[-.\w]*\.so", line)}


def main():
    package = Path(rlkernels.__file__).resolve().parent
    if not package.is_relative_to(Path(sys.prefix).resolve()):
        raise SystemExit(f"imported {package}, expected a package inside of {sys.prefix}; run python with -I")
    present, reason = cpu.available()
    if not present:
        raise SystemExit(reason)
    error = worst_error()
    if len(openmp_runtimes()) > 1:
        raise SystemExit(f"one OpenMP runtime expected, found {sorted(openmp_runtimes())}")
    print(f"rlkernels {rlkernels.__version__} of {package}, cpu backend {cpu.isa()}: off by {error:.1e}")
    return int(not error < 1e-5)


if __name__ == "__main__":
    sys.exit(main())
