"""``python -m benchmarks.gpu_model``: how fast the kernels would be on an H200, from their machine code.

A model that no device has calibrated. Nothing runs on a GPU.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks import ROOT
from benchmarks.gpu_model import head, machine, machine_code, rows
from benchmarks.gpu_model.predictions import COLUMN_KERNELS, FILE, HEADS, LABEL, ROW_KERNELS, Prediction, written

BUILD = ROOT / "build" / "gpu_model"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0, or 2 where a compiler is not here."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_model", description="Predicted speed on an H200, from machine code alone."
    )
    parser.add_argument("--backend", choices=["cuda", "triton"], action="append", help="this one alone")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--write", action="store_true", help=f"write {FILE.relative_to(ROOT)}")
    args = parser.parse_args(argv)
    if args.write and args.backend:
        parser.error("--write is for both backends")
    found: list[Prediction] = []
    try:
        for backend in args.backend or ["cuda", "triton"]:
            found += predict(backend, BUILD)
    except RuntimeError as error:
        print(f"benchmarks.gpu_model: {error}", file=sys.stderr)
        return 2
    if args.write:
        FILE.write_text(written(found, machine_code.compilers()))
    print(as_json(found) if args.json else table(found))
    return 0


def predict(backend: str, folder: Path) -> list[Prediction]:
    """All predictions of a backend; what is compiled for them is kept under ``folder``."""
    if backend == "cuda":
        build = rows.cuda(machine_code.of_cuda(machine_code.compile_cuda(folder)))
    else:
        with tempfile.TemporaryDirectory() as cubins:
            build = rows.triton(machine_code.compile_triton(Path(cubins)))
    return with_heads(rows.predict(build, folder), backend)


def with_heads(found: list[Prediction], backend: str) -> list[Prediction]:
    """The predictions of kernels, and behind them those of the fused head that runs them."""
    of_head = {p.kernel: p for p in found if p.dtype.startswith("fp32") and p.shape[-1] == head.VOCAB}
    return found + head.predict(of_head, backend)


def as_json(found: list[Prediction]) -> str:
    told = [{**asdict(p), "reached": p.reached} for p in found]
    return json.dumps(
        {"label": LABEL, "machine": machine.SLOW._asdict(), "calibration": machine.CALIBRATION, "predictions": told},
        indent=1,
    )


def share(p: Prediction) -> str:
    high = p.share_of_roof if p.share_at_best is None else p.share_at_best
    return (
        f"{p.share_of_roof:.0%} to {high:.0%}"
        if round(high, 2) > round(p.share_of_roof, 2)
        else f"{p.share_of_roof:.0%}"
    )


def remark(p: Prediction) -> str:
    """The goals, and whether the model reaches them."""
    goals = [] if p.goal is None else [f">= {p.goal:.0%}"]
    goals += [] if p.instructions_goal is None else [f"<= {p.instructions_goal:g} instructions"]
    return ", ".join(goals) + ("" if p.reached else ": below its goal") if goals else "-"


def table(found: list[Prediction]) -> str:
    """The tables for a terminal."""
    lines = [f"{LABEL}: predicted from machine code for an H200; no figure here was measured", ""]
    names = f"{'kernel':21}{'backend':8}{'dtype':13}{'shape':>14}{'instr':>7}{'flight':>8}{'blocks':>7}{'warps':>6}  "
    lines.append(f"{names}{'share of roof':14}goal; limiter")
    for p in (p for p in found if p.kernel not in HEADS):
        shape = "x".join(map(str, p.shape))
        lines.append(
            f"{p.kernel:21}{p.backend:8}{p.dtype:13}{shape:>14}{p.instructions_per_element:7.1f}"
            f"{(p.bytes_in_flight or 0) / 1024:6.0f} K{p.blocks_per_sm:7}{p.warps_per_sm:6}  "
            f"{share(p):14}{remark(p)}; {p.limiter}"
        )
    lines += ["", "instructions per element by pipe"]
    pipes = {(p.kernel, p.backend, p.dtype, tuple(p.pipes.items())): p for p in found if p.pipes}
    for p in pipes.values():
        told = " ".join(f"{name} {n:g}" for name, n in p.pipes.items())
        lines.append(f"{p.kernel:21}{p.backend:8}{p.dtype:13}{p.shape[1]:7}  {told}")
    lines += ["", f"{'fused head':26}{'backend':8}{'tokens':>7}  {'share':14}{'extra GiB':10}goal; plan"]
    for p in (p for p in found if p.kernel in HEADS):
        lines.append(f"{p.kernel:26}{p.backend:8}{p.shape[0]:7}  {share(p):14}{p.extra_gib:<10}{remark(p)}; {p.plan}")
    roofs = {**ROW_KERNELS, **COLUMN_KERNELS, **HEADS}
    lines += ["", *(f"{name}: {text}" for name, text in roofs.items())]
    lines += ["", "The first run on a device would calibrate, in benchmarks/gpu_model/machine.py:"]
    values = machine.SLOW._asdict()
    lines += [f"  {name} = {values[name]:g}: {text}" for name, text in machine.CALIBRATION.items()]
    lines.append(f"The higher shares are for {machine.FAST.clock / 1e9:g} GHz and {machine.FAST.latency * 1e9:.0f} ns.")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
