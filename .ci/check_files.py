"""Checks of files by their bytes, for the hooks of ``.pre-commit-config.yaml``.

python3 .ci/check_files.py trailing-whitespace|end-of-file|merge-conflict|large-files FILE ...

Needs the standard library alone, since a hook runs outside of the virtual environment.
"""

import re
import sys
from pathlib import Path

LARGE = 500_000
"""Bytes. The largest file of the repository has a tenth of it, and data of that size belongs elsewhere."""


def trailing_whitespace(data):
    """Yields the number of each line that ends with a blank, a tab or a carriage return."""
    yield from (k for k, line in enumerate(data.split(b"\n"), 1) if line != line.rstrip())


def end_of_file(data):
    """Yields the number of the last line unless exactly one newline ends it; an empty file is in order."""
    if data and (not data.endswith(b"\n") or data.endswith(b"\n\n")):
        yield data.count(b"\n", 0, -1) + 1


def merge_conflict(data):
    """Yields the number of each line that git leaves where two sides of a merge differ.

    The line between the sides is not looked for, because seven equals signs also underline a title.
    """
    yield from (k for k, line in enumerate(data.split(b"\n"), 1) if re.match(rb"(<{7}|>{7}|\|{7})( |$)", line))


def large_files(data):
    """Yields 1 for a file of more than ``LARGE`` bytes."""
    if len(data) > LARGE:
        yield 1


CHECKS = {
    "trailing-whitespace": trailing_whitespace,
    "end-of-file": end_of_file,
    "merge-conflict": merge_conflict,
    "large-files": large_files,
}


def main(check, *files):
    """Prints ``file:line: check`` for each fault; returns 1 if there was one, else 0."""
    faults = [f"{name}:{line}: {check}" for name in files for line in CHECKS[check](Path(name).read_bytes())]
    print(*faults, sep="\n", end="\n" if faults else "")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
