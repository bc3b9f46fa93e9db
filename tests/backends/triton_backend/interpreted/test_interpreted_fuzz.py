"""A few random valid calls on interpreted Triton kernels: layouts, special values, masked garbage."""

import pytest
from fuzz.cases import CASES, WITHOUT_KERNELS
from fuzz.trial import Trial

SEEDS = range(3)
CALLED = sorted(set(CASES["valid"]) - WITHOUT_KERNELS)


@pytest.mark.parametrize("name", CALLED)
def test_random_valid_calls_on_triton_kernels_give_the_true_values_and_gradients(backend, small_tiles, name):
    findings = [
        (seed, found) for seed in SEEDS for found in Trial(name, seed, plain=True, small=True).run(CASES["valid"][name])
    ]
    assert not findings, findings
