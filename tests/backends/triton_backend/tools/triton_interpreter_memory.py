"""The options of ``triton_interpreter`` and its memory checks: which addresses belong to a launch's tensors, and who
touched them.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass
class Options:
    debug: bool = True
    bounds: bool = True
    races: bool = True
    strict_sum: bool = True
    poison: bool = True
    tf32: bool = True
    order: str | int = "forward"
    config_index: int = 0
    programs: tuple[int, ...] | None = None


OPTIONS = Options()
REGIONS: list = []  # one list of regions per launch under way


class Region:
    """The set of element addresses of one tensor argument, and who touched them during this launch."""

    def __init__(self, t):
        self.base, self.item = t.data_ptr(), t.element_size()
        dims = sorted(((st, n) for n, st in zip(t.shape, t.stride(), strict=True) if n > 1 and st > 0), reverse=True)
        self.dims, self.count = dims, t.numel()
        self.span = (sum(st * (n - 1) for st, n in dims) + 1) * self.item if self.count else 0
        if self.span == self.count * self.item:
            self.dims = []  # every element of the span is one of the tensor's
        inner = 1
        for st, n in reversed(dims):  # strides that overlap cannot be inverted: then only the span is checked
            if st < inner:
                self.dims = []
                break
            inner += st * (n - 1)
        self.shadow = None  # (writer, reader): program number + 1, reader -1 = several

    def offsets(self, addresses):
        off = addresses - self.base
        inside = (off >= 0) & (off < self.span)
        rest, good = off // self.item, inside & (off % self.item == 0)
        if self.dims:
            rest = np.where(inside, rest, 0)
            for stride, size in self.dims:
                q = rest // stride
                good &= q < size
                rest = rest - q * stride
            good &= rest == 0
        return good, off // self.item

    def tables(self):
        if self.shadow is None:
            # Huge (sparse) tensors: no race check.
            n = self.span // self.item if self.span // self.item <= 1 << 28 else 0
            self.shadow = (np.zeros(n, np.int32), np.zeros(n, np.int32))
        return self.shadow


def touch(builder, ptrs, mask, kind):
    if not (OPTIONS.bounds or OPTIONS.races) or not REGIONS:
        return
    lanes = np.broadcast_to(ptrs.data, np.broadcast_shapes(ptrs.data.shape, mask.data.shape))
    addresses = lanes[np.broadcast_to(mask.data, lanes.shape)].astype(np.int64).ravel()
    if not addresses.size:
        return
    known, lowest, highest = np.zeros(addresses.shape, bool), addresses.min(), addresses.max()
    x, y, z = builder.grid_idx
    program = 1 + x + builder.grid_dim[0] * (y + builder.grid_dim[1] * z)
    for r in REGIONS[-1]:
        if highest < r.base or lowest >= r.base + r.span:
            continue
        good, index = r.offsets(addresses)
        known |= good
        if OPTIONS.races and kind != "atomic" and good.any():
            at = index[good]
            writer, reader = r.tables()
            if not writer.size:
                continue
            clash = (writer[at] != 0) & (writer[at] != program)
            if kind == "store":
                clash |= (reader[at] != 0) & (reader[at] != program)
                writer[at] = program
            else:
                reader[at] = np.where((reader[at] == 0) | (reader[at] == program), program, -1)
            if clash.any():
                raise RuntimeError(
                    f"race: program {(x, y, z)} does a {kind} of an element another program of this "
                    "launch "
                    f"touches too (element {int(at[clash][0])} of a {r.count}-element tensor)"
                )
    if OPTIONS.bounds and not known.all():
        raise IndexError(
            f"out of bounds: program {(x, y, z)}, {kind} of {int((~known).sum())} lanes outside every tensor argument"
        )
