"""The CUDA sources, unchanged, built for the CPU as a Python module: what the tests run where there is no GPU.

``tools/cuda_host.h`` stands in for CUDA's headers: one fiber per thread, clusters and shared memory included. Kernels, launchers and bindings
are the shipped ones. A build is kept under a folder named by the hash of all that went into it.
"""
import ctypes
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pybind11

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CSRC = Path(os.getenv("RLKERNELS_TEST_CSRC", ROOT / "csrc"))  # the mutation run points elsewhere
CUDA = CSRC / "cuda"
CXX = shutil.which(os.getenv("CXX", "c++"))
DTYPES = ("f32", "bf16", "f16")
BY_DTYPE = ("token_stats", "backward", "fused_policy")
ALONE = ("elementwise", "scan")

# As the CPU kernels: no contraction. The vector loads view 16-bit elements as 128-bit words, which C++ knows as aliasing and CUDA does not.
FLAGS = ("-std=c++17 -fPIC -fvisibility=hidden -ffp-contract=off -fno-strict-aliasing -Wall -Wextra -Wno-unknown-pragmas -Wno-maybe-uninitialized "
         "-Wno-psabi")
KINDS = {"plain": "-O1", "asan": "-O0 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined"}

ORDER = """#include "cuda_host.h"
extern "C" __attribute__((visibility("default"))) void cuda_host_order(const char* order) { cuda_host::set_order(order); }
"""


def sources():
    """Every file whose content decides what a build is."""
    files = [*CUDA.iterdir(), *CSRC.glob("*.h"), *(HERE / "tools").glob("*.h")]
    return sorted(f for f in files if f.suffix in (".h", ".cuh", ".cu", ".cpp"))


def digest(*more):
    text = hashlib.sha256("\n".join(more).encode())
    for file in sources():
        text.update(file.name.encode() + file.read_bytes())
    return text.hexdigest()[:20]


def build(folder, kind="plain"):
    """Path of the module of that kind, built under ``folder`` unless it is already there."""
    import ninja
    from ninja.ninja_syntax import Writer

    version = subprocess.run([CXX, "--version"], capture_output=True, text=True, check=True).stdout
    place = Path(folder) / f"{kind}-{digest(FLAGS, KINDS[kind], ORDER, version, sysconfig.get_config_var('SOABI'), pybind11.__version__)}"
    module = place / "_cuda.so"
    place.mkdir(parents=True, exist_ok=True)
    with open(place / "lock", "w") as lock:  # the workers of one test run ask for the same module
        fcntl.flock(lock, fcntl.LOCK_EX)
        if module.exists():
            return module
        (place / "order.cpp").write_text(ORDER)
        include = f"-I{HERE / 'tools'} -I{pybind11.get_include()} -I{sysconfig.get_path('include')}"
        with open(place / "build.ninja", "w") as file:
            plan = Writer(file)
            plan.rule("compile", f"{CXX} {FLAGS} $kind {include} $extra -c $in -o $out")
            plan.variable("kind", KINDS[kind])
            plan.rule("link", f"{CXX} -shared {KINDS[kind]} $in -o $out")
            edges = []
            for name in BY_DTYPE:
                for dtype in DTYPES:
                    edges += plan.build(f"{name}_{dtype}.o", "compile", str(CUDA / f"{name}.cu"), variables={"extra": f"-DRLK_DTYPE={dtype} -x c++"})
            for name in ALONE:
                edges += plan.build(f"{name}.o", "compile", str(CUDA / f"{name}.cu"), variables={"extra": "-x c++"})
            edges += plan.build("bindings.o", "compile", str(CUDA / "bindings.cpp"), variables={"kind": "-O1"})  # no arithmetic of ours in it
            edges += plan.build("order.o", "compile", "order.cpp")
            plan.build("linked.so", "link", edges)
        done = subprocess.run([Path(ninja.BIN_DIR) / "ninja", "-C", place, f"-j{min(os.cpu_count() or 1, 8)}"], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the CUDA sources do not compile for the CPU ({kind}):\n{done.stdout[-6000:]}")
        os.replace(place / "linked.so", module)
    return module


def load(path):
    """The module at ``path``; ``set_order`` chooses in which order its threads run: forward, reverse or random:<seed>."""
    spec = importlib.util.spec_from_file_location("_cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    choose = ctypes.CDLL(str(path)).cuda_host_order
    choose.argtypes = [ctypes.c_char_p]
    return module, lambda order: choose(order.encode())


def install(backend, module, patch=setattr):
    """Makes ``rlkernels.backends.cuda`` call ``module`` on CPU tensors: there is no device and no stream to name."""
    patch(backend, "_cuda", module)
    patch(backend, "_where", lambda tensor: (0, 0))
    return backend
