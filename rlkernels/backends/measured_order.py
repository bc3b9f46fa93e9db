"""The measured choice between GPU backends: which one goes first for an op, a dtype and a class of vocabulary.

``TABLE`` is filled from ``benchmarks/results``, never from expectation. It is empty: nothing has been measured on a GPU
yet, and the order of ``DEVICES`` stands (Triton, then CUDA C++, then eager), except where ``expected_order`` puts CUDA
C++ first by a model. The loser of a measurement stays selectable with ``use_backend``.
"""

LARGE = 65536
TABLE: dict[tuple[str, str, int, str], tuple[str, ...]] = {}
"""``(op, device type, bytes per logit, "small" or "large" vocabulary)`` to backend names, fastest first."""


def vocabulary_class(vocab):
    """``"large"`` from 65536 columns on: a bf16 row is then 128 KiB or more, most of an SM's shared memory or all of
    it.
    """
    return "large" if vocab is not None and vocab >= LARGE else "small"


def preferred(op, device, dtype, vocab, choices):
    """``choices`` with what the table names first."""
    itemsize = 4 if dtype is None else dtype.itemsize
    first = [name for name in TABLE.get((op, device, itemsize, vocabulary_class(vocab)), ()) if name in choices]
    return (*first, *(name for name in choices if name not in first))
