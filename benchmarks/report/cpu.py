"""The report of a run: targets, table, JSON and plot."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cases import logits_cpu
from benchmarks.cases.case import COMPILED, EAGER, OURS, Case
from benchmarks.cases.logits_cpu import OUR_IN_PLACE, PASS_BACKWARD, PASS_FORWARD
from benchmarks.timing.contender import Contender
from rlkernels.cli import tables

REFERENCE_SHAPE = (1024, 128256, "bf16")
"""The shape for which the targets are stated."""


@dataclass
class Target:
    text: str
    value: float | None
    bound: float
    at_least: bool

    @property
    def met(self) -> bool | None:
        """Tell whether the bound is met; None where a side of the comparison was not measured."""
        if self.value is None:
            return None
        return self.value >= self.bound if self.at_least else self.value <= self.bound


def ratio(case: Case | None, over: str, under: str) -> float | None:
    """Median of one contender divided by that of another, None where one is missing."""
    top, bottom = (case.named(name) if case else None for name in (over, under))
    return top.median / bottom.median if top and bottom else None


def targets(cases: dict[str, Case], logits_bytes: int) -> list[Target]:
    forward, both, policy = (cases.get(name) for name in (logits_cpu.FORWARD, logits_cpu.BOTH, logits_cpu.POLICY))
    in_place = both.named(OUR_IN_PLACE) if both else None
    parts = [policy.named(n) if policy else None for n in (OURS, PASS_FORWARD, PASS_BACKWARD)]
    fused = parts[0].median / (parts[1].median + parts[2].median) if all(parts) else None
    peak = None
    if in_place is not None and in_place.extra_bytes is not None:
        peak = in_place.extra_bytes / logits_bytes
    return [
        Target("forward, times faster than torch eager", ratio(forward, EAGER, OURS), 20.0, True),
        Target("forward, times faster than torch.compile", ratio(forward, COMPILED, OURS), 2.5, True),
        Target("forward+backward, times faster than torch eager", ratio(both, EAGER, OURS), 15.0, True),
        Target("forward+backward, times faster than torch.compile", ratio(both, COMPILED, OURS), 8.0, True),
        Target("in place: peak extra memory, as a share of the logits", peak, 0.1, False),
        Target("logits_policy_loss, time over the sum of its two passes", fused, 1.15, False),
    ]


def megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 1e6:.1f}"


def row(case: Case, contender: Contender, read_bandwidth: float) -> list[str]:
    low, high = contender.quartiles
    ours = case.named(OURS)
    errors = [
        f"{contender.errors[q]:.1e}" if q in contender.errors else "-" for q in ("logp", "entropy", "loss", "gradient")
    ]
    return [
        contender.name,
        f"{1e3 * contender.median:.2f}",
        f"{1e3 * low:.2f}-{1e3 * high:.2f}",
        f"{contender.median / ours.median:.2f}",
        f"{contender.bandwidth / 1e9:.1f}",
        f"{100 * contender.bandwidth / read_bandwidth:.0f}",
        megabytes(contender.extra_bytes),
        *errors,
    ]


HEADER = [
    "",
    "median ms",
    "quartiles",
    "x ours",
    "GB/s",
    "% of read",
    "extra MB",
    "logp err",
    "entropy err",
    "loss err",
    "grad err",
]


def without_empty_columns(header: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    kept = [c for c in range(len(header)) if c == 0 or any(row[c] != "-" for row in rows)]
    return [header[c] for c in kept], [[row[c] for c in kept] for row in rows]


def show(
    cases: Sequence[Case], reader: Contender, goals: Sequence[Target], shape: tuple[int, int, str], plain: bool
) -> None:
    """Prints a table per case, then the targets."""
    for case in cases:
        tables.show(
            case.name,
            *without_empty_columns(HEADER, [row(case, c, reader.bandwidth) for c in case.contenders]),
            plain=plain,
        )
    low, high = (reader.moved / s / 1e9 for s in reversed(reader.quartiles))
    print(
        f"\nread bandwidth of this machine in this run: {reader.bandwidth / 1e9:.1f} GB/s (quartiles "
        f"{low:.1f}-{high:.1f}), "
        f"{reader.name}, {reader.moved / 2**20:.0f} MiB"
    )
    print(
        "GB/s: bytes that the work must move at least, over the median. extra MB: the larger of the peak of torch's "
        "allocator"
    )
    print(
        "(torch.profiler) and the growth of the resident set, each above its level at the start, in a run of its "
        "own. Errors: against"
    )
    print(
        "float64 on a few rows, the largest; of a gradient, relative (Frobenius), its one rounding to the dtype of "
        "the logits included."
    )
    named = f"{REFERENCE_SHAPE[2]} [{REFERENCE_SHAPE[0]}, {REFERENCE_SHAPE[1]}]"
    rows = []
    for goal in goals:
        verdict = (
            "not measured"
            if goal.met is None
            else "other shape"
            if shape != REFERENCE_SHAPE
            else "met"
            if goal.met
            else "NOT MET"
        )
        value = "-" if goal.value is None else f"{goal.value:.3g}"
        rows.append([goal.text, f"{'>=' if goal.at_least else '<='} {goal.bound:g}", value, verdict])
    tables.show(f"Targets, stated for {named}", ["target", "bound", "this run", "verdict"], rows, plain=plain)


def record(cases: Sequence[Case], reader: Contender, goals: Sequence[Target]) -> dict[str, object]:
    """The figures as plain data."""

    def entry(c: Contender) -> dict[str, object]:
        return {
            "name": c.name,
            "median_s": c.median,
            "quartiles_s": list(c.quartiles),
            "samples_s": c.samples,
            "moved_bytes": c.moved,
            "bytes_per_s": c.bandwidth,
            "fraction_of_read": c.bandwidth / reader.bandwidth,
            "peak_bytes": c.peak_bytes,
            "resident_bytes": c.resident_bytes,
            "errors": c.errors,
        }

    return {
        "read_bandwidth": entry(reader),
        "cases": [{"name": case.name, "contenders": [entry(c) for c in case.contenders]} for case in cases],
        "targets": [
            {"text": g.text, "bound": g.bound, "at_least": g.at_least, "value": g.value, "met": g.met} for g in goals
        ],
    }


def save(path: Path, data: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n")


def plot(path: Path, cases: Sequence[Case], title: str) -> None:
    """Medians with quartiles, one panel per case. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.2 + 0.42 * sum(len(c.contenders) + 1 for c in cases)), layout="constrained")
    panels = figure.subplots(len(cases), 1, squeeze=False, height_ratios=[len(c.contenders) for c in cases])[:, 0]
    for panel, case in zip(panels, cases, strict=True):
        names = [c.name for c in case.contenders]
        medians = [1e3 * c.median for c in case.contenders]
        spread = [[1e3 * abs(c.median - c.quartiles[side]) for c in case.contenders] for side in (0, 1)]
        bars = panel.barh(
            names, medians, xerr=spread, color=["#1f77b4" if c.ours else "#b0b0b0" for c in case.contenders]
        )
        panel.bar_label(bars, [f"{m:.1f}" for m in medians], padding=4)
        panel.margins(x=0.12)
        panel.invert_yaxis()
        panel.set_title(case.name, loc="left", fontsize=10)
    panels[-1].set_xlabel("median ms, bars: quartiles")
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
