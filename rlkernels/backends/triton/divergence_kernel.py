"""The divergence of a student's rows from a teacher's, and the gradient of the student's logits: one program per row.

Both rows are read once from memory. The later sweeps find them in the level-2 cache, as those of ``fused_policy`` do.
"""

from typing import get_args

import triton
import triton.language as tl

from rlkernels.backends import gate
from rlkernels.backends.protocol import DivergenceRows
from rlkernels.backends.triton.launch import GRADIENTS, _Launch, _per_row, device_of
from rlkernels.backends.triton.row_gradient import row_zero
from rlkernels.backends.triton.row_kernels import UNSPECIALISED, _inverse_temperature
from rlkernels.backends.triton.row_statistics import (
    ENTROPY,
    FAR,
    KL,
    LN2,
    LOG2E,
    PER,
    columns,
    kept_columns,
    lane_sum,
    place,
    read,
    row_stats,
    sum_lanes,
)
from rlkernels.types import DivergenceKind

KINDS = get_args(DivergenceKind)
FORWARD, REVERSE, JSD, CROSS_ENTROPY = (tl.constexpr(k) for k in range(4))


@triton.jit
def _probability(row, v, stop, keep, scale, row_max, sum_exp, TAIL: tl.constexpr, MASKED: tl.constexpr):
    """Returns the probabilities of a tile, and its centred logits in units of log 2, not below ``FAR``."""
    z = (read(row, v, stop, keep, TAIL, MASKED, "evict_last") - row_max) * scale
    return tl.exp2(z) / sum_exp, tl.maximum(z, FAR)


@triton.jit
def _mixed(p, q, z, ref_z, offset, beta):
    """Returns ``log(M / p)`` and ``log(q / M)`` of the mixture ``M = (1 - beta) p + beta q``; the first is 0 where p =
    q.

    Where p is next to nothing, M is ``beta q``, and no term with p counts, because the division would overflow.
    """
    nothing = p < 1e-30
    u = tl.log(1.0 + beta * (q / tl.where(nothing, 1.0, p) - 1.0))
    gap = (ref_z - z) * LN2 + offset
    return tl.where(nothing, 0.0, u), tl.where(nothing, -tl.log(beta), gap - u)


@triton.jit
def _add_mixture(
    row,
    ref,
    v,
    vocab,
    mask,
    scale,
    row_max,
    sum_exp,
    ref_row_max,
    ref_sum_exp,
    offset,
    beta,
    own,
    others,
    TAIL: tl.constexpr,
    MASKED: tl.constexpr,
):
    keep = kept_columns(mask, v, vocab, TAIL, MASKED)
    p, z = _probability(row, v, vocab, keep, scale, row_max, sum_exp, TAIL, MASKED)
    q, ref_z = _probability(ref, v, vocab, keep, scale, ref_row_max, ref_sum_exp, TAIL, MASKED)
    u, ratio = _mixed(p, q, z, ref_z, offset, beta)
    return own - lane_sum(p * u), others + lane_sum(q * ratio)


@triton.jit
def _store(
    row,
    ref,
    out,
    v,
    vocab,
    mask,
    scale,
    row_max,
    sum_exp,
    ref_row_max,
    ref_sum_exp,
    offset,
    beta,
    own,
    factor,
    KIND: tl.constexpr,
    TAIL: tl.constexpr,
    MASKED: tl.constexpr,
):
    keep = kept_columns(mask, v, vocab, TAIL, MASKED)
    p, z = _probability(row, v, vocab, keep, scale, row_max, sum_exp, TAIL, MASKED)
    if KIND == REVERSE:
        # Not held at FAR, because the divergence is infinite where the teacher alone excludes a column.
        ref_z = (read(ref, v, vocab, keep, TAIL, MASKED, "evict_first") - ref_row_max) * scale
        grad = tl.where(p == 0.0, 0.0, p * ((z - ref_z) * LN2 - offset - own))
    else:
        q, ref_z = _probability(ref, v, vocab, keep, scale, ref_row_max, ref_sum_exp, TAIL, MASKED)
        if KIND == JSD:
            u, ratio = _mixed(p, q, z, ref_z, offset, beta)
            grad = (1.0 - beta) * p * (-u - own)
        else:
            grad = p - q
    grad = grad * factor
    if MASKED:
        grad = tl.where(keep, grad, 0.0)
    grad = grad.to(out.dtype.element_ty)
    if TAIL:
        tl.store(out + v, grad, v < vocab)
    else:
        tl.store(out + v, grad)


@triton.jit(do_not_specialize=[*UNSPECIALISED, "unless_ptr", "guarded"])
def divergence_rows(
    logits_ptr,
    outer: tl.int64,
    inner: tl.int64,
    level,
    ref_ptr,
    ref_outer: tl.int64,
    ref_inner: tl.int64,
    targets_ptr,
    target_stride,
    ignore_index,
    temperature,
    temperature_ptr,
    mask_ptr,
    mask_stride,
    vocab,
    beta_ptr,
    weight_ptr,
    value_ptr,
    out_ptr,
    out_outer: tl.int64,
    out_inner: tl.int64,
    unless_ptr,
    guarded,
    KIND: tl.constexpr,
    WITH_GRAD: tl.constexpr,
    PER_ROW: tl.constexpr,
    MASKED: tl.constexpr,
    REAL: tl.constexpr,
    ALIGN: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    LANES: tl.constexpr,
):
    """Computes one row: the sums of both models, those of the mixture for a JSD, and the gradient; nothing where
    ``unless`` is exactly 1.
    """
    if tl.load(unless_ptr, guarded != 0, other=0.0) == 1.0:
        return
    token = tl.program_id(0).to(tl.int64)
    dead = tl.load(targets_ptr + token * target_stride).to(tl.int64) == ignore_index
    out = place(out_ptr, token, out_outer, out_inner, level, OUT_ALIGN)
    if dead:
        tl.store(value_ptr + token, 0.0)
        if WITH_GRAD:
            row_zero(out, 0, vocab, LANES)
    else:
        row = place(logits_ptr, token, outer, inner, level, ALIGN)
        ref = place(ref_ptr, token, ref_outer, ref_inner, level, ALIGN)
        mask = mask_ptr + token * mask_stride
        inv = _inverse_temperature(temperature, temperature_ptr, token, PER_ROW)
        scale = inv * LOG2E
        beta = tl.load(beta_ptr)
        BLOCK: tl.constexpr = LANES * PER
        whole = vocab // BLOCK * BLOCK
        if (KIND == FORWARD) | (KIND == CROSS_ENTROPY):  # the divergence of the teacher from the student
            sums = row_stats(ref, row, vocab, mask, inv, KL + ENTROPY, MASKED, True, REAL, LANES, 1, "evict_last")
            ref_row_max, ref_sum_exp, weighted_sum = sums[:3]
            row_max, sum_exp, cross_sum = sums[7:]
            offset = tl.log(sum_exp) - tl.log(ref_sum_exp)
            value = cross_sum / ref_sum_exp + offset
            own = value
            if KIND == CROSS_ENTROPY:
                value += tl.log(ref_sum_exp) - weighted_sum / ref_sum_exp
        elif KIND == REVERSE:
            sums = row_stats(row, ref, vocab, mask, inv, KL, MASKED, True, REAL, LANES, 1, "evict_last")
            row_max, sum_exp, weighted_sum = sums[:3]
            ref_row_max, ref_sum_exp, cross_sum = sums[7:]
            offset = tl.log(sum_exp) - tl.log(ref_sum_exp)
            value = cross_sum / sum_exp - offset
            own = value
        else:
            sums = row_stats(row, ref, vocab, mask, inv, 0, MASKED, True, REAL, LANES, 1, "evict_last")
            row_max, sum_exp, weighted_sum = sums[:3]
            ref_row_max, ref_sum_exp, cross_sum = sums[7:]
            offset = tl.log(sum_exp) - tl.log(ref_sum_exp)
            mine = tl.zeros((LANES,), REAL)
            theirs = tl.zeros((LANES,), REAL)
            for start in range(0, whole, BLOCK):
                mine, theirs = _add_mixture(
                    row,
                    ref,
                    columns(start, LANES),
                    vocab,
                    mask,
                    scale,
                    row_max,
                    sum_exp,
                    ref_row_max,
                    ref_sum_exp,
                    offset,
                    beta,
                    mine,
                    theirs,
                    False,
                    MASKED,
                )
            if whole < vocab:
                mine, theirs = _add_mixture(
                    row,
                    ref,
                    columns(whole, LANES),
                    vocab,
                    mask,
                    scale,
                    row_max,
                    sum_exp,
                    ref_row_max,
                    ref_sum_exp,
                    offset,
                    beta,
                    mine,
                    theirs,
                    True,
                    MASKED,
                )
            own = sum_lanes(mine)
            value = beta * sum_lanes(theirs) + (1.0 - beta) * own
        tl.store(value_ptr + token, value)
        if WITH_GRAD:
            weight = tl.load(weight_ptr + token)
            if weight == 0.0:
                row_zero(out, 0, vocab, LANES)
            else:
                for start in range(0, whole, BLOCK):
                    _store(
                        row,
                        ref,
                        out,
                        columns(start, LANES),
                        vocab,
                        mask,
                        scale,
                        row_max,
                        sum_exp,
                        ref_row_max,
                        ref_sum_exp,
                        offset,
                        beta,
                        own,
                        weight * inv,
                        KIND,
                        False,
                        MASKED,
                    )
                if whole < vocab:
                    _store(
                        row,
                        ref,
                        out,
                        columns(whole, LANES),
                        vocab,
                        mask,
                        scale,
                        row_max,
                        sum_exp,
                        ref_row_max,
                        ref_sum_exp,
                        offset,
                        beta,
                        own,
                        weight * inv,
                        KIND,
                        True,
                        MASKED,
                    )


def divergence(rows, kind, beta, weight, out=None, unless=None):
    at = _Launch("divergence", rows)
    logits, value = at.logits, _per_row(at.tokens, at.logits, at.real)
    gradient = logits.new_empty((0, 0))
    if weight is not None:
        (weight,) = at.per_row(("weight",), (weight,))
        gradient = at.gradient(out, GRADIENTS.get(logits.dtype, (logits.dtype,)))
    unless = None if unless is None else gate.taken(at.op, "unless", unless, at.real, (), logits.device)
    if unless is not None and gradient is not out:
        gradient.copy_(out.view(gradient.shape))  # what stays as it is must be there
    if at.tokens:
        (place, ref_place), align = at.places(logits, at.ref)
        (out_place,), out_align = at.places(logits if weight is None else gradient)
        with device_of(logits):
            divergence_rows[(at.tokens,)](
                logits,
                *place,
                at.level,
                at.ref,
                *ref_place,
                *at.labels,
                *at.softmax,
                value.new_full((), beta),  # a tensor, because a kernel's number argument is fp32
                value if weight is None else weight,
                value,
                logits if weight is None else gradient,
                *out_place,
                value if unless is None else unless,
                int(unless is not None),
                KIND=KINDS.index(kind),
                WITH_GRAD=weight is not None,
                ALIGN=align,
                OUT_ALIGN=out_align,
                **at.flags,
            )
    return DivergenceRows(value, gate.stored(gradient, out if weight is not None else None))
