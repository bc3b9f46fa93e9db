"""F07, F120, F131: the layouts of every public function's arguments, and what torch makes by default, behind the public
functions.
"""

import pytest
import torch
from argument_layouts import compared
from public_calls import CALLS, call, call_with, data
from reference import same_bits

REACHING = {
    "token_logprobs",
    "token_stats",
    "policy_loss",
    "logits_policy_loss",
    "value_loss",
    "dpo_loss",
    "gae",
    "unpaired_preference_loss",
    "sft_loss",
    "logprobs_sft_loss",
    "pairwise_reward_loss",
    "linear_policy_loss",
    "linear_dpo_loss",
    "discounted_returns",
}
NATIVE = [name for name in CALLS if name.split(" ")[0] in REACHING]
"""Calls that come to a kernel."""


def same(got, expected, what):
    for k, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert same_bits(a, b), f"{what}: result {k}: {a} against {b}"


@pytest.mark.fault(7, 120)
@pytest.mark.parametrize("name", NATIVE)
def test_all_arguments_with_their_elements_apart_give_the_bits_of_contiguous_ones(name, backend):
    got, expected, _ = compared(call_with, name, data(), "every element apart")
    same(got, expected, name)


@pytest.mark.fault(131)
@pytest.mark.parametrize("name", NATIVE)
def test_another_default_dtype_and_device_change_no_bit(name, backend):
    expected = call(name, data())
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            got = call(name, data_made_outside)
    finally:
        torch.set_default_dtype(torch.float32)
    same(got, expected, name)


data_made_outside = data()
