"""F07, F120, F131: the layouts of every public function's arguments, and what torch makes by default, over the CPU
build of the CUDA sources.
"""

import pytest
import torch
from argument_layouts import compared
from public_calls import CALLS, call, call_with, data
from reference import same_bits

LAYOUTS = ("every element apart", "dimensions reversed in memory", "negative bit", "expanded from one row")


def same(got, expected, what):
    for k, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert same_bits(a, b), f"{what}: result {k}: {a} against {b}"


@pytest.mark.fault(7, 120, 140)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CALLS)
def test_all_arguments_in_a_layout_give_the_bits_of_contiguous_ones(name, layout, public):
    got, expected, _ = compared(call_with, name, data(), layout)
    same(got, expected, f"{name}, {layout}")


@pytest.mark.fault(131)
@pytest.mark.parametrize("name", CALLS)
def test_another_default_dtype_and_device_change_no_bit(name, public):
    d = data()
    expected = call(name, d)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            got = call(name, d)
    finally:
        torch.set_default_dtype(torch.float32)
    same(got, expected, name)
