"""The kernels as nvcc compiles them for every target: what ptxas says of them, and the machine code for sm_90a.

From the package's own build where that is a build of these sources for these targets, else from a compilation here,
kept by the hash of the sources.
"""

import fcntl
import hashlib
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import host_build
import ptxas
from host_build import setup_cuda

import rlkernels

TARGETS = ("80", "90a", "100a", "120")
KEPT = ("token_stats", "backward", "fused_policy", "gae")
COUNTED = "90a"
"""The target whose instructions are counted."""


def installed_report():
    file = Path(rlkernels.__file__).parent / "_cuda.ptxas.txt"
    if not file.exists():
        return None
    text = file.read_text()
    current = text.startswith(f"sources {setup_cuda.digest(host_build.ROOT)}\n")
    return text if current and all(f"'sm_{target}'" in text for target in TARGETS) else None


def compile_all(folder):
    """The reports of all files and targets, two at a time. Machine code is kept for what is counted."""
    key = hashlib.sha256(
        (setup_cuda.digest(host_build.ROOT) + setup_cuda.FLAGS + ptxas.release(setup_cuda.NVCC)).encode()
    ).hexdigest()[:20]
    made = folder / key
    kept = made / "report.txt"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if kept.exists():
            return kept
        for old in folder.iterdir():
            if old.is_dir():
                shutil.rmtree(old)  # of other sources: megabytes each
        made.mkdir()

        def one(job):
            (name, source, extra), target = job
            code = made / f"{name}-{target}.cubin"
            command = [
                setup_cuda.NVCC,
                *setup_cuda.FLAGS.split(),
                *extra.split(),
                f"-gencode=arch=compute_{target},code=sm_{target}",
                "-Xptxas",
                "-v",
                "-cubin",
                "-o",
                str(code),
                str(host_build.ROOT / source),
            ]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, f"{name} for sm_{target}:\n{done.stderr[-3000:]}"
            if target != COUNTED or not name.startswith(KEPT) or "f16" in name.replace("bf16", ""):
                code.unlink()
            return done.stderr

        with ThreadPoolExecutor(2) as pool:
            text = "".join(pool.map(one, [(kernel, target) for target in TARGETS for kernel in setup_cuda.kernels()]))
        kept.write_text(text)
        return kept


def build(folder):
    """The report of ptxas, and the files with the machine code that is counted; None without nvcc."""
    text = installed_report()
    if text is not None:
        return text, sorted(Path(rlkernels.__file__).parent.glob("_cuda*.so"))
    if setup_cuda.NVCC is None:
        return None
    kept = compile_all(folder)
    return kept.read_text(), sorted(kept.parent.glob("*.cubin"))
