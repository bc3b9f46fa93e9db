"""The cases of ``rlkernels bench`` under pytest-benchmark, on shapes small enough to compare two commits in a minute.

``pytest benchmarks --benchmark-only --benchmark-autosave``, then ``--benchmark-compare``. Each answer is judged against
float64 first.
"""

import functools

import pytest
import torch

import rlkernels
from rlkernels.cli import bench_cases, bench_linear_cases, bench_linear_problem, bench_problem, bench_timing

# One batch below and one above the last-level cache of common machines; a vocabulary that no block divides.
SHAPES = {"16 x 32000": (16, 32000), "512 x 50257": (512, 50257)}
CONTENDERS = {
    bench_cases.FORWARD: [bench_cases.OURS, bench_cases.EAGER, bench_cases.COMPILED],
    bench_cases.BOTH: [bench_cases.OURS, bench_cases.IN_PLACE, bench_cases.EAGER, bench_cases.COMPILED],
    bench_cases.STATS: [bench_cases.OURS, bench_cases.EAGER, bench_cases.COMPILED],
    bench_cases.POLICY: [
        bench_cases.OURS,
        bench_cases.PASS_FORWARD,
        bench_cases.PASS_BACKWARD,
        bench_cases.EAGER,
        bench_cases.COMPILED,
    ],
}

# One chunk of logits for every case; for one of them two by the default budget, and a vocabulary that no block divides.
HEADS = {"64 x 256 x 8192": (64, 256, 8192), "2048 x 64 x 50257": (2048, 64, 50257)}
PRODUCTS = {"linear_policy_loss": 3, "linear_token_stats": 4, "linear_dpo_loss": 3, "linear_sft_loss": 3}
FUSED = [
    (name, who, shape)
    for name, count in PRODUCTS.items()
    for shape in list(HEADS)[: 2 if name == "linear_policy_loss" else 1]
    for who in (bench_linear_cases.floor(count), bench_linear_cases.OURS, bench_linear_cases.EAGER)
]


@functools.cache
def problem(shape):
    made = bench_problem.make(*SHAPES[shape], "bf16")
    return made, bench_cases.Judge(made, bench_problem.truth(made))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "who"), [(name, who) for name, everyone in CONTENDERS.items() for who in everyone])
def test_speed(benchmark, name, who, shape):
    if who.startswith("rlkernels") and "cpu" in rlkernels.available_backends()["absent"]:
        pytest.skip(f"cpu backend: {rlkernels.available_backends()['absent']['cpu']}")
    made, judge = problem(shape)
    case = bench_cases.CASES[name](made, judge, {})
    contender = case.named(who)
    try:
        bench_timing.first_run(contender)
    except RuntimeError as error:
        if who != bench_cases.COMPILED:
            raise
        pytest.skip(f"torch.compile: {str(error).splitlines()[0]}")
    if contender.ours:
        bench_timing.first_run(case.named(bench_cases.EAGER))
        assert not bench_cases.wrong([case], judge)
    benchmark.group = f"{name}, {shape}"
    benchmark.extra_info.update(errors=contender.errors, moved_bytes=contender.moved)
    benchmark.pedantic(contender.run, setup=lambda: ((contender.prepare(),), {}), rounds=10, warmup_rounds=2)


@functools.cache
def head(shape, dtype):
    return bench_linear_problem.make(torch.device("cpu"), *HEADS[shape], dtype)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("name", "who", "shape"), FUSED)
def test_speed_of_the_fused_head(benchmark, name, who, shape, dtype):
    case = bench_linear_cases.CASES[name](head(shape, dtype), dtype, {})
    contender = case.named(who)
    case.judges = {n: judge for n, judge in case.judges.items() if n == who}
    if contender.ours:
        bench_timing.first_run(case.named(bench_linear_cases.EAGER))
    bench_timing.first_run(contender)
    assert not bench_linear_cases.wrong(case)
    benchmark.group = f"{name}, {dtype}, {shape}"
    benchmark.extra_info.update(errors=contender.errors, operations=case.operations)
    benchmark.pedantic(contender.run, setup=lambda: ((contender.prepare(),), {}), rounds=5, warmup_rounds=1)
