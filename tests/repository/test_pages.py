"""The pages that are printed from the code are fresh, and the program of the README runs."""

import ast
import inspect
import re
import runpy
import subprocess
import sys

import pytest
import subprocesses
from paths import ROOT

import rlkernels
from rlkernels.losses.preference_types import KINDS
from rlkernels.objectives import OBJECTIVES

PRINTED = [path for path in sorted((ROOT / "docs").glob("*.py")) if path.with_suffix(".md").exists()]


@pytest.mark.parametrize("path", PRINTED, ids=lambda path: path.stem)
def test_a_printed_page_is_fresh(path, monkeypatch):
    monkeypatch.syspath_prepend(path.parent)
    page = runpy.run_path(str(path))["page"]()
    name = f"docs/{path.stem}"
    assert path.with_suffix(".md").read_text() == page, f"run: python {name}.py > {name}.md"


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md"])
def test_the_number_of_losses_of_pairs_is_theirs(name):
    assert set(re.findall(r"(\d+) types", (ROOT / name).read_text())) == {str(len(KINDS))}


def calls_of_tables():
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for line in path.read_text().splitlines():
            for name, rest in re.findall(r"`(?:rlk\.)?(\w+)(\([^`]*\))", line if line.startswith("|") else ""):
                function = getattr(rlkernels, name, None)
                tree = ast.parse(name + rest, mode="eval").body if inspect.isfunction(function) else None
                if isinstance(tree, ast.Call):
                    yield name + rest, function, tree


def test_the_calls_in_tables_fit_the_signatures():
    bound = 0
    for text, function, tree in calls_of_tables():
        try:
            inspect.signature(function).bind_partial(*tree.args, **{k.arg: k.value for k in tree.keywords})
        except TypeError as error:
            raise AssertionError(f"{text}: {error}") from error
        bound += 1
    assert bound > 40


def sixty_seconds():
    """Returns both blocks of the section, the first of them on a small shape."""
    text = (ROOT / "README.md").read_text()
    # The other two, of TRL and of transformers, are run by the tests of the adapters and of the command.
    assert text.count("```python\n") == 4
    section = text.split("## In sixty seconds\n", 1)[1].split("\n## ")[0]
    first, own = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    sizes = "tokens, vocab = 256, 32000\n"
    assert first.count(sizes) == 1 and "linear_policy_loss" in first and "@rlk.objective" in own
    return first.replace(sizes, "tokens, vocab = 16, 97\n"), own


def test_the_first_program_of_the_readme_runs_where_it_is_pasted_into_python(tmp_path):
    done = subprocess.run(
        [sys.executable, "-"],
        input=sixty_seconds()[0],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=subprocesses.environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("torch.Size([16, 97]) torch.Size([97, 512])\n")


def test_the_program_of_the_readme_runs(tmp_path):
    first, own = sixty_seconds()
    path = tmp_path / "program.py"  # a file, because an objective's source is read
    path.write_text(first + own)
    try:
        assert runpy.run_path(str(path))["loss"].isfinite()
    finally:
        OBJECTIVES.pop("anchored", None)
