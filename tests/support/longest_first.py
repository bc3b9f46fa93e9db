"""The files whose single tests take longest, which the workers of a run start with.

A test of a minute that comes last leaves the other workers without work. The order is by file, because a file's tests
share fixtures.
"""

LONGEST = (
    "backends/test_gpu_suite_on_cpu.py",
    "repository/test_mutants.py",
    "repository/test_build.py",
    "repository/test_build_switches.py",
    "linear/test_vocab_parallel.py",
    "guarantees/test_fuzz.py",
    "benchmarks/test_measured_package.py",
    "benchmarks/test_bench_cpu.py",
    "cli/test_demo.py",
    "integrations/test_trl_trainers.py",
)
"""Below the folder of the tests."""


def order(items, tests):
    """Sorts collected tests in place; ``tests`` is their folder. Those of one file keep their order."""
    place = {tests / name: k for k, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(LONGEST)))
