"""The pages that say where things are: the tree, the table and the layers of CONTRIBUTING.md, and the README of the
backends, held against the files.
"""

import ast
import re
from fnmatch import fnmatch

import pytest
from paths import ROOT
from test_architecture import LAYERS

from rlkernels.backends import KNOWN, OPS
from rlkernels.cli import COMMANDS
from rlkernels.losses import row_objectives

PAGE = (ROOT / "CONTRIBUTING.md").read_text()
BACKENDS = ROOT / "rlkernels" / "backends"
PROSE = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")]
PROSE += [*sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / ".github").rglob("*.md"))]
READMES = [BACKENDS / "README.md", *(ROOT / name / "README.md" for name in ("csrc", "tests", "benchmarks"))]
PROSE += READMES
WITHOUT_FIGURES = [path for path in PROSE if path.stem not in ("performance", "scaling", "versions")]
DOCSTRINGS = [path for folder in ("rlkernels", "benchmarks", "csrc") for path in sorted((ROOT / folder).rglob("*.py"))]
DOCSTRINGS += sorted(ROOT.glob("setup*.py"))
HEADLESS = re.compile(r"\s*(What|Which|Of|Where|How|None|Whether)\b")
LEFT_BEHIND = re.compile(r"_cpu\.build\.log$|benchmarks/results|[*{<]")
"""Names that a page may use for what a build or a run makes, and for several files at once."""


def section(title):
    return PAGE.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def block(text):
    return text.split("```\n")[1].splitlines()


def listed(lines):
    """Yields ``(path, has lines below it)`` of a tree whose folders end with a slash and whose levels are two blanks
    deep.
    """
    folders = []
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        parts = re.fullmatch(r"( *)(\S+)  +\S.*", line)
        assert parts, f"{line!r} is not a name, two blanks or more, and a few words"
        indent, name = parts.groups()
        depth = len(indent) // 2
        assert len(indent) % 2 == 0 and depth <= len(folders), f"{line!r} is indented under nothing"
        folders = folders[:depth]
        yield "".join(folders) + name, following.startswith(f"{indent}  ")
        if name.endswith("/"):
            folders.append(name)


def answers():
    """Yields ``(question, [(path, names), ...])`` for each row of the table."""
    for row in re.findall(r"^\| (?!Where is)(.+) \| (.+) \|$", section("Where is ..."), re.MULTILINE):
        places = []
        for word in re.findall(r"`([^`]+)`", row[1]):
            if "/" in word:
                places.append((word, []))
            else:
                places[-1][1].append(word)
        yield row[0], places


TREE = list(listed(block(section("The tree"))))
ANSWERS = list(answers())


def test_every_path_of_the_tree_is_there_once():
    paths = [path for path, _ in TREE]
    assert len(paths) == len(set(paths))
    for path in paths:
        there = (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file()
        assert there, f"the tree of CONTRIBUTING.md names {path}, which is not there"


def test_every_module_of_the_package_is_in_the_tree():
    files = {path for path, _ in TREE if not path.endswith("/")}
    whole = tuple(path for path, has_lines in TREE if path.endswith("/") and not has_lines)
    for path in sorted((ROOT / "rlkernels").rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        assert name in files or name.startswith(whole), f"{name} has no line in the tree of CONTRIBUTING.md"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["a/  x", "  b.py  x", "c/  x"], [("a/", True), ("a/b.py", False), ("c/", False)]),
        (
            ["a/  x", "  b/  x", "    c.py  x", "d.py  x"],
            [("a/", True), ("a/b/", True), ("a/b/c.py", False), ("d.py", False)],
        ),
    ],
)
def test_a_tree_is_read_as_it_is_drawn(lines, expected):
    assert list(listed(lines)) == expected


def test_a_line_of_the_tree_without_a_folder_above_it_is_refused():
    with pytest.raises(AssertionError, match="indented under nothing"):
        list(listed(["a.py  x", "  b.py  x"]))


def test_the_table_has_at_least_twenty_rows_and_each_names_a_place():
    assert len(ANSWERS) >= 20
    assert len({question for question, _ in ANSWERS}) == len(ANSWERS)
    assert all(places for _, places in ANSWERS)


@pytest.mark.parametrize(("question", "places"), ANSWERS, ids=[question for question, _ in ANSWERS])
def test_what_the_table_names_stands_in_the_file_beside_it(question, places):
    for name, words in places:
        path = ROOT / name
        assert path.is_dir() if name.endswith("/") else path.is_file(), f"{name} is not there"
        suffixes = {".py", ".h", ".cpp", ".cu", ".cuh", ".md"}
        files = sorted(p for p in path.rglob("*") if p.suffix in suffixes) if path.is_dir() else [path]
        text = "\n".join(p.read_text() for p in files)
        for word in words:
            assert re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text), f"{word} does not occur in {name}"


def test_the_layers_on_the_page_are_those_that_the_architecture_is_held_to():
    told = []
    for number, line in enumerate(block(section("The twelve layers"))):
        rank, names = re.match(r" *(\d+)  (\S+(?:, \S+)*)  ", line).groups()
        assert int(rank) == number
        told.append(set(names.split(", ")))
    assert told == LAYERS


def test_the_readme_of_the_backends_names_every_file_and_every_op_there():
    page = (BACKENDS / "README.md").read_text()
    files = re.findall(r"^\| `([\w/]+(?:\.py)?/?)` \|", page, re.MULTILINE)
    assert sorted(files) == sorted(
        [*(p.name for p in BACKENDS.glob("*.py")), *(f"{p.parent.name}/" for p in BACKENDS.glob("*/__init__.py"))]
    )
    assert re.findall(r"^\* `(\w+)`", page, re.MULTILINE) == list(OPS)


def test_the_readme_of_the_native_code_names_files_that_are_there_and_every_shared_header():
    csrc = ROOT / "csrc"
    names = re.findall(r"`((?:c\w+/)?[\w*]+\.(?:h|cpp|cuh?|\*)|cpu/\w+\*)`", (csrc / "README.md").read_text())
    for name in names:
        assert list(csrc.glob(name) if "/" in name else csrc.rglob(name)), f"csrc/README.md names {name}"
    assert {path.name for path in csrc.glob("*.h")} <= set(names)
    for path in (path.relative_to(csrc) for path in csrc.glob("cpu/*.cpp")):
        there = any(fnmatch(path.as_posix(), name) or fnmatch(path.name, name) for name in names)
        assert there or path.name in ("bindings.cpp", "rows_f64.cpp"), f"csrc/README.md does not name {path}"


@pytest.mark.parametrize("path", PROSE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_path_link_and_command_on_a_page_is_there(path):
    text = path.read_text()
    for name in re.findall(
        r"(?<![\w./-])(?:rlkernels|csrc|tests|docs|benchmarks|examples|\.ci|\.github)/[^]\s`)(,;:|\"']*", text
    ):
        name = name.rstrip(".")
        assert (ROOT / name).exists() or LEFT_BEHIND.search(name), f"{path.name} names {name}, which is not there"
    for name in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (path.parent / name).exists(), f"{path.name} links to {name}, which is not there"
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for name in re.findall(r"(?:^|`)make ([a-z][\w-]*)", text, re.MULTILINE):
        assert name in targets, f"{path.name} names make {name}, which the Makefile does not have"
    for name in re.findall(r"(?:^ {4,}|(?<!was )`)rlkernels ([a-z]+)", text, re.MULTILINE):
        # Figures name their contenders so, by the backend that was forced, and say what their command was.
        assert name in {*COMMANDS, *KNOWN, "auto"}, f"{path.name} names rlkernels {name}, which is no command"


@pytest.mark.parametrize("path", WITHOUT_FIGURES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_page_says_a_thing_twice(path):
    """A merge may leave an old row or bullet beside the new one, which begins with the same words."""
    text = path.read_text()
    starts = re.findall(r"^(\* .{24})", text, re.MULTILINE)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        starts += re.findall(r"^\| ([^|]+) \|", table, re.MULTILINE)
        twice = {start for start in starts if starts.count(start) > 1}
        assert not twice, f"{path.name} begins twice with {twice}"
        starts = [start for start in starts if start.startswith("* ")]
    assert len(starts) == len(set(starts)), f"{path.name}: {[start for start in starts if starts.count(start) > 1]}"


@pytest.mark.parametrize("folder", ["tests", "benchmarks"])
def test_the_readme_of_a_folder_names_all_that_lies_there(folder):
    page = (ROOT / folder / "README.md").read_text()
    if folder == "tests":
        parts = [path.parent.name for path in (ROOT / folder).glob("*/*.py")]
        parts = [f"`{part}`" for part in parts]
    else:
        paths = [path for path in (ROOT / folder).rglob("*.py") if path.name != "__init__.py"]
        parts = [f"\n{path.relative_to(ROOT / folder).as_posix()} " for path in paths]
    for part in parts:
        assert part in page, f"{folder}/README.md does not name {part.strip()}"


def docstrings(tree):
    """Yields each docstring with its line, those below an assignment included."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        for before, one in zip([None, *body], body, strict=False):
            after = before is None and documented or isinstance(before, (ast.Assign, ast.AnnAssign))
            if after and isinstance(one, ast.Expr) and isinstance(getattr(one.value, "value", None), str):
                yield one.lineno, one.value.value


CODE = '''"""a"""
x = 1
"""b"""
class C:
    """c"""
    y: int = 1
    """d"""
    def f(self):
        """e"""
        "no"
'''


def test_docstrings_of_modules_functions_classes_and_constants_are_found():
    assert [text for _, text in sorted(docstrings(ast.parse(CODE)))] == ["a", "b", "c", "d", "e"]


@pytest.mark.parametrize("path", DOCSTRINGS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_docstring_begins_with_a_clause_that_lacks_its_noun(path):
    for line, text in docstrings(ast.parse(path.read_text())):
        assert not HEADLESS.match(text), f"{path.relative_to(ROOT)}:{line}: {text.splitlines()[0]}; name the noun first"


VERB = re.compile(r"\s*(?!Is\b|Its\b|This\b|Was\b|Loss\b|Less\b|Bias\b|As\b)[A-Z][a-z]+s\b")
"""The first word of a function's docstring, in the third person."""
NATIVE = ("backends", "cli")  # their older files still begin with nouns
SPEAKING = [
    path
    for path in DOCSTRINGS
    if path.parts[len(ROOT.parts)] == "rlkernels" and path.parts[len(ROOT.parts) + 1] not in NATIVE
]


@pytest.mark.parametrize("path", SPEAKING, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_docstring_of_a_function_begins_with_a_verb(path):
    """That of an objective begins with its name, because a page prints it."""
    printed = {f.__name__ for f in row_objectives.LOSSES.values()} if path.stem == "row_objectives" else {}
    for node in ast.walk(ast.parse(path.read_text())):
        own = isinstance(node, ast.FunctionDef) and any("objective" in ast.unparse(x) for x in node.decorator_list)
        if isinstance(node, ast.FunctionDef) and not own and node.name not in printed:
            text = ast.get_docstring(node)
            assert text is None or VERB.match(text), f"{path.relative_to(ROOT)}:{node.lineno}: {text.splitlines()[0]}"
