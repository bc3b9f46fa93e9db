"""The plan of ``rlkernels._cuda`` for ``setup.py``: objects, compilers and flags.

Looks for nvcc and for an NVIDIA driver, and for nothing else of the machine.

``RLKERNELS_CUDA=0|1|auto`` (default auto: where nvcc and a driver are found; 1: a failure is an error).
``RLKERNELS_CUDA_ARCHS`` such as ``"90a 120"``: machine code for each, and PTX, which the driver compiles for other
chips when the module is first used there. ``all``: those of a wheel that is given away. The default is that of the GPUs
which the driver names, because four targets take four times as long; all of them where there is no driver. Named
targets stand in for the driver of auto. ``RLKERNELS_CUDA_FLAGS`` is added for nvcc (``-lineinfo`` for a profiler).
nvcc is looked for below ``CUDA_HOME`` and ``CUDA_PATH``, on PATH, and where neither is set below /usr/local/cuda.
"""

import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

REPORT = "_cuda.ptxas.txt"
ALL = ("80", "90a", "100a", "120")
OWN = ("90", "100")
"""Architectures with instructions that only their own code may use, which has an ``a`` behind the number."""
LOOK = 30.0
"""Seconds that a driver gets to answer: one that is not loaded yet takes several."""
DRIVER = """
import ctypes
driver = ctypes.CDLL("libcuda.so.1")
count, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
if driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0:
    for device in range(count.value):
        if not (driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
                or driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)):
            print(f"{major.value}.{minor.value}")
"""
"""Prints the compute capability of each GPU. A program of its own, because a driver may hang or crash."""


def _find_nvcc():
    homes = [home for home in (os.getenv("CUDA_HOME"), os.getenv("CUDA_PATH")) if home]
    places = [*(f"{home}/bin" for home in homes), None, *([] if homes else ["/usr/local/cuda/bin"])]
    return next((found for place in places if (found := shutil.which("nvcc", path=place))), None)


NVCC = _find_nvcc()


@functools.cache
def capabilities():
    """The compute capabilities of this machine's GPUs, such as ``("9.0",)``; none where no driver answers.

    Asked without torch, which a build does not have: the driver's own program first, then its library.
    """
    smi = shutil.which("nvidia-smi")
    queries = [[smi, "--query-gpu=compute_cap", "--format=csv,noheader"]] if smi else []
    for command in (*queries, [sys.executable, "-c", DRIVER]):
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=LOOK)
        except (OSError, subprocess.SubprocessError):
            continue
        found = [line.strip() for line in done.stdout.splitlines() if re.fullmatch(r"\d+\.\d", line.strip())]
        if done.returncode == 0 and found:
            return tuple(sorted(set(found), key=lambda capability: tuple(map(int, capability.split(".")))))
    return ()


def arch_of(capability):
    """The architecture of ``"9.0"`` as nvcc names it, with the instructions of that chip alone where it has them."""
    number = capability.replace(".", "")
    return number + "a" * (number in OWN)


@functools.cache
def archs():
    """The architectures to compile for: those named, those of the GPUs here, or all.

    Raises:
        SystemExit: ``RLKERNELS_CUDA_ARCHS`` is not a list of architectures.
    """
    text = os.getenv("RLKERNELS_CUDA_ARCHS")
    if text is None:
        return tuple(map(arch_of, capabilities())) or ALL
    named = ALL if text.strip() == "all" else tuple(text.split())
    if not named or not all(re.fullmatch(r"[1-9]\d{1,2}[af]?", arch) for arch in named):
        raise SystemExit(f"RLKERNELS_CUDA_ARCHS must be all, or architectures such as '90a 120', got {text.strip()!r}")
    return named


# No contraction: a fused multiply-add is written where it is meant, or bits would depend on what the compiler inlined.
FLAGS = "-std=c++17 -O3 -fmad=false -Xcompiler=-fPIC,-fvisibility=hidden " + os.getenv("RLKERNELS_CUDA_FLAGS", "")
# Compiled once per dtype, and what writes gradients once per dtype of those too, so that they build side by side.
DTYPES = ("f32", "bf16", "f16")
GRADIENTS = (*((d, d) for d in DTYPES), ("f32", "bf16"), ("f32", "f16"))
ALONE = ("elementwise", "gae")


def missing(asked):
    """Name what the build needs of CUDA and is not here, in one line, or None; ``asked``: the value of the switch.

    Raises:
        SystemExit: ``RLKERNELS_CUDA_ARCHS`` is not a list of architectures.
    """
    named = os.getenv("RLKERNELS_CUDA_ARCHS") is not None
    if named:
        archs()
    if NVCC is None:
        return "nvcc was found neither on PATH nor under CUDA_HOME; install the CUDA toolkit"
    if asked == "1" or named:
        return None
    if not capabilities():
        return (
            "no NVIDIA driver was found; RLKERNELS_CUDA=1 builds for a GPU that is elsewhere, "
            "RLKERNELS_CUDA_ARCHS names its architecture"
        )
    old = [capability for capability in capabilities() if int(capability.replace(".", "")) < int(ALL[0])]
    if old:
        return f"a GPU of compute capability {old[0]} is here, and the kernels are proven from 8.0 on"
    return None


def arch_flags():
    """Machine code for every arch, and PTX of the newest that is not above 90: unlike that of 120 it runs on every
    later chip.
    """
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs()]
    plain = sorted(int(a.rstrip("af")) for a in archs())
    ptx = max([a for a in plain if a <= 90], default=plain[0])
    return " ".join([*codes, f"-gencode=arch=compute_{ptx},code=compute_{ptx}"])


def kernels():
    """``(object name, source, definitions)`` of every file that nvcc compiles."""
    for dtype in DTYPES:
        yield f"token_stats_{dtype}", "csrc/cuda/token_stats.cu", f"-DRLK_DTYPE={dtype}"
    for source in ("backward", "fused_policy"):
        for dtype, out in GRADIENTS:
            yield f"{source}_{dtype}_{out}", f"csrc/cuda/{source}.cu", f"-DRLK_DTYPE={dtype} -DRLK_OUT={out}"
    for source in ALONE:
        yield source, f"csrc/cuda/{source}.cu", ""


def digest(root):
    """The hash of every source of the module: the report of a build says what it was a build of."""
    text = hashlib.sha256()
    for file in sorted(
        f
        for folder in ("csrc", "csrc/cuda")
        for f in Path(root, folder).iterdir()
        if f.suffix in (".h", ".cuh", ".cu", ".cpp")
    ):
        text.update(file.name.encode() + file.read_bytes())
    return text.hexdigest()


def write_ninja(plan, root, cxx, include):
    """Adds the rules and edges of ``_cuda.so`` to a ninja ``plan``, in whose folder ``csrc`` lies; ``cxx``: the C++
    compiler, as ninja wants it.

    What ptxas says of every kernel (registers, spills) is kept beside it, in ``REPORT``: the tests read it, and nobody
    compiles twice.
    """
    nvcc = shlex.quote(NVCC).replace("$", "$$")
    command = f"{nvcc} {FLAGS.replace('$', '$$')} {arch_flags()} -Xptxas -v $extra -MD -MF $out.d -c $in -o $out"
    plan.rule("nvcc", f"{command} 2> $out.log || (cat $out.log >&2; exit 1)", deps="gcc", depfile="$out.d")
    plan.rule(
        "cxx",
        f"{cxx} -std=c++17 -O2 -fPIC -fvisibility=hidden -Wall -Wextra {include} -MD -MF $out.d -c $in -o $out",
        deps="gcc",
        depfile="$out.d",
    )
    plan.rule(
        "link_cuda",
        f"{nvcc} -shared -cudart static $in -o $out && (echo sources {digest(root)}; cat *.o.log) > {REPORT}",
    )
    edges = [
        plan.build(f"{name}.o", "nvcc", source, variables={"extra": extra})[0] for name, source, extra in kernels()
    ]
    edges += plan.build("bindings.o", "cxx", "csrc/cuda/bindings.cpp")
    plan.build("_cuda.so", "link_cuda", edges)
