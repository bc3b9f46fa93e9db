"""bf16 numbers as numpy sees them: 16 bits of an integer."""

import numpy as np

BF16_NAN = 0x7FC0


def float_to_bf16(x):
    """fp32 (or anything numpy can turn into fp32) -> bf16 bits, round to nearest even."""
    with np.errstate(over="ignore", invalid="ignore"):
        x = np.asarray(x).astype(np.float32)
    bits = np.ascontiguousarray(x).view(np.uint32)
    out = ((bits + ((bits >> 16) & 1) + np.uint32(0x7FFF)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(BF16_NAN), out).reshape(np.shape(x))


def bf16_to_float(bits):
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)
