import signal
import sys
import threading

import pytest

pytest.register_assert_rewrite("reference")  # before anything imports it

import longest_first  # noqa: E402
from paths import ROOT, TESTS  # noqa: E402
from present_backends import PRESENT  # noqa: E402

from rlkernels.backends import use_backend  # noqa: E402

# For the benchmarks. At the end: where the package is installed that one is under test, not the sources beside them.
sys.path.append(str(ROOT))

# A suite started in the background of a script inherits an ignored SIGINT, and so would the children whose interruption
# is tested.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):  # one of several workers
        longest_first.order(items, TESTS)


@pytest.fixture(params=PRESENT)
def backend(request):
    """The name of each backend that this machine has, which serves every op of the test."""
    with use_backend(request.param):
        yield request.param
