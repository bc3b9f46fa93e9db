"""The functions of the objective language that no built-in objective calls, in Triton's interpreter."""

import all_functions
import pytest
import torch

from rlkernels.backends.triton import launch
from rlkernels.objectives import OBJECTIVES, objective


@pytest.fixture(autouse=True)
def bent():
    objective(all_functions.bent)
    yield
    del OBJECTIVES["bent"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_derivatives_are_those_of_torch(dtype):
    columns = all_functions.columns(dtype)
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-13}[dtype]
    got = launch.elementwise("bent", list(columns), [-0.5], None)[1:]
    for x, want in zip(got, all_functions.truth(*columns), strict=True):
        torch.testing.assert_close(x.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_nan_operand_gives_nan_and_an_infinite_one_its_limit(dtype):
    columns, want = all_functions.special(dtype)
    got = launch.elementwise("bent", list(columns), [-0.5], None)[1]
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0, equal_nan=True)
