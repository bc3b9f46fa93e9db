"""The driver behind ``make gpu`` with stages that are stand-ins: what fails, hangs or is interrupted leaves what was
finished.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from paths import ROOT

from benchmarks.gpu_machine import run
from benchmarks.gpu_machine import stages as gpu_stages


@pytest.fixture
def driver():
    return run


@pytest.fixture
def stages():
    return gpu_stages


def results(folder, stages):
    return json.loads((folder / f"{stages.Device('NVIDIA H100 80GB HBM3', '90a').slug}.json").read_text())


def go(driver, stages, tmp_path, table, **rest):
    return driver.run_stages(list(table), table, stages.Device("NVIDIA H100 80GB HBM3", "90a"), tmp_path, **rest)


def ended(**more):
    return lambda context: {"ok": True, **more}


def test_each_stage_is_on_disk_before_the_next_one_starts(driver, stages, tmp_path):
    seen = []

    def second(context):
        seen.append(json.loads((context.folder / "first.json").read_text())["found"])
        seen.append(results(tmp_path, stages)["stages"]["first"]["status"])
        return {"ok": True}

    go(driver, stages, tmp_path, {"first": (ended(found=7), 10.0), "second": (second, 10.0)})
    assert seen == [7, "ended"]
    assert (tmp_path / "nvidia-h100-80gb-hbm3" / "second.json").is_file()
    text = (tmp_path / "nvidia-h100-80gb-hbm3.txt").read_text()
    assert text.startswith("rlkernels on NVIDIA H100 80GB HBM3") and text.count("passed") == 2


def test_a_stage_that_raises_is_recorded_and_the_next_one_runs(driver, stages, tmp_path, capsys):
    def broken(context):
        raise OSError("disk full")

    outcomes = go(driver, stages, tmp_path, {"build": (broken, 10.0), "tests": (ended(), 10.0)})
    assert outcomes["build"]["status"] == "OSError: disk full" and outcomes["build"]["ok"] is False
    assert outcomes["tests"]["ok"] and results(tmp_path, stages)["stages"]["build"]["status"] == "OSError: disk full"


def test_an_interrupt_ends_the_run_and_keeps_what_was_finished(driver, stages, tmp_path):
    def interrupted(context):
        raise KeyboardInterrupt

    outcomes = go(
        driver, stages, tmp_path, {"build": (ended(), 10.0), "tests": (interrupted, 10.0), "bench": (ended(), 10.0)}
    )
    assert [o["status"] for o in outcomes.values()] == ["ended", "interrupted", "not started"]
    assert [o["status"] for o in results(tmp_path, stages)["stages"].values()] == [
        "ended",
        "interrupted",
        "not started",
    ]


def test_time_that_a_stage_leaves_over_goes_to_the_next_and_the_whole_has_an_end(driver, stages, tmp_path):
    now, limits = [0.0], []

    def takes(seconds):
        def stage(context):
            limits.append(context.limit_s)
            now[0] += seconds
            return {"ok": True}

        return stage

    table = {"a": (takes(40.0), 100.0), "b": (takes(160.0), 100.0), "c": (takes(97.0), 100.0), "d": (takes(1.0), 100.0)}
    outcomes = go(driver, stages, tmp_path, table, total_s=300.0, clock=lambda: now[0])
    assert limits == [100.0, 160.0, 100.0] and outcomes["d"]["status"] == "no time left"


def test_a_child_that_hangs_is_ended_with_its_own_children(stages, tmp_path):
    mark = tmp_path / "alive"
    code = (
        "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', \"import time; time.sleep(2.5); "
        f"open({str(mark)!r}, 'w')\"]); "
        "print('started', flush=True); time.sleep(60)"
    )
    context = stages.Context(stages.Device("x", "90a"), tmp_path, 1.0)
    outcome = stages.ran(context, "hangs", [sys.executable, "-c", code])
    assert outcome["timed_out"] and outcome["seconds"] < 4 and "started" in outcome["tail"]
    time.sleep(2.5)
    assert not mark.exists(), "a grandchild outlived its stage"


def test_an_interrupt_inside_a_child_is_part_of_the_outcome(stages, tmp_path):
    context = stages.Context(stages.Device("x", "90a"), tmp_path, 30.0)
    threading.Timer(0.8, os.kill, (os.getpid(), signal.SIGINT)).start()
    outcome = stages.ran(context, "long", [sys.executable, "-c", "import time; time.sleep(60)"])
    assert outcome["interrupted"] and outcome["returncode"] is None and outcome["seconds"] < 10


def test_the_suite_on_a_machine_without_a_gpu_is_counted_as_skipped_with_its_reason(stages, tmp_path, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is visible")
    monkeypatch.setattr(stages, "module", lambda name: False)
    outcome = stages.tests(
        stages.Context(stages.Device("x", "90a"), tmp_path, 100.0, extra={"tests": ["-k", "runtime or sanitized"]})
    )
    assert outcome["ok"] is False, "nothing ran"
    assert outcome["returncode"] == 0 and set(outcome["counts"]) == {"skipped"} and outcome["counts"]["skipped"] > 80
    assert len(outcome["skips"]) == 1 and "no CUDA device" in next(iter(outcome["skips"]))
    assert (
        "SKIPPED" in (tmp_path / "tests.log").read_text() and (tmp_path / "tests.log").read_text().count("SKIPPED") == 1
    )


def test_the_log_of_a_suite_that_was_cut_short_is_read_up_to_its_last_whole_line(stages, tmp_path):
    file = tmp_path / "tests.jsonl"
    file.write_text('{"test": "a", "outcome": "passed"}\n{"test": "b", "outcome": "failed"}\n{"test": "c", "outc')
    assert [e["test"] for e in stages.read_log(file)] == ["a", "b"]
    assert stages.read_log(tmp_path / "absent") == []


def fake_tool(folder, body):
    tool = folder / "compute-sanitizer"
    tool.write_text(f"#!{sys.executable}\nimport sys, time\nname = sys.argv[2]\n{body}\n")
    tool.chmod(0o755)
    return tool


@pytest.mark.parametrize(
    ("body", "ok", "part"),
    [
        ("print('========= ERROR SUMMARY: 0 errors')", True, None),
        (
            "print('========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)' if name == 'racecheck' "
            "else "
            "'ERROR SUMMARY: 0 errors'); "
            "sys.exit(name == 'racecheck')",
            False,
            None,
        ),
        ("print('Device not supported'); sys.exit(1)", None, "memcheck not supported here"),
        ("time.sleep(30 if name == 'initcheck' else 0)", None, "initcheck timed out"),
        ("time.sleep(30 if name == 'memcheck' else 0)", None, "initcheck not started; synccheck not started"),
    ],
)
def test_the_four_checkers_are_judged_by_what_they_found(stages, tmp_path, monkeypatch, body, ok, part):
    fake_tool(tmp_path, body)
    monkeypatch.setenv("PATH", str(tmp_path))
    outcome = stages.sanitize(stages.Context(stages.Device("x", "90a"), tmp_path, 1.5))
    started = {name for pair in stages.TOOLS for name in pair if f"{name} not started" not in outcome.get("reason", "")}
    assert outcome["ok"] is ok and set(outcome["tools"]) == started
    assert part is None or part in outcome["reason"]


def test_without_the_checker_there_is_one_line(stages, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert stages.sanitize(stages.Context(stages.Device("x", "90a"), tmp_path, 5.0)) == {
        "ok": None,
        "reason": "compute-sanitizer is not on PATH: not run",
    }


@pytest.mark.parametrize("fault", ("fails", "takes too long", None))
def test_the_build_makes_the_module_of_this_gpu_first_and_the_cpu_module_whatever_became_of_it(
    stages, tmp_path, monkeypatch, fault
):
    asked, limits = [], []

    def ran(context, name, command, **variables):
        asked.append(variables)
        limits.append(context.limit_s)
        hit = fault is not None and variables["RLKERNELS_CUDA"] == "1"
        return {"returncode": int(hit), "seconds": 1.0, "timed_out": hit and fault == "takes too long", "tail": ""}

    monkeypatch.setattr(stages, "ran", ran)
    outcome = stages.build(stages.Context(stages.Device("x", stages.arch_of(9, 0)), tmp_path, 115.0))
    assert asked == [
        {"RLKERNELS_CUDA": "1", "RLKERNELS_CUDA_ARCHS": "90a", "RLKERNELS_CPU": "0"},
        {"RLKERNELS_CUDA": "0", "RLKERNELS_CPU": "1"},
    ]
    assert limits[0] == 115.0 - stages.CPU_BUILD and limits[1] == pytest.approx(115.0, abs=1.0)
    assert outcome["ok"] is (fault is None) and outcome["cpu"]["returncode"] == 0
    assert [stages.arch_of(*c) for c in ((8, 0), (8, 9), (10, 0), (12, 0))] == ["80", "89", "100a", "120"]


def test_the_command_without_make_is_documented_as_it_is_parsed(driver, monkeypatch, tmp_path, capsys):
    page = (ROOT / "docs/performance.md").read_text()
    line = re.search(r"^ +python3 (benchmarks/gpu_machine/run\.py .*?)(  +#.*)?$", page, re.MULTILINE)[1]
    monkeypatch.setattr(driver, "probe", lambda: (_ for _ in ()).throw(RuntimeError("no device")))
    words = shlex.split(line.replace("${OUT:-benchmarks/results}", str(tmp_path)).replace("<hash>", "abc"))
    assert (ROOT / words[0]).is_file() and driver.main(words[1:]) == 2
    assert "--out" in words and "--commit" in words and "no device" in capsys.readouterr().err


def test_the_benchmark_runs_again_without_peers_where_one_lost_the_device(stages, tmp_path, monkeypatch):
    commands = []

    def ran(context, name, command, **variables):
        commands.append(command)
        Path(command[command.index("--json") + 1]).write_text(
            json.dumps({"cases": [{"faults": []}], "complete": False})
        )
        return {"returncode": 3 if name == "bench" else 0, "seconds": 1.0, "timed_out": False}

    monkeypatch.setattr(stages, "ran", ran)
    outcome = stages.bench(stages.Context(stages.Device("x", "90a"), tmp_path, 190.0, "abc"))
    assert outcome["ok"] is False and outcome["cases"] == 1 and outcome["without_peers"]["returncode"] == 0
    assert "--no-peers" in commands[1] and "--no-peers" not in commands[0] and commands[0][-2:] == ["--commit", "abc"]


def test_the_figures_of_the_benchmark_and_the_record_of_its_stage_are_two_files(driver, stages, tmp_path, monkeypatch):
    entry = {"name": "rlkernels auto", "hot": {"median_s": 2e-3}, "of_floor": 0.5, "remark": ""}
    figures = {
        "roofline": {"read": 4e12, "copy": 4.1e12, "matmul": 8e14},
        "complete": True,
        "sources": {"commit": "abc"},
        "goals": [{"text": "faster", "bound": 2.0, "at_least": True, "worst": 1.5, "met": False, "cases": 1}],
        "cases": [
            {"name": "gae", "shape": [64, 4096], "floor_s": 1e-3, "passes": "2R", "faults": [], "entries": [entry]}
        ],
    }

    def ran(context, name, command, **variables):
        Path(command[command.index("--json") + 1]).write_text(json.dumps(figures))
        return {"returncode": 0, "seconds": 1.0, "timed_out": False}

    monkeypatch.setattr(stages, "ran", ran)
    (tmp_path / "nvidia-h100-80gb-hbm3").mkdir()
    outcomes = go(driver, stages, tmp_path, {"bench": (stages.bench, 190.0)})
    assert outcomes["bench"]["ok"] and outcomes["bench"]["cases"] == 1
    merged, text = results(tmp_path, stages), (tmp_path / "nvidia-h100-80gb-hbm3.txt").read_text()
    assert merged["bench"] == figures and merged["commit"] == "abc" and merged["stages"]["bench"]["seconds"] >= 0
    assert "NOT MET" in text and "2.0000 ms   50.0 %" in text and "read 4000 GB/s" in text


def test_the_stages_fit_into_nine_minutes(driver, stages):
    assert sum(seconds for _, seconds in stages.STAGES.values()) <= driver.TOTAL <= 540 - 4 * stages.GRACE


def test_without_a_device_the_command_says_which_python_sees_none(stages):
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is visible")
    for command in ([str(ROOT / "benchmarks/gpu_machine/run.py")], ["-m", "benchmarks.gpu_machine.run"]):
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 2 and sys.executable in done.stderr and "no CUDA device" in done.stderr


def test_an_unknown_stage_is_refused(driver, capsys):
    with pytest.raises(SystemExit):
        driver.main(["--stages", "build,tset"])
    assert "stages are build, tests, sanitize, bench" in capsys.readouterr().err
