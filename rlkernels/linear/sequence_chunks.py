"""The order of a head's rows for losses of whole sequences or pairs: which rows belong to a unit, and which units share
a chunk.
"""

from typing import NamedTuple

import torch

from rlkernels.linear.chunking import Rows, bounded_rows
from rlkernels.sequences import segment_reduce


class Units(NamedTuple):
    """Rows in the order of the units that a loss is scored by; unit ``i`` owns ``index[ends[i]:ends[i + 1]]``.

    ``offsets``: on the device, the ends of the sequences that units are made of, ``offsets[::per_unit] == ends``.
    ``moving``: how many units, from the first on, may have a gradient; None: all.
    """

    index: torch.Tensor
    ends: list
    offsets: torch.Tensor | None = None
    dead: torch.Tensor | None = None
    moving: int | None = None

    def rows(self, first, last):
        here = slice(self.ends[first], self.ends[last])
        return Rows(self.index[here], None if self.dead is None else self.dead[here])

    def chunks(self, size):
        """``(first unit, last unit)`` of each chunk: as many whole units as fit, one at least; all of them may move, or
        none.
        """
        first, units = 0, len(self.ends) - 1
        while first < units:
            limit, last = self.moving if self.moves(first) and self.moving else units, first + 1
            while last < limit and self.ends[last + 1] - self.ends[first] <= size:
                last += 1
            yield first, last
            first = last

    def moves(self, first):
        """Tell whether the units of the chunk that begins with ``first`` may have a gradient."""
        return self.moving is None or first < self.moving

    def cu_seqlens(self, first, last):
        """Offsets of the sequences of units ``first`` to ``last``."""
        per_unit = (self.offsets.shape[0] - 1) // max(len(self.ends) - 1, 1)
        offsets = self.offsets[first * per_unit : last * per_unit + 1]
        return offsets - offsets[:1]


class AllAtOnce(NamedTuple):
    """All ``count`` units at once: where they end is known to the device alone.

    The rows that fill the bound stand behind the last sequence's.

    Rows that do not fit in a chunk are swept twice, as those of a unit that outgrows one.
    """

    found: Rows
    count: int
    offsets: torch.Tensor

    def rows(self, first, last):
        return self.found

    def chunks(self, size):
        yield 0, self.count

    def moves(self, first):
        return True

    def cu_seqlens(self, first, last):
        return torch.cat([self.offsets[:-1], self.offsets.new_full((1,), len(self.found))])


def units(live, sequence, count, per_unit=1, bound=None, still=None):
    """Live rows by sequence (``sequence``: ``[T]``, of ``count``), ``per_unit`` sequences to a unit.

    One host read, the lengths; none with a ``bound``.

    ``still``: rows without a gradient. A sequence of such rows alone comes behind the others, as unit ``count`` and
    more: there is a place for each sequence on either side, one of them empty.
    """
    order, offsets = _by_sequence(torch.where(live, sequence, count), count)
    if bound is not None:
        return AllAtOnce(bounded_rows(live, bound, order), count // per_unit, offsets)
    if still is None:
        ends = offsets[::per_unit].tolist()
        return Units(order[: ends[-1]], ends, offsets)
    moves = segment_reduce((~still)[order].double(), offsets) > 0
    place = torch.arange(count, device=live.device)
    place = torch.where(moves, place, place + count)
    order, offsets = _by_sequence(torch.where(live, place[sequence], 2 * count), 2 * count)
    ends = offsets.tolist()
    return Units(order[: ends[-1]], ends, offsets, moving=count)


def _by_sequence(sequence, count):
    """Rows in the order of their sequences, and where each of the ``count`` sequences begins and ends; bincount would
    wait for the device.
    """
    ordered, order = torch.sort(sequence, stable=True)
    return order, torch.searchsorted(ordered, torch.arange(count + 1, device=sequence.device))


def blocks(rows, size):
    """Rows that belong to no sequence, cut anywhere."""
    return Units(rows.index, [*range(0, len(rows), size), len(rows)], None, rows.dead)
