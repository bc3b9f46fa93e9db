"""The cases of ``rlkernels bench --device cuda`` under pytest-benchmark, at one shape: to compare two commits on one
GPU in a minute.

``pytest benchmarks/test_gpu.py --benchmark-only --benchmark-autosave``, then ``--benchmark-compare``. Each answer is
judged first.
"""

import functools

import pytest
import torch

from rlkernels.cli import bench_gpu_cases, bench_gpu_problem, bench_gpu_report, bench_gpu_timing

SHAPE = (2048, 151936)
NAMES = ("rlkernels auto", "rlkernels triton", "rlkernels cuda", bench_gpu_cases.EAGER)
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


@functools.cache
def device():
    from rlkernels.cli.bench_gpu_device import Cuda

    return Cuda()


@functools.cache
def problem():
    made = bench_gpu_problem.make(device().device, *SHAPE, "bf16", device().cache_bytes, reference=True)
    return made, bench_gpu_problem.Judge(made)


@pytest.mark.parametrize("who", NAMES)
@pytest.mark.parametrize("name", bench_gpu_cases.CASES)
def test_speed(benchmark, name, who):
    case = bench_gpu_cases.CASES[name](*problem(), {}, False)
    case.entries = [e for e in case.entries if e.name in (who, bench_gpu_cases.EAGER)]
    bench_gpu_timing.ready(device(), case.entries, False)
    entry = case.named(who)
    if entry is None:
        pytest.skip(f"{who} does not serve here")
    assert not bench_gpu_report.faults(case)

    def once(state):
        entry.run(state)
        device().synchronize()

    benchmark.group = f"{name}, {list(SHAPE)}"
    benchmark.extra_info.update(errors=entry.errors, moved_bytes=case.reads + case.writes)
    benchmark.pedantic(once, setup=lambda: ((entry.prepare(0),), {}), rounds=30, warmup_rounds=5)
