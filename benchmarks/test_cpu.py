"""The cases of ``rlkernels bench`` under pytest-benchmark, on shapes small enough to compare two commits in a minute.

``pytest benchmarks --benchmark-only --benchmark-autosave``, then ``--benchmark-compare``. Each answer is judged against float64 first.
"""
import functools

import pytest

import rlkernels
from rlkernels.cli import bench_cases, bench_problem, bench_timing

# One batch below and one above the last-level cache of common machines; a vocabulary that no block divides.
SHAPES = {"16 x 32000": (16, 32000), "512 x 50257": (512, 50257)}
CONTENDERS = {
    bench_cases.FORWARD: [bench_cases.OURS, bench_cases.EAGER, bench_cases.COMPILED],
    bench_cases.BOTH: [bench_cases.OURS, bench_cases.IN_PLACE, bench_cases.EAGER, bench_cases.COMPILED],
    bench_cases.STATS: [bench_cases.OURS, bench_cases.EAGER, bench_cases.COMPILED],
    bench_cases.POLICY: [bench_cases.OURS, bench_cases.PASS_FORWARD, bench_cases.PASS_BACKWARD, bench_cases.EAGER, bench_cases.COMPILED],
}


@functools.cache
def problem(shape):
    made = bench_problem.make(*SHAPES[shape], "bf16")
    return made, bench_cases.Judge(made, bench_problem.truth(made))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "who"), [(name, who) for name, everyone in CONTENDERS.items() for who in everyone])
def test_speed(benchmark, name, who, shape):
    if who.startswith("rlkernels") and "cpu" in rlkernels.backends()["absent"]:
        pytest.skip(f"cpu backend: {rlkernels.backends()['absent']['cpu']}")
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
