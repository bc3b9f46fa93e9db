"""An objective that calls every function of the language that no built-in one calls, compiled for each target."""

import all_functions
import cases
import pytest
import torch
from measured import measure
from triton_aot import TARGETS

from rlkernels.objectives import OBJECTIVES, objective


@pytest.fixture(autouse=True)
def bent():
    objective(all_functions.bent)
    yield
    del OBJECTIVES["bent"]


@pytest.mark.parametrize("target", TARGETS[::2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_function_compiles(target, dtype):
    for row in measure(cases.weighted("bent", dtype=dtype), target).values():
        assert not row.error and row.registers > 0, row
