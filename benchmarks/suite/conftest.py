"""Settings of the suite of timings: without pytest-benchmark it is skipped, not failed."""

import importlib.util
import sys
from pathlib import Path

# At the end: the installed package is the one to measure, unless the checkout holds a compiled module.
sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks import subject  # noqa: E402

collect_ignore_glob = [] if importlib.util.find_spec("pytest_benchmark") else ["test_*.py"]


def pytest_report_header():
    return f"measured: {subject.line()}"
