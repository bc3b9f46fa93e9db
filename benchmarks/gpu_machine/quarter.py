"""The steps of the first quarter of an hour on a machine with a GPU, in the order in which their answers are needed:
``run.py --minutes N``.

    look       what is here                                     without it no figure says where it is from
    build      the CUDA module for this GPU alone
    sanitize   forced blocks per row, under memcheck and racecheck, before a wrong number costs the rest; on the other
               processors Triton compiles what the tests will launch
    tests      numbers, losses and rows of both backends
    bench      the headline shape and the fused head, without torch.compile and other libraries
    variants   blocks per row, rows per chunk: what a model chose
    counters   instructions, issue slots, cache hits and bytes of each kernel over rows: why a figure is what it is

A step that hangs is ended with all that it started, and the next one begins. What a step leaves over goes to the next.
"""

import csv
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from benchmarks import ROOT
from benchmarks.cases import names
from benchmarks.gpu_machine import choices, comparison, stages
from benchmarks.gpu_machine.journal import TABLE, Journal
from benchmarks.gpu_machine.stages import Child, Device, Interrupted, environment, ran

RESERVE = 20.0
"""Seconds of the whole that are left to the ends of children and to the table."""
TOOLS = (("memcheck", "racecheck"),)
LONGEST = 100.0
"""Seconds of the checkers even where earlier steps left more: one that hangs must not spend it."""
SELECTED = {
    "sanitize": ["-k", "so_many_blocks"],  # clusters, shared memory of other blocks: what nothing else would find
    "tests": ["-k", "numbers or losses or rows"],
}
PLAIN = {"GPU_SUITE_DEVICE": "cpu", "GPU_SUITE_BACKEND": "eager", "OMP_NUM_THREADS": "1"}
"""The environment of tests that run on plain torch, the only backend that is there without a build."""
ASKED = ",".join(name for counters in comparison.COUNTED.values() for name in counters)
SECTIONS = (
    "SpeedOfLight",
    "SchedulerStats",
    "InstructionStats",
    "MemoryWorkloadAnalysis_Chart",
    "MemoryWorkloadAnalysis",
    "Occupancy",
)
"""Sections to ask for where the profiler does not know one of the counters' names."""


def rehearsal():
    """The environment of a rehearsal's tests: the CPU's kernels where they were built, because plain torch keeps fewer
    digits than the tests ask for.
    """
    built = (ROOT / "rlkernels" / f"_cpu{sysconfig.get_config_var('EXT_SUFFIX')}").exists()
    return {**PLAIN, "GPU_SUITE_BACKEND": "cpu" if built else "eager"}


def rehearsed(context):
    return context.device.name == choices.REHEARSAL


def look(context):
    """Versions, tools and the state of the device."""
    smi = shutil.which("nvidia-smi")
    facts = {"python": platform.python_version(), "arch": context.device.arch}
    code = (
        "import importlib.metadata as m\n"
        "for p in ('torch', 'triton', 'pytest', 'pytest-xdist', 'pybind11', 'ninja'):\n"
        "    try: print(p, m.version(p))\n"
        "    except m.PackageNotFoundError: print(p, 'absent')\n"
    )
    outcome = ran(context, "look", [sys.executable, "-c", code])
    lines = (context.folder / "look.log").read_text().splitlines()
    facts |= dict(line.split(" ", 1) for line in lines if line.count(" ") == 1)
    facts |= {tool: shutil.which(tool) or "absent" for tool in ("nvcc", "compute-sanitizer", "ncu")}
    if smi is not None:
        query = "driver_version,memory.total,clocks.sm,clocks.max.sm,power.limit,temperature.gpu"
        asked = replace(context, limit_s=min(context.limit_s, 10.0))
        ran(asked, "smi", [smi, f"--query-gpu={query}", "--format=csv,noheader"])
        facts["smi"] = (context.folder / "smi.log").read_text().splitlines()[-1]
    return {**outcome, "ok": outcome["returncode"] == 0, "facts": facts}


def build(context):
    """The CUDA module alone. A module of the CPU that is here stays, though a build without it takes it away and notes
    that.
    """
    package = ROOT / "rlkernels"
    kept = {path: path.read_bytes() for path in package.glob("_cpu*.so")}
    try:
        return stages.build_cuda(context)
    finally:
        for path, content in kept.items():
            if not path.exists():
                path.write_bytes(content)
        if kept:
            (package / "_cpu.build.log").unlink(missing_ok=True)


def sanitize(context):
    """The checkers, which use one processor each; beside them the others compile what the tests will launch."""
    context = replace(context, limit_s=min(context.limit_s, LONGEST))
    start, ahead, marks = time.monotonic(), None, context.folder / "compiled"
    if stages.module("triton"):
        command = [sys.executable, "-m", "pytest", "tests/backends/gpu", "-q", "--tb=no", "-p", "no:cacheprovider"]
        command += [*SELECTED["tests"], "--compile-ahead", str(marks)]
        command += ["--compile-target", f"sm_{context.device.arch.rstrip('af')}"]
        command += ["-n", str(max(1, (os.cpu_count() or 1) - 4)), "--dist", "worksteal"] * stages.module("xdist")
        ahead = Child(command, context.folder / "compile_ahead.log", environment(**PLAIN))
    try:
        outcome = stages.sanitize(context, TOOLS)
        if ahead is not None:
            done = ahead.wait(context.limit_s - (time.monotonic() - start))
            count = len(list(marks.iterdir())) if marks.is_dir() else 0
            outcome["compiled_ahead"] = {"kernels": count, "ended": not done["timed_out"], "seconds": done["seconds"]}
    except BaseException:
        if ahead is not None:
            ahead.end()
        raise
    return outcome


def measured(context, name, command, path):
    """A benchmark that writes ``path`` case by case; stopped or not, what is in the file counts."""
    command = [*command, "--json", str(path), *(["--commit", context.commit] if context.commit else [])]
    outcome = ran(context, name, command)
    data = json.loads(path.read_text()) if path.is_file() else {}
    faults = [fault for case in data.get("cases", []) for fault in case["faults"]]
    return {
        **outcome,
        "ok": outcome["returncode"] == 0,
        "cases": len(data.get("cases", [])),
        "not_measured": data.get("not_measured", []),
        "faults": faults,
    }


def bench(context):
    (tokens, vocab), hidden = choices.SHAPE, choices.HIDDEN
    program, seconds = "benchmarks", "0.15"
    if rehearsed(context):
        program, seconds = "benchmarks.gpu_machine.stand_in", "0.002"
        (tokens, vocab), hidden = choices.REHEARSED_SHAPE, choices.REHEARSED_HIDDEN
    command = [sys.executable, "-m", program, "--device", "cuda", "--plain", "--no-compile", "--no-peers", "--headline"]
    command += ["--tokens", str(tokens), "--hidden", str(hidden), "--vocab", str(vocab), "--seconds", seconds]
    # The benchmark begins no case behind its budget, and one takes seconds.
    command += ["--budget", f"{max(context.limit_s - 15, 0.7 * context.limit_s):.0f}"]
    for case in (names.STATS, names.POLICY, names.TWO, names.HEADS[0]):
        command += ["--case", case]
    return measured(context, "bench", command, context.out / "bench.json")


def variants(context):
    command = [sys.executable, "-m", "benchmarks.gpu_machine.variants"]
    command += ["--budget", f"{max(context.limit_s - 15, 0.7 * context.limit_s):.0f}"]
    command += ["--rehearse", "--seconds", "0.002"] if rehearsed(context) else []
    return measured(context, "variants", command, context.out / "variants.json")


def counters(context):
    """Every kernel over rows once under Nsight Compute, whose lines are matched with the plan by their order."""
    tool = shutil.which("ncu")
    if tool is None:
        return {"ok": None, "reason": "ncu is not on PATH: not run"}
    plan, table = context.folder / "plan.json", context.out / "counters.csv"
    program = [sys.executable, "-m", "benchmarks.gpu_machine.profiled", "--plan", str(plan)]
    program += ["--rehearse"] if rehearsed(context) else []
    # The clocks are left as they are: they are not ours to set.
    options = [
        "--clock-control",
        "none",
        "--profile-from-start",
        "off",
        "--kernel-name",
        f"regex:{choices.COUNTED_KERNELS}",
    ]
    options += ["--csv", "--page", "raw", "--print-units", "base", "--log-file", str(table)]
    outcome, sections = {}, [x for name in SECTIONS for x in ("--section", name)]
    for name, asked in (("counters", ["--metrics", ASKED]), ("counters_by_section", sections)):
        left = context.limit_s - outcome.get("seconds", 0.0)
        if left < 15 and outcome:
            break
        plan.unlink(missing_ok=True)
        done = ran(replace(context, limit_s=left), name, [tool, *options, *asked, *program])
        outcome = {**done, "seconds": done["seconds"] + outcome.get("seconds", 0.0)}
        found = counted(plan, table)
        outcome |= found
        if found["launches"] or outcome.get("interrupted"):
            break
    outcome.pop("seconds", None)
    return {**outcome, "ok": outcome["returncode"] == 0 and bool(outcome["launches"])}


def counted(plan, table):
    """``{"launches": the plan's entries with their counters, "reason": why there are none}``."""
    if not plan.is_file() or not table.is_file():
        return {"launches": [], "reason": "the profiler wrote no table"}
    lines = [line for line in table.read_text(errors="replace").splitlines() if line.startswith('"')]
    read = [line for line in csv.DictReader(lines) if line.get("ID")]  # the line of units has none
    wanted = json.loads(plan.read_text())
    if len(read) != len(wanted):
        return {"launches": [], "reason": f"{len(read)} launches were counted, {len(wanted)} planned"}
    for one, line in zip(wanted, read, strict=True):
        one["name"], one["counters"] = line.get("Kernel Name", ""), {k: _real(v) for k, v in line.items() if "__" in k}
        one["counters"] = {k: v for k, v in one["counters"].items() if v is not None}
    return {"launches": wanted}


def _real(text):
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None


STEPS = {
    "look": (look, 20.0),
    "build": (build, 60.0),
    "sanitize": (sanitize, 90.0),
    "tests": (stages.tests, 120.0),
    "bench": (bench, 90.0),
    "variants": (variants, 60.0),
    "counters": (counters, 60.0),
}
"""Name to function and its share of the time, seconds when there are nine minutes."""


def shares(steps, total_s):
    """The steps with their seconds in proportion, so that a shorter loan reaches the last one, too."""
    factor = total_s / sum(seconds for _, seconds in steps.values())
    return {name: (function, factor * seconds) for name, (function, seconds) in steps.items()}


def run(run_stages, out, commit, minutes, rehearse=False, steps=STEPS, find=stages.probe):
    """The whole quarter of an hour, with its table at the end.

    Returns:
        ``(outcomes, table)``; without a device None and the reason, which stands in the results, too.
    """
    start, out = time.monotonic(), out.resolve()
    with tempfile.TemporaryDirectory(prefix="rlkernels-quarter-") as scratch:

        def journal(device):
            variables = rehearsal() if rehearse else {}
            return Journal(device, out, Path(scratch), list(steps), commit, rehearse, SELECTED, variables)

        try:
            device = Device(choices.REHEARSAL, "90a") if rehearse else find()
        except (RuntimeError, OSError, ValueError, subprocess.SubprocessError) as error:
            journal(Device("no device", "-")).line("no device", reason=str(error))
            return None, str(error)
        keeper, before = journal(device), signal.getsignal(signal.SIGALRM)
        left = 60.0 * minutes - (time.monotonic() - start)
        total = max(left - RESERVE, 0.5 * left)

        def late(number, frame):
            raise Interrupted

        # Should a limit fail to end a step, the table is written all the same before the machine is taken away.
        signal.signal(signal.SIGALRM, late)
        signal.setitimer(signal.ITIMER_REAL, max(left - 0.25 * RESERVE, 1.0))
        try:
            outcomes = run_stages(list(steps), shares(steps, total), device, out, total, commit, keeper=keeper)
        except Interrupted:  # between two steps
            outcomes = keeper.outcomes
            keeper.finished(outcomes)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, before)
        return outcomes, (out / TABLE).read_text()
