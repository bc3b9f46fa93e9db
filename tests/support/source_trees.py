"""Copies of what a source distribution holds, and commands run on them."""

import os
import shutil
import subprocess

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

needs_sources = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="the sources are not beside the tests")
needs_compiler = pytest.mark.skipif(CXX is None, reason="no C++ compiler")


def run(command, check=True, **options):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    assert not check or done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def environment(**changes):
    """This environment without what would choose for the build, then ``changes``."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if k not in ("CXX", "MAX_JOBS", "PYTHONPATH", "RLKERNELS_CPU", "RLKERNELS_CUDA", "RLKERNELS_CUDA_ARCHS")
    }
    return {**kept, **changes}


def copy(tree):
    """Makes ``tree`` from the sources, without anything that a build here has left behind."""
    tree.mkdir(parents=True)
    for path in (ROOT / name for name in DISTRIBUTED):
        if path.is_dir():
            shutil.copytree(path, tree / path.name, ignore=shutil.ignore_patterns("*.so", "*.build.log", "__pycache__"))
        elif path.exists():
            shutil.copy(path, tree)
    return tree
