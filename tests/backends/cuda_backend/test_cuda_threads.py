"""The kernels whose threads talk to one another, in four builds and three thread orders: one answer, no race, nothing
uninitialised read.

As a program: ThreadSanitizer cannot be loaded into a Python that is already running.
"""

import os
import shutil
import subprocess

import host_build
import pytest

BUILDS, ORDERS = ("plain", "tls", "asan", "tsan"), ("forward", "reverse", "random:1")
SANITIZER = {"asan": "-fsanitize=address,undefined", "tsan": "-fsanitize=thread"}
pytestmark = pytest.mark.skipif(
    host_build.CXX is None, reason="no C++ compiler: the CUDA sources cannot be run on the CPU"
)


@pytest.fixture(scope="module")
def folder(pytestconfig):
    return pytestconfig.cache.mkdir("cuda_threads")


@pytest.fixture(scope="module")
def expected(folder):
    done = run(host_build.program(folder, "plain"), "forward")
    assert done.returncode == 0, done.stderr
    return done.stdout


def run(program, order):
    environment = {
        **os.environ,
        "CUDA_HOST_ORDER": order,
        "ASAN_OPTIONS": "detect_stack_use_after_return=0",
        "TSAN_OPTIONS": "exitcode=66:halt_on_error=1",
    }
    return subprocess.run([program], env=environment, capture_output=True, text=True, timeout=300)


def needs(kind, tmp_path):
    """Skips where the compiler has no such sanitizer, or its runtime does not start here."""
    if kind not in SANITIZER:
        return
    source, probe = tmp_path / "probe.cpp", tmp_path / "probe"
    source.write_text("int main() { return 0; }\n")
    built = subprocess.run([host_build.CXX, SANITIZER[kind], source, "-o", probe], capture_output=True, text=True)
    if built.returncode or subprocess.run([probe], capture_output=True).returncode:
        pytest.skip(f"{host_build.CXX} {SANITIZER[kind]}: no program of this build starts here")


@pytest.mark.fault(52)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", BUILDS)
def test_every_build_and_thread_order_gives_one_answer(kind, order, folder, expected, tmp_path):
    needs(kind, tmp_path)
    done = run(host_build.program(folder, kind), order)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == expected


def test_every_team_of_blocks_gives_one_answer(expected):
    for shape in ("[2, 1033]", "[1, 8199]"):
        assert len({line.split()[0] for line in expected.splitlines() if line.endswith(f"fused_policy {shape}")}) == 1


@pytest.mark.parametrize(
    "file, barrier",
    [("row_threads.cuh", "    sync();\n    Sums all"), ("gae.cuh", "    __syncthreads();\n    State state")],
)
def test_a_missing_barrier_of_a_cluster_or_a_block_is_reported(file, barrier, folder, tmp_path):
    needs("tsan", tmp_path)
    shutil.copytree(host_build.CUDA.parent, tmp_path / "csrc")
    planted = tmp_path / "csrc/cuda" / file
    assert planted.read_text().count(barrier) == 1
    planted.write_text(planted.read_text().replace(barrier, barrier.partition("\n")[2]))
    done = run(host_build.program(folder, "tsan", tmp_path / "csrc/cuda"), "forward")
    assert done.returncode == 66 and "data race" in done.stderr, done.stderr[-2000:]
