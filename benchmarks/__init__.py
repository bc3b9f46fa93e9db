"""Benchmarks of rlkernels beside torch and other libraries: ``python -m benchmarks`` from the repository's root.

This package decides which ``rlkernels`` is measured, so import it first. Python puts the current folder at the front
of ``sys.path``, where the sources of a checkout hide the installed package. Sources without a compiled module are
served by eager, and its times would pass for those of the kernels.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def means(entry: str, folder: Path) -> bool:
    """Tells whether an entry of a search path is this folder; an empty one is the current folder."""
    return Path(entry or os.curdir).resolve() == folder


def behind(path: list[str], folder: Path) -> list[str]:
    """The search path with ``folder`` at its end, if it is in it at all."""
    own = [entry for entry in path if means(entry, folder)]
    return [entry for entry in path if entry not in own] + own


def chosen(folder: Path) -> bool:
    """Tells whether ``folder`` is to come first: it holds a compiled module, or ``PYTHONPATH`` names it."""
    named = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    return any((folder / "rlkernels").glob("_c*.so")) or any(means(entry, folder) for entry in named)


if "rlkernels" not in sys.modules and not chosen(ROOT):
    sys.path[:] = behind(sys.path, ROOT)
