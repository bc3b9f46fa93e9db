"""Every variant of every Triton kernel through the compilers, for NVIDIA and AMD, on a machine without a GPU.

    TRITON_CACHE_DIR=.triton-cache/3.9 pytest tests/backends/triton_backend/compiled

Not in one process with the interpreter, whose switch is read when a kernel is decorated. Run it once per Triton
version, each with its own cache.
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
# A folder called triton would be found as a namespace package: the compiler is what must be there.
ABSENT = (
    "Triton is not installed"
    if importlib.util.find_spec("triton") is None
    else "TRITON_INTERPRET is set; these tests compile"
    if os.environ.get("TRITON_INTERPRET") == "1"
    else ""
)
collect_ignore = (
    []
    if not ABSENT
    else [p.name for p in Path(__file__).parent.glob("test_*.py") if p.name != "test_compiler_present.py"]
)


@pytest.fixture(scope="session")
def absent():
    """Why these tests cannot run here, or an empty string."""
    return ABSENT
