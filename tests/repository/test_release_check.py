"""The check before a release: each rule finds what is stale, and a fault of any step is the exit status."""

import shutil
import sys
import tarfile

import matrix
import pytest
import release_check
from paths import ROOT
from source_trees import environment, run

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
ROWS = (matrix.Row("3.10", "2.8.0"), matrix.Row("3.11", "newest", ("3.9.0",)))
LINE = "| {} | {} | none | 2.4.6 | {} | 9 | {} | 1 | {}, 2026-11-30 |\n"


class Repository:
    """A checkout with one commit of a package, a test and a page."""

    def __init__(self, root):
        self.root = root
        self.write("rlkernels/__init__.py", '"""A package."""\n\n\n\n__version__ = "1.0"\n')
        self.write("csrc/rows.h", "int rows();\n")
        self.write("tests/test_rows.py", "\n")
        self.git("init", "-q")
        self.commit()
        self.first = self.git("rev-parse", "--short", "HEAD").strip()

    def git(self, *words):
        return run(["git", "-c", "user.name=x", "-c", "user.email=x", *words], cwd=self.root).stdout

    def write(self, name, text):
        path = self.root / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)

    def commit(self):
        self.git("add", ".")
        self.git("commit", "-q", "-m", "x")


@pytest.fixture
def repository(tmp_path):
    return Repository(tmp_path)


def table(commits, failed=0):
    """A page with a run of each part of ``ROWS`` at these commits."""
    parts = [("3.10.13", "2.8.0", "core"), ("3.11.7", "2.14.1+cpu", "core"), ("3.11.7", "2.14.1+cpu", "Triton 3.9.0")]
    return "".join(
        LINE.format(python, torch, part, failed, commit)
        for (python, torch, part), commit in zip(parts, commits, strict=True)
    )


@needs_git
def test_sources_that_are_not_committed_are_named(repository):
    assert release_check.uncommitted(repository.root) == []
    repository.write("csrc/rows.h", "long rows();\n")
    repository.write("new.py", "\n")
    assert release_check.uncommitted(repository.root) == ["csrc/rows.h is not committed", "new.py is not committed"]


@needs_git
def test_a_folder_that_is_no_checkout_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert release_check.uncommitted(tmp_path) == ["these sources are no checkout of git"]


@needs_git
@pytest.mark.parametrize("committed", [False, True])
def test_a_run_is_stale_once_a_source_has_changed_and_not_for_a_test_a_page_or_the_version(repository, committed):
    def changes(name, text):
        repository.write(name, text)
        repository.git("add", ".")
        if committed:
            repository.commit()
        return release_check.stale(repository.first, repository.root)

    assert changes("tests/test_rows.py", "x = 1\n") == changes("csrc/README.md", "y\n") == []
    assert changes("rlkernels/__init__.py", '"""A package."""\n\n\n\n__version__ = "2.0"\n') == []
    (fault,) = changes("csrc/rows.h", "long rows();\n")
    assert fault == f"1 files of the sources have changed since {repository.first}, csrc/rows.h among them"
    (fault,) = changes("rlkernels/__init__.py", '"""Another package."""\n\n\n\n__version__ = "2.0"\n')
    assert fault.startswith("2 files")


@needs_git
def test_a_commit_of_another_history_is_stale(repository):
    assert release_check.stale("0123abc", repository.root) == ["commit 0123abc is not in the history"]


@needs_git
def test_a_table_is_fresh_with_a_clean_run_of_every_part_on_these_sources(repository):
    def faults(page):
        return release_check.stale_rows(page, ROWS, repository.root)

    first = repository.first
    assert faults(table([first] * 3)) == []
    assert faults("") == [
        "python-3.10-torch-2.8.0: no run of core",
        "python-3.11-torch-newest: no run of core",
        "python-3.11-torch-newest: no run of Triton 3.9.0",
    ]
    assert faults(table([first] * 3, failed=2))[0] == "python-3.10-torch-2.8.0, core: 2 tests failed"
    assert faults(table([first, "0123abc", first])) == [
        "python-3.11-torch-newest, core: commit 0123abc is not in the history"
    ]
    assert faults(table([first, first, f"{first}-dirty"])) != []
    repository.write("csrc/rows.h", "long rows();\n")
    repository.commit()
    assert len(faults(table([first] * 3))) == 3


@needs_git
def test_figures_are_fresh_on_the_sources_that_they_were_measured_with(repository):
    page = f"AMD EPYC, 2 cores, commit {repository.first}, effaced by 1234567 rounds:"
    assert release_check.stale_figures(page, repository.root) == []
    assert release_check.stale_figures("AMD EPYC, 2 cores", repository.root) == ["no commit is named"]
    repository.write("csrc/rows.h", "long rows();\n")
    (fault,) = release_check.stale_figures(page, repository.root)
    assert "csrc/rows.h" in fault


def test_a_version_before_its_release_and_a_changelog_without_its_date_are_told():
    def faults(version, section):
        return release_check.unreleased(f'"""A."""\n\n__version__ = "{version}"\n', f"# Changelog\n\n## {section}\n")

    assert faults("0.2.0", "[0.2.0] - 2026-12-24") == []
    assert faults("0.2.0", "[0.2.0] - unreleased") == ["CHANGELOG.md: 0.2.0 is 'unreleased', no date"]
    assert faults("0.2.1", "[0.2.0] - 2026-12-24") == ["CHANGELOG.md begins with 0.2.0, not with 0.2.1"]
    assert len(faults("0.2.0.dev0", "[0.2.0] - unreleased")) == 3


def test_the_sources_are_there_and_the_pages_name_what_the_rules_read():
    assert all((ROOT / name).exists() for name in release_check.SOURCES if name[0] != ":")
    assert "| 3.10." in (ROOT / "docs/versions.md").read_text()


@pytest.fixture
def steps(monkeypatch):
    """Steps without work: ``steps[name]`` is the fault of a step, and ``ran`` lists those that were run."""
    faults, ran = dict.fromkeys(release_check.STEPS, ()), []

    def step(name):
        return lambda place: ran.append(name) or list(faults[name])

    monkeypatch.setattr(release_check, "STEPS", {name: step(name) for name in faults})
    faults["ran"] = ran
    return faults


def test_all_steps_run_in_their_order_and_pass(steps, tmp_path, capsys):
    assert release_check.main(["--folder", str(tmp_path)]) == 0
    assert steps["ran"] == ["sources", "version", "matrix", "results", "docs", "build", "install", "core"]
    assert capsys.readouterr().out.splitlines()[-1] == "every step passed"


@pytest.mark.parametrize("name", release_check.STEPS)
def test_a_fault_of_any_step_is_the_exit_status_and_does_not_hide_the_others(steps, tmp_path, capsys, name):
    steps[name] = ["it is stale"]
    assert release_check.main(["--folder", str(tmp_path)]) == 1
    told = capsys.readouterr().out
    assert f"\n{name:9} FAILED" in f"\n{told}" and "it is stale" in told and "not to be released: " in told
    behind = {other for other, needed in release_check.NEEDS.items() if name in needed}
    assert [step for step in release_check.STEPS if step not in behind] == steps["ran"]
    for other in behind:
        assert f"\n{other:9} FAILED" in told


def test_a_part_says_what_it_left_out_and_runs_what_it_needs(steps, tmp_path, capsys):
    assert release_check.main(["--folder", str(tmp_path), "--step", "core", "--core", "tests/losses"]) == 0
    assert steps["ran"] == ["build", "install", "core"]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "passed so far; left out: sources, version, matrix, results, docs, the rest of the core"


def test_a_command_that_fails_is_a_fault_with_its_last_line(tmp_path):
    place = release_check.Place(tmp_path)
    assert place.faults("sh", "-c", "exit 0") == []
    (fault,) = place.faults("sh", "-c", "echo first; echo no space left on device; exit 3")
    assert fault.endswith("ended with 3: no space left on device")


def test_the_fresh_environment_has_no_compiler_and_no_variable_that_leads_to_these_sources(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("CXX", "c++")
    place = release_check.Place(tmp_path)
    place.python.parent.mkdir(parents=True)
    variables = place.fresh()
    assert not variables.keys() & {"PYTHONPATH", "CXX", "RLKERNELS_CPU"}
    for name in ("c++", "g++", "clang++", "cc", "nvcc", "git"):
        assert shutil.which(name, path=variables["PATH"]) is None


def test_the_makefile_runs_it():
    recipe = (ROOT / "Makefile").read_text().split("\nrelease-check:\n", 1)[1].split("\n\n")[0]
    assert recipe == "\t$(PYTHON) tests/repository/release_check.py $(ARGS)"


@needs_git
def test_the_source_distribution_holds_every_file_that_is_tracked(tmp_path):
    """Its tests read the pages and the settings beside them, so that one file less is a test that fails there."""
    names = release_check.git(ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if names is None:
        pytest.skip("the sources are no checkout of git")
    names = [name for name in names.split("\0") if (ROOT / name).is_file()]
    tree = tmp_path / "tree"
    for name in names:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    (tree / "docs/__pycache__").mkdir()
    (tree / "docs/__pycache__/tables.cpython-311.pyc").write_text("left behind")
    run([sys.executable, "setup.py", "-q", "sdist"], cwd=tree, env=environment(RLKERNELS_CPU="0"))
    (archive,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        held = {member.name.split("/", 1)[1] for member in packed if member.isfile()}
    made = {name for name in held if name.split("/")[0] in ("PKG-INFO", "setup.cfg", "rlkernels.egg-info")}
    assert held - made == set(names)
