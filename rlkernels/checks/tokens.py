"""The checks that functions over tokens add to ``checks``: packed layouts, groups, normalisers.

The values of ``cu_seqlens`` are read on a CPU, where that is free, and with ``RLKERNELS_CHECK=1`` on every device.
"""

import math

import torch

from rlkernels import checks
from rlkernels.tracing import has_values


def layout(caller, name, x, cu_seqlens):
    """Refuses what is not padded, ``[B, L]``, without ``cu_seqlens``, or packed, ``[N]``, with it."""
    if cu_seqlens is None and x.dim() != 2:
        raise ValueError(
            f"{caller}: {name} has shape {tuple(x.shape)}, expected [B, L], or [N] together with cu_seqlens"
        )
    if cu_seqlens is not None and x.dim() != 1:
        raise ValueError(
            f"{caller}: {name} has shape {tuple(x.shape)}, expected [N]: cu_seqlens says that it is packed; flatten it"
        )


def rows(caller, name, x, cu_seqlens, mask=None):
    """Checks as ``layout`` does, but takes padded sequences of any leading shape, ``[..., L]``.

    Returns the checked offsets of ``segments``, or None without ``cu_seqlens``; ``mask``: see there.
    """
    if x.dim() == 0:
        raise ValueError(f"{caller}: {name} has shape (), expected [..., L], or [N] together with cu_seqlens")
    if cu_seqlens is None:
        return None
    layout(caller, name, x, cu_seqlens)
    return segments(caller, cu_seqlens, x, mask=mask)


def values_are_read(x):
    """Tells whether bad values in ``x`` raise: those of a list, of a CPU, or on demand of any device."""
    return checks.CHECK_VALUES or not isinstance(x, torch.Tensor) or x.device.type == "cpu"


def segments(caller, cu_seqlens, tokens, filled=False, mask=None):
    """Returns ``cu_seqlens`` as offsets that form no address outside of ``tokens``: int64 and contiguous.

    They are a copy, so that no other thread can change them after the check. Where values are read, bad ones raise, and
    with ``filled`` an empty sequence raises, too. Elsewhere the offsets are clamped to the tokens. Under
    ``torch.compile`` a registered op reads them at run time. The program must use its result, because the compiler
    drops an unused op, and the check with it.

    With a ``mask`` the offsets may end before the tokens do. What lies behind is padding: the mask is 0 there, and the
    last sequence takes it in. Where values are not read, the mask is taken at its word.
    """
    count = tokens.shape[0]
    if not isinstance(mask, torch.Tensor) or mask.shape != tokens.shape[:1]:
        mask = None  # a mask of another shape is refused by its own check
    if isinstance(cu_seqlens, (list, tuple)):
        # On the CPU, because the host knows a list and can check it for every device.
        on_the_host = tokens.new_empty((count,), device="cpu")
        return segments(caller, _listed(caller, cu_seqlens), on_the_host, filled, mask).to(tokens.device)
    if not isinstance(cu_seqlens, torch.Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
        got = cu_seqlens.dtype if isinstance(cu_seqlens, torch.Tensor) else type(cu_seqlens).__name__
        raise TypeError(
            f"{caller}: cu_seqlens must be an int32 or int64 tensor, got {got}; a list of ints will do, too"
        )
    checks.tensor(caller, "cu_seqlens", cu_seqlens)
    checks.readable(caller, "cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(
            f"{caller}: cu_seqlens has shape {tuple(cu_seqlens.shape)}, expected [S + 1]: a 0, then the "
            "end of each sequence"
        )
    checks.one_device(caller, "cu_seqlens", cu_seqlens, tokens=tokens)
    if not values_are_read(cu_seqlens):
        if count and cu_seqlens.shape[0] == 1:  # because without a sequence every index of one is out of bounds
            raise ValueError(
                f"{caller}: cu_seqlens has shape (1,), which is no sequence, expected the ends of "
                f"sequences that hold {count} tokens"
            )
        offsets = cu_seqlens.long().clamp(0, count)
        if mask is not None:
            offsets[1:][-1:].fill_(count)
        return offsets
    if not has_values(cu_seqlens):
        return torch.ops.rlkernels.offsets.default(cu_seqlens, count, filled, caller, mask)
    return read_offsets(cu_seqlens, count, filled, caller, mask)


def read_offsets(cu_seqlens, count, filled, caller, mask=None):
    """Reads and checks offsets, and returns them as ``segments`` does."""
    offsets = cu_seqlens.clone() if cu_seqlens.dtype == torch.int64 else cu_seqlens.long()
    ends = offsets.tolist()
    if mask is not None and len(ends) > 1 and ends[-2] <= ends[-1] < count and _is_padding(mask, ends[-1]):
        ends[-1] = count
        offsets[-1:].fill_(count)
    # By sorting, because that takes 10 ns an entry of a sorted list, and a loop over neighbours takes 60.
    if ends[0] != 0 or ends[-1] != count or ends != sorted(ends):
        raise ValueError(f"{caller}: {_fault(ends, count, mask is not None)}")
    if filled and len(set(ends)) != len(ends):
        empty = next(i for i in range(len(ends) - 1) if ends[i] == ends[i + 1])
        raise ValueError(
            f"{caller}: cu_seqlens makes sequence {empty} empty (entries {empty} and {empty + 1} are "
            f"{ends[empty]}), expected a token in each; "
            "leave it out"
        )
    return offsets


def _is_padding(mask, end):
    """Tells whether a mask is 0 from ``end`` on, or may not be read."""
    return end >= 0 and (not checks.host_reads(mask) or not bool((mask[end:] != 0).any()))


def _fault(ends, count, masked):
    """Returns the words for the first fault of bad offsets; ``masked``: padding was looked for."""
    if ends[0] != 0:
        return f"cu_seqlens starts at {ends[0]}, expected 0"
    for i in range(1, len(ends)):
        if ends[i] < ends[i - 1]:
            return f"cu_seqlens decreases from {ends[i - 1]} to {ends[i]} at entry {i}; it must hold cumulative lengths"
    words = f"cu_seqlens ends at {ends[-1]}, expected the number of tokens, {count}"
    return f"{words}, or a mask that is 0 behind its end" if masked and ends[-1] < count else words


def _listed(caller, values):
    """Returns a list of offsets as a tensor on the CPU."""
    for x in values:
        # A SymInt of a compiled program is an integer, but cannot be asked for ``__index__``.
        if isinstance(x, (bool, torch.Tensor)) or not (isinstance(x, (int, torch.SymInt)) or hasattr(x, "__index__")):
            raise TypeError(
                f"{caller}: cu_seqlens must be an int32 or int64 tensor, or a list of ints; got a "
                f"{type(values).__name__} that holds a "
                f"{type(x).__name__}"
            )
        if not -(2**63) <= x < 2**63:
            raise ValueError(f"{caller}: cu_seqlens holds {x}, expected offsets that an int64 can hold")
    return torch.tensor(values, dtype=torch.int64, device="cpu")


def tied(x, offsets):
    """Returns ``x``, and under ``torch.compile`` makes it depend on the offsets.

    The compiler drops offsets that the program does not use, and their check with them.
    """
    # The sum changes nothing, because the first offset is 0.
    return x + offsets[0] if offsets is not None and torch.compiler.is_compiling() else x


def holding(caller, targets, ignore_index):
    """Returns the targets in a dtype that holds ``ignore_index``: int64 where int32 cannot.

    torch would compare int32 targets with the last 32 bits of ``ignore_index``.
    """
    if -(2**31) <= ignore_index < 2**31:
        return targets
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(
            f"{caller}: ignore_index must be a 64-bit integer, got {ignore_index}; take one that no target "
            "has, such as -100"
        )
    return targets.long()


def numbers(caller, name, x):
    """Refuses rewards that are neither floats nor integers nor bools."""
    checks.tensor(caller, name, x)
    if x.dtype not in (*checks.FLOATS, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        raise TypeError(f"{caller}: {name} has dtype {x.dtype}; supported: {checks.FLOAT_NAMES}, bool and integers")


def one_dtype(caller, first, x, **others):
    """Refuses tensors of another dtype than ``x``, the argument named ``first``, unless autocast brings them to one.

    ``others``: the name of each further argument to its tensor, or None.
    """
    for name, other in others.items():
        if other is not None and other.dtype != x.dtype and not _autocast(x.device.type):
            raise TypeError(
                f"{caller}: {name} has dtype {other.dtype}, {first} has {x.dtype}; cast one of them, or use autocast"
            )


def _autocast(kind):
    """Tells whether autocast is on for a kind of device, such as ``"cpu"``."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def ids(caller, name, x, expected):
    """Refuses ids of groups that are not integers of the shape ``expected``."""
    checks.tensor(caller, name, x)
    if x.dtype == torch.bool or x.dtype not in checks.WHOLE:
        raise TypeError(f"{caller}: {name} must be an integer tensor, got {x.dtype}; supported: {checks.WHOLE_NAMES}")
    checks.shape(caller, name, x, expected)


def not_negative(caller, name, x, like):
    """Returns a number from 0 on, or a tensor of shape ``()`` whose value the host may not read.

    ``like``: a tensor on the device of the data.
    """
    if isinstance(x, torch.Tensor):
        checks.tensor(caller, name, x)
        checks.shape(caller, name, x, ())
        checks.no_gradient(caller, **{name: x})
        checks.beside(caller, name, x, like)
        if not checks.host_reads(x):
            return x
    x = checks.real(caller, name, x)
    if not 0 <= x < math.inf:
        raise ValueError(f"{caller}: {name} must be finite and not negative, got {x}")
    return x


def total(caller, name, x, like):
    """Returns a count as ``not_negative`` does; refuses 16-bit floats, because they skip large counts."""
    if isinstance(x, torch.Tensor) and x.dtype in (torch.float16, torch.bfloat16):
        raise TypeError(
            f"{caller}: {name} has dtype {x.dtype}, which skips counts beyond "
            f"{256 if x.dtype == torch.bfloat16 else 2048}; "
            "keep it an integer or float32"
        )
    return not_negative(caller, name, x, like)


RESERVED = ("caller", "mask", "mode", "cu_seqlens", "times", "dtype")
"""The arguments of ``weights_for`` that no user may pass as a normaliser."""


def keywords(caller, options):
    """Returns the argument ``normalizers`` of a loss as keywords of ``weights_for``, {} for None.

    Keywords that the loss itself decides are refused.
    """
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise TypeError(
            f"{caller}: normalizers must be a dict of keywords of token_weights, got {type(options).__name__}"
        )
    for name in options:
        if not isinstance(name, str) or name in RESERVED:
            raise TypeError(
                f"{caller}: normalizers takes no {name!r}: it is an argument of its own, or decided by the loss"
            )
    return options


def normalizers(caller, mode, arguments, required, optional):
    """Refuses normalisers that the mode does not use, and demands those that it requires."""
    for name in required:
        if name not in arguments:
            raise ValueError(f"{caller}: aggregation {mode!r} needs {name}")
    for name in arguments:
        if name not in required and name not in optional:
            known = ", ".join((*required, *optional)) or "none"
            raise ValueError(f"{caller}: aggregation {mode!r} takes no {name}; its normalisers are: {known}")
