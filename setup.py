"""Builds ``rlkernels._cpu`` where a C++ compiler works; where none does the package is pure Python, says so and notes
why.

One generated ninja file per module: an edge per object with its depfile, an edge for the link. No torch: the kernels
see pointers. ``RLKERNELS_CPU=0|1|auto`` (default auto; 1: a failure is an error). ``CXX`` names the compiler,
``MAX_JOBS`` how many of them run side by side. ``rlkernels._cuda`` joins where nvcc and an NVIDIA driver are found, or
where ``RLKERNELS_CUDA=1`` asks for it: see ``setup_cuda.py``. What both builds share: ``setup_build.py``.
"""

import os
import platform
import sys
import time
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # not there when pip builds in isolation
import setup_build  # noqa: E402
import setup_cuda  # noqa: E402

X86 = platform.machine().lower() in ("x86_64", "amd64")

# rows.cpp is compiled once per instruction set, into a namespace of that name; the module chooses among them when it is
# loaded.
ISAS = {
    "baseline": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c",
}
SOURCES = [
    "rows_f64",
    "token_stats",
    "backward",
    "divergence",
    "fused_policy",
    "elementwise",
    "gae",
    "gemm",
    "isa",
    "buffer",
    "bindings",
]
# Younger than the others: a compiler may lack them (g++ before 10), and the bf16 matrix product is then absent.
BF16 = f"{ISAS['avx512']} -mavx512bf16"
AMX = f"{BF16} -mamx-tile -mamx-bf16"  # g++ 11
# No contraction: a fused multiply-add is written where it is meant, or bits would depend on what the compiler inlined.
FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -Wall -Wextra -Wno-psabi"
LINK = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"


def objects(bf16, amx):
    """``(object name, source, extra flags)`` of every edge; ``bf16``, ``amx``: whether the compiler has AVX512_BF16,
    and AMX besides.
    """
    for name in SOURCES:
        defines = ["-DRLK_X86"] * X86 + ["-DRLK_BF16"] * bf16 + ["-DRLK_AMX"] * amx
        yield name, f"csrc/cpu/{name}.cpp", " ".join(defines)
    if bf16:
        for name in ("gemm_bf16", "gemm_rounding"):
            yield name, f"csrc/cpu/{name}.cpp", BF16
    if amx:
        yield "gemm_amx", "csrc/cpu/gemm_amx.cpp", AMX
    if X86:
        yield "gemm_f32", "csrc/cpu/gemm_f32.cpp", ISAS["avx512"]
    for isa in ISAS if X86 else ["baseline"]:
        yield f"rows_{isa}", "csrc/cpu/rows.cpp", f"-DRLK_ISA={isa} {ISAS[isa]}"


def openmp_flag():
    """``-fopenmp`` where the compiler takes it: without it the kernels run on one thread."""
    code = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"
    return "-fopenmp" if setup_build.compiles(CXX, code, "-fopenmp") else "-Wno-unknown-pragmas"


def has_bf16():
    """Tell whether the compiler has AVX512_BF16; whether the machine has it is asked at run time."""
    code = (
        "#include <cpuid.h>\n#include <immintrin.h>\n"
        "int main() { __m512i x{}; return int(_mm512_reduce_add_ps(_mm512_dpbf16_ps(__m512{}, (__m512bh)x, "
        "(__m512bh)x))); }\n"
    )
    return X86 and setup_build.compiles(CXX, code, *BF16.split())


def has_amx():
    """Tell whether the compiler has the tile instructions, and the system the call that asks for their registers."""
    code = (
        "#include <immintrin.h>\n#include <sys/syscall.h>\n"
        "int main() { _tile_dpbf16ps(0, 1, 2); _tile_release(); return SYS_arch_prctl; }\n"
    )
    return X86 and sys.platform == "linux" and setup_build.compiles(CXX, code, *AMX.split())


def write_cpu(plan, include):
    openmp, cxx = openmp_flag(), setup_build.command(CXX)
    plan.rule("compile", f"{cxx} {FLAGS} {openmp} $extra -MD -MF $out.d -c $in -o $out", deps="gcc", depfile="$out.d")
    plan.rule("link", f"{cxx} {LINK} {openmp} $in -o $out")
    edges, bf16 = [], has_bf16()
    for name, source, extra in objects(bf16, bf16 and has_amx()):
        edges += plan.build(
            f"{name}.o", "compile", source, variables={"extra": f"{extra} {include}" if name == "bindings" else extra}
        )
    plan.build("_cpu.so", "link", edges)


def write_cuda(plan, include):
    setup_cuda.write_ninja(plan, ROOT, setup_build.command(CXX), include)


class Build(build_ext):
    """The command that compiles; a module that cannot be built is left out, where it is not asked for by name."""

    def run(self):
        self.failed = {}
        # The modules themselves are asked for, so nothing is left out in silence.
        if "build_ext" in self.distribution.commands:
            for name, reason in ABSENT.items():
                if reason and ASKED[name] == "" and name == "_cpu":  # most machines have no GPU, which is no failure
                    raise SystemExit(f"rlkernels.{name} cannot be built: {reason}")
        super().run()
        if self.inplace:
            package = self.get_finalized_command("build_py").get_package_dir("rlkernels")
            for name in WRITERS:
                # A module for a GPU elsewhere was asked for by an earlier command, and stays.
                if name == "_cuda" and ASKED[name] == "" and ABSENT[name]:
                    continue
                setup_build.note(package, name, *self.failed.get(name, [ABSENT[name]]))
            # The modules alone are copied beside the sources, and the report would stay behind.
            if "_cuda" not in self.failed and any(e.name == "rlkernels._cuda" for e in self.extensions):
                report = Path(self.build_lib, "rlkernels", setup_cuda.REPORT)
                setup_build.replace(report, Path(package, setup_cuda.REPORT))

    def build_extension(self, ext):
        name = ext.name.rpartition(".")[2]
        out = Path(self.get_ext_fullpath(ext.name)).resolve()
        start = time.monotonic()
        try:
            setup_build.make(name, Path(self.build_temp).resolve() / ext.name, out, ROOT, JOBS, WRITERS[name])
            if name == "_cuda":
                setup_build.replace(
                    Path(self.build_temp).resolve() / ext.name / setup_cuda.REPORT, out.parent / setup_cuda.REPORT
                )
            setup_build.note(out.parent, name)
            target = f" for {', '.join(f'sm_{arch}' for arch in setup_cuda.archs())}" if name == "_cuda" else ""
            setup_build.say(f"rlkernels.{name} was built{target} in {time.monotonic() - start:.0f} s")
        except setup_build.Failed as failed:
            variable, asked = VARIABLES[name], ASKED[name]
            if asked == "1" or (asked == "" and "build_ext" in self.distribution.commands):
                raise SystemExit(
                    f"rlkernels.{name} could not be built: {failed}; {variable}=auto goes without it, "
                    f"{variable}=0 does not try"
                ) from None
            self.failed[name] = str(failed), failed.output
            log = setup_build.note(out.parent, name, *self.failed[name])
            setup_build.say(
                f"rlkernels.{name} was not built, and the package goes without it: {failed}; log: {log}; "
                f"{variable}=1 makes this an error"
            )


class Python(build_py):
    """The command that copies Python files; it notes in the package why a module is absent that is not even tried."""

    def run(self):
        super().run()
        package = self.get_package_dir("rlkernels") if self.editable_mode else Path(self.build_lib, "rlkernels")
        for name, reason in ABSENT.items():
            setup_build.note(package, name, reason)
            if reason:
                setup_build.say(f"rlkernels.{name} is not built, and the package goes without it: {reason}")


VARIABLES = {"_cpu": "RLKERNELS_CPU", "_cuda": "RLKERNELS_CUDA"}
WRITERS = {"_cpu": write_cpu, "_cuda": write_cuda}
ASKED = {"_cpu": os.getenv("RLKERNELS_CPU", ""), "_cuda": os.getenv("RLKERNELS_CUDA", "")}
CPU = setup_build.switch("RLKERNELS_CPU", ASKED["_cpu"] or "auto")
CUDA = setup_build.switch("RLKERNELS_CUDA", ASKED["_cuda"] or "auto")
NO_CUDA = None if CUDA == "0" else setup_cuda.missing(CUDA)
CXX = setup_build.compiler() if CPU != "0" or not (CUDA == "0" or NO_CUDA) else []
JOBS = setup_build.jobs()
MISSING = setup_build.missing(CXX)
# Why a module is not even tried, or None; of one that nobody asked for there is nothing to say.
ABSENT = {
    "_cpu": "RLKERNELS_CPU=0 was set at install time; install without it to build" if CPU == "0" else MISSING,
    "_cuda": None if CUDA == "0" else NO_CUDA or MISSING,
}
for module, value in (("_cpu", CPU), ("_cuda", CUDA)):
    if value == "1" and ABSENT[module]:
        raise SystemExit(f"{VARIABLES[module]}=1, but {ABSENT[module]}; or unset it")

FILES = {
    "_cpu": sorted({source for _, source, _ in objects(X86, X86)}),
    "_cuda": sorted({source for _, source, _ in setup_cuda.kernels()} | {"csrc/cuda/bindings.cpp"}),
}
# Optional: what could not be built is not copied beside the sources either. _cuda first, because on a machine that is
# lent for minutes the module that only that machine can use must not be the one that a limit cuts off.
MODULES = [
    Extension(f"rlkernels.{module}", FILES[module], optional=True)
    for module, value in (("_cuda", CUDA), ("_cpu", CPU))
    if value != "0" and ABSENT[module] is None
]
setup(ext_modules=MODULES, cmdclass={"build_ext": Build, "build_py": Python})
