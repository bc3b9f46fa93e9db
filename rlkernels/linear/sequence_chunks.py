"""The order of a head's rows for losses of whole sequences or pairs.

Such a loss is scored by unit: a unit is a sequence, or the ``per_unit`` sequences of a pair. A plan lays the live rows
out by unit, and says which units share a chunk.
"""

from typing import NamedTuple

import torch

from rlkernels.linear.chunking import RowSelection, bounded_rows
from rlkernels.sequences import segment_reduce


class SequencePlan(NamedTuple):
    """Rows in the order of their units; unit ``i`` owns ``index[ends[i]:ends[i + 1]]``.

    ``offsets``: on the device, the ends of the sequences that the units consist of, ``offsets[::per_unit] == ends``.
    ``padding``: of the rows, as in ``RowSelection``. ``trained``: so many units, from the first on, may have a
    gradient; None: all.
    """

    index: torch.Tensor
    ends: list
    offsets: torch.Tensor | None = None
    padding: torch.Tensor | None = None
    trained: int | None = None

    def rows(self, first, last):
        """Selects the rows of the units ``[first, last)``."""
        here = slice(self.ends[first], self.ends[last])
        return RowSelection(self.index[here], None if self.padding is None else self.padding[here])

    def chunks(self, size):
        """Yields ``(first unit, end)`` of each chunk: as many whole units as ``size`` rows hold, one at least.

        Units with and without a gradient never share a chunk, because the latter skip the matmuls of the gradient.
        """
        first, units = 0, len(self.ends) - 1
        while first < units:
            limit, last = self.trained if self.has_gradient(first) and self.trained else units, first + 1
            while last < limit and self.ends[last + 1] - self.ends[first] <= size:
                last += 1
            yield first, last
            first = last

    def has_gradient(self, first):
        """Tells whether the units of the chunk that begins with unit ``first`` may have a gradient."""
        return self.trained is None or first < self.trained

    def cu_seqlens(self, first, last):
        """Returns the offsets of the sequences of the units ``[first, last)``, from 0 on."""
        per_unit = (self.offsets.shape[0] - 1) // max(len(self.ends) - 1, 1)
        offsets = self.offsets[first * per_unit : last * per_unit + 1]
        return offsets - offsets[:1]


class WholeBatchPlan(NamedTuple):
    """All ``count`` units in one chunk, because the ends of the units are known to the device alone.

    The padding rows of the bound stand behind the rows of the last sequence. Rows that do not fit in one chunk are
    multiplied twice, as those of a unit that outgrows a chunk.
    """

    selection: RowSelection
    count: int
    offsets: torch.Tensor

    def rows(self, first, last):
        return self.selection

    def chunks(self, size):
        yield 0, self.count

    def has_gradient(self, first):
        return True

    def cu_seqlens(self, first, last):
        return torch.cat([self.offsets[:-1], self.offsets.new_full((1,), len(self.selection))])


class RowPlan(NamedTuple):
    """Rows that belong to no sequence. Each unit is a chunk, one of the ``parts`` once there are chunks."""

    selection: RowSelection
    parts: tuple = ()
    offsets: None = None

    def in_chunks(self, sizes):
        """Returns the plan with chunks of these sizes."""
        return RowPlan(self.selection, tuple(self.selection.cut(sizes)))

    def rows(self, first, last):
        return self.parts[first]

    def chunks(self, size):
        return ((i, i + 1) for i in range(len(self.parts)))

    def has_gradient(self, first):
        return True


def plan_sequences(live, sequence, count, per_unit=1, bound=None, zero_gradient=None):
    """Lays out the live rows by sequence, ``per_unit`` sequences to a unit.

    The host reads the lengths of the sequences, once; with a ``bound`` for the number of live rows it reads nothing.

    Args:
        live: bool ``[T]``. sequence: int ``[T]``, which of ``count`` sequences a row belongs to.
        zero_gradient: bool ``[T]``, the rows without a gradient, or None. A sequence that consists of such rows alone
            is moved behind the others, to unit ``count + i`` instead of ``i``. So there are ``2 count`` units, and one
            of ``i`` and ``count + i`` is empty.
    """
    order, offsets = _by_sequence(torch.where(live, sequence, count), count)
    if bound is not None:
        return WholeBatchPlan(bounded_rows(live, bound, order), count // per_unit, offsets)
    if zero_gradient is None:
        ends = offsets[::per_unit].tolist()
        return SequencePlan(order[: ends[-1]], ends, offsets)
    trained = segment_reduce((~zero_gradient)[order].double(), offsets) > 0
    unit = torch.arange(count, device=live.device)
    unit = torch.where(trained, unit, unit + count)
    order, offsets = _by_sequence(torch.where(live, unit[sequence], 2 * count), 2 * count)
    ends = offsets.tolist()
    return SequencePlan(order[: ends[-1]], ends, offsets, trained=count)


def _by_sequence(sequence, count):
    """Returns the rows in the order of their sequences, and the ends of the ``count`` sequences.

    A search in the sorted numbers, because ``bincount`` would wait for the device.
    """
    ordered, order = torch.sort(sequence, stable=True)
    return order, torch.searchsorted(ordered, torch.arange(count + 1, device=sequence.device))
