"""Sums and means of sequences, their broadcast back, masks from spans: padded and packed, against float64 loops."""

import pytest
import torch

from rlkernels.sequences import (
    broadcast_to_tokens,
    groups_of,
    last_live_index,
    sequence_means,
    sequence_sums,
    spans_to_mask,
)

MASK = torch.tensor(
    [
        [1, 1, 1, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0, 1, 1],
        [1, 1, 1, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0, 0, 0],
    ],
    dtype=torch.bool,
)
# The packed twin: row 3 has length 0; dead tokens that lie before a row's last live one stay in.
ENDS = [0, 5, 13, 21, 21, 23]
INSIDE = torch.arange(8)[None] < torch.tensor(ENDS).diff()[:, None]
CU = torch.tensor(ENDS)


def values(dtype=torch.float64, seed=0):
    return torch.randn(MASK.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def loop(x, mask, divide):
    """One row after the other, in Python floats."""
    result = []
    for row, live in zip(x.double(), mask, strict=True):
        kept = [float(v) for v, m in zip(row, live, strict=True) if m]
        result.append(sum(kept) / (max(len(kept), 1) if divide else 1))
    return torch.tensor(result, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function,divide", [(sequence_sums, False), (sequence_means, True)])
def test_padded_and_packed_equal_a_loop_over_the_rows(function, divide, dtype):
    x = values(dtype)
    want = loop(x, MASK, divide)
    padded, packed = function(x, MASK), function(x[INSIDE], MASK[INSIDE], CU.int())
    assert padded.dtype == packed.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(padded.double(), want, rtol=1e-7, atol=1e-7 if dtype != torch.float64 else 1e-14)
    torch.testing.assert_close(packed, padded, rtol=1e-14, atol=0)


@pytest.mark.parametrize("function", [sequence_sums, sequence_means])
def test_no_mask_means_that_every_token_lives(function):
    x = values()
    assert torch.equal(function(x), function(x, torch.ones_like(x)))
    assert torch.equal(function(x[INSIDE], cu_seqlens=CU), function(x[INSIDE], torch.ones(23), CU))


def test_a_token_lives_where_its_mask_is_not_zero():
    x, mask = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[3, 0, -1]])
    assert (sequence_sums(x, mask).item(), sequence_means(x, mask).item()) == (5.0, 2.5)
    assert broadcast_to_tokens(torch.tensor([3.0]), mask).tolist() == [[3.0, 0.0, 3.0]]


def test_sequences_may_have_any_leading_shape():
    x = values()
    assert torch.equal(
        sequence_means(x[:4].reshape(2, 2, 8), MASK[:4].reshape(2, 2, 8)), sequence_means(x[:4], MASK[:4]).reshape(2, 2)
    )
    assert sequence_sums(x[0], MASK[0]).shape == ()


@pytest.mark.fault(80)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_over_8192_tokens_keep_float32_digits(dtype):
    x = torch.rand(3, 8192, generator=torch.Generator().manual_seed(2)).to(dtype)
    want = x.double().sum(-1)
    for got in (sequence_sums(x), sequence_sums(x.reshape(-1), cu_seqlens=torch.arange(4) * 8192)):
        torch.testing.assert_close(got.double(), want, rtol=6e-8, atol=0)


@pytest.mark.fault(86)
@pytest.mark.parametrize("function", [sequence_sums, sequence_means])
def test_a_row_has_the_same_bits_with_more_padding_and_other_neighbours(function):
    # 1000 rows and 4000 columns: past every vector width and grain size at which a reduction changes its order.
    x = torch.randn(4, 37, generator=torch.Generator().manual_seed(3)) * 100
    live = torch.rand(4, 37, generator=torch.Generator().manual_seed(4)) < 0.8
    alone = torch.stack([function(x[i : i + 1], live[i : i + 1])[0] for i in range(4)])
    wide = torch.nn.functional.pad(x, (0, 4000), value=float("nan")), torch.nn.functional.pad(live, (0, 4000))
    assert torch.equal(function(*wide), alone)
    assert torch.equal(function(x.repeat(250, 1), live.repeat(250, 1)), alone.repeat(250))
    assert torch.equal(function(x.reshape(-1), live.reshape(-1), torch.arange(5) * 37), alone)
    assert torch.equal(function(x.t().contiguous().t(), live), alone)


@pytest.mark.fault(26)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("function,divide", [(sequence_sums, False), (sequence_means, True)])
def test_dead_garbage_reaches_neither_result_nor_gradient(function, divide, packed):
    upstream = torch.tensor([0.5, -2.0, 3.0, 7.0, 1.5], dtype=torch.float64)
    x = torch.where(MASK, values(), float("nan"))
    x[0, 6], x[1, 4] = float("inf"), -float("inf")
    x, mask, cu = (x[INSIDE], MASK[INSIDE], CU) if packed else (x, MASK, None)
    x.requires_grad_()
    result = function(x, mask, cu)
    torch.testing.assert_close(result, loop(values(), MASK, divide))
    (grad,) = torch.autograd.grad(result, x, upstream)
    want = torch.where(MASK, upstream[:, None] / (MASK.sum(-1).clamp(min=1)[:, None] if divide else 1), 0.0)
    torch.testing.assert_close(grad, want[INSIDE] if packed else want)


@pytest.mark.parametrize("packed", [False, True])
def test_nan_in_a_live_token_poisons_its_sequence_and_no_other(packed):
    x = values()
    x[1, 3] = float("nan")
    result = sequence_sums(x[INSIDE], MASK[INSIDE], CU) if packed else sequence_sums(x, MASK)
    assert result.isnan().tolist() == [False, True, False, False, False]


def test_segment_functions_pass_gradcheck_padded_and_packed():
    x = values().requires_grad_()
    flat = values()[INSIDE].requires_grad_()
    per_row = torch.randn(5, dtype=torch.float64, requires_grad=True)
    for function in (sequence_sums, sequence_means):
        assert torch.autograd.gradcheck(lambda v: function(v, MASK), x)  # noqa: B023
        assert torch.autograd.gradcheck(lambda v: function(v, MASK[INSIDE], CU), flat)  # noqa: B023
    assert torch.autograd.gradcheck(lambda v: broadcast_to_tokens(v, MASK), per_row)
    assert torch.autograd.gradcheck(lambda v: broadcast_to_tokens(v, MASK[INSIDE], CU), per_row)


def test_empty_sequences_sum_to_zero_with_zero_gradients():
    for function in (sequence_sums, sequence_means):
        nothing = torch.full((0,), 1.0, requires_grad=True)
        result = function(nothing, cu_seqlens=torch.tensor([0, 0, 0]))
        assert result.tolist() == [0.0, 0.0]
        (grad,) = torch.autograd.grad(result.sum(), nothing)
        assert grad.shape == (0,)
        assert function(torch.zeros(0), cu_seqlens=torch.tensor([0])).shape == (0,)
        assert function(torch.zeros(2, 0)).tolist() == [0.0, 0.0]
        assert function(torch.full((2, 3), float("nan")), torch.zeros(2, 3)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_broadcast_gives_live_tokens_their_sequences_value_and_dead_tokens_zero(dtype):
    per_row = torch.tensor([1.5, -2.0, 0.25, float("nan"), 4.0], dtype=dtype)  # the empty row's value is nobody's
    want = torch.zeros(5, 8, dtype=torch.float64)
    for i in (0, 1, 2, 4):
        want[i][MASK[i]] = float(per_row[i])
    got = broadcast_to_tokens(per_row, MASK)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(got.double(), want)
    assert torch.equal(broadcast_to_tokens(per_row, MASK[INSIDE], CU).double(), want[INSIDE])


def test_broadcast_is_the_transpose_of_the_sum():
    per_row, upstream = torch.randn(5, dtype=torch.float64, requires_grad=True), values()
    for mask, cu, g in ((MASK, None, upstream), (MASK[INSIDE], CU, upstream[INSIDE])):
        (grad,) = torch.autograd.grad(broadcast_to_tokens(per_row, mask, cu), per_row, g)
        torch.testing.assert_close(grad, loop(upstream, MASK, False))


@pytest.mark.parametrize("function", [sequence_sums, sequence_means, broadcast_to_tokens])
def test_segment_functions_compile_into_one_graph_whatever_the_length(function):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    torch._dynamo.reset()
    compute = torch.compile(function, backend=backend, fullgraph=True)
    for length in (5, 9, 14, 23, 40):
        mask, cu = torch.rand(3, length) < 0.7, torch.tensor([0, 2, 2, length])
        x, flat = (
            (torch.randn(3),) * 2 if function is broadcast_to_tokens else (torch.randn(3, length), torch.randn(length))
        )
        assert torch.equal(compute(x, mask), function(x, mask))
        assert torch.equal(compute(flat, mask[0], cu), function(flat, mask[0], cu))
    assert len(compiled) <= 4  # each layout once as it comes and once for every length


def test_groups_of_any_ids_in_any_order_match_a_loop():
    # One group, all alone, and in between: the number of groups runs from 1 to N.
    for ids in ([4] * 6, [5, 0, -2, 9, 1, 7], [3, -1, 3, 2**40, -1, 3], []):
        ids = torch.tensor(ids, dtype=torch.int64)
        x = torch.arange(1.0, len(ids) + 1, dtype=torch.float64)
        groups = groups_of(ids)
        for how, reduce, initial in (("sum", torch.sum, 0.0), ("min", torch.min, float("inf"))):
            want = [float(reduce(x[ids == i])) for i in ids]
            assert groups.reduce_each(x, how, initial).tolist() == want
        assert int((groups.reduce(torch.ones_like(x)) > 0).sum()) == len(set(ids.tolist()))


def test_the_last_live_token_is_found_through_padding_and_holes():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0], [1, 0, 1, 0, 0]])
    for dtype in (torch.bool, torch.int64, torch.float32):
        assert last_live_index(mask.to(dtype), mask.shape).tolist() == [4, 2, 4, 2]
    assert last_live_index(None, (2, 5)).tolist() == [4, 4]


def test_spans_become_a_mask_over_the_scored_positions():
    assert spans_to_mask([[3, 5], [7, 10]], 10).tolist() == [False, False, True, True, False, False, True, True, True]
    assert spans_to_mask([[3, 5]], 6, shift=False).tolist() == [False, False, False, True, True, False]
    assert spans_to_mask([[0, 2]], 4).tolist() == [True, False, False]  # nothing scores the first token
    assert spans_to_mask([], 3).tolist() == [False, False]
    batch = spans_to_mask(torch.tensor([[[1, 2], [3, 4]], [[2, 4], [0, 0]]]), 4)  # the second row has one span
    assert batch.tolist() == [[True, False, True], [False, True, True]]


BAD = {
    "not a tensor": (
        TypeError,
        "^sequence_sums: values must be a torch.Tensor, got list",
        lambda: sequence_sums([1.0]),
    ),
    "integers": (TypeError, "^sequence_sums: values has dtype torch.int64", lambda: sequence_sums(MASK.long())),
    "a scalar": (ValueError, r"values has shape \(\), expected \[..., L\]", lambda: sequence_sums(torch.tensor(1.0))),
    "B15": (
        ValueError,
        r"^sequence_means: mask has shape \(5,\), expected \(5, "
        r"8\)",
        lambda: sequence_means(values(), MASK[:, 0]),
    ),
    "B16": (
        TypeError,
        "mask must be bool, integer or floating",
        lambda: sequence_means(values(), MASK.to(torch.complex64)),
    ),
    "B40 end": (
        ValueError,
        "cu_seqlens ends at 9, expected the number of tokens, 8",
        lambda: sequence_sums(values()[0], None, torch.tensor([0, 9])),
    ),
    "B40 rows": (
        ValueError,
        r"values has shape \(5, 8\), expected "
        r"\[N\]",
        lambda: sequence_sums(values(), None, torch.tensor([0, 8])),
    ),
    "B40 dtype": (
        TypeError,
        "^broadcast_to_tokens: cu_seqlens must be an int32 or int64 tensor",
        lambda: broadcast_to_tokens(torch.ones(1), MASK[0], torch.tensor([0.0, 8.0])),
    ),
    "F73": (
        ValueError,
        r"^broadcast_to_tokens: values has shape \(5, 1\), expected \(5,\)",
        lambda: broadcast_to_tokens(torch.ones(5, 1), MASK),
    ),
    "one per token": (
        ValueError,
        r"values has shape \(8,\), expected \(1,\)",
        lambda: broadcast_to_tokens(torch.ones(8), MASK[0], torch.tensor([0, 8])),
    ),
    "spans": (
        ValueError,
        r"^spans_to_mask: spans has shape \(1, 3\), expected \[..., K, "
        r"2\]",
        lambda: spans_to_mask([[1, 2, 3]], 5),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    error, message, call = BAD[case]
    with pytest.raises(error, match=message):
        call()
