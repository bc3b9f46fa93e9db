"""Files for whoever hosts the repository: the citation, the forms of issues, the workflows and the hooks of a commit.
They are read as their host reads them.
"""

import importlib.util
import re
import shlex
import shutil
import subprocess

import matrix
import pytest
import yaml
from paths import ROOT

import rlkernels

HOST = ROOT / ".github"
WORKFLOWS = sorted((HOST / "workflows").glob("*.yml"))
FORMS = [path for path in sorted((HOST / "ISSUE_TEMPLATE").glob("*.yml")) if path.name != "config.yml"]
HOOKS = ROOT / ".pre-commit-config.yaml"
PUBLIC = [*HOST.rglob("*.*"), *(ROOT / name for name in ("CITATION.cff", "SECURITY.md", "CODE_OF_CONDUCT.md"))]
ADDRESSES = (
    "https://download.pytorch.org/whl/cpu",
    "https://www.contributor-covenant.org/version/2/1/code_of_conduct/",
)
"""What the files above may link to: each of them exists."""

_spec = importlib.util.spec_from_file_location("check_files", ROOT / ".ci/check_files.py")
check_files = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(check_files)


def read(path):
    return yaml.safe_load(path.read_text())


def targets():
    return set(re.findall(r"^([\w-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_the_citation_has_the_keys_of_its_format_and_the_version_and_licence_of_the_package():
    citation = read(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert {"authors", "message", "title"} <= set(citation) and citation["type"] == "software"
    assert citation["authors"] == [{"name": "The rlkernels authors"}]
    assert citation["version"] == rlkernels.__version__
    assert f'license = "{citation["license"]}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("path", PUBLIC, ids=lambda path: path.name)
def test_no_public_file_invents_an_address(path):
    text = path.read_text()
    assert set(re.findall(r"https?://[^\s)\"']+", text)) <= set(ADDRESSES)
    assert not re.search(r"[\w.+-]+@[\w-]+\.\w+", text), "it names a mail address"


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_a_form_asks_for_a_program_with_its_reference_and_for_what_doctor_prints(path):
    form = read(path)
    assert set(form) == {"name", "description", "title", "labels", "body"}
    fields = {item["id"]: item for item in form["body"] if item["type"] != "markdown"}
    assert len(fields) == sum(item["type"] != "markdown" for item in form["body"])
    for item in form["body"]:
        assert item["type"] in {"markdown", "textarea", "dropdown"}
        assert "value" in item["attributes"] if item["type"] == "markdown" else item["attributes"]["label"]
        assert item["type"] != "dropdown" or all(isinstance(one, str) for one in item["attributes"]["options"])
    program, doctor = fields["program"], fields["doctor"]
    assert program["validations"]["required"] and "float64" in str(program["attributes"])
    assert "rlkernels doctor" in doctor["attributes"]["label"]


def test_there_is_a_form_for_each_kind_of_issue_and_no_blank_one():
    assert {path.stem for path in FORMS} == {"wrong_number", "crash", "feature"}
    assert read(HOST / "ISSUE_TEMPLATE/config.yml") == {"blank_issues_enabled": False}


def commands(workflow):
    for job in workflow["jobs"].values():
        yield from (step["run"] for step in job["steps"] if "run" in step)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_runs_targets_of_the_makefile_and_nothing_else(path):
    found = list(commands(read(path)))
    assert found
    for command in found:
        # An expression is one word to its host, blanks or not.
        program, target, *settings = shlex.split(re.sub(r"\$\{\{.*?\}\}", "EXPRESSION", command))
        assert program == "make" and target in targets(), f"{path.name} runs {command!r}"
        for word in settings:
            name, _ = word.split("=")
            assert re.search(rf"^{name} \?=", (ROOT / "Makefile").read_text(), re.MULTILINE), f"{name} sets nothing"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_may_read_alone_ends_in_time_and_names_the_version_of_each_action(path):
    workflow = read(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert "github.ref" in workflow["concurrency"]["group"]
    assert set(workflow[True]) == {"push", "pull_request"}  # YAML 1.1 reads the key "on" as true
    for job in workflow["jobs"].values():
        assert 0 < job["timeout-minutes"] < 360 and "permissions" not in job
        for action in (step["uses"] for step in job["steps"] if "uses" in step):
            assert re.fullmatch(r"actions/[\w-]+@v\d+", action), f"{path.name} uses {action}"


def test_the_workflows_cover_lint_suite_proofs_and_wheels_on_every_version_that_is_promised():
    run = {path.stem: " ".join(commands(read(path))) for path in WORKFLOWS}
    assert set(run) == {"lint", "test", "wheels"}
    assert "make lint" in run["lint"] and "make wheel" in run["wheels"]
    assert re.search(r"make test PYTHON=.* make test-triton ", run["test"])
    promised = [row.python for row in matrix.ROWS]
    jobs = {path.stem: read(path)["jobs"] for path in WORKFLOWS}
    for job in (jobs["test"]["suite"], jobs["wheels"]["wheel"]):
        assert job["strategy"]["matrix"]["python"] == promised
    proven = re.search(r"^TRITON \?= (.+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    assert jobs["test"]["triton-proofs"]["strategy"]["matrix"]["triton"] == proven


def test_what_fails_to_compile_fails_the_workflows():
    assert read(HOST / "workflows/test.yml")["env"]["RLKERNELS_CPU"] == "1"
    recipe = re.search(r"^wheel:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert "RLKERNELS_CPU=1" in recipe and "tests/repository/wheel_import.py" in recipe


def test_the_hooks_are_local_and_what_they_run_is_there():
    (repository,) = read(HOOKS)["repos"]
    assert repository["repo"] == "local"
    hooks = {hook["id"]: hook for hook in repository["hooks"]}
    assert {hook["language"] for hook in hooks.values()} == {"system"}
    program, *options, target = hooks.pop("lint")["entry"].split()
    assert program == "make" and target in targets()
    assert (
        options == ["--assume-old=.venv/.installed"] and "lint: $(VENV)/.installed" in (ROOT / "Makefile").read_text()
    )
    for name, hook in hooks.items():
        assert hook["entry"].split() == ["python3", ".ci/check_files.py", name]
    assert set(hooks) == set(check_files.CHECKS)


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_the_hook_runs_the_linters_and_installs_nothing():
    (entry,) = [hook["entry"] for hook in read(HOOKS)["repos"][0]["hooks"] if hook["id"] == "lint"]
    done = subprocess.run([*entry.split(), "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "ruff check ." in done.stdout and "ruff format --check ." in done.stdout
    assert "pip" not in done.stdout and "venv " not in done.stdout


@pytest.mark.parametrize(
    ("check", "data", "lines"),
    [
        ("trailing-whitespace", b"a\nb \n\t\nc\n", [2, 3]),
        ("trailing-whitespace", b"a\r\nb\n", [1]),
        ("trailing-whitespace", b"  a\n\nb\n", []),
        ("end-of-file", b"a", [1]),
        ("end-of-file", b"a\nb\n\n", [3]),
        ("end-of-file", b"a\nb\n", []),
        ("end-of-file", b"", []),
        ("merge-conflict", b"a\n" + b"<" * 7 + b" ours\nb\n" + b"=" * 7 + b"\nc\n" + b">" * 7 + b" theirs\n", [2, 6]),
        ("merge-conflict", b"|" * 7 + b" base\n", [1]),
        ("merge-conflict", b">>> 1 << 2\nTitle\n=======\n", []),
        ("large-files", b"a" * 500_001, [1]),
        ("large-files", b"a" * 500_000, []),
    ],
)
def test_a_check_of_files_finds_the_lines_it_is_for(tmp_path, capsys, check, data, lines):
    path = tmp_path / "file"
    path.write_bytes(data)
    assert check_files.main(check, str(path)) == int(bool(lines))
    assert capsys.readouterr().out.split("\n")[:-1] == [f"{path}:{line}: {check}" for line in lines]


def tracked():
    git = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if git.returncode != 0:
        pytest.skip("the sources are no checkout of git")
    paths = [ROOT / name for name in git.stdout.split("\0") if name]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
@pytest.mark.parametrize("check", check_files.CHECKS)
def test_every_tracked_file_passes_the_checks(check, capsys):
    assert check_files.main(check, *map(str, tracked())) == 0, capsys.readouterr().out


def test_every_line_of_the_ignored_revisions_is_a_comment_or_a_whole_hash():
    for line in (ROOT / ".git-blame-ignore-revs").read_text().splitlines():
        assert re.fullmatch(r"#.*|[0-9a-f]{40}|", line), line
    assert "git config blame.ignoreRevsFile .git-blame-ignore-revs" in (ROOT / "CONTRIBUTING.md").read_text()


def test_the_editor_is_told_the_line_length_of_ruff():
    length = re.search(r"^line-length = (\d+)", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert f"max_line_length = {length}\n" in (ROOT / ".editorconfig").read_text()


def test_the_import_test_of_a_wheel_refuses_a_package_beside_it_and_finds_a_wrong_number(monkeypatch):
    spec = importlib.util.spec_from_file_location("wheel_import", ROOT / "tests/repository/wheel_import.py")
    wheel = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(wheel)
    monkeypatch.setattr(wheel.sys, "prefix", str(ROOT / "docs"))
    with pytest.raises(SystemExit, match="run python with -I"):
        wheel.main()
    monkeypatch.setattr(wheel.sys, "prefix", str(ROOT.anchor))
    monkeypatch.setattr(wheel.cpu, "available", lambda: (False, "no compiler"))
    with pytest.raises(SystemExit, match="no compiler"):
        wheel.main()
    monkeypatch.setattr(wheel.cpu, "available", lambda: (True, ""))
    monkeypatch.setattr(wheel.cpu, "isa", lambda: "none")
    for error, status in ((1e-7, 0), (1e-4, 1), (float("nan"), 1)):
        monkeypatch.setattr(wheel, "worst_error", lambda error=error: error)
        assert wheel.main() == status
