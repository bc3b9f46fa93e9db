"""``rlkernels doctor``: what is installed, which backend serves what here, and why one is absent."""

import argparse
import json
import os
import platform

import torch

import rlkernels
from rlkernels.backends import DEVICES, absent, cpu, cpu_matmul, expected_order, measured_order
from rlkernels.cli import machine, self_test, tables
from rlkernels.cli.self_test import Verdict
from rlkernels.installing import how

ENVIRONMENT = {
    "RLKERNELS_CHECK": "run time, read at import: 1 also checks values (cu_seqlens, masks), and that shards cover the "
    "vocabulary, where that stops the queue",
    "RLKERNELS_CPU_ISA": "run time, read once: highest instruction set of the cpu backend (amx, avx512, avx2, "
    "baseline)",
    "RLKERNELS_LOGITS_BUDGET": "run time: bytes of logits that a chunk of the linear_* functions holds (default 1 GiB "
    "or as much as the head's fp32 gradient, on a CPU 256 MiB)",
    "RLKERNELS_PATCH": "run time, read at import: the trainers to patch, such as trl,verl",
    "RLKERNELS_CPU": "build time: 0, 1 or auto (default); whether the cpu backend is built (auto: where a compiler "
    "works; 1: a failure is an error); "
    "run time, read at import: 0 goes without it, and without the warning that it is absent",
    "RLKERNELS_CUDA": "build time: 0, 1 or auto (default); whether the cuda backend is built (auto: where nvcc and an "
    "NVIDIA driver are found; 1: a failure is an error)",
    "RLKERNELS_CUDA_ARCHS": "build time: architectures of the cuda backend, such as '90a 120', or all (80 90a 100a "
    "120; default: those of the GPUs here, all where no driver is); with auto it stands in for the driver",
    "RLKERNELS_CUDA_FLAGS": "build time: further flags for nvcc, such as -lineinfo",
    "CUDA_HOME": "build time: where nvcc is looked for first; then CUDA_PATH, PATH, /usr/local/cuda",
    "CUDA_PATH": "build time: where nvcc is looked for after CUDA_HOME",
    "TRITON_INTERPRET": 'Triton\'s own: 1 runs its kernels on CPU tensors, in an interpreter; use_backend("triton") '
    "then accepts them",
    "CXX": "build time: the C++ compiler, with its flags (default: the first of c++, g++, clang++)",
    "MAX_JOBS": "build time: how many compilers run side by side (default: one per processor)",
    "_PYTHON_HOST_PLATFORM": "Python's own, build time: set where one machine builds for another; the module is then "
    "not loaded once after the build",
}
"""Every environment variable that the library, its build included, reads."""

OPTIONAL = {
    "transformers": f"the demo needs it; {how('demo')}",
    "trl": f"the demo and integrations.trl need it; {how('demo')}",
    "rich": f"tables are plain text without it; {how('demo')}",
    "matplotlib": f"the demo and the pictures of the benchmarks need it; {how('demo')}",
}
"""Packages that serve a part alone, and what is lost without each."""

MATMULS = {"amx": "AMX", "avx512_bf16": "AVX512_BF16", None: "torch's in fp32"}
"""The instructions that multiply a bf16 head on a CPU, by ``cpu_matmul.name()``."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plain", action="store_true", help="plain text even where rich is installed")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare every backend present with float64, ten seconds or so; exit status 1 where one is wrong",
    )


def show_choices(*, plain: bool) -> None:
    """The measured table that decides between backends, and the order where it has no entry."""
    measured = sorted(measured_order.TABLE.items())
    rows = [
        [op, device, f"{itemsize} bytes", vocabulary, ", ".join(order)]
        for (op, device, itemsize, vocabulary), order in measured
    ]
    if rows:
        tables.show(
            f"Measured choice of a backend (large: a vocabulary of {measured_order.LARGE} or more)",
            ["op", "device", "per logit", "vocabulary", "order"],
            rows,
            plain=plain,
        )
    else:
        print(
            "\nMeasured choice of a backend: no entry, since nothing has been measured on a GPU yet; the order below "
            "is used."
        )
    tables.show(
        "Order of the backends where nothing was measured",
        ["device", "order"],
        [[d, ", ".join(order)] for d, order in DEVICES.items()],
        plain=plain,
    )
    capability = ".".join(map(str, expected_order.CAPABILITY))
    print(
        f"\nExpected by a model, not measured: with the CUDA module, on capability {capability} and newer, "
        f"{' and '.join(expected_order.WORK)} go to cuda first."
    )


def run(args: argparse.Namespace) -> int:
    """Prints what is here; 0, because an absent backend is a fact, and 1 where ``--check`` found a wrong number."""
    facts, state = facts_of_the_machine(), rlkernels.available_backends()
    advice = {**state["absent"], **{name: text for name, text in OPTIONAL.items() if facts[name] is None}}
    verdicts = self_test.check() if args.check else []
    if args.json:
        variables = {name: os.environ.get(name) for name in ENVIRONMENT}
        found = {"machine": facts, **state, "advice": advice, "environment": variables}
        print(json.dumps({**found, "check": [x.record() for x in verdicts]} if args.check else found, indent=1))
    else:
        show_tables(facts, state["serves"], advice, plain=args.plain)
        show_verdicts(verdicts, plain=args.plain)
    return int(not all(x.passed for x in verdicts))


def facts_of_the_machine() -> dict[str, str | None]:
    """Returns versions, processor and threads by name; None where a package is not installed."""
    return {
        "rlkernels": rlkernels.__version__,
        **machine.versions(),
        "platform": platform.platform(),
        "processor": f"{machine.processor()}, {machine.cores()} cores",
        "instruction set of the cpu backend": None if absent("cpu") else cpu.isa(),
        "bf16 matmul of the cpu backend": MATMULS[cpu_matmul.name()],
        "torch threads": str(torch.get_num_threads()),
    }


def show_tables(
    facts: dict[str, str | None], serves: dict[str, dict[str, str]], advice: dict[str, str], *, plain: bool
) -> None:
    """Prints the machine, who serves what, and what to do about that which is absent."""
    rows = [
        [name, found or ("-" if name not in machine.PACKAGES else "not installed")] for name, found in facts.items()
    ]
    tables.show("This machine", ["what", "found"], rows, plain=plain)
    rows = [[op, *(serves[device][op] for device in serves)] for op in serves["cpu"]]
    tables.show("Which backend serves which op", ["op", *serves], rows, plain=plain)
    show_choices(plain=plain)
    rows = [[name, text] for name, text in advice.items()] or [["nothing", "every backend and package is here"]]
    tables.show("Absent, and what to do", ["what", "why, and what to do"], rows, plain=plain)
    rows = [[name, os.environ.get(name, "not set"), meaning] for name, meaning in ENVIRONMENT.items()]
    tables.show("Environment variables", ["name", "value", "meaning"], rows, plain=plain)


def show_verdicts(verdicts: list[Verdict], *, plain: bool) -> None:
    """Prints the errors of the check, and one line that says whether all are within their bounds."""
    if not verdicts:
        return
    rows = [
        [x.function, x.device, x.backend, x.dtype, f"{x.error:.1e}", f"{x.bound:.0e}", _judged(x)] for x in verdicts
    ]
    header = ["function", "device", "backend", "dtype", "error", "allowed", "verdict"]
    tables.show("Values and gradients against float64", header, rows, plain=plain)
    wrong = sum(not x.passed for x in verdicts)
    print(f"\n{len(verdicts) - wrong} of {len(verdicts)} right" + (f", {wrong} WRONG" if wrong else ""))


def _judged(x: Verdict) -> str:
    return "right" if x.passed else x.failure or "WRONG"
