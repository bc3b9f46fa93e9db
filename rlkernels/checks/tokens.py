"""Checks on what the per-token functions add to ``checks``: packed layouts, groups, normalisers.

The values of ``cu_seqlens`` are read where that is free: on the CPU; with ``RLKERNELS_CHECK=1`` on every device.
"""

import math

import torch

from rlkernels import checks
from rlkernels.tracing import has_values


def layout(where, name, x, cu_seqlens):
    """Padded ``[B, L]`` without ``cu_seqlens``, packed ``[N]`` with it."""
    if cu_seqlens is None and x.dim() != 2:
        raise ValueError(
            f"{where}: {name} has shape {tuple(x.shape)}, expected [B, L], or [N] together with cu_seqlens"
        )
    if cu_seqlens is not None and x.dim() != 1:
        raise ValueError(
            f"{where}: {name} has shape {tuple(x.shape)}, expected [N]: cu_seqlens says that it is packed; flatten it"
        )


def rows(where, name, x, cu_seqlens):
    """As ``layout``, but padded sequences may have any leading shape ``[..., L]``; returns what ``segments`` returns,
    None without ``cu_seqlens``.
    """
    if x.dim() == 0:
        raise ValueError(f"{where}: {name} has shape (), expected [..., L], or [N] together with cu_seqlens")
    if cu_seqlens is None:
        return None
    layout(where, name, x, cu_seqlens)
    return segments(where, cu_seqlens, x)


def values_are_read(x):
    """Tell whether bad values raise: on the device of ``x``; in a list, which is the host's own."""
    return checks.CHECK_VALUES or not isinstance(x, torch.Tensor) or x.device.type == "cpu"


def segments(where, cu_seqlens, tokens, filled=False):
    """``cu_seqlens`` as offsets that form no address outside of ``tokens``: int64, contiguous, and a copy, so that no
    other thread changes what was checked.

    Where values are read, bad ones raise; ``filled``: so does an empty sequence. Elsewhere they are held within the
    tokens. Under ``torch.compile`` a registered op reads them at run time: its result must be used, or the check is
    dropped as dead code.
    """
    count = tokens.shape[0]
    if isinstance(cu_seqlens, (list, tuple)):
        # Known to the host, so checked on every device.
        return segments(where, _listed(where, cu_seqlens), tokens.new_empty((count,), device="cpu"), filled).to(
            tokens.device
        )
    if not isinstance(cu_seqlens, torch.Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        got = cu_seqlens.dtype if isinstance(cu_seqlens, torch.Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"{where}: cu_seqlens must be an int32 or int64 tensor, got {got}; a list of ints will do, too")
    checks.tensor(where, "cu_seqlens", cu_seqlens)
    checks.readable(where, "cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(
            f"{where}: cu_seqlens has shape {tuple(cu_seqlens.shape)}, expected [S + 1]: a 0, then the "
            "end of each sequence"
        )
    checks.one_device(where, "cu_seqlens", cu_seqlens, tokens=tokens)
    if not values_are_read(cu_seqlens):
        if count and cu_seqlens.shape[0] == 1:  # without a sequence every index of one is out of bounds
            raise ValueError(
                f"{where}: cu_seqlens has shape (1,), which is no sequence, expected the ends of "
                f"sequences that hold {count} tokens"
            )
        return cu_seqlens.long().clamp(0, count)
    if not has_values(cu_seqlens):
        return torch.ops.rlkernels.offsets.default(cu_seqlens, count, filled, where)
    return read_offsets(cu_seqlens, count, filled, where)


def read_offsets(cu_seqlens, count, filled, where):
    """Offsets as ``segments`` returns them where it reads values."""
    offsets = cu_seqlens.clone() if cu_seqlens.dtype == torch.int64 else cu_seqlens.long()
    ends = offsets.tolist()
    # Sorting what is sorted takes 10 ns an entry, a loop over neighbours 60.
    if ends[0] != 0 or ends[-1] != count or ends != sorted(ends):
        raise ValueError(f"{where}: {_fault(ends, count)}")
    if filled and len(set(ends)) != len(ends):
        empty = next(i for i in range(len(ends) - 1) if ends[i] == ends[i + 1])
        raise ValueError(
            f"{where}: cu_seqlens makes sequence {empty} empty (entries {empty} and {empty + 1} are "
            f"{ends[empty]}), expected a token in each; "
            "leave it out"
        )
    return offsets


def _fault(ends, count):
    if ends[0] != 0:
        return f"cu_seqlens starts at {ends[0]}, expected 0"
    for i in range(1, len(ends)):
        if ends[i] < ends[i - 1]:
            return f"cu_seqlens decreases from {ends[i - 1]} to {ends[i]} at entry {i}; it must hold cumulative lengths"
    return f"cu_seqlens ends at {ends[-1]}, expected the number of tokens, {count}"


def _listed(where, values):
    for x in values:
        # A SymInt of a compiled program has an index, and cannot be asked for it.
        if isinstance(x, (bool, torch.Tensor)) or not (isinstance(x, (int, torch.SymInt)) or hasattr(x, "__index__")):
            raise TypeError(
                f"{where}: cu_seqlens must be an int32 or int64 tensor, or a list of ints; got a "
                f"{type(values).__name__} that holds a "
                f"{type(x).__name__}"
            )
        if not -(2**63) <= x < 2**63:
            raise ValueError(f"{where}: cu_seqlens holds {x}, expected offsets that an int64 can hold")
    return torch.tensor(values, dtype=torch.int64, device="cpu")


def tied(x, offsets):
    """``x``, which under ``torch.compile`` needs the offsets: what else would not be used there would not be checked
    either.
    """
    # A correct first offset is 0.
    return x + offsets[0] if offsets is not None and torch.compiler.is_compiling() else x


def holding(where, targets, ignore_index):
    """The targets in a dtype that holds ``ignore_index``: int64 where int32 does not; there torch would compare with
    its last 32 bits.
    """
    if -(2**31) <= ignore_index < 2**31:
        return targets
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(
            f"{where}: ignore_index must be a 64-bit integer, got {ignore_index}; take one that no target "
            "has, such as -100"
        )
    return targets.long()


def numbers(where, name, x):
    """Rewards count as whole numbers or as true and false, too."""
    checks.tensor(where, name, x)
    if x.dtype not in (*checks.FLOATS, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        raise TypeError(f"{where}: {name} has dtype {x.dtype}; supported: {checks.FLOAT_NAMES}, bool and integers")


def one_dtype(where, first, x, **others):
    """``others``: name to tensor or None; all of the dtype of ``x``, unless autocast is on and brings them to one."""
    for name, other in others.items():
        if other is not None and other.dtype != x.dtype and not _autocast(x.device.type):
            raise TypeError(
                f"{where}: {name} has dtype {other.dtype}, {first} has {x.dtype}; cast one of them, or use autocast"
            )


def _autocast(kind):
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def ids(where, name, x, expected):
    checks.tensor(where, name, x)
    if x.dtype == torch.bool or x.dtype not in checks.WHOLE:
        raise TypeError(f"{where}: {name} must be an integer tensor, got {x.dtype}; supported: {checks.WHOLE_NAMES}")
    checks.shape(where, name, x, expected)


def not_negative(where, name, x, like):
    """A number, or a tensor of shape (), whose value is read where that is free; ``like``: a tensor on the device of
    the data.
    """
    if isinstance(x, torch.Tensor):
        checks.tensor(where, name, x)
        checks.shape(where, name, x, ())
        checks.no_gradient(where, **{name: x})
        checks.beside(where, name, x, like)
        if not checks.host_reads(x):
            return x
    x = checks.real(where, name, x)
    if not 0 <= x < math.inf:
        raise ValueError(f"{where}: {name} must be finite and not negative, got {x}")
    return x


def total(where, name, x, like):
    """A count, as ``not_negative`` gives it. 16 bits do not hold it."""
    if isinstance(x, torch.Tensor) and x.dtype in (torch.float16, torch.bfloat16):
        raise TypeError(
            f"{where}: {name} has dtype {x.dtype}, which skips counts beyond "
            f"{256 if x.dtype == torch.bfloat16 else 2048}; "
            "keep it an integer or float32"
        )
    return not_negative(where, name, x, like)


TAKEN = ("where", "mask", "mode", "cu_seqlens", "dtype")
"""Arguments of ``weights_for`` that no user gives as a normaliser."""


def keywords(where, given):
    """``normalizers`` as the keywords of ``weights_for``, of which it may decide some alone."""
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise TypeError(f"{where}: normalizers must be a dict of keywords of token_weights, got {type(given).__name__}")
    for name in given:
        if not isinstance(name, str) or name in TAKEN:
            raise TypeError(
                f"{where}: normalizers takes no {name!r}: it is an argument of its own, or decided by the loss"
            )
    return given


def normalizers(where, mode, given, required, optional):
    for name in required:
        if name not in given:
            raise ValueError(f"{where}: aggregation {mode!r} needs {name}")
    for name in given:
        if name not in required and name not in optional:
            known = ", ".join((*required, *optional)) or "none"
            raise ValueError(f"{where}: aggregation {mode!r} takes no {name}; its normalisers are: {known}")
