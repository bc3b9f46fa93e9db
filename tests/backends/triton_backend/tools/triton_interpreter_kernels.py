"""Kernels of the self-tests of triton_interpreter.py and triton_aot.py; Triton reads their source, so
they need a file.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice


@triton.jit
def copy(X, Y, B: tl.constexpr):
    o = tl.arange(0, B)
    tl.store(Y + o, tl.load(X + o).to(Y.dtype.element_ty))


@triton.jit
def bf16_ops(X, Y, Z, B: tl.constexpr):
    o = tl.arange(0, B)
    a = tl.load(X + o)
    b = tl.load(Y + o)
    tl.store(Z + o, a * b + a)
    tl.store(Z + B + o, tl.where(a < b, a, b))
    tl.store(Z + 2 * B + o, -a)
    tl.store(Z + 3 * B + o, tl.clamp(a.to(tl.float32), -1.0, 1.0))


@triton.jit
def dot(X, Y, Z, N: tl.constexpr, P: tl.constexpr):
    o = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(Z + o, tl.dot(tl.load(X + o), tl.load(Y + o), input_precision=P))


@triton.jit
def atomic(X):
    tl.atomic_add(X, 1.0)


@triton.jit
def libdevice_log1p(X, Y, B: tl.constexpr):
    o = tl.arange(0, B)
    tl.store(Y + o, libdevice.log1p(tl.load(X + o)))


@triton.jit
def nan_rules(X, Y, Z, B: tl.constexpr):
    o = tl.arange(0, B)
    tl.store(Z + o, tl.maximum(tl.load(X + o), tl.load(Y + o)))
    tl.store(Z + B + o, tl.clamp(tl.load(X + o), -1.0, 1.0))


@triton.autotune(configs=[triton.Config({"B": 32}), triton.Config({"B": 64})], key=["N"])
@triton.jit
def tuned(X, Y, N, B: tl.constexpr):
    o = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(Y + o, tl.load(X + o, mask=o < N, other=0.0) + 1, mask=o < N)


@triton.jit
def overflow(Y, S):
    tl.store(Y, (tl.program_id(0) + 40000) * S)


@triton.jit
def asserts(X):
    tl.device_assert(tl.load(X) == 1.0, "bad value")


@triton.jit
def read_at(X, Y, AT):
    tl.store(Y, tl.load(X + AT))


@triton.jit
def store_all(Y):
    tl.store(Y, tl.program_id(0))


@triton.jit
def number(Y):
    tl.store(Y + tl.program_id(0), tl.program_id(0) + tl.num_programs(0))


@triton.jit
def shift(X):
    p = tl.program_id(0)
    tl.store(X + p, tl.load(X + p + 1) + 1)


@triton.jit
def sum16(X, Y, B: tl.constexpr):
    tl.store(Y, tl.sum(tl.load(X + tl.arange(0, B)), 0))


@triton.jit
def max16(X, Y, B: tl.constexpr):
    x = tl.load(X + tl.arange(0, B))
    tl.store(Y, tl.max(x, 0))
    tl.store(Y + 1, tl.min(x, 0))


@triton.jit
def no_other(X, Y, N, B: tl.constexpr):
    o = tl.arange(0, B)
    tl.store(Y, tl.sum(tl.load(X + o, mask=o < N), 0))


@triton.jit
def whole_row(X, Y, B: tl.constexpr):
    x = tl.load(X + tl.arange(0, B))
    tl.store(Y + tl.arange(0, B), tl.exp(x - tl.max(x, 0)))
