"""process_reward_loss and solution_scores against cross-entropies and reductions written out step by step."""

import math

import pytest
import torch
from reference import same_bits

import rlkernels as rlk

NAN, INF = math.nan, math.inf
B, L, V, STEP = 3, 6, 11, 9
REWARD_IDS = (7, 2)


def problem(dtype=torch.float64, soft=False, seed=0):
    draw = torch.Generator().manual_seed(seed)
    logits = (2 * torch.randn(B, L, V, generator=draw, dtype=torch.float64)).to(dtype)
    ids = torch.where(torch.rand(B, L, generator=draw) < 0.6, STEP, 1)
    ids[0, 0] = ids[1, 2] = ids[2, 5] = STEP
    if soft:
        labels = torch.rand(B, L, generator=draw, dtype=torch.float64)
        labels[0, 0], labels[2, 5] = 1.0, 0.0
    else:
        labels = torch.tensor(REWARD_IDS)[torch.randint(2, (B, L), generator=draw)]
    labels[1, 2] = -100
    return logits, labels, ids


def truth(logits, labels, live, columns=None):
    """The mean of the cross-entropies, one live step after the other, and the share of hits among ``live``."""
    losses = []
    columns = list(range(V)) if columns is None else list(columns)
    for i, t in live.nonzero().tolist():
        log_pi = logits[i, t, columns].log_softmax(-1)
        label = labels[i, t].item()
        if labels.dtype.is_floating_point:
            losses.append(-(label * log_pi[0] + (1 - label) * log_pi[1]))
        else:
            losses.append(-log_pi[columns.index(label)])
    return torch.stack(losses).mean() if losses else (logits * 0).sum()


WAYS = {
    "hard, all columns": (False, None),
    "hard, two columns": (False, REWARD_IDS),
    "hard, four columns": (False, (0, 7, 10, 2)),
    "soft": (True, REWARD_IDS),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", WAYS)
def test_the_loss_and_its_gradient_are_the_mean_cross_entropy_of_the_labelled_placeholders(way, dtype, backend):
    soft, columns = WAYS[way]
    logits, labels, ids = problem(dtype, soft)
    leaf, wide = logits.requires_grad_(), logits.detach().double().requires_grad_()
    loss = rlk.process_reward_loss(leaf, labels, ids, STEP, reward_token_ids=columns)
    want = truth(wide, labels, (ids == STEP) & (labels != -100), columns)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(loss.double(), want, rtol=1e-12 if dtype == torch.float64 else 1e-5, atol=1e-6)
    (got,), (slope,) = torch.autograd.grad(loss, leaf), torch.autograd.grad(want, wide)
    allowed = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-3, torch.float16: 2e-4}[dtype]
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), slope, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=allowed)


@pytest.mark.parametrize("way", WAYS)
def test_a_mask_in_place_of_placeholders_and_the_packed_layout_give_the_same_number(way, backend):
    soft, columns = WAYS[way]
    logits, labels, ids = problem(torch.float32, soft)
    whole = rlk.process_reward_loss(logits, labels, ids, STEP, reward_token_ids=columns)
    masked = rlk.process_reward_loss(logits, labels, mask=(ids == STEP).int(), reward_token_ids=columns)
    alone = torch.where(ids == STEP, labels, -100)
    unmasked = rlk.process_reward_loss(logits, alone, reward_token_ids=columns)
    cu = torch.tensor([0, L, 2 * L, 3 * L])
    packed = rlk.process_reward_loss(
        logits.flatten(0, 1),
        labels.view(-1),
        ids.view(-1),
        STEP,
        reward_token_ids=None if columns is None else torch.tensor(columns, dtype=torch.int32),
        cu_seqlens=cu,
    )
    for other in (masked, unmasked, packed):
        torch.testing.assert_close(other, whole, rtol=1e-6, atol=0)
    padded, packed = (
        rlk.process_reward_loss(*x, reward_token_ids=columns, cu_seqlens=cu, aggregation="seq-mean-token-mean")
        for x, cu in (((logits, alone), None), ((logits.flatten(0, 1), alone.view(-1)), cu))
    )
    torch.testing.assert_close(packed, padded, rtol=1e-6, atol=0)


@pytest.mark.parametrize("garbage", [NAN, INF, -INF])
@pytest.mark.parametrize("way", WAYS)
def test_a_row_that_does_not_score_is_not_read(way, garbage, backend):
    soft, columns = WAYS[way]
    logits, labels, ids = problem(torch.float32, soft)
    live = (ids == STEP) & (labels != -100)
    dead = ~live & (labels != -100)
    results = []
    for poison in (0.5, garbage):
        leaf = logits.masked_fill(~live[..., None], poison).requires_grad_()
        marks = labels.masked_fill(dead, NAN if soft and poison != 0.5 else 3)
        loss, metrics = rlk.process_reward_loss(
            leaf, marks, ids, STEP, mask=torch.ones(B, L), reward_token_ids=columns, return_metrics=True
        )
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf), metrics["accuracy"]))
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
    assert results[1][1].isfinite().all() and not results[1][1][~live].any()


@pytest.mark.parametrize("way", WAYS)
def test_no_step_gives_zero_with_a_gradient_of_zeros(way, backend):
    soft, columns = WAYS[way]
    logits, labels, ids = problem(torch.float32, soft)
    for keep in ({"placeholder_id": 100}, {"placeholder_id": STEP, "mask": torch.zeros(B, L)}):
        leaf = torch.full_like(logits, NAN).requires_grad_()
        loss = rlk.process_reward_loss(leaf, labels, ids, reward_token_ids=columns, **keep)
        assert loss.item() == 0 and not torch.autograd.grad(loss, leaf)[0].any()
    for shape in ((0, L), (B, 0)):
        leaf = torch.zeros(*shape, V, requires_grad=True)
        loss = rlk.process_reward_loss(leaf, labels.new_zeros(shape), reward_token_ids=columns)
        assert loss.item() == 0 and torch.autograd.grad(loss, leaf)[0].shape == leaf.shape


def test_an_ignored_soft_label_changes_nothing_where_the_source_takes_it_as_a_chance():
    logits, labels, ids = problem(torch.float64, soft=True)
    without = ids.clone()
    without[1, 2] = 1  # its label is -100
    loss, other = (
        rlk.process_reward_loss(logits, labels, x, STEP, reward_token_ids=REWARD_IDS) for x in (ids, without)
    )
    assert loss > 0 and torch.equal(loss, other)


def test_a_soft_label_of_a_certain_step_is_the_hard_one():
    logits, labels, ids = problem(torch.float64)
    chance = torch.where(labels == -100, -100.0, (labels == REWARD_IDS[0]).double())
    hard, soft = (
        rlk.process_reward_loss(logits, x, ids, STEP, reward_token_ids=REWARD_IDS, return_metrics=True)
        for x in (labels, chance)
    )
    torch.testing.assert_close(soft[0], hard[0], rtol=1e-12, atol=0)
    assert torch.equal(soft[1]["accuracy"], hard[1]["accuracy"])


def test_the_accuracy_counts_hits_of_the_largest_column_and_an_ignored_placeholder_as_a_miss():
    logits = torch.tensor([[[0.0, 2.0, 1.0], [5.0, 1.0, 2.0], [0.0, 1.0, 1.0], [3.0, 2.0, 1.0]]])
    ids, labels = torch.tensor([[9, 9, 9, 9]]), torch.tensor([[1, 1, 1, -100]])

    def accuracy(labels, *places, **options):
        return rlk.process_reward_loss(logits, labels, *places, return_metrics=True, **options)[1]["accuracy"].item()

    # Of all columns row 1 prefers 0. Row 2 is a tie, whose first column counts.
    assert accuracy(labels, ids, 9) == pytest.approx(2 / 4)
    assert accuracy(labels) == pytest.approx(2 / 3)
    assert accuracy(labels, reward_token_ids=(2, 1)) == pytest.approx(1 / 3)  # the first column of the tie is 2
    soft = torch.tensor([[0.5, 0.4, 0.9, -100.0]])
    assert accuracy(soft, reward_token_ids=(1, 2)) == pytest.approx(3 / 3)
    assert accuracy(soft, ids, 9, reward_token_ids=(1, 2)) == pytest.approx(3 / 4)


@pytest.mark.parametrize("way", WAYS)
def test_micro_batches_with_the_number_of_steps_of_the_batch_add_up_to_it(way, backend):
    soft, columns = WAYS[way]
    logits, labels, ids = problem(torch.float64, soft)
    count = ((ids == STEP) & (labels != -100)).sum()
    whole = rlk.process_reward_loss(logits, labels, ids, STEP, reward_token_ids=columns)
    parts = [
        rlk.process_reward_loss(
            logits[i : i + 1],
            labels[i : i + 1],
            ids[i : i + 1],
            STEP,
            reward_token_ids=columns,
            normalizers={"batch_num_tokens": count},
        )
        for i in range(B)
    ]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("way", WAYS)
def test_the_derivative_is_that_of_the_differences(way):
    soft, columns = WAYS[way]
    logits, labels, ids = problem(torch.float64, soft)
    with rlk.use_backend("eager"):
        assert torch.autograd.gradcheck(
            lambda x: rlk.process_reward_loss(x, labels, ids, STEP, reward_token_ids=columns), logits.requires_grad_()
        )


LOGITS, HARD, IDS = problem(torch.float32)
SOFT = torch.rand(B, L)
BAD = {
    "labels as bool": (TypeError, "labels has dtype torch.bool; hard labels are", {"labels": HARD > 2}),
    "labels of another shape": (ValueError, r"labels has shape \(3, 5\), expected \(3, 6\)", {"labels": HARD[:, :-1]}),
    "labels that train": (ValueError, "labels gets no gradient", {"labels": SOFT.clone().requires_grad_()}),
    "soft, all columns": (ValueError, "soft labels need two reward_token_ids.*got None", {"labels": SOFT}),
    "soft, three columns": (
        ValueError,
        "soft labels need two reward_token_ids.*got 3",
        {"labels": SOFT, "reward_token_ids": (1, 2, 3)},
    ),
    "no chance": (
        ValueError,
        "labels holds 1.5, expected soft labels from 0 to 1",
        {"labels": torch.full_like(SOFT, 1.5), "reward_token_ids": (1, 2)},
    ),
    "a label that is no reward token": (
        ValueError,
        r"labels holds 2, expected one of reward_token_ids, \[7, 3\]",
        {"reward_token_ids": [7, 3]},
    ),
    "a label outside": (IndexError, "target 11 .*outside", {"labels": torch.full((B, L), 11)}),
    "ids without placeholder": (ValueError, "input_ids needs placeholder_id", {"placeholder_id": None}),
    "placeholder without ids": (ValueError, "placeholder_id needs input_ids", {"input_ids": None}),
    "repeated": (ValueError, r"reward_token_ids must be different ids in \[0, 11\)", {"reward_token_ids": [2, 2]}),
    "outside": (ValueError, r"reward_token_ids must be different ids in \[0, 11\)", {"reward_token_ids": [2, 11]}),
    "none": (ValueError, "reward_token_ids is empty", {"reward_token_ids": ()}),
    "floats": (TypeError, "reward_token_ids must be an integer", {"reward_token_ids": torch.tensor([1.0])}),
    "ids of another shape": (ValueError, r"input_ids has shape \(2, 6\)", {"input_ids": IDS[:2]}),
    "one row": (ValueError, "unsqueeze the one row", {"logits": LOGITS[0, 0], "labels": HARD[0, 0]}),
    "mask": (ValueError, r"mask has shape \(3, 5\)", {"mask": torch.ones(3, 5)}),
}


@pytest.mark.parametrize("case", BAD)
def test_process_reward_loss_refuses_what_it_would_guess(case):
    error, message, options = BAD[case]
    given = {"logits": LOGITS, "labels": HARD, "input_ids": IDS, "placeholder_id": STEP, **options}
    with pytest.raises(error, match=f"^process_reward_loss: .*{message}"):
        rlk.process_reward_loss(**given)


def test_a_solution_scores_its_worst_step_or_the_product_of_all():
    scores = torch.tensor([0.9, 0.2, 0.7, 0.5, 0.8, 0.8, 0.1, 0.6], dtype=torch.float64)
    cu = torch.tensor([0, 3, 3, 4, 8])
    padded, mask = torch.full((4, 5), NAN, dtype=torch.float64), torch.zeros(4, 5, dtype=torch.bool)
    for i, (a, b) in enumerate(zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)):
        padded[i, 5 - (b - a) :], mask[i, 5 - (b - a) :] = scores[a:b], True
    for kind, want in {"min": [0.2, 1.0, 0.5, 0.1], "product": [0.126, 1.0, 0.5, 0.0384]}.items():
        for got in (
            rlk.solution_scores(scores, kind=kind, cu_seqlens=cu),
            rlk.solution_scores(padded, mask, kind=kind),
        ):
            torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["min", "product"])
def test_a_score_above_1_and_nan_in_a_live_step_are_not_hidden(kind):
    scores = torch.tensor([[3.0, 2.0], [NAN, 0.5], [0.5, NAN]])
    want = torch.tensor([2.0 if kind == "min" else 6.0, NAN, NAN])
    packed = rlk.solution_scores(scores.view(-1), kind=kind, cu_seqlens=[0, 2, 4, 6])
    for got in (rlk.solution_scores(scores, kind=kind), packed):
        torch.testing.assert_close(got, want, equal_nan=True)
    assert rlk.solution_scores(torch.zeros(2, 0), kind=kind).tolist() == [1.0, 1.0]
    assert rlk.solution_scores(torch.zeros(0), kind=kind, cu_seqlens=[0, 0]).tolist() == [1.0]


def test_solution_scores_refuses_what_is_no_step():
    for error, message, arguments, options in (
        (TypeError, "step_scores has dtype torch.int64", (torch.ones(3, dtype=torch.int64),), {}),
        (ValueError, "kind must be one of min, product; got 'mean'", (torch.ones(1, 3),), {"kind": "mean"}),
        (ValueError, r"mask has shape \(3,\)", (torch.ones(1, 3), torch.ones(3)), {}),
    ):
        with pytest.raises(error, match=f"^solution_scores: {message}"):
            rlk.solution_scores(*arguments, **options)
