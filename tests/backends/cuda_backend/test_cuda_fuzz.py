"""A few random valid calls with the CUDA kernels behind them, run on the CPU: layouts, special values,
masked garbage.
"""

import pytest
import torch
from fuzz.cases import CASES, WITHOUT_KERNELS
from fuzz.trial import Trial

SEEDS = range(6)
CALLED = sorted(set(CASES["valid"]) - WITHOUT_KERNELS)


@pytest.mark.parametrize("name", CALLED)
def test_random_valid_calls_on_the_cuda_kernels_give_the_true_values_and_gradients(public, name):
    findings = [
        (seed, found)
        for seed in SEEDS
        for found in Trial(
            name, seed, plain=True, floats=(torch.float32, torch.bfloat16, torch.float16), small=True
        ).run(CASES["valid"][name])
    ]
    assert not findings, findings
