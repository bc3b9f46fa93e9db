"""The sizes of a head's chunks on an accelerator: arithmetic that counts tiles and waves of its three matmuls.

A library computes a matmul in tiles of 128 x 256 results, a tile per multiprocessor at a time, which is a wave. So a
chunk of 1168 rows takes the time of 1280, and 160 tiles take that of two waves on 132 multiprocessors. Every cost here
is a model of such a device, because nothing was measured on one.
"""

import collections
import functools
from typing import NamedTuple

from rlkernels.linear.chunking import ROWS

TILE_ROWS, TILE_COLUMNS = 128, 256
SLICES = 1, 2, 4, 8, 16
"""The ways in which a library divides the depth of a matmul that has too few tiles for a wave."""
SLICE_TICKS = 730
"""The cost of a slice beside its matmul: its tile of fp32 is written, and read by the sum of the slices.

A tick is a number of depth of a wave of tiles: 11 ns at 790 TFLOP/s on 132 multiprocessors.
"""
PASS_TICKS = 365
"""The cost of a stretch beside its matmuls, per wave of the weight's gradient, which is read and written in fp32.

Half of its 730 ticks at 4.3 TB/s, because the other half is supposed to hide behind the matmul.
"""
CHUNK_TICKS = 5500
"""The cost of a chunk beside its matmuls: 60 us, in which some 30 small launches run."""
ROWS_PER_BYTE = 92
"""So many rows are multiplied in the time that a byte per number of the weight is moved, at 790 TFLOP/s and 4.3 TB/s.

A matmul of fewer rows takes the time of its bytes: 2 of the weight, or 8 of its gradient.
"""
FURTHER = 2, 20
"""The plans that are looked at first, and those where none of these will do; see ``_divisions``."""


class HeadShape(NamedTuple):
    """Vocabulary, hidden size, and the multiprocessors of the device; 1 where its waves are not known."""

    vocab: int
    hidden: int
    multiprocessors: int

    def filled_ticks(self, rows):
        """Returns the ticks of one matmul of so many rows if all tiles and waves were full."""
        return rows * self.vocab * self.hidden / (TILE_ROWS * TILE_COLUMNS * self.multiprocessors)

    def waves(self, rows, columns, slices=1):
        """Returns the waves of ``slices`` matmuls that have ``[rows, columns]`` results each."""
        return _up(_up(rows, TILE_ROWS) * _up(columns, TILE_COLUMNS) * slices, self.multiprocessors)


@functools.lru_cache(4096)
def _logits_ticks(shape, tiles):
    """Returns the ticks of ``[rows, H] x [H, V]``, the rows in so many tiles."""
    return max(shape.waves(tiles * TILE_ROWS, shape.vocab) * shape.hidden, shape.filled_ticks(2 * ROWS_PER_BYTE))


@functools.lru_cache(4096)
def _hidden_ticks(shape, tiles):
    """Returns the ticks of ``[rows, V] x [V, H]``, whose depth a library divides where that is faster."""
    sliced = (
        shape.waves(tiles * TILE_ROWS, shape.hidden, n) * (_up(shape.vocab, n) + (SLICE_TICKS if n > 1 else 0))
        for n in SLICES
    )
    return max(min(sliced), shape.filled_ticks(2 * ROWS_PER_BYTE))


@functools.lru_cache(64)
def _weight_waves(shape):
    """Returns the waves of the weight's gradient, ``[V, rows] x [rows, H]``."""
    return shape.waves(shape.vocab, shape.hidden)


def ticks(stretches, shape):
    """Returns the ticks of the three matmuls of these ``stretches``, each a tuple of the sizes of its chunks."""
    least, total = shape.filled_ticks(8 * ROWS_PER_BYTE), 0
    for sizes, count in collections.Counter(stretches).items():
        rows = sum(sizes)
        of_logits = sum(n * _logits_ticks(shape, _up(x, TILE_ROWS)) for x, n in collections.Counter(sizes).items())
        of_gradients = _hidden_ticks(shape, _up(rows, TILE_ROWS)) + max(_weight_waves(shape) * rows, least)
        total += count * (of_logits + of_gradients)
    return total


def waste(stretches, shape):
    """Returns the ticks of these ``stretches`` over those that their multiplications fill, less 1."""
    return ticks(stretches, shape) / shape.filled_ticks(3 * sum(map(sum, stretches))) - 1


def full_chunks(rows, size):
    """Returns a stretch for each chunk of ``size`` rows, and for the last one, which holds the rest."""
    return ((size,),) * (rows // size) + ((rows % size,),) * (rows % size > 0)


def cost(stretches, shape):
    """Returns the ticks of these ``stretches`` with what chunks and stretches cost beside their matmuls."""
    beside = len(stretches) * _weight_waves(shape) * PASS_TICKS + sum(map(len, stretches)) * CHUNK_TICKS
    return ticks(stretches, shape) + beside


@functools.lru_cache(256)
def planned_stretches(rows, limit, shape, keeps):
    """Returns the stretches of so many rows, each a tuple of the sizes of its chunks.

    A stretch is one chunk of at most ``limit`` rows. With ``keeps`` it is several, whose gradients are kept in 16 bits
    beside fp32 logits, in the memory of ``limit`` rows of both. Rows that fit in one chunk are one.

    Sizes are multiples of 128 that differ by 128 at most, but for the last one, which lacks less than 128 rows. Of such
    plans the cheapest is taken that takes no more ticks than ``full_chunks``. Where none does, the cheapest of all and
    of ``full_chunks`` is.
    """
    plain = full_chunks(rows, limit)
    if len(plain) < 2:
        return plain
    most = ticks(plain, shape)
    for further in FURTHER:
        found = sorted((_even_cost(shape, *divided), divided) for divided in _divisions(rows, limit, keeps, further))
        for _, divided in found:
            stretches = _stretches(rows, *divided)
            if ticks(stretches, shape) <= most:
                return stretches
    return min([plain, *(_stretches(rows, *divided) for _, divided in found[:1])], key=lambda x: cost(x, shape))


def _divisions(rows, limit, keeps, further):
    """Yields ``(unit, units, stretches, chunks per stretch)`` of plans that are nearly equal.

    They have up to ``further`` more chunks per stretch than the fewest, and stretches down to so many tiles less than a
    full chunk.
    """
    # 128 rows more or less are much of a chunk that holds few.
    unit = TILE_ROWS if limit >= 4 * TILE_ROWS else ROWS
    units, room, before = _up(rows, unit), limit // unit, 0
    # A row of logits takes 4 bytes per column, its gradient 2, and the limit is for 6.
    for longest in range(3 * limit // unit - 2 if keeps else room, max(room - further, 1) - 1, -1):
        count = _up(units, longest)
        if count > before:
            before, largest = count, _up(units, count)
            least = _up(largest, (3 * limit - largest * unit) // (2 * unit) if keeps else room)
            # Two units at least, because the last chunk lacks up to one.
            most = max(units // count // 2, 1)
            for chunks in range(least, min(least + (further if keeps else 1), most + 1)):
                yield unit, units, count, chunks


def _even_cost(shape, unit, units, count, chunks):
    """Returns the cost of a division, its last chunk filled up."""
    least, total = shape.filled_ticks(8 * ROWS_PER_BYTE), 0
    for stretch, times in _even(units, count):
        of_logits = sum(n * _logits_ticks(shape, _up(size * unit, TILE_ROWS)) for size, n in _even(stretch, chunks))
        of_hidden = _hidden_ticks(shape, _up(stretch * unit, TILE_ROWS))
        total += times * (of_logits + of_hidden + max(_weight_waves(shape) * stretch * unit, least))
    return total + count * (_weight_waves(shape) * PASS_TICKS + chunks * CHUNK_TICKS)


def _stretches(rows, unit, units, count, chunks):
    """Returns the stretches of a division."""
    stretches = [
        tuple(size * unit for size, n in _even(stretch, chunks) for _ in range(n))
        for stretch, times in _even(units, count)
        for _ in range(times)
    ]
    *others, last = stretches[-1]
    return (*stretches[:-1], (*others, last - (unit * units - rows)))


def _even(units, count):
    """Returns ``(size, how many)`` of ``count`` nearly equal parts, in ascending order."""
    each, more = divmod(units, count)
    return ((each, count - more), (each + 1, more)) if more else ((each, count),)


def _up(x, divisor):
    return -(-x // divisor)
