"""The fused head: its plan, and the share of its time that bare products would fill, with the kernels over rows at the
speed that the model of those predicts.
"""

from collections.abc import Mapping

from benchmarks.gpu_model.predictions import HEADS, Prediction
from benchmarks.scaling import cost_model
from rlkernels.linear.chunk_plan import (
    CHUNK_TICKS,
    ROWS_PER_BYTE,
    TILE_COLUMNS,
    TILE_ROWS,
    HeadShape,
    planned_stretches,
)
from rlkernels.linear.chunking import budget_bytes, rows_within

TOKENS = 4096, 8192, 32768
HIDDEN, VOCAB = 4096, 151936
GOALS = {("linear_policy_loss", 4096): 0.88, ("linear_policy_loss", 8192): 0.90, ("linear_policy_loss", 32768): 0.90}
STATISTICS_GOAL = 0.88
MOST_EXTRA_GIB = 1.5
"""The memory beside operands and gradients that a call may take with ``logits_budget=2**30``."""


def statistics_seconds(tokens: int, limit: int, shape: HeadShape, on: cost_model.Machine, reads_at: float) -> float:
    """The forward of ``linear_token_stats``: a product and a read of the logits per chunk."""
    ticks = 0.0
    for (rows,) in planned_stretches(tokens, limit, shape, False):
        least = shape.filled_ticks(2 * ROWS_PER_BYTE)
        ticks += max(shape.waves(rows, shape.vocab) * shape.hidden, least) + CHUNK_TICKS
    tick = 2 * TILE_ROWS * TILE_COLUMNS * shape.multiprocessors / on.flops
    return ticks * tick + 4 * tokens * shape.vocab / (reads_at * on.memory)


def predict(rows: Mapping[str, Prediction], backend: str) -> list[Prediction]:
    """The predictions of every call and number of tokens; ``rows``: those of the kernels over rows of the head's
    vocabulary, by name.
    """
    found = []
    for call in HEADS:
        for tokens in TOKENS:
            budget = 2**30 if "GiB" in call else None
            statistics = call.startswith("linear_token_stats")
            low, plan, gib = _one(rows, tokens, budget, statistics, False)
            high, _, _ = _one(rows, tokens, budget, statistics, True)
            goal = STATISTICS_GOAL if statistics else GOALS["linear_policy_loss", tokens]
            found.append(
                Prediction(
                    call,
                    backend,
                    "bf16",
                    (tokens, HIDDEN, VOCAB),
                    None,
                    None,
                    None,
                    None,
                    share_of_roof=round(low, 3),
                    limiter="products, the kernels over rows, sums of the weight's gradient",
                    goal=goal,
                    plan=plan,
                    extra_gib=round(gib, 2),
                    share_at_best=round(high, 3),
                )
            )
    return found


def _one(
    rows: Mapping[str, Prediction], tokens: int, budget: int | None, statistics: bool, best: bool
) -> tuple[float, str, float]:
    """The share, the plan in words, and GiB of logits and of their gradient."""
    on, shape = cost_model.Machine(), HeadShape(VOCAB, HIDDEN, cost_model.PROCESSORS)
    at = {name: (p.share_at_best if best else p.share_of_roof) or p.share_of_roof for name, p in rows.items()}
    writes = at["token_stats_backward" if statistics else "fused_policy"]
    stretches, share = cost_model.by_tiles(tokens, VOCAB, HIDDEN, budget, on, writes)
    if statistics:
        limit = rows_within(budget_bytes(budget, "cuda", 4 * HIDDEN * VOCAB), 6 * (VOCAB + 16))
        product = 2 * tokens * HIDDEN * VOCAB / on.flops
        forward = statistics_seconds(tokens, limit, shape, on, at["token_stats"])
        share = 4 * product / (3 * product / share + forward)
    chunks = sum(map(len, stretches))
    gib = max((4 * max(s) + 2 * sum(s)) * (VOCAB + 16) / 2**30 for s in stretches)
    return (
        share,
        f"{len(stretches)} x {max(map(sum, stretches))} rows, {chunks} chunks of {max(map(max, stretches))}",
        gib,
    )
