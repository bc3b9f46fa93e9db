"""The Triton backend on CPU tensors, in Triton's interpreter with its repairs and checks.

    TRITON_INTERPRET=1 pytest tests/backends/triton_backend/interpreted

The switch is read when a kernel is decorated, so these tests have a process of their own; without it they skip.
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
from paths import TESTS

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "tools"), str(TESTS / "logprobs"), str(TESTS / "ops")]
ABSENT = (
    "Triton is not installed"
    if importlib.util.find_spec("triton") is None
    else ""
    if os.environ.get("TRITON_INTERPRET") == "1"
    else ("run it by itself: TRITON_INTERPRET=1 pytest tests/backends/triton_backend/interpreted")
)
collect_ignore = (
    []
    if not ABSENT
    else [p.name for p in Path(__file__).parent.glob("test_*.py") if p.name != "test_interpreter_present.py"]
)
pytest.register_assert_rewrite("problems")

if not ABSENT:
    import triton_interpreter

    triton_interpreter.install()
    import torch

    from rlkernels.backends import DEVICES

    DEVICES["cpu"] = (*DEVICES["cpu"], "triton")  # last: the automatic choice stays what it is without the interpreter

    torch.use_deterministic_algorithms(True)  # fills what torch.empty returns with NaN: an output never written shows
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(scope="session")
def absent():
    """Why these tests cannot run here, or an empty string."""
    return ABSENT


@pytest.fixture(scope="session")
def interpreter():
    """The switches of the checks: program order, bounds, races, 16-bit sums, poisoned lanes."""
    return triton_interpreter


@pytest.fixture
def backend():
    from rlkernels.backends import use_backend

    with use_backend("triton"):
        yield "triton"


@pytest.fixture
def small_tiles():
    """Tiles of 32 columns: several of them per row cost little.

    Two are loaded ahead in the one-pass kernel, as for large vocabularies.
    """
    from rlkernels.backends.triton.launch_configs import Config, override

    with override(token_stats=Config(4, 32), token_stats_backward=Config(4, 32), fused_policy=Config(4, 32, 2)):
        yield 32
