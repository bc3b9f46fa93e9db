"""What an install does where native code cannot be built, is not wanted, or lies under an awkward path (F142).

Everything runs the real ``setup.py`` on a copy of the sources. Compilers are shell scripts: one that fails, one that
writes empty files, and one that is the real one without optimisation, for the one whole build here.
"""

import ast
import os
import re
import runpy
import shutil
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from source_trees import CXX, FAILS, ROOT, copy, environment, needs_compiler, needs_sources, python, run, script, wheel

pytestmark = [needs_sources, pytest.mark.skipif(os.name != "posix", reason="shell scripts stand in for the compiler")]

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
# Says when it starts and ends, and leaves what ninja waits for; -o is the last option but for its argument.
EMPTY = """for last; do :; done
echo start >> "$RECORD"
sleep 0.2
echo end >> "$RECORD"
: > "$last"
"""


CALLS = """
logits, targets = torch.zeros(1, 4), torch.tensor([1])
{first}
for _ in range(2):
    print(float(rlkernels.token_logprobs(logits, targets)[0].exp()))
"""


@pytest.fixture
def source(tmp_path):
    return copy(tmp_path / "source")


@pytest.fixture(scope="module")
def without_native(tmp_path_factory):
    """``{how it came about: (package, name of the wheel, what the build said)}``, of builds without native code."""
    found = {}
    for how, variables in (
        ("failed", {"CXX": str(script(tmp_path_factory.mktemp("broken") / "c++", FAILS))}),
        ("switched off", {"RLKERNELS_CPU": "0"}),
    ):
        found[how] = wheel(copy(tmp_path_factory.mktemp("tree") / "source"), **variables)
    return found


@pytest.mark.fault(142)
def test_a_compiler_that_fails_costs_the_native_code_and_one_line_says_so(without_native):
    package, _, said = without_native["failed"]
    (line,) = [line for line in said.splitlines() if line.startswith("rlkernels:")]
    assert re.search(
        r"rlkernels._cpu was not built, and the package goes without it: \S+/c\+\+ failed: cc1plus: fatal "
        r"error: no space left on device; log: "
        r".+_cpu\.build\.log; RLKERNELS_CPU=1 makes this an error",
        line,
    )
    assert "Traceback" not in said and not list(package.rglob("*.so"))
    log = (package / "rlkernels/_cpu.build.log").read_text()
    # The sentence, then all that the compiler said.
    assert log.splitlines()[0].endswith("no space left on device") and "FAILED:" in log
    done = python(package, "print(rlkernels.available_backends()['absent']['cpu'])")
    assert done.stdout.strip() == log.splitlines()[0] and "no space left on device" in done.stdout


@pytest.mark.fault(142)
def test_the_first_native_less_call_of_a_process_warns_and_no_other(without_native):
    package = without_native["failed"][0]
    done = python(package, CALLS.format(first="rlkernels.available_backends(); print('reported', file=sys.stderr)"))
    assert done.stdout.split() == ["0.25", "0.25"] and done.stderr.startswith("reported")  # a report is no call
    warnings = [line for line in done.stderr.splitlines() if "RuntimeWarning" in line]
    assert len(warnings) == 1 and "rlkernels._cpu was not built" in warnings[0] and "RLKERNELS_CPU=0" in warnings[0]


@pytest.mark.fault(142)
@pytest.mark.parametrize(
    ("how", "first", "variables"),
    [
        ("switched off", "assert 'RLKERNELS_CPU=0 was set at install time' in cpu.available()[1]", {}),
        ("failed", "", {"RLKERNELS_CPU": "0"}),
        ("failed", "held = rlkernels.use_backend('eager'); held.__enter__()", {}),
    ],
)
def test_nothing_warns_where_native_code_is_not_wanted(without_native, how, first, variables):
    done = python(without_native[how][0], CALLS.format(first=first), **variables)
    assert done.stdout.split() == ["0.25", "0.25"] and "RuntimeWarning" not in done.stderr


@pytest.mark.fault(142)
def test_a_compiled_first_call_is_one_graph_without_native_code(without_native):
    done = python(
        without_native["failed"][0],
        """
        call = torch.compile(lambda x: rlkernels.token_logprobs(x, torch.tensor([1])), fullgraph=True, backend="eager")
        print(float(call(torch.zeros(1, 4))[0].exp()))""".replace("\n        ", "\n"),
    )
    assert done.stdout.strip() == "0.25"


@pytest.mark.fault(142)
def test_switched_off_the_wheel_is_pure(without_native):
    _, name, said = without_native["switched off"]
    assert name.endswith("-py3-none-any.whl") and "running build_ext" not in said


@pytest.mark.fault(142)
def test_the_switch_works_at_run_time_too():
    code = "import rlkernels; s = rlkernels.available_backends(); print(s['serves']['cpu']['gae'], s['absent']['cpu'])"
    done = run([sys.executable, "-c", code], env={**os.environ, "RLKERNELS_CPU": "0"})
    assert done.stdout.split(maxsplit=1) == ["eager", "RLKERNELS_CPU=0 is set; unset it before the import\n"]


@pytest.mark.fault(142)
def test_asked_for_by_1_a_failure_is_an_error_with_the_words_of_the_compiler(source, tmp_path):
    _, _, said = wheel(source, False, RLKERNELS_CPU="1", CXX=str(script(tmp_path / "c++", FAILS)))
    assert (
        "cc1plus: fatal error: no space left on device\n" in said
        and "RLKERNELS_CPU=auto goes without it" in said
        and "Traceback" not in said
    )


@pytest.mark.fault(142)
def test_an_old_module_does_not_survive_a_build_that_failed(source, tmp_path):
    old = source / "rlkernels" / f"_cpu{SUFFIX}"
    old.write_bytes(b"from other sources")
    run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=source,
        env=environment(RLKERNELS_CPU="auto", CXX=str(script(tmp_path / "c++", FAILS))),
    )
    assert not old.exists() and "no space left" in (source / "rlkernels/_cpu.build.log").read_text()


@pytest.mark.fault(142)
@pytest.mark.parametrize("jobs", [1, 3])
def test_as_many_compilers_run_as_MAX_JOBS_says_and_a_module_that_does_not_load_is_left_out(source, tmp_path, jobs):
    record = tmp_path / "record"
    package, _, said = wheel(source, CXX=str(script(tmp_path / "c++", EMPTY)), RECORD=str(record), MAX_JOBS=str(jobs))
    events = [1 if line == "start" else -1 for line in record.read_text().split()]
    # The probes and the link run alone; objects do side by side.
    assert max(sum(events[:k]) for k in range(len(events) + 1)) == jobs
    assert "the module was built and does not load: ImportError" in said and not list(package.rglob("*.so"))


@pytest.mark.fault(142)
@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RLKERNELS_CPU": "yes"}, "RLKERNELS_CPU must be 0, 1 or auto, got 'yes'"),
        (
            {"RLKERNELS_CPU": "1", "PATH": ""},
            "RLKERNELS_CPU=1, but no C++ compiler (c++, g++, clang++) was found at install time",
        ),
        (
            {"RLKERNELS_CUDA": "auto", "RLKERNELS_CUDA_ARCHS": "sm_90"},
            "RLKERNELS_CUDA_ARCHS must be all, or architectures such as '90a 120', got 'sm_90'",
        ),
        (
            {"RLKERNELS_CUDA": "auto", "RLKERNELS_CUDA_ARCHS": " "},
            "RLKERNELS_CUDA_ARCHS must be all, or architectures such as '90a 120', got ''",
        ),
        ({"MAX_JOBS": "0"}, "MAX_JOBS must be a whole number of at least 1, got '0'"),
        ({"MAX_JOBS": "many"}, "MAX_JOBS must be a whole number of at least 1, got 'many'"),
    ],
)
def test_a_switch_that_cannot_be_followed_is_refused(variables, message):
    done = run([sys.executable, "setup.py", "--version"], check=False, cwd=ROOT, env=environment(**variables))
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.fault(142)
def test_without_the_tools_of_the_build_the_package_goes_without_native_code(source):
    code = (
        "import runpy, sys; sys.modules['pybind11'] = None; sys.argv = ['setup.py', 'bdist_wheel']; "
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    done = run([sys.executable, "-c", code], cwd=source, env=environment())
    assert (
        "goes without it: pybind11 is not installed; build with isolation, or pip install pybind11 ninja" in done.stderr
    )


@pytest.mark.fault(142)
def test_without_headers_of_python_the_reason_names_them(tmp_path, monkeypatch):
    build = runpy.run_path(str(ROOT / "setup_build.py"))
    monkeypatch.setitem(build["missing"].__globals__, "HEADERS", tmp_path)
    assert build["missing"](["c++"]).startswith(
        f"no Python headers were found at install time (no Python.h in {tmp_path}); install python3-dev"
    )


@pytest.mark.fault(142)
@needs_compiler
def test_the_module_is_built_whatever_the_paths_are(tmp_path):
    """Sources, temporary files, headers and the compiler below a name with a blank, quotes, a dollar, a colon and
    letters that are not ASCII.
    """
    import pybind11

    odd = tmp_path / """a b 'c' "d" $HOME $x: é#%&"""
    copy(odd / "source")
    (odd / "temporary").mkdir()
    shutil.copytree(Path(pybind11.__file__).parent, odd / "site/pybind11")
    # Without optimisation: 20 s instead of a minute on one core, and the paths are the same.
    compiler = script(odd / "bin/c++", f'exec {CXX} "$@" -O0\n')
    package, _, said = wheel(
        odd / "source",
        RLKERNELS_CPU="1",
        TMPDIR=str(odd / "temporary"),
        PYTHONPATH=str(odd / "site"),
        CXX=str(compiler),
    )
    done = python(
        package,
        """print(cpu._cpu.__file__ if cpu._cpu else cpu.ABSENT)
print(rlkernels.available_backends()["serves"]["cpu"]["token_stats"])
x = torch.arange(12.0).reshape(2, 6).requires_grad_()
rlkernels.token_logprobs(x, torch.tensor([1, 5])).sum().backward()
print(x.grad.tolist())""",
    )
    file, backend, gradient = done.stdout.splitlines()
    assert Path(file).is_relative_to(odd) and backend == "cpu"
    x = torch.arange(12.0).reshape(2, 6)
    expected = torch.nn.functional.one_hot(torch.tensor([1, 5]), 6) - torch.softmax(x, -1)
    torch.testing.assert_close(torch.tensor(ast.literal_eval(gradient)), expected, rtol=1e-6, atol=1e-7)
    # A second build has nothing to do but link and copy: the plan names no folder that changes.
    done = run([sys.executable, "setup.py", "build_ext"], cwd=odd / "source", env=environment(CXX=str(compiler)))
    assert "no work to do" in done.stdout
