"""``rlkernels doctor``: what is installed, which backend serves what here, and why one is absent."""

import argparse
import os
import platform

import torch

import rlkernels
from rlkernels.backends import DEVICES, cpu, measured_order
from rlkernels.cli import machine, tables

ENVIRONMENT = {
    "RLKERNELS_CHECK": "run time, read at import: 1 also checks values (cu_seqlens, masks), and that shards cover the "
    "vocabulary, where that stops the queue",
    "RLKERNELS_CPU_ISA": "run time, read once: highest instruction set of the cpu backend (avx512, avx2, baseline)",
    "RLKERNELS_LOGITS_BUDGET": "run time: bytes of logits that a chunk of the linear_* functions holds (default 1 GiB, "
    "on a CPU 256 MiB)",
    "RLKERNELS_PATCH": "run time, read at import: the trainers to patch, such as trl,verl",
    "RLKERNELS_CPU": "build time: 0, 1 or auto (default); whether the cpu backend is built (auto: where a compiler "
    "works; 1: a failure is an error); "
    "run time, read at import: 0 goes without it, and without the warning that it is absent",
    "RLKERNELS_CUDA": "build time: 0 (default), 1 or auto; whether the cuda backend is built (auto: where nvcc works; "
    "1: a failure is an error)",
    "RLKERNELS_CUDA_ARCHS": "build time: architectures of the cuda backend (default 80 90a 100a 120)",
    "RLKERNELS_CUDA_FLAGS": "build time: further flags for nvcc, such as -lineinfo",
    "CUDA_HOME": "build time: where nvcc is looked for when it is not on PATH",
    "TRITON_INTERPRET": 'Triton\'s own: 1 runs its kernels on CPU tensors, in an interpreter; use_backend("triton") '
    "then accepts them",
    "CXX": "build time: the C++ compiler, with its flags (default: the first of c++, g++, clang++)",
    "MAX_JOBS": "build time: how many compilers run side by side (default: one per processor)",
    "_PYTHON_HOST_PLATFORM": "Python's own, build time: set where one machine builds for another; the module is then "
    "not loaded once after the build",
}
"""Every environment variable that the library, its build included, reads."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--plain", action="store_true", help="plain text even where rich is installed")


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


def run(args: argparse.Namespace) -> int:
    """Prints the tables; always 0: an absent backend is a fact, not a failure."""
    state = rlkernels.available_backends()
    isa = "-" if "cpu" in state["absent"] else cpu.isa()
    facts = [
        ["rlkernels", rlkernels.__version__],
        *([name, found or "not installed"] for name, found in machine.versions().items()),
        ["platform", platform.platform()],
        ["processor", f"{machine.processor()}, {machine.cores()} cores"],
        ["instruction set of the cpu backend", isa],
        ["torch threads", str(torch.get_num_threads())],
    ]
    tables.show("This machine", ["what", "found"], facts, plain=args.plain)
    devices = list(state["serves"])
    ops = list(state["serves"]["cpu"])
    rows = [[op, *(state["serves"][device][op] for device in devices)] for op in ops]
    tables.show("Which backend serves which op", ["op", *devices], rows, plain=args.plain)
    show_choices(plain=args.plain)
    rows = [[name, reason] for name, reason in state["absent"].items()] or [["none", "every backend is available"]]
    tables.show("Absent backends", ["backend", "reason"], rows, plain=args.plain)
    rows = [[name, os.environ.get(name, "not set"), meaning] for name, meaning in ENVIRONMENT.items()]
    tables.show("Environment variables", ["name", "value", "meaning"], rows, plain=args.plain)
    return 0
