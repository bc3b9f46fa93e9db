"""Triton twins of ``rlkernels.objectives.functions``: same names, same meaning, NaN kept."""

import triton
import triton.language as tl


@triton.jit
def exp(x):
    return tl.exp(x)


@triton.jit
def expm1(x):
    # Kahan: the rounding error of u = exp(x) cancels between u - 1 and log(u). exp(x) - 1 alone has no correct digit at
    # x = 1e-8.
    u = tl.exp(x)
    near = (u - 1.0) * (x / tl.log(u))  # in this order: (u - 1) x is inf from x = 84 on
    return tl.where(u == 1.0, x, tl.where(u - 1.0 == -1.0, -1.0, tl.where(u == float("inf"), u, near)))


@triton.jit
def log(x):
    return tl.log(x)


@triton.jit
def log1p(x):
    # The same trick the other way round. log(1 + x) alone is 0 for x = 2e-9, the value of a pairwise loss at margin 20.
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / (u - 1.0)))


@triton.jit
def sigmoid(x):
    return tl.sigmoid(x)


@triton.jit
def log_sigmoid(x):
    # where, not tl.minimum: tl.minimum(nan, 0) is 0.
    return tl.where(x > 0.0, 0.0, x) - log1p(tl.exp(-tl.abs(x)))


@triton.jit
def tanh(x):
    # By expm1, because (1 - e) / (1 + e) has no correct digit near 0. Of -|2 x|, which never overflows.
    tail = expm1(-2.0 * tl.abs(x))
    return tl.where(x < 0.0, tail / (tail + 2.0), -tail / (tail + 2.0))


@triton.jit
def sqrt(x):
    return tl.sqrt(x)


@triton.jit
def abs(x):
    return tl.abs(x)


@triton.jit
def where(condition, a, b):
    return tl.where(condition, a, b)


@triton.jit
def clip(x, low, high):
    # tl.clamp(nan, 0, 1) is 0: a NaN logit would become a finite, plausible loss.
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def maximum(a, b):
    # Compared, because tl.maximum(nan, 0) is 0.
    return tl.where(a > b, a, tl.where(b >= a, b, a + b))


@triton.jit
def minimum(a, b):
    return -maximum(-a, -b)
