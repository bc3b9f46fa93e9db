"""Pictures of a run on an accelerator, drawn from its JSON. Needs matplotlib."""

from pathlib import Path


def _medians(case: dict) -> dict[str, float]:
    return {e["name"]: 1e3 * e["hot"]["median_s"] for e in case["entries"] if e["hot"]}


def lines(data: dict, path: Path, against: str) -> bool:
    """Time against the vocabulary (most rows) or against the rows (largest common vocabulary); False where nothing has
    two points.
    """
    from matplotlib.figure import Figure

    axis, fixed = (1, 0) if against == "vocabulary" else (0, 1)
    panels = []
    for name in dict.fromkeys(c["name"] for c in data["cases"]):
        mine = [c for c in data["cases"] if c["name"] == name and len(c["shape"]) == 2]
        groups: dict[int, list[dict]] = {}
        for c in mine:
            groups.setdefault(c["shape"][fixed], []).append(c)
        held = max((k for k, g in groups.items() if len(g) > 1), default=None)
        if held is not None:
            panels.append((name, held, sorted(groups[held], key=lambda c: c["shape"][axis])))
    if not panels:
        return False
    figure = Figure(figsize=(7, 3.6 * len(panels)), layout="constrained")
    for panel, (name, held, cases) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
        for entry in dict.fromkeys(e for c in cases for e in _medians(c)):
            points = [(c["shape"][axis], _medians(c)[entry]) for c in cases if entry in _medians(c)]
            panel.plot(*zip(*points, strict=True), "o-" if entry.startswith("rlkernels") else "o--", label=entry)
        panel.plot(
            [c["shape"][axis] for c in cases],
            [1e3 * c["floor_s"] for c in cases],
            "k:",
            label=f"floor ({cases[0]['passes']})",
        )
        panel.set(
            xlabel=against,
            ylabel="ms, hot median",
            title=f"{name}, {'rows' if axis else 'vocabulary'} {held}",
            xscale="log",
            yscale="log",
        )
        panel.legend(fontsize=6)
    figure.suptitle(f"{data['device']['name']}, {data['dtype']}")
    _save(figure, path)
    return True


def bars(data: dict, path: Path) -> bool:
    """Share of the floor that each entry reaches, one panel per case at its largest shape; False where no case has a
    time.
    """
    from matplotlib.figure import Figure

    largest: dict[str, dict] = {}
    for c in data["cases"]:
        size = c["reads_bytes"] + c["writes_bytes"]
        if _medians(c) and size >= sum(
            largest.get(c["name"], {"reads_bytes": 0, "writes_bytes": 0})[k] for k in ("reads_bytes", "writes_bytes")
        ):
            largest[c["name"]] = c
    if not largest:
        return False
    counts = [len(_medians(c)) for c in largest.values()]
    figure = Figure(figsize=(9, 1.2 + 0.36 * sum(n + 2 for n in counts)), layout="constrained")
    panels = figure.subplots(len(largest), 1, squeeze=False, height_ratios=[n + 1 for n in counts])[:, 0]
    for panel, c in zip(panels, largest.values(), strict=True):
        shares = {name: 100 * 1e3 * c["floor_s"] / ms for name, ms in _medians(c).items()}
        drawn = panel.barh(
            list(shares),
            list(shares.values()),
            color=["#1f77b4" if n.startswith("rlkernels") else "#b0b0b0" for n in shares],
        )
        panel.bar_label(drawn, [f"{s:.0f} %" for s in shares.values()], padding=4, fontsize=7)
        panel.axvline(100, color="k", linestyle=":")
        panel.set_title(
            f"{c['name']} {c['shape']}, floor {c['passes']} = {1e3 * c['floor_s']:.3g} ms", loc="left", fontsize=9
        )
        panel.tick_params(labelsize=7)
        panel.invert_yaxis()
    panels[-1].set_xlabel("% of the floor measured in the same run")
    figure.suptitle(f"{data['device']['name']}, {data['dtype']}")
    _save(figure, path)
    return True


def _save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def draw(data: dict, folder: Path) -> list[Path]:
    """All pictures that the data allow."""
    wanted = {
        "against_vocabulary.png": lambda p: lines(data, p, "vocabulary"),
        "against_rows.png": lambda p: lines(data, p, "rows"),
        "roofline.png": lambda p: bars(data, p),
    }
    return [folder / name for name, make in wanted.items() if make(folder / name)]
