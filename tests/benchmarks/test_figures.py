"""The pictures of docs/performance.md: drawn from the JSON beside them, which holds what the page's tables say."""

import json
import re
from xml.etree import ElementTree

import pytest
from paths import ROOT

from benchmarks.report import figures

FOLDER = ROOT / "docs/figures"
PAGE = (ROOT / "docs/performance.md").read_text()
FILES = {path.stem: json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))}
PEERS = ("torch eager", "torch.compile", "TRL's torch path")


def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split(" | ")]


def row(start):
    """Returns the cells of the one row of the page that begins so."""
    (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| {start} |")]
    return cells(line)


def test_the_pictures_are_what_the_command_draws():
    assert figures.main([str(FOLDER), "--check"]) == 0, "run: python benchmarks/report/figures.py docs/figures"


def test_every_picture_is_on_the_page_once():
    shown = re.findall(r"^!\[[^]]+\]\(figures/([\w-]+)\.svg\)$", PAGE, re.MULTILINE)
    assert sorted(shown) == sorted(name for data in FILES.values() for name in data["figures"])


@pytest.mark.parametrize("name", FILES)
def test_a_file_names_hardware_commit_and_command_as_the_page_does(name):
    data = FILES[name]
    assert f"commit {data['commit']}" in PAGE and data["command"] in PAGE
    assert data["conditions"].split(",")[0].split(" (")[0] in PAGE
    assert all(set(data["figures"]) == set(group) - {"name"} for group in data["groups"])


@pytest.mark.parametrize("group", FILES["logits"]["groups"], ids=lambda group: group["name"])
def test_the_figures_from_logits_are_those_of_the_table(group):
    def said(name, contenders, separator):
        return separator.join(f"{group[name][contender]}" for contender in contenders)

    lines = PAGE.splitlines()
    place = next(k for k, line in enumerate(lines) if line.startswith(f"| {group['name']}"))
    ours, theirs = cells(lines[place]), cells(lines[place + 1])
    mine = [contender for contender in group["logits-time"] if contender not in PEERS]
    peers = [contender for contender in PEERS if contender in group["logits-time"]]
    assert theirs[0].replace("`", "") == ", ".join(peers)
    assert (ours[1], theirs[1]) == (said("logits-time", mine, "; "), said("logits-time", peers, ", "))
    assert (ours[3], theirs[3]) == (said("logits-memory", mine, "; "), said("logits-memory", peers, ", "))


@pytest.mark.parametrize("group", FILES["host"]["groups"], ids=lambda group: group["name"])
def test_the_host_costs_are_those_of_the_table(group):
    _, _, ours, torchs, _ = row(group["name"])
    assert group["host-cost"] == {"rlkernels": int(ours), "torch's operations": int(torchs)}


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("head-products", "time over three bare products"),
        ("head-eager", "times faster than torch eager with full logits"),
        ("head-trl", "times faster than TRL 1.16 chunked"),
    ],
)
def test_the_figures_of_the_fused_head_are_those_of_the_table(name, start):
    shapes = row("`linear_policy_loss`: fp32, bf16")[2:]
    assert [group["name"] for group in FILES["head"]["groups"]] == shapes
    told = [", ".join(f"{value:.2f}" for value in group[name].values()) for group in FILES["head"]["groups"]]
    assert told == row(start)[2:]


@pytest.fixture
def folder(tmp_path):
    """A folder with one figure of two contenders."""
    groups = [{"name": "`f` <x>", "time": {"rlkernels": 2.0, "other": 8.0}}]
    data = {"title": "t", "conditions": "a machine", "commit": "0123abc", "command": "c", "groups": groups}
    data["figures"] = {"time": {"heading": "Time", "unit": "us"}}
    (tmp_path / "one.json").write_text(json.dumps(data))
    return tmp_path


def test_a_bar_is_as_long_as_its_figure_and_the_text_says_it(folder):
    drawing = ElementTree.fromstring(figures.pictures(folder)["time.svg"])
    space = "{http://www.w3.org/2000/svg}"
    bars = [float(bar.get("width")) for bar in drawing.iter(f"{space}rect") if bar.get("fill") != "#fff"]
    assert bars[1] == pytest.approx(4 * bars[0], abs=0.05)
    told = [words.text for words in drawing.iter(f"{space}text")]
    assert {"2.0", "8.0", "f <x>", "Time, us", "a machine, commit 0123abc: c"} <= set(told)
    assert drawing.find(f"{space}desc").text == "f <x>: rlkernels 2.0, other 8.0"


def test_the_check_fails_for_a_picture_that_is_absent_changed_or_of_no_file(folder, capsys):
    assert figures.main([str(folder), "--check"]) == 1 and not (folder / "time.svg").exists()
    assert figures.main([str(folder)]) == 0 == figures.main([str(folder), "--check"])
    (folder / "time.svg").write_text("<svg/>")
    (folder / "old.svg").write_text("<svg/>")
    capsys.readouterr()
    assert figures.main([str(folder), "--check"]) == 1
    assert capsys.readouterr().out.split() == ["old.svg", "time.svg"]
    assert figures.main([str(folder)]) == 0 and not (folder / "old.svg").exists()


def test_a_long_line_is_broken_between_words():
    assert figures.wrapped("aa bb cc dd", 6) == ["aa bb", "cc dd"]
