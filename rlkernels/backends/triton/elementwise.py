"""Kernels over ``[N]``: an objective's value and derivative with partial sums per block, and their fixed-order total."""
import triton
import triton.language as tl

from rlkernels.backends.triton.kernels import numbers


@triton.jit(do_not_specialize=["n"])
def elementwise(OBJECTIVE: tl.constexpr, columns, parameters, parameters_low, weight_ptr, value_ptr, derivative_ptr, partial_ptr, n, WEIGHTED: tl.constexpr,
                BLOCK: tl.constexpr):
    """Value and derivative of an objective, and one partial of the weighted sum per block; a row of weight 0 is not evaluated."""
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
def sum_partials(partial_ptr, loss_ptr, n, BLOCK: tl.constexpr):
    """The second, fixed-order stage of a weighted sum."""
    total = tl.full((), 0.0, tl.float64)
    for start in range(0, n, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.sum(tl.load(partial_ptr + i, i < n, other=0.0), 0)
    tl.store(loss_ptr, total)
