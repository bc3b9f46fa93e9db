"""One version: that of ``rlkernels/__init__.py``, which the build reads and every other file follows."""

import re
import sys

import yaml
from paths import ROOT
from source_trees import environment, needs_sources, run

import rlkernels
from rlkernels.backends import gate

RELEASE = rlkernels.__version__.partition(".dev")[0]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
KINDS = ["Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"]
"""The kinds of changes of Keep a Changelog 1.1, in its order."""


@needs_sources
def test_the_build_takes_the_version_of_the_package():
    done = run([sys.executable, "setup.py", "--version"], cwd=ROOT, env=environment(RLKERNELS_CPU="0"))
    assert done.stdout.splitlines()[-1] == rlkernels.__version__


def test_no_other_setting_of_the_build_holds_a_version():
    project = (ROOT / "pyproject.toml").read_text()
    assert 'version = {attr = "rlkernels.__version__"}' in project
    assert not re.search(r'^version = "', project, re.MULTILINE)


def test_the_citation_the_interface_and_the_changelog_follow_it():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == rlkernels.__version__
    assert gate.INTERFACE.split("/")[0] == RELEASE
    assert re.search(r"^## \[(.+?)\]", CHANGELOG, re.MULTILINE)[1] == RELEASE


def releases():
    """Yields ``(version, day, kinds)`` of each section of the changelog."""
    parts = re.split(r"^## (.+)\n", CHANGELOG, flags=re.MULTILINE)[1:]
    for title, text in zip(parts[::2], parts[1::2], strict=True):
        found = re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (unreleased|\d{4}-\d\d-\d\d)", title)
        assert found, f"{title!r} is no version with a date, and not unreleased"
        yield *found.groups(), re.findall(r"^### (.+)$", text, re.MULTILINE)


def test_the_changelog_has_the_form_of_keep_a_changelog():
    assert CHANGELOG.startswith("# Changelog\n") and "Keep a Changelog" in CHANGELOG.split("\n## ")[0]
    found = list(releases())
    versions = [[*map(int, version.split("."))] for version, _, _ in found]
    assert versions == sorted(versions, reverse=True) and len({*map(tuple, versions)}) == len(versions)
    for version, _, kinds in found:
        assert kinds == [kind for kind in KINDS if kind in kinds], f"{version}: {kinds}"


def test_only_the_coming_version_is_unreleased_and_it_has_dev():
    days = [day for _, day, _ in releases()]
    assert (days[0] == "unreleased") == (".dev" in rlkernels.__version__)
    assert "unreleased" not in days[1:]
