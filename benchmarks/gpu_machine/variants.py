"""Choices that a model made and only a device can judge: blocks per row of the CUDA policy kernel, rows per chunk of
the head, and the gradient of the logits by itself.

    python -m benchmarks.gpu_machine.variants --json variants.json --budget 60

Every answer is judged as in the benchmark, and the file has its form. ``--rehearse``: a stand-in for the device.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import rlkernels
from benchmarks import run_gpu
from benchmarks.cases import linear, linear_gpu, logits, logits_gpu
from benchmarks.cases.case import Case, differentiated
from benchmarks.gpu_machine import choices, stand_in
from benchmarks.gpu_machine.choices import BACKWARD, BLOCKS, BUDGET_LABEL, CHUNKS, FUSED, blocks_label, chunk_label
from benchmarks.judge import Judge
from benchmarks.lineup import Lineup, on
from benchmarks.problems import linear as linear_problems
from benchmarks.problems import logits as logits_problems
from benchmarks.timing.contender import Contender
from benchmarks.timing.device import Cuda
from rlkernels.backends import absent, cuda

HEAD = linear_gpu.NAMES[0]
GIB = 2**30


def with_blocks(run: Callable, count: int) -> Callable:
    """``run`` with so many blocks per row, where the CUDA module is."""

    def forced(state: tuple) -> object:
        if cuda._cuda is None:
            return run(state)
        cuda._cuda.choose(count)
        try:
            return run(state)
        finally:
            cuda._cuda.choose()

    return forced


def fused(problem: logits_problems.Problem, judge: Judge, backends: tuple[str, ...]) -> Case:
    """The op with the gradient in the forward; only CUDA C++, or what stands in for it, has blocks to choose."""
    check = judge.check("loss", gradients=("dpolicy",))

    def make(name: str, run: Callable) -> Contender:
        return Contender(name, run, problem.inputs, check, ours=True)

    runs = {name: logits_gpu.one_launch(problem, name) for name in backends}
    everyone = [make(f"rlkernels {name}", run) for name, run in runs.items()]
    everyone += [
        make(blocks_label(name, n), with_blocks(run, n))
        for name, run in runs.items()
        if name != "triton"
        for n in BLOCKS
    ]
    return logits.case(FUSED, problem, judge, everyone, "1R+1W", 1, 1)


def backward(problem: logits_problems.Problem, judge: Judge, backends: tuple[str, ...]) -> Case:
    """The gradient of the logits behind log-probabilities whose forward lies before the clock."""
    check = judge.check(gradients=("dlogp",))

    def made(name: str) -> Contender:
        def prepare(buffer: int) -> tuple:
            leaf = problem.leaf(buffer)
            return on(name, rlkernels.token_logprobs)(leaf, problem.targets), leaf

        def run(state: tuple) -> tuple:
            return (), torch.autograd.grad(state[0], state[1:], problem.dlogp)

        return Contender(f"rlkernels {name}", run, prepare, check, ours=True)

    return logits.case(BACKWARD, problem, judge, [made(name) for name in backends], "1R+1W", 1, 1)


def head(p: linear_problems.Problem) -> Case:
    """The policy loss from hidden states: as it is chosen, with a budget, and in chunks of so many rows."""
    loss = linear.ppo_loss(p)[1]
    judge = linear_problems.judge(p, loss)
    chosen = {BUDGET_LABEL: (GIB, None), **{chunk_label(rows): (None, rows) for rows in CHUNKS}}
    further = [
        Contender(label, differentiated(linear.ppo_loss(p, *choice)[0]), p.leaves, judge.everything, ours=True)
        for label, choice in chosen.items()
    ]
    floor = linear_gpu.PRODUCTS.format(3)
    rules = {"passes": floor, "roundings": 1.5}
    ours = linear.ppo_loss(p)[0]
    return linear.beside(HEAD, p, Lineup(), ours, {}, judge, count=3, floor=floor, further=further, **rules)


def run(args: argparse.Namespace, device: object, backends: tuple[str, ...], **options: int) -> int:
    """Measures; 1 if an answer of ours is wrong or one of ours failed, else 0."""
    state = run_gpu.Run(args, device, time.monotonic())
    state.begin(**options)
    tokens, vocab = args.tokens, args.vocab

    def rows() -> Callable:
        problem = logits_gpu.problem_of(device.device, tokens, vocab, args.dtype, device.cache_bytes)
        judge = logits_problems.judge(problem)
        return lambda name, lineup: {FUSED: fused, BACKWARD: backward}[name](problem, judge, backends)

    def of_head() -> Callable:
        problem = linear_problems.make(device.device, tokens, args.hidden, vocab, args.dtype)
        return lambda name, lineup: head(problem)

    state.batch([FUSED], f"[{tokens}, {vocab}]", rows, False, False)
    state.batch([HEAD], f"[{tokens}, {args.hidden}, {vocab}]", of_head, False, False)
    state.batch([BACKWARD], f"[{tokens}, {vocab}]", rows, False, False)
    state.data["complete"] = not state.data["not_measured"]
    state.save()
    return 1 if state.faults else 0


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--budget", type=float, help="start no case after so many seconds")
    parser.add_argument("--seconds", type=float, default=0.15, help="hot time of each contender")
    parser.add_argument("--commit")
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args(argv)
    args.dtype, args.no_peers, args.quick, args.plain, args.flash_attn = "bf16", True, False, True, None
    if args.rehearse:
        (args.tokens, args.vocab), args.hidden = choices.REHEARSED_SHAPE, choices.REHEARSED_HIDDEN
        sizes = {key: stand_in.SMALL[key] for key in ("size", "side")}
        return run(args, stand_in.StandIn(), choices.REHEARSED_BACKENDS, **sizes)
    (args.tokens, args.vocab), args.hidden = choices.SHAPE, choices.HIDDEN
    present = tuple(name for name in choices.BACKENDS if absent(name) is None)
    return run(args, Cuda(), present)


if __name__ == "__main__":
    sys.exit(main())
