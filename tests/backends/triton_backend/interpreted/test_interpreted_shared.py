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
ELSEWHERE = (
    "test_F13_",
    "test_F75_",
    "test_F01_",
    "test_F04_",
    "test_F06_",
    "test_F17_",
    "test_F66_",
    "test_F76_",
    "test_gradcheck_",
)
pytest.register_assert_rewrite(*MODULES)


def shared():
    for name in MODULES:
        for test, function in vars(import_module(name)).items():
            if (
                test.startswith("test_")
                and not test.startswith(ELSEWHERE)
                and "backend" in inspect.signature(function).parameters
            ):
                yield test, function


globals().update(shared())
from test_gradient_in_forward import way  # noqa: E402, F401  (a fixture)
