"""The documentation of several versions in one folder: names, order, ``latest``, and where the folder's start leads."""

import importlib.util
import json
import re

import pytest
from paths import ROOT

import rlkernels

_spec = importlib.util.spec_from_file_location("publish", ROOT / "docs/publish.py")
publish = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(publish)


def write(text):
    """Returns a build that writes one page with this text."""

    def build(folder):
        folder.mkdir(exist_ok=True)
        (folder / "index.html").write_text(text)

    return build


@pytest.fixture
def folder(tmp_path):
    """The sites of these versions, each with a page that holds the version's name, published in this order."""
    for version in ("0.2.0", "0.10.1", "0.9.0", "0.11.0.dev0"):
        publish.publish(tmp_path / "sites", version, write(version))
    return tmp_path / "sites"


def entries(folder):
    return json.loads((folder / "versions.json").read_text())


def start(folder):
    return re.search(r"url=([^\"]+)", (folder / "index.html").read_text())[1]


def test_the_newest_release_is_latest_and_an_unreleased_version_stands_before_it_as_dev(folder):
    assert [(entry["version"], entry["title"], entry["aliases"]) for entry in entries(folder)] == [
        ("dev", "0.11.0.dev0", []),
        ("0.10", "0.10.1", ["latest"]),
        ("0.9", "0.9.0", []),
        ("0.2", "0.2.0", []),
    ]
    assert (folder / "latest/index.html").read_text() == "0.10.1"
    assert start(folder) == "latest/index.html"


def test_a_patch_replaces_its_minor_version_and_the_copy_under_latest(folder):
    publish.publish(folder, "0.10.2", write("0.10.2"))
    assert [entry["title"] for entry in entries(folder)] == ["0.11.0.dev0", "0.10.2", "0.9.0", "0.2.0"]
    for name in ("0.10", "latest"):
        assert (folder / name / "index.html").read_text() == "0.10.2"


def test_before_the_first_release_the_folder_starts_with_dev(tmp_path):
    publish.publish(tmp_path, "0.2.0.dev0", write("dev"))
    assert entries(tmp_path) == [{"version": "dev", "title": "0.2.0.dev0", "aliases": []}]
    assert start(tmp_path) == "dev/index.html" and not (tmp_path / "latest").exists()


def test_a_site_that_is_not_built_enters_no_list(folder):
    def fails(folder):
        raise RuntimeError("a dead link")

    before = entries(folder)
    with pytest.raises(RuntimeError):
        publish.publish(folder, "0.12.0", fails)
    assert entries(folder) == before


def test_the_hook_puts_the_selector_on_the_pages_of_a_published_site_alone(monkeypatch):
    hooks = (ROOT / "docs/site_hooks.py").read_text()
    assert f'os.environ.get("{publish.SELECTOR}")' in hooks and '{"provider": "mike", "alias": True}' in hooks
    pytest.importorskip("mkdocs", reason="mkdocs is not installed")
    pytest.importorskip("latex2mathml", reason="latex2mathml is not installed")
    spec = importlib.util.spec_from_file_location("site_hooks", ROOT / "docs/site_hooks.py")
    site_hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(site_hooks)

    class Config:
        extra = {}

    monkeypatch.delenv(publish.SELECTOR, raising=False)
    assert site_hooks.on_config(Config).extra == {}
    monkeypatch.setenv(publish.SELECTOR, "1")
    assert site_hooks.on_config(Config).extra["version"]["provider"] == "mike"


def test_the_version_here_has_a_name_and_the_makefile_runs_the_program():
    assert re.fullmatch(r"dev|\d+\.\d+", publish.name_of(rlkernels.__version__))
    assert "docs/publish.py $(SITES)" in (ROOT / "Makefile").read_text()
