"""The page of guarantees and the suite stay in step: each test that the page names exists, and each fault of ours has a
row and a test.
"""

import ast
import re

import pytest
from paths import ROOT, TESTS

PAGE = ROOT / "docs/guarantees.md"

pytestmark = pytest.mark.skipif(
    not PAGE.exists(), reason="the docs are not here: the tests run on an installed package"
)


def names_of_tests():
    """The name of every test function below ``tests``."""
    trees = (ast.parse(path.read_text()) for path in sorted(TESTS.rglob("test_*.py")))
    return {
        node.name
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_every_test_that_the_page_names_exists():
    named = set(re.findall(r"`(test_\w+)`", PAGE.read_text())) - {PAGE.stem}
    assert len(named) > 40, "the page names no tests: its tables were not read"
    assert sorted(named - names_of_tests()) == []


def test_every_promise_and_every_fault_names_a_test():
    rows = [line for line in PAGE.read_text().splitlines() if re.match(r"\| (\*\*|F\d)", line)]
    assert len(rows) > 35
    assert [row for row in rows if "`test_" not in row] == []


def test_every_fault_of_ours_has_its_row():
    found = [int(n) for n in re.findall(r"^\| F(\d+) ", PAGE.read_text(), re.MULTILINE)]
    assert found == list(range(120, 151))
