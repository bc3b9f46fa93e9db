"""nvcc compiles every kernel for every target without spills, within the recorded registers, and for sm_90a within the
recorded instructions per element.

From the package's own build where that is a build of these sources for these targets, else from a compilation here,
kept by the hash of the sources.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import host_build
import ptxas
import pytest
from host_build import setup_cuda

import rlkernels

TARGETS = ("80", "90a", "100a", "120")
ROWS = ("token_stats", "backward", "fused_policy")
RECORDED = json.loads((host_build.HERE / "registers.json").read_text())
INSTRUCTIONS = json.loads((host_build.HERE / "instructions.json").read_text())
COUNTED = "90a"
"""The target whose instructions are counted."""


def installed_report():
    file = Path(rlkernels.__file__).parent / "_cuda.ptxas.txt"
    if not file.exists():
        return None
    text = file.read_text()
    current = text.startswith(f"sources {setup_cuda.digest(host_build.ROOT)}\n")
    return text if current and all(f"'sm_{target}'" in text for target in TARGETS) else None


def compile_all(folder):
    """The reports of all files and targets, two at a time. Machine code is kept for what is counted."""
    key = hashlib.sha256(
        (setup_cuda.digest(host_build.ROOT) + setup_cuda.FLAGS + ptxas.release(setup_cuda.NVCC)).encode()
    ).hexdigest()[:20]
    made = folder / key
    kept = made / "report.txt"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if kept.exists():
            return kept
        for old in folder.iterdir():
            if old.is_dir():
                shutil.rmtree(old)  # of other sources: megabytes each
        made.mkdir()

        def one(job):
            (name, source, extra), target = job
            code = made / f"{name}-{target}.cubin"
            command = [
                setup_cuda.NVCC,
                *setup_cuda.FLAGS.split(),
                *extra.split(),
                f"-gencode=arch=compute_{target},code=sm_{target}",
                "-Xptxas",
                "-v",
                "-cubin",
                "-o",
                str(code),
                str(host_build.ROOT / source),
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, f"{name} for sm_{target}:\n{done.stderr[-3000:]}"
            if target != COUNTED or not name.startswith(ROWS) or "f16" in name.replace("bf16", ""):
                code.unlink()
            return done.stderr

        with ThreadPoolExecutor(2) as pool:
            text = "".join(pool.map(one, [(kernel, target) for target in TARGETS for kernel in setup_cuda.kernels()]))
        kept.write_text(text)
        return kept


@pytest.fixture(scope="module")
def build(pytestconfig):
    """The report of ptxas, and the files with the machine code that is counted."""
    text = installed_report()
    if text is not None:
        return text, sorted(Path(rlkernels.__file__).parent.glob("_cuda*.so"))
    if setup_cuda.NVCC is None:
        pytest.skip("nvcc was found neither on PATH nor under CUDA_HOME: the CUDA kernels are not compiled here")
    kept = compile_all(pytestconfig.cache.mkdir("cuda_nvcc"))
    return kept.read_text(), sorted(kept.parent.glob("*.cubin"))


@pytest.fixture(scope="module")
def usage(build):
    return ptxas.parse(build[0])


@pytest.fixture(scope="module")
def counted(build):
    program = ptxas.sass.tool()
    if program is None:
        pytest.skip("cuobjdump was found neither on PATH nor under CUDA_HOME nor in Triton's wheel")
    # Kept beside the code, because the listing of all kernels takes seconds.
    source = hashlib.sha256(Path(ptxas.sass.__file__).read_bytes()).hexdigest()[:20]
    kept = build[1][0].parent / f"{source}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    found = ptxas.counted(build[1], program, f"sm_{COUNTED}")
    if kept.parent != Path(rlkernels.__file__).parent:
        kept.write_text(json.dumps(found))
    return found


def test_every_kernel_compiles_for_every_target_without_a_spill(usage):
    assert {f"sm_{target}" for target in TARGETS} <= {arch for _, arch in usage}
    spilled = {kernel: u for kernel, u in usage.items() if u.spills or u.stack}
    assert not spilled


def test_no_kernel_needs_a_tenth_more_registers_than_recorded(usage):
    """``python tests/backends/cuda_backend/ptxas.py`` prints the table anew; a rise wants a reason."""
    kernels = {kernel for kernel, _ in usage}
    assert kernels == set(RECORDED["registers"]), "the kernels differ from those of registers.json"
    if setup_cuda.NVCC is None or ptxas.release(setup_cuda.NVCC) != RECORDED["nvcc"]:
        pytest.skip(f"registers are recorded for nvcc {RECORDED['nvcc']}")
    grown = {
        (kernel, arch): (u.registers, RECORDED["registers"][kernel][arch])
        for (kernel, arch), u in usage.items()
        if u.registers > 1.1 * RECORDED["registers"][kernel].get(arch, 0) and f"{arch[3:]}" in TARGETS
    }
    assert not grown


def test_no_hot_loop_has_a_twentieth_more_instructions_per_element_or_bytes_than_recorded(counted):
    """``python tests/backends/cuda_backend/ptxas.py MODULE`` prints the table anew; a rise wants a reason."""
    assert set(counted) == set(INSTRUCTIONS["kernels"]), "the kernels differ from those of instructions.json"
    assert not [kernel for kernel, told in counted.items() if told["spills"]]
    for kernel, told in counted.items():
        kinds = {"gradient"} if "backward" in kernel else {"statistics"}
        assert set(told) & set(ptxas.sass.KINDS) == kinds | ({"gradient"} if "fused" in kernel else set()), kernel
    if setup_cuda.NVCC is None or ptxas.release(setup_cuda.NVCC) != INSTRUCTIONS["nvcc"]:
        pytest.skip(f"instructions are recorded for nvcc {INSTRUCTIONS['nvcc']}")
    grown = {
        (kernel, kind, what): (told[kind][what], was[kind][what])
        for kernel, was in INSTRUCTIONS["kernels"].items()
        for told in [counted[kernel]]
        for kind in set(was) & set(ptxas.sass.KINDS)
        for what in ("per_element", "loop_bytes")
        if told[kind][what] > 1.05 * was[kind][what]
    }
    assert not grown


@pytest.mark.skipif(host_build.CXX is None, reason="no C++ compiler")
def test_the_header_that_runs_kernels_on_the_cpu_finds_every_planted_fault():
    script = host_build.HERE / "tools" / "test_cuda_host.sh"
    done = subprocess.run(
        ["bash", str(script)], env={**os.environ, "NVCC": "none"}, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
