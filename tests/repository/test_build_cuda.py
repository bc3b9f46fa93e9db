"""Whether an install builds the CUDA module, and for which GPUs.

Scripts stand in for nvcc and for the driver's program. What the real nvcc makes is tested in
``tests/backends/cuda_backend``.
"""

import os
import re
import runpy
import sys
import sysconfig

import pytest
from source_trees import CXX, FAILS, ROOT, copy, environment, needs_compiler, needs_sources, python, run, script, wheel

pytestmark = [needs_sources, pytest.mark.skipif(os.name != "posix", reason="shell scripts stand in for programs")]

SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
# Leaves an empty file, or a module that loads; nvcc says what ptxas would.
MODULES = """for last; do :; done
echo "$last" >> "$RECORD"
case "$last" in *.so) cp "$READY/$last" "$last";; *) : > "$last";; esac
case "$0" in *nvcc) echo "$*" >> "$RECORD.words"
echo "ptxas info : Used 63 registers, 0 bytes spill stores of $last" >&2;;
esac
"""
OLD_NVCC = "echo 'nvcc fatal : Unsupported gpu architecture compute_120' >&2\nexit 1\n"


def driver(folder, *capabilities):
    """A stand-in for the driver's program that names GPUs of these capabilities."""
    lines = "\n".join(f"echo {capability}" for capability in capabilities)
    return script(folder / "nvidia-smi", f'case "$1" in --query-gpu=compute_cap) ;; *) exit 2;; esac\n{lines}\n')


def path_of(*folders):
    """PATH with ``folders`` first, and without a real nvcc or driver behind them."""
    real = [f for f in os.environ["PATH"].split(os.pathsep) if not any(map(os.path.exists, programs(f)))]
    return os.pathsep.join([*map(str, folders), *real])


def programs(folder):
    return (os.path.join(folder, name) for name in ("nvcc", "nvidia-smi"))


@pytest.fixture
def source(tmp_path):
    return copy(tmp_path / "source")


@pytest.fixture
def made(tmp_path, source):
    """Runs a build whose compilers are stand-ins; gives the programs' folder and the words that nvcc got."""
    for name in ("_cuda", "_cpu"):
        code = tmp_path / f"{name}.cpp"
        code.write_text(
            f'#include <Python.h>\nstatic PyModuleDef about{{PyModuleDef_HEAD_INIT, "{name}", nullptr, -1}};\n'
            f'extern "C" PyMODINIT_FUNC PyInit_{name}(void) {{ return PyModule_Create(&about); }}\n'
        )
        run([CXX, "-shared", "-fPIC", f"-I{sysconfig.get_path('include')}", code, "-o", tmp_path / f"{name}.so"])
    script(tmp_path / "bin/nvcc", MODULES)
    record = tmp_path / "made"
    variables = {
        "CXX": str(script(tmp_path / "c++", MODULES)),
        "PATH": path_of(tmp_path / "bin"),
        "CUDA_HOME": str(tmp_path / "no home"),  # or /usr/local/cuda would be looked at
        "RECORD": str(record),
        "READY": str(tmp_path),
    }
    return tmp_path / "bin", variables, record


def plan(monkeypatch, path="", **variables):
    """``setup_cuda.py`` as a build sees it, with these variables."""
    for name in ("RLKERNELS_CUDA_ARCHS", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"PATH": path, "CUDA_HOME": "nowhere", **variables}.items():
        monkeypatch.setenv(name, str(value))
    return runpy.run_path(str(ROOT / "setup_cuda.py"))


@pytest.mark.fault(142)
@needs_compiler
def test_a_build_in_place_makes_the_cuda_module_first_and_leaves_what_ptxas_said_of_it(source, made):
    _, variables, record = made
    done = run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=source,
        env=environment(RLKERNELS_CUDA="1", RLKERNELS_CPU="1", **variables),
    )
    report = (source / "rlkernels/_cuda.ptxas.txt").read_text()
    assert report.startswith("sources ") and "63 registers, 0 bytes spill stores of gae.o" in report, done.stderr
    order = [name for name in record.read_text().split() if not os.path.isabs(name)]  # without the probes
    assert not {"rows_baseline.o", "_cpu.so"} & set(order[: order.index("_cuda.so")])
    assert {path.name for path in (source / "rlkernels").glob("_c*.so")} == {f"_cuda{SUFFIX}", f"_cpu{SUFFIX}"}


@needs_compiler
def test_where_nvcc_and_a_driver_are_an_install_builds_for_that_gpu_alone_and_tells_the_seconds(source, made):
    folder, variables, record = made
    driver(folder, "9.0", "9.0")
    package, _, said = wheel(source, RLKERNELS_CPU="0", RLKERNELS_CUDA="", **variables)
    assert re.search(r"^rlkernels: rlkernels\._cuda was built for sm_90a in \d+ s$", said, re.MULTILINE), said
    assert (package / f"rlkernels/_cuda{SUFFIX}").is_file()
    words = [line for line in record.with_suffix(".words").read_text().splitlines() if " -c " in line]
    assert len(words) == 15
    for line in words:
        assert re.findall(r"-gencode=(\S+)", line) == [
            "arch=compute_90a,code=sm_90a",
            "arch=compute_90,code=compute_90",  # for the driver of a later chip
        ]


@pytest.mark.parametrize("present", ("nvcc", "nvidia-smi", None))
def test_without_nvcc_or_a_driver_nothing_is_built_and_one_line_says_so(source, tmp_path, present):
    folder = tmp_path / "bin"
    folder.mkdir()
    if present == "nvcc":
        script(folder / "nvcc", FAILS)
    elif present:
        driver(folder, "9.0")
    package, name, said = wheel(
        source, RLKERNELS_CPU="0", RLKERNELS_CUDA="", PATH=path_of(folder), CUDA_HOME=str(tmp_path)
    )
    (line,) = [line for line in said.splitlines() if line.startswith("rlkernels: rlkernels._cuda")]
    reason = "no NVIDIA driver was found" if present == "nvcc" else "nvcc was found neither on PATH nor under CUDA_HOME"
    assert reason in line and "warning" not in line.lower()
    assert name.endswith("-py3-none-any.whl") and reason in (package / "rlkernels/_cuda.build.log").read_text()


@needs_compiler
def test_a_build_in_place_of_the_cpu_module_needs_no_gpu_and_keeps_a_cuda_module_made_for_one_elsewhere(source, made):
    folder, variables, _ = made
    old = source / "rlkernels" / f"_cuda{SUFFIX}"
    old.write_bytes(b"asked for by an earlier command")
    run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=source,
        env=environment(RLKERNELS_CUDA="", RLKERNELS_CPU="1", **variables),
    )
    assert old.exists() and (source / "rlkernels" / f"_cpu{SUFFIX}").exists()


@pytest.mark.fault(142)
def test_cuda_that_is_asked_for_needs_the_compiler_of_its_bindings(tmp_path):
    nvcc = script(tmp_path / "bin/nvcc", FAILS)
    done = run(
        [sys.executable, "setup.py", "--version"],
        check=False,
        cwd=ROOT,
        env=environment(RLKERNELS_CUDA="1", PATH=str(nvcc.parent)),
    )
    assert done.returncode != 0 and "RLKERNELS_CUDA=1, but no C++ compiler" in done.stderr


@pytest.mark.fault(59, 142)
@needs_compiler
@pytest.mark.parametrize("asked", ("", "auto"))
def test_an_nvcc_that_fails_costs_the_cuda_module_alone_or_is_an_error_where_it_is_asked_for(source, tmp_path, asked):
    folder = script(tmp_path / "it's $HOME/nvcc", OLD_NVCC).parent
    driver(folder, "12.0")
    variables = {"RLKERNELS_CPU": "0", "PATH": path_of(folder)}
    package, _, said = wheel(source, RLKERNELS_CUDA=asked, **variables)
    (line,) = [line for line in said.splitlines() if line.startswith("rlkernels: rlkernels._cuda")]
    assert "was not built" in line and "log: " in line and "RLKERNELS_CUDA=1 makes this an error" in line
    assert "Unsupported gpu architecture" in (package / "rlkernels/_cuda.build.log").read_text()
    done = python(package, "print(rlkernels.available_backends()['absent']['cuda'])")
    assert (
        done.stdout.startswith("rlkernels._cuda was not built: ")
        and "Unsupported gpu architecture compute_120" in done.stdout
    )
    if asked:
        return
    _, _, said = wheel(source, False, **{**variables, "RLKERNELS_CUDA": "1"})
    assert (
        "nvcc fatal : Unsupported gpu architecture compute_120\n" in said
        and "RLKERNELS_CUDA=auto goes without it" in said
        and "Traceback" not in said
    )


def test_switched_off_a_gpu_is_not_even_asked(source, tmp_path):
    script(tmp_path / "bin/nvcc", FAILS)
    script(tmp_path / "bin/nvidia-smi", f"echo asked > {tmp_path}/asked\necho 9.0\n")
    _, _, said = wheel(source, RLKERNELS_CPU="0", RLKERNELS_CUDA="0", PATH=path_of(tmp_path / "bin"))
    assert "_cuda" not in said and not (tmp_path / "asked").exists()


@pytest.mark.parametrize(
    ("found", "archs"),
    (
        (("9.0",), ("90a",)),
        (("8.0", "8.0"), ("80",)),
        (("8.9",), ("89",)),
        (("10.0",), ("100a",)),
        (("12.0",), ("120",)),
        (("12.0", "9.0"), ("90a", "120")),
        ((), ("80", "90a", "100a", "120")),
    ),
)
def test_the_targets_are_those_of_the_gpus_that_are_here(tmp_path, monkeypatch, found, archs):
    setup = plan(monkeypatch, driver(tmp_path, *found).parent)
    assert setup["archs"]() == archs


def test_named_targets_stand_in_for_the_driver(tmp_path, monkeypatch):
    script(tmp_path / "nvcc", FAILS)
    for asked, reason in ((None, "no NVIDIA driver"), ("all", None), ("90a 120", None)):
        named = {} if asked is None else {"RLKERNELS_CUDA_ARCHS": asked}
        setup = plan(monkeypatch, tmp_path, **named)
        absent = setup["missing"]("auto")
        assert absent is None if reason is None else reason in absent
        assert setup["missing"]("1") is None
    assert setup["archs"]() == ("90a", "120")
    assert plan(monkeypatch, tmp_path, RLKERNELS_CUDA_ARCHS="all")["archs"]() == setup["ALL"]


def test_a_gpu_that_is_older_than_any_target_of_the_tests_gets_no_module(tmp_path, monkeypatch):
    script(tmp_path / "nvcc", FAILS)
    setup = plan(monkeypatch, driver(tmp_path, "7.5").parent)
    assert "compute capability 7.5" in setup["missing"]("auto") and setup["missing"]("1") is None


@pytest.mark.parametrize(
    "body", ("exit 9\n", "echo 'No devices were found'\n", "exec sleep 60\n", "echo '[Not Supported]'\n")
)
@needs_compiler
def test_the_drivers_library_is_asked_where_its_program_says_nothing(tmp_path, monkeypatch, body):
    code = tmp_path / "driver.c"
    code.write_text(
        "int cuInit(unsigned flags) { return 0; }\nint cuDeviceGetCount(int* n) { *n = 2; return 0; }\n"
        "int cuDeviceGetAttribute(int* x, int what, int device) { *x = what == 75 ? 9 : 0; return 0; }\n"
    )
    run([CXX, "-x", "c", "-shared", "-fPIC", code, "-o", tmp_path / "libcuda.so.1"])
    script(tmp_path / "nvidia-smi", body)
    setup = plan(monkeypatch, f"{tmp_path}:/usr/bin:/bin", LD_LIBRARY_PATH=tmp_path)
    monkeypatch.setitem(setup["capabilities"].__wrapped__.__globals__, "LOOK", 2.0)
    assert setup["capabilities"]() == ("9.0",)


def test_a_driver_that_crashes_is_none(tmp_path, monkeypatch):
    setup = plan(monkeypatch)
    monkeypatch.setitem(setup["capabilities"].__wrapped__.__globals__, "DRIVER", "import os; os.abort()")
    assert setup["capabilities"]() == ()


def test_nvcc_is_looked_for_in_the_named_folders_first(tmp_path, monkeypatch):
    home, other, path = (script(tmp_path / name / "bin/nvcc", FAILS).parent for name in ("home", "other", "path"))
    both = {"CUDA_HOME": home.parent, "CUDA_PATH": other.parent}
    assert plan(monkeypatch, path, **both)["NVCC"] == str(home / "nvcc")
    assert plan(monkeypatch, path, CUDA_PATH=other.parent)["NVCC"] == str(other / "nvcc")
    assert plan(monkeypatch, path)["NVCC"] == str(path / "nvcc")
    assert plan(monkeypatch)["NVCC"] is None


def test_wheels_that_are_given_away_name_every_target():
    """Or a wheel made on a machine with a GPU would serve that one alone."""
    project = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^environment = \{.*RLKERNELS_CUDA = "0", RLKERNELS_CUDA_ARCHS = "all"\}$', project, re.MULTILINE)
    make = ROOT / "Makefile"
    assert not make.exists() or "RLKERNELS_CUDA_ARCHS=all" in make.read_text().split("\nwheel:")[1].split("\n\n")[0]
