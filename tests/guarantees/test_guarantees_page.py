"""The page of guarantees and the suite stay in step, both ways.

Each fault that a test is marked with has a row, and each row names tests that exist and carry its number.
"""

import ast
import re
from collections import defaultdict

import pytest
from paths import ROOT, TESTS

PAGE = ROOT / "docs/guarantees.md"
LAST = 150
"""The number of the last fault."""

pytestmark = pytest.mark.skipif(
    not PAGE.exists(), reason="the docs are not here: the tests run on an installed package"
)


def trees():
    return {path: ast.parse(path.read_text()) for path in sorted(TESTS.rglob("*.py"))}


def is_mark(node):
    """Tells whether a node is a call such as ``pytest.mark.fault(23)``."""
    return isinstance(node, ast.Call) and ast.unparse(node.func).endswith("mark.fault")


def numbers_in(nodes):
    """The numbers of every mark within some nodes."""
    return {n for node in nodes for call in ast.walk(node) if is_mark(call) for n in map(ast.literal_eval, call.args)}


def sets_pytestmark(node):
    return isinstance(node, ast.Assign) and any(ast.unparse(target) == "pytestmark" for target in node.targets)


def marks_below(body, outer):
    """``(name of a test, its numbers)`` for every test of a module or class, whose own marks are ``outer``."""
    outer = outer | numbers_in(node.value for node in body if sets_pytestmark(node))
    for node in body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node.name, outer | numbers_in(node.decorator_list)
        elif isinstance(node, ast.ClassDef):
            yield from marks_below(node.body, outer | numbers_in(node.decorator_list))


def marks():
    """From the name of a test to the numbers of each function of that name."""
    tests = defaultdict(list)
    for tree in trees().values():
        for name, numbers in marks_below(tree.body, set()):
            tests[name].append(numbers)
    return tests


def tables():
    """``(cells of the head, cells of each row)`` of every table of the page."""
    for block in re.findall(r"(?:^\|.*\n)+", PAGE.read_text() + "\n", re.MULTILINE):
        head, _, *rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in block.splitlines()]
        assert all(len(row) == len(head) for row in rows), f"a row of the table {head} has other columns"
        yield [cell.strip("| ") for cell in head], [[cell.strip("| ") for cell in row] for row in rows]


def faults(last_column):
    """From each number to the last cell of its row, in the tables of faults whose last column has that name."""
    rows = {}
    for head, body in tables():
        if head[0] == "number" and head[-1] == last_column:
            for first, *_, last in body:
                ends = [int(n) for n in re.fullmatch(r"F(\d+)(?: to F(\d+))?", first).groups() if n]
                for number in range(ends[0], ends[-1] + 1):
                    assert number not in rows, f"F{number} has two rows"
                    rows[number] = last
    return rows


def named(cell):
    return re.findall(r"`(test_\w+)`", cell)


def test_every_test_that_the_page_names_exists():
    tests = set(named(PAGE.read_text())) - {PAGE.stem}
    assert len(tests) > 250, "the page names no tests: its tables were not read"
    assert sorted(tests - set(marks())) == []


def test_every_promise_and_every_fault_names_a_test():
    promises = [row for head, body in tables() if head[0] == "promise" for row in body]
    assert len(promises) > 10 and len(faults("tests")) > 130
    assert [row[0] for row in promises if not named(row[-1])] == []
    assert [number for number, cell in faults("tests").items() if not named(cell)] == []


def test_the_numbers_of_faults_have_no_gap():
    assert sorted([*faults("tests"), *faults("why no test holds it")]) == list(range(1, LAST + 1))


def test_every_number_that_a_test_is_marked_with_has_a_row_that_names_tests():
    marked = {n: name for name, functions in marks().items() for n in set().union(*functions)}
    assert len(marked) > 130, "the marks were not read"
    assert {n: name for n, name in marked.items() if n not in faults("tests")} == {}


def test_every_test_of_a_row_carries_the_number_of_the_row():
    tests = marks()
    rows = [(number, name) for number, cell in faults("tests").items() for name in named(cell)]
    # A name stands for every function that has it.
    assert [row for row in rows if not all(row[0] in numbers for numbers in tests[row[1]])] == []


def test_no_mark_stands_where_it_would_not_be_read():
    for path, tree in trees().items():
        calls = sum(is_mark(node) for node in ast.walk(tree))
        read = sum(
            is_mark(node)
            for parent in ast.walk(tree)
            for place in ([parent.value] if sets_pytestmark(parent) else getattr(parent, "decorator_list", []))
            for node in ast.walk(place)
        )
        assert calls == read, f"{path.name} marks a fault outside of a decorator and of pytestmark"


def test_a_number_in_the_code_or_on_another_page_has_a_row():
    known = {*faults("tests"), *faults("why no test holds it")}
    folders = ("rlkernels", "csrc", "tests", "benchmarks", "docs", "examples")
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*"))] + sorted(ROOT.glob("*.*"))
    texts = {p: p.read_text() for p in paths if p.suffix in {".py", ".md", ".h", ".cpp", ".cu", ".cuh"}}
    assert len(texts) > 200
    for path, text in texts.items():
        code = re.sub(r"# noqa: [A-Z0-9, ]+", "", text)  # the rules of the linter have such numbers, too
        unknown = {n for n in map(int, re.findall(r"\bF(\d+)\b", code)) if n not in known}
        assert not unknown, f"{path.name} names faults without a row: {sorted(unknown)}"
