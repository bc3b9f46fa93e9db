"""The hot loops of the kernels as compiled for sm_90: of ``csrc/cuda`` by nvcc, of the Triton backend by Triton.

Neither needs a device. What was compiled is kept under the folder that is given, by the sources and the compiler.
"""

import contextlib
import hashlib
import re
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import setup_cuda
from benchmarks import ROOT
from benchmarks.gpu_model import sass

CUDA = (
    "token_stats_bf16",
    "token_stats_f32",
    "backward_bf16_bf16",
    "backward_f32_bf16",
    "fused_policy_bf16_bf16",
    "fused_policy_f32_bf16",
    "gae",
)
"""The objects of ``setup_cuda.kernels`` that hold what is predicted."""


class Kernel(NamedTuple):
    """One compiled kernel: registers of a thread, bytes of shared memory that are not asked for at launch, and its hot
    loops by kind.
    """

    registers: int
    shared: int
    loops: dict[str, sass.Loop]


def cuobjdump() -> str:
    """Path of the program.

    Raises:
        RuntimeError: it is not here.
    """
    found = sass.tool()
    if found is None:
        raise RuntimeError("cuobjdump was found neither on PATH nor under CUDA_HOME nor in Triton's wheel")
    return found


def compilers() -> dict[str, str]:
    """The releases of nvcc and Triton that are here, such as 13.0 and 3.9: others allocate other registers."""
    found = {}
    if setup_cuda.NVCC is not None:
        said = subprocess.run([setup_cuda.NVCC, "--version"], capture_output=True, text=True, check=True).stdout
        release = re.search(r"release ([\d.]+)", said)
        found["cuda"] = release[1] if release else ""
    with contextlib.suppress(PackageNotFoundError):
        found["triton"] = ".".join(version("triton").split(".")[:2])
    return found


def read(file: Path, arch: str | None = None) -> dict[str, Kernel]:
    """``{mangled name: kernel}`` of a cubin, or of a module its code for ``arch``; fp16 is left out."""
    program = cuobjdump()
    usage = {m[1]: m for m in sass.USAGE.finditer(sass.asked(program, "-res-usage", file, arch))}
    found = {}
    for name, code in sass.parse(sass.asked(program, "-sass", file, arch)).items():
        if "6__half" not in name and name in usage:
            loops = {"scan": sass.scan_loop(code)} if "gae" in name else dict(sass.hot_loops(code))
            found[name] = Kernel(int(usage[name][2]), 0, loops)
    return found


def of_cuda(files: Iterable[Path], arch: str | None = None) -> dict[str, Kernel]:
    """``{short name: kernel}`` of the CUDA kernels in these files; cubins that hold none of them are not read."""
    found = {}
    for file in files:
        # Those for one target of several have its name behind that of the object.
        if file.suffix != ".cubin" or file.stem.removesuffix("-90a") in CUDA:
            found |= {sass.short(name): kernel for name, kernel in read(file, arch).items()}
    return found


def compile_cuda(folder: Path) -> list[Path]:
    """The cubins of ``CUDA``, by nvcc where they are not kept under ``folder``.

    Raises:
        RuntimeError: nvcc is not here, or it refused.
    """
    if setup_cuda.NVCC is None:
        raise RuntimeError(setup_cuda.missing("1") or "nvcc is not here")
    release = compilers()["cuda"]
    key = hashlib.sha256((setup_cuda.digest(ROOT) + setup_cuda.FLAGS + release).encode()).hexdigest()[:16]
    made = folder / f"cuda-{key}"
    made.mkdir(parents=True, exist_ok=True)

    def one(job: tuple[str, str, str]) -> Path:
        name, source, definitions = job
        target = made / f"{name}.cubin"
        if not target.exists():
            words = [setup_cuda.NVCC, *setup_cuda.FLAGS.split(), *definitions.split()]
            words += ["-gencode=arch=compute_90a,code=sm_90a", "-cubin", "-o", f"{target}.part", str(ROOT / source)]
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{name} does not compile:\n{done.stderr[-2000:]}")
            Path(f"{target}.part").replace(target)
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, [job for job in setup_cuda.kernels() if job[0] in CUDA]))


def compile_triton(folder: Path) -> dict[str, Kernel]:
    """``{name: kernel}`` of Triton's kernels for bf16 and a large vocabulary; ``fused_policy 32000``; and with the word
    ``head`` those of fp32 logits, whose gradient is bf16.

    The launchers run on CPU tensors under the stand-in for Triton's driver that the tests have; the driver is never
    asked to launch.

    Raises:
        RuntimeError: Triton is not here.
    """
    places = [str(ROOT / place) for place in ("tests/backends/triton_backend/tools", "tests/support")]
    sys.path[:0] = places
    try:
        import cases
        import torch
        from launches import compiled
        from measured import record
    except ImportError as error:
        raise RuntimeError(f"the kernels of Triton cannot be compiled here: {error}") from error
    finally:
        del sys.path[: len(places)]
    bf16, fp32, large = torch.bfloat16, torch.float32, 151936
    todo = {
        "token_stats": cases.stats(bf16, large, 1),
        "two_models": cases.stats(bf16, large, 17, ref=True),
        "token_stats_backward": cases.backward(bf16, large, (True, True, False)),
        "fused_policy": cases.policy("ppo_clip", bf16, large),
        "fused_policy 32000": cases.policy("ppo_clip", bf16, 32000),
        "token_stats head": cases.stats(fp32, large, 1),
        "token_stats_backward head": cases.backward(fp32, large, (True, True, False), out=bf16),
        "fused_policy head": cases.policy("ppo_clip", fp32, large, out=bf16),
        "gae": cases.scan("skip", False, True),
    }
    found = {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, call in todo.items():
        (launch,) = record(call, "sm_90")
        kernel = compiled(launch)
        code = kernel.asm["cubin"]
        file = folder / f"triton-{hashlib.sha256(code).hexdigest()[:16]}.cubin"
        file.write_bytes(code)
        (read_back,) = read(file).values()
        found[name] = read_back._replace(shared=kernel.metadata.shared)
    return found
