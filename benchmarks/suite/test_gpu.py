"""The cases of a GPU under pytest-benchmark, at one shape: to compare two commits on one GPU in a minute.

``pytest benchmarks/suite/test_gpu.py --benchmark-only --benchmark-autosave``, then ``--benchmark-compare``. Each answer
is judged first.
"""

import functools

import pytest
import torch

from benchmarks.cases import logits_gpu
from benchmarks.cases.case import EAGER
from benchmarks.judge import wrong
from benchmarks.peers import lineup
from benchmarks.problems.logits import judge
from benchmarks.timing import gpu as gpu_timing

SHAPE = (2048, 151936)
NAMES = ("rlkernels auto", "rlkernels triton", "rlkernels cuda", EAGER)
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


@functools.cache
def device():
    from benchmarks.timing.device import Cuda

    return Cuda()


@functools.cache
def problem():
    made = logits_gpu.problem_of(device().device, *SHAPE, "bf16", device().cache_bytes, reference=True)
    return made, judge(made)


@pytest.mark.parametrize("who", NAMES)
@pytest.mark.parametrize("name", logits_gpu.CASES)
def test_speed(benchmark, name, who):
    case = logits_gpu.CASES[name](*problem(), lineup("cuda", {}, False))
    case.contenders = [c for c in case.contenders if c.name in (who, EAGER)]
    gpu_timing.ready(device(), case.contenders, False)
    contender = case.named(who)
    if contender is None:
        pytest.skip(f"{who} does not serve here")
    assert not wrong(case)

    def once(state):
        contender.run(state)
        device().synchronize()

    benchmark.group = f"{name}, {list(SHAPE)}"
    benchmark.extra_info.update(errors=contender.errors, moved_bytes=contender.moved)
    benchmark.pedantic(once, setup=lambda: ((contender.prepare(0),), {}), rounds=30, warmup_rounds=5)
