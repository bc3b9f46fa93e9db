"""The programs on the pages of the site run, and the site holds every page and every public name."""

import re
import runpy

import public_calls
import pytest
import yaml
from paths import ROOT

from rlkernels.objectives import OBJECTIVES

DOCS = ROOT / "docs"
NO_METRICS = ("pack", "unpack")  # their dicts hold the caller's own names
PRINTED = {path.stem for path in DOCS.glob("*.py")}
PAGES = [path for path in sorted(DOCS.rglob("*.md")) if path.stem not in PRINTED]
PROGRAMS = {
    path.relative_to(DOCS).as_posix(): blocks
    for path in PAGES
    if (blocks := re.findall(r"^```python\n(.*?)^```", path.read_text(), re.M | re.S))
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_program_of_a_page_runs(name, tmp_path):
    """The blocks of a page are one program, because a reader runs them in their order."""
    path = tmp_path / "program.py"  # a file, because an objective's source is read
    path.write_text("\n".join(PROGRAMS[name]))
    before = dict(OBJECTIVES)
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        for new in OBJECTIVES.keys() - before.keys():
            OBJECTIVES.pop(new)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_line_of_a_program_fits_on_the_page(name):
    """A wide screen shows 100 letters; what is behind them has to be looked for."""
    assert [line for block in PROGRAMS[name] for line in block.splitlines() if len(line) > 100] == []


def keys(result):
    """Returns the keys of every dict of metrics in a result."""
    if isinstance(result, dict):
        return set(result)
    return set().union(*map(keys, result)) if isinstance(result, tuple) else set()


@pytest.mark.parametrize("name", [name for name in public_calls.CALLS if not name.startswith(NO_METRICS)])
def test_the_page_of_metrics_holds_every_key(name):
    page = (DOCS / "metrics.md").read_text()
    missing = {key for key in keys(public_calls.CALLS[name](public_calls.data())) if f"`{key}`" not in page}
    assert not missing


def test_the_messages_of_the_page_are_those_of_the_code():
    titles = re.findall(r"^### `(.+)`$", (DOCS / "troubleshooting.md").read_text(), re.M)
    code = "".join(path.read_text() for path in (ROOT / "rlkernels").rglob("*.py"))
    assert len(titles) > 7 and [title for title in titles if title not in code] == []


def config():
    class Loader(yaml.SafeLoader):
        """Reads the tags of Python in mkdocs' file as nothing."""

    Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)
    return yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)


def pages(nav):
    for entry in nav:
        value = entry if isinstance(entry, str) else next(iter(entry.values()))
        yield from pages(value) if isinstance(value, list) else [value]


def test_the_navigation_names_every_page_once():
    named = list(pages(config()["nav"]))
    assert len(named) == len(set(named))
    written = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert written <= set(named), written - set(named)
    made = set(named) - written
    assert {"contributing.md", "changelog.md"} <= made
    assert all(name in {"contributing.md", "changelog.md"} or name.startswith("reference/") for name in made), made


LIST = re.compile(r"([*-]|\d+\.) ")


@pytest.mark.parametrize(
    "path", [*sorted(DOCS.rglob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=str
)
def test_a_list_has_an_empty_line_before_it(path):
    """Python's Markdown reads it as the rest of the paragraph otherwise, where GitHub's makes a list."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.M | re.S)
    before = ""
    for line in text.splitlines():
        follows = not before.strip() or LIST.match(before) or before.startswith("  ")
        assert not LIST.match(line) or follows, f"{before}\n{line}"
        before = line
