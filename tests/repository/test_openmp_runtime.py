"""The OpenMP runtime of the native CPU module is torch's own: one pool of threads, and no library of the system."""

import os
import subprocess
import sys
import textwrap

import pytest
import subprocesses
import without_libgomp
from paths import TESTS

from rlkernels.backends import cpu

needs_module = pytest.mark.skipif(not cpu.available()[0], reason="the module is not built")
needs_namespace = pytest.mark.skipif(not without_libgomp.possible(), reason="this system gives no mount namespace")
LOADS = "import ctypes, sys; [__import__(name) for name in sys.argv[1:]]; ctypes.CDLL('libgomp.so.1')"
NUMBER = """
    import sys
    sys.path.insert(0, sys.argv[1])
    import wheel_import

    print(wheel_import.worst_error())
    print(*wheel_import.openmp_runtimes(), sep="\\n")
"""


def hidden(*arguments):
    """Runs ``python ARGUMENTS`` where no runtime of the system can be opened."""
    command = without_libgomp.words([sys.executable, *arguments])
    return subprocess.run(
        command, capture_output=True, text=True, cwd=os.sep, env=subprocesses.environment(), check=False
    )


@needs_namespace
@pytest.mark.parametrize(("modules", "there"), [([], False), (["torch"], True)])
def test_without_the_libraries_of_the_system_a_process_has_the_runtime_of_torch_alone(modules, there):
    """Otherwise the next test shows nothing."""
    done = hidden("-c", LOADS, *modules)
    assert (done.returncode == 0) == there, done.stderr
    assert there or "libgomp.so.1" in done.stderr


@needs_module
@needs_namespace
def test_the_module_gives_right_numbers_where_no_runtime_lies_beside_torch():
    done = hidden("-c", textwrap.dedent(NUMBER), TESTS / "repository")
    assert done.returncode == 0, done.stderr
    error, *runtimes = done.stdout.splitlines()
    assert float(error) < 1e-5
    assert len(runtimes) == 1 and "torch" in runtimes[0], runtimes


@needs_module
@pytest.mark.skipif(sys.platform != "linux", reason="the libraries of a process are read from /proc")
def test_a_process_with_torch_has_one_runtime():
    done = subprocesses.code(NUMBER, TESTS / "repository")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2, done.stdout
