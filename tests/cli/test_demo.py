"""``rlkernels demo``: it runs offline from end to end, fails when it should, and measures what it says."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import subprocesses
import torch

from rlkernels.cli import demo, main
from rlkernels.cli.demo import corpus
from rlkernels.installing import how

ENVIRONMENT = subprocesses.environment(COLUMNS="100", PYTHONUNBUFFERED="1")
PATIENCE = 300


def run(code, *argv):
    """The command in a process of its own, after ``code``; the demo changes warnings, logging and the environment of
    its process.
    """
    program = f"import sys\n{code}\nfrom rlkernels.cli import main\nsys.exit(main({['demo', *map(str, argv)]!r}))"
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE, env=ENVIRONMENT, cwd=os.sep
    )


@pytest.fixture(scope="module")
def libraries():
    for name in demo.NEEDED:
        pytest.importorskip(name)


NO_NETWORK = """
import socket
def refuse(*args):
    raise AssertionError(f'the demo opens a connection: {args}')
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
"""


def test_the_quick_demo_runs_offline_and_writes_what_it_says(libraries, tmp_path):
    done = run(NO_NETWORK, "--quick", "--out", tmp_path / "out", "--device", "cpu", "--seed", 3)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all three trainers agree within 1e-04" in done.stdout and done.stderr == ""
    record = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert record["passed"] is True and record["tolerance"] == 1e-4 and record["settings"]["seed"] == 3
    assert set(record["versions"]) >= {"rlkernels", "torch", "trl", "transformers", "python"}
    assert any("_ChunkedLogProbFunction" in line for line in record["patch"]["replaced"])
    for name, steps in (("reward", 4), ("dpo", 4), ("grpo", 4)):
        entry = record["trainers"][name]
        comparison = entry["comparison"]
        for side in ("stock", "rlkernels"):
            assert (
                len(entry[side]["losses"])
                == len(entry[side]["grad_norms"])
                == len(entry[side]["loss_seconds"])
                == steps
            )
            assert min(entry[side]["loss_seconds"]) > 0 and entry[side]["peak_bytes"] > 0
        # The gap once more, from the curves: the comparison is not taken on trust.
        stock, ours = entry["stock"]["losses"], entry["rlkernels"]["losses"]
        worst = max(abs(a - b) for a, b in zip(stock, ours, strict=True)) / max(map(abs, stock))
        assert comparison["loss_gap"] == pytest.approx(worst) and worst <= 1e-4 and comparison["grad_norm_gap"] <= 1e-4
        assert comparison["calls"] >= steps and entry["stock"]["kernels"] == {} and comparison["failures"] == []
        op, backend = next(iter(comparison["kernels"])).split(" on ")
        assert (
            op in ("elementwise", "weighted_loss", "token_stats")
            and backend in ("cpu", "eager")
            and f"{op} on" in done.stdout
        )
        assert len(set(stock)) > 1
    assert 0 <= record["trainers"]["reward"]["rlkernels"]["held_out_accuracy"] <= 1
    assert "accuracy" in done.stdout and len(re.findall(r"4/4", done.stdout)) == 6
    image = pytest.importorskip("matplotlib.image").imread(tmp_path / "out" / "demo.png")
    assert min(image.shape[:2]) > 800 and image[..., :3].std() > 0.02


WRONG = """
from rlkernels.integrations.trl import replacements as functions
right = functions.FusedHead.apply
def wrong(self, *args):
    logprobs, *rest = right(self, *args)
    return (1.01 * logprobs, *rest)
functions.FusedHead.apply = wrong
"""


def test_a_kernel_that_is_one_percent_wrong_makes_the_demo_fail(libraries, tmp_path):
    done = run(WRONG, "--quick", "--steps", 2, "--out", tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert (
        "DPOTrainer: loss differs by" in done.stdout
        and "GRPOTrainer: " in done.stdout
        and "all three" not in done.stdout
    )
    assert "RewardTrainer: " not in done.stdout  # it has no head: the wrong kernel is not its own
    record = json.loads((tmp_path / "demo.json").read_text())
    assert record["passed"] is False and record["trainers"]["reward"]["comparison"]["passed"] is True


def test_no_call_to_our_kernels_and_a_nan_are_failures(libraries):
    from rlkernels.cli.demo.report import compare
    from rlkernels.cli.demo.trainers import Run

    def pair(**changes):
        fine = dict(
            losses=[0.7, 0.6],
            grad_norms=[2.0, 1.0],
            loss_seconds=[0.1, 0.1],
            largest_call_seconds=0.1,
            seam_calls=2,
            kernels={"token_stats on cpu": 2},
        )
        return {"dpo": [Run(**fine), Run(**{**fine, **changes})]}

    assert compare(pair())["dpo"].passed
    for changes in ({"seam_calls": 0}, {"kernels": {}}):
        assert compare(pair(**changes))["dpo"].failures == ["the patched run made no call to our kernels"]
    for changes in ({"losses": [float("nan"), 0.6]}, {"losses": [0.7, float("nan")]}, {"grad_norms": [2.0, 1.0003]}):
        assert len(compare(pair(**changes))["dpo"].failures) == 1
    assert compare(pair(grad_norms=[2.0, 1.0001]))["dpo"].passed


def test_the_picture_and_the_record_of_a_run_that_went_to_nan_and_infinity_are_written(libraries, tmp_path):
    from rlkernels.cli.demo import report
    from rlkernels.cli.demo.trainers import Run
    from rlkernels.integrations._patching import PatchReport

    sound = Run([0.7, 0.6], [2.0, 1.0], [None, 0.5], [0.1, 0.1], 0.1)
    broken = Run([float("inf"), 0.6], [2.0, float("nan")], [None, 0.5], [0.1, 0.1], 0.1)
    runs = {name: [sound, broken] for name in ("reward", "dpo", "grpo")}
    facts = report.facts("cpu", 1, 1, 1, 1, demo.SMALL)
    results = report.compare(runs)
    report.draw(runs, results, facts, tmp_path / "demo.png")
    report.write(tmp_path / "demo.json", runs, results, facts, {"out": tmp_path, "steps": None}, PatchReport("TRL"))
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    record = json.loads((tmp_path / "demo.json").read_text())
    assert record["passed"] is False and len(record["trainers"]["dpo"]["comparison"]["failures"]) == 3


def test_ctrl_c_stops_the_demo_with_one_line_and_status_130(libraries, tmp_path):
    command = [
        sys.executable,
        "-m",
        "rlkernels.cli",
        "demo",
        "--quick",
        "--steps",
        "2000",
        "--out",
        str(tmp_path / "out"),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as process:
        try:
            for line in process.stdout:
                if line.startswith("patch "):
                    break
            time.sleep(3)  # into the first run
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130 and errors == "rlkernels demo: interrupted, nothing was written\n"
    assert not (tmp_path / "out").exists()


def test_a_missing_extra_is_one_line_that_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trl", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["demo"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err == f"rlkernels demo needs trl, matplotlib; {how('demo')}\n"


def test_a_gpu_that_is_not_there_is_one_line(libraries):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run("", "--device", "cuda")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "rlkernels demo: --device cuda, but torch sees no GPU; use --device cpu\n"


@pytest.mark.parametrize("argv", [["demo", "--steps", "0"], ["demo", "--device", "tpu"], ["train"], ["--no-such"]])
def test_wrong_usage_exits_with_status_2(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2 and "usage: rlkernels" in capsys.readouterr().err


def test_docstrings_are_read_from_source_in_order_and_nothing_is_imported(tmp_path):
    (tmp_path / "b.py").write_text(
        '"""Module b."""\nraise SystemExit("imported")\nclass C:\n    """Class C."""\n    def f(self):\n        '
        '"""Method f."""\n'
    )
    (tmp_path / "a.py").write_text('async def g():\n    """Function g."""\n')
    (tmp_path / "broken.py").write_text('"""Lost."""\ndef (:\n')
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "t.py").write_text('"""A fixture."""\n')
    assert corpus.docstrings(tmp_path) == ["Function g.", "Module b.", "Class C.", "Method f."]
    assert corpus.docstrings(tmp_path, limit=2) == ["Function g.", "Module b."]
    with pytest.raises(FileNotFoundError, match="no Python source with docstrings"):
        corpus.docstrings(tmp_path / "test" / "none")


def test_passages_are_prose_once_each_and_short():
    prose = " ".join(["The quick brown fox, they said, would not jump over the lazy dog today."] * 2)
    found = corpus.passages([f"Too short.\n\n{prose}", prose, f"{prose}\n\n{'x = f(1, 2); ' * 20}", "long words " * 60])
    assert found == [prose, " ".join(("long words " * 60).split()[:40])]


def test_pairs_share_their_prompt_and_differ_after_it_and_repeat_under_a_seed():
    lines = corpus.passages(corpus.docstrings(limit=1500))
    pairs = corpus.preference_pairs(lines, seed=4)
    assert len(pairs) == len(lines) > 500
    assert pairs == corpus.preference_pairs(lines, seed=4) != corpus.preference_pairs(lines, seed=5)
    assert {p["prompt"] + p["chosen"] for p in pairs} == set(lines)
    assert all(len(p["chosen"].split()) == len(p["rejected"].split()) for p in pairs)
    assert all(p["chosen"] != p["rejected"] for p in pairs)
    words = "one two three four five six".split()
    spoilt = [corpus.corrupt(words, ["seven"], random.Random(seed)) for seed in range(50)]
    assert words == "one two three four five six".split() and {len(w) for w in spoilt} == {6}
    assert (
        any("seven" in w for w in spoilt)
        and any("trhee" in w for w in spoilt)
        and any(w[:2] == ["two", "one"] for w in spoilt)
    )


def test_the_tokenizer_gives_back_every_string(libraries):
    from rlkernels.cli.demo import models

    tokenizer = models.train_tokenizer(["the cat sat on the mat and the dog sat on the log"] * 20, 300)
    for text in ("the cat", " zebra\n\tüñî 漢字", "x == y[1:-1]"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("the cat sat")["input_ids"]) < len("the cat sat") and tokenizer.pad_token_id == 0


class _Slow(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        time.sleep(0.03)
        return x * 2

    @staticmethod
    def backward(ctx, g):
        time.sleep(0.05)
        return g * 2


def test_the_stopwatch_counts_forward_and_backward_and_nothing_else(libraries):
    from rlkernels.cli.demo.meter import Stopwatch

    watch = Stopwatch(_Slow.apply)
    leaf = torch.ones(4, requires_grad=True)
    y = watch(_Slow.apply(leaf))
    assert 0.03 <= watch.seconds < 0.05
    _Slow.apply(y).sum().backward()
    assert 0.08 <= watch.seconds < 0.12 and leaf.grad.tolist() == [8.0] * 4
    watch.lap()
    watch(torch.ones(2))
    watch.lap()
    assert len(watch.laps) == 2 and watch.laps[0] > 0.08 > watch.laps[1] >= 0.03 and watch.seconds == 0


def test_peak_extra_memory_is_what_the_call_holds_at_its_worst(libraries):
    from rlkernels.cli.demo.meter import Stopwatch, peak_extra_bytes

    megabytes = 2**18  # floats

    def hungry(x):
        first = x.new_ones(3 * megabytes)
        del first
        second = x.new_ones(8 * megabytes)
        return x * second.sum()

    watch = Stopwatch(hungry)
    watch(torch.ones(5))
    assert 8 * 2**20 <= peak_extra_bytes(watch) < 8.1 * 2**20
