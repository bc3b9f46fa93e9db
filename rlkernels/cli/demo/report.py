"""Words of the demo: the facts at the start, the verdict, the table, the picture and the record."""

import json
import math
import platform
import statistics
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import rlkernels

# Correct runs differ by a few 1e-6, log-probabilities 1 % wrong by 1e-3 and more.
TOLERANCE = 1e-4
TITLES = {"reward": "RewardTrainer", "dpo": "DPOTrainer", "grpo": "GRPOTrainer"}
PROGRESS = {"reward": "accuracy on the batch", "dpo": "chosen above rejected", "grpo": "mean reward of a batch"}
STOCK, PATCHED = {"color": "#9ecae1", "linewidth": 5, "solid_capstyle": "round"}, {"color": "#a63603", "linewidth": 1.2}
DEFINITIONS = {
    "gap": "max over the steps of |stock - rlkernels|, divided by max |stock|, of the loss and of the gradient norm "
    "before clipping",
    "loss time": "forward and backward of the function that is replaced, median per step, measured by one stopwatch in "
    "both runs",
    "speed-up": "the run's largest call, forward and backward, repeated after training on tensors of the same shapes, "
    "the two functions in "
    "turns, best of 7 each",
    "peak extra memory": "most that torch's allocator held above the level at entry during that same call, gradients "
    "included",
}


@dataclass(frozen=True)
class Result:
    """One trainer, stock against patched."""

    loss_gap: float
    grad_norm_gap: float
    stock_ms: float
    patched_ms: float
    speedup: float
    stock_peak_bytes: int
    patched_peak_bytes: int
    calls: int
    kernels: dict[str, int]
    failures: list[str]

    @property
    def passed(self) -> bool:
        return not self.failures


def facts(device: str, docstrings: int, passages: int, vocabulary: int, parameters: int, size: dict) -> dict:
    """Facts of the training, what was trained on what, for the head of the terminal output and for the record."""
    return {
        "versions": {
            "rlkernels": rlkernels.__version__,
            "python": platform.python_version(),
            **{
                name: version(name) for name in ("torch", "trl", "transformers", "accelerate", "datasets", "tokenizers")
            },
        },
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "docstrings": docstrings,
        "passages": passages,
        "vocabulary": vocabulary,
        "parameters": parameters,
        **{k: size[k] for k in ("hidden", "layers", "held_out")},
        "tolerance": TOLERANCE,
        "definitions": DEFINITIONS,
    }


def announce(console, facts: dict, patch) -> None:
    versions = facts["versions"]
    where = facts["device"] if facts["device"] != "cpu" else f"cpu, {facts['threads']} threads"
    console.print(
        f"[bold]rlkernels {versions['rlkernels']}[/] · torch {versions['torch']} · TRL {versions['trl']} · {where}"
    )
    source = f"docstrings of Python {versions['python']}'s standard library"
    console.print(f"text       {facts['docstrings']} {source}, {facts['passages']} passages")
    console.print(f"tokenizer  byte-level BPE, {facts['vocabulary']} entries")
    size = f"{facts['layers']} layers of {facts['hidden']}, {facts['parameters'] / 1e6:.1f} M parameters"
    console.print(f"model      Llama, {size}, random weights")
    for line in (*patch.replaced, *patch.skipped):
        console.print(f"patch      {line}", markup=False)
    console.print()


def bars(console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )


def gaps(stock: list[float], patched: list[float]) -> list[float]:
    """Per step, the difference relative to the largest value of the stock series; NaN where either is NaN."""
    scale = max((abs(a) for a in stock), default=0.0) or 1.0
    return [abs(a - b) / scale for a, b in zip(stock, patched, strict=True)]


def compare(runs: dict) -> dict[str, Result]:
    """Every trainer's differences, times, memory and, in ``failures``, what must not be."""
    results = {}
    for name, (stock, patched) in runs.items():
        failures, worst = [], {}
        for what, a, b in (
            ("loss", stock.losses, patched.losses),
            ("gradient norm", stock.grad_norms, patched.grad_norms),
        ):
            steps = gaps(a, b)
            # Not max(): it drops a NaN or keeps it depending on the order.
            worst[what] = float("nan") if any(g != g for g in steps) or not steps else max(steps)
            if not worst[what] <= TOLERANCE:
                failures.append(f"{what} differs by {worst[what]:.1e}, allowed is {TOLERANCE:.0e}")
        if patched.seam_calls == 0 or not patched.kernels:
            failures.append("the patched run made no call to our kernels")
        # The first step pays for what is done once: it tells nothing about the steps after it.
        times = [1e3 * statistics.median(run.loss_seconds[1:] or run.loss_seconds) for run in (stock, patched)]
        speedup = stock.largest_call_seconds / patched.largest_call_seconds
        results[name] = Result(
            worst["loss"],
            worst["gradient norm"],
            *times,
            speedup,
            stock.peak_bytes,
            patched.peak_bytes,
            patched.seam_calls,
            patched.kernels,
            failures,
        )
    return results


def conclude(console, runs: dict, results: dict[str, Result], files: tuple[Path, ...]) -> None:
    """The table, the verdict and where the files are."""
    table = Table(title="stock TRL → TRL with rlkernels", title_justify="left")
    table.add_column("")
    rows = {
        name: []
        for name in (
            "largest loss gap",
            "largest gradient norm gap",
            "in the loss, ms per step",
            "speed-up of the loss",
            "peak extra memory",
            "calls to rlkernels",
            "kernels that ran",
            "verdict",
        )
    }
    for name, r in results.items():
        table.add_column(TITLES[name], justify="right")
        cells = (
            f"{r.loss_gap:.1e}",
            f"{r.grad_norm_gap:.1e}",
            f"{_figures(r.stock_ms)} → {_figures(r.patched_ms)}",
            f"{r.speedup:.2f}×",
            f"{_bytes(r.stock_peak_bytes)} → {_bytes(r.patched_peak_bytes)}",
            str(r.calls),
            "\n".join(f"{op}: {n}" for op, n in r.kernels.items()) or "none",
            "[green]agrees[/]" if r.passed else "[red]FAILS[/]",
        )
        for row, cell in zip(rows.values(), cells, strict=True):
            row.append(cell)
    for title, row in rows.items():
        table.add_row(title, *row)
    console.print()
    console.print(table)
    stock, patched = (run.held_out_accuracy for run in runs["reward"])
    console.print(f"reward model: accuracy {stock:.3f} on held-out pairs, stock; {patched:.3f} with rlkernels")
    console.print(
        "RewardTrainer's loss is one number per pair: its time is that of the calls, not of arithmetic, on both sides"
    )
    for what, meaning in DEFINITIONS.items():
        console.print(f"[dim]{what}: {meaning}[/]")
    console.print("written: " + ", ".join(map(str, files)))
    for name, r in results.items():
        for failure in r.failures:
            console.print(f"[red]{TITLES[name]}: {failure}[/]")
    if all(r.passed for r in results.values()):
        console.print(f"[green]all three trainers agree within {TOLERANCE:.0e}[/]")


def write(path: Path, runs: dict, results: dict[str, Result], facts: dict, settings: dict, patch) -> None:
    trainers = {}
    for name, result in results.items():
        stock, patched = map(asdict, runs[name])
        trainers[name] = {
            "stock": stock,
            "rlkernels": patched,
            "comparison": {**asdict(result), "passed": result.passed},
        }
    record = {
        **facts,
        "settings": {k: v if isinstance(v, int | float | bool | None) else str(v) for k, v in settings.items()},
        "patch": {"host": patch.host, "replaced": patch.replaced, "skipped": patch.skipped},
        "trainers": trainers,
        "passed": all(r.passed for r in results.values()),
    }
    path.write_text(json.dumps(record, indent=1) + "\n")


def draw(runs: dict, results: dict[str, Result], facts: dict, path: Path) -> None:
    """One column per trainer: the loss and the gradient norm of both runs, and their difference step by step against
    the tolerance.
    """
    figure = Figure(figsize=(13, 10.5), layout="constrained")
    axes = figure.subplots(4, len(runs), squeeze=False, sharex="col")
    floor = 1e-9
    for column, (name, (stock, patched)) in enumerate(runs.items()):
        result = results[name]
        accuracy = patched.held_out_accuracy
        said = (
            f"loss {result.speedup:.2g}× as fast"
            if accuracy is None
            else (f"accuracy on held-out pairs {accuracy:.2f}")
        )
        axes[0, column].set_title(f"{TITLES[name]}\n{said}", fontsize=11)
        for row, label, key in ((0, "loss", "losses"), (1, "gradient norm", "grad_norms")):
            axis, a, b = axes[row, column], getattr(stock, key), getattr(patched, key)
            axis.plot(range(1, len(a) + 1), a, label="stock TRL", **STOCK)
            axis.plot(range(1, len(b) + 1), b, label="with rlkernels", **PATCHED)
            difference = [max(g, floor) for g in gaps(a, b)]
            axes[3, column].plot(
                range(1, len(a) + 1), difference, ".-", linewidth=0.8, label=label, color=("#6a51a3", "#238b45")[row]
            )
            axis.set_ylabel(label if column == 0 else "")
        for run, style in ((stock, STOCK), (patched, PATCHED)):
            points = [(step, value) for step, value in enumerate(run.progress, 1) if value is not None]
            axes[2, column].plot(*zip(*points, strict=True), **style)
        axes[2, column].set_ylabel(PROGRESS[name])
        axes[3, column].axhline(TOLERANCE, color="#cb181d", linestyle="--", linewidth=1, label="tolerance")
        top = max(gap for gap in (TOLERANCE, result.loss_gap, result.grad_norm_gap) if math.isfinite(gap))
        axes[3, column].set(yscale="log", ylim=(floor / 2, 10 * top), xlabel="step")
        for axis in axes[:, column]:
            axis.grid(alpha=0.25)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.spines[["top", "right"]].set_visible(False)
    axes[3, 0].set_ylabel(f"difference, relative\n(0 is drawn at {floor:.0e})")
    axes[0, 0].legend(frameon=False)
    axes[3, 0].legend(frameon=False, ncols=3, fontsize=8, loc="upper left")
    versions = facts["versions"]
    figure.suptitle(
        f"TRL {versions['trl']} with and without rlkernels {versions['rlkernels']}, same seed, {facts['device']}, "
        f"vocabulary {facts['vocabulary']}",
        fontsize=12,
    )
    figure.savefig(path, dpi=110)


def _figures(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"


def _bytes(n: int) -> str:
    return f"{n / 1e6:.0f} MB" if n >= 1e6 else f"{n / 1e3:.1f} kB"
