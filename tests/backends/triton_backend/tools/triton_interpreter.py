"""Makes Triton's CPU interpreter a strict oracle for kernels (tested with Triton 3.5, 3.6 and 3.9).

    import triton_interpreter            # before `import triton`; sets TRITON_INTERPRET=1
    triton_interpreter.install()
    with triton_interpreter.configure(order="reverse", races=False): ...

Repaired (the plain interpreter gives a wrong number or refuses):
  * casts to bf16 from fp32/fp64/fp16/int round to nearest even and keep inf/NaN/subnormals (plain: truncation, half of
    all values differ, and from fp64 or int garbage); bf16 subnormals are read correctly;
  * bf16 arithmetic, comparisons, negation, clamp, fma (plain: integer arithmetic on the bit pattern);
  * `tl.dot` on bf16 (plain: errors of 1e10), and fp32 `tl.dot` with input_precision="tf32", the GPU's default, cuts its
    operands to 10 mantissa bits (plain: full fp32, so a missing input_precision="ieee" goes unseen);
  * bf16 `atomic_add`; common `libdevice` functions; `@triton.autotune` with several configs (runs `config_index`);
  * NaN rules of maximum/minimum/clamp and single-rounding fma on Triton older than 3.9.
Checked (the GPU would be silently wrong; raised as InterpreterError with the text in quotes):
  * `tl.device_assert`, and "int32 overflow detected" in 32-bit index arithmetic        [debug]
  * "out of bounds": an unmasked lane outside every tensor argument, strides and gaps included   [bounds]
  * "race": two programs touch one element and at least one plain store is involved              [races]
  * tl.sum / tl.cumsum of 16-bit floats: "accumulates in 16 bits", cast to fp32 first            [strict_sum]
  * masked-off lanes of a float load without `other=` read NaN instead of 0                      [poison]
  * `order`: programs run "forward", "reverse" or in a random order (an int seed); results must not depend on it;
  * "65535": a grid whose second or third axis is longer than a GPU takes.
`programs`: numbers of the only programs that run, for a grid too large to run as a whole; None: all.
Still invisible here: warps and shared memory, the GPU's reduction order and fast exp/log (2 ulp), inline assembly,
power-of-two limits of tl.arange, num_warps/num_stages, compile errors.  A nested (not module-level) combine function of
tl.reduce fails with NameError.  Keep T*V below about 20 000 per case: a program costs 0.1 to 10 ms.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import sys

import numpy as np
import triton_interpreter_speed
from triton_interpreter_bf16 import BF16_NAN, bf16_to_float, float_to_bf16
from triton_interpreter_memory import OPTIONS, REGIONS, Options, Region, touch

if "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"


@contextlib.contextmanager
def configure(**changes):
    """Temporarily change OPTIONS; unknown names raise."""
    before = dataclasses.asdict(OPTIONS)
    _set({**before, **changes})
    try:
        yield OPTIONS
    finally:
        _set(before)


def _set(values):
    for name, value in dataclasses.asdict(Options(**values)).items():
        setattr(OPTIONS, name, value)
    if _interp is not None:
        _interp.interpreter_builder.options = dataclasses.replace(
            _interp.interpreter_builder.options, debug=OPTIONS.debug
        )


# ---- installation --------------------------------------------------------------------------------------------------
_interp = None
_patched: set = set()  # globals of the device functions whose language modules this launch has patched
_LIBDEVICE = {
    **{
        f.__name__: f
        for f in (
            np.exp,
            np.exp2,
            np.expm1,
            np.log,
            np.log1p,
            np.log2,
            np.log10,
            np.tanh,
            np.sinh,
            np.cosh,
            np.sin,
            np.cos,
            np.tan,
            np.sqrt,
            np.floor,
            np.ceil,
            np.trunc,
            np.rint,
        )
    },
    "abs": np.abs,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "fast_expf": np.exp,
    "fast_logf": np.log,
    "fast_log2f": np.log2,
    "nearbyint": np.rint,
    "erf": lambda x: np.vectorize(math.erf, otypes=[x.dtype])(x),
    "pow": np.power,
    "fast_powf": np.power,
    "fast_dividef": np.divide,
    "div_rn": np.divide,
    "copysign": np.copysign,
    "atan2": np.arctan2,
    "fmod": np.fmod,
    "hypot": np.hypot,
}


def install(**changes):
    """Patch the interpreter of this process (idempotent); `changes` are Options."""
    global _interp
    import triton
    import triton.language as tl
    from triton.runtime import interpreter as lib

    if not triton.knobs.runtime.interpret:
        raise RuntimeError("set TRITON_INTERPRET=1 (or import triton_interpreter) before Triton kernels are defined")
    if _interp is None:
        _interp = lib
        _patch(triton, tl, lib)
        triton_interpreter_speed.install(lib)
    _set({**dataclasses.asdict(OPTIONS), **changes})


def _patch(triton, tl, lib):
    B, H, bf16 = lib.InterpreterBuilder, lib.TensorHandle, tl.bfloat16
    old = {
        n: getattr(B, n)
        for n in (
            "cast_impl",
            "create_fp_to_fp",
            "binary_op",
            "unary_op",
            "ternary_op",
            "create_fma",
            "create_dot",
            "create_masked_load",
            "create_masked_store",
            "create_atomic_rmw",
            "create_atomic_cas",
            "set_grid_idx",
            "set_grid_dim",
        )
    }
    is_bf = lambda h: h.dtype.scalar == bf16  # noqa: E731
    up = lambda h: H(bf16_to_float(h.data), tl.float32) if is_bf(h) else h  # noqa: E731
    down = lambda h: H(float_to_bf16(h.data), bf16) if h.data.dtype != np.bool_ else H(h.data, bf16)  # noqa: E731

    def cast_impl(self, src, dst):
        if dst.scalar == bf16 and not is_bf(src):
            return H(float_to_bf16(src.data), bf16)
        if is_bf(src) and dst.scalar != bf16:
            return H(bf16_to_float(src.data).astype(lib._get_np_dtype(dst)), dst.scalar)
        return old["cast_impl"](self, src, dst)

    def create_fp_to_fp(self, src, dst, rounding):
        plain = rounding is None or rounding == lib._ir.ROUNDING_MODE.RTNE
        if {src.dtype.scalar, dst.scalar} <= {bf16, tl.float16, tl.float32, tl.float64} and plain:
            return self.cast_impl(src, dst)
        return old["create_fp_to_fp"](self, src, dst, rounding)

    def binary_op(self, lhs, rhs, op):
        if is_bf(lhs) and is_bf(rhs):
            return down(old["binary_op"](self, up(lhs), up(rhs), op))
        return old["binary_op"](self, lhs, rhs, op)

    def unary_op(self, arg, op):
        return down(old["unary_op"](self, up(arg), op)) if is_bf(arg) else old["unary_op"](self, arg, op)

    def ternary_op(self, a, b, c, op):
        if is_bf(c) and op is not np.where:
            return down(old["ternary_op"](self, up(a), up(b), up(c), op))
        return old["ternary_op"](self, a, b, c, op)

    def create_fma(self, x, y, z):
        if is_bf(z):
            return down(self.create_fma(up(x), up(y), up(z)))
        if z.data.dtype == np.float32 and not hasattr(lib._interpreter, "fma_fp32"):
            return H((x.data.astype(np.float64) * y.data + z.data).astype(np.float32), z.dtype.scalar)
        return old["create_fma"](self, x, y, z)

    def create_clampf(self, arg, lo, hi, propagate_nans):
        if propagate_nans == lib._ir.PROPAGATE_NAN.NONE:
            return self.binary_op(self.binary_op(arg, lo, np.fmax), hi, np.fmin)
        return self.ternary_op(arg, lo, hi, np.clip)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        def prepare(h):
            h = up(h)
            if (
                OPTIONS.tf32
                and h.data.dtype == np.float32
                and not is_bf(a)
                and input_precision == lib._ir.INPUT_PRECISION.TF32
            ):
                h = H(
                    (np.ascontiguousarray(h.data).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32), tl.float32
                )
            return h

        return old["create_dot"](self, prepare(a), prepare(b), d, input_precision, max_num_imprecise_acc)

    def create_masked_load(self, ptrs, mask, other, *rest, **kw):
        touch(self, ptrs, mask, "load")
        kind = ptrs.get_element_ty()
        if (
            other is None
            and OPTIONS.poison
            and kind.is_floating()
            and kind.primitive_bitwidth >= 16
            and not mask.data.all()
        ):
            np_type = lib._get_np_dtype(kind)
            other = H(np.full(ptrs.data.shape, BF16_NAN if kind == bf16 else np.nan, np_type), kind)
        return old["create_masked_load"](self, ptrs, mask, other, *rest, **kw)

    def create_masked_store(self, ptrs, value, mask, *rest, **kw):
        touch(self, ptrs, mask, "store")
        return old["create_masked_store"](self, ptrs, value, mask, *rest, **kw)

    def create_atomic_rmw(self, op, ptr, val, mask, sem, scope):
        touch(self, ptr, mask, "atomic")
        if not (is_bf(val) and op == lib._ir.ATOMIC_OP.FADD):
            return old["create_atomic_rmw"](self, op, ptr, val, mask, sem, scope)
        before = np.zeros(ptr.data.shape, np.uint16)
        for i in np.ndindex(ptr.data.shape):
            one = np.ones(1, bool)
            if np.broadcast_to(mask.data, ptr.data.shape)[i]:
                p = np.array([ptr.data[i]], np.uint64)
                was = lib._interpreter.load(p, one, np.zeros(1, np.uint16), np.dtype(np.uint16))
                now = float_to_bf16(bf16_to_float(was) + bf16_to_float(np.broadcast_to(val.data, ptr.data.shape)[i]))
                lib._interpreter.store(p, now.reshape(1), one)
                before[i] = was[0]
        return H(before, bf16)

    def create_atomic_cas(self, ptr, *rest):
        touch(self, ptr, H(np.ones_like(ptr.data, dtype=bool), tl.int1), "atomic")
        return old["create_atomic_cas"](self, ptr, *rest)

    def set_grid_dim(self, *dims):
        old["set_grid_dim"](self, *(self._whole or dims))
        self._walked = dims  # fewer than the grid has where only some programs run
        self._order = None if self._whole is None else np.asarray(OPTIONS.programs)
        if OPTIONS.order != "forward":
            n = int(np.prod(dims))
            turns = (
                np.arange(n)[::-1]
                if OPTIONS.order == "reverse"
                else np.random.default_rng(int(OPTIONS.order)).permutation(n)
            )
            self._order = turns if self._order is None else self._order[turns]

    def set_grid_idx(self, x, y, z):
        if self._order is not None:
            _, gy, gz = self._walked
            x, y, z = (int(v) for v in np.unravel_index(self._order[(x * gy + y) * gz + z], self.grid_dim))
        old["set_grid_idx"](self, x, y, z)

    for name, member in list(locals().items()):
        if name.startswith(("create_", "set_grid")) or name in ("cast_impl", "binary_op", "unary_op", "ternary_op"):
            setattr(B, name, member)
    B._order = B._whole = None
    B.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    B.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    if not hasattr(B, "get_bf16"):
        B.get_bf16 = lambda self, value: H(float_to_bf16(np.array([value])), bf16)

    def strict(method):
        def wrapped(self, input):
            x = input[0] if isinstance(input, tuple) else input
            if OPTIONS.strict_sum and x.dtype.scalar in (bf16, tl.float16):
                raise TypeError(
                    f"tl.{method.__name__} of {x.dtype.scalar} accumulates in 16 bits on the GPU: cast to "
                    "tl.float32 first"
                )
            return method(self, input)

        return wrapped

    for cls, name in ((lib.ReduceOps, "sum"), (lib.ScanOps, "cumsum"), (lib.ScanOps, "cumprod")):
        setattr(cls, name, strict(getattr(cls, name)))
    min_max = lib.ReduceOps.min_max

    def bf16_min_max(self, input, **ops):
        x = input[0] if isinstance(input, tuple) else input
        if x.dtype.scalar != bf16:
            return min_max(self, input, **ops)
        wide = tl.core.tensor(H(bf16_to_float(x.handle.data), tl.float32), tl.block_type(tl.float32, list(x.shape)))
        out = min_max(self, wide, **ops)
        pair = out if isinstance(out, tuple) else (out,)
        pair = tuple(
            self.to_tensor(float_to_bf16(v.handle.data.reshape(v.shape)), bf16) if v.dtype.scalar == tl.float32 else v
            for v in pair
        )
        return pair if isinstance(out, tuple) else pair[0]

    lib.ReduceOps.min_max = bf16_min_max

    def device_call(self, *args, **kwargs):
        # The plain interpreter patches triton.language again at every call of a device function: half of the time. Once
        # per launch does.
        if id(self.fn.__globals__) not in _patched:
            lib._patch_lang(self.fn)
            _patched.add(id(self.fn.__globals__))
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as e:
            raise lib.InterpreterError(repr(e)) from e

    lib.InterpretedFunction.__call__ = device_call

    init_args = lib.GridExecutor._init_args_hst
    call = lib.GridExecutor.__call__

    def _init_args_hst(self, args_dev, kwargs):
        out = init_args(self, args_dev, kwargs)
        stack = [*out[0], *out[1].values()]
        while stack:
            a = stack.pop()
            if isinstance(a, tuple):
                stack.extend(a)
            elif hasattr(a, "data_ptr") and hasattr(lib._unwrap_tensor(a), "stride"):
                REGIONS[-1].append(Region(lib._unwrap_tensor(a)))
            elif hasattr(a, "base") and hasattr(a, "block_shape"):  # tensor descriptor
                stack.append(a.base)
        return out

    def __call__(self, *args, **kwargs):
        whole = self.grid
        if not callable(whole) and any(n > 65535 for n in whole[1:]):
            raise lib.InterpreterError(f"grid {whole}: axes behind the first end at 65535")
        REGIONS.append([])
        _patched.clear()
        if OPTIONS.programs is not None:
            B._whole, self.grid = (*whole, 1, 1)[:3], (len(OPTIONS.programs),)
        try:
            return call(self, *args, **kwargs)
        finally:
            REGIONS.pop()
            B._whole, self.grid = None, whole

    lib.GridExecutor._init_args_hst, lib.GridExecutor.__call__ = _init_args_hst, __call__

    from triton.runtime.autotuner import Autotuner

    def run(self, *args, **kwargs):
        config = self.configs[OPTIONS.config_index % len(self.configs)]
        self.best_config = config
        if config.pre_hook is not None:
            config.pre_hook({**dict(zip(self.arg_names, args, strict=False)), **kwargs, **config.all_kwargs()})
        return self.fn.run(*args, **kwargs, **config.all_kwargs())

    Autotuner.run = run

    from triton.language.extra import libdevice

    def elementwise(fn):
        def call_on_tensors(*args, _semantic=None):
            like = next(a for a in args if isinstance(a, tl.tensor))
            data = [a.handle.data if isinstance(a, tl.tensor) else np.asarray(a, like.handle.data.dtype) for a in args]
            with np.errstate(all="ignore"):
                out = np.asarray(fn(*data)).astype(like.handle.data.dtype)
            shape = out.shape if like.type.is_block() or out.size > 1 else None
            return tl.tensor(
                H(out, like.dtype.scalar), tl.block_type(like.dtype.scalar, list(shape)) if shape else like.type
            )

        return call_on_tensors

    for name, fn in _LIBDEVICE.items():
        if hasattr(libdevice, name):
            setattr(libdevice, name, elementwise(fn))
