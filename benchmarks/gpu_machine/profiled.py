"""One launch of each kernel over rows, for a profiler that counts in hardware: ``ncu ... python -m
benchmarks.gpu_machine.profiled --plan FILE``.

The file says in which order the kernels are launched, because their names do not tell one model from two.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

import rlkernels
from benchmarks.cases import logits_gpu
from benchmarks.gpu_machine import choices
from benchmarks.lineup import on
from rlkernels.backends import absent


def calls(problem, backend):
    """``{kernel: (passes over the logits, what launches it)}``; nothing but that kernel and small ones runs."""
    y, both = problem.targets, problem.ref_copies[0]
    op = logits_gpu.one_launch(problem, backend)

    def statistics(reference=None):
        kl = None if reference is None else "exact"
        return rlkernels.token_stats(problem.logits, y, ref_logits=reference, kl=kl, outputs=("entropy",))

    leaf = problem.leaf()
    logp = on(backend, rlkernels.token_logprobs)(leaf, y)

    def gradient():
        return torch.autograd.grad(logp, leaf, problem.dlogp, retain_graph=True)

    return {
        "token_stats": (1, on(backend, statistics)),
        "two_models": (2, lambda: on(backend, statistics)(both)),
        "fused_policy": (2, lambda: op(problem.inputs())),
        "token_stats_backward": (2, gradient),
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args(argv)
    if args.rehearse:
        device, shape, backends = torch.device("cpu"), choices.REHEARSED_SHAPE, choices.REHEARSED_BACKENDS
    else:
        device, shape, backends = torch.device("cuda"), choices.SHAPE, choices.BACKENDS
    backends = [name for name in backends if name == "auto" or absent(name) is None]
    problem = logits_gpu.problem_of(device, *shape, "bf16", 0, reference=True)
    every = [(backend, kernel, *what) for backend in backends for kernel, what in calls(problem, backend).items()]
    plan = [
        {"kernel": kernel, "backend": backend, "dtype": "bf16", "shape": shape, "bytes": passes * problem.bytes}
        for backend, kernel, passes, _ in every
    ]
    args.plan.write_text(json.dumps(plan))
    for counted in (False, True):  # compiled and warm before it counts
        if counted and not args.rehearse:
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
        for _, _, _, call in every:
            with torch.no_grad():
                call()
    if not args.rehearse:
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
