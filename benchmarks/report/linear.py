"""The report of a run of the fused head on a CPU: a table per case, figures to reach per shape, JSON."""

from collections.abc import Sequence

from benchmarks.cases import linear_cpu
from benchmarks.cases.case import EAGER, OURS, Case
from benchmarks.cases.linear_cpu import HALF, TRL, gradient_bytes
from benchmarks.report.cpu import Target, megabytes, ratio, without_empty_columns
from benchmarks.timing.contender import Contender
from rlkernels.cli import tables

TOKENS, HIDDEN, VOCABULARIES = (512, 2048), 512, (32000, 128256)
"""The shapes for which the figures to reach are stated; both dtypes."""
QUANTITIES = ("loss", "logp", "entropy", "dhidden", "dweight")
HEADER = [
    "",
    "median ms",
    "quartiles",
    "x ours",
    "x products",
    "GFLOP/s",
    "extra MB",
    "beyond gradients",
    *(f"{q} err" for q in QUANTITIES),
]


def stated(case: Case) -> bool:
    tokens, hidden, vocab = case.shape
    return tokens in TOKENS and hidden == HIDDEN and vocab in VOCABULARIES and case.dtype in ("fp32", "bf16")


def beyond_gradients(case: Case, contender: Contender) -> int | None:
    """Peak bytes beside inputs and gradients; the gradients as ours are summed, in fp32."""
    return None if contender.extra_bytes is None else max(0, contender.extra_bytes - gradient_bytes(case.shape))


def row(case: Case, c: Contender) -> list[str]:
    base, bare = case.named(OURS), case.named(linear_cpu.floor(case.products))
    low, high = c.quartiles
    return [
        c.name,
        f"{1e3 * c.median:.2f}",
        f"{1e3 * low:.2f}-{1e3 * high:.2f}",
        f"{c.median / base.median:.2f}",
        f"{c.median / bare.median:.2f}",
        f"{case.flops / c.median / 1e9:.0f}",
        megabytes(c.extra_bytes),
        megabytes(beyond_gradients(case, c)),
        *(f"{c.errors[q]:.1e}" if q in c.errors else "-" for q in QUANTITIES),
    ]


def targets(case: Case, budget: int) -> list[Target]:
    """Figures to reach of ``linear_policy_loss`` on one shape; empty for another case."""
    if case.kind != "linear_policy_loss":
        return []
    peak = beyond_gradients(case, case.named(OURS))
    return [
        Target("time over three bare products", ratio(case, OURS, linear_cpu.floor(3)), 1.25, False),
        Target("times faster than torch eager", ratio(case, EAGER, OURS), 1.3, True),
        Target(f"times faster than {TRL}", ratio(case, TRL, OURS), 2.4, True),
        Target(
            "peak beside inputs and gradients, over the budget of logits",
            None if peak is None else peak / budget,
            1.05,
            False,
        ),
        Target("time with half of the tokens masked, over that of all", ratio(case, HALF, OURS), 0.6, False),
    ]


def cell(case: Case, goal: Target) -> str:
    if goal.met is None:
        return "not measured"
    return f"{goal.value:.3g} {'other shape' if not stated(case) else 'met' if goal.met else 'NOT MET'}"


def show(cases: Sequence[Case], budget: int, plain: bool) -> None:
    """Prints a table per case, then the figures to reach, a line per shape."""
    for case in cases:
        tables.show(case.name, *without_empty_columns(HEADER, [row(case, c) for c in case.contenders]), plain=plain)
    print(
        "\nx products: over the bare products of the operands' dtype that the work cannot avoid; GFLOP/s counts "
        "those and nothing else."
    )
    print(
        "extra MB: peak beside the inputs (torch's allocator or the resident set, the larger); beyond gradients: "
        "less two gradients in fp32."
    )
    print(
        "Errors against float64: of the loss, of all log-probabilities and entropies the largest, of gradients "
        "relative (Frobenius) on"
    )
    print("sampled rows of each.")
    judged = [(case, goals) for case in cases if (goals := targets(case, budget))]
    if judged:
        header = ["linear_policy_loss", *(f"{g.text} {'>=' if g.at_least else '<='} {g.bound:g}" for g in judged[0][1])]
        rows = [[f"{case.dtype} {list(case.shape)}", *(cell(case, g) for g in goals)] for case, goals in judged]
        transposed = [list(column) for column in zip(header, *rows, strict=True)]
        tables.show(
            f"Figures to reach; budget of logits {budget / 2**20:.0f} MiB", transposed[0], transposed[1:], plain=plain
        )


def record(cases: Sequence[Case], budget: int) -> dict[str, object]:
    """The figures as plain data."""

    def entry(case: Case, c: Contender) -> dict[str, object]:
        return {
            "name": c.name,
            "ours": c.ours,
            "median_s": c.median,
            "quartiles_s": list(c.quartiles),
            "samples_s": c.samples,
            "flops_per_s": case.flops / c.median,
            "peak_bytes": c.peak_bytes,
            "resident_bytes": c.resident_bytes,
            "beyond_gradients_bytes": beyond_gradients(case, c),
            "errors": c.errors,
        }

    def goal(case: Case, g: Target) -> dict[str, object]:
        return {
            "text": g.text,
            "bound": g.bound,
            "at_least": g.at_least,
            "value": g.value,
            "met": g.met,
            "shape_of_the_statement": stated(case),
        }

    return {
        "logits_budget_bytes": budget,
        "cases": [
            {
                "name": case.name,
                "kind": case.kind,
                "dtype": case.dtype,
                "shape": list(case.shape),
                "products": case.products,
                "operations": case.flops,
                "gradient_bytes": gradient_bytes(case.shape),
                "contenders": [entry(case, c) for c in case.contenders],
                "targets": [goal(case, g) for g in targets(case, budget)],
            }
            for case in cases
        ],
    }
