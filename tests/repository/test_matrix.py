"""The matrix of versions: its rows are what is promised, its page holds a clean run of each, and its reader of pytest's
words can be trusted.
"""

import ast
import re
import sys
from fnmatch import fnmatch

import matrix
import pytest

ROOT = matrix.ROOT
PYPROJECT, PAGE = ((ROOT / name).read_text() for name in ("pyproject.toml", "docs/versions.md"))
LINES = [
    [cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if re.match(r"\| 3\.", line)
]


@pytest.mark.fault(57)
def test_the_rows_hold_the_oldest_versions_that_are_promised_and_the_ones_that_the_suite_runs_with():
    oldest = {name: re.search(rf'{name}>=([\d.]+)"', PYPROJECT)[1] for name in ("torch", "triton")}
    python = re.search(r'requires-python = ">=([\d.]+)"', PYPROJECT)[1]
    pinned = re.search(r"^torch==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    tested = re.search(r"^TRITON \?= (.+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert matrix.ROWS[0][:2] == (python, f"{oldest['torch']}.0")
    assert {pinned, "newest"} < {row.torch for row in matrix.ROWS}
    versions = [version for row in matrix.ROWS for version in row.triton]
    assert set(tested) < set(versions) and min(versions, key=lambda v: [*map(int, v.split("."))]).startswith(
        oldest["triton"]
    )


@pytest.mark.parametrize("row", matrix.ROWS, ids=lambda row: row.name)
def test_the_page_shows_a_clean_run_of_every_row_or_says_that_there_was_none(row):
    mine = [
        line
        for line in LINES
        if line[0].startswith(f"{row.python}.") and (row.torch == "newest" or line[1].startswith(row.torch))
    ]
    parts = ["core", *(f"Triton {version}" for version in row.triton), "trainers"]
    shown = [line[4].split(":")[0] for line in mine]
    for part in parts:
        absent = re.search(rf"^\* {re.escape(row.name)}, {part}: not (run|clean)\b", PAGE, re.MULTILINE)
        assert shown.count(part) == int(not absent), f"{part}: the page shows a run, or says that there was none"
    assert shown == [part for part in parts if part in shown]
    for line in mine:
        assert int(line[5].replace(",", "")) > 1000 or line[4].startswith("Triton")
        assert line[6] == "0" and re.fullmatch(r"[0-9a-f]{7,}, \d{4}-\d\d-\d\d", line[8]), line


def test_what_is_left_out_and_what_runs_with_trainers_is_there():
    for name in (*matrix.NOT_CORE, *matrix.WITH_TRAINERS):
        assert list(ROOT.glob(name)), f"{name} names nothing"


def imported(tree):
    """Yields the first names of what a module imports when it is imported."""
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (name.name for name in node.names) if isinstance(node, ast.Import) else [node.module]


def test_the_core_imports_nothing_that_its_environment_lacks():
    """A test module that cannot be imported ends the run of every row before its first test."""
    files = sorted((ROOT / "tests").rglob("*.py"))
    # Torch brings filelock.
    there = {"torch", "filelock", "rlkernels", "benchmarks", *sys.stdlib_module_names, *(path.stem for path in files)}
    there |= {path.name for path in (ROOT / "tests").iterdir()}
    there |= {"yaml" if tool == "pyyaml" else tool.replace("-", "_") for tool in matrix.TOOLS}
    for path in files:
        name = path.relative_to(ROOT).as_posix()
        left_out = any(fnmatch(name, glob) or name.startswith(f"{glob}/") for glob in matrix.NOT_CORE)
        if path.name.startswith("test_") and not left_out:
            absent = {module.split(".")[0] for module in imported(ast.parse(path.read_text()))} - there
            assert not absent, f"{name} imports {absent}: add it to TOOLS, or leave the file out of the core"


@pytest.mark.parametrize(
    ("said", "passed", "failed", "skipped"),
    [
        ("....\n5 passed in 0.30s\n", 5, 0, 0),
        ("F\nFAILED tests/x.py::y\n1 failed, 7776 passed, 3 skipped, 58 warnings in 1106.16s (0:18:26)\n", 7776, 1, 3),
        ("E\n2 passed, 1 error in 1.00s", 2, 1, 0),
        ("2 errors in 1.00s", 0, 2, 0),
        ("no tests ran in 0.01s", 0, 1, 0),  # a run without a test proves nothing
        ("ImportError: no module named pytest", 0, 1, 0),
    ],
)
def test_the_closing_line_of_pytest_is_read(said, passed, failed, skipped):
    assert matrix.counts(said) == {"passed": passed, "failed": failed, "skipped": skipped}
