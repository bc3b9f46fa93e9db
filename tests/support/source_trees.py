"""Copies of what a source distribution holds, and commands run on them."""

import os
import shutil
import stat
import subprocess
import sys
import zipfile

import pytest
from paths import ROOT

CXX = shutil.which("c++") or shutil.which("g++")
DISTRIBUTED = (
    "setup.py",
    "setup_build.py",
    "setup_cuda.py",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "csrc",
    "rlkernels",
)

FAILS = "echo 'cc1plus: fatal error: no space left on device' >&2\nexit 1\n"
needs_sources = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="the sources are not beside the tests")
needs_compiler = pytest.mark.skipif(CXX is None, reason="no C++ compiler")


def run(command, check=True, **options):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    assert not check or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def environment(**changes):
    """This environment without what would choose for the build, then ``changes``.

    No CUDA module, unless a test asks for one: on a machine with a GPU every build would take a minute more.
    """
    chosen = ("CXX", "MAX_JOBS", "PYTHONPATH", "RLKERNELS_CPU", "RLKERNELS_CUDA_ARCHS", "CUDA_HOME", "CUDA_PATH")
    kept = {k: v for k, v in os.environ.items() if k not in chosen}
    return {**kept, "RLKERNELS_CUDA": "0", **changes}


def copy(tree):
    """Makes ``tree`` from the sources, without anything that a build here has left behind."""
    tree.mkdir(parents=True)
    for path in (ROOT / name for name in DISTRIBUTED):
        if path.is_dir():
            shutil.copytree(path, tree / path.name, ignore=shutil.ignore_patterns("*.so", "*.build.log", "__pycache__"))
        elif path.exists():
            shutil.copy(path, tree)
    return tree


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def wheel(source, check=True, **variables):
    """The files of the wheel that ``setup.py`` makes, unpacked beside the sources, its name, and all
    that was printed.
    """
    made = source.parent / "wheels"
    shutil.rmtree(made, ignore_errors=True)
    done = run([sys.executable, "setup.py", "bdist_wheel", "-d", made], check, cwd=source, env=environment(**variables))
    if done.returncode != 0:
        return None, None, done.stdout + done.stderr
    (file,) = made.glob("*.whl")
    with zipfile.ZipFile(file) as archive:
        archive.extractall(made / "installed")
    return made / "installed", file.name, done.stdout + done.stderr


def python(installed, code, **variables):
    # An editable install of this tree would lend its own _cpu to the one under test.
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if not getattr(f, '__module__', "
        "'').startswith('__editable__')]\n"
        f"import torch, rlkernels\nfrom rlkernels.backends import cpu\n{code}"
    )
    return run([sys.executable, "-c", code], cwd=installed, env=environment(PYTHONPATH=str(installed), **variables))
