"""The pages that are printed from the code are fresh, and the program of the README runs."""

import re
import runpy

import pytest
from paths import ROOT

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


def test_the_program_of_the_readme_runs(tmp_path):
    section = (ROOT / "README.md").read_text().split("## In sixty seconds\n", 1)[1]
    program = re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
    sizes = "tokens, vocab = 256, 32000\n"
    assert program.count(sizes) == 1 and "linear_policy_loss" in program
    path = tmp_path / "program.py"  # a file, because an objective's source is read
    path.write_text(program.replace(sizes, "tokens, vocab = 16, 97\n"))
    try:
        assert runpy.run_path(str(path))["loss"].isfinite()
    finally:
        OBJECTIVES.pop("anchored", None)
