"""A bf16 matrix product that keeps its fp32 accumulator, on a CPU with AVX512_BF16. torch's rounds it to bf16: a logit of 10 by up to 3e-2."""
import torch

from rlkernels.backends.cpu import _cpu


def available():
    """Whether this machine, this build and ``RLKERNELS_CPU_ISA`` have AVX512_BF16."""
    return _cpu is not None and _cpu.gemm_available()


def mm(a, b, out, accumulate=False):
    r"""``out = a b``, or ``out += a b``, with both operands in bf16 and every sum in fp32.

    The sum of an element is taken in an order that depends on ``K`` alone: a row has the same bits in any batch, layout and on any number of
    threads. Subnormal numbers count as zero.

    Args:
        a: ``[M, K]``, bfloat16, or float32 that is rounded to bfloat16 as it is read; any strides.
        b: ``[K, N]``, bfloat16, any strides.
        out: ``[M, N]``, float32, the columns side by side, any row stride; shares no memory with ``a`` and ``b``. What lies between its rows is not touched.
        accumulate: add to what ``out`` holds. Without it ``out`` is not read.

    Returns:
        ``out``.

    Raises:
        ValueError: the shapes do not fit, or the columns of ``out`` are not side by side, or its rows overlap.
        TypeError: another dtype, or a tensor that is not on the CPU.
        RuntimeError: ``available()`` is False.
    """
    if not available():
        raise RuntimeError("mm: AVX512_BF16 is absent here (the machine, the compiler of the build, or RLKERNELS_CPU_ISA); widen to float32 instead")
    for name, x, dtypes in (("a", a, (torch.bfloat16, torch.float32)), ("b", b, (torch.bfloat16,)), ("out", out, (torch.float32,))):
        if x.dtype not in dtypes or x.device.type != "cpu":
            raise TypeError(f"mm: {name} must be {' or '.join(map(str, dtypes))} on the CPU, got {x.dtype} on {x.device}; cast it")
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0] or out.shape != (a.shape[0], b.shape[1]):
        raise ValueError(f"mm: expected a [M, K], b [K, N] and out [M, N], got {tuple(a.shape)}, {tuple(b.shape)} and {tuple(out.shape)}")
    if (out.stride(1) != 1 and out.shape[1] > 1) or (out.stride(0) < out.shape[1] and out.shape[0] > 1):
        raise ValueError(f"mm: out must have its columns side by side and its rows apart, got shape {tuple(out.shape)} with strides {out.stride()}; "
                         "pass a row-major tensor")
    _cpu.gemm((*out.shape, a.shape[1]), _matrix(a), _matrix(b), out.data_ptr(), out.stride(0), accumulate, torch.get_num_threads())
    return out


def add_what_rounding_lost(dlogits, weight, hidden, dhidden, dweight):
    r"""Adds to ``dhidden = dlogits weight`` and ``dweight = dlogits^T hidden`` what rounding ``dlogits`` to bf16 took from its largest elements.

    Per row up to 40 elements of at least 1/32 of the largest, which hold nearly all of its square: with them the gradients err by no
    more than one rounding to bf16 of their own (0.16 %), without them by 1.4 times that.

    Args:
        dlogits: ``[M, V]``, float32, unit column stride. weight: ``[V, H]``, hidden: ``[M, H]``, bfloat16, unit column stride.
        dhidden, dweight: ``[M, H]`` and ``[V, H]``, float32, or None.
    """
    hidden, weight = (x if x.stride(1) == 1 else x.contiguous() for x in (hidden, weight))
    _cpu.add_rounding((*dlogits.shape, weight.shape[1]), *(_rows(x) for x in (dlogits, weight, hidden, dhidden, dweight)), torch.get_num_threads())


def _rows(x):
    return (0, 0) if x is None else (x.data_ptr(), x.stride(0))


def _matrix(x):
    return x.data_ptr(), *x.stride(), x.dtype == torch.float32
