"""``python -m benchmarks`` on a CPU end to end, on a shape that takes seconds."""

import json
import sys

import pytest
import torch

import rlkernels
from benchmarks import __main__ as command
from benchmarks import lineup, run_linear
from benchmarks.__main__ import main
from benchmarks.cases import host_cost, logits_cpu
from benchmarks.cases.case import EAGER, IN_PLACE, OURS, Case
from benchmarks.cases.logits import FORWARD, LOGPROBS, POLICY
from benchmarks.lineup import Lineup
from benchmarks.problems import logits as logits_problem
from benchmarks.report import cpu as cpu_report
from benchmarks.timing import cpu as cpu_timing
from benchmarks.timing.contender import Contender
from rlkernels.cli import machine
from rlkernels.installing import how

TINY = ["--device", "cpu", "--quick", "--tokens", "6", "--vocab", "515", "--rounds", "3", "--no-compile", "--no-peers"]
TINY += ["--plain"]


@pytest.fixture(autouse=True)
def few_calls_per_sample(monkeypatch):
    """No test here reads a time of the host, and 200 calls per sample were half of this file's time."""
    monkeypatch.setattr(host_cost, "CALLS", 5)


def test_bench_writes_every_figure_it_prints(capsys, tmp_path):
    file, picture = tmp_path / "figures" / "bench.json", tmp_path / "bench.png"
    plot = ["--plot", str(picture)] if machine.version("matplotlib") else []
    assert main([*TINY, "--json", str(file), *plot]) == 0
    printed = capsys.readouterr().out
    data = json.loads(file.read_text())
    assert {
        "command",
        "machine",
        "threads",
        "shape",
        "dtype",
        "rounds",
        "checked_rows",
        "correct",
        "faults",
        "remarks",
        "read_bandwidth",
        "cases",
        "targets",
        "host",
        "linear",
    } == set(data)
    assert data["correct"] is True and data["shape"] == [6, 515] and data["dtype"] == "bf16"
    assert [case["name"] for case in data["cases"]] == list(logits_cpu.CASES)
    for case in data["cases"]:
        assert case["name"] in printed
        for contender in case["contenders"]:
            assert len(contender["samples_s"]) == 3 and min(contender["samples_s"]) > 0
            assert contender["peak_bytes"] is not None and f"{1e3 * contender['median_s']:.2f}" in printed
    assert {f["name"].split(" ")[0] for f in data["host"]} == {
        "policy_loss",
        "value_loss",
        "pairwise_reward_loss",
        "token_logprobs",
    }
    for figures in data["host"]:
        assert figures["name"] in printed and figures["error"] < 1e-5
        for who, samples in figures["samples_us"].items():
            assert len(samples) == 3 and min(samples) > 0 and f"{figures['median_us'][who]:.1f}" in printed
    assert {(c["kind"], c["dtype"]) for c in data["linear"]["cases"]} == {
        (kind, dtype) for kind in run_linear.CASES for dtype in ("fp32", "bf16")
    }
    assert all(
        c["name"] in printed and c["shape"] == [6, run_linear.QUICK_HIDDEN, 515] for c in data["linear"]["cases"]
    )
    assert len(data["machine"]["sources"]["package_sha256"]) == 64 and data["machine"]["processor"]
    assert {t["text"] for t in data["targets"]} and "other shape" in printed and "NOT MET" not in printed
    assert not plot or picture.read_bytes().startswith(b"\x89PNG")


def test_bench_counts_the_memory_of_a_run():
    megabyte = torch.zeros(2**20, dtype=torch.uint8)
    contender = Contender("copies twice, frees one", lambda _: (megabyte + 1) + megabyte)
    cpu_timing.memory(contender)
    assert 2 * 2**20 <= contender.peak_bytes < 2.1 * 2**20


def test_bench_in_place_backward_takes_no_memory_of_the_size_of_the_logits():
    problem = logits_problem.make(torch.device("cpu"), 32, 4099, "bf16")
    case = logits_cpu.CASES[LOGPROBS](problem, logits_problem.judge(problem), Lineup())
    plain, in_place = case.named(OURS), case.named(OURS + IN_PLACE)
    for contender in (plain, in_place):
        cpu_timing.first_run(contender)
        cpu_timing.memory(contender)
    assert plain.peak_bytes >= problem.bytes
    if "cpu" not in rlkernels.available_backends()["absent"]:  # eager works in fp32 copies, whatever is asked
        assert in_place.peak_bytes < 0.1 * problem.bytes
    assert in_place.errors == plain.errors


def test_bench_fails_when_an_answer_is_one_percent_wrong(monkeypatch, capsys):
    true = rlkernels.token_logprobs
    monkeypatch.setattr(rlkernels, "token_logprobs", lambda *a, **k: true(*a, **k) * 1.01)
    assert main([*TINY, "--case", FORWARD, "--case", LOGPROBS]) == 1
    printed = capsys.readouterr().out
    assert "WRONG: token_logprobs forward, rlkernels: error of logp" in printed
    assert "WRONG: token_logprobs forward+backward, rlkernels: error of gradient" in printed


def test_bench_fails_when_a_small_loss_is_one_percent_wrong(monkeypatch, capsys):
    true = rlkernels.policy_loss
    monkeypatch.setattr(rlkernels, "policy_loss", lambda *a, **k: true(*a, **k) * 1.01)
    assert main([*TINY, "--case", host_cost.NAME]) == 1
    assert f"WRONG: {host_cost.NAME}, policy_loss [64, 32]: error is 0.01" in capsys.readouterr().out


def test_bench_shows_a_competitor_that_fails_as_one_line(monkeypatch, capsys):
    def no_compiler(function):
        def run(*arguments):
            raise RuntimeError("no C++ compiler\nsecond line")

        return run

    monkeypatch.setattr(lineup, "compiled", no_compiler)
    arguments = [a for a in TINY if a != "--no-compile"]
    assert main([*arguments, "--case", FORWARD]) == 0
    printed = capsys.readouterr().out
    assert "note: token_logprobs forward: torch.compile not measured: no C++ compiler\n" in printed
    assert "second line" not in printed


def test_bench_without_a_peer_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl.trainer.utils", None)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    found, remarks = logits_cpu.peers()
    assert found == {}
    assert [remark.split(":")[0] for remark in remarks] == ["TRL", "Liger"]


def test_bench_plot_without_matplotlib_tells_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*TINY, "--plot", "never.png"]) == 2
    assert how("bench") in capsys.readouterr().err


def test_bench_stops_cleanly_on_interrupt(monkeypatch, capsys):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "measure", interrupted)
    assert main(TINY) == 130
    assert capsys.readouterr().err == "benchmarks: interrupted\n"


def test_bench_refuses_a_count_below_one(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--tokens", "0"])
    assert stop.value.code == 2
    assert "must be at least 1, got 0" in capsys.readouterr().err


def test_a_race_alternates_its_contenders():
    order = []
    contenders = [Contender(name, lambda _, name=name: order.append(name)) for name in "AB"]
    cpu_timing.race(contenders, rounds=3, warmup=0)
    assert "".join(order) == "ABABAB"
    assert all(len(c.samples) == 3 for c in contenders)


def test_a_race_keeps_preparation_outside_the_clock():
    prepared = []

    def prepare(buffer):
        import time

        time.sleep(0.05)
        prepared.append(True)

    contender = Contender("slow to prepare", lambda _: None, prepare)
    cpu_timing.race([contender], rounds=2, warmup=1)
    assert len(prepared) == 3 and max(contender.samples) < 0.04


def test_targets_compare_medians_of_the_same_run():
    def contender(name, seconds, **rest):
        return Contender(name, lambda _: None, samples=[seconds, seconds, 100.0], **rest)

    in_place = contender(OURS + IN_PLACE, 1.0, peak_bytes=5, resident_bytes=50)
    both = Case(LOGPROBS, [contender(OURS, 1.0), in_place, contender(EAGER, 14.0)])
    policy = Case(
        POLICY,
        [contender(OURS, 3.0), contender(logits_cpu.PASS_FORWARD, 1.0), contender(logits_cpu.PASS_BACKWARD, 3.0)],
    )
    goals = cpu_report.targets({LOGPROBS: both, POLICY: policy}, logits_bytes=1000)
    assert [(g.value, g.met) for g in goals] == [
        (None, None),
        (None, None),
        (14.0, False),
        (None, None),
        (0.05, True),
        (0.75, True),
    ]
