"""A few random valid calls on interpreted Triton kernels: layouts, special values, masked garbage."""

import pytest
from fuzz.cases import CASES
from fuzz.trial import Trial

SEEDS = range(3)
# Without kernels of their own: what they are made of is called by the others.
CALLED = sorted(
    set(CASES["valid"])
    - {"spans_to_mask", "length_desensitized_weights", "group_advantages", "masked_whiten", "token_weights"}
    - {"pack", "unpack", "shift_targets"}
)


@pytest.mark.parametrize("name", CALLED)
def test_random_valid_calls_on_triton_kernels_give_the_true_values_and_gradients(backend, small_tiles, name):
    findings = [
        (seed, found) for seed in SEEDS for found in Trial(name, seed, plain=True, small=True).run(CASES["valid"][name])
    ]
    assert not findings, findings
