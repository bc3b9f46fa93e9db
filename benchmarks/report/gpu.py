"""The report of a run on an accelerator: faults, goals, tables and the JSON that is rewritten as each case ends."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.cases.case import EAGER, IN_PLACE, Case
from benchmarks.cases.linear import gradient_bytes
from benchmarks.cases.linear_gpu import LONG, NAMES, PRODUCTS
from benchmarks.cases.logits import POLICY, STATS
from benchmarks.cases.logits_gpu import ONE_LAUNCH, TWO
from benchmarks.judge import wrong
from benchmarks.peers import PEERS
from benchmarks.report.target import Target, of_record
from benchmarks.timing.contender import Contender, summary
from benchmarks.timing.gpu import Roofline
from rlkernels.cli import machine, tables

AUTO = "rlkernels auto"
MEASURED = ("first_call_s", "peak_bytes", "host_s", "graph_s")
NUMBERS_DIFFER = dict.fromkeys(("logp", "entropy", "kl", "ref_logp", "loss", "advantage", "return"), 1e-2)
NUMBERS_DIFFER |= {"dhidden": 0.1, "dweight": 0.1}
"""Errors above which a peer is said to compute something else (or in 16 bits)."""


def remark(c: Contender) -> str:
    """The peer's own remark, and whether its numbers are those asked for."""
    differs = [q for q, bound in NUMBERS_DIFFER.items() if not c.errors.get(q, 0.0) <= bound]
    if not c.errors.get("gradient", 0.0) <= 5 * c.errors.get("rounding", 0.0) + 1e-3:
        differs.append("gradient")
    if c.ours or not differs:
        return c.remark
    told = "other numbers: " + ", ".join(f"{q} {c.errors[q]:.1e}" for q in differs)
    return "; ".join(filter(None, (c.remark, told)))


def record(case: Case, roof: Roofline, state: dict[str, str] | None = None) -> dict[str, object]:
    """One case as plain data."""
    floor = case.floor(roof)

    def plain(c: Contender) -> dict[str, object]:
        found = {key: getattr(c, key) for key in ("name", "ours", "failed", "errors", "launches", *MEASURED)}
        found |= {"remark": remark(c), "hot": summary(c.samples), "cold": summary(c.cold)}
        if c.samples:
            found |= {"bytes_per_s": c.bandwidth, "flops_per_s": case.flops / c.median, "of_floor": floor / c.median}
        return found

    return {
        "name": case.name,
        "shape": list(case.shape),
        "passes": case.passes,
        "reads_bytes": case.reads,
        "writes_bytes": case.writes,
        "flops": case.flops,
        "floor_s": floor,
        "buffers": case.buffers,
        "state": state or {},
        "faults": wrong(case, f"{case.name} {list(case.shape)}"),
        "entries": [plain(c) for c in case.contenders],
    }


def sources(commit: str | None) -> dict[str, object]:
    """Commit, dirty flag and digests; ``commit`` names it where the checkout came without its history."""
    found = machine.sources()
    package = Path(machine.__file__).resolve().parents[1]
    found["triton_sha256"] = machine.digest(package / "backends" / "triton")
    found["cuda_sources_sha256"] = (
        machine.digest(package.parent / "csrc" / "cuda") if (package.parent / "csrc" / "cuda").is_dir() else None
    )
    found["cuda_module_sha256"] = next(
        (hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(package.glob("_cuda*.so"))), None
    )
    if commit is not None and found["commit"] is None:
        found["commit"] = commit
    return found


HEADER = ["", "hot ms", "quartiles", "cold ms", "x ours", "GB/s", "% of floor", "peak MiB"]
HEADER += ["launches", "host us", "graph us", "error", "remark"]


def row(entry: dict, base: float | None) -> list[str]:
    """A line of the table from an entry's record."""
    hot, cold = entry["hot"], entry["cold"]
    if entry["failed"] or hot is None:
        return [entry["name"], *["-"] * (len(HEADER) - 2), entry["remark"]]
    shown = {q: e for q, e in entry["errors"].items() if not q.endswith("rounding")}
    ran = entry["launches"]
    return [
        entry["name"],
        f"{1e3 * hot['median_s']:.4g}",
        f"{1e3 * hot['low_s']:.4g}-{1e3 * hot['high_s']:.4g}",
        f"{1e3 * cold['median_s']:.4g}" if cold else "-",
        f"{hot['median_s'] / base:.2f}" if base else "-",
        f"{entry['bytes_per_s'] / 1e9:.0f}",
        f"{100 * entry['of_floor']:.1f}",
        "-" if entry["peak_bytes"] is None else f"{entry['peak_bytes'] / 2**20:.1f}",
        "-" if ran is None else str(sum(ran.values())),
        *("-" if entry[k] is None else f"{1e6 * entry[k]:.1f}" for k in ("host_s", "graph_s")),
        " ".join(f"{q} {e:.1e}" for q, e in shown.items()) or "-",
        entry["remark"],
    ]


def show(found: dict, plain: bool) -> None:
    """The table of a case, from its record; "x ours" divides by the automatic choice."""
    ours = _entry(found, AUTO)
    base = ours["hot"]["median_s"] if ours else None
    title = f"{found['name']} {found['shape']}, floor {1e3 * found['floor_s']:.4g} ms ({found['passes']})"
    tables.show(title, HEADER, [row(e, base) for e in found["entries"]], plain=plain)
    for fault in found["faults"]:
        print(f"WRONG: {fault}")


def _entry(case: dict, name: str) -> dict | None:
    return next((e for e in case["entries"] if e["name"] == name and e["hot"]), None)


Reader = Callable[[dict], float | None]
"""A function of the record of a case; None where it was not measured there."""


def faster_than(name: str) -> Reader:
    """Times that ours is faster than another entry."""

    def read(case: dict) -> float | None:
        ours, theirs = _entry(case, AUTO), _entry(case, name)
        return theirs["hot"]["median_s"] / ours["hot"]["median_s"] if ours and theirs else None

    return read


def of_ours(get: Callable[[dict, dict], float | None], suffix: str = "") -> Reader:
    """Returns what ``get`` says of our entry and its case."""

    def read(case: dict) -> float | None:
        entry = _entry(case, AUTO + suffix)
        return None if entry is None else get(entry, case)

    return read


def launches(entry: dict, case: dict) -> int | None:
    return None if entry["launches"] is None else sum(entry["launches"].values())


def beyond_logits(entry: dict, case: dict) -> float | None:
    return None if entry["peak_bytes"] is None else entry["peak_bytes"] / max(case["reads_bytes"], 1)


def beyond_gradients(entry: dict, case: dict) -> float | None:
    """GiB at the longest batch."""
    if case["shape"][0] < LONG or entry["peak_bytes"] is None:
        return None
    return (entry["peak_bytes"] - gradient_bytes(case["shape"])) / 2**30


def goals(cases: Sequence[dict]) -> list[dict[str, object]]:
    """The figures to reach (bf16, every measured shape): each with the worst value over the shapes, None where nothing
    was measured.
    """
    policy, statistics, three, four = *NAMES[:2], PRODUCTS.format(3), PRODUCTS.format(4)
    share, over_floor = of_ours(lambda e, c: e["of_floor"]), of_ours(lambda e, c: 1 / e["of_floor"])
    one_launch, count = of_ours(lambda e, c: 1 / e["of_floor"], ONE_LAUNCH), of_ours(launches)
    in_place, long = of_ours(beyond_logits, IN_PLACE), of_ours(beyond_gradients)
    loss, eager, peers = "logits_policy_loss", faster_than(EAGER), ("trl_chunked", "liger_chunked", "verl_chunked")
    trl, liger, verl = (PEERS[key].name for key in peers)
    rows: list[tuple[str, str, Reader, float, bool]] = [
        ("token_stats forward, share of read bandwidth", STATS, share, 0.92, True),
        ("token_stats forward, times faster than TRL's kernel", STATS, faster_than("TRL kernel"), 1.2, True),
        ("token_stats forward, times faster than QuACK's CE", STATS, faster_than("QuACK CE"), 1.0, True),
        (f"{loss}, time over the 1R+1W floor", POLICY, over_floor, 1.15, False),
        (f"{loss}, its op with the gradient in the forward, over the floor", POLICY, one_launch, 1.15, False),
        (f"{loss}, times faster than Liger GRPO", POLICY, faster_than("Liger GRPO"), 2.0, True),
        (f"{loss}, times faster than torch eager", POLICY, eager, 8.0, True),
        (f"{loss} in place, memory beyond the logits as a share of them", POLICY, in_place, 0.01, False),
        ("two models forward, time over the 2R floor", TWO, over_floor, 1.15, False),
        ("two models forward, times faster than the torch composition", TWO, eager, 4.0, True),
        ("policy_loss, times faster than torch eager", "policy_loss", eager, 10.0, True),
        ("policy_loss, launches forward+backward", "policy_loss", count, 3, False),
        ("pairwise_reward_loss, launches forward+backward", "pairwise_reward_loss", count, 2, False),
        ("gae [64, 4096], times faster than the trainers' loop", "gae [64, 4096]", eager, 1000.0, True),
        ("gae [8192, 2048], share of bandwidth", "gae [8192, 2048]", share, 0.6, True),
        (f"{policy} forward+backward, share of {three}", policy, faster_than(three), 0.88, True),
        (f"{statistics} forward+backward, share of {four}", statistics, faster_than(four), 0.85, True),
        (f"{policy}, times faster than {trl}", policy, faster_than(trl), 1.4, True),
        (f"{policy}, times faster than {liger}", policy, faster_than(liger), 2.0, True),
        (f"{policy}, times faster than {verl}", policy, faster_than(verl), 2.0, True),
        (f"{policy} at {LONG} tokens, GiB beside inputs and fp32 gradients", policy, long, 1.5, False),
    ]
    found = []
    for text, name, read, bound, at_least in rows:
        mine = [case for case in cases if case["name"] == name or case["name"].startswith(f"{name} [")]
        values = [value for case in mine if (value := read(case)) is not None]
        worst = (min if at_least else max)(values, default=None)
        found.append({**Target(text, worst, bound, at_least).record("worst"), "cases": len(values)})
    return found


def show_goals(found: Sequence[dict], plain: bool) -> None:
    rows = []
    for goal in found:
        target = of_record(goal)
        rows.append([target.text, target.limit, target.number, str(goal["cases"]), target.verdict()])
    header = ["figure", "bound", "worst", "cases", "verdict"]
    tables.show("Figures to reach, the worst of the measured shapes", header, rows, plain=plain)
