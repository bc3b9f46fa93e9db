"""Nothing is left unwritten: every result is the same where empty memory is NaN."""

from contextlib import contextmanager

import pytest
import torch
from public_calls import CALLS, call, data, policy, rows_of
from reference import cotangents, draw_rows, same_bits


@contextmanager
def nan_filled_empty():
    """``torch.empty`` returns NaN: an output that is never written shows."""
    before, fill = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.mark.fault(12)
@pytest.mark.parametrize("name", CALLS)
def test_nothing_is_left_unwritten_where_empty_memory_is_nan(name, backend):
    expected = call(name, data())
    with nan_filled_empty():
        assert torch.empty(3).isnan().all() and torch.zeros(2).new_empty(3).isnan().all()
        got = call(name, data())
    for k, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert same_bits(a, b), f"result {k} of {name}"
        assert not a.is_floating_point() or not a.isnan().any(), f"result {k} of {name}"


@pytest.mark.fault(12)
def test_every_row_is_written_also_where_all_are_dead(backend):
    x, _, _ = draw_rows((4,), 133)
    dead = torch.full((4,), -100)
    with nan_filled_empty():
        for result in rows_of(x, dead, cotangents((4,), 3), ref_logits=x):
            assert not result.any()
        for result in policy(x, dead, [torch.zeros(4)] * 3):
            assert not result.any()
        alive = torch.zeros(4, dtype=torch.int64)
        zero = torch.zeros(4)
        # No upstream gradient: row not read, but written.
        assert not rows_of(x, alive, (zero, zero, zero), ref_logits=x)[-1].any()
