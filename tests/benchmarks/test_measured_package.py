"""The choice of the rlkernels that is measured: sources without a compiled module never hide an installed package."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

import rlkernels
from rlkernels.backends import cpu

PACKAGE = Path(rlkernels.__file__).resolve().parent
BUILT = ("*.so", "*.build.log", "__pycache__", "results")


def run(checkout, path, *arguments):
    """``python ARGUMENTS`` in ``checkout``, with these folders in ``PYTHONPATH``; its words."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=checkout, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("compiled", "named", "expected"),
    [("", False, "installed"), ("_cpu.so", False, "checkout"), ("", True, "checkout")],
)
def test_a_checkout_comes_first_where_it_holds_a_compiled_module_or_is_named(compiled, named, expected, tmp_path):
    for folder in ("checkout", "installed"):
        (tmp_path / folder / "rlkernels").mkdir(parents=True)
        (tmp_path / folder / "rlkernels/__init__.py").write_text(f"NAME = {folder!r}\n")
    checkout = tmp_path / "checkout"
    if compiled:
        (checkout / "rlkernels" / compiled).touch()
    (checkout / "benchmarks").mkdir()
    shutil.copy(ROOT / "benchmarks/__init__.py", checkout / "benchmarks")
    (checkout / "benchmarks/__main__.py").write_text("import rlkernels\nprint(rlkernels.NAME)\n")
    path = [checkout] * named + [tmp_path / "installed"]
    assert run(checkout, path, "-m", "benchmarks") == f"{expected}\n"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkout in which nothing was built, and the package under test, installed."""
    if not cpu.available()[0]:
        pytest.skip("no compiled module that could be installed")
    checkout, installed = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("installed")
    for name in ("benchmarks", "rlkernels"):
        shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns(*BUILT))
    shutil.copytree(PACKAGE, installed / "rlkernels", ignore=shutil.ignore_patterns("__pycache__"))
    return checkout, installed


QUICK = "--quick --tokens 6 --vocab 515 --rounds 1 --no-compile --no-peers --plain".split()


def test_the_command_measures_the_installed_kernels_and_says_so(folders):
    checkout, installed = folders
    arguments = ["-m", "benchmarks", *QUICK, "--case", "token_logprobs forward"]
    printed = run(checkout, [installed], *arguments)
    assert f" of {installed / 'rlkernels'}, backend cpu present, {cpu.isa()}\n" in printed
    printed = run(checkout, [checkout, installed], *arguments)  # named: the sources, which eager serves
    assert f" of {checkout / 'rlkernels'}, backend cpu absent: " in printed and "eager serves" in printed


@pytest.mark.parametrize(
    "start", ["-m pytest", str(Path(sys.executable).with_name("pytest"))], ids=["module", "program"]
)
def test_the_suite_of_timings_measures_the_installed_kernels_and_says_so(start, folders):
    """The module puts the checkout at the front of the path; the program does not."""
    checkout, installed = folders
    pytest.importorskip("pytest_benchmark")
    printed = run(checkout, [installed], *start.split(), "benchmarks/suite", "--collect-only", "-p", "no:cacheprovider")
    assert f"measured: rlkernels {rlkernels.__version__} of {installed / 'rlkernels'}, backend cpu present" in printed
