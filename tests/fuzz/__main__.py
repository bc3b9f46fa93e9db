"""The command line; see the package's docstring."""

import argparse
import sys
import time
from collections import defaultdict
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:1] = [str(TESTS), str(TESTS / "support")]  # not this folder: its modules are those of a package

from fuzz import ranges, sanitized  # noqa: E402
from fuzz.cases import CASES  # noqa: E402
from fuzz.changes import CHANGES  # noqa: E402
from fuzz.ranges import Work  # noqa: E402

SHOWN = 2
"""Findings of a group that are printed one by one."""


def arguments():
    parser = argparse.ArgumentParser(
        prog="python tests/fuzz",
        description=sys.modules["fuzz"].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kind", choices=sorted(CASES), action="append", help="default: all kinds")
    parser.add_argument(
        "--seeds", type=int, nargs=2, default=(0, 20), metavar=("FIRST", "END"), help="FIRST to END - 1"
    )
    parser.add_argument("--case", action="append", default=[], help="a case of the kind; default: all")
    parser.add_argument("--backend", help="default: what the library chooses")
    parser.add_argument("--jobs", type=int, default=1, help="child processes at a time")
    parser.add_argument(
        "--change",
        choices=[name for name in CHANGES if name],
        help="a self-test: change every result; each case must then find something",
    )
    parser.add_argument(
        "--sanitized", action="store_true", help="build the native module under ASan and UBSan, and run with that"
    )
    parser.add_argument(
        "--self-check",
        action="store_true",
        help="with --sanitized: plant a read out of bounds in the copy of the sources; it must be found",
    )
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    given = arguments()
    kinds = given.kind or list(CASES)
    works = [
        Work(
            kind,
            *given.seeds,
            tuple(name for name in CASES[kind] if name in (given.case or CASES[kind])),
            given.backend,
            given.change,
        )
        for kind in kinds
    ]
    if not any(work.cases for work in works):
        raise SystemExit(f"no such case; there are: {', '.join(name for kind in kinds for name in CASES[kind])}")
    if given.child:
        progress, *behind = given.child
        ranges.child(works[0], progress, (int(behind[0]), behind[1]) if behind else None)
        return
    environment = sanitized.environment(plant=given.self_check) if given.sanitized else None
    found = [finding for work in works if work.cases for finding in report(work, given, environment)]
    sys.exit(not any("AddressSanitizer" in finding.text for finding in found) if given.self_check else bool(found))


def report(work, given, environment):
    """Prints the findings and a summary; returns the findings."""
    groups, start = defaultdict(int), time.monotonic()

    def show(finding):
        groups[finding.group()] += 1
        if groups[finding.group()] <= SHOWN:
            one = work._replace(first=finding.seed, end=finding.seed + 1, cases=(finding.case,))
            again = " ".join([*one.options(), *(["--sanitized"] if given.sanitized else [])])
            print(f"{finding.case} {finding.seed}: {finding.text}\n    python tests/fuzz {again}", flush=True)

    findings, calls, _ = ranges.run_in_parts(work, given.jobs, environment=environment, show=show)
    seconds = time.monotonic() - start
    for (name, text), count in sorted(groups.items(), key=lambda item: -item[1]):
        if count > SHOWN:
            print(f"{count} times: {name}: {text}")
    print(
        f"{work.kind}: seeds {work.first} to {work.end - 1} of {len(work.cases)} cases, {calls.total()} calls of "
        f"{len(calls)} functions in {seconds:.0f} s "
        f"({calls.total() / seconds:.0f} a second), {len(findings)} findings in {len(groups)} groups"
    )
    return findings


if __name__ == "__main__":
    main()
