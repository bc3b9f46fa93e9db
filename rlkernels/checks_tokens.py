"""Checks on what the per-token functions add to ``checks``: packed layouts, groups, normalisers.

The values of ``cu_seqlens`` are read where that is free: on the CPU, outside ``torch.compile``; with ``RLKERNELS_CHECK=1`` on every device.
"""
import math
import os

import torch

from rlkernels import checks

CHECK_VALUES = os.environ.get("RLKERNELS_CHECK") == "1"


def layout(where, name, x, cu_seqlens):
    """Padded ``[B, L]`` without ``cu_seqlens``, packed ``[N]`` with it."""
    if cu_seqlens is None and x.dim() != 2:
        raise ValueError(f"{where}: {name} has shape {tuple(x.shape)}, expected [B, L], or [N] together with cu_seqlens")
    if cu_seqlens is not None and x.dim() != 1:
        raise ValueError(f"{where}: {name} has shape {tuple(x.shape)}, expected [N]: cu_seqlens says that it is packed; flatten it")


def rows(where, name, x, cu_seqlens):
    """As ``layout``, but padded sequences may have any leading shape ``[..., L]``."""
    if x.dim() == 0:
        raise ValueError(f"{where}: {name} has shape (), expected [..., L], or [N] together with cu_seqlens")
    if cu_seqlens is not None:
        layout(where, name, x, cu_seqlens)
        segments(where, cu_seqlens, x)


def segments(where, cu_seqlens, tokens):
    if not isinstance(cu_seqlens, torch.Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        got = cu_seqlens.dtype if isinstance(cu_seqlens, torch.Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"{where}: cu_seqlens must be an int32 or int64 tensor, got {got}")
    checks.tensor(where, "cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"{where}: cu_seqlens has shape {tuple(cu_seqlens.shape)}, expected [S + 1]: a 0, then the end of each sequence")
    checks.one_device(where, "cu_seqlens", cu_seqlens, tokens=tokens)
    if torch.compiler.is_compiling() or not (CHECK_VALUES or cu_seqlens.device.type == "cpu"):
        return
    ends = cu_seqlens.tolist()
    if ends[0] != 0:
        raise ValueError(f"{where}: cu_seqlens starts at {ends[0]}, expected 0")
    for i in range(1, len(ends)):
        if ends[i] < ends[i - 1]:
            raise ValueError(f"{where}: cu_seqlens decreases from {ends[i - 1]} to {ends[i]} at entry {i}; it must hold cumulative lengths")
    if ends[-1] != tokens.shape[0]:
        raise ValueError(f"{where}: cu_seqlens ends at {ends[-1]}, expected the number of tokens, {tokens.shape[0]}")


def ids(where, name, x, expected):
    checks.tensor(where, name, x)
    if x.dtype.is_floating_point or x.dtype.is_complex or x.dtype == torch.bool:
        raise TypeError(f"{where}: {name} must be an integer tensor, got {x.dtype}")
    checks.shape(where, name, x, expected)


def not_negative(where, name, x):
    """A number, or a tensor of shape () whose value is not read."""
    if isinstance(x, torch.Tensor):
        checks.shape(where, name, x, ())
        return x
    x = checks.real(where, name, x)
    if not 0 <= x < math.inf:
        raise ValueError(f"{where}: {name} must be finite and not negative, got {x}")
    return x


def keywords(where, given):
    """``normalizers`` as the keywords of ``weights_for``, of which it may decide some alone."""
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise TypeError(f"{where}: normalizers must be a dict of keywords of token_weights, got {type(given).__name__}")
    for name in given:
        if not isinstance(name, str) or name in ("where", "mask", "mode", "cu_seqlens", "dtype"):
            raise TypeError(f"{where}: normalizers takes no {name!r}: it is an argument of its own, or decided by the loss")
    return given


def normalizers(where, mode, given, required, optional):
    for name in required:
        if name not in given:
            raise ValueError(f"{where}: aggregation {mode!r} needs {name}")
    for name in given:
        if name not in required and name not in optional:
            known = ", ".join((*required, *optional)) or "none"
            raise ValueError(f"{where}: aggregation {mode!r} takes no {name}; its normalisers are: {known}")
