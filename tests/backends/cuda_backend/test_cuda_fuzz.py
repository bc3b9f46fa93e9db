"""A few random valid calls with the CUDA kernels behind them, run on the CPU: layouts, special values,
masked garbage.
"""

import pytest
import torch
from fuzz.cases import CASES
from fuzz.trial import Trial

SEEDS = range(6)
# Without kernels of their own: what they are made of is called by the others.
CALLED = sorted(
    set(CASES["valid"])
    - {"spans_to_mask", "length_desensitized_weights", "group_advantages", "masked_whiten", "token_weights"}
    - {"pack", "unpack", "shift_targets"}
)


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
