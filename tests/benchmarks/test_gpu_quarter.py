"""The first quarter of an hour on a machine with a GPU, rehearsed with stand-ins: what hangs, crashes or is taken away
leaves what was finished, and every figure of the table has a place where it is measured.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from paths import ROOT

from benchmarks.gpu_machine import choices, comparison, quarter, run, stages
from benchmarks.gpu_machine.journal import FILES, LINES, TABLE
from benchmarks.gpu_model import predictions

SANITIZER = """import signal, subprocess, sys, time
if sys.argv[2] == "racecheck":  # hangs, and so does a process of another group
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    code = "import os, time; os.setpgid(0, 0); print(os.getpid(), flush=True); time.sleep(60)"
    subprocess.Popen([sys.executable, "-c", code])
    time.sleep(60)
print("========= ERROR SUMMARY: 0 errors")
"""
PROFILER = """import json, sys
arguments = sys.argv[1:]
after = lambda name: arguments[arguments.index(name) + 1]
names = after("--metrics").split(",") if "--metrics" in arguments else {sections}
if {refused} and "--metrics" in arguments:
    sys.exit("==ERROR== Failed to find metric")
plan = [{{"kernel": k, "backend": "auto", "dtype": "bf16", "shape": [32, 131], "bytes": 4192}} for k in {kernels}]
json.dump(plan, open(after("--plan"), "w"))
with open(after("--log-file"), "w") as table:
    print("==PROF== Connected to process 1", file=table)
    counted = [[i, "x", *["1,310.0"] * len(names)] for i in range(4)]
    for line in (["ID", "Kernel Name", *names], ["", "", *names], *counted):
        print(",".join('"%s"' % x for x in line), file=table)
"""


def program(folder, name, text):
    file = folder / name
    file.write_text(f"#!{sys.executable}\n{text}")
    file.chmod(0o755)


def profiler(folder, refused=False):
    names = [name for counters in comparison.COUNTED.values() for name in counters]
    program(folder, "ncu", PROFILER.format(sections=names, refused=refused, kernels=comparison.KERNELS))


def lines(out, event):
    found = map(json.loads, (out / LINES).read_text().splitlines())
    return [line for line in found if line["event"] == event]


def rehearse(out, steps, minutes=0.5):
    return quarter.run(run.run_stages, out, "abc", minutes, True, steps)


def hangs(context):
    code = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('begun', flush=True); time.sleep(60)"
    )
    return stages.ran(context, "hangs", [sys.executable, "-c", code])


def crashes(context):
    return {"ok": False} | stages.ran(context, "crashes", [sys.executable, "-c", "import os; os.abort()"])


def breaks(context):
    raise OSError("disk full")


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Stand-ins for the tools of the toolkit, on PATH; grace is short."""
    folder = tmp_path / "tools"
    folder.mkdir()
    program(folder, "compute-sanitizer", SANITIZER)
    profiler(folder)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(stages, "GRACE", 0.3)
    monkeypatch.setattr(stages, "module", lambda name: False)
    return folder


def test_a_rehearsal_ends_with_a_table_whatever_hangs_crashes_or_breaks(tools, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "LEAST", 0.5)
    steps = {
        "look": (quarter.look, 2.0),
        "build": (hangs, 1.0),
        "sanitize": (quarter.sanitize, 1.5),
        "tests": (breaks, 1.0),
        "bench": (crashes, 1.0),
        "counters": (quarter.counters, 2.0),
    }
    out, start = tmp_path / "out", time.monotonic()
    outcomes, text = rehearse(out, steps)
    assert time.monotonic() - start < 30
    statuses = {name: outcome["status"] for name, outcome in outcomes.items()}
    assert statuses == {**dict.fromkeys(steps, "ended"), "build": "timed out", "tests": "OSError: disk full"}
    assert outcomes["sanitize"]["reason"] == "racecheck timed out"
    assert outcomes["bench"]["returncode"] == -signal.SIGABRT and outcomes["counters"]["ok"]
    assert text == (out / TABLE).read_text() and "REHEARSAL: stand-ins were run" in text and "MET" not in text
    table = text.splitlines()
    assert any(line.startswith("bench     FAILED") and "exit -6" in line for line in table)
    assert any(line.startswith("share of the roof") and comparison.NOT_REACHED in line for line in table)
    (shown,) = [line for line in table if line.startswith("instructions per element") and " two_models " in line]
    assert shown.split()[-3:] == ["10", "-", "-"]  # 32 x 1310 / (32 x 131)
    assert [line["step"] for line in lines(out, "start")] == [line["step"] for line in lines(out, "end")] == list(steps)
    log = (out / "log.txt").read_text()
    assert "===== hangs" in log and "begun" in log and "===== crashes" in log
    assert {path.name for path in out.iterdir()} <= set(FILES) and len(FILES) <= 8


def test_what_a_hanging_step_began_is_gone_even_from_another_group(tools, tmp_path):
    context = stages.Context(stages.Device(choices.REHEARSAL, "90a"), tmp_path, 1.0, out=tmp_path)
    quarter.sanitize(context)
    log = (tmp_path / "sanitize_racecheck.log").read_text().splitlines()
    number = int(log[1])
    for _ in range(50):  # until it is reaped by whoever adopted it
        try:
            state = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state in "ZX":
            return
        time.sleep(0.05)
    pytest.fail(f"process {number} outlived its step")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc")
def test_a_session_is_known_with_its_other_groups():
    assert os.getpid() in stages.session(os.getsid(0)) and stages.session(2**22 + 1) == []


def test_a_machine_that_is_taken_away_leaves_the_figures_so_far(tools, tmp_path):
    def bench(context):
        measured = {"name": "rlkernels auto", "hot": {"median_s": 2e-3}, "failed": False, "remark": ""}
        case = {"name": "token_stats (entropy) forward", "floor_s": 1e-3, "faults": [], "entries": [measured]}
        (context.out / "bench.json").write_text(json.dumps({"cases": [case]}))
        return {"ok": True}

    def taken(context):
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGALRM)).start()  # as the whole's own alarm would
        return stages.ran(context, "taken", [sys.executable, "-c", "import time; time.sleep(60)"])

    out = tmp_path / "out"
    outcomes, text = rehearse(
        out, {"bench": (bench, 5.0), "tests": (taken, 5.0), "counters": (quarter.counters, 5.0)}, minutes=1.0
    )
    assert [o["status"] for o in outcomes.values()] == ["ended", "interrupted", "not started"]
    assert run.status(outcomes) == 130
    (figure,) = lines(out, "figure")
    assert figure["measured"] == 0.5 and figure["kernel"] == "token_stats" and figure["label"] == predictions.LABEL
    assert "counters  not reached" in text and "50.0 %" in text


def test_without_a_device_the_results_say_so_and_the_figures_are_not_reached(tmp_path, capsys, monkeypatch):
    (tmp_path / "bench.json").write_text("{}")  # of an earlier run

    def none():
        raise RuntimeError("sees no CUDA device")

    monkeypatch.setattr(quarter.run, "__defaults__", (*quarter.run.__defaults__[:-1], none))
    assert run.main(["--out", str(tmp_path), "--commit", "abc", "--minutes", "9"]) == 2
    assert "sees no CUDA device" in capsys.readouterr().err
    assert lines(tmp_path, "no device")[0]["reason"] == "sees no CUDA device"
    text = (tmp_path / TABLE).read_text()
    rows = [line for line in text.splitlines() if line.startswith("share of the roof")]
    assert rows and all(comparison.NOT_REACHED in line for line in rows) and not (tmp_path / "bench.json").exists()


def test_the_benchmarks_of_a_rehearsal_fill_every_row_that_they_are_to_fill(tmp_path):
    """Or a case that is renamed would be "not reached" on the device, and nobody would know before."""
    context = stages.Context(stages.Device(choices.REHEARSAL, "90a"), tmp_path, 100.0, "abc", out=tmp_path)
    rows = comparison.rows(rehearsal=True)
    for name in ("bench", "variants"):
        outcome = getattr(quarter, name)(context)
        assert outcome["ok"] and not outcome["faults"] and not outcome["not_measured"], outcome
        comparison.fill(rows, name, json.loads((tmp_path / f"{name}.json").read_text()))
    empty = [row for row in rows if row.source != "counters" and row.measured is None]
    assert not empty and {row.source for row in rows} == {"bench", "variants", "counters"}


def test_the_rows_of_a_device_are_those_of_the_rehearsal_for_both_backends():
    device, rehearsal = comparison.rows(False), comparison.rows(True)
    assert {(r.figure, r.kernel, r.detail) for r in device} == {(r.figure, r.kernel, r.detail) for r in rehearsal}
    assert {r.backend for r in device} == {"triton", "cuda"}
    assert {r.shape for r in device} == {(8192, 151936), (8192, 4096, 151936)}


@pytest.mark.parametrize(
    ("share", "goal", "told"),
    (
        (0.90, 0.87, "1 ms; met; measured / model 0.96; model's limit: issue"),
        (0.80, None, "1 ms; NOT MET; measured / model 0.85; model's limit: issue"),
    ),
)
def test_beside_a_figure_stand_the_model_and_the_goal(monkeypatch, share, goal, told):
    said = SimpleNamespace(
        share_of_roof=0.94,
        instructions_per_element=19.1,
        warps_per_sm=20,
        goal=goal,
        instructions_goal=18.0,
        limiter="issue",
    )
    asked = []
    monkeypatch.setattr(predictions, "lookup", lambda *key: asked.append(key) or said)
    row = comparison.Row(
        "share of the roof", "fused_policy", "cuda", (8192, 151936), "bench", "", "", measured=share, remark="1 ms"
    )
    assert comparison.verdict(row) == told and asked[0] == ("fused_policy", "cuda", "bf16", (8192, 151936))
    line = comparison.table([row])[-1].split()
    assert f"{100 * share:.1f}" in line and "94.0" in line and "87.0" in line
    row.figure, row.measured = "instructions per element", 19.3
    assert comparison.verdict(row) == "1 ms; NOT MET; measured / model 1.01"
    row.detail = "4 blocks per row"  # the model speaks of what is chosen
    assert row.model is None


def test_counters_are_asked_for_by_section_where_a_name_is_unknown(tools, tmp_path):
    profiler(tools, refused=True)
    context = stages.Context(stages.Device(choices.REHEARSAL, "90a"), tmp_path, 40.0, out=tmp_path)
    outcome = quarter.counters(context)
    assert outcome["ok"] and len(outcome["launches"]) == 4 and "--section" in outcome["command"]


def test_launches_that_do_not_match_the_plan_are_no_figures(tmp_path):
    plan, table = tmp_path / "plan.json", tmp_path / "table.csv"
    plan.write_text(json.dumps([{"kernel": "token_stats"}]))
    table.write_text('"ID","Kernel Name","a__b"\n"","","x"\n"0","k","1"\n"1","k","n/a"\n')
    assert quarter.counted(plan, table) == {"launches": [], "reason": "2 launches were counted, 1 planned"}
    plan.write_text(json.dumps([{"kernel": "token_stats"}, {"kernel": "two_models"}]))
    first, second = quarter.counted(plan, table)["launches"]
    assert first["counters"] == {"a__b": 1.0} and second["counters"] == {}
    assert quarter.counted(tmp_path / "none", table)["launches"] == []


@pytest.mark.parametrize("minutes", (4.0, 9.0, 10.0))
def test_the_steps_fit_into_the_minutes_and_each_has_its_share(minutes):
    total = 60 * minutes - quarter.RESERVE
    seconds = [s for _, s in quarter.shares(quarter.STEPS, total).values()]
    assert sum(seconds) == pytest.approx(total) and min(seconds) > run.LEAST
    assert list(quarter.STEPS) == ["look", "build", "sanitize", "tests", "bench", "variants", "counters"]


def test_the_driver_needs_no_torch():
    """It would cost seconds of a loan, and what hangs in it could not be ended."""
    code = "import benchmarks.gpu_machine.run, sys; assert not {'torch', 'rlkernels'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("wrong", (["--minutes", "0"], ["--minutes", "ninety"], ["--rehearse"]))
def test_minutes_that_are_none_are_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        run.main(wrong)
    assert "minutes" in capsys.readouterr().err


@pytest.mark.parametrize("interrupted", (False, True))
def test_beside_the_checkers_the_kernels_of_the_tests_are_compiled_for_the_device(tmp_path, monkeypatch, interrupted):
    begun = []

    class Compiler:
        def __init__(self, command, log, env):
            self.command, self.env, self.ended = command, env, False
            marks = Path(command[command.index("--compile-ahead") + 1])
            marks.mkdir()
            (marks / "a").touch()
            begun.append(self)

        def wait(self, limit_s):
            return {"timed_out": limit_s < 1, "seconds": 2.0}

        def end(self):
            self.ended = True

    def checkers(context, tools):
        assert context.limit_s == quarter.LONGEST
        if interrupted:
            raise stages.Interrupted
        return {"ok": True, "tools": {}}

    monkeypatch.setattr(quarter, "Child", Compiler)
    monkeypatch.setattr(stages, "sanitize", checkers)
    monkeypatch.setattr(stages, "module", lambda name: name == "triton")
    context = stages.Context(stages.Device("x", "90a"), tmp_path, 300.0, out=tmp_path)
    if interrupted:
        with pytest.raises(stages.Interrupted):
            quarter.sanitize(context)
        assert begun[0].ended
        return
    assert quarter.sanitize(context)["compiled_ahead"] == {"kernels": 1, "ended": True, "seconds": 2.0}
    (one,) = begun
    selected = quarter.SELECTED["tests"]
    at = one.command.index("-k")
    assert one.command[at : at + 2] == selected and one.command[one.command.index("--compile-target") + 1] == "sm_90"
    assert "-n" not in one.command and one.env["GPU_SUITE_DEVICE"] == "cpu"


def test_a_head_is_the_figure_of_the_backend_that_served_it():
    """Without the CUDA module the automatic choice is Triton, and its prediction is another one."""
    rows = [row for row in comparison.rows(False) if row.source == "variants" and row.kernel.startswith("linear")]
    times = {name: 2e-3 for name in (choices.BUDGET_LABEL, *map(choices.chunk_label, choices.CHUNKS))}
    entries = [
        {"name": name, "hot": {"median_s": s}, "failed": False, "remark": ""}
        for name, s in {"3 cuBLAS products": 1e-3, **times}.items()
    ]
    case = {"name": "linear_policy_loss", "floor_s": 0.0, "entries": entries}
    found = comparison.fill(rows, "variants", {"cases": [case], "serves": {"fused_policy": "triton"}})
    assert len(found) == 4 and {(row.backend, row.measured) for row in found} == {("triton", 0.5)}


def test_the_build_of_the_cuda_module_takes_no_other_away(tmp_path, monkeypatch):
    module = tmp_path / "rlkernels/_cpu.abi.so"
    module.parent.mkdir()
    module.write_bytes(b"built before")

    def switched_off(context):
        module.unlink()
        module.with_name("_cpu.build.log").touch()
        return {"ok": True}

    monkeypatch.setattr(quarter, "ROOT", tmp_path)
    monkeypatch.setattr(stages, "build_cuda", switched_off)
    assert quarter.build(None) == {"ok": True} and list(module.parent.iterdir()) == [module]
    assert module.read_bytes() == b"built before"
