"""The report of a run of the fused head on a CPU: a table per case, figures to reach per shape, JSON."""

from collections.abc import Sequence

from benchmarks.cases.case import EAGER, OURS, Case
from benchmarks.cases.linear import gradient_bytes
from benchmarks.cases.linear_cpu import HALF, TRL, floor
from benchmarks.report.cpu import errors, figures, megabytes, ratio, show_case, times
from benchmarks.report.target import Target
from benchmarks.timing.contender import Contender
from rlkernels.cli import tables

TOKENS, HIDDEN, VOCABULARIES = (512, 2048), 512, (32000, 128256)
"""The shapes for which the figures to reach are stated; both dtypes."""
QUANTITIES = ("loss", "logp", "entropy", "dhidden", "dweight")
HEADER = ["", "median ms", "quartiles", "x ours", "x products", "GFLOP/s", "extra MB", "beyond gradients"]
HEADER += [f"{q} err" for q in QUANTITIES]
LEGEND = """
x products: over the bare products of the operands' dtype that the work cannot avoid; GFLOP/s counts those and nothing
else. extra MB: peak beside the inputs (torch's allocator or the resident set, the larger); beyond gradients: less two
gradients in fp32. Errors against float64: of the loss, of all log-probabilities and entropies the largest, of gradients
relative (Frobenius) on sampled rows of each."""


def stated(case: Case) -> bool:
    tokens, hidden, vocab = case.shape
    return tokens in TOKENS and hidden == HIDDEN and vocab in VOCABULARIES and case.dtype in ("fp32", "bf16")


def beyond_gradients(case: Case, c: Contender) -> int | None:
    """Peak bytes beside inputs and gradients; the gradients as ours are summed, in fp32."""
    return None if c.extra_bytes is None else max(0, c.extra_bytes - gradient_bytes(case.shape))


def row(case: Case, c: Contender) -> list[str]:
    bare = case.named(floor(case.products)).median
    speeds = f"{c.median / bare:.2f}", f"{case.flops / c.median / 1e9:.0f}"
    sizes = megabytes(c.extra_bytes), megabytes(beyond_gradients(case, c))
    return [*times(case, c), *speeds, *sizes, *errors(c, QUANTITIES)]


def targets(case: Case, budget: int) -> list[Target]:
    """Figures to reach of ``linear_policy_loss`` on one shape; empty for another case."""
    if case.kind != "linear_policy_loss":
        return []
    peak = beyond_gradients(case, case.named(OURS))
    share = None if peak is None else peak / budget
    return [
        Target("time over three bare products", ratio(case, OURS, floor(3)), 1.25, False),
        Target("times faster than torch eager", ratio(case, EAGER, OURS), 1.3, True),
        Target(f"times faster than {TRL}", ratio(case, TRL, OURS), 2.4, True),
        Target("peak beside inputs and gradients, over the budget of logits", share, 1.05, False),
        Target("time with half of the tokens masked, over that of all", ratio(case, HALF, OURS), 0.6, False),
    ]


def cell(case: Case, goal: Target) -> str:
    verdict = goal.verdict(stated(case))
    return verdict if goal.value is None else f"{goal.number} {verdict}"


def show(cases: Sequence[Case], budget: int, plain: bool) -> None:
    """Prints a table per case, then the figures to reach, a line per figure."""
    for case in cases:
        show_case(case, HEADER, [row(case, c) for c in case.contenders], plain)
    print(LEGEND)
    judged = [(case, goals) for case in cases if (goals := targets(case, budget))]
    if judged:
        texts = [f"{goal.text} {goal.limit}" for goal in judged[0][1]]
        columns = [[cell(case, goal) for goal in goals] for case, goals in judged]
        header = ["linear_policy_loss", *(f"{case.dtype} {list(case.shape)}" for case, _ in judged)]
        rows = [list(cells) for cells in zip(texts, *columns, strict=True)]
        tables.show(f"Figures to reach; budget of logits {budget / 2**20:.0f} MiB", header, rows, plain=plain)


def record(cases: Sequence[Case], budget: int) -> dict[str, object]:
    """The figures as plain data."""

    def entry(case: Case, c: Contender) -> dict[str, object]:
        speed = {"ours": c.ours, "flops_per_s": case.flops / c.median}
        return {**figures(c), **speed, "beyond_gradients_bytes": beyond_gradients(case, c)}

    def plain(case: Case) -> dict[str, object]:
        return {
            "name": case.name,
            "kind": case.kind,
            "dtype": case.dtype,
            "shape": list(case.shape),
            "products": case.products,
            "operations": case.flops,
            "gradient_bytes": gradient_bytes(case.shape),
            "contenders": [entry(case, c) for c in case.contenders],
            "targets": [{**goal.record(), "shape_of_the_statement": stated(case)} for goal in targets(case, budget)],
        }

    return {"logits_budget_bytes": budget, "cases": [plain(case) for case in cases]}
