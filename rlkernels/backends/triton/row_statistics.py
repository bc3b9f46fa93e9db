"""Device functions over one row of logits: its statistics in one read, its gradient in one read and one write.

A row is walked in tiles of ``LANES`` x 8 columns, full ones without a mask, then one masked tail: a mask inside the
loop turns 128-bit loads into 16-bit ones. Each lane keeps its own running maximum and sums; a lane's columns sit in one
thread, so the loop has no barrier. Lanes meet once, at the end. All sums follow trees of pairs: the bits of a row
depend on ``LANES`` alone, not on warps or on the layout that the compiler gives a dtype. Exponentials are powers of
two, ``exp(x / T) = exp2(x scale)``: one multiplication per column less.
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
def _rescale_kl(cross, total, gap, ref_gap, decay):
    # A cross term of inf (the reference excludes a column that the policy has) must not meet a decay of 0, nor a gap of
    # inf a total of 0. The reference's gap is not held at ``FAR``: where the policy stayed, all of it counts (at T =
    # 0.01 a KL was 41 % too
    # small).
    return tl.where((decay == 0.0) | (total == 0.0), 0.0, decay * (cross + (gap - ref_gap) * total))


@triton.jit
def _add(
    x,
    r,
    v,
    keep,
    vocab,
    scale,
    shift,
    total,
    moment,
    squares,
    plain,
    kept,
    first,
    ref_shift,
    ref_total,
    cross,
    TAIL: tl.constexpr,
    WANTED: tl.constexpr,
    MASKED: tl.constexpr,
    REF: tl.constexpr,
):
    """One tile joins the lanes' sums."""
    top = tl.max(x, 1)
    if IS_TOP1 & WANTED:
        here = tl.min(tl.where(x == top[:, None], v, vocab), 1)
        first = tl.where(top > shift, here, first)
    new = tl.maximum(shift, top)  # may drop a NaN: the sums carry it
    gap, decay = _moved(shift, new, scale)
    centred = (x - new[:, None]) * scale
    e = tl.exp2(centred)
    if REF:
        ref_new = tl.maximum(ref_shift, tl.max(r, 1))
        ref_gap = (ref_shift - ref_new) * scale
        ref_decay = tl.exp2(ref_gap)
        ref_centred = (r - ref_new[:, None]) * scale
        ref_total = ref_decay * ref_total + lane_sum(tl.exp2(ref_centred))
        ref_shift = ref_new
        if KL & WANTED:
            cross = _rescale_kl(cross, total, gap, ref_gap, decay) + lane_sum(
                tl.where(e == 0.0, 0.0, e * (centred - ref_centred))
            )
    if ENTROPY & WANTED:
        moment = decay * (moment + gap * total) + lane_sum(e * tl.maximum(centred, FAR))
    if LOG_SUM_SQ & WANTED:
        squares = decay * decay * squares + lane_sum(e * e)
    if MEAN_LOGITS & WANTED:
        if TAIL or MASKED:
            plain += lane_sum(tl.where(keep, x, 0.0))
        else:
            plain += lane_sum(x)
        if MASKED:
            kept += lane_sum(keep.to(x.dtype))
    total = decay * total + lane_sum(e)
    return new, total, moment, squares, plain, kept, first, ref_shift, ref_total, cross


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
    """Sums of one row: ``(shift, total, moment, squares, plain, kept, first, ref_shift, ref_total, cross)``.

    ``total = sum e``, ``e = exp((x - shift) / T)``; ``moment = sum e (x - shift) / T``; ``squares = sum e^2``;
    ``plain`` sums x over the support, ``kept`` counts it; ``first`` is the first column that holds the maximum;
    ``cross`` sums e times the difference of the two centred logits. ``AHEAD`` tiles are loaded before the first is
    used.
    """
    scale = inv_temperature * LOG2E
    # The lowest finite number, not -inf: no difference is then -inf - -inf, and a row of it alone is still a row.
    lowest = tl.full((LANES,), -3.4028234663852886e38, tl.float32)
    if REAL == tl.float64:
        lowest = tl.full((LANES,), -1.7976931348623157e308, tl.float64)
    shift = lowest
    total = tl.zeros((LANES,), REAL)
    moment = total
    squares = total
    plain = total
    kept = total
    first = tl.zeros((LANES,), tl.int32) + vocab
    ref_shift = lowest
    ref_total = total
    cross = total
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
            shift, total, moment, squares, plain, kept, first, ref_shift, ref_total, cross = _add(
                x,
                r,
                v,
                keep,
                vocab,
                scale,
                shift,
                total,
                moment,
                squares,
                plain,
                kept,
                first,
                ref_shift,
                ref_total,
                cross,
                False,
                WANTED,
                MASKED,
                REF,
            )
    if AHEAD > 1:
        for start in range(group, whole, BLOCK):
            v = columns(start, LANES)
            keep = kept_columns(mask, v, vocab, False, MASKED)
            x = read(row, v, vocab, keep, False, MASKED, EVICT)
            r = x
            if REF:
                r = read(ref, v, vocab, keep, False, MASKED, EVICT)
            shift, total, moment, squares, plain, kept, first, ref_shift, ref_total, cross = _add(
                x,
                r,
                v,
                keep,
                vocab,
                scale,
                shift,
                total,
                moment,
                squares,
                plain,
                kept,
                first,
                ref_shift,
                ref_total,
                cross,
                False,
                WANTED,
                MASKED,
                REF,
            )
    if whole < vocab:
        v = columns(whole, LANES)
        keep = kept_columns(mask, v, vocab, True, MASKED)
        x = read(row, v, vocab, keep, True, MASKED, EVICT)
        r = x
        if REF:
            r = read(ref, v, vocab, keep, True, MASKED, EVICT)
        shift, total, moment, squares, plain, kept, first, ref_shift, ref_total, cross = _add(
            x,
            r,
            v,
            keep,
            vocab,
            scale,
            shift,
            total,
            moment,
            squares,
            plain,
            kept,
            first,
            ref_shift,
            ref_total,
            cross,
            True,
            WANTED,
            MASKED,
            REF,
        )
    return _meet(
        vocab,
        scale,
        shift,
        total,
        moment,
        squares,
        plain,
        kept,
        first,
        ref_shift,
        ref_total,
        cross,
        WANTED,
        MASKED,
        REF,
    )


@triton.jit
def _meet(
    vocab,
    scale,
    shift,
    total,
    moment,
    squares,
    plain,
    kept,
    first,
    ref_shift,
    ref_total,
    cross,
    WANTED: tl.constexpr,
    MASKED: tl.constexpr,
    REF: tl.constexpr,
):
    """The lanes' sums become the row's."""
    top = tl.max(shift, 0)
    gap, decay = _moved(shift, top, scale)
    ref_top = top
    row_ref_total = top
    row_cross = top
    if REF:
        ref_top = tl.max(ref_shift, 0)
        ref_gap = (ref_shift - ref_top) * scale
        ref_decay = tl.exp2(ref_gap)
        row_ref_total = sum_lanes(ref_decay * ref_total)
        row_ref_total = tl.where(row_ref_total == 0.0, float("nan"), row_ref_total)
        if KL & WANTED:
            row_cross = sum_lanes(_rescale_kl(cross, total, gap, ref_gap, decay)) * LN2
    row_moment = top
    if ENTROPY & WANTED:
        row_moment = sum_lanes(decay * (moment + gap * total)) * LN2
    row_squares = top
    if LOG_SUM_SQ & WANTED:
        row_squares = sum_lanes(decay * decay * squares)
    row_plain = top
    row_kept = tl.zeros((), top.dtype) + vocab
    if MEAN_LOGITS & WANTED:
        row_plain = sum_lanes(plain)
        if MASKED:
            row_kept = sum_lanes(kept)
    if IS_TOP1 & WANTED:
        first = tl.where(shift == top, first, vocab)
    row_total = sum_lanes(decay * total)
    row_total = tl.where(row_total == 0.0, float("nan"), row_total)  # no finite logit: NaN, as eager
    return (
        top,
        row_total,
        row_moment,
        row_squares,
        row_plain,
        row_kept,
        tl.min(first, 0),
        ref_top,
        row_ref_total,
        row_cross,
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
