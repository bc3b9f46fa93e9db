"""Measured figures of the first quarter of an hour, and what a model said of each before: the rows of its table.

Nothing is measured here. A row without a figure is one that was not reached, or that failed.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass

from benchmarks.cases import names
from benchmarks.cases.names import ONE_LAUNCH, POLICY, PRODUCTS, STATS, TWO
from benchmarks.gpu_machine import choices
from benchmarks.gpu_model import predictions

GOALS = {"token_stats": 0.92, "two_models": 1 / 1.15, "fused_policy": 1 / 1.15, "linear_policy_loss": 0.88}
"""Shares to reach, those of docs/performance.md, where the model's file names none."""
DTYPE = "bf16"
COUNTED = {
    "instructions per element": ("smsp__inst_executed.sum",),
    "warps per multiprocessor": ("sm__warps_active.avg.per_cycle_active",),
    "issue slots used": ("smsp__issue_active.avg.per_cycle_active",),
    "hits in the level-2 cache": ("lts__t_sector_hit_rate.pct",),
    "bytes of memory over the least": ("dram__bytes_read.sum", "dram__bytes_write.sum"),
    "milliseconds under the profiler": ("gpu__time_duration.sum",),
}
"""Figures that a profiler counts of a kernel, and the names of its counters."""
NOT_REACHED = "not reached"


@dataclass
class Row:
    """A figure: what it is of, where it is measured, and what came of it.

    ``source``: the file's stem, or ``counters``. ``case``, ``entry``: in that file. ``over``: the entry whose time is
    the floor, None where the case has one. ``detail``: what differs from the kernel as it is chosen.
    """

    figure: str
    kernel: str
    backend: str
    shape: tuple[int, ...]
    source: str
    case: str
    entry: str
    over: str | None = None
    detail: str = ""
    measured: float | None = None
    remark: str = ""

    @property
    def prediction(self) -> predictions.Prediction | None:
        return predictions.lookup(self.kernel, self.backend, DTYPE, self.shape)

    @property
    def model(self) -> float | None:
        """The model's number for this figure, where it has one; of a variant it has none."""
        found = None if self.detail else self.prediction
        if found is None:
            return None
        return {
            "share of the roof": found.share_of_roof,
            "instructions per element": found.instructions_per_element,
            "warps per multiprocessor": found.warps_per_sm,
        }.get(self.figure)

    @property
    def goal(self) -> float | None:
        found = self.prediction
        if self.figure == "share of the roof":
            stated = None if found is None else found.goal
            return GOALS.get(self.kernel.split(" ")[0]) if stated is None else stated
        if self.figure == "instructions per element":
            return None if found is None else found.instructions_goal
        return None

    def record(self) -> dict[str, object]:
        return {**asdict(self), "model": self.model, "goal": self.goal, "label": predictions.LABEL}


SHARE = "share of the roof"
KERNELS = ("token_stats", "two_models", "fused_policy", "token_stats_backward")


def rows(rehearsal: bool) -> list[Row]:
    """Every figure that the steps can give, in the order in which they come."""
    if rehearsal:
        backends, shape, hidden = choices.REHEARSED_BACKENDS, choices.REHEARSED_SHAPE, choices.REHEARSED_HIDDEN
    else:
        backends, shape, hidden = choices.BACKENDS, choices.SHAPE, choices.HIDDEN
    of_head = (shape[0], hidden, shape[1])
    products, head = PRODUCTS.format(3), names.HEADS[0]
    whole = names.of_head(head, of_head)
    found = [
        Row(SHARE, kernel, backend, shape, "bench", case, f"rlkernels {backend}{suffix}")
        for kernel, case, suffix in (
            ("token_stats", STATS, ""),
            ("two_models", TWO, ""),
            ("fused_policy", POLICY, ONE_LAUNCH),
        )
        for backend in backends
    ]
    found += [Row(SHARE, head, b, of_head, "bench", whole, f"rlkernels {b}", products) for b in backends]
    found += [
        Row(
            SHARE,
            "fused_policy",
            backends[-1],
            shape,
            "variants",
            choices.FUSED,
            choices.blocks_label(backends[-1], count),
            detail="read twice" if count == choices.READ_TWICE else f"{count} blocks per row",
        )
        for count in choices.BLOCKS
    ]
    chosen = backends[-1]
    found.append(Row(SHARE, f"{head} 1 GiB", chosen, of_head, "variants", head, choices.BUDGET_LABEL, products))
    found += [
        Row(SHARE, head, chosen, of_head, "variants", head, choices.chunk_label(n), products, f"chunks of {n} rows")
        for n in choices.CHUNKS
    ]
    found += [
        Row(SHARE, "token_stats_backward", b, shape, "variants", choices.BACKWARD, f"rlkernels {b}") for b in backends
    ]
    found += [
        Row(figure, kernel, backend, shape, "counters", kernel, backend)
        for backend in backends
        for kernel in KERNELS
        for figure in COUNTED
    ]
    return found


def fill(found: list[Row], source: str, data: dict | list) -> list[Row]:
    """Puts the figures of one file into its rows; returns those that were filled."""
    mine = [row for row in found if row.source == source and row.measured is None]
    read: Callable[[Row], tuple[float | None, str]] = (
        (lambda row: _counted(row, data)) if source == "counters" else (lambda row: _share(row, data))
    )
    for row in mine:
        row.measured, row.remark = read(row)
        if source == "variants" and row.entry.startswith("rlkernels auto,"):  # whoever was chosen, it is the figure of
            row.backend = data.get("serves", {}).get("fused_policy", row.backend)
    return [row for row in mine if row.measured is not None]


def _share(row: Row, data: dict) -> tuple[float | None, str]:
    """The floor's time over the entry's."""
    case = next((c for c in data.get("cases", []) if c["name"] == row.case), None)
    if case is None:
        return None, ""
    entries = {e["name"]: e for e in case["entries"]}
    entry = entries.get(row.entry)
    if entry is None or entry["failed"] or not entry["hot"]:
        return None, "" if entry is None else entry["remark"]
    median, floor = entry["hot"]["median_s"], case["floor_s"]
    if row.over is not None:
        bare = entries.get(row.over)
        if bare is None or not bare["hot"]:
            return None, f"no time of {row.over}"
        floor = bare["hot"]["median_s"]
    return floor / median, f"{1e3 * median:.4g} ms"


def _counted(row: Row, launched: list[dict]) -> tuple[float | None, str]:
    """A number of the profiler, per element or per byte where it is one of those."""
    one = next((x for x in launched if (x["kernel"], x["backend"]) == (row.kernel, row.backend)), None)
    if one is None:
        return None, ""
    wanted = COUNTED[row.figure]
    values = [one["counters"].get(name) for name in wanted]
    if None in values:
        return None, f"{' and '.join(wanted)} not counted"
    total = sum(values)
    if row.figure == "instructions per element":
        return 32 * total / (row.shape[0] * row.shape[1]), ""
    if row.figure == "bytes of memory over the least":
        return total / one["bytes"], ""
    if row.figure == "milliseconds under the profiler":
        return 1e-6 * total, ""
    return (total / 100 if row.figure == "hits in the level-2 cache" else total), ""


def _number(figure: str, value: float | None) -> str:
    if value is None:
        return "-"
    if figure in (SHARE, "issue slots used", "hits in the level-2 cache"):
        return f"{100 * value:.1f} %"
    return f"{value:.3g}"


def verdict(row: Row) -> str:
    """Tells whether the goal is met, and by how much the model was off."""
    if row.measured is None:
        return row.remark
    told = [row.remark]
    if row.goal is not None:
        few = row.figure == "instructions per element"
        told.append("met" if (row.measured <= row.goal if few else row.measured >= row.goal) else "NOT MET")
    if row.model:
        told.append(f"measured / model {row.measured / row.model:.2f}")
    found = None if row.detail else row.prediction
    if row.figure == SHARE and found is not None:
        told.append(f"model's limit: {found.limiter}")
    return "; ".join(filter(None, told))


def table(found: list[Row], judged: bool = True) -> list[str]:
    """The lines of all figures: measured, model, goal. ``judged``: they are of a device, and a goal is met or not."""
    header = ("figure", "kernel", "backend", "shape", "measured", "model", "goal", "")
    lines = [
        (
            row.figure,
            row.kernel + (f", {row.detail}" if row.detail else ""),
            row.backend,
            "x".join(map(str, row.shape)),
            NOT_REACHED if row.measured is None else _number(row.figure, row.measured),
            _number(row.figure, row.model),
            _number(row.figure, row.goal),
            verdict(row) if judged else row.remark,
        )
        for row in found
    ]
    widths = [max(len(line[k]) for line in (header, *lines)) for k in range(len(header) - 1)]
    texts = [
        "  ".join([*(x.ljust(w) for x, w in zip(line, widths, strict=False)), line[-1]]).rstrip()
        for line in (header, *lines)
    ]
    return [f"model: {predictions.LABEL}", *texts]
