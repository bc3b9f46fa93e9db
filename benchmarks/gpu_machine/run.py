"""Builds, tests, checks and measures rlkernels on the CUDA device of this machine; ``make gpu``.

Needs torch and Triton in the Python that runs it; installs nothing and uses no network. Under ``--out/<gpu>/`` every
stage leaves ``<stage>.json`` and its logs as it ends, and ``--out/<gpu>.json`` with a table is rewritten after each: an
interrupted run keeps what it has.

    python benchmarks/gpu_machine/run.py --out benchmarks/results --stages build,tests,sanitize,bench

With ``--minutes`` it is the first quarter of an hour instead, for a machine that is lent for so long: the steps of
``quarter.py``, in few files directly under ``--out``, each figure beside what a model said of it and the goal.

    python benchmarks/gpu_machine/run.py --out results --commit HASH --minutes 9

Exit status: 0, 1 if a build, test, checker or answer failed, 2 without a device, 130 when interrupted. A figure that is
not reached is no failure.
"""

import argparse
import datetime
import json
import platform
import signal
import sys
import time
import traceback
from pathlib import Path

if not __package__:  # run as a file: its folder is on the path, and not the root
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import ROOT
from benchmarks.gpu_machine import quarter
from benchmarks.gpu_machine.stages import FIGURES, STAGES, Context, Interrupted, probe
from benchmarks.report.target import of_record, save

TOTAL = 515.0
"""Seconds of all stages: nine minutes, less the look for a device and the ends of children that ran out of time."""
LEAST = 5.0
"""Seconds below which a stage is not begun."""


class Folder:
    """The files that ``make gpu`` leaves: one per stage below the device's name, and one of all that is rewritten."""

    def __init__(self, device, out, names, commit=None, extra=None):
        self.device, self.out, self.names, self.commit, self.extra = device, out, names, commit, extra or {}
        self.folder = out / device.slug

    def context(self, name, limit_s):
        return Context(self.device, self.folder, limit_s, self.commit, self.extra)

    def ended(self, name, outcome, outcomes):
        save(self.folder / f"{name}.json", outcome)
        finish(self.out, self.device, outcomes, self.commit, self.names)

    def finished(self, outcomes):
        finish(self.out, self.device, outcomes, self.commit, self.names)


def run_stages(names, stages, device, out, total_s=TOTAL, commit=None, extra=None, clock=time.monotonic, keeper=None):
    """Runs the stages in order, each within its own seconds, what the earlier ones left over, and what is left of the
    whole. ``keeper``: what writes the results as they come; ``Folder``, unless another one is given.

    Returns:
        ``{stage: outcome}``. An outcome has ``ok`` (None: not applicable here), ``status``, ``seconds`` and what the
            stage found. A stage
        that raises is recorded and the next one runs; an interrupt is recorded and ends the run.
    """
    start, saved, outcomes = clock(), 0.0, {}
    keeper = Folder(device, out, names, commit, extra) if keeper is None else keeper
    for position, name in enumerate(names):
        stage, budget = stages[name]
        left = total_s - (clock() - start)
        limit = min(budget + saved, left)
        before = clock()
        print(f"--- {name}: at most {max(limit, 0):.0f} s", flush=True)
        if limit < LEAST:
            outcome = {"ok": False, "status": "no time left"}
        else:
            try:
                outcome = {"status": "ended", **stage(keeper.context(name, limit))}
                if outcome.get("interrupted"):
                    outcome["status"] = "interrupted"
                elif outcome.get("timed_out"):
                    outcome["status"] = "timed out"
            except (KeyboardInterrupt, Interrupted):
                outcome = {"ok": False, "status": "interrupted"}
            except Exception as error:  # one stage's trouble is not the next one's
                traceback.print_exc()
                outcome = {"ok": False, "status": f"{type(error).__name__}: {error}"}
        outcome["seconds"] = round(clock() - before, 2)
        saved = max(0.0, saved + budget - outcome["seconds"])
        outcomes[name] = outcome
        keeper.ended(name, outcome, outcomes)
        print(f"--- {name}: {verdict(outcome)}, {outcome['seconds']:.0f} s", flush=True)
        if outcome["status"] == "interrupted":
            for skipped in names[position + 1 :]:
                outcomes[skipped] = {"ok": False, "status": "not started", "seconds": 0.0}
            break
    keeper.finished(outcomes)
    return outcomes


def verdict(outcome):
    if outcome["status"] != "ended":
        return outcome["status"]
    if outcome["ok"] is None:
        return outcome.get("reason", "not applicable")
    return "passed" if outcome["ok"] else "FAILED"


def finish(out, device, outcomes, commit, names):
    """The merged results, and the table that a person reads."""
    figures = out / device.slug / FIGURES
    measured = json.loads(figures.read_text()) if figures.is_file() and "bench" in outcomes else None
    save(
        out / f"{device.slug}.json",
        {
            "device": device.name,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            "commit": commit or (measured or {}).get("sources", {}).get("commit"),
            "stages_asked": list(names),
            "stages": outcomes,
            "bench": measured,
        },
    )
    (out / f"{device.slug}.txt").write_text(table(device, outcomes, measured))


def details(name, outcome):
    """The lines of a stage that belong in the table."""
    if name == "build":
        lines = [f"modules: {', '.join(outcome.get('modules', [])) or 'none'}; arch {outcome.get('arch', '-')}"]
        return lines + ([f"spill bytes: {outcome['spill_bytes']}"] if "spill_bytes" in outcome else [])
    if name == "tests":
        counts = ", ".join(f"{n} {kind}" for kind, n in sorted(outcome.get("counts", {}).items()))
        lines = [counts or "no test ended"]
        lines += [f"skipped {n}: {reason}" for reason, n in outcome.get("skips", {}).items()]
        return lines + [f"FAILED {f['test']}" for f in outcome.get("failures", [])[:40]]
    if name == "sanitize":
        return [
            f"{tool}: "
            + (
                "timed out"
                if o["timed_out"]
                else "not supported here"
                if o["unsupported"]
                else f"{'-' if o['errors'] is None else o['errors']} errors, exit {o['returncode']}"
            )
            for tool, o in outcome.get("tools", {}).items()
        ]
    if name == "bench":
        lines = [f"{outcome.get('cases', 0)} cases{'' if outcome.get('complete') else ', not all that were asked for'}"]
        return (
            lines
            + [f"WRONG: {f}" for f in outcome.get("faults", [])]
            + [(f"not measured: {n}") for n in outcome.get("not_measured", [])]
        )
    return []


def table(device, outcomes, measured):
    """Stages, then figures to reach, then every time of the benchmark."""
    lines = [f"rlkernels on {device.name}", ""]
    for name, outcome in outcomes.items():
        lines.append(f"{name:10}{verdict(outcome):12}{outcome['seconds']:8.1f} s")
        lines += [f"    {line}" for line in details(name, outcome)]
    if not measured:
        return "\n".join(lines) + "\n"
    roof = measured["roofline"]
    lines += [
        "",
        f"roofline of this run: read {roof['read'] / 1e9:.0f} GB/s, copy {roof['copy'] / 1e9:.0f} GB/s, "
        f"bf16 product {roof['matmul'] / 1e12:.0f} "
        "TFLOP/s",
        "",
        "figures to reach, the worst of the measured shapes",
    ]
    for g in measured["goals"]:
        goal = of_record(g)
        lines.append(f"    {goal.text:80}{goal.limit:9}{goal.number:>10}  {goal.verdict()}")
    for case in measured["cases"]:
        lines += ["", f"{case['name']} {case['shape']}: floor {1e3 * case['floor_s']:.4g} ms ({case['passes']})"]
        for e in case["entries"]:
            if e["hot"]:
                lines.append(
                    f"    {e['name']:58}{1e3 * e['hot']['median_s']:10.4f} ms{100 * e['of_floor']:7.1f} %  "
                    f"{e['remark']}".rstrip()
                )
            else:
                lines.append(f"    {e['name']:58}not measured: {e['remark']}")
    return "\n".join(lines) + "\n"


def stage_names(text):
    names = [n for n in text.split(",") if n]
    unknown = [n for n in names if n not in STAGES]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"stages are {', '.join(STAGES)}; got {text!r}")
    return names


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "benchmarks" / "results",
        help="folder of the results (default benchmarks/results)",
    )
    parser.add_argument(
        "--stages", type=stage_names, default=list(STAGES), help=f"comma-separated, of: {','.join(STAGES)}"
    )
    parser.add_argument(
        "--total", type=float, default=TOTAL, help=f"seconds that the whole may take (default {TOTAL:g})"
    )
    parser.add_argument(
        "--minutes",
        type=minutes,
        help="the first quarter of an hour, in so many minutes, instead of the stages: see quarter.py",
    )
    parser.add_argument("--rehearse", action="store_true", help="with --minutes: the CPU stands in for the device")
    parser.add_argument("--commit", help="the commit to record where the checkout came without its history")
    parser.add_argument(
        "--bench-args", default="", help="further arguments of the benchmark, as one string: '--quick --no-compile'"
    )
    parser.add_argument("--test-args", default="", help="further arguments of pytest, as one string: '-k runtime'")
    args = parser.parse_args(argv)
    if args.rehearse and args.minutes is None:
        parser.error("--rehearse is of the first quarter of an hour: give --minutes too")

    def stop(number, frame):
        raise Interrupted

    signal.signal(signal.SIGTERM, stop)
    if args.minutes is not None:
        outcomes, told = quarter.run(run_stages, args.out, args.commit, args.minutes, args.rehearse)
        if outcomes is None:
            print(f"gpu_machine: {told}", file=sys.stderr)
            return 2
        print(told)
        return status(outcomes)
    try:
        device = probe()
    except (RuntimeError, OSError, ValueError) as error:
        print(f"gpu_machine: {error}", file=sys.stderr)
        return 2

    extra = {"bench": args.bench_args.split(), "tests": args.test_args.split()}
    outcomes = run_stages(args.stages, STAGES, device, args.out.resolve(), args.total, args.commit, extra)
    print((args.out / f"{device.slug}.txt").read_text())
    return status(outcomes)


def minutes(text):
    value = float(text)
    if not 0 < value <= 60:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 60, got {text}")
    return value


def status(outcomes):
    if any(o["status"] == "interrupted" for o in outcomes.values()):
        return 130
    return 1 if any(o["ok"] is False for o in outcomes.values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
