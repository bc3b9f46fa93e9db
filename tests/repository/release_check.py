"""The steps before a release, one line for each; the exit status is 1 where any of them has a fault.

    python tests/repository/release_check.py                            # every step: most of an hour, for the core
    python tests/repository/release_check.py --step docs --step matrix  # these, and what they need
    python tests/repository/release_check.py --core tests/losses        # a part of the core

    sources   everything is committed, so that what is built is what is tagged
    version   the number is that of a release, and CHANGELOG.md has a date for it
    matrix    docs/versions.md shows a clean run of every row of matrix.py, on the sources as they are now
    results   the figures of docs/performance.md were measured on the sources as they are now
    docs      make docs, which is strict
    build     a source distribution, and the wheel made from it with its native module
    install   the wheel in a fresh environment whose PATH has no compiler; wheel_import.py finds a right number there,
              and again where torch's own OpenMP runtime is the only one
    core      the core of the suite in that environment, from the source distribution's own tests

Steps go on after a fault, so that one run shows all of them. ``--folder`` keeps the environment and the log.
"""

import argparse
import re
import shutil
import subprocess
import sys
import time
from os import environ
from pathlib import Path
from typing import NamedTuple

import matrix
import without_libgomp

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("rlkernels", "csrc", "setup.py", "setup_build.py", "setup_cuda.py", ":(exclude)*.md")
"""The files that a number depends on, in git's words. Tests and pages may change behind a run, these may not."""
NEEDS = {"install": ("build",), "core": ("build", "install")}


class Place(NamedTuple):
    """The folder of a check, and the part of the core that it runs."""

    folder: Path
    core: tuple[str, ...] = ()

    @property
    def log(self):
        return self.folder / "log"

    @property
    def python(self):
        return self.folder / "environment/bin/python"

    @property
    def tree(self):
        """The unpacked source distribution."""
        return self.folder / "source"

    def variables(self, **more):
        """This process's variables without those that lead to other sources or that choose for a build."""
        gone = ("PYTHONPATH", "VIRTUAL_ENV", "TRITON_INTERPRET", "CXX", "RLKERNELS_CPU", "RLKERNELS_CUDA")
        return {k: v for k, v in environ.items() if k not in gone} | more

    def fresh(self, **more):
        """The same, with a PATH that holds the fresh environment's programs alone: no compiler, no git."""
        return self.variables(PATH=str(self.python.parent), OMP_NUM_THREADS="1", **more)

    def faults(self, *words, **options):
        """Runs a command; returns nothing where it succeeds, else its last line."""
        status, output = matrix.run(words, self.log, **options)
        last = (output.strip().splitlines() or ["it printed nothing"])[-1]
        return [f"{' '.join(map(str, words[:5]))} ... ended with {status}: {last}"] if status else []


def git(root, *words):
    """Returns what git prints, or None where it fails."""
    done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else None


def uncommitted(root=ROOT):
    """Returns a fault per file that differs from the commit, or that git has not been told of."""
    found = git(root, "status", "--porcelain")
    if found is None:
        return ["these sources are no checkout of git"]
    return [f"{line[3:]} is not committed" for line in found.splitlines()]


def stale(commit, root=ROOT):
    """Returns a fault where the sources have changed since ``commit``; the line of the version may."""
    if git(root, "merge-base", "--is-ancestor", commit, "HEAD") is None:
        return [f"commit {commit} is not in the history"]
    patch = git(root, "diff", "-U0", "-I", "^__version__ = ", commit, "--", *SOURCES)
    files = re.findall(r"^diff --git a/(\S+)", patch, re.MULTILINE)
    return [f"{len(files)} files of the sources have changed since {commit}, {files[0]} among them"] if files else []


def stale_rows(page, rows=matrix.ROWS, root=ROOT):
    """Returns the faults of a table that ``matrix.py`` printed: parts without a run, failures, older sources."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:3] == "| 3"]
    faults = []
    for row in rows:
        for part in ("core", *(f"Triton {version}" for version in row.triton)):
            mine = [
                line
                for line in lines
                if line[0].startswith(f"{row.python}.")
                and (row.torch == "newest" or line[1].startswith(row.torch))
                and line[4] == part
            ]
            if not mine:
                faults.append(f"{row.name}: no run of {part}")
            for line in mine:
                found = [f"{line[6]} tests failed"] if line[6] != "0" else []
                faults += [f"{row.name}, {part}: {fault}" for fault in found + stale(line[8].split(",")[0], root)]
    return faults


def stale_figures(page, root=ROOT):
    """Returns a fault per commit of a page of figures, where the sources have changed since."""
    commits = dict.fromkeys(re.findall(r"\b(?=[a-f]*\d)(?=\d*[a-f])[0-9a-f]{7,40}\b", page))
    return [fault for commit in commits for fault in stale(commit, root)] or ([] if commits else ["no commit is named"])


def unreleased(package, changelog):
    """Returns the faults of a version that still comes before its release, and of a changelog without its date."""
    version = re.search(r'^__version__ = "(.+)"$', package, re.MULTILINE)[1]
    section, day = re.search(r"^## \[(.+)\] - (.+)$", changelog, re.MULTILINE).groups()
    faults = [f"{version} comes before a release; drop its .dev"] if ".dev" in version else []
    faults += [f"CHANGELOG.md begins with {section}, not with {version}"] if section != version else []
    return faults + ([] if re.fullmatch(r"\d{4}-\d\d-\d\d", day) else [f"CHANGELOG.md: {section} is {day!r}, no date"])


def sources(place):
    return uncommitted()


def version(place):
    return unreleased((ROOT / "rlkernels/__init__.py").read_text(), (ROOT / "CHANGELOG.md").read_text())


def matrix_is_fresh(place):
    return stale_rows((ROOT / "docs/versions.md").read_text())


def results_are_fresh(place):
    return stale_figures((ROOT / "docs/performance.md").read_text())


def docs(place):
    return place.faults("make", "docs", cwd=ROOT, env=place.variables())


def build(place):
    builder, dist = place.folder / "builder", place.folder / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    shutil.rmtree(place.tree, ignore_errors=True)
    faults = place.faults(sys.executable, "-m", "venv", "--clear", builder, env=place.variables())
    python, variables = builder / "bin/python", place.variables(RLKERNELS_CPU="1", PIP_DISABLE_PIP_VERSION_CHECK="1")
    faults = faults or place.faults(python, "-m", "pip", "install", "-q", "build", env=variables)
    faults = faults or place.faults(python, "-I", "-m", "build", "--outdir", dist, ROOT, env=variables)
    if faults:
        return faults
    (archive,) = dist.glob("*.tar.gz")
    shutil.unpack_archive(archive, place.folder / "unpacked")
    (place.folder / "unpacked" / archive.name.removesuffix(".tar.gz")).rename(place.tree)
    return []


def install(place):
    (wheel,) = (place.folder / "dist").glob("*.whl")
    faults = place.faults(sys.executable, "-m", "venv", "--clear", place.folder / "environment", env=place.variables())
    variables = place.fresh(PIP_DISABLE_PIP_VERSION_CHECK="1")
    pins = place.tree / "constraints.txt"
    words = (place.python, "-m", "pip", "install", "-q", "-c", pins, wheel, *matrix.TOOLS)
    faults = faults or place.faults(*words, env=variables)
    number = [place.python, "-I", place.tree / "tests/repository/wheel_import.py"]
    faults = faults or place.faults(*number, cwd=place.folder, env=variables)
    if faults or not without_libgomp.possible():
        return faults
    return place.faults(*without_libgomp.words(number), cwd=place.folder, env=place.variables())


def core(place):
    # The program, not the module, which would import the package from the sources and not what was installed.
    words = [place.python.with_name("pytest"), "-q", "-n", "2", "--dist", "worksteal", *(place.core or ["tests"])]
    words += [f"--ignore-glob={name}" for name in matrix.NOT_CORE]
    status, output = matrix.run(words, place.log, cwd=place.tree, env=place.fresh())
    found = matrix.counts(output)
    print(f"          {found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped")
    faults = [line for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    return faults or ([f"pytest ended with {status}"] if status or found["failed"] else [])


STEPS = {
    "sources": sources,
    "version": version,
    "matrix": matrix_is_fresh,
    "results": results_are_fresh,
    "docs": docs,
    "build": build,
    "install": install,
    "core": core,
}


def check(steps, place):
    """Runs the steps in their order and what they need before them; returns the exit status."""
    asked = [name for name in STEPS if name in steps or any(name in NEEDS.get(other, ()) for other in steps)]
    faulty = set()
    for name in asked:
        began, blocked = time.monotonic(), faulty.intersection(NEEDS.get(name, ()))
        faults = [f"not run, because {' and '.join(sorted(blocked))} failed"] if blocked else STEPS[name](place)
        faulty.update([name] if faults else [])
        print(f"{name:9} {'FAILED' if faults else 'passed'}, {time.monotonic() - began:.0f} s", flush=True)
        print(*(f"          {fault}\n" for fault in faults), sep="", end="", flush=True)
    left_out = [name for name in STEPS if name not in asked] + ["the rest of the core"] * bool(place.core)
    if faulty:
        print(f"not to be released: {', '.join(name for name in asked if name in faulty)}; log: {place.log}")
    elif left_out:
        print(f"passed so far; left out: {', '.join(left_out)}")
    else:
        print("every step passed")
    return int(bool(faulty))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--step", choices=STEPS, action="append", help="may be repeated; all of them by default")
    add("--core", nargs="+", default=[], metavar="TESTS", help="a part of the core, in pytest's words")
    add("--folder", type=Path, default=ROOT / "build/release", help="environment, distributions and log")
    args = parser.parse_args(arguments)
    place = Place(args.folder.resolve(), tuple(args.core))
    shutil.rmtree(place.folder / "unpacked", ignore_errors=True)
    place.folder.mkdir(parents=True, exist_ok=True)
    place.log.unlink(missing_ok=True)
    return check(args.step or list(STEPS), place)


if __name__ == "__main__":
    sys.exit(main())
