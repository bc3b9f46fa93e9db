"""The cases of a GPU under pytest-benchmark, at one shape: to compare two commits on one GPU in a minute.

``pytest benchmarks/suite/test_gpu.py --benchmark-only --benchmark-autosave``, then ``--benchmark-compare``. Each answer
is judged first.
"""

import functools

import pytest
import torch

from benchmarks.cases import logits_gpu
from benchmarks.problems import logits_gpu as gpu_problem
from benchmarks.report import gpu as gpu_report
from benchmarks.timing import gpu as gpu_timing

SHAPE = (2048, 151936)
NAMES = ("rlkernels auto", "rlkernels triton", "rlkernels cuda", logits_gpu.EAGER)
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


@functools.cache
def device():
    from benchmarks.timing.device import Cuda

    return Cuda()


@functools.cache
def problem():
    made = gpu_problem.make(device().device, *SHAPE, "bf16", device().cache_bytes, reference=True)
    return made, gpu_problem.Judge(made)


@pytest.mark.parametrize("who", NAMES)
@pytest.mark.parametrize("name", logits_gpu.CASES)
def test_speed(benchmark, name, who):
    case = logits_gpu.CASES[name](*problem(), {}, False)
    case.entries = [e for e in case.entries if e.name in (who, logits_gpu.EAGER)]
    gpu_timing.ready(device(), case.entries, False)
    entry = case.named(who)
    if entry is None:
        pytest.skip(f"{who} does not serve here")
    assert not gpu_report.faults(case)

    def once(state):
        entry.run(state)
        device().synchronize()

    benchmark.group = f"{name}, {list(SHAPE)}"
    benchmark.extra_info.update(errors=entry.errors, moved_bytes=case.reads + case.writes)
    benchmark.pedantic(once, setup=lambda: ((entry.prepare(0),), {}), rounds=30, warmup_rounds=5)
