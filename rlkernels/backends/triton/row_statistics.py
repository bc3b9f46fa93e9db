"""Device functions over one row of logits: the statistics of the row in one read.

The statistics under one name each, as in ``csrc/arguments.h``. Columns outside the support count nowhere, and T is the
temperature.

* ``row_max``: the largest logit x. Everything is measured from it, because exp(x / T) alone would overflow.
* ``sum_exp``: the sum of e = exp(z), with the centred logit z = (x - row_max) / T.
* ``weighted_sum``: the sum of e z. entropy = log sum_exp - weighted_sum / sum_exp.
* ``square_sum``: the sum of e^2. log_sum_sq = log square_sum - 2 log sum_exp.
* ``logit_sum``, ``count``: the sum of x and the number of columns. mean_logits = logit_sum / count / T.
* ``first_max``: the first column that holds ``row_max``. is_top1 = (first_max is the target).
* ``ref_row_max``, ``ref_sum_exp``: ``row_max`` and ``sum_exp`` of the row of the reference.
* ``cross_sum``: the sum of e (z - ref_z). kl = cross_sum / sum_exp - log sum_exp + log ref_sum_exp.

A row is walked in tiles of ``LANES`` x 8 columns. Full tiles have no mask, because a mask inside the loop turns 128-bit
loads into 16-bit ones. One masked tail follows. Each lane keeps its own running maximum and sums. The loop has no
barrier, because a lane's columns sit in one thread. Lanes meet once, at the end. All sums follow trees of pairs, so
that the bits of a row depend on ``LANES`` alone, not on warps or on the layout that the compiler gives a dtype. Lanes
hold z in units of log 2, because ``exp(x / T) = exp2(x scale)`` is one multiplication per column less.
"""

import triton
import triton.language as tl

ENTROPY = tl.constexpr(1)
LOG_SUM_SQ = tl.constexpr(2)
MEAN_LOGITS = tl.constexpr(4)
IS_TOP1 = tl.constexpr(8)
KL = tl.constexpr(16)
PER = tl.constexpr(8)  # columns of a lane in a tile: 16 bytes of bf16
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FAR = tl.constexpr(-2000.0)  # exp2 is 0 from here on, in fp64 too; stands in for -inf where 0 * -inf would be NaN


@triton.jit
def place(base, row, outer, inner, level, ALIGN: tl.constexpr):
    """Address of a row of ``[B, level, V]``: 64-bit, since T V passes 2^31 at 14k tokens of a 152k vocabulary.

    Strides in units of ``ALIGN``.
    """
    return base + (row // level) * outer * ALIGN + (row % level) * inner * ALIGN


@triton.jit
def widen(x):
    """The arithmetic's dtype: fp64 stays, everything else is fp32."""
    if x.dtype != tl.float64:
        x = x.to(tl.float32)
    return x


@triton.jit
def columns(start, LANES: tl.constexpr):
    """Column numbers of the tile at ``start``."""
    return start + (tl.arange(0, LANES) * PER)[:, None] + tl.arange(0, PER)[None, :]


@triton.jit
def kept_columns(mask, v, vocab, TAIL: tl.constexpr, MASKED: tl.constexpr):
    """The columns of a tile that are in the support; True where there is neither tail nor mask."""
    keep = v >= 0
    if TAIL:
        keep = v < vocab
    if MASKED:
        if TAIL:
            keep = tl.load(mask + v, v < vocab, other=0) != 0
        else:
            keep = tl.load(mask + v) != 0
    return keep


@triton.jit
def read(row, v, vocab, keep, TAIL: tl.constexpr, MASKED: tl.constexpr, EVICT: tl.constexpr):
    """Columns in fp32; -inf past the end and outside the support."""
    if TAIL:
        x = widen(tl.load(row + v, v < vocab, other=-float("inf"), eviction_policy=EVICT))
    else:
        x = widen(tl.load(row + v, eviction_policy=EVICT))
    if MASKED:
        x = tl.where(keep, x, -float("inf"))
    return x


@triton.jit
def lane_sum(x):
    """Sum of each lane's 8 columns by a tree of neighbours: fp32 tiles hold a lane in two threads, bf16
    tiles in one.
    """
    x = tl.sum(tl.reshape(x, (x.shape[0], 4, 2)), 2)
    x = tl.sum(tl.reshape(x, (x.shape[0], 2, 2)), 2)
    return tl.sum(x, 1)


@triton.jit
def sum_lanes(x):
    """Sum over lanes by a tree of halves: the same additions for any number of warps."""
    for _ in tl.static_range(16):
        if x.shape[0] > 1:
            x = tl.sum(tl.reshape(x, (2, x.shape[0] // 2)), 0)
    return tl.sum(x, 0)


@triton.jit
def _moved(old, new, scale):
    """``(old - new) / T`` in powers of two, not below ``FAR``, and the factor of sums that are measured from
    ``old``.
    """
    gap = (old - new) * scale
    return tl.maximum(gap, FAR), tl.exp2(gap)


@triton.jit
def _rescale_kl(cross_sum, sum_exp, gap, ref_gap, decay):
    # A cross term is inf where the reference excludes a column that the policy has. It must not meet a decay of 0,
    # and a gap of inf must not meet a sum of 0. The reference's gap is not held at ``FAR``, because all of it counts
    # where the policy stayed (at T = 0.01 a KL was 41 % too small).
    return tl.where((decay == 0.0) | (sum_exp == 0.0), 0.0, decay * (cross_sum + (gap - ref_gap) * sum_exp))


@triton.jit
def _add(
    x, r, v, keep, vocab, scale, sums, TAIL: tl.constexpr, WANTED: tl.constexpr, MASKED: tl.constexpr, REF: tl.constexpr
):
    """The lanes' sums after one more tile. ``sums``: in the order of ``row_stats``."""
    row_max, sum_exp, weighted_sum, square_sum, logit_sum, count, first_max, ref_row_max, ref_sum_exp, cross_sum = sums
    tile_max = tl.max(x, 1)
    if IS_TOP1 & WANTED:
        here = tl.min(tl.where(x == tile_max[:, None], v, vocab), 1)
        first_max = tl.where(tile_max > row_max, here, first_max)
    new_max = tl.maximum(row_max, tile_max)  # may drop a NaN: the sums carry it
    gap, decay = _moved(row_max, new_max, scale)
    centred = (x - new_max[:, None]) * scale
    e = tl.exp2(centred)
    if REF:
        ref_new_max = tl.maximum(ref_row_max, tl.max(r, 1))
        ref_gap = (ref_row_max - ref_new_max) * scale
        ref_decay = tl.exp2(ref_gap)
        ref_centred = (r - ref_new_max[:, None]) * scale
        ref_sum_exp = ref_decay * ref_sum_exp + lane_sum(tl.exp2(ref_centred))
        ref_row_max = ref_new_max
        if KL & WANTED:
            cross_sum = _rescale_kl(cross_sum, sum_exp, gap, ref_gap, decay) + lane_sum(
                tl.where(e == 0.0, 0.0, e * (centred - ref_centred))
            )
    if ENTROPY & WANTED:
        weighted_sum = decay * (weighted_sum + gap * sum_exp) + lane_sum(e * tl.maximum(centred, FAR))
    if LOG_SUM_SQ & WANTED:
        square_sum = decay * decay * square_sum + lane_sum(e * e)
    if MEAN_LOGITS & WANTED:
        if TAIL or MASKED:
            logit_sum += lane_sum(tl.where(keep, x, 0.0))
        else:
            logit_sum += lane_sum(x)
        if MASKED:
            count += lane_sum(keep.to(x.dtype))
    sum_exp = decay * sum_exp + lane_sum(e)
    return (
        new_max,
        sum_exp,
        weighted_sum,
        square_sum,
        logit_sum,
        count,
        first_max,
        ref_row_max,
        ref_sum_exp,
        cross_sum,
    )


@triton.jit
def row_stats(
    row,
    ref,
    vocab,
    mask,
    inv_temperature,
    WANTED: tl.constexpr,
    MASKED: tl.constexpr,
    REF: tl.constexpr,
    REAL: tl.constexpr,
    LANES: tl.constexpr,
    AHEAD: tl.constexpr,
    EVICT: tl.constexpr,
):
    """Statistics of one row: ``(row_max, sum_exp, weighted_sum, square_sum, logit_sum, count, first_max, ref_row_max,
    ref_sum_exp, cross_sum)``.

    ``AHEAD`` tiles are loaded before the first of them is used.
    """
    scale = inv_temperature * LOG2E
    # The lowest finite number, not -inf: no difference is then -inf - -inf, and a row of it alone is still a row.
    lowest = tl.full((LANES,), -3.4028234663852886e38, tl.float32)
    if REAL == tl.float64:
        lowest = tl.full((LANES,), -1.7976931348623157e308, tl.float64)
    zero = tl.zeros((LANES,), REAL)
    sums = (lowest, zero, zero, zero, zero, zero, tl.zeros((LANES,), tl.int32) + vocab, lowest, zero, zero)
    BLOCK: tl.constexpr = LANES * PER
    whole = vocab // BLOCK * BLOCK
    group = vocab // (AHEAD * BLOCK) * (AHEAD * BLOCK)
    for start in range(0, group, AHEAD * BLOCK):
        tiles = ()
        for k in tl.static_range(AHEAD):
            v = columns(start + k * BLOCK, LANES)
            keep = kept_columns(mask, v, vocab, False, MASKED)
            x = read(row, v, vocab, keep, False, MASKED, EVICT)
            r = x
            if REF:
                r = read(ref, v, vocab, keep, False, MASKED, EVICT)
            tiles = tiles + ((v, keep, x, r),)
        for k in tl.static_range(AHEAD):
            v, keep, x, r = tiles[k]
            sums = _add(x, r, v, keep, vocab, scale, sums, False, WANTED, MASKED, REF)
    if AHEAD > 1:
        for start in range(group, whole, BLOCK):
            v = columns(start, LANES)
            keep = kept_columns(mask, v, vocab, False, MASKED)
            x = read(row, v, vocab, keep, False, MASKED, EVICT)
            r = x
            if REF:
                r = read(ref, v, vocab, keep, False, MASKED, EVICT)
            sums = _add(x, r, v, keep, vocab, scale, sums, False, WANTED, MASKED, REF)
    if whole < vocab:
        v = columns(whole, LANES)
        keep = kept_columns(mask, v, vocab, True, MASKED)
        x = read(row, v, vocab, keep, True, MASKED, EVICT)
        r = x
        if REF:
            r = read(ref, v, vocab, keep, True, MASKED, EVICT)
        sums = _add(x, r, v, keep, vocab, scale, sums, True, WANTED, MASKED, REF)
    return _meet(vocab, scale, sums, WANTED, MASKED, REF)


@triton.jit
def _meet(vocab, scale, sums, WANTED: tl.constexpr, MASKED: tl.constexpr, REF: tl.constexpr):
    """The row's statistics from its lanes' sums."""
    lane_max, lane_sum_exp, lane_weighted_sum, lane_square_sum, lane_logit_sum, lane_count, lane_first_max = sums[:7]
    lane_ref_max, lane_ref_sum_exp, lane_cross_sum = sums[7:]
    row_max = tl.max(lane_max, 0)
    gap, decay = _moved(lane_max, row_max, scale)
    ref_row_max = row_max
    ref_sum_exp = row_max
    cross_sum = row_max
    if REF:
        ref_row_max = tl.max(lane_ref_max, 0)
        ref_gap = (lane_ref_max - ref_row_max) * scale
        ref_decay = tl.exp2(ref_gap)
        ref_sum_exp = sum_lanes(ref_decay * lane_ref_sum_exp)
        ref_sum_exp = tl.where(ref_sum_exp == 0.0, float("nan"), ref_sum_exp)
        if KL & WANTED:
            cross_sum = sum_lanes(_rescale_kl(lane_cross_sum, lane_sum_exp, gap, ref_gap, decay)) * LN2
    weighted_sum = row_max
    if ENTROPY & WANTED:
        weighted_sum = sum_lanes(decay * (lane_weighted_sum + gap * lane_sum_exp)) * LN2
    square_sum = row_max
    if LOG_SUM_SQ & WANTED:
        square_sum = sum_lanes(decay * decay * lane_square_sum)
    logit_sum = row_max
    count = tl.zeros((), row_max.dtype) + vocab
    if MEAN_LOGITS & WANTED:
        logit_sum = sum_lanes(lane_logit_sum)
        if MASKED:
            count = sum_lanes(lane_count)
    if IS_TOP1 & WANTED:
        lane_first_max = tl.where(lane_max == row_max, lane_first_max, vocab)
    sum_exp = sum_lanes(decay * lane_sum_exp)
    sum_exp = tl.where(sum_exp == 0.0, float("nan"), sum_exp)  # no finite logit: NaN, as eager
    first_max = tl.min(lane_first_max, 0)
    return (
        row_max,
        sum_exp,
        weighted_sum,
        square_sum,
        logit_sum,
        count,
        first_max,
        ref_row_max,
        ref_sum_exp,
        cross_sum,
    )


@triton.jit
def target_logit(row, target, start, stop, mask, MASKED: tl.constexpr):
    """The target's logit: NaN outside columns ``[start, stop)``, -inf outside the mask; never a neighbour's."""
    inside = (target >= start) & (target < stop)
    x = widen(tl.load(row + target, inside, other=float("nan")))
    if MASKED:
        keep = tl.load(mask + target, inside, other=1)
        x = tl.where(keep != 0, x, -float("inf"))
    return x
