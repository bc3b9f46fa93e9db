"""The stages of ``run.py``: each is a child process or a few, with a time limit, whose outcome is plain data."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks import ROOT

TOOLS = (("memcheck", "racecheck"), ("initcheck", "synccheck"))
"""Those of a pair run side by side, and the second pair in what time the first leaves."""
TAIL = 4000
FIGURES = "figures.json"
"""Files that the benchmark writes; ``bench.json`` is the record of its stage."""
CPU_BUILD = 30.0
"""Seconds of the build that are kept for ``_cpu``."""
BUILD = (sys.executable, "setup.py", "build_ext", "--inplace")
GRACE = 5.0
"""Seconds that a child gets to end by itself after it was asked to."""


@dataclass
class Device:
    """The device as ``probe`` found it; ``arch`` as nvcc names it, with the features of that chip alone where it has
    them.
    """

    name: str
    arch: str

    @property
    def slug(self):
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")


@dataclass
class Context:
    """The folder in which a stage works, and the time until which it may.

    ``extra``: further arguments by stage. ``variables``: of the environment in which tests run. ``out``: the folder of
    files that a caller keeps, where that is another one.
    """

    device: Device
    folder: Path
    limit_s: float
    commit: str | None = None
    extra: dict = field(default_factory=dict)
    variables: dict = field(default_factory=dict)
    out: Path | None = None


class Interrupted(Exception):
    """The run was asked to end; what was finished is kept."""


def arch_of(major, minor):
    """``sm_90`` and ``sm_100`` have instructions that only their own code may use."""
    return f"{major}{minor}" + ("a" if (major, minor) in ((9, 0), (10, 0)) else "")


def probe():
    """The current CUDA device, asked in a child: this process never holds a context that a stage would have to share.

    Raises:
        RuntimeError: torch or a device is missing; the message says which.
    """
    code = "import torch; p = torch.cuda.get_device_properties(0); print(p.name); print(p.major, p.minor)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment())
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise RuntimeError(f"this Python ({sys.executable}) sees no CUDA device through torch: {lines[-1]}")
    name, capability = done.stdout.strip().splitlines()[-2:]
    return Device(name, arch_of(*map(int, capability.split())))


def environment(**more):
    """This environment with the checkout importable, and nothing else changed."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **more}


def session(leader):
    """The processes of the session that ``leader`` began, those that it has left behind among them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            after_name = path.read_text(errors="replace").rpartition(")")[2].split()
            if int(after_name[3]) == leader:
                found.append(int(path.parent.name))
    return found


class Child:
    """A process in a group of its own, its output in a file."""

    def __init__(self, command, log, env=None):
        self.command, self.log, self.started = command, log, time.monotonic()
        log.parent.mkdir(parents=True, exist_ok=True)
        self.file = log.open("w")
        self.file.write(" ".join(map(str, command)) + "\n")
        self.file.flush()
        self.process = subprocess.Popen(
            command,
            stdout=self.file,
            stderr=subprocess.STDOUT,
            env=env or environment(),
            cwd=ROOT,
            start_new_session=True,
        )

    def wait(self, limit_s):
        """``{"returncode", "seconds", "timed_out"}``; past the limit the group is asked to end, then made to."""
        timed_out = False
        try:
            self.process.wait(max(limit_s - (time.monotonic() - self.started), 0.1))
        except subprocess.TimeoutExpired:
            timed_out = True
            self.end()
        self.kill()  # what it left behind would keep the device, and a processor
        self.file.close()
        return {
            "returncode": self.process.returncode,
            "seconds": round(time.monotonic() - self.started, 2),
            "timed_out": timed_out,
        }

    def end(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE)
        self.kill()

    def kill(self):
        """Ends the whole session, whether or not its first process has ended: ninja's commands have other groups."""
        for number in session(self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # a call of the driver that never returns
            self.process.wait(GRACE)

    @property
    def tail(self):
        return self.log.read_text(errors="replace")[-TAIL:]


def ran(context, name, command, **variables):
    """One child until it ends or the stage's limit is over.

    An interrupt of this process ends it too, and is part of the outcome.
    """
    child = Child(command, context.folder / f"{name}.log", environment(**variables))
    try:
        outcome = child.wait(context.limit_s)
    except (KeyboardInterrupt, Interrupted):
        child.end()
        outcome = {
            "returncode": None,
            "seconds": round(time.monotonic() - child.started, 2),
            "timed_out": False,
            "interrupted": True,
        }
    return {**outcome, "command": " ".join(map(str, command)), "tail": "" if outcome["returncode"] == 0 else child.tail}


def build(context):
    """``_cuda`` for this GPU alone, then ``_cpu``, in place: two commands, because the first must not cost the second.

    Where ``_cuda`` cannot be built, or not in time, Triton serves the GPU.
    """
    start = time.monotonic()
    outcome = build_cuda(replace(context, limit_s=max(context.limit_s - CPU_BUILD, 0.5 * context.limit_s)))
    if not outcome["interrupted"]:
        left = replace(context, limit_s=context.limit_s - (time.monotonic() - start))
        second = ran(left, "build_cpu", BUILD, RLKERNELS_CUDA="0", RLKERNELS_CPU="1")
        outcome["ok"] = outcome["ok"] and second["returncode"] == 0
        outcome["interrupted"] = second.get("interrupted", False)
        outcome["cpu"] = second
        outcome["modules"] = modules()
    return outcome


def build_cuda(context):
    """``_cuda`` for this GPU alone, in place; what it spills, by the compiler's report."""
    here = {"RLKERNELS_CUDA": "1", "RLKERNELS_CUDA_ARCHS": context.device.arch, "RLKERNELS_CPU": "0"}
    done = ran(context, "build", BUILD, **here)
    outcome = {"ok": done["returncode"] == 0, "arch": context.device.arch, "cuda": done, "modules": modules()}
    outcome["interrupted"], outcome["timed_out"] = done.get("interrupted", False), done["timed_out"]
    report = ROOT / "rlkernels" / "_cuda.ptxas.txt"
    if report.is_file():
        spills = [int(n) for n in re.findall(r"(\d+) bytes spill", report.read_text())]
        outcome["spill_bytes"] = sum(spills)
    return outcome


def modules():
    return sorted(p.name for p in (ROOT / "rlkernels").glob("_c*.so"))


def read_log(path):
    """The lines that the suite wrote as its tests ended; the last may be half a line."""
    found = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return found


def tests(context):
    """``tests/backends/gpu``, on several processes where pytest-xdist is installed: most of the time goes into
    compiling kernels.
    """
    log = (context.out or context.folder) / "tests.jsonl"
    log.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/backends/gpu",
        "-q",
        "-rfEs",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        f"--gpu-log={log}",
        *context.extra.get("tests", ()),
    ]
    if module("xdist"):
        command += ["-n", str(min(6, max(1, (os.cpu_count() or 2) // 2))), "--dist", "worksteal"]
    outcome = ran(context, "tests", command, **context.variables)
    entries = read_log(log)
    counts = Counter(e["outcome"] for e in entries)
    skips = Counter(e["message"].rsplit(", '", 1)[-1].rstrip("')") for e in entries if e["outcome"] == "skipped")
    # A suite of which nothing ran has proven nothing.
    ok = outcome["returncode"] == 0 and counts["passed"] > 0
    return {
        **outcome,
        "ok": ok,
        "counts": dict(counts),
        "skips": dict(skips),
        "failures": [{"test": e["test"], "message": e["message"][-600:]} for e in entries if e["outcome"] == "failed"],
    }


def module(name):
    import importlib.util

    return importlib.util.find_spec(name) is not None


def sanitize(context, tools=TOOLS):
    """The small set under the tools of compute-sanitizer, two side by side: they spend their time on the host. The pair
    that finds what the tests cannot comes first, because one tool that ends judges more than four that are cut off.
    """
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"ok": None, "reason": "compute-sanitizer is not on PATH: not run"}
    suite = [
        sys.executable,
        "-m",
        "pytest",
        "tests/backends/gpu/test_gpu_sanitized.py",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        *context.extra.get("sanitize", ()),
    ]
    # Without torch's caching allocator, or a read past a tensor's end lands in memory that torch holds anyway.
    env, start = environment(PYTORCH_NO_CUDA_MEMORY_CACHING="1", **context.variables), time.monotonic()
    children, outcomes = {}, {}
    try:
        for names in tools:
            pair = {}
            left = context.limit_s - (time.monotonic() - start)
            for name in names if left > 0.2 else ():
                command = [tool, "--tool", name, "--error-exitcode", "1"]
                command += ["--target-processes", "application-only", *suite]
                pair[name] = children[name] = Child(command, context.folder / f"sanitize_{name}.log", env)
            outcomes |= {name: child.wait(left) for name, child in pair.items()}
    except BaseException:
        for child in children.values():
            child.end()
        raise
    for name, child in children.items():
        text = child.log.read_text(errors="replace")
        found = re.findall(r"ERROR SUMMARY: (\d+)|RACECHECK SUMMARY: (\d+) hazard", text)
        outcomes[name].update(
            errors=max((int(a or b) for a, b in found), default=None),
            tail="" if outcomes[name]["returncode"] == 0 else child.tail,
            unsupported="Device not supported" in text or "LibraryNotLoaded" in text,
        )
    # A tool that ran out of time, or refused the device, has judged nothing, unless it had found something by then.
    open_ = {
        name: "timed out" if o["timed_out"] else "not supported here"
        for name, o in outcomes.items()
        if (o["timed_out"] or o["unsupported"]) and not o["errors"]
    }
    open_ |= {name: "not started" for names in tools for name in names if name not in outcomes}
    bad = any(o["returncode"] != 0 for name, o in outcomes.items() if name not in open_)
    reason = {"reason": "; ".join(f"{name} {why}" for name, why in open_.items())} if open_ else {}
    return {"ok": False if bad else None if open_ else True, **reason, "tools": outcomes}


def bench(context):
    """``python -m benchmarks --device cuda`` with peers; its JSON grows case by case.

    Once more without peers where one of them lost the device.
    """
    path = context.folder / FIGURES
    path.unlink(missing_ok=True)
    start = time.monotonic()

    def once(name, figures, left, *more):
        command = [
            sys.executable,
            "-m",
            "benchmarks",
            "--device",
            "cuda",
            "--plain",
            "--headline",
            "--seconds",
            "0.15",
            "--budget",
            f"{max(left - 25, 10):.0f}",
            "--json",
            str(context.folder / figures),
            "--plot",
            str(context.folder),
            *more,
        ]
        if context.commit:
            command += ["--commit", context.commit]
        return ran(Context(context.device, context.folder, left, context.commit), name, command)

    outcome = once("bench", FIGURES, context.limit_s, *context.extra.get("bench", ()))
    if outcome["returncode"] == 3:
        left = context.limit_s - (time.monotonic() - start)
        if left > 40:
            outcome["without_peers"] = once(
                "bench_without_peers", f"without_peers_{FIGURES}", left, "--no-peers", *context.extra.get("bench", ())
            )
    data = json.loads(path.read_text()) if path.is_file() else {}
    faults = [f for c in data.get("cases", []) for f in c["faults"]]
    return {
        **outcome,
        "ok": outcome["returncode"] == 0,
        "cases": len(data.get("cases", [])),
        "complete": data.get("complete", False),
        "not_measured": data.get("not_measured", []),
        "faults": faults,
        "goals": data.get("goals", []),
    }


STAGES = {"build": (build, 115.0), "tests": (tests, 125.0), "sanitize": (sanitize, 75.0), "bench": (bench, 190.0)}
"""Name to function and seconds; what a stage leaves over goes to the next ones."""
