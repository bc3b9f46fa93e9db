"""``rlkernels doctor`` and ``rlkernels bench`` end to end, on a shape that takes seconds."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from paths import ROOT

import rlkernels
from rlkernels.backends import DEVICES, measured_order
from rlkernels.cli import (
    bench,
    bench_cases,
    bench_host,
    bench_linear,
    bench_problem,
    bench_report,
    bench_timing,
    doctor,
    machine,
    main,
    tables,
)

TINY = [
    "bench",
    "--device",
    "cpu",
    "--quick",
    "--tokens",
    "6",
    "--vocab",
    "515",
    "--rounds",
    "3",
    "--no-compile",
    "--no-peers",
    "--plain",
]


@pytest.fixture
def without_rich(monkeypatch):
    for name in ("rich", "rich.console", "rich.table", "rich.text"):
        monkeypatch.setitem(sys.modules, name, None)


def test_doctor_names_versions_ops_absent_backends_and_variables(capsys, without_rich):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    state = rlkernels.available_backends()
    names = [*state["serves"]["cpu"], *state["absent"], *state["absent"].values(), *doctor.ENVIRONMENT]
    for expected in [torch.__version__, machine.processor(), *names]:
        assert expected in printed, f"{expected!r} is missing"


def test_doctor_says_which_instruction_set_the_cpu_backend_uses(capsys):
    main(["doctor", "--plain"])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("instruction set"))
    absent = "cpu" in rlkernels.available_backends()["absent"]
    assert line.split()[-1] in ({"-"} if absent else {"avx512", "avx2", "baseline"})


def test_doctor_tells_the_reason_where_the_cpu_backend_is_absent(capsys, monkeypatch):
    state = {"serves": {"cpu": {"token_stats": "eager"}}, "absent": {"cpu": "no C++ compiler was found"}}
    monkeypatch.setattr(rlkernels, "available_backends", lambda: state)
    assert main(["doctor", "--plain"]) == 0
    printed = capsys.readouterr().out
    assert "no C++ compiler was found" in printed
    assert "every backend is available" not in printed


def test_doctor_prints_the_measured_choice_or_says_that_nothing_is_measured(capsys, monkeypatch):
    monkeypatch.setattr(measured_order, "TABLE", {})
    main(["doctor", "--plain"])
    printed = capsys.readouterr().out
    assert "nothing has been measured on a GPU yet; the order below is used" in printed
    assert re.search(r"^cuda +triton, cuda, eager$", printed, re.MULTILINE)
    monkeypatch.setattr(
        measured_order,
        "TABLE",
        {
            ("fused_policy", "cuda", 2, "large"): ("cuda", "triton"),
            ("fused_policy", "cuda", 2, "small"): ("triton", "cuda"),
        },
    )
    main(["doctor", "--plain"])
    printed = capsys.readouterr().out
    assert re.search(r"^fused_policy +cuda +2 bytes +large +cuda, triton$", printed, re.MULTILINE)
    assert re.search(r"^fused_policy +cuda +2 bytes +small +triton, cuda$", printed, re.MULTILINE)
    assert "nothing has been measured" not in printed


def test_what_doctor_prints_is_what_is_chosen(monkeypatch):
    monkeypatch.setattr(measured_order, "TABLE", {("fused_policy", "cuda", 2, "large"): ("cuda",)})
    order = DEVICES["cuda"]
    assert measured_order.preferred("fused_policy", "cuda", torch.bfloat16, 151936, order) == (
        "cuda",
        "triton",
        "eager",
    )
    for op, dtype, vocab in (
        ("token_stats", torch.bfloat16, 151936),
        ("fused_policy", torch.float32, 151936),
        ("fused_policy", torch.bfloat16, 32000),
    ):
        assert measured_order.preferred(op, "cuda", dtype, vocab, order) == order


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
    assert [case["name"] for case in data["cases"]] == list(bench_cases.CASES)
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
        (kind, dtype) for kind in bench_linear.CASES for dtype in ("fp32", "bf16")
    }
    assert all(
        c["name"] in printed and c["shape"] == [6, bench_linear.QUICK_HIDDEN, 515] for c in data["linear"]["cases"]
    )
    assert len(data["machine"]["sources"]["package_sha256"]) == 64 and data["machine"]["processor"]
    assert {t["text"] for t in data["targets"]} and "other shape" in printed and "NOT MET" not in printed
    assert not plot or picture.read_bytes().startswith(b"\x89PNG")


def test_bench_counts_the_memory_of_a_run():
    megabyte = torch.zeros(2**20, dtype=torch.uint8)
    contender = bench_timing.Contender("copies twice, frees one", lambda _: (megabyte + 1) + megabyte)
    bench_timing.memory(contender)
    assert 2 * 2**20 <= contender.peak_bytes < 2.1 * 2**20


def test_bench_in_place_backward_takes_no_memory_of_the_size_of_the_logits():
    problem = bench_problem.make(32, 4099, "bf16")
    case = bench_cases.both(problem, bench_cases.Judge(problem, bench_problem.truth(problem)), {})
    plain, in_place = case.named(bench_cases.OURS), case.named(bench_cases.IN_PLACE)
    for contender in (plain, in_place):
        bench_timing.first_run(contender)
        bench_timing.memory(contender)
    assert plain.peak_bytes >= problem.bytes
    if "cpu" not in rlkernels.available_backends()["absent"]:  # eager works in fp32 copies, whatever is asked
        assert in_place.peak_bytes < 0.1 * problem.bytes
    assert in_place.errors == plain.errors


def test_bench_fails_when_an_answer_is_one_percent_wrong(monkeypatch, capsys):
    true = rlkernels.token_logprobs
    monkeypatch.setattr(rlkernels, "token_logprobs", lambda *a, **k: true(*a, **k) * 1.01)
    assert main([*TINY, "--case", bench_cases.FORWARD, "--case", bench_cases.BOTH]) == 1
    printed = capsys.readouterr().out
    assert "WRONG: token_logprobs forward, rlkernels: error of logp" in printed
    assert "WRONG: token_logprobs forward+backward, rlkernels: error of gradient" in printed


def test_bench_fails_when_a_small_loss_is_one_percent_wrong(monkeypatch, capsys):
    true = rlkernels.policy_loss
    monkeypatch.setattr(rlkernels, "policy_loss", lambda *a, **k: true(*a, **k) * 1.01)
    assert main([*TINY, "--case", bench_host.NAME]) == 1
    assert f"WRONG: {bench_host.NAME}, policy_loss [64, 32]: error is 0.01" in capsys.readouterr().out


def test_bench_shows_a_competitor_that_fails_as_one_line(monkeypatch, capsys):
    def no_compiler(function):
        def run(*arguments):
            raise RuntimeError("no C++ compiler\nsecond line")

        return run

    monkeypatch.setattr(bench_cases, "compiled", no_compiler)
    arguments = [a for a in TINY if a != "--no-compile"]
    assert main([*arguments, "--case", bench_cases.FORWARD]) == 0
    printed = capsys.readouterr().out
    assert "note: token_logprobs forward: torch.compile not measured: no C++ compiler\n" in printed
    assert "second line" not in printed


def test_bench_without_a_peer_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl.trainer.utils", None)
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    found, remarks = bench_cases.peers()
    assert found == {}
    assert [remark.split(":")[0] for remark in remarks] == ["TRL", "Liger"]


def test_bench_plot_without_matplotlib_tells_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*TINY, "--plot", "never.png"]) == 2
    assert "rlkernels[bench]" in capsys.readouterr().err


def test_bench_stops_cleanly_on_interrupt(monkeypatch, capsys):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "measure", interrupted)
    assert main(TINY) == 130
    assert capsys.readouterr().err == "rlkernels bench: interrupted\n"


def test_bench_refuses_a_count_below_one(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--tokens", "0"])
    assert stop.value.code == 2
    assert "must be at least 1, got 0" in capsys.readouterr().err


def test_a_race_alternates_its_contenders():
    order = []
    contenders = [bench_timing.Contender(name, lambda _, name=name: order.append(name)) for name in "AB"]
    bench_timing.race(contenders, rounds=3, warmup=0)
    assert "".join(order) == "ABABAB"
    assert all(len(c.samples) == 3 for c in contenders)


def test_a_race_keeps_preparation_outside_the_clock():
    prepared = []

    def prepare():
        import time

        time.sleep(0.05)
        prepared.append(True)

    contender = bench_timing.Contender("slow to prepare", lambda _: None, prepare)
    bench_timing.race([contender], rounds=2, warmup=1)
    assert len(prepared) == 3 and max(contender.samples) < 0.04


def test_targets_compare_medians_of_the_same_run():
    def contender(name, seconds, **rest):
        return bench_timing.Contender(name, lambda _: None, samples=[seconds, seconds, 100.0], **rest)

    in_place = contender(bench_cases.IN_PLACE, 1.0, peak_bytes=5, resident_bytes=50)
    both = bench_cases.Case(
        bench_cases.BOTH, [contender(bench_cases.OURS, 1.0), in_place, contender(bench_cases.EAGER, 14.0)]
    )
    policy = bench_cases.Case(
        bench_cases.POLICY,
        [
            contender(bench_cases.OURS, 3.0),
            contender(bench_cases.PASS_FORWARD, 1.0),
            contender(bench_cases.PASS_BACKWARD, 3.0),
        ],
    )
    goals = bench_report.targets({bench_cases.BOTH: both, bench_cases.POLICY: policy}, logits_bytes=1000)
    assert [(g.value, g.met) for g in goals] == [
        (None, None),
        (None, None),
        (14.0, False),
        (None, None),
        (0.05, True),
        (0.75, True),
    ]


def test_plain_tables_align_numbers_right_and_words_left():
    assert tables.text("T", ["what", "ms"], [["a", "1.5"], ["bcd", "12.5"]]) == (
        "\nT\nwhat    ms\n----  ----\na      1.5\nbcd   12.5\n"
    )


def test_python_of_the_readme_runs():
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(examples) == 2, "the second one, of TRL, is run by the tests of the integration"
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "example.py")
        script.write_text(examples[0].replace("32000", "517"))
        environment = {**os.environ, "PYTHONPATH": str(Path(rlkernels.__file__).resolve().parents[1])}
        done = subprocess.run(
            [sys.executable, str(script)], capture_output=True, text=True, env=environment, cwd=folder
        )
    assert done.returncode == 0, done.stderr
