"""The launches of the host code that nvcc compiles, over a runtime that runs nothing.

``test_cuda_launches.py`` holds more of the same code as the host's compiler builds it. Here are nvcc's registration of
kernels, its headers and its calls: what a GPU machine runs.
"""

import fcntl
import json
import subprocess
from concurrent.futures import ThreadPoolExecutor

import host_build
import object_files
import ptxas
import pytest
from host_build import CUDA, CUDA_CALLS, HERE, setup_cuda

from benchmarks.gpu_model import launch_shapes

# PTX alone and without optimisation, because no device code runs.
FLAGS = "-std=c++17 -gencode=arch=compute_90a,code=compute_90a -Xcicc -O0 -DRLK_DTYPE=bf16 -DRLK_OUT=bf16"
SOURCES = (
    *(CUDA / f"{name}.cu" for name in ("token_stats", "backward", "fused_policy", "gae")),
    HERE / "nvcc_launches.cpp",
    HERE / "tools/stand_in_runtime.cpp",
)


def build(folder):
    """Path of the program; an object is compiled where its sources have changed."""
    words = [setup_cuda.NVCC, *FLAGS.split(), f"-I{CUDA}"]
    release = ptxas.release(setup_cuda.NVCC)

    def one(source):
        texts = [text for _, text in sorted(object_files.parts(source, [CUDA]).items())]
        made = folder / f"{source.stem}-{object_files.digest(release, FLAGS, *texts)}.o"
        if not made.exists():
            done = subprocess.run([*words, "-c", "-o", f"{made}.o", str(source)], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
            made.with_name(f"{made.name}.o").replace(made)
        return made

    with open(folder / "lock", "w") as lock:  # the workers of one test run ask for the same program
        fcntl.flock(lock, fcntl.LOCK_EX)
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(one, SOURCES))
        program = folder / object_files.digest(*(made.name for made in objects))
        if not program.exists():
            done = subprocess.run(
                [*words, "-cudart", "none", "-o", str(program), *map(str, objects)], capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr[-3000:]
    return program


@pytest.fixture(scope="module")
def launched(pytestconfig):
    """Calls of the runtime that one launcher makes."""
    if setup_cuda.NVCC is None or host_build.CXX is None:
        pytest.skip("nvcc was found neither on PATH nor under CUDA_HOME, or there is no C++ compiler")
    program = build(pytestconfig.cache.mkdir("nvcc_launches"))

    def run(kernel, rows, columns, failing=""):
        words = [str(program), kernel, str(rows), str(columns), *([failing] if failing else [])]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        *made, end = map(json.loads, done.stdout.splitlines())
        assert end == {"call": "end", "device": 0}, "the caller's device is the current one again"
        return made

    return run


@pytest.mark.parametrize("columns, cluster", ((24000, 1), (65536, 2), (128256, 4), (151936, 8), (600_000, 8)))
def test_a_row_of_the_fused_kernel_is_launched_on_its_cluster_with_the_shared_memory_that_was_asked_for(
    launched, columns, cluster
):
    clears, made = launched("fused_policy", 5, columns)
    assert clears == {"call": "memset", "device": 1, "value": 0, "bytes": 4, "stream": 77}
    supposed = launch_shapes.fused_policy(columns, 2, 2)
    assert supposed.cluster == cluster and ptxas.sass.short(made.pop("kernel")) == supposed.kernel
    assert made == {
        "call": "launch",
        "device": 1,
        "blocks": 5 * cluster,
        "threads": supposed.threads,
        "shared": supposed.shared,
        "cluster": cluster,
        "carveout": 100,
        "stream": 77,
    }


def test_every_other_kernel_is_the_one_that_was_meant_on_the_device_and_stream_of_its_tensors(launched):
    (stats,) = launched("token_stats", 8192, 151936)
    (back,) = launched("token_stats_backward", 8192, 151936)
    (scan,) = launched("gae", 64, 4096)
    names = [ptxas.sass.short(made["kernel"]) for made in (stats, back, scan)]
    assert names == ["token_stats<bf16,0,256>", "token_stats_backward<bf16,bf16,0,256>", "gae<fp32,256,8>"]
    assert [made["blocks"] for made in (stats, back, scan)] == [8192, 8192 * 10, 64]
    assert {(made["device"], made["stream"], made["cluster"]) for made in (stats, back, scan)} == {(1, 77, 1)}


def test_a_backward_pass_that_may_have_nothing_to_do_launches_four_blocks_per_multiprocessor(launched):
    (made,) = launched("token_stats_backward unless", 8192, 151936)
    assert made["blocks"] == 4 * 132


def test_no_rows_are_no_launch(launched):
    assert launched("token_stats", 0, 151936) == []


@pytest.mark.parametrize("failing", CUDA_CALLS)
def test_an_error_of_any_call_names_the_kernel_and_leaves_the_device_as_it_was(launched, failing):
    *_, last = launched("fused_policy", 1, 24000, failing)
    assert last == {"call": "error", "what": "fused_policy<bfloat16>: invalid argument"}
