"""The build's words on a compiled module that is absent."""

from pathlib import Path


def why_not(module, otherwise):
    """The reason that the build left beside the package, in one line; ``otherwise`` where it left none."""
    try:
        with open(Path(__file__).parents[1] / f"{module}.build.log", encoding="utf-8", errors="replace") as log:
            return log.readline().strip() or otherwise
    except OSError:
        return otherwise
