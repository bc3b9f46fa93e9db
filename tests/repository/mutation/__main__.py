"""Deliberate mistakes in every backend and in the Python around them, and the run that shows that the suite notices.

    python tests/repository/mutation                           # all of them, one after another
    python tests/repository/mutation --backend triton --list
    python tests/repository/mutation --only "tail" --only "sign"

Each mutant is planted in a copy of the sources, built where it is C++, and shown to the tests that it names. First
those tests must pass without any. Exit status: 0 where at least 95 % were noticed, 1 below, 2 where a mutant could not
be tried.
"""

import argparse
import contextlib
import importlib.util
import os
import re
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import cpu_mutants  # noqa: E402
import cuda_mutants  # noqa: E402
import divergence_mutants  # noqa: E402
import head_mutants  # noqa: E402
import python_mutants  # noqa: E402
import triton_mutants  # noqa: E402
from mutant import problems  # noqa: E402
from tree import Tree  # noqa: E402

ROOT = HERE.parents[2]
LISTS = {
    "cpu": cpu_mutants.MUTANTS + divergence_mutants.CPU,
    "cuda": cuda_mutants.MUTANTS,
    "triton": triton_mutants.MUTANTS + divergence_mutants.TRITON,
    "compiled": triton_mutants.COMPILED,
    "python": python_mutants.MUTANTS + divergence_mutants.PYTHON,
    "head": head_mutants.MUTANTS,
}
BAR = 0.95


def chosen(backends, words):
    """``[(backend, mutant)]`` of these backends whose name holds one of the words."""
    every = [(backend, m) for backend in backends for m in LISTS[backend]]
    return [(b, m) for b, m in every if not words or any(word.lower() in f"{b} {m.name}".lower() for word in words)]


class Impossible(Exception):
    """A mutant could not be tried: that is neither noticed nor missed."""


def prepare(tree, backend):
    """Builds what the backend needs from the tree as it is now."""
    try:
        {"cuda": tree.build_cuda, "cpu": tree.build_cpu}.get(backend, lambda: None)()
    except RuntimeError as error:
        raise Impossible(str(error)) from error


def planted_tree(root, folder, backend):
    """The tree for a backend. Triton lies beside the environment: with it, other libraries would choose other paths."""
    if backend not in ("triton", "compiled"):
        return Tree(root, folder)
    beside = sorted((root / ".triton").glob("[0-9]*"), key=lambda path: [int(n) for n in path.name.split(".")])
    if not beside and importlib.util.find_spec("triton") is None:
        raise Impossible("Triton is not installed; make mutants gets it, or leave its mutants out with --backend")
    return Tree(root, folder, beside[-1:], **({"TRITON_INTERPRET": "1"} if backend == "triton" else {}))


def must_pass(tree, backend, mutants):
    """Without any mistake the tests pass: else they would notice nothing but themselves."""
    prepare(tree, backend)
    tests = sorted({test for m in mutants for test in m.tests})
    status, output = tree.pytest(tests, first_failure=False)
    ran = re.search(r"(\d+) passed", output)
    if status != 0 or not ran:
        raise Impossible(f"the tests of {backend} do not pass on the unchanged sources:\n{output[-3000:]}")
    return int(ran[1])


def noticed(tree, backend, mutant):
    """``(noticed, by what)``."""
    with tree.planted(mutant):
        prepare(tree, backend)
        status, output = tree.pytest(mutant.tests)
    if status is None:
        return True, "it did not end"
    if status < 0:
        return True, f"signal {-status}"
    failed = re.search(r"^FAILED tests/(.*)", output, re.MULTILINE)
    if status == 1 and failed:
        return True, failed[1][:160]
    if status == 0:
        return False, ""
    raise Impossible(f"{backend}: {mutant.name!r} broke the tests themselves:\n{output[-3000:]}")


def run(root, todo, show=print):
    """Tries all; returns ``{name: noticed}``, None where the mutant could not be tried."""
    results = {}
    for backend in dict.fromkeys(b for b, _ in todo):
        mutants = [m for b, m in todo if b == backend and not m.equivalent]
        if not mutants:
            continue
        with tempfile.TemporaryDirectory() as folder, planted_tree(root, folder, backend) as tree:
            start = time.monotonic()
            count = must_pass(tree, backend, mutants)
            show(
                f"{backend}: {count} tests pass on the unchanged sources in {time.monotonic() - start:.0f} s",
                flush=True,
            )
            for m in mutants:
                start = time.monotonic()
                try:
                    dead, by = noticed(tree, backend, m)
                except Impossible as error:
                    dead, by = None, str(error)
                results[f"{backend}: {m.name}"] = dead
                word = {True: "killed", False: "SURVIVED", None: "BROKEN"}[dead]
                show(
                    f"{word:8s} {time.monotonic() - start:5.0f} s  {backend}: {m.name}{f'  by {by}' if by else ''}",
                    flush=True,
                )
    for backend, m in todo:
        if m.equivalent:
            show(f"equivalent        {backend}: {m.name}: {m.equivalent}")
    return results


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python tests/repository/mutation", description=__doc__.splitlines()[0])
    parser.add_argument("--backend", action="append", choices=LISTS, help="may be repeated; all by default")
    parser.add_argument(
        "--only", action="append", metavar="TEXT", help="mutants whose backend and name hold this text; may be repeated"
    )
    parser.add_argument("--list", action="store_true", help="print what would be tried")
    options = parser.parse_args(arguments)
    todo = chosen(options.backend or LISTS, options.only)
    wrong = problems(ROOT, [m for _, m in todo])
    if wrong or not todo:
        print("\n".join(wrong) or "no mutant has such a name")
        return 2
    if options.list:
        for backend, m in todo:
            print(
                f"{backend}: {m.name}  "
                f"[{m.file}{', faults ' + ', '.join(map(str, m.faults)) if m.faults else ''}]"
                f"{' equivalent' * bool(m.equivalent)}"
            )
        return 0
    with contextlib.suppress(AttributeError, OSError):
        os.nice(max(0, 10 - os.nice(0)))  # it takes an hour: whoever works here meanwhile goes first
    try:
        results = run(ROOT, todo)
    except Impossible as error:
        print(error)
        return 2
    tried = {name: dead for name, dead in results.items() if dead is not None}
    dead = sum(tried.values())
    print(f"{dead} of {len(tried)} were noticed ({dead / max(len(tried), 1):.1%}; the bar is {BAR:.0%})")
    for name in (name for name, dead in results.items() if not dead):
        print(f"{'SURVIVED' if name in tried else 'BROKEN  '} {name}")
    if len(tried) < len(results):
        return 2
    return 0 if dead >= BAR * len(tried) else 1


if __name__ == "__main__":
    sys.exit(main())
