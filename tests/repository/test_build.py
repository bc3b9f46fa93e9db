"""The build: what the compiled module links to, an install without a compiler, a broken one, and the C++ sources under
sanitizers.
"""

import os
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import copytree

import pytest
from source_trees import CXX, ROOT, copy, environment, needs_compiler, needs_sources, run

from rlkernels.backends import cpu, cpu_matmul

ISA_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
}


@pytest.fixture
def source(tmp_path):
    return copy(tmp_path / "source")


@pytest.mark.fault(60)
@pytest.mark.skipif(not cpu.available()[0], reason="the module is not built")
def test_the_module_knows_nothing_of_torch():
    image = Path(cpu._cpu.__file__).read_bytes()
    for name in (b"libtorch", b"libc10", b"_ZN3c10", b"_ZN2at", b"torch"):
        assert name not in image, name


@needs_sources
@needs_compiler
def test_the_headers_compile_without_a_warning(tmp_path):
    for header in (
        "objectives.h",
        "dispatch.h",
        "objective_functions.h",
        "column_inputs.h",
        "arguments.h",
        "cpu/arguments.h",
        "cpu/gemm.h",
    ):
        unit = tmp_path / "unit.cpp"
        unit.write_text(f'#include "{header}"\nint main() {{}}\n')
        run(
            [
                CXX,
                "-std=c++17",
                "-fsyntax-only",
                "-Wall",
                "-Wextra",
                "-Werror",
                "-Wno-unknown-pragmas",
                f"-I{ROOT / 'csrc'}",
                unit,
            ]
        )


@needs_sources
@needs_compiler
def test_every_functor_is_instantiated_without_a_warning(tmp_path):
    unit = tmp_path / "unit.cpp"
    unit.write_text(
        '#include "dispatch.h"\nint main() {\n  return rlk::find_objective<float>("k1") && '
        'rlk::find_objective<double>("k1") ? 0 : 1;\n}\n'
    )
    run([CXX, "-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}", unit, "-o", tmp_path / "unit"])
    run([tmp_path / "unit"])


@needs_sources
def test_without_a_compiler_the_install_succeeds_and_says_what_is_absent(source, tmp_path):
    empty = tmp_path / "no programs here"
    empty.mkdir()
    copytree(ROOT / "benchmarks", source / "benchmarks")  # beside the package, and not to be in the wheel
    run(
        [
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "wheel",
            "-q",
            "--no-build-isolation",
            "--no-deps",
            "--no-index",
            "-w",
            tmp_path,
            source,
        ],
        env=environment(PATH=str(empty)),
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "installed")
    assert "rlkernels/py.typed" in names and "rlkernels/backends/cpu.py" in names
    assert "rlkernels/integrations/hub/kernel/torch-universal/metadata.json" in names
    assert not [name for name in names if name.endswith(".so")]
    assert {name.split("/")[0].split("-")[0] for name in names} == {"rlkernels"}
    # An editable install of this tree would lend its own _cpu to the one under test.
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if not getattr(f, '__module__', "
        "'').startswith('__editable__')];"
        "import torch, rlkernels; from rlkernels.backends import cpu; assert cpu._cpu is None; "
        "print(cpu.available()[1]);"
        "print(float(rlkernels.token_logprobs(torch.zeros(1, 4), torch.tensor([1]))[0].exp()))"
    )
    done = run([sys.executable, "-c", code], env=environment(PYTHONPATH=str(tmp_path / "installed")), cwd=tmp_path)
    reason, probability = done.stdout.splitlines()
    assert reason.startswith(
        "rlkernels._cpu was not built: no C++ compiler (c++, g++, clang++) was found at install time; install g++"
    )
    assert abs(float(probability) - 0.25) < 1e-6


@needs_sources
@pytest.mark.skipif(os.name != "posix", reason="a shell script stands in for the compiler")
def test_a_broken_compiler_fails_loudly_with_its_own_message(source, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'cc1plus: no space left on device' >&2\nexit 1\n")
    compiler.chmod(0o755)
    done = run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        check=False,
        cwd=source,
        env=environment(CXX=str(compiler)),
    )
    assert done.returncode != 0 and "cc1plus: no space left on device" in done.stdout + done.stderr


@needs_sources
@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"RLKERNELS_CUDA": "1", "PATH": "", "CUDA_HOME": "nowhere"},
            "RLKERNELS_CUDA=1, but nvcc was found neither on PATH nor under CUDA_HOME",
        ),
        ({"RLKERNELS_CUDA": "yes"}, "RLKERNELS_CUDA must be 0, 1 or auto, got 'yes'"),
        ({"CXX": "no-such-compiler -O2"}, "CXX=no-such-compiler -O2 was not found on PATH"),
    ],
)
def test_a_wish_that_cannot_be_met_is_refused(variables, message):
    done = run([sys.executable, "setup.py", "--version"], check=False, cwd=ROOT, env=environment(**variables))
    assert done.returncode != 0 and message in done.stderr


@needs_sources
@needs_compiler
@pytest.mark.skipif(not cpu.available()[0], reason="the module says which instruction set this machine has")
@pytest.mark.skipif(sys.platform != "linux", reason="the sanitizers' runtime is only sure to be there on Linux")
def test_the_kernels_are_clean_under_address_and_undefined_behaviour_sanitizers(tmp_path):
    isa = "avx512" if cpu.isa() == "amx" else cpu.isa()
    flags = [
        "-std=c++17",
        "-O0",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-ffp-contract=off",
        "-Wno-psabi",
        "-fopenmp",
        f"-I{ROOT / 'csrc'}",
        f"-DRLK_ISA={isa}",
        *ISA_FLAGS[isa],
    ]
    names = ["rows", "rows_f64", "token_stats", "backward", "fused_policy", "elementwise", "gae", "gemm"]
    if cpu_matmul.fp32_available():
        flags += ["-DRLK_EMULATED_TILES"]
        names += ["gemm_f32", "gemm_amx"]
    if cpu_matmul.available():
        flags += ["-DRLK_BF16", "-mavx512bf16"]
        names += ["gemm_bf16", "gemm_rounding"]
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() {}\n")
    if run([CXX, *flags, probe, "-o", tmp_path / "probe"], check=False).returncode != 0:
        pytest.skip("this compiler has no sanitizers")
    sources = [ROOT / "csrc" / "cpu" / f"{name}.cpp" for name in names] + [
        ROOT / "tests/backends/cpu_backend/sanitized.cpp"
    ]
    objects = [tmp_path / f"{path.stem}.o" for path in sources]
    # Plain C++ instead of the tile instructions, because a sanitizer sees no address that an instruction reads.
    tiles = "-include", ROOT / "tests/backends/cpu_backend/amx_emulation.h"

    def compile_one(source, result):
        run([CXX, *flags, *(tiles if source.stem == "gemm_amx" else ()), "-c", source, "-o", result])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, sources, objects))
    run([CXX, *flags, *objects, "-o", tmp_path / "sanitized"])
    assert run([tmp_path / "sanitized"]).stdout.strip() == "clean"
