"""Ranges of seeds in child processes, which may crash: the parent knows where, says so, and goes on behind it."""

import faulthandler
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from fuzz import users
from fuzz.changes import CHANGES
from fuzz.trial import CASES, Trial

HERE = Path(__file__).resolve().parent
LIMIT = 60
"""Seconds after which a call counts as one that does not end."""


class Work(NamedTuple):
    """What to run: seeds ``first`` to ``end - 1`` of each of ``cases`` of a kind, on a backend, with results changed
    for a self-test.
    """

    kind: str
    first: int
    end: int
    cases: tuple
    backend: str | None = None
    change: str | None = None

    def options(self):
        """The arguments of the command line that do the same."""
        named = (
            [part for name in self.cases for part in ("--case", name)]
            if len(self.cases) < len(CASES[self.kind])
            else []
        )
        return [
            "--kind",
            self.kind,
            "--seeds",
            str(self.first),
            str(self.end),
            *named,
            *(["--backend", self.backend] if self.backend else []),
            *(["--change", self.change] if self.change else []),
        ]


class Outcome(NamedTuple):
    """What a range came to: findings, calls by function, and ``"function keyword"`` of every keyword that was given."""

    findings: list
    calls: Counter
    keywords: set

    def plus(self, other):
        return Outcome(self.findings + other.findings, self.calls + other.calls, self.keywords | other.keywords)


class Finding(NamedTuple):
    """A call that went wrong."""

    case: str
    seed: int
    text: str

    def group(self):
        """Findings of one group say the same but for numbers."""
        return self.case, re.sub(
            r"\[[\d, ]*\]", "[#]", re.sub(r"(?<![\w.])[-+]?(\d[\d.e+-]*|inf\b|nan\b)", "#", self.text)
        )[:160]


def child(work, progress, behind=None):
    """Runs the trials in this process.

    Before each it writes to the file ``progress`` which one it is; ``behind``: the trial to begin after.
    """
    users.register()
    where, calls, keywords = os.open(progress, os.O_WRONLY), Counter(), set()
    for seed in range(work.first, work.end):
        for name in work.cases:
            if behind is not None:
                behind = None if behind == (seed, name) else behind
                continue
            os.pwrite(where, f"{seed} {name}".ljust(80).encode(), 0)
            faulthandler.dump_traceback_later(LIMIT, exit=True)
            trial = Trial(name, seed, work.backend, CHANGES[work.change])
            for text in trial.run(CASES[work.kind][name]):
                print(json.dumps({"finding": [name, seed, text]}), flush=True)
            calls += trial.calls
            keywords |= trial.keywords
        if seed % 20 == 19 or seed == work.end - 1:
            print(json.dumps({"calls": calls, "keywords": sorted(keywords), "done": seed == work.end - 1}), flush=True)
            calls = Counter()
    faulthandler.cancel_dump_traceback_later()


def run(work, environment=None, show=lambda finding: None):
    """The outcome of a range; each finding is shown at once."""
    findings, calls, keywords, behind = [], Counter(), set(), ()

    def add(finding):
        findings.append(finding)
        show(finding)

    with tempfile.TemporaryDirectory() as folder:
        progress, errors = Path(folder, "progress"), Path(folder, "errors")
        progress.touch()
        while True:
            command = [sys.executable, "-X", "faulthandler", HERE, *work.options(), "--child", progress, *behind]
            with (
                open(errors, "w") as log,
                subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, cwd=folder
                ) as process,
            ):
                done = False
                for line in process.stdout:
                    said = json.loads(line)
                    calls.update(said.get("calls", {}))
                    keywords.update(said.get("keywords", ()))
                    done = done or said.get("done", False)
                    if "finding" in said:
                        add(Finding(*said["finding"]))
            if done:
                break
            reached = progress.read_text().split()
            if not reached or reached == list(behind):
                raise RuntimeError(f"a child process did not start:\n{errors.read_text()[-3000:]}")
            behind = tuple(reached)
            add(
                Finding(
                    reached[1],
                    int(reached[0]),
                    f"the process ended with status {process.returncode}: {_reason(errors.read_text())}",
                )
            )
            if behind == (str(work.end - 1), work.cases[-1]):
                break
    return Outcome(findings, calls, keywords)


def run_in_parts(work, jobs, **options):
    """As ``run``, with the range cut into ``jobs`` parts at a time."""
    bounds = [work.first + (work.end - work.first) * i // jobs for i in range(jobs + 1)]
    parts = [work._replace(first=a, end=b) for a, b in zip(bounds, bounds[1:], strict=False) if a < b]
    with ThreadPoolExecutor(jobs) as pool:
        return functools.reduce(Outcome.plus, pool.map(lambda part: run(part, **options), parts))


def _reason(text):
    """The line of a report that says what happened, with the line of ours where a sanitizer names it."""
    said = re.search(
        r"(AddressSanitizer: [\w-]+|[^\s/]+:\d+:\d+: runtime error:.*|Timeout|terminate called.*|Fatal "
        r"Python error.*)",
        text,
    )
    place = re.search(r"csrc/c\S+:\d+", text)
    return (said[0].strip()[:200] if said else text.strip()[-200:]) + (f" at {place[0]}" if place else "")
