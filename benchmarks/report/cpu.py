"""The report of a run on a CPU: targets, table, JSON and plot."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.cases.case import COMPILED, EAGER, IN_PLACE, OURS, Case
from benchmarks.cases.logits import FORWARD, LOGPROBS, POLICY
from benchmarks.cases.logits_cpu import PASS_BACKWARD, PASS_FORWARD
from benchmarks.report.target import Target
from benchmarks.timing.contender import Contender
from rlkernels.cli import tables

REFERENCE_SHAPE = (1024, 128256, "bf16")
"""The shape for which the targets are stated."""
QUANTITIES = ("logp", "entropy", "loss", "gradient")
HEADER = ["", "median ms", "quartiles", "x ours", "GB/s", "% of read", "extra MB"]
HEADER += [f"{quantity} err" for quantity in ("logp", "entropy", "loss", "grad")]
LEGEND = """\
GB/s: bytes that the work must move at least, over the median. extra MB: the larger of the peak of torch's allocator
(torch.profiler) and the growth of the resident set, each above its level at the start, in a run of its own. Errors:
against float64 on a few rows, the largest; of a gradient, relative (Frobenius), its one rounding to the dtype of the
logits included."""


def ratio(case: Case | None, over: str, under: str) -> float | None:
    """Median of one contender divided by that of another, None where one is missing."""
    top, bottom = (case.named(name) if case else None for name in (over, under))
    return top.median / bottom.median if top and bottom else None


def targets(cases: dict[str, Case], logits_bytes: int) -> list[Target]:
    forward, both, policy = (cases.get(name) for name in (FORWARD, LOGPROBS, POLICY))
    in_place = both.named(OURS + IN_PLACE) if both else None
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


def times(case: Case, c: Contender) -> list[str]:
    """The cells of a contender's name, its time, and its time over ours."""
    low, high = c.quartiles
    ours = case.named(OURS).median
    return [c.name, f"{1e3 * c.median:.2f}", f"{1e3 * low:.2f}-{1e3 * high:.2f}", f"{c.median / ours:.2f}"]


def errors(c: Contender, quantities: Iterable[str]) -> list[str]:
    return [f"{c.errors[q]:.1e}" if q in c.errors else "-" for q in quantities]


def row(case: Case, c: Contender, read_bandwidth: float) -> list[str]:
    speeds = f"{c.bandwidth / 1e9:.1f}", f"{100 * c.bandwidth / read_bandwidth:.0f}"
    return [*times(case, c), *speeds, megabytes(c.extra_bytes), *errors(c, QUANTITIES)]


def show_case(case: Case, header: list[str], rows: list[list[str]], plain: bool) -> None:
    """Prints the table of a case without its empty columns."""
    kept = [c for c in range(len(header)) if c == 0 or any(row[c] != "-" for row in rows)]
    tables.show(case.name, [header[c] for c in kept], [[row[c] for c in kept] for row in rows], plain=plain)


def show(
    cases: Sequence[Case], reader: Contender, goals: Sequence[Target], shape: tuple[int, int, str], plain: bool
) -> None:
    """Prints a table per case, then the targets."""
    for case in cases:
        show_case(case, HEADER, [row(case, c, reader.bandwidth) for c in case.contenders], plain)
    low, high = (reader.moved / s / 1e9 for s in reversed(reader.quartiles))
    print(
        f"\nread bandwidth of this machine in this run: {reader.bandwidth / 1e9:.1f} GB/s (quartiles "
        f"{low:.1f}-{high:.1f}), {reader.name}, {reader.moved / 2**20:.0f} MiB\n{LEGEND}"
    )
    named = f"{REFERENCE_SHAPE[2]} [{REFERENCE_SHAPE[0]}, {REFERENCE_SHAPE[1]}]"
    rows = [[goal.text, goal.limit, goal.number, goal.verdict(shape == REFERENCE_SHAPE)] for goal in goals]
    tables.show(f"Targets, stated for {named}", ["target", "bound", "this run", "verdict"], rows, plain=plain)


def figures(c: Contender) -> dict[str, object]:
    """A contender as plain data."""
    return {
        "name": c.name,
        "median_s": c.median,
        "quartiles_s": list(c.quartiles),
        "samples_s": c.samples,
        "peak_bytes": c.peak_bytes,
        "resident_bytes": c.resident_bytes,
        "errors": c.errors,
    }


def record(cases: Sequence[Case], reader: Contender, goals: Sequence[Target]) -> dict[str, object]:
    """The figures as plain data."""

    def entry(c: Contender) -> dict[str, object]:
        share = {"bytes_per_s": c.bandwidth, "fraction_of_read": c.bandwidth / reader.bandwidth}
        return {**figures(c), "moved_bytes": c.moved, **share}

    return {
        "read_bandwidth": entry(reader),
        "cases": [{"name": case.name, "contenders": [entry(c) for c in case.contenders]} for case in cases],
        "targets": [goal.record() for goal in goals],
    }


def plot(path: Path, cases: Sequence[Case], title: str) -> None:
    """Medians with quartiles, one panel per case. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.2 + 0.42 * sum(len(c.contenders) + 1 for c in cases)), layout="constrained")
    panels = figure.subplots(len(cases), 1, squeeze=False, height_ratios=[len(c.contenders) for c in cases])[:, 0]
    for panel, case in zip(panels, cases, strict=True):
        names = [c.name for c in case.contenders]
        medians = [1e3 * c.median for c in case.contenders]
        spread = [[1e3 * abs(c.median - c.quartiles[side]) for c in case.contenders] for side in (0, 1)]
        colours = ["#1f77b4" if c.ours else "#b0b0b0" for c in case.contenders]
        bars = panel.barh(names, medians, xerr=spread, color=colours)
        panel.bar_label(bars, [f"{m:.1f}" for m in medians], padding=4)
        panel.margins(x=0.12)
        panel.invert_yaxis()
        panel.set_title(case.name, loc="left", fontsize=10)
    panels[-1].set_xlabel("median ms, bars: quartiles")
    figure.suptitle(title, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
