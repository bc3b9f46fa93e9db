"""nvcc compiles every kernel for every target without spills, within the recorded registers.

From the report of the package's own build where that is a build of these sources for these targets, else from a
compilation here, kept by the hash of the sources.
"""

import fcntl
import hashlib
import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import host_build
import ptxas
import pytest
from host_build import setup_cuda

import rlkernels

TARGETS = ("80", "90a", "100a", "120")
RECORDED = json.loads((host_build.HERE / "registers.json").read_text())


def installed_report():
    file = Path(rlkernels.__file__).parent / "_cuda.ptxas.txt"
    if not file.exists():
        return None
    text = file.read_text()
    current = text.startswith(f"sources {setup_cuda.digest(host_build.ROOT)}\n")
    return text if current and all(f"'sm_{target}'" in text for target in TARGETS) else None


def compile_all(folder):
    """The reports of all files and targets, two at a time."""
    key = hashlib.sha256(
        (setup_cuda.digest(host_build.ROOT) + setup_cuda.FLAGS + ptxas.release(setup_cuda.NVCC)).encode()
    ).hexdigest()[:20]
    kept = folder / f"{key}.txt"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if kept.exists():
            return kept.read_text()

        def one(job):
            (name, source, extra), target = job
            command = [
                setup_cuda.NVCC,
                *setup_cuda.FLAGS.split(),
                *extra.split(),
                f"-gencode=arch=compute_{target},code=sm_{target}",
                "-Xptxas",
                "-v",
                "-cubin",
                "-o",
                str(folder / f"{name}-{target}.cubin"),
                str(host_build.ROOT / source),
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, f"{name} for sm_{target}:\n{done.stderr[-3000:]}"
            return done.stderr

        with ThreadPoolExecutor(2) as pool:
            text = "".join(pool.map(one, [(kernel, target) for target in TARGETS for kernel in setup_cuda.kernels()]))
        kept.write_text(text)
        return text


@pytest.fixture(scope="module")
def usage(pytestconfig):
    text = installed_report()
    if text is None:
        if setup_cuda.NVCC is None:
            pytest.skip("nvcc was found neither on PATH nor under CUDA_HOME: the CUDA kernels are not compiled here")
        text = compile_all(pytestconfig.cache.mkdir("cuda_nvcc"))
    return ptxas.parse(text)


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


@pytest.mark.skipif(host_build.CXX is None, reason="no C++ compiler")
def test_the_header_that_runs_kernels_on_the_cpu_finds_every_planted_fault():
    script = host_build.HERE / "tools" / "test_cuda_host.sh"
    done = subprocess.run(
        ["bash", str(script)], env={**os.environ, "NVCC": "none"}, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
