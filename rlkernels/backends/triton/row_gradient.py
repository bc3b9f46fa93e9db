"""Device functions that write one row's gradient, from its logits and saved statistics."""

import triton
import triton.language as tl

from rlkernels.backends.triton.row_statistics import FAR, LN2, LOG2E, PER, columns, kept_columns, read, target_logit


@triton.jit
def row_gradient(
    row,
    ref,
    out,
    target,
    start,
    stop,
    mask,
    inv_temperature,
    row_max,
    sum_exp,
    entropy,
    dlogp,
    dentropy,
    dkl,
    ref_row_max,
    ref_log_sum_exp,
    kl,
    MASKED: tl.constexpr,
    ENTROPY_TERM: tl.constexpr,
    KL_TERM: tl.constexpr,
    LANES: tl.constexpr,
):
    """``dlogits`` of columns ``[start, stop)``: ``dlogp (1[v=y] - p) - dentropy p (log p + H) + dkl p (log p - log q -
    KL)``, over T.

    Away from the target this is ``-e (flat + slope z)`` with ``e = exp2(z) = p sum_exp``. The target's element is
    written last, by itself. The tiles are walked backwards, because in the one-pass kernel the first sweep has left the
    last tiles in the cache.
    """
    scale = inv_temperature * LOG2E
    log_sum_exp = tl.log(sum_exp)
    per_sum = inv_temperature / sum_exp
    flat = dlogp * per_sum
    slope = flat
    if ENTROPY_TERM:
        flat += dentropy * (entropy - log_sum_exp) * per_sum
        slope = dentropy * LN2 * per_sum
    pull = dkl * per_sum
    kl_offset = ref_log_sum_exp - log_sum_exp - kl
    own = (target >= start) & (target < stop)
    at_target = _at_target(
        row,
        ref,
        target,
        start,
        stop,
        mask,
        inv_temperature,
        row_max,
        sum_exp,
        log_sum_exp,
        entropy,
        dlogp,
        dentropy,
        dkl,
        ref_row_max,
        ref_log_sum_exp,
        kl,
        MASKED,
        ENTROPY_TERM,
        KL_TERM,
    )
    tl.debug_barrier()  # in place, every thread has read the target's logit before one overwrites it
    BLOCK: tl.constexpr = LANES * PER
    blocks = tl.cdiv(stop - start, BLOCK)
    for k in range(blocks):
        at = start + (blocks - 1 - k) * BLOCK
        v = columns(at, LANES)
        if at + BLOCK <= stop:
            _store(
                row,
                ref,
                out,
                v,
                stop,
                mask,
                scale,
                inv_temperature,
                row_max,
                flat,
                slope,
                pull,
                kl_offset,
                ref_row_max,
                False,
                MASKED,
                ENTROPY_TERM,
                KL_TERM,
            )
        else:
            _store(
                row,
                ref,
                out,
                v,
                stop,
                mask,
                scale,
                inv_temperature,
                row_max,
                flat,
                slope,
                pull,
                kl_offset,
                ref_row_max,
                True,
                MASKED,
                ENTROPY_TERM,
                KL_TERM,
            )
    tl.debug_barrier()  # two threads write the target's element: the right value comes last
    tl.store(out + target, at_target.to(out.dtype.element_ty), own)


@triton.jit
def _at_target(
    row,
    ref,
    target,
    start,
    stop,
    mask,
    inv_temperature,
    row_max,
    sum_exp,
    log_sum_exp,
    entropy,
    dlogp,
    dentropy,
    dkl,
    ref_row_max,
    ref_log_sum_exp,
    kl,
    MASKED: tl.constexpr,
    ENTROPY_TERM: tl.constexpr,
    KL_TERM: tl.constexpr,
):
    # fp32 until the one rounding of the store: p rounded to bf16 first is 100 % off in the true class at p = 0.9995.
    centred = (target_logit(row, target, start, stop, mask, MASKED) - row_max) * inv_temperature
    p = tl.exp2(centred * LOG2E) / sum_exp
    log_p = tl.maximum(centred, FAR) - log_sum_exp
    grad = dlogp * (1.0 - p)
    if ENTROPY_TERM:
        grad -= dentropy * (p * (log_p + entropy))
    if KL_TERM:
        log_q = (target_logit(ref, target, start, stop, mask, MASKED) - ref_row_max) * inv_temperature - ref_log_sum_exp
        grad += tl.where(p == 0.0, 0.0, dkl * (p * (log_p - log_q - kl)))
    return grad * inv_temperature


@triton.jit
def _store(
    row,
    ref,
    out,
    v,
    stop,
    mask,
    scale,
    inv_temperature,
    row_max,
    flat,
    slope,
    pull,
    kl_offset,
    ref_row_max,
    TAIL: tl.constexpr,
    MASKED: tl.constexpr,
    ENTROPY_TERM: tl.constexpr,
    KL_TERM: tl.constexpr,
):
    keep = kept_columns(mask, v, stop, TAIL, MASKED)
    z = (read(row, v, stop, keep, TAIL, MASKED, "evict_first") - row_max) * scale
    e = tl.exp2(z)
    if ENTROPY_TERM:
        grad = -e * (flat + slope * tl.maximum(z, FAR))
    else:
        grad = -e * flat
    if KL_TERM:
        log_q = (read(ref, v, stop, keep, TAIL, MASKED, "evict_first") - ref_row_max) * inv_temperature
        grad += tl.where(e == 0.0, 0.0, e * pull * (z * LN2 + kl_offset - log_q))
    if MASKED:
        grad = tl.where(keep, grad, 0.0)
    grad = grad.to(out.dtype.element_ty)
    if TAIL:
        tl.store(out + v, grad, v < stop)
    else:
        tl.store(out + v, grad)


@triton.jit
def row_zero(out, start, stop, LANES: tl.constexpr):
    """A dead row is not read; but its gradient must be written, or it is garbage."""
    zero = tl.zeros((LANES, PER), out.dtype.element_ty)
    BLOCK: tl.constexpr = LANES * PER
    whole = start + (stop - start) // BLOCK * BLOCK
    for at in range(start, whole, BLOCK):
        tl.store(out + columns(at, LANES), zero)
    if whole < stop:
        v = columns(whole, LANES)
        tl.store(out + v, zero, v < stop)
