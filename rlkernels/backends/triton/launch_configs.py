"""The division of a row: a table by operation, dtype and vocabulary, not an autotuner.

An autotuner runs a kernel several times, which corrupts one that writes in place, and may pick other bits on another
day. ``override`` replaces entries for experiments. Not measured on hardware yet. Chosen for 16 bytes per thread and
load, for several loads in flight, and for no spills on any target that ``tests/backends/triton_backend/compiled``
compiles for.
"""

from contextlib import contextmanager
from typing import NamedTuple


class Config(NamedTuple):
    """One program: lanes that a row is divided into (they decide the bits of its sums), threads, and tiles loaded
    before the first is used.
    """

    lanes: int
    threads: int
    ahead: int = 1


SMALL, MIDDLE, LARGE = 1024, 32768, 1 << 31
STATISTICS = ((SMALL, Config(128, 128)), (LARGE, Config(512, 256)))
# Half of the columns per thread: twice as much is kept of each.
TWO_MODELS = ((SMALL, Config(128, 128)), (LARGE, Config(512, 512)))
# The second sweep finds in the level-2 cache what the rows in flight have left there: many threads and tiles per row,
# few rows. A loop over rows inside the program would fix their number, but cost registers (35 became 99, with spills on
# gfx942).
ONE_PASS = ((SMALL, Config(128, 128)), (MIDDLE, Config(512, 512, 2)), (LARGE, Config(512, 512, 4)))
# Fp32: two tiles ahead spill on sm_90 with Triton 3.6.
ONE_PASS_WIDE = ((SMALL, Config(128, 128)), (LARGE, Config(512, 512)))
DOUBLE = ((LARGE, Config(128, 128)),)
TABLE = {
    # (op, bytes per logit): ((largest vocabulary, config), ...). Lanes are the same for every op that sums and for 2
    # and 4 bytes, because a log-probability must have the same bits from all of them. So bf16 logits give the bits of
    # the same values in fp32.
    ("token_stats", 2): STATISTICS,
    ("token_stats", 4): STATISTICS,
    ("token_stats", 8): DOUBLE,
    ("token_stats_ref", 2): STATISTICS,
    ("token_stats_ref", 4): TWO_MODELS,
    ("token_stats_ref", 8): DOUBLE,
    ("token_stats_backward", 2): STATISTICS,
    ("token_stats_backward", 4): STATISTICS,
    ("token_stats_backward", 8): DOUBLE,
    ("token_stats_backward_ref", 2): TWO_MODELS,
    ("token_stats_backward_ref", 4): TWO_MODELS,
    ("token_stats_backward_ref", 8): DOUBLE,
    ("fused_policy", 2): ONE_PASS,
    ("fused_policy", 4): ONE_PASS_WIDE,
    ("fused_policy", 8): DOUBLE,
}
"""``_ref``: with reference logits."""
MASKED = {
    # With a mask of columns more is kept per column. The entries of TABLE with four tiles ahead, and those with all
    # outputs at once, would spill on sm_120 or gfx942.
    ("token_stats_ref", 2): ((SMALL, Config(128, 128)), (LARGE, Config(512, 1024))),
    ("fused_policy", 2): ((SMALL, Config(128, 128)), (LARGE, Config(512, 512, 2))),
}
LIKE = {"divergence": "token_stats_ref"}
"""Operations that take the entries of another one, because they keep as much per column."""
BLOCK, SCAN, THREADS = 1024, 512, 128
"""Elements of a program of ``elementwise``, elements of a step of ``gae`` (1024 spill on gfx942), threads of both."""
_overrides = {}


def row_config(op, itemsize, vocab, masked=False):
    """The entry of the table; ``override`` wins."""
    op = LIKE.get(op, op)
    name = op.removesuffix("_ref")
    if name in _overrides:
        return _overrides[name]
    entries = masked and MASKED.get((op, itemsize)) or TABLE[op, itemsize]
    return next(config for largest, config in entries if vocab <= largest)


@contextmanager
def override(**entries):
    """Other configurations inside the context: ``override(token_stats=Config(16, 32))``."""
    before = dict(_overrides)
    _overrides.update(entries)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)
