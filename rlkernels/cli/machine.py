"""Names that a figure must bear: the machine, the versions and the exact sources that made it."""

import contextlib
import hashlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "rich", "matplotlib", "numpy")
SUFFIXES = {".py", ".h", ".cpp", ".cu", ".cuh"}


def version(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Python and every package that changes what is run."""
    return {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}}


def processor() -> str:
    """The processor's name as the kernel prints it."""
    with contextlib.suppress(OSError):  # no /proc: not Linux
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.lower().startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def last_level_cache() -> int | None:
    """Bytes of the largest cache of the first core, or None where the system does not tell."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text))
    return max(sizes, default=None)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def digest(root: Path) -> str:
    """SHA-256 over the names and bytes of the source files under ``root``."""
    total = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.suffix in SUFFIXES and p.is_file()):
        total.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return total.hexdigest()


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def sources() -> dict[str, object]:
    """Digests of the code that runs, and the commit of the checkout it came from.

    An installed package does not know its commit: the checkout in the current folder is named only if its ``rlkernels``
    is byte for byte the one that was imported.
    """
    package = Path(__file__).resolve().parents[1]
    found: dict[str, object] = dict.fromkeys(("native_sha256", "csrc_sha256", "commit", "dirty"))
    found["package_sha256"] = digest(package)
    for path in package.glob("_cpu*.so"):
        found["native_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    for root in (package.parent, Path.cwd()):
        if (
            (root / "csrc").is_dir()
            and (root / "rlkernels").is_dir()
            and digest(root / "rlkernels") == found["package_sha256"]
        ):
            found["csrc_sha256"] = digest(root / "csrc")
            found["commit"] = _git(root, "rev-parse", "HEAD")
            status = _git(root, "status", "--porcelain", "--untracked-files=no")
            found["dirty"] = None if status is None else bool(status)
            break
    return found


def describe() -> dict[str, object]:
    """Machine, versions and sources, for the JSON beside a figure."""
    return {
        "processor": processor(),
        "cores": cores(),
        "last_level_cache_bytes": last_level_cache(),
        "platform": platform.platform(),
        "versions": versions(),
        "sources": sources(),
    }
