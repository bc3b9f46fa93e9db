"""Builds ``rlkernels._cpu`` where a C++ compiler is present; without one the package is pure Python and says so when asked.

One generated ninja file per module: an edge per object with its depfile, an edge for the link. No torch: the kernels see pointers.
``CXX`` names the compiler. ``rlkernels._cuda`` joins where ``RLKERNELS_CUDA`` asks for it: see ``setup_cuda.py``.
"""
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # not there when pip builds in isolation
import setup_cuda  # noqa: E402

CXX = shlex.split(os.getenv("CXX", "")) or [name for name in ("c++", "g++", "clang++") if shutil.which(name)][:1]
FOUND = bool(CXX) and shutil.which(CXX[0]) is not None
HEADERS = Path(sysconfig.get_path("include"), "Python.h").is_file()  # a Debian python3 without python3-dev has none
X86 = platform.machine().lower() in ("x86_64", "amd64")

if CXX and not FOUND:
    raise SystemExit(f"CXX={os.environ['CXX']} was not found on PATH; unset it to build without a compiler")

# rows.cpp is compiled once per instruction set, into a namespace of that name; the module chooses among them when it is loaded.
ISAS = {"baseline": "", "avx2": "-mavx2 -mfma -mf16c", "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c"}
SOURCES = ["rows_f64", "token_stats", "backward", "fused_policy", "elementwise", "scan", "gemm", "machine", "buffer", "bindings"]
# Younger than the others: a compiler may lack them (g++ before 10), and the bf16 matrix product is then absent.
BF16 = f"{ISAS['avx512']} -mavx512bf16"
# No contraction: a fused multiply-add is written where it is meant, or bits would depend on what the compiler inlined.
FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -Wall -Wextra -Wno-psabi"
LINK = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"


def objects(bf16):
    """``(object name, source, extra flags)`` of every edge; ``bf16``: whether the compiler has AVX512_BF16."""
    for name in SOURCES:
        yield name, f"csrc/cpu/{name}.cpp", " ".join(["-DRLK_X86"] * X86 + ["-DRLK_BF16"] * bf16)
    if bf16:
        for name in ("gemm_bf16", "rounding"):
            yield name, f"csrc/cpu/{name}.cpp", BF16
    if X86:
        yield "gemm_f32", "csrc/cpu/gemm_f32.cpp", ISAS["avx512"]
    for isa in ISAS if X86 else ["baseline"]:
        yield f"rows_{isa}", "csrc/cpu/rows.cpp", f"-DRLK_ISA={isa} {ISAS[isa]}"


def compiles(code, *flags):
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(code)
        command = [*CXX, *flags, str(source), "-o", str(source.with_suffix(""))]
        return subprocess.run(command, capture_output=True).returncode == 0


def openmp_flag():
    """``-fopenmp`` where the compiler takes it: without it the kernels run on one thread."""
    code = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"
    return "-fopenmp" if compiles(code, "-fopenmp") else "-Wno-unknown-pragmas"


def has_bf16():
    """Whether the compiler has AVX512_BF16; whether the machine has it is asked at run time."""
    code = ("#include <cpuid.h>\n#include <immintrin.h>\n"
            "int main() { __m512i x{}; return int(_mm512_reduce_add_ps(_mm512_dpbf16_ps(__m512{}, (__m512bh)x, (__m512bh)x))); }\n")
    return X86 and compiles(code, *BF16.split())


def write_cpu(plan, out, cxx, include):
    openmp = openmp_flag()
    plan.rule("compile", f"{cxx} {FLAGS} {openmp} {include} $extra -MD -MF $out.d -c $in -o $out", deps="gcc", depfile="$out.d")
    plan.rule("link", f"{cxx} {LINK} {openmp} $in -o $out")
    edges = [plan.build(f"{name}.o", "compile", str(ROOT / source), variables={"extra": extra})[0]
             for name, source, extra in objects(has_bf16())]
    plan.build(str(out), "link", edges)


class NinjaBuild(build_ext):
    def build_extension(self, ext):
        import ninja
        import pybind11
        from ninja.ninja_syntax import Writer

        out, tmp = Path(self.get_ext_fullpath(ext.name)).resolve(), Path(self.build_temp).resolve() / ext.name
        tmp.mkdir(parents=True, exist_ok=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        cxx, include = shlex.join(CXX), f"-I{pybind11.get_include()} -I{sysconfig.get_path('include')}"
        with open(tmp / "build.ninja", "w") as file:
            plan = Writer(file)
            if ext.name.endswith("_cuda"):
                setup_cuda.write_ninja(plan, ROOT, out, cxx, include)
            else:
                write_cpu(plan, out, cxx, include)
        subprocess.check_call([Path(ninja.BIN_DIR) / "ninja", "-C", tmp, f"-j{os.cpu_count() or 1}"])


MODULES = []
CUDA_WANTED = setup_cuda.wanted()  # asked in any case: a wish that cannot be met must not pass in silence
if FOUND and HEADERS:
    MODULES.append(Extension("rlkernels._cpu", sorted({source for _, source, _ in objects(X86)})))
    if CUDA_WANTED:
        MODULES.append(Extension("rlkernels._cuda", sorted({source for _, source, _ in setup_cuda.kernels()} | {"csrc/cuda/bindings.cpp"})))
setup(ext_modules=MODULES, cmdclass={"build_ext": NinjaBuild})
