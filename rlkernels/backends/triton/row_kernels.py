"""The kernels over rows: one program per row (statistics, one-pass policy loss), or per row and slice of columns
(gradient).

They take an objective as a function and know no reinforcement learning. Rows sit on grid axis 0 (axis 1 ends at 65535);
nothing but lanes, flags and the objective is a compile-time constant. No atomics: results do not depend on the order of
programs.
"""

import triton
import triton.language as tl

from rlkernels.backends.triton.row_gradient import row_gradient, row_zero
from rlkernels.backends.triton.row_statistics import (
    ENTROPY,
    IS_TOP1,
    KL,
    LOG_SUM_SQ,
    MEAN_LOGITS,
    PER,
    place,
    row_stats,
    target_logit,
)

UNSPECIALISED = [
    "outer",
    "inner",
    "ref_outer",
    "ref_inner",
    "out_outer",
    "out_inner",
    "level",
    "mask_stride",
    "target_stride",
    "ignore_index",
]
# Strides of rows come in units of ALIGN elements, the largest of 16, 8, 4, 2, 1 that all of them allow: it decides how
# wide loads can be. A vocabulary and a layout fix it, whatever the lengths.


@triton.jit
def _inverse_temperature(temperature, temperature_ptr, token, PER_ROW: tl.constexpr):
    inverse = temperature  # the host has inverted a number
    if PER_ROW:
        row_temperature = tl.load(temperature_ptr + token)
        one = tl.full((), 1.0, row_temperature.dtype)
        if row_temperature.dtype == tl.float64:
            inverse = one / row_temperature
        else:
            # Rounded as on the host: a tensor of temperatures has the bits of the numbers.
            inverse = tl.div_rn(one, row_temperature)
    return inverse


@triton.jit(do_not_specialize=UNSPECIALISED)
def token_stats(
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
    logp_ptr,
    row_max_ptr,
    sum_exp_ptr,
    entropy_ptr,
    log_sum_sq_ptr,
    mean_logits_ptr,
    is_top1_ptr,
    ref_logp_ptr,
    ref_row_max_ptr,
    ref_sum_exp_ptr,
    kl_ptr,
    WANTED: tl.constexpr,
    PER_ROW: tl.constexpr,
    MASKED: tl.constexpr,
    REF: tl.constexpr,
    REAL: tl.constexpr,
    ALIGN: tl.constexpr,
    LANES: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """One row's statistics in one read (two with a reference). A dead row is not read; its outputs are 0."""
    token = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + token * target_stride).to(tl.int64)
    if target == ignore_index:
        tl.store(logp_ptr + token, 0.0)
        tl.store(row_max_ptr + token, 0.0)
        tl.store(sum_exp_ptr + token, 0.0)
        if ENTROPY & WANTED:
            tl.store(entropy_ptr + token, 0.0)
        if LOG_SUM_SQ & WANTED:
            tl.store(log_sum_sq_ptr + token, 0.0)
        if MEAN_LOGITS & WANTED:
            tl.store(mean_logits_ptr + token, 0.0)
        if IS_TOP1 & WANTED:
            tl.store(is_top1_ptr + token, 0)
        if KL & WANTED:
            tl.store(kl_ptr + token, 0.0)
        if REF:
            tl.store(ref_logp_ptr + token, 0.0)
            tl.store(ref_row_max_ptr + token, 0.0)
            tl.store(ref_sum_exp_ptr + token, 0.0)
    else:
        row = place(logits_ptr, token, outer, inner, level, ALIGN)
        ref = row
        if REF:
            ref = place(ref_ptr, token, ref_outer, ref_inner, level, ALIGN)
        mask = mask_ptr + token * mask_stride
        inv = _inverse_temperature(temperature, temperature_ptr, token, PER_ROW)
        sums = row_stats(row, ref, vocab, mask, inv, WANTED, MASKED, REF, REAL, LANES, AHEAD, "evict_first")
        row_max, sum_exp, weighted_sum, square_sum, logit_sum, count, first_max = sums[:7]
        ref_row_max, ref_sum_exp, cross_sum = sums[7:]
        log_sum_exp = tl.log(sum_exp)
        x = target_logit(row, target, 0, vocab, mask, MASKED)
        outside = (target < 0) | (target >= vocab)  # met on an accelerator only: NaN there, no address formed from it
        nan = float("nan")
        tl.store(logp_ptr + token, (x - row_max) * inv - log_sum_exp)
        tl.store(row_max_ptr + token, tl.where(outside, nan, row_max))
        tl.store(sum_exp_ptr + token, tl.where(outside, nan, sum_exp))
        if ENTROPY & WANTED:
            tl.store(entropy_ptr + token, tl.where(outside, nan, log_sum_exp - weighted_sum / sum_exp))
        if LOG_SUM_SQ & WANTED:
            tl.store(log_sum_sq_ptr + token, tl.where(outside, nan, tl.log(square_sum) - 2.0 * log_sum_exp))
        if MEAN_LOGITS & WANTED:
            tl.store(mean_logits_ptr + token, tl.where(outside, nan, logit_sum / count * inv))
        if IS_TOP1 & WANTED:
            tl.store(is_top1_ptr + token, ((first_max == target) & (sum_exp == sum_exp)).to(tl.int8))
        if REF:
            ref_log_sum_exp = tl.log(ref_sum_exp)
            tl.store(
                ref_logp_ptr + token,
                (target_logit(ref, target, 0, vocab, mask, MASKED) - ref_row_max) * inv - ref_log_sum_exp,
            )
            tl.store(ref_row_max_ptr + token, tl.where(outside, nan, ref_row_max))
            tl.store(ref_sum_exp_ptr + token, tl.where(outside, nan, ref_sum_exp))
            if KL & WANTED:
                tl.store(kl_ptr + token, tl.where(outside, nan, cross_sum / sum_exp - log_sum_exp + ref_log_sum_exp))


@triton.jit(do_not_specialize=UNSPECIALISED + ["slice_tiles", "unless_ptr", "guarded"])
def token_stats_backward(
    dlogp_ptr,
    dentropy_ptr,
    dkl_ptr,
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
    row_max_ptr,
    sum_exp_ptr,
    entropy_ptr,
    ref_row_max_ptr,
    ref_sum_exp_ptr,
    kl_ptr,
    out_ptr,
    out_outer: tl.int64,
    out_inner: tl.int64,
    slice_tiles,
    unless_ptr,
    guarded,
    LOGP_TERM: tl.constexpr,
    ENTROPY_TERM: tl.constexpr,
    KL_TERM: tl.constexpr,
    PER_ROW: tl.constexpr,
    MASKED: tl.constexpr,
    REAL: tl.constexpr,
    ALIGN: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    LANES: tl.constexpr,
):
    """One slice of one row's gradient: one read and one write, in place where ``out`` is ``logits``; nothing where
    ``unless`` is exactly 1.
    """
    if tl.load(unless_ptr, guarded != 0, other=0.0) == 1.0:
        return
    token = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * slice_tiles * (LANES * PER)  # whole tiles: rows stay aligned for 128-bit loads
    stop = tl.minimum(start + slice_tiles * (LANES * PER), vocab)
    out = place(out_ptr, token, out_outer, out_inner, level, OUT_ALIGN)
    target = tl.load(targets_ptr + token * target_stride).to(tl.int64)
    mask = mask_ptr + token * mask_stride
    zero = tl.zeros((), REAL)
    dlogp = zero
    dentropy = zero
    dkl = zero
    if LOGP_TERM:
        dlogp = tl.load(dlogp_ptr + token)
        if MASKED:  # a target outside the support moves nothing
            inside = (target >= 0) & (target < vocab)
            dlogp = tl.where(tl.load(mask + target, inside, other=1) != 0, dlogp, 0.0)
    if ENTROPY_TERM:
        dentropy = tl.load(dentropy_ptr + token)
    if KL_TERM:
        dkl = tl.load(dkl_ptr + token)
    if (target == ignore_index) | ((dlogp == 0.0) & (dentropy == 0.0) & (dkl == 0.0)):
        row_zero(out, start, stop, LANES)
    else:
        row = place(logits_ptr, token, outer, inner, level, ALIGN)
        ref = row
        inv = _inverse_temperature(temperature, temperature_ptr, token, PER_ROW)
        entropy = zero
        ref_row_max = zero
        ref_log_sum_exp = zero
        kl = zero
        if ENTROPY_TERM:
            entropy = tl.load(entropy_ptr + token)
        if KL_TERM:
            ref = place(ref_ptr, token, ref_outer, ref_inner, level, ALIGN)
            ref_row_max = tl.load(ref_row_max_ptr + token)
            ref_log_sum_exp = tl.log(tl.load(ref_sum_exp_ptr + token))
            kl = tl.load(kl_ptr + token)
        row_gradient(
            row,
            ref,
            out,
            target,
            start,
            stop,
            mask,
            inv,
            tl.load(row_max_ptr + token),
            tl.load(sum_exp_ptr + token),
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
            LANES,
        )


@triton.jit(do_not_specialize=UNSPECIALISED)
def fused_policy(
    OBJECTIVE: tl.constexpr,
    KL_OBJECTIVE: tl.constexpr,
    logits_ptr,
    outer: tl.int64,
    inner: tl.int64,
    level,
    targets_ptr,
    target_stride,
    ignore_index,
    temperature,
    temperature_ptr,
    mask_ptr,
    mask_stride,
    vocab,
    columns,
    parameters,
    parameters_low,
    weight_ptr,
    entropy_weight_ptr,
    ref_logp_ptr,
    kl_weight_ptr,
    loss_ptr,
    logp_ptr,
    row_max_ptr,
    sum_exp_ptr,
    entropy_ptr,
    dlogp_ptr,
    out_ptr,
    out_outer: tl.int64,
    out_inner: tl.int64,
    WITH_GRAD: tl.constexpr,
    ENTROPY_TERM: tl.constexpr,
    KL_TERM: tl.constexpr,
    PER_ROW: tl.constexpr,
    MASKED: tl.constexpr,
    REAL: tl.constexpr,
    ALIGN: tl.constexpr,
    OUT_ALIGN: tl.constexpr,
    LANES: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """One row: statistics, objective and gradient in one launch; the second sweep walks back over what the first left
    in the cache.
    """
    token = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + token * target_stride).to(tl.int64)
    out = place(out_ptr, token, out_outer, out_inner, level, OUT_ALIGN)
    weight = tl.load(weight_ptr + token)
    entropy_weight = tl.zeros((), REAL)
    kl_weight = entropy_weight
    if ENTROPY_TERM:
        entropy_weight = tl.load(entropy_weight_ptr + token)
    if KL_TERM:
        kl_weight = tl.load(kl_weight_ptr + token)
    if (target == ignore_index) | ((weight == 0.0) & (entropy_weight == 0.0) & (kl_weight == 0.0)):
        tl.store(loss_ptr + token, 0.0)
        tl.store(logp_ptr + token, 0.0)
        tl.store(row_max_ptr + token, 0.0)
        tl.store(sum_exp_ptr + token, 0.0)
        tl.store(entropy_ptr + token, 0.0)
        tl.store(dlogp_ptr + token, 0.0)
        if WITH_GRAD:
            row_zero(out, 0, vocab, LANES)
    else:
        row = place(logits_ptr, token, outer, inner, level, ALIGN)
        mask = mask_ptr + token * mask_stride
        inv = _inverse_temperature(temperature, temperature_ptr, token, PER_ROW)
        # Read before the sweeps: in place, the second one overwrites it.
        x = target_logit(row, target, 0, vocab, mask, MASKED)
        row_max, sum_exp, weighted_sum = row_stats(
            row, row, vocab, mask, inv, ENTROPY, MASKED, False, REAL, LANES, AHEAD, "evict_last"
        )[:3]
        sum_exp = tl.where((target < 0) | (target >= vocab), float("nan"), sum_exp)
        log_sum_exp = tl.log(sum_exp)
        logp = (x - row_max) * inv - log_sum_exp
        entropy = log_sum_exp - weighted_sum / sum_exp
        loss = tl.zeros((), REAL)
        dlogp = loss
        if weight != 0.0:
            loaded = ()
            for k in tl.static_range(len(columns)):
                loaded = loaded + (tl.load(columns[k] + token),)
            value, derivative = OBJECTIVE(logp, *loaded, *numbers(parameters, parameters_low))
            loss += weight * value
            dlogp += weight * derivative
        if KL_TERM:
            if kl_weight != 0.0:
                value, derivative = KL_OBJECTIVE(logp, tl.load(ref_logp_ptr + token))
                loss += kl_weight * value
                dlogp += kl_weight * derivative
        if ENTROPY_TERM:
            if entropy_weight != 0.0:
                loss -= entropy_weight * entropy
        tl.store(loss_ptr + token, loss)
        tl.store(logp_ptr + token, logp)
        tl.store(row_max_ptr + token, row_max)
        tl.store(sum_exp_ptr + token, sum_exp)
        tl.store(entropy_ptr + token, entropy)
        tl.store(dlogp_ptr + token, dlogp)
        if WITH_GRAD:
            push = dlogp
            if MASKED:  # a target outside the support moves nothing
                inside = (target >= 0) & (target < vocab)
                push = tl.where(tl.load(mask + target, inside, other=1) != 0, dlogp, 0.0)
            if (push == 0.0) & (entropy_weight == 0.0):  # a clipped token: no second sweep
                row_zero(out, 0, vocab, LANES)
            else:
                zero = tl.zeros((), REAL)
                row_gradient(
                    row,
                    row,
                    out,
                    target,
                    0,
                    vocab,
                    mask,
                    inv,
                    row_max,
                    sum_exp,
                    entropy,
                    push,
                    -entropy_weight,
                    zero,
                    zero,
                    zero,
                    zero,
                    MASKED,
                    ENTROPY_TERM,
                    False,
                    LANES,
                )


@triton.jit
def numbers(high, low):
    """Run-time numbers. A kernel's number argument is fp32: an fp64 kernel gets each as a sum of two.

    Kernels call them ``parameters``: Triton's launcher has a variable ``params`` of its own, which an argument of that
    name would collide with.
    """
    found = high
    if len(low) > 0:
        found = ()
        for k in tl.static_range(len(high)):
            found = found + (tl.zeros((), tl.float64) + high[k] + low[k],)
    return found
