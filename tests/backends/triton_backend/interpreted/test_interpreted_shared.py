"""The tests that every backend passes (layouts, special values, the autograd and op contracts), here on interpreted
Triton kernels.

Every function of ``MODULES`` that takes a ``backend`` is collected. ``ELSEWHERE``: those whose size is their point,
which a GPU runs, and those that this folder repeats with tiles of 32 columns, where several tiles per row cost little.
"""

import inspect
from importlib import import_module

import pytest

MODULES = (
    "test_logprobs_layouts",
    "test_mutant_edges",
    "test_logprobs_special_values",
    "test_logprobs_precision",
    "test_op_autograd",
    "test_gradient_in_forward",
    "test_ops",
)
ELSEWHERE = {1, 4, 6, 13, 17, 66, 75, 76}  # first numbers of the marks ``fault``
pytest.register_assert_rewrite(*MODULES)


def runs_elsewhere(test, function):
    faults = [mark.args[0] for mark in getattr(function, "pytestmark", ()) if mark.name == "fault"]
    return test.startswith("test_gradcheck_") or not ELSEWHERE.isdisjoint(faults)


def shared():
    for name in MODULES:
        for test, function in vars(import_module(name)).items():
            if test.startswith("test_") and "backend" in inspect.signature(function).parameters:
                if not runs_elsewhere(test, function):
                    yield test, function


globals().update(shared())
from test_gradient_in_forward import way  # noqa: E402, F401  (a fixture)
