"""The plan of ``rlkernels._cuda`` for ``setup.py``: objects, compilers and flags.

Looks for nvcc and nothing else of the machine.

``RLKERNELS_CUDA=0|1|auto`` (auto: where nvcc works; 1: a failure is an error). The default is 0 until these kernels
have been measured on a GPU: they take minutes to build, and Triton serves GPUs before them. ``RLKERNELS_CUDA_ARCHS``
such as ``"90a 120"``: machine code for each, and PTX, which the driver compiles for other chips when the module is
first used there. ``RLKERNELS_CUDA_FLAGS`` is added for nvcc (``-lineinfo`` for a profiler). ``CUDA_HOME`` is searched
where nvcc is not on PATH.
"""

import hashlib
import os
import re
import shlex
import shutil
from pathlib import Path

DEFAULT = "0"
REPORT = "_cuda.ptxas.txt"
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path=f"{os.getenv('CUDA_HOME', '/usr/local/cuda')}/bin")
ARCHS = os.getenv("RLKERNELS_CUDA_ARCHS", "80 90a 100a 120").split()

# No contraction: a fused multiply-add is written where it is meant, or bits would depend on what the compiler inlined.
FLAGS = "-std=c++17 -O3 -fmad=false -Xcompiler=-fPIC,-fvisibility=hidden " + os.getenv("RLKERNELS_CUDA_FLAGS", "")
# Compiled once per dtype, and what writes gradients once per dtype of those too, so that they build side by side.
DTYPES = ("f32", "bf16", "f16")
GRADIENTS = (*((d, d) for d in DTYPES), ("f32", "bf16"), ("f32", "f16"))
ALONE = ("elementwise", "gae")


def missing():
    """Name what the build needs of CUDA and is not here, in one line, or None.

    Raises:
        SystemExit: ``RLKERNELS_CUDA_ARCHS`` is not a list of architectures.
    """
    if not ARCHS or not all(re.fullmatch(r"[1-9]\d{1,2}[af]?", arch) for arch in ARCHS):
        raise SystemExit(f"RLKERNELS_CUDA_ARCHS must be architectures such as '90a 120', got {' '.join(ARCHS)!r}")
    return "nvcc was found neither on PATH nor under CUDA_HOME; install the CUDA toolkit" if NVCC is None else None


def arch_flags():
    """Machine code for every arch, and PTX of the newest that is not above 90: unlike that of 120 it runs on every
    later chip.
    """
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHS]
    plain = sorted(int(a.rstrip("af")) for a in ARCHS)
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
