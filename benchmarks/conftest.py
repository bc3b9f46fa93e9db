"""The suite is one of timings: without pytest-benchmark it is skipped, not failed."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("pytest_benchmark") else ["test_*.py"]
