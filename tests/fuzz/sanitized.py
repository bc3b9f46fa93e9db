"""The native module under AddressSanitizer and UndefinedBehaviorSanitizer, built from a copy of the sources.

torch itself is not instrumented, but its memory comes from the C library, whose allocator is the sanitizer's here: what
our module reads or writes beside a tensor's storage shows. ``--self-check`` plants such a read, and wants it found.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build/sanitized"
COPIED = ("csrc", "rlkernels", "setup.py", "setup_build.py", "setup_cuda.py", "pyproject.toml", "README.md", "LICENSE")
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -g1"
RUNTIME = ("libasan.so", "libubsan.so", "libstdc++.so.6")
PLANT = ("csrc/cpu/gae.cpp", "live ? double(job.rewards[t])", "live ? double(job.rewards[t + 1])")
"""A file of the copy, and a mistake to plant in it: the old text and the new. The next build takes it out again."""


def environment(plant=False):
    """That of a Python process which runs the library with the sanitized module; builds it first."""
    _copy()
    if plant:
        _plant(FOLDER / PLANT[0])
    _build()
    runtime = [_run(_compiler()[0], f"-print-file-name={name}").strip() for name in RUNTIME]
    # A leak check would count every object of the interpreter; a C++ exception is not an error here.
    return {
        **os.environ,
        "PYTHONPATH": str(FOLDER),
        "LD_PRELOAD": " ".join(runtime),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:halt_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def _compiler():
    return os.environ.get("CXX", "c++").split()


def _copy():
    """The sources as they are now; files that did not change keep their time, so that only what did is
    compiled again.
    """
    for name in COPIED:
        for source in [ROOT / name] if (ROOT / name).is_file() else (ROOT / name).rglob("*"):
            target = FOLDER / source.relative_to(ROOT)
            if source.is_file() and source.suffix != ".so" and "__pycache__" not in source.parts:
                if not target.exists() or target.read_bytes() != source.read_bytes():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(source, target)


def _plant(path):
    text = path.read_text()
    if text.count(PLANT[1]) != 1:
        raise SystemExit(f"{path.name} does not hold the line to plant a mistake in: {PLANT[1]!r}")
    path.write_text(text.replace(*PLANT[1:]))


def _build():
    """``setup.py`` puts the words of ``CXX`` before its own flags, and loads what it has built, where no runtime of a
    sanitizer comes first.
    """
    print(
        f"building the native module under sanitizers in {FOLDER.relative_to(ROOT)}; the first time takes minutes",
        flush=True,
    )
    _run(
        sys.executable,
        "setup.py",
        "build_ext",
        "--inplace",
        cwd=FOLDER,
        env={
            **os.environ,
            "CXX": " ".join([*_compiler(), FLAGS]),
            "RLKERNELS_CPU": "1",
            "RLKERNELS_CUDA": "0",
            "ASAN_OPTIONS": "verify_asan_link_order=0:detect_leaks=0",
        },
    )


def _run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    return done.stdout
