"""How wide the accesses to a row are, by the strides that the host sees: read from the PTX, where a masked tail is not
yet mixed with the loop.
"""

from collections import Counter

import cases
import pytest
import torch
import triton_aot
from flat_backend import Flat
from launches import compiled
from measured import record, threads

from rlkernels.backends.triton import launch as backend

WITHIN, VOCAB = 151_936, 151_665


def accesses(call, kind="ld"):
    """``(how many accesses of each width, columns of a tile per thread)`` of the one kernel that the call launches."""
    (launch,) = record(call, "sm_90")
    return Counter(triton_aot._ptx_bits(compiled(launch).asm["ptx"], kind)), launch.constant("LANES") * 8 // threads(
        launch
    )


def odd_rows():
    """bf16 rows of an odd vocabulary, each at a multiple of 16 elements: a head that was padded, cut to its real
    columns.
    """
    x, y, c = torch.empty(4, WITHIN, dtype=torch.bfloat16)[:, :VOCAB], torch.zeros(4, dtype=torch.int64), torch.zeros(4)

    def gradient(out):
        return lambda: Flat(backend).token_stats_backward(
            c, c, None, x, y, 0.7, -100, None, None, c, c, c, None, None, None, out
        )

    def policy(out):
        return lambda: Flat(backend).fused_policy(
            "ppo_clip", x, y, 0.7, -100, None, [c, c], [0.2, 0.2], c, c, "k3", c, c, True, out
        )

    return {
        "statistics": (lambda: Flat(backend).token_stats(x, y, 0.7, -100, None, None, 1), 1, False),
        "gradient": (gradient(None), 1, False),
        "gradient in place": (gradient(x), 1, True),
        "policy": (policy(None), 2, False),
        "policy in place": (policy(x), 2, True),
    }


@pytest.mark.fault(99)
@pytest.mark.parametrize("name", ["statistics", "gradient", "gradient in place", "policy", "policy in place"])
def test_an_odd_vocabulary_in_aligned_rows_is_read_by_128_bits_up_to_its_tail(name):
    call, sweeps, in_place = odd_rows()[name]
    loads, columns = accesses(call)
    assert loads[128] * 8 >= sweeps * columns, f"the main loop is narrow: {loads}"
    assert loads[16] <= sweeps * columns + 2, f"more than the tails and the target's logit are narrow: {loads}"
    if in_place:
        stores, columns = accesses(call, "st")
        assert stores[128] * 8 >= 2 * columns, (
            f"the gradient, or the zeros of a dead row, are written narrowly: {stores}"
        )


# 16-bit logits whose rows follow one another: the row stride is V. An odd V puts rows at every even address, where
# nothing wider exists.
@pytest.mark.fault(99)
@pytest.mark.parametrize("vocab, width", [(50_272, 128), (50_264, 128), (50_260, 64), (50_258, 32), (50_257, 16)])
def test_loads_are_as_wide_as_the_row_stride_allows(vocab, width):
    calls = (
        cases.stats(torch.bfloat16, vocab, 1),
        cases.backward(torch.bfloat16, vocab, (True, True, False)),
        cases.policy("ppo_clip", torch.bfloat16, vocab),
    )
    for call in calls:
        loads, columns = accesses(call)
        assert loads[width] * width // 16 >= columns and not sum(
            n for bits, n in loads.items() if bits > max(width, 64)
        ), loads
