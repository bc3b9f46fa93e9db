"""The report of a run on an accelerator: faults, goals, tables and the JSON that is rewritten as each case ends."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks.cases import linear_gpu
from benchmarks.cases import logits_gpu as cases_
from benchmarks.cases.case import EAGER, IN_PLACE, Case
from benchmarks.cases.logits_gpu import ONE_LAUNCH
from benchmarks.judge import wrong
from benchmarks.peers import PEERS
from benchmarks.timing.contender import Contender, summary
from benchmarks.timing.gpu import Roofline
from rlkernels.cli import machine, tables

NUMBERS_DIFFER = {
    "logp": 1e-2,
    "entropy": 1e-2,
    "kl": 1e-2,
    "ref_logp": 1e-2,
    "loss": 1e-2,
    "advantage": 1e-2,
    "return": 1e-2,
    "dhidden": 0.1,
    "dweight": 0.1,
}
"""Errors above which a peer is said to compute something else (or in 16 bits)."""


def remark(entry: Contender) -> str:
    """The peer's own remark, and whether its numbers are those asked for."""
    differs = [q for q, bound in NUMBERS_DIFFER.items() if not entry.errors.get(q, 0.0) <= bound]
    if not entry.errors.get("gradient", 0.0) <= 5 * entry.errors.get("rounding", 0.0) + 1e-3:
        differs.append("gradient")
    told = (
        ""
        if entry.ours or not differs
        else "other numbers: " + ", ".join(f"{q} {entry.errors[q]:.1e}" for q in differs)
    )
    return "; ".join(filter(None, (entry.remark, told)))


def record(case: Case, roof: Roofline, state: dict[str, str] | None = None) -> dict[str, object]:
    """One case as plain data."""
    floor = case.floor(roof)

    def plain(e: Contender) -> dict[str, object]:
        found = {
            "name": e.name,
            "ours": e.ours,
            "failed": e.failed,
            "remark": remark(e),
            "first_call_s": e.first_call_s,
            "hot": summary(e.samples),
            "cold": summary(e.cold),
            "errors": e.errors,
            "peak_bytes": e.peak_bytes,
            "launches": e.launches,
            "host_s": e.host_s,
            "graph_s": e.graph_s,
        }
        if e.samples:
            found.update(
                bytes_per_s=(case.reads + case.writes) / e.median,
                flops_per_s=case.flops / e.median,
                of_floor=floor / e.median,
            )
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


def save(path: Path, data: dict[str, object]) -> None:
    """Whole or not at all: an interrupted run keeps the file of the case before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(part, path)


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


HEADER = [
    "",
    "hot ms",
    "quartiles",
    "cold ms",
    "x ours",
    "GB/s",
    "% of floor",
    "peak MiB",
    "launches",
    "host us",
    "graph us",
    "error",
    "remark",
]


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


def base_of(found: dict) -> float | None:
    """The time that "x ours" divides by: the automatic choice."""
    return next((e["hot"]["median_s"] for e in found["entries"] if e["name"] == "rlkernels auto" and e["hot"]), None)


def show(found: dict, plain: bool) -> None:
    """The table of a case, from its record."""
    base, floor = base_of(found), found["floor_s"]
    title = f"{found['name']} {found['shape']}, floor {1e3 * floor:.4g} ms ({found['passes']})"
    tables.show(title, HEADER, [row(e, base) for e in found["entries"]], plain=plain)
    for fault in found["faults"]:
        print(f"WRONG: {fault}")


def _find(cases: Sequence[dict], name: str, tokens: int | None = None) -> list[dict]:
    return [c for c in cases if c["name"] == name and (tokens is None or c["shape"][0] == tokens)]


def _entry(case: dict, name: str) -> dict | None:
    return next((e for e in case["entries"] if e["name"] == name and e["hot"]), None)


def _ratio(case: dict, over: str, under: str = "rlkernels auto") -> float | None:
    top, bottom = _entry(case, over), _entry(case, under)
    return top["hot"]["median_s"] / bottom["hot"]["median_s"] if top and bottom else None


def goals(cases: Sequence[dict]) -> list[dict[str, object]]:
    """The figures to reach (bf16, every measured shape): each with the worst value over the shapes, None where nothing
    was measured.
    """

    def of_floor(name: str, suffix: str = "") -> list[float]:
        return [1 / e["of_floor"] for c in _find(cases, name) if (e := _entry(c, "rlkernels auto" + suffix))]

    def ratios(name: str, over: str) -> list[float]:
        return [r for c in _find(cases, name) if (r := _ratio(c, over)) is not None]

    def prefixed(prefix: str, get) -> list[float]:
        return [v for c in cases if c["name"].startswith(prefix) and (v := get(c)) is not None]

    def launches(c: dict) -> int | None:
        e = _entry(c, "rlkernels auto")
        return None if e is None or e["launches"] is None else sum(e["launches"].values())

    def extra(c: dict) -> float | None:
        e = _entry(c, "rlkernels auto" + IN_PLACE)
        return None if e is None or e["peak_bytes"] is None else e["peak_bytes"] / max(c["reads_bytes"], 1)

    def time_of_floor(c: dict) -> float | None:
        e = _entry(c, "rlkernels auto")
        return None if e is None else e["of_floor"]

    def beside_gradients(c: dict) -> float | None:
        e, (tokens, hidden, vocab) = _entry(c, "rlkernels auto"), c["shape"]
        if tokens < linear_gpu.LONG or e is None or e["peak_bytes"] is None:
            return None
        return (e["peak_bytes"] - 4 * hidden * (tokens + vocab)) / 2**30

    policy, three, four = "linear_policy_loss", *(linear_gpu.PRODUCTS.format(n) for n in (3, 4))
    rows = [
        ("token_stats forward, share of read bandwidth", [1 / v for v in of_floor(cases_.STATS)], 0.92, True),
        ("token_stats forward, times faster than TRL's kernel", ratios(cases_.STATS, "TRL kernel"), 1.2, True),
        ("token_stats forward, times faster than QuACK's CE", ratios(cases_.STATS, "QuACK CE"), 1.0, True),
        ("logits_policy_loss, time over the 1R+1W floor", of_floor(cases_.POLICY), 1.15, False),
        (
            "logits_policy_loss, its op with the gradient in the forward, over the floor",
            of_floor(cases_.POLICY, ONE_LAUNCH),
            1.15,
            False,
        ),
        ("logits_policy_loss, times faster than Liger GRPO", ratios(cases_.POLICY, "Liger GRPO"), 2.0, True),
        ("logits_policy_loss, times faster than torch eager", ratios(cases_.POLICY, EAGER), 8.0, True),
        (
            "logits_policy_loss in place, memory beyond the logits as a share of them",
            [v for c in _find(cases, cases_.POLICY) if (v := extra(c)) is not None],
            0.01,
            False,
        ),
        ("two models forward, time over the 2R floor", of_floor(cases_.TWO), 1.15, False),
        ("two models forward, times faster than the torch composition", ratios(cases_.TWO, EAGER), 4.0, True),
        ("policy_loss, times faster than torch eager", prefixed("policy_loss", lambda c: _ratio(c, EAGER)), 10.0, True),
        ("policy_loss, launches forward+backward", prefixed("policy_loss", launches), 3, False),
        ("pairwise_reward_loss, launches forward+backward", prefixed("pairwise", launches), 2, False),
        (
            "gae [64, 4096], times faster than the trainers' loop",
            prefixed("gae [64, 4096]", lambda c: _ratio(c, EAGER)),
            1000.0,
            True,
        ),
        ("gae [8192, 2048], share of bandwidth", prefixed("gae [8192, 2048]", time_of_floor), 0.6, True),
        (f"{policy} forward+backward, share of {three}", prefixed(policy, lambda c: _ratio(c, three)), 0.88, True),
        (
            f"linear_token_stats forward+backward, share of {four}",
            prefixed("linear_token_stats", lambda c: _ratio(c, four)),
            0.85,
            True,
        ),
        *(
            (
                f"{policy}, times faster than {PEERS[key].name}",
                prefixed(policy, lambda c, key=key: _ratio(c, PEERS[key].name)),
                bound,
                True,
            )
            for key, bound in (("trl_chunked", 1.4), ("liger_chunked", 2.0), ("verl_chunked", 2.0))
        ),
        (
            f"{policy} at {linear_gpu.LONG} tokens, GiB beside inputs and fp32 gradients",
            prefixed(policy, beside_gradients),
            1.5,
            False,
        ),
    ]
    found = []
    for text, values, bound, at_least in rows:
        value = (min(values) if at_least else max(values)) if values else None
        met = None if value is None else value >= bound if at_least else value <= bound
        found.append(
            {"text": text, "bound": bound, "at_least": at_least, "worst": value, "cases": len(values), "met": met}
        )
    return found


def show_goals(found: Sequence[dict], plain: bool) -> None:
    rows = []
    for g in found:
        verdict = "not measured" if g["met"] is None else "met" if g["met"] else "NOT MET"
        worst = "-" if g["worst"] is None else f"{g['worst']:.3g}"
        rows.append([g["text"], f"{'>=' if g['at_least'] else '<='} {g['bound']:g}", worst, str(g["cases"]), verdict])
    tables.show(
        "Figures to reach, the worst of the measured shapes",
        ["figure", "bound", "worst", "cases", "verdict"],
        rows,
        plain=plain,
    )
