"""The cost model of docs/scaling.md: ``python benchmarks/scaling/cost_model.py`` prints the tables there.

Computed, not measured.
"""

from typing import NamedTuple

from rlkernels.linear.chunk_plan import PASS_TICKS, TILE_COLUMNS, TILE_ROWS, HeadShape, cost, planned_stretches, waste
from rlkernels.linear.chunking import budget_bytes, rows_within


class Machine(NamedTuple):
    """FLOP/s of a bf16 product and bytes/s of memory as measured on an H200 by others; of the link and a collective's
    start, assumed.
    """

    flops: float = 790e12
    memory: float = 4.3e12
    link: float = 350e9
    latency: float = 20e-6


class Case(NamedTuple):
    """``tokens``: live ones, of all ranks together. ``sharded``: the vocabulary over the ranks, else the tokens."""

    tokens: int
    vocab: int
    hidden: int = 4096
    ranks: int = 8
    sharded: bool = False
    budget: int = 2**30
    numbers: int = 5  # per token and rank in the forward's collective: with entropy

    @property
    def rows(self):
        """Tokens that a rank multiplies."""
        return self.tokens if self.sharded else self.tokens // self.ranks

    @property
    def columns(self):
        return -(-self.vocab // self.ranks) if self.sharded else self.vocab

    @property
    def stretches(self):
        """The plan of the library for an H200, of fp32 logits and their bf16 gradient, 6 bytes, within the budget."""
        limit = rows_within(self.budget, 6 * (self.columns + 16))
        shape = HeadShape(self.vocab, self.hidden, 1 if self.sharded else 132)
        return planned_stretches(self.rows, limit, shape, not self.sharded)

    @property
    def chunks(self):
        return sum(map(len, self.stretches))

    @property
    def largest(self):
        """Rows of the largest chunk and of the longest stretch."""
        return max(map(max, self.stretches)), max(map(sum, self.stretches))


def seconds(case, on):
    """Parts of one forward and backward of ``linear_policy_loss``, in bf16, on each rank."""
    h, v, t, n = case.hidden, case.columns, case.rows, case.ranks
    share = (n - 1) / n
    # Written, read (twice: the ranks meet in between), rounded as the gradient, read by two products.
    row_bytes = (18 if case.sharded else 14) * t * v
    parts = {
        "products": 6 * t * h * v / on.flops,
        "logits": row_bytes / on.memory,
        # A chunk reads the weight; a stretch reads it, too, and reads and writes the fp32 sum of its gradient.
        "weight": (2 * case.chunks + 10 * len(case.stretches)) * h * v / on.memory,
    }
    if case.sharded:
        parts["forward link"] = case.chunks * on.latency + 4 * case.numbers * (n - 1) * t / on.link
        parts["backward link"] = on.latency + 2 * share * 4 * h * t / on.link
    else:
        parts["forward link"] = on.latency + share * 2 * h * v / on.link  # FSDP gathers the head once ...
        parts["backward link"] = on.latency + share * 2 * h * v / on.link  # ... and scatters its gradient
    return parts


def gigabytes(case):
    """Bytes of each rank at the peak: when the gradients are cast to the dtype of what they belong to."""
    h, v, t = case.hidden, case.columns, case.rows
    chunk, stretch = case.largest
    return {
        "weight": 2 * h * v / 1e9,
        "its gradient": (4 + 2) * h * v / 1e9,
        "hidden": 2 * h * t / 1e9,
        "its gradient ": (4 + 2) * h * t / 1e9,
        "budget": (4 * chunk + 2 * stretch) * (v + 16) / 1e9,
    }


PROCESSORS = 132
READS_AT = 0.92
"""The share of the memory's speed at which the kernel over rows is supposed to run."""


def by_tiles(tokens, vocab, hidden, budget, on, rows_at=READS_AT):
    """Returns the plan of one call on one H200, and the share of its time that three products would fill.

    The plan's own count, with its charges for chunks and for stretches, of which the first one reads no sum; then 6
    bytes per logit of the kernel over rows, at the share ``rows_at`` of the memory's speed, and 6 per number of the
    head where its gradient is scaled and rounded. ``budget`` None: the default.
    """
    shape = HeadShape(vocab, hidden, PROCESSORS)
    limit = rows_within(budget_bytes(budget, "cuda", 4 * hidden * vocab), 6 * (vocab + 16))
    stretches = planned_stretches(tokens, limit, shape, True)
    tick = 2 * TILE_ROWS * TILE_COLUMNS * PROCESSORS / on.flops
    rows, rounding = 6 * tokens * vocab / (rows_at * on.memory), 6 * hidden * vocab / on.memory
    ticks = cost(stretches, shape) - PASS_TICKS * shape.waves(vocab, hidden) / 2
    return stretches, 6 * tokens * hidden * vocab / on.flops / (ticks * tick + rows + rounding)


def shares(calls, on, hidden=4096):
    """Markdown: the plan and the predicted share of each ``(tokens, vocab, budget)``."""
    names = "tokens", "V", "budget GiB", "stretches", "chunks", "waste of tiles and waves", "three products, share"
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for tokens, vocab, budget in calls:
        stretches, share = by_tiles(tokens, vocab, hidden, budget, on)
        lost = waste(stretches, HeadShape(vocab, hidden, PROCESSORS))
        given = f"{4 * hidden * vocab / 2**30:.1f}, the default" if budget is None else f"{budget / 2**30:.0f}"
        counts = len(stretches), sum(map(len, stretches))
        lines.append(f"| {tokens:,} | {vocab} | {given} | {counts[0]} | {counts[1]} | {lost:.1%} | {share:.0%} |")
    return "\n".join(lines)


def break_even(vocab, gathers=2, hidden_is_there=True):
    """Tokens per step of all ranks from which on a vocabulary-parallel head sends more than FSDP does for a dense one.

    FSDP: ``gathers`` transfers of ``2 H V`` bytes (the head once or twice, its gradient once). Sharded: ``8 H`` per
    token, the sum of the fp32 gradient of the hidden states, and ``2 H`` where these have to be gathered first.
    """
    return gathers * 2 * vocab / (8 if hidden_is_there else 10)


def table(cases, on):
    """Markdown."""
    names = (
        "tokens",
        "V",
        "head",
        "budget GiB",
        "rows per chunk",
        "per stretch",
        "products ms",
        "logits ms",
        "weight ms",
        "link ms",
        "together ms",
        "memory GB",
        "logits, whole, GB",
    )
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for case in cases:
        parts, memory = seconds(case, on), gigabytes(case)
        link = parts["forward link"] + parts["backward link"]
        low = max(parts["products"], parts["logits"] + parts["weight"])
        high = parts["products"] + parts["logits"] + parts["weight"]
        whole = 6 * case.rows * case.columns / 1e9
        cells = (
            f"{case.tokens:,}",
            case.vocab,
            ("vocabulary over ranks") if case.sharded else ("tokens over ranks"),
            case.budget // 2**30,
            *(f"{rows:,}" for rows in case.largest),
            f"{parts['products'] * 1e3:.1f}",
            f"{parts['logits'] * 1e3:.1f}",
            f"{parts['weight'] * 1e3:.1f}",
            f"{link * 1e3:.1f}",
            f"{(low + link) * 1e3:.0f} to {(high + link) * 1e3:.0f}",
            f"{sum(memory.values()):.1f}",
            f"{whole:.1f}",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


CASES = [
    Case(tokens, vocab, sharded=sharded, budget=budget)
    for tokens in (65536, 2**20)
    for vocab in (128256, 151936)
    for sharded, budget in ((False, 2**30), (False, 2**32), (True, 2**30))
]

CALLS = [(tokens, 151936, budget) for tokens in (4096, 8192, 32768) for budget in (2**30, None)]

if __name__ == "__main__":
    print(shares(CALLS, Machine()), end="\n\n")
    print(table(CASES, Machine()))
