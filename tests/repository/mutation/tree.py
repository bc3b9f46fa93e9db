"""A copy of the sources in which one mutant at a time is planted, built and shown to the tests."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from mutant import located, places

COPIED = (
    "rlkernels",
    "csrc",
    "tests",
    "benchmarks",
    "pyproject.toml",
    "setup.py",
    "setup_build.py",
    "setup_cuda.py",
    "README.md",
    "LICENSE",
)
IGNORED = shutil.ignore_patterns("__pycache__", "*.so", "build", ".pytest_cache", ".hypothesis")
HOST = ".pytest_cache/d/cuda_host"
LEFT_OUT = "test_objectives.py::test_native_backend_is_among_those_tested"
"""A test that notices every change of an objective, because the compiled module is of another digest then.

It would hide whether the numbers are tested.
"""
LIMIT = 300
"""Seconds after which the tests of one mutant count as hanging, which is a find too."""


class Tree:
    """A context manager: inside, a warm process runs tests, with ``paths`` on Python's path and ``variables`` in its
    environment.
    """

    def __init__(self, root, folder, paths=(), **variables):
        self.root, self.path, self.paths, self.variables = Path(root), Path(folder), paths, variables
        for name in COPIED:
            if (root / name).is_dir():
                shutil.copytree(root / name, self.path / name, ignore=IGNORED)
            elif (root / name).exists():
                shutil.copy(root / name, self.path / name)
        installed = importlib.util.find_spec("rlkernels._cpu")
        if installed is not None:
            shutil.copy(installed.origin, self.path / "rlkernels")
        # Objects are named by what went into them: those of the test runs will do for what no mutant touches.
        if (root / HOST).is_dir():
            shutil.copytree(root / HOST, self.path / HOST, ignore=shutil.ignore_patterns("*.part", "lock"))

    def pytest(self, tests, first_failure=True):
        """``(status, output)``; status None: it did not end in time."""
        arguments = ["-q", "--tb=line", "-rfE", *["-x"] * first_failure]
        if LEFT_OUT.partition("::")[0] in places(self.root):
            arguments.append(f"--deselect={located(self.root, LEFT_OUT)}")
        arguments += [located(self.root, test) for test in tests]
        self.warm.stdin.write(json.dumps([LIMIT if first_failure else 12 * LIMIT, *arguments]) + "\n")
        self.warm.stdin.flush()
        answer = self.warm.stdout.readline()
        if not answer:
            raise RuntimeError("the process that runs the tests is gone")
        return json.loads(answer)

    def __enter__(self):
        # No bytecode: a file may change twice within the second of its time stamp.
        environment = {
            **os.environ,
            "TRITON_INTERPRET": "0",
            **self.variables,
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
        }
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(self.path), *map(str, self.paths), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        self.warm = subprocess.Popen(
            [sys.executable, self.path / "tests/repository/mutation/warm.py"],
            cwd=self.path,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        return self

    def __exit__(self, *_):
        self.warm.stdin.close()
        self.warm.wait()

    def planted(self, mutant):
        """The tree with the mistake, as a context manager."""
        return _Planted(self.path / mutant.file, mutant.old, mutant.new)

    def build_cuda(self):
        """The CUDA sources for the CPU, where their tests look for the module."""
        host = self._host_build()
        if host.CXX is None:
            raise RuntimeError("no C++ compiler: the CUDA sources cannot be run on the CPU")
        host.build(self.path / HOST)

    def build_cpu(self):
        """``rlkernels._cpu`` of the tree, as an install builds it: only what includes the changed file is compiled."""
        environment = {**os.environ, "RLKERNELS_CUDA": "0"}
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=self.path, env=environment, capture_output=True, text=True)
        if done.returncode or not list(self.path.glob("rlkernels/_cpu*")):
            raise RuntimeError(f"the CPU kernels do not build:\n{(done.stdout + done.stderr)[-3000:]}")

    def _host_build(self):
        folder = str(self.path / "tests/backends/cuda_backend")
        if folder not in sys.path:
            sys.path.insert(0, folder)
        import host_build

        return host_build


class _Planted:
    def __init__(self, file, old, new):
        self.file, self.before = file, file.read_text()
        self.after = self.before.replace(old, new)

    def __enter__(self):
        self.file.write_text(self.after)

    def __exit__(self, *_):
        self.file.write_text(self.before)
