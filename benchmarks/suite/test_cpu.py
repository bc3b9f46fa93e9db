"""The cases of a CPU under pytest-benchmark, on shapes small enough to compare two commits in a minute.

``pytest benchmarks/suite --benchmark-only --benchmark-autosave``, then ``--benchmark-compare``. Each answer is judged
against float64 first.
"""

import functools

import pytest
import torch

import rlkernels
from benchmarks.cases import divergence, linear_cpu, logits_cpu
from benchmarks.cases.case import COMPILED, EAGER, IN_PLACE, OURS
from benchmarks.cases.logits import FORWARD, LOGPROBS, POLICY, STATS
from benchmarks.judge import wrong
from benchmarks.lineup import Lineup
from benchmarks.problems import linear as linear_problem
from benchmarks.problems import logits as logits_problem
from benchmarks.timing import cpu as cpu_timing

CPU = torch.device("cpu")
# One batch below and one above the last-level cache of common machines, and a vocabulary that no block divides.
SHAPES = {"16 x 32000": (16, 32000), "512 x 50257": (512, 50257)}
CONTENDERS = {
    FORWARD: [OURS, EAGER, COMPILED],
    LOGPROBS: [OURS, OURS + IN_PLACE, EAGER, COMPILED],
    STATS: [OURS, EAGER, COMPILED],
    POLICY: [OURS, logits_cpu.PASS_FORWARD, logits_cpu.PASS_BACKWARD, EAGER, COMPILED],
    **{name: [OURS, EAGER, COMPILED] for name in divergence.CASES},
}

# One chunk of logits for every case. One of them has two by the default budget, and a vocabulary that no block divides.
HEADS = {"64 x 256 x 8192": (64, 256, 8192), "2048 x 64 x 50257": (2048, 64, 50257)}
PRODUCTS = {"linear_policy_loss": 3, "linear_token_stats": 4, "linear_dpo_loss": 3, "linear_sft_loss": 3}
FUSED = [
    (name, who, shape)
    for name, count in PRODUCTS.items()
    for shape in list(HEADS)[: 2 if name == "linear_policy_loss" else 1]
    for who in (linear_cpu.floor(count), OURS, EAGER)
]


@functools.cache
def problem(shape):
    made = logits_problem.make(CPU, *SHAPES[shape], "bf16")
    return made, logits_problem.judge(made)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "who"), [(name, who) for name, everyone in CONTENDERS.items() for who in everyone])
def test_speed(benchmark, name, who, shape):
    if who.startswith("rlkernels") and "cpu" in rlkernels.available_backends()["absent"]:
        pytest.skip(f"cpu backend: {rlkernels.available_backends()['absent']['cpu']}")
    made, judge = problem(shape)
    case = logits_cpu.CASES[name](made, judge, logits_cpu.lineup({}, True))
    contender = case.named(who)
    try:
        cpu_timing.first_run(contender)
    except RuntimeError as error:
        if who != COMPILED:
            raise
        pytest.skip(f"torch.compile: {str(error).splitlines()[0]}")
    if contender.ours:
        cpu_timing.first_run(case.named(EAGER))
        assert not wrong(case)
    benchmark.group = f"{name}, {shape}"
    benchmark.extra_info.update(errors=contender.errors, moved_bytes=contender.moved)
    benchmark.pedantic(contender.run, setup=lambda: ((contender.prepare(0),), {}), rounds=10, warmup_rounds=2)


@functools.cache
def head(shape, dtype):
    return linear_problem.make(CPU, *HEADS[shape], dtype)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("name", "who", "shape"), FUSED)
def test_speed_of_the_fused_head(benchmark, name, who, shape, dtype):
    case = linear_cpu.CASES[name](head(shape, dtype), Lineup())
    contender = case.named(who)
    if contender.ours:
        cpu_timing.first_run(case.named(EAGER))
    cpu_timing.first_run(contender)
    assert not wrong(case)
    benchmark.group = f"{name}, {dtype}, {shape}"
    benchmark.extra_info.update(errors=contender.errors, operations=case.flops)
    benchmark.pedantic(contender.run, setup=lambda: ((contender.prepare(0),), {}), rounds=5, warmup_rounds=1)
