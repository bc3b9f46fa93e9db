"""nvcc compiles every kernel for every target without spills, within the recorded registers, and for sm_90a within the
recorded instructions per element.

From the package's own build where that is a build of these sources for these targets, else from a compilation here,
kept by the hash of the sources.
"""

import hashlib
import json
import os
import subprocess
from pathlib import Path

import host_build
import ptxas
import pytest
from host_build import setup_cuda
from nvcc_build import COUNTED, TARGETS

import rlkernels

RECORDED = json.loads((host_build.HERE / "registers.json").read_text())
INSTRUCTIONS = json.loads((host_build.HERE / "instructions.json").read_text())


@pytest.fixture(scope="module")
def usage(nvcc_build):
    return ptxas.parse(nvcc_build[0])


@pytest.fixture(scope="module")
def counted(nvcc_build):
    program = ptxas.sass.tool()
    if program is None:
        pytest.skip("cuobjdump was found neither on PATH nor under CUDA_HOME nor in Triton's wheel")
    # Kept beside the code, because the listing of all kernels takes seconds.
    source = hashlib.sha256(Path(ptxas.sass.__file__).read_bytes()).hexdigest()[:20]
    kept = nvcc_build[1][0].parent / f"{source}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    found = ptxas.counted(nvcc_build[1], program, f"sm_{COUNTED}")
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
