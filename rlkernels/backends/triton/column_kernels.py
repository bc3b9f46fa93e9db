"""Kernels over ``[N]``: an objective's value and derivative with partial sums per block, and their
fixed-order total.
"""

import triton
import triton.language as tl

from rlkernels.backends.triton.row_kernels import numbers


@triton.jit(do_not_specialize=["n"])
def elementwise(
    OBJECTIVE: tl.constexpr,
    columns,
    parameters,
    parameters_low,
    weight_ptr,
    value_ptr,
    derivative_ptr,
    partial_ptr,
    n,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Value and derivative of an objective, and one partial of the weighted sum per block; a row of weight 0 is not
    evaluated.
    """
    block = tl.program_id(0).to(tl.int64)
    i = block * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    live = inside
    if WEIGHTED:
        weight = tl.load(weight_ptr + i, inside, other=0.0)
        live = inside & (weight != 0.0)
    loaded = ()
    for k in tl.static_range(len(columns)):
        loaded = loaded + (tl.load(columns[k] + i, live, other=0.0),)
    value, derivative = OBJECTIVE(*loaded, *numbers(parameters, parameters_low))
    value = tl.where(live, value, 0.0)
    derivative = tl.where(live, derivative, 0.0)
    tl.store(value_ptr + i, value, inside)
    tl.store(derivative_ptr + i, derivative, inside)
    share = value.to(tl.float64)
    if WEIGHTED:
        share = tl.where(live, share * weight.to(tl.float64), 0.0)
    tl.store(partial_ptr + block, tl.sum(share, 0))


@triton.jit(do_not_specialize=["n"])
def weighted_loss(
    OBJECTIVE: tl.constexpr,
    first_ptr,
    minus,
    others,
    parameters,
    parameters_low,
    weight_ptr,
    total_ptr,
    shares,
    shares_low,
    slope_ptr,
    opposite_ptr,
    partial_ptr,
    n,
    WEIGHTED: tl.constexpr,
    MASKED: tl.constexpr,
    COUNTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The slope of a weighted sum, its negative for what is taken from the first column, and one partial of the sum per
    block.

    A weight is 0 or 1 where ``MASKED``; all are multiplied by the one of ``shares`` and, where ``COUNTED``, divided by
    what ``total_ptr`` holds.
    """
    block = tl.program_id(0).to(tl.int64)
    i = block * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    real: tl.constexpr = slope_ptr.dtype.element_ty
    factor = numbers(shares, shares_low)[0]
    if COUNTED:
        factor = (1.0 / tl.load(total_ptr).to(tl.float64)).to(real) * factor
    live = inside
    weight = tl.full((BLOCK,), 0.0, real) + factor
    if WEIGHTED:
        own = tl.load(weight_ptr + i, inside, other=0)
        live = inside & (own != 0)
        if not MASKED:
            # A dead element has weight 0 whatever the factor: with no live element it is infinite.
            weight = tl.where(live, own * factor, 0.0)
            live = live & (weight != 0.0)
    x = tl.load(first_ptr + i, live, other=0.0)
    for k in tl.static_range(len(minus)):
        x = x - tl.load(minus[k] + i, live, other=0.0)
    loaded = (x,)
    for k in tl.static_range(len(others)):
        loaded = loaded + (tl.load(others[k] + i, live, other=0.0),)
    value, derivative = OBJECTIVE(*loaded, *numbers(parameters, parameters_low))
    slope = tl.where(live, weight * derivative, 0.0)
    tl.store(slope_ptr + i, slope, inside)
    if len(minus) > 0:
        tl.store(opposite_ptr + i, -slope, inside)
    share = tl.where(live, value.to(tl.float64) * weight.to(tl.float64), 0.0)
    tl.store(partial_ptr + block, tl.sum(share, 0))


@triton.jit(do_not_specialize=["n"])
def sum_partials(partial_ptr, loss_ptr, n, BLOCK: tl.constexpr):
    """The second, fixed-order stage of a weighted sum."""
    total = tl.full((), 0.0, tl.float64)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(partial_ptr + i, i < n, other=0.0), 0)
    tl.store(loss_ptr, total)
