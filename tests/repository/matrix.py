"""The core of the suite, and the adapters with real trainers, under other versions of Python, torch and Triton: one
environment per row, made, used and deleted.

    python tests/repository/matrix.py                                # all rows: hours, and gigabytes per row
    python tests/repository/matrix.py --python 3.10 --torch 2.8.0    # this row alone
    python tests/repository/matrix.py --python 3.10 --torch 2.8.0 --part core   # this part of it again
    python tests/repository/matrix.py --part trainers                # this part of every row: half an hour
    python tests/repository/matrix.py --table                        # runs nothing: prints what has run

Interpreters are looked for on PATH (``python3.10``), or given as paths. pip reads its settings (index, proxy,
``PIP_*``) from the environment; a constraint there that holds torch back must be lifted. The newest torch that the
index has is meant by ``--torch newest``. Results are kept as JSON in ``--folder``.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]

NOT_CORE = (
    "tests/backends/gpu",  # needs a GPU
    "tests/backends/triton_backend",  # a process of its own per Triton
    "tests/cli/test_demo.py",
    "tests/integrations",
    "tests/losses/test_preference_matches_trl.py",  # need TRL, which has requirements of its own
    "tests/repository/test_build*.py",
    "tests/backends/cuda_backend",
    "tests/repository/test_contributing.py",
    "tests/repository/test_hosting.py",
    "tests/repository/test_mutants.py",  # about compilers and sources, not about torch
    "tests/benchmarks",
    "tests/cli/test_cli.py",
    "tests/repository/test_matrix.py",
    "tests/repository/test_release_check.py",  # the tools beside the library
)
"""What is left out of the core, and why. The rest of ``tests`` is the core, whatever is added to it."""

TRAINERS = ("transformers", "accelerate", "datasets", "trl", "peft", "kernels", "requests")
"""What the adapters are tested with: in a row of the newest torch the newest, else those of constraints.txt, and where
it has none, the newest that the Python takes. TRL up to 1.13 imports requests without demanding it.
"""

WITH_TRAINERS = ("tests/integrations", "tests/guarantees/test_golden.py", "tests/logprobs", "tests/presets")
"""The adapters, and beside them the numbers of other systems, log-probabilities and conventions: three minutes."""

TOOLS = ("numpy", "pytest", "pytest-xdist", "pytest-benchmark", "hypothesis", "pyyaml", "pybind11", "ninja")
"""What the core imports besides torch and the package."""


class Row(NamedTuple):
    """An environment: ``triton`` are versions whose proofs run beside it, each from a folder of its own; torch may
    bring another one.
    """

    python: str
    torch: str
    triton: tuple[str, ...] = ()

    @property
    def name(self):
        return f"python-{Path(self.python).name.removeprefix('python')}-torch-{self.torch}"


ROWS = (
    Row("3.10", "2.8.0"),
    Row("3.11", "2.13.0", ("3.5.1", "3.6.0", "3.9.0")),
    Row("3.12", "2.11.0"),
    Row("3.13", "newest"),
)
"""Every version of Python and Triton that is promised, the oldest torch, the one of constraints.txt, one between, and
the newest.
"""


def run(words, log, **options):
    """Runs a command whose words go to the end of ``log``, as does what it prints; returns its exit status and that
    output.
    """
    with open(log, "a", encoding="utf-8") as file:
        print("$", *words, file=file, flush=True)
        start = file.tell()
        status = subprocess.run(
            [str(w) for w in words], stdout=file, stderr=subprocess.STDOUT, check=False, **options
        ).returncode
    with open(log, encoding="utf-8", errors="replace") as file:
        file.seek(start)
        return status, file.read()


def interpreter(python):
    found = shutil.which(python) or shutil.which(f"python{python}")
    if found is None:
        raise SystemExit(f"no python{python} on PATH; put it there, or give its path: --python /path/to/python{python}")
    return found


def commit():
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "no repository"


def counts(output):
    """Numbers of passed, failed and skipped tests by pytest's closing line; errors count as failures."""
    found = dict.fromkeys(("passed", "failed", "skipped"), 0)
    closing = next((line for line in reversed(output.splitlines()) if re.search(r"\d+ \w+.* in [\d.]+s", line)), "")
    for number, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", closing):
        found["failed" if kind == "error" else kind] += int(number)
    if not any(found.values()):
        found["failed"] = 1  # it did not come as far as a test
    return found


class Environment:
    """The virtual environment of a row, its copy of the sources, and what has been found in it."""

    def __init__(self, row, folder, jobs):
        self.row, self.jobs, self.place, self.log = row, jobs, folder / row.name, folder / f"{row.name}.log"
        self.python, self.tree = self.place / "environment/bin/python", self.place / "source"
        self.pins = self.place / "constraints.txt"
        self.variables = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")} | {
            "OMP_NUM_THREADS": "1",
            "MAX_JOBS": str(jobs),
            "RLKERNELS_CPU": "1",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        }

    def must(self, *words, **options):
        status, output = run(words, self.log, **options)
        if status != 0:
            raise RuntimeError(f"{' '.join(map(str, words[:6]))} ... failed; log: {self.log}\n{output[-2000:]}")

    def pip(self, *words):
        self.must(
            self.python,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-cache-dir",
            "--progress-bar",
            "off",
            *words,
            env=self.variables,
        )

    def make(self):
        """Installs torch, the tools of constraints.txt and the package, from a copy of the sources that later edits do
        not reach.
        """
        self.commit = commit()  # here, because the tests may end hours and commits later
        # Nothing that was built here: bytecode, modules and kept examples are those of another version.
        shutil.copytree(
            ROOT,
            self.tree,
            ignore=shutil.ignore_patterns(
                ".git",
                ".venv",
                ".triton",
                ".*_cache",
                ".hypothesis",
                ".benchmarks",
                "*.so",
                "*.build.log",
                "build",
                "dist",
                "*.egg-info",
                "__pycache__",
            ),
        )
        self.must(interpreter(self.row.python), "-m", "venv", self.place / "environment", env=self.variables)
        # Without torch, whose version is the point, and without setuptools, which torch itself bounds.
        unpinned = ["torch", "setuptools", *(TRAINERS if self.row.torch == "newest" else ())]
        self.pins.write_text(
            "".join(
                line
                for line in (ROOT / "constraints.txt").read_text().splitlines(True)
                if line.split("==")[0] not in unpinned
            )
        )
        self.pip("torch" if self.row.torch == "newest" else f"torch=={self.row.torch}")
        self.pip("-c", self.pins, *TOOLS)
        self.pip(self.tree)

    def asks(self, code):
        return subprocess.run(
            [str(self.python), "-c", code], capture_output=True, text=True, check=True, cwd=self.place
        ).stdout.strip()

    def pytest(self, *words, **variables):
        # The program, not the module: that one would import the package from the sources here, and not what was
        # installed.
        command = [self.python.with_name("pytest"), "-q", "-n", self.jobs, "--dist", "worksteal", *words]
        status, output = run(command, self.log, cwd=self.tree, env=self.variables | variables)
        failures = [
            line.removeprefix("FAILED ").removeprefix("ERROR ")
            for line in output.splitlines()
            if line.startswith(("FAILED ", "ERROR "))
        ]
        found = counts(output)
        found["failed"] = max(found["failed"], int(status != 0))
        return found, failures

    def core(self):
        return self.pytest("tests", *(f"--ignore-glob={name}" for name in NOT_CORE))

    def trainers(self):
        """The adapters with the trainers that this Python takes; torch stays what the row says."""
        self.pip("-c", self.pins, *TRAINERS, f"torch=={self.version('torch')}")
        return self.pytest(*WITH_TRAINERS)

    def version(self, package):
        return self.asks(
            f"import importlib.metadata as m\ntry: print(m.version({package!r}))\n"
            "except m.PackageNotFoundError: print('none')"
        )

    def triton(self, version):
        """The proofs of the Triton kernels, as ``make test-triton`` runs them."""
        beside = self.place / f"triton-{version}"
        old = tuple(map(int, version.split(".")[:2])) <= (3, 6)  # its interpreter wants numpy before 2.4
        self.pip("--no-deps", "--target", beside, f"triton=={version}", *(["numpy<2.4"] if old else []))
        variables = {"PYTHONPATH": str(beside), "TRITON_CACHE_DIR": str(self.place / f"cache-{version}")}
        proofs = "tests/backends/triton_backend"
        halves = [
            self.pytest(f"{proofs}/interpreted", TRITON_INTERPRET="1", **variables),
            self.pytest(f"{proofs}/compiled", **variables),
        ]
        shutil.rmtree(beside)
        return {kind: sum(found[kind] for found, _ in halves) for kind in halves[0][0]}, [
            f for _, failures in halves for f in failures
        ]


def one(row, folder, jobs, keep, only=()):
    """Runs a row, or ``only`` these parts of it beside what the others found before; returns what the table needs."""
    environment, began = Environment(row, folder, jobs), time.monotonic()
    shutil.rmtree(environment.place, ignore_errors=True)
    environment.log.unlink(missing_ok=True)
    file = folder / f"{row.name}.json"
    before = json.loads(file.read_text())["parts"] if only and file.exists() else []
    found = {part["title"]: part for part in before if part["title"] not in only}
    result = {"row": row.name, "failures": []}
    try:
        environment.make()
        # With each part its own, because the newest torch of a part that runs again may be another one.
        installed = {"python": environment.asks("import platform; print(platform.python_version())")}
        installed |= {name: environment.version(name) for name in ("torch", "triton", "numpy")}
        triton = {f"Triton {v}": lambda v=v: environment.triton(v) for v in row.triton}
        parts = {"core": environment.core, **triton, "trainers": environment.trainers}
        for title in only or parts:
            numbers, failures = parts[title]()
            made = {"commit": environment.commit, "date": date.today().isoformat()}
            found[title] = {"title": title, **installed, **numbers, **made}
            if title == "trainers":
                found[title]["with"] = [f"{name} {environment.version(name)}" for name in TRAINERS[:-1]]
            result["failures"] += [f"{title}: {failure}" for failure in failures]
        result["parts"] = [found[title] for title in parts if title in found]
    except RuntimeError as error:
        result["failures"].append(str(error))
    result.setdefault("parts", [*found.values()])
    result["minutes"] = round((time.monotonic() - began) / 60)
    file.write_text(json.dumps(result, indent=1))
    if not keep:
        shutil.rmtree(environment.place, ignore_errors=True)
    return result


def table(results):
    """Markdown: a line per part of a row."""
    lines = [
        "| Python | torch | Triton of the environment | numpy | tests | passed | failed | skipped | commit, date |",
        "|" + "---|" * 9,
    ]
    absent = {"title": "not installed", "passed": 0, "failed": 1, "skipped": 0, "commit": commit(), "date": "-"}
    parts = [part for r in results for part in r["parts"] or [{"python": r["row"], **absent}]]
    for part in sorted(parts, key=lambda part: [int(n) for n in re.findall(r"\d+", part["python"])[:3]]):
        tests = ": ".join([part["title"], *([", ".join(part["with"])] if "with" in part else [])])
        lines.append(
            f"| {part['python']} | {part.get('torch', '-')} | {part.get('triton', '-')} | {part.get('numpy', '-')} | "
            f"{tests} | {part['passed']:,} | {part['failed']} | {part['skipped']} | {part['commit']}, {part['date']} |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", help="of one row: a version that is on PATH, or a path")
    parser.add_argument("--torch", help="of one row: a version, or newest")
    parser.add_argument("--triton", nargs="*", default=[], help="of one row: versions whose proofs run beside it")
    parser.add_argument(
        "--part",
        action="append",
        default=[],
        help="core, trainers, or of one row Triton X.Y.Z; may be repeated; all of them by default",
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "build/matrix", help="environments, logs and results")
    parser.add_argument("--jobs", type=int, default=2, help="tests side by side, and compilers")
    parser.add_argument("--keep", action="store_true", help="leave the environments there: 1 to 9 GB each")
    parser.add_argument("--table", action="store_true", help="run nothing")
    args = parser.parse_args()
    if (args.python is None) != (args.torch is None):
        parser.error("--python and --torch make a row: give both, or none for every row")
    known = ["core", *(f"Triton {version}" for version in args.triton), "trainers"]
    if not set(args.part) <= set(known):
        parser.error(f"--part is one of these: {', '.join(known)}")
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    rows = [] if args.table else ROWS if args.python is None else [Row(args.python, args.torch, tuple(args.triton))]
    for row in rows:
        result = one(row, folder, args.jobs, args.keep, args.part)
        print(f"{row.name}: {result['minutes']} minutes", *result["parts"], *result["failures"], sep="\n  ", flush=True)
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    print(table(results))
    return int(any(r["failures"] or any(part["failed"] for part in r["parts"]) for r in results))


if __name__ == "__main__":
    sys.exit(main())
