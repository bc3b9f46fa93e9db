"""Matrix products of our own on a CPU with AVX-512: bf16 with the fp32 accumulator kept, by AMX or by
AVX512_BF16, and fp32 where torch's falls behind.

torch rounds a bf16 product to bf16: a logit of 10 by up to 3e-2. In fp32 its product is MKL's, which on Zen 4 takes 1.0
to 1.25 times as long, with 1.6 times the rounding error.
"""

import torch

from rlkernels.backends import gate
from rlkernels.backends.cpu_module import _cpu


def available():
    """Tells whether this machine, this build and ``RLKERNELS_CPU_ISA`` have AVX512_BF16, perhaps AMX besides."""
    return _cpu is not None and _cpu.gemm_available()


def name():
    """Returns the instructions that multiply bf16, ``"amx"`` or ``"avx512_bf16"``, or None where ``available()`` is
    False.
    """
    return None if _cpu is None else _cpu.gemm_name()


def fp32_available():
    """Tells whether this machine, this build and ``RLKERNELS_CPU_ISA`` have AVX-512."""
    return _cpu is not None and _cpu.gemm_f32_available()


def fp32_preferred():
    """Tells whether the fp32 product is also the quicker one: on processors of AMD.

    MKL knows those of its own maker best: on a Xeon with AVX-512, ours took 0.99 to 1.19 times as long.
    """
    return _cpu is not None and _cpu.gemm_f32_preferred()


def mm(a, b, out, accumulate=False):
    r"""``out = a b``, or ``out += a b``, with both operands in bf16 or both in fp32 and every sum in fp32.

    The sum of an element is taken in an order that depends on ``K`` alone: a row has the same bits in any batch, layout
    and on any number of threads. AMX and AVX512_BF16 add in another order, and each has bits of its own. Subnormal
    numbers count as zero where ``b`` is in bf16.

    Args:
        a: ``[M, K]``, the dtype of ``b``, or float32 that is rounded to bfloat16 as it is read; any strides.
        b: ``[K, N]``, bfloat16 or float32, any strides.
        out: ``[M, N]``, float32, the columns side by side, any row stride; shares no memory with ``a`` and ``b``. What
            lies between its rows is not touched.
        accumulate: add to what ``out`` holds. Without it ``out`` is not read.

    Returns:
        ``out``.

    Raises:
        ValueError: the shapes do not fit, or the columns of ``out`` are not side by side, or its rows overlap.
        TypeError: another dtype, or a tensor that is not on the CPU.
        RuntimeError: ``available()`` is False, or ``fp32_available()`` of two operands in fp32.
    """
    both = torch.bfloat16, torch.float32
    b = gate.matrix("mm", "b", b, both)
    a, to = (
        gate.matrix("mm", "a", a, both if b.dtype == torch.bfloat16 else both[1:]),
        gate.matrix("mm", "out", out, both[1:]),
    )
    if b.dtype == torch.bfloat16 and not available():
        raise RuntimeError(
            "mm: AVX512_BF16 is absent here (the machine, the compiler of the build, or "
            "RLKERNELS_CPU_ISA); widen to float32 instead"
        )
    if b.dtype == torch.float32 and not fp32_available():
        raise RuntimeError(
            "mm: AVX-512 is absent here (the machine, the build, or RLKERNELS_CPU_ISA); take torch.mm instead"
        )
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0] or out.shape != (a.shape[0], b.shape[1]):
        raise ValueError(
            f"mm: expected a [M, K], b [K, N] and out [M, N], got {tuple(a.shape)}, {tuple(b.shape)} and "
            f"{tuple(out.shape)}"
        )
    if (
        to is not out
        or (out.stride(1) != 1 and out.shape[1] > 1)
        or (out.stride(0) < out.shape[1] and out.shape[0] > 1)
    ):
        raise ValueError(
            f"mm: out must have its columns side by side and its rows apart, got shape {tuple(out.shape)} "
            f"with strides {out.stride()}; "
            "pass a row-major tensor"
        )
    _cpu.gemm(
        (*out.shape, a.shape[1]),
        (*gate.grid(a), a.dtype == torch.float32),
        (*gate.grid(b), b.dtype == torch.float32),
        gate.address(out),
        out.stride(0),
        accumulate,
        torch.get_num_threads(),
    )
    return out


def add_what_rounding_lost(dlogits, weight, hidden, dhidden, dweight):
    r"""Adds to ``dhidden = dlogits weight`` and ``dweight = dlogits^T hidden`` what rounding ``dlogits`` to bf16 took
    from its largest elements.

    Per row up to 40 elements of at least 1/32 of the largest, which hold nearly all of its square: with them the
    gradients err by no more than one rounding to bf16 of their own (0.16 %), without them by 1.4 times that.

    Args:
        dlogits: ``[M, V]``, float32, unit column stride. weight: ``[V, H]``, hidden: ``[M, H]``, bfloat16, unit column
            stride.
        dhidden, dweight: ``[M, H]`` and ``[V, H]``, float32, or None.
    """
    if not available():
        raise RuntimeError(
            "add_what_rounding_lost: AVX512_BF16 is absent here (the machine, the compiler of the "
            "build, or RLKERNELS_CPU_ISA)"
        )
    m, v, h = *dlogits.shape, weight.shape[1]
    wide, narrow = torch.float32, torch.bfloat16
    given = [
        _rows(*of)
        for of in (
            ("dlogits", dlogits, wide, m, v),
            ("weight", weight, narrow, v, h),
            ("hidden", hidden, narrow, m, h),
            ("dhidden", dhidden, wide, m, h),
            ("dweight", dweight, wide, v, h),
        )
    ]
    _cpu.add_rounding(
        (m, v, h), *(gate.grid(x)[:2] if x is not None else (0, 0) for x in given), torch.get_num_threads()
    )


def _rows(name, x, dtype, rows, columns):
    if x is None:
        return None
    x = gate.matrix("add_what_rounding_lost", name, x, (dtype,))
    if x.shape != (rows, columns):
        raise ValueError(f"add_what_rounding_lost: {name} has shape {tuple(x.shape)}, expected {(rows, columns)}")
    if columns > 1 and x.stride(1) != 1:
        if name not in ("hidden", "weight"):
            raise ValueError(
                f"add_what_rounding_lost: {name} must have its columns side by side, got strides "
                f"{x.stride()}; pass a row-major tensor"
            )
        x = x.contiguous()
    return x
