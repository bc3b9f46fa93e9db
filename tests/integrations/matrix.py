"""The versions of TRL, one by one: its trainers stock, with ours, and with an error of 1 %. Prints the table of
docs/parity.md.

``python tests/integrations/matrix.py FOLDER [--only TEXT]``, with a Python that has torch, transformers, accelerate and
datasets. Each TRL is installed into FOLDER without its dependencies; the newest one runs the wide grid of cases.
"""

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = ("1.12.0", "1.13.0", "1.14.2", "1.15.0", "1.16.0")
"""The newest one last."""
TOLERANCE = 1e-4
sys.path.insert(0, str(ROOT / "tests/support"))


def installed(folder, package, *options):
    """Installs ``package`` into a folder of its own, once, and returns that."""
    target = folder / package.replace("==", "-")
    if not target.is_dir():
        command = [sys.executable, "-m", "pip", "install", "-q", *options, "--target", str(target), package]
        subprocess.run(command, check=True)
    return target


def run(folder, version, cases, only):
    """Returns the records of one version, by case; the first one is that of the versions."""
    # TRL up to 1.13 imports requests without demanding it.
    parts = [ROOT, installed(folder, f"trl=={version}", "--no-deps"), installed(folder, "requests")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, parts)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests/support/trl_runs.py"), cases, "--only", only]
    done = subprocess.run(command, env=environment, text=True, capture_output=True)
    if done.returncode:
        raise SystemExit(f"TRL {version}: {done.stderr[-3000:]}")
    first, *records = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert first["trl"] == version, first
    return first, {record["case"]: record for record in records}


def cell(record, newest):
    """Returns what the table shows of a run, and whether it is a failure.

    Where stock TRL cannot train, the reference is the stock run of the newest TRL.
    """
    if record is None:
        return "", False
    if "absent" in record:
        return "-", False
    difference, mark = record["gap"], ""
    if difference is None:
        difference, mark = distance(newest["numbers"], record["numbers"]), " (a)"
    if record["wrong"] <= TOLERANCE:
        # Nothing of ours is in the way of the loss: it must be the stock run to the last bit.
        return "TRL's own", difference > 0
    failed = difference > TOLERANCE or not sum(record["calls"].values()) or bool(record["delegations"])
    return f"{difference:.0e}{mark}{' FAILED' if failed else ''}", failed


def distance(a, b):
    return max(
        sum((x - y) ** 2 for x, y in zip(u, v, strict=True)) ** 0.5 / max(1e-2, sum(x * x for x in u) ** 0.5)
        for u, v in zip(a, b, strict=True)
    )


def main(arguments):
    from trl_runs import SLICE, WIDE

    folder = Path(arguments[0])
    only = arguments[arguments.index("--only") + 1] if "--only" in arguments else ""
    found, first = {}, {}
    for version in VERSIONS:
        first, found[version] = run(folder, version, "wide" if version == VERSIONS[-1] else "slice", only)
        print(f"TRL {version}: {len(found[version])} cases", file=sys.stderr, flush=True)
    newest = found[VERSIONS[-1]]
    print(f"{datetime.date.today()}, torch {first['torch']}, transformers {first['transformers']}, CPU.\n")
    print(f"| trainer and case | {' | '.join(VERSIONS)} |\n|---|{'---|' * len(VERSIONS)}")
    failed = False
    for case in (case for case in SLICE if only in case):
        cells = [cell(found[version].get(case), newest.get(case)) for version in VERSIONS]
        failed |= any(bad for _, bad in cells)
        print(f"| {case} | {' | '.join(text for text, _ in cells)} |")
    further = [newest[case] for case in WIDE if case not in SLICE and only in case]
    for record in further:
        text, bad = cell(record, None)
        failed |= bad
        print(f"{record['case']}: {record.get('absent', text)}", file=sys.stderr)
    ran = [record for record in further if "absent" not in record]
    if ran:
        worst = max(record["gap"] for record in ran)
        least = min(record["wrong"] for record in ran)
        print(f"\nThe wide grid of TRL {VERSIONS[-1]}: {len(ran)} further cases, largest difference {worst:.0e}.")
        print(f"With an error of 1 % the smallest difference is {least:.0e}.")
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
