"""The CUDA sources, unchanged, built for the CPU as a Python module: what the tests run where there is no GPU.

``tools/cuda_host.h`` stands in for CUDA's headers: one fiber per thread, clusters and shared memory included.
``tools/cuda_host_runtime.h`` stands in for the runtime, and remembers what it is asked for. Kernels, launchers and
bindings are the shipped ones.
"""

import ctypes
import importlib.util
import json
import os
import shutil
import sysconfig
from pathlib import Path

import object_files
import pybind11
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
CUDA = ROOT / "csrc/cuda"
CXX = shutil.which(os.getenv("CXX", "c++"))
CUDA_CALLS = (
    "cudaGetDevice",
    "cudaSetDevice",
    "cudaDeviceGetAttribute",
    "cudaFuncSetAttribute",
    "cudaMemsetAsync",
    "cudaLaunchKernelEx",
)
"""The calls of the runtime in the host code; each of them may fail."""

spec = importlib.util.spec_from_file_location("setup_cuda", ROOT / "setup_cuda.py")
setup_cuda = importlib.util.module_from_spec(spec)
spec.loader.exec_module(setup_cuda)

# As the CPU kernels: no contraction. The vector loads view 16-bit elements as 128-bit words, which C++ knows as
# aliasing and CUDA does not.
FLAGS = (
    "-std=c++17 -fPIC -fvisibility=hidden -ffp-contract=off -fno-strict-aliasing -Wall -Wextra "
    "-Wno-unknown-pragmas -Wno-maybe-uninitialized "
    "-Wno-psabi"
)
KINDS = {
    "plain": "-O1",
    "tls": "-O1 -DCUDA_HOST_TLS_SHARED",
    "asan": "-O0 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined",
    "tsan": "-O1 -g1 -fsanitize=thread",
}


def objects(kind):
    """``(name, flags, source)`` of every object of the module; none of our arithmetic is in the bindings."""
    return (
        (name, f"{FLAGS} {KINDS[kind]} {definitions} -x c++", ROOT / source)
        for name, source, definitions in setup_cuda.kernels()
    )


def build(folder, kind="plain"):
    """Path of the module of that kind, built under ``folder`` unless it is already there."""
    bindings = f"{FLAGS} -O1 -I{pybind11.get_include()} -I{sysconfig.get_path('include')}"
    every = [
        *objects(kind),
        ("bindings", bindings, CUDA / "bindings.cpp"),
        ("order", f"{FLAGS} {KINDS[kind]}", HERE / "host_order.cpp"),
    ]
    return object_files.build(
        Path(folder) / kind, CXX, f"-shared {KINDS[kind]}", every, [HERE / "tools"], ".so", also=pybind11.__version__
    )


def program(folder, kind, cuda=CUDA):
    """Path of ``cluster_kernels.cpp`` with the kernels that it runs, from the sources in ``cuda``."""
    flags = f"{FLAGS} {KINDS[kind]}"
    every = [
        ("fused_policy_f32", f"{flags} -DRLK_DTYPE=f32 -DRLK_OUT=f32 -x c++", cuda / "fused_policy.cu"),
        *((name, f"{flags} -x c++", cuda / f"{name}.cu") for name in setup_cuda.ALONE),
        ("cluster_kernels", flags, HERE / "cluster_kernels.cpp"),
    ]
    return object_files.build(Path(folder) / kind, CXX, KINDS[kind], every, [HERE / "tools", cuda])


def load(path):
    """The module at ``path``; ``set_order`` chooses in which order its threads run: forward, reverse or
    random:<seed>.
    """
    spec = importlib.util.spec_from_file_location("_cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.know(torch.Tensor, torch.nn.Parameter)
    choose = ctypes.CDLL(str(path)).cuda_host_order
    choose.argtypes = [ctypes.c_char_p]
    return module, lambda order: choose(order.encode())


class Runtime:
    """The stand-in for the CUDA runtime inside a module that ``load`` has loaded."""

    def __init__(self, path):
        self.library = ctypes.CDLL(str(path))
        self.library.cuda_host_record.restype = ctypes.c_char_p

    def record(self):
        """Launches and fills since the last question, a dictionary each."""
        return [json.loads(line) for line in self.library.cuda_host_record().decode().splitlines()]

    def fail(self, call):
        """Makes the next call of that name return an error."""
        self.library.cuda_host_fail(call.encode())

    def runs(self, kernels):
        """Whether launches run their kernels; without, they are remembered alone."""
        self.library.cuda_host_runs(int(kernels))

    @property
    def device(self):
        """The current device."""
        return self.library.cuda_host_device()


def install(backend, module, patch=setattr):
    """Makes ``rlkernels.backends.cuda`` call ``module`` on CPU tensors: there is no device and no stream to name."""
    patch(backend, "_cuda", module)
    patch(backend, "_stream", lambda tensor: (0, 0))
    return backend
