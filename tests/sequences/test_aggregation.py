"""Every aggregation is a weight vector: the trainers' formulas written out, padded against packed, and what must not
matter.
"""

import pytest
import torch

from rlkernels.aggregation import AGGREGATIONS, aggregate, token_weights

# Holes at the start, in the middle and at the end of a row; one row without a live token; lengths 0 to L.
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
B, L = MASK.shape
GROUPS = torch.tensor([7, -3, 7, 7, -3])  # unsorted, ragged, negative
ROLLOUTS = torch.tensor([2, 9, 2, 4, 9])
LOSS = torch.randn(B, L, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def row_sums(loss, mask):
    return [float((loss[i] * mask[i]).sum()) for i in range(len(loss))]


def lengths(mask):
    return [float(row.sum()) for row in mask]


def verl_seq_mean_token_mean(loss, mask):
    """verl core_algos.agg_loss: rows without tokens are dropped."""
    means = [s / n for s, n in zip(row_sums(loss, mask), lengths(mask), strict=True) if n > 0]
    return sum(means) / len(means)


def trl_grpo(loss, mask):
    """TRL grpo_trainer: ``((loss * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()``."""
    return float(((loss * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean())


def verl_seq_mean_token_sum(loss, mask):
    alive = [s for s, n in zip(row_sums(loss, mask), lengths(mask), strict=True) if n > 0]
    return sum(alive) / len(alive)


def skyrl_prompt_mean(loss, mask, groups, count_empty):
    """SkyRL: each prompt's token mean, averaged over prompts."""
    means = []
    for group in groups.unique():
        rows = groups == group
        tokens = float(mask[rows].sum())
        if tokens or count_empty:
            means.append(float((loss[rows] * mask[rows]).sum()) / max(tokens, 1))
    return sum(means) / len(means)


def agent_lightning_rollout_mean(loss, mask, rollouts):
    """agent-lightning: every token divided by the tokens of its rollout and the number of rows."""
    total = 0.0
    for rollout in rollouts.unique():
        rows = rollouts == rollout
        total += float((loss[rows] * mask[rows]).sum()) / max(float(mask[rows].sum()), 1)
    return total / len(mask)


def mean_of_group_means(loss, mask, groups):
    """Mean over groups of the mean over their live rows of the mean over a row's tokens."""
    means = []
    for group in groups.unique():
        rows = [i for i in range(len(mask)) if groups[i] == group and mask[i].any()]
        if rows:
            means.append(sum(float(loss[i][mask[i]].mean()) for i in rows) / len(rows))
    return sum(means) / len(means)


TOTAL, TOKENS = float((LOSS * MASK).sum()), float(MASK.sum())
FORMULAS = {
    "TRL bnpo, verl and OpenRLHF token mean": (TOTAL / TOKENS, "token-mean", {}),
    "token mean of a rank, of 100 tokens on 4 ranks": (
        TOTAL / 100 * 4,
        "token-mean",
        {"batch_num_tokens": 100, "dp_size": 4},
    ),
    "verl seq-mean-token-mean": (verl_seq_mean_token_mean(LOSS, MASK), "seq-mean-token-mean", {}),
    "TRL grpo": (trl_grpo(LOSS, MASK), "seq-mean-token-mean", {"count_empty_rows": True}),
    "TRL grpo, 4 accumulation steps": (
        trl_grpo(LOSS, MASK) / 4,
        "seq-mean-token-mean",
        {"count_empty_rows": True, "scale": 1 / 4},
    ),
    "verl seq-mean-token-sum": (verl_seq_mean_token_sum(LOSS, MASK), "seq-mean-token-sum", {}),
    "a sum over a global batch of 64 rows": (TOTAL / 64 * 2, "seq-mean-token-sum", {"num_sequences": 64, "dp_size": 2}),
    "verl seq-mean-token-sum-norm": (verl_seq_mean_token_sum(LOSS, MASK) / L, "seq-mean-token-sum-norm", {}),
    "its horizon given": (verl_seq_mean_token_sum(LOSS, MASK) / 32, "seq-mean-token-sum-norm", {"horizon": 32}),
    "token sum": (TOTAL, "token-sum", {}),
    "TRL dr_grpo": (TOTAL / (B * 32), "fixed-horizon", {"horizon": 32}),
    "TRL dapo, 2 processes": (TOTAL / (1234.0 / 2), "global-token-mean", {"batch_num_tokens": 1234.0, "dp_size": 2}),
    "TRL dapo, 4 steps per generation, 2 accumulated": (
        TOTAL / 50 * 4 / 2,
        "global-token-mean",
        {"batch_num_tokens": 50, "scale": 4 / 2},
    ),
    "SkyRL prompt mean": (skyrl_prompt_mean(LOSS, MASK, GROUPS, False), "prompt-mean", {"group_ids": GROUPS}),
    "agent-lightning": (agent_lightning_rollout_mean(LOSS, MASK, ROLLOUTS), "rollout-mean", {"rollout_ids": ROLLOUTS}),
    "row mean": (verl_seq_mean_token_mean(LOSS, MASK), "seq-mean", {}),
    "group mean": (mean_of_group_means(LOSS, MASK, GROUPS), "group-mean", {"group_ids": GROUPS}),
}


@pytest.mark.fault(30)
@pytest.mark.parametrize("case", FORMULAS)
def test_aggregation_equals_the_trainers_formula(case):
    want, mode, options = FORMULAS[case]
    got = aggregate(LOSS, MASK, mode, **options)
    assert float(got) == pytest.approx(want, rel=1e-12)
    in_float32 = token_weights(MASK, mode, **options)
    assert in_float32.dtype == torch.float32
    # One rounding per weight: the terms may cancel, so the error is measured against their absolute sum.
    assert float((in_float32.double() * LOSS).sum()) == pytest.approx(
        want, abs=6e-8 * float((in_float32 * LOSS.abs()).sum())
    )


def test_every_aggregation_has_a_formula():
    assert {mode for _, mode, _ in FORMULAS.values()} == set(AGGREGATIONS)


def test_an_empty_prompt_counts_when_asked_to():
    groups = torch.tensor([7, -3, 7, 5, -3])  # group 5 is the row without tokens
    for count in (False, True):
        got = aggregate(LOSS, MASK, "prompt-mean", group_ids=groups, count_empty_rows=count)
        assert float(got) == pytest.approx(skyrl_prompt_mean(LOSS, MASK, groups, count), rel=1e-12)


def options_of(mode, rows=B):
    """Arguments that let ``mode`` run on a batch of ``rows`` rows."""
    groups, rollouts = {"group_ids": GROUPS[:rows]}, {"rollout_ids": ROLLOUTS[:rows]}
    needs = {
        "fixed-horizon": {"horizon": 16},
        "seq-mean-token-sum-norm": {"horizon": 16},
        "global-token-mean": {"batch_num_tokens": 40},
        "prompt-mean": groups,
        "group-mean": groups,
        "rollout-mean": rollouts,
    }
    return needs.get(mode, {})


def packed(mask):
    """Rows cut to lengths that keep every live token, and one of length 0: the packed twin of a padded batch."""
    keep = [int(row.nonzero().max()) + 1 if row.any() else 0 for row in mask]
    inside = torch.arange(mask.shape[1])[None] < torch.tensor(keep)[:, None]
    return inside, torch.tensor([0, *keep]).cumsum(0)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_packed_weights_equal_padded_weights(mode, index_dtype):
    inside, cu_seqlens = packed(MASK)
    options = options_of(mode)
    padded = token_weights(MASK, mode, **options)
    assert torch.equal(
        token_weights(MASK[inside], mode, cu_seqlens=cu_seqlens.to(index_dtype), **options), padded[inside]
    )


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_a_mask_of_any_dtype_gives_the_same_weights(mode, dtype):
    assert torch.equal(
        token_weights(MASK.to(dtype), mode, **options_of(mode)), token_weights(MASK, mode, **options_of(mode))
    )


def test_a_token_lives_where_its_mask_is_not_zero():
    mask = torch.tensor([[3, 0, 1, -1]])  # integers: the ids of packed documents, say; floats are 0 and 1 alone
    assert token_weights(mask).tolist() == token_weights(mask != 0).tolist()


@pytest.mark.fault(86)
@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_more_padding_changes_no_weight(mode):
    padded = torch.nn.functional.pad(MASK, (3, 50))
    assert torch.equal(
        token_weights(padded, mode, **options_of(mode))[:, 3:-50], token_weights(MASK, mode, **options_of(mode))
    )


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_inserted_dead_tokens_change_neither_value_nor_gradient(mode):
    place = torch.tensor([0, 2, 3, 7, 8, 9, 11, 12])  # 5 dead tokens between, before and behind the old ones
    loss, mask = torch.full((B, 13), float("nan"), dtype=torch.float64), torch.zeros(B, 13, dtype=torch.bool)
    loss[:, place], mask[:, place] = LOSS, MASK
    compact, inserted = LOSS.clone().requires_grad_(), loss.requires_grad_()
    values = [aggregate(x, m, mode, **options_of(mode)) for x, m in ((compact, MASK), (inserted, mask))]
    assert values[0].item() == pytest.approx(values[1].item(), rel=1e-14)
    (want,), (got,) = torch.autograd.grad(values[0], compact), torch.autograd.grad(values[1], inserted)
    assert torch.equal(got[:, place], want)
    assert float(got.abs().sum()) == pytest.approx(float(want.abs().sum()), rel=1e-14)  # nothing on the inserted ones


@pytest.mark.fault(26)
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_garbage_under_the_mask_changes_nothing(mode, garbage):
    dirty = torch.where(MASK, LOSS, garbage).requires_grad_()
    value = aggregate(dirty, MASK, mode, **options_of(mode))
    assert torch.equal(value, aggregate(LOSS, MASK, mode, **options_of(mode)))
    (grad,) = torch.autograd.grad(value, dirty)
    assert torch.equal(grad, token_weights(MASK, mode, dtype=torch.float64, **options_of(mode)))


def test_nan_in_a_live_token_is_not_hidden():
    dirty = LOSS.clone()
    dirty[0, 0] = float("nan")
    assert aggregate(dirty, MASK).isnan()


@pytest.mark.fault(23)
@pytest.mark.parametrize("layout", ["padded", "packed", "no rows"])
@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_no_live_token_gives_zero_with_zero_gradients(mode, layout):
    loss, cu_seqlens = torch.randn(3, 4), None
    if layout == "packed":
        loss, cu_seqlens = torch.randn(12), torch.tensor([0, 5, 5, 12])
    elif layout == "no rows":
        loss = torch.randn(0, 4)
    rows = loss.shape[0] if cu_seqlens is None else 3
    loss.requires_grad_()
    options = options_of(mode, rows) | ({"count_empty_rows": True} if rows == 0 else {})
    value = aggregate(loss, torch.zeros_like(loss), mode, cu_seqlens=cu_seqlens, **options)
    assert value.item() == 0.0
    (grad,) = torch.autograd.grad(value, loss)
    assert torch.equal(grad, torch.zeros_like(grad))


def test_a_global_count_of_zero_gives_zero_weights():
    nothing = torch.zeros(2, 3)
    for total in (0, torch.tensor(0), torch.tensor(0.0)):
        assert torch.equal(token_weights(nothing, "global-token-mean", batch_num_tokens=total), nothing)


@pytest.mark.fault(30)
@pytest.mark.parametrize(
    "mode,total,normalizers",
    [
        ("token-mean", "batch_num_tokens", {}),
        ("seq-mean-token-mean", "num_sequences", {}),
        ("seq-mean-token-sum", "num_sequences", {}),
        ("fixed-horizon", "num_sequences", {"horizon": 32}),
    ],
)
def test_micro_batches_on_two_ranks_add_up_to_the_whole_batch(mode, total, normalizers):
    counted = {
        "batch_num_tokens": int(MASK.sum()),
        "num_sequences": B if mode == "fixed-horizon" else int(MASK.any(-1).sum()),
    }[total]
    whole = aggregate(LOSS, MASK, mode, **normalizers)
    options = {total: torch.tensor(counted), "dp_size": 2, **normalizers}
    ranks = []
    # Two micro-batches each: unequal, one without a live token.
    for rank in ((slice(0, 2), slice(2, 3)), (slice(3, 4), slice(4, 5))):
        ranks.append(sum(aggregate(LOSS[part], MASK[part], mode, **options) for part in rank))
    assert float(sum(ranks) / 2) == pytest.approx(float(whole), rel=1e-12)  # data parallelism averages


def test_rows_of_losses_are_weighted_without_a_token_axis():
    live, groups = torch.tensor([1, 1, 0, 1]), torch.tensor([5, 2, 2, 5])
    assert token_weights(live, "seq-mean").tolist() == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3])
    assert token_weights(live, "seq-mean", count_empty_rows=True).tolist() == pytest.approx([1 / 4, 1 / 4, 0, 1 / 4])
    assert token_weights(live, "group-mean", group_ids=groups).tolist() == pytest.approx([1 / 4, 1 / 2, 0, 1 / 4])


@pytest.mark.fault(80)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_mean_over_8192_tokens_of_16_bits_is_a_float32_mean(dtype):
    loss = torch.rand(2, 8192, generator=torch.Generator().manual_seed(1)).to(dtype)
    want = loss.double().mean()
    got = aggregate(loss)
    assert got.dtype == torch.float32
    assert float(got) == pytest.approx(float(want), rel=2e-6)


def test_weights_count_more_tokens_than_float32_can():
    mask = torch.ones(2**24 + 2, dtype=torch.bool)  # 2**24 + 1 is no float32
    assert token_weights(mask, dtype=torch.float64)[0].item() == 1 / (2**24 + 2)


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_weights_compile_into_one_graph_whatever_the_length(mode):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    torch._dynamo.reset()
    options = options_of(mode, 3)
    compute = torch.compile(
        lambda mask, cu: token_weights(mask, mode, cu_seqlens=cu, **options), backend=backend, fullgraph=True
    )
    for length in (5, 9, 14, 23, 40):
        padded = torch.rand(3, length) < 0.7
        assert torch.equal(compute(padded, None), token_weights(padded, mode, **options))
        cu_seqlens = torch.tensor([0, 2, 2, length])
        assert torch.equal(
            compute(padded[0], cu_seqlens), token_weights(padded[0], mode, cu_seqlens=cu_seqlens, **options)
        )
    assert len(compiled) <= 4  # each layout once as it comes and once for every length
