"""The glossary: its entries stand in the order of the alphabet, and the names that it gives are in the code."""

import re

import pytest
from paths import ROOT

PAGE = ROOT / "docs/glossary.md"
pytestmark = pytest.mark.skipif(
    not PAGE.exists(), reason="the docs are not here: the tests run on an installed package"
)


def entries():
    """``(word, meaning, symbol, name in the code)`` of every entry."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))] for line in lines[1:]]


def test_entries_have_four_cells_and_stand_in_order():
    words = [entry[0].lower() for entry in entries()]
    assert len(words) > 45 and words == sorted(set(words))
    assert all(len(entry) == 4 and entry[1].endswith(".") for entry in entries())


def test_every_name_of_the_glossary_is_in_the_code():
    paths = [path for folder in ("rlkernels", "tests") for path in sorted((ROOT / folder).rglob("*.py"))]
    code = set(re.findall(r"\w+", " ".join(path.read_text() for path in paths if path.name != "test_glossary.py")))
    for word, _, _, names in entries():
        for name in re.findall(r"`([^`]+)`", names):
            if "/" in name:
                assert list(ROOT.glob(name)) or list(ROOT.glob(f"rlkernels/{name}")), f"{word}: no {name}"
            else:
                assert set(re.findall(r"\w+", name)) <= code, f"{word}: {name} is not in the code"
