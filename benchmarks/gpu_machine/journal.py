"""The files of a first quarter of an hour: few, written as each step ends, whole whenever the machine is taken away."""

import json
import os
import time

from benchmarks.gpu_machine import comparison
from benchmarks.gpu_machine.stages import Context

LINES, TABLE, LOG = "results.jsonl", "table.txt", "log.txt"
LOG_BYTES = 2**20
"""The end of each step's output that is kept: a machine that is lent gives back files of a limited size."""
FAILURES = 5
"""Failed tests that the table names; all of them are in the results."""
FILES = (LINES, TABLE, LOG, "bench.json", "variants.json", "tests.jsonl", "counters.csv")
"""All that a run leaves."""


class Journal:
    """Keeps what ``run_stages`` tells: a line of JSON per event, the logs in one file, and the table.

    ``scratch``: the folder in which steps work; ``variables``: of the environment in which tests run.
    """

    def __init__(self, device, out, scratch, names, commit=None, rehearsal=False, extra=None, variables=None):
        self.device, self.out, self.scratch, self.names, self.commit = device, out, scratch, names, commit
        self.extra, self.variables = extra or {}, variables or {}
        self.rehearsal = rehearsal
        self.rows, self.outcomes, self.logged = comparison.rows(rehearsal), {}, set()
        out.mkdir(parents=True, exist_ok=True)
        for name in FILES:  # of an earlier run: a figure of it would pass for one of this
            (out / name).unlink(missing_ok=True)
        self.line("run", device=device.name, arch=device.arch, commit=commit, rehearsal=rehearsal, steps=list(names))
        self.write_table()

    def line(self, event, **told):
        with (self.out / LINES).open("a") as file:
            file.write(json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S"), "event": event, **told}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def context(self, name, limit_s):
        self.line("start", step=name, limit_s=round(limit_s, 1))
        return Context(self.device, self.scratch, limit_s, self.commit, self.extra, self.variables, self.out)

    def ended(self, name, outcome, outcomes):
        self.outcomes = outcomes
        self.line("end", step=name, **outcome)
        self.collect_logs()
        for source, read in (("bench", self.figures), ("variants", self.figures), ("counters", self.counters)):
            for row in comparison.fill(self.rows, source, read(source)):
                self.line("figure", **row.record())
        self.write_table()

    def finished(self, outcomes):
        self.outcomes = outcomes
        self.line("finished", statuses={name: outcome["status"] for name, outcome in outcomes.items()})
        self.write_table()

    def figures(self, source):
        """The figures that a benchmark has written so far; it replaces its file as a whole."""
        path = self.out / f"{source}.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def counters(self, source):
        return self.outcomes.get(source, {}).get("launches", [])

    def collect_logs(self):
        """The end of every log that is new."""
        with (self.out / LOG).open("ab") as file:
            for path in sorted(self.scratch.glob("*.log")):
                if path.name not in self.logged:
                    self.logged.add(path.name)
                    file.write(f"\n===== {path.stem}\n".encode() + path.read_bytes()[-LOG_BYTES:])

    def write_table(self):
        lines = [f"rlkernels on {self.device.name}", f"commit {self.commit or 'unknown'}"]
        if self.rehearsal:
            lines.append("REHEARSAL: stand-ins were run, and no figure below is one of a GPU")
        lines.append("")
        for name in self.names:
            outcome = self.outcomes.get(name)
            lines.append(f"{name:10}{comparison.NOT_REACHED if outcome is None else told(outcome)}")
        (self.out / TABLE).write_text(
            "\n".join([*lines, "", *comparison.table(self.rows, judged=not self.rehearsal)]) + "\n"
        )


def told(outcome):
    """A step in one line."""
    status = outcome["status"]
    if status in ("no time left", "not started"):
        return comparison.NOT_REACHED
    if status == "ended":
        status = {True: "passed", False: "FAILED", None: "judged nothing"}[outcome["ok"]]
    more = [f"{n} {kind}" for kind, n in sorted(outcome.get("counts", {}).items())]
    more += [f"{name}: {value}" for name, value in outcome.get("facts", {}).items()]
    more += [f"WRONG: {fault}" for fault in outcome.get("faults", [])]
    for failure in outcome.get("failures", [])[:FAILURES]:
        more.append(f"{failure['test'].rpartition('::')[2]}: {(failure['message'].splitlines() or ['-'])[-1]}")
    if "spill_bytes" in outcome:
        more.append(f"spill bytes: {outcome['spill_bytes']}")
    for tool, one in outcome.get("tools", {}).items():
        more.append(f"{tool}: {'-' if one['errors'] is None else one['errors']} errors")
    if "compiled_ahead" in outcome:
        more.append(f"{outcome['compiled_ahead']['kernels']} Triton kernels compiled ahead")
    if outcome.get("reason"):
        more.append(outcome["reason"])
    if outcome.get("returncode"):
        more.append(f"exit {outcome['returncode']}")
    return f"{status:16}{outcome['seconds']:7.1f} s  " + "; ".join(more)
