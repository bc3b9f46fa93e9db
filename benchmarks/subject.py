"""The package and the command that a figure belongs to."""

import shlex
import sys
from pathlib import Path

import rlkernels
from rlkernels.backends import cpu
from rlkernels.cli import machine


def line() -> str:
    """The rlkernels that is measured, and whether its kernels for the CPU are there."""
    available, reason = cpu.available()
    state = f"present, {cpu.isa()}" if available else f"absent: {reason}"
    return f"rlkernels {rlkernels.__version__} of {Path(rlkernels.__file__).resolve().parent}, backend cpu {state}"


def command() -> str:
    """The command that was given."""
    return shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]])


def describe() -> dict[str, object]:
    """Machine, versions and sources, those of the benchmarks among them: the package's digest does not cover them."""
    found = machine.describe()
    found["sources"]["benchmarks_sha256"] = machine.digest(Path(__file__).resolve().parent)
    return found
