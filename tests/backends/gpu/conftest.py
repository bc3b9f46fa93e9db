"""The suite of a machine with a GPU. Without one every test is skipped, with one reason.

``--gpu-log FILE`` writes a line of JSON as each test ends: a run that is cut short keeps what it has.
``--compile-ahead FOLDER`` compiles the Triton kernels of the tests instead of launching them: ``compile_ahead.py``.
"""

import json
import os
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
NO_DEVICE = "torch sees no CUDA device; on a machine with one: make gpu"
MESSAGE = 2000


def pytest_addoption(parser):
    parser.addoption("--gpu-log", default=None, help="file that gets one line of JSON per test as it ends")
    parser.addoption("--compile-ahead", default=None, help="folder of marks of the Triton kernels that are compiled")
    parser.addoption("--compile-target", default="sm_90", help="the GPU that they are compiled for")


def usable():
    return torch.cuda.is_available() or os.environ.get("GPU_SUITE_DEVICE") == "cpu"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if not usable():
        pytest.skip(NO_DEVICE)  # from one place: the summary folds all of them into one line


@pytest.fixture
def backend(request):
    """The backend named by the test's parameter, or a skip that says why it is absent."""
    import gpu_support

    reason = gpu_support.missing(request.param)
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


@pytest.fixture(autouse=True)
def freed():
    """The next test finds the memory of this one."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def pytest_configure(config):
    marks = config.getoption("--compile-ahead", default=None)
    if marks:
        from compile_ahead import Ahead

        Ahead(marks, config.getoption("--compile-target")).install()
    log = config.getoption("--gpu-log", default=None)
    if log and not hasattr(config, "workerinput"):  # with xdist every report comes by here in the controller too
        config.pluginmanager.register(Log(Path(log)), "gpu-log")


class Log:
    def __init__(self, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("w")

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and report.outcome == "passed":
            return
        message = "" if report.outcome == "passed" else str(report.longrepr)[-MESSAGE:]
        line = {
            "test": report.nodeid,
            "when": report.when,
            "outcome": report.outcome,
            "seconds": report.duration,
            "message": message,
        }
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def pytest_unconfigure(self):
        self.file.close()
