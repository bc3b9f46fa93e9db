"""rank_list_loss against a loop over all pairs of all lists."""

import math

import pytest
import torch
from reference import same_bits
from torch.nn.functional import logsigmoid

import rlkernels as rlk

NAN, INF = math.nan, math.inf
LENGTHS = [4, 0, 1, 3, 2, 5, 1]
AGGREGATIONS, KINDS = ("pair-mean", "list-mean"), ("logsigmoid", "sigmoid")


def truth(lists, kind="logsigmoid", aggregation="pair-mean"):
    """``lists``: one tensor of scores each, best first. ``(loss, accuracy, pair accuracy)``."""
    f = logsigmoid if kind == "logsigmoid" else torch.sigmoid
    means, terms, whole, pairs = [], [], [], []
    for scores in lists:
        of_list = [-f(scores[a] - scores[b]) for a in range(len(scores)) for b in range(a + 1, len(scores))]
        right = [bool(scores[a] > scores[b]) for a in range(len(scores)) for b in range(a + 1, len(scores))]
        if of_list:
            means.append(torch.stack(of_list).mean())
            whole.append(all(right))
        terms += of_list
        pairs += right
    if not terms:
        return torch.zeros((), dtype=torch.float64), 0.0, 0.0
    loss = torch.stack(terms if aggregation == "pair-mean" else means).mean()
    return loss, sum(whole) / len(whole), sum(pairs) / len(pairs)


def scores_of(dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(sum(LENGTHS), generator=draw, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_gradient_and_metrics_are_those_of_the_loop_over_pairs(kind, aggregation, dtype, backend):
    scores = scores_of(dtype).requires_grad_()
    wide = scores.detach().double().requires_grad_()
    want, accuracy, of_pairs = truth(wide.split(LENGTHS), kind, aggregation)
    (slope,) = torch.autograd.grad(want, wide)
    rtol = 1e-12 if dtype == torch.float64 else 2e-6
    coarse = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    for lengths in (LENGTHS, torch.tensor(LENGTHS, dtype=torch.int32)):
        loss, metrics = rlk.rank_list_loss(scores, lengths, kind=kind, aggregation=aggregation, return_metrics=True)
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(loss.double(), want, rtol=rtol, atol=rtol)
        torch.testing.assert_close(torch.autograd.grad(loss, scores)[0].double(), slope, rtol=coarse, atol=coarse)
        assert metrics["accuracy"].item() == pytest.approx(accuracy)
        assert metrics["pair_accuracy"].item() == pytest.approx(of_pairs)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_padded_lists_with_holes_are_the_packed_ones(kind, aggregation, backend):
    scores = scores_of(torch.float32)
    draw = torch.Generator().manual_seed(1)
    padded, live = torch.full((len(LENGTHS), 7), NAN), torch.zeros(len(LENGTHS), 7, dtype=torch.bool)
    for i, of_list in enumerate(scores.split(LENGTHS)):
        places = torch.randperm(7, generator=draw)[: len(of_list)].sort().values
        padded[i, places], live[i, places] = of_list, True
    options = {"kind": kind, "aggregation": aggregation, "return_metrics": True}
    packed, metrics = rlk.rank_list_loss(scores, LENGTHS, **options)
    leaf = padded.requires_grad_()
    loss, other = rlk.rank_list_loss(leaf, mask=live.float(), **options)
    torch.testing.assert_close(loss, packed, rtol=1e-6, atol=0)
    assert all(torch.equal(metrics[name], other[name]) for name in metrics)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert gradient.isfinite().all() and not gradient[~live].any()
    cube, _ = rlk.rank_list_loss(padded.detach()[:6].view(2, 3, 7), mask=live[:6].view(2, 3, 7), **options)
    flat, _ = rlk.rank_list_loss(padded.detach()[:6], mask=live[:6], **options)
    assert torch.equal(cube, flat)


@pytest.mark.parametrize("garbage", [NAN, INF, -INF])
@pytest.mark.parametrize("kind", KINDS)
def test_a_dead_score_and_a_list_of_one_reach_neither_loss_nor_gradient(kind, garbage, backend):
    live = torch.tensor([True, True, False, True, False, True, True])
    results = []
    for poison in (0.5, garbage):
        leaf = torch.tensor([0.9, 0.4, poison, 0.1, poison, poison, -0.3]).requires_grad_()
        loss, metrics = rlk.rank_list_loss(leaf, [4, 2, 1], mask=live, kind=kind, return_metrics=True)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaf), metrics["accuracy"]))
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
    assert results[1][1].isfinite().all() and not results[1][1][[2, 4, 5, 6]].any()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_pair_gives_zero_with_a_gradient_of_zeros(kind, aggregation, backend):
    options = {"kind": kind, "aggregation": aggregation, "return_metrics": True}
    for shape, given in (
        ((2,), {"lengths": [1, 1]}),
        ((0,), {"lengths": []}),
        ((0,), {"lengths": [0, 0]}),
        ((0, 4), {}),
        ((3, 0), {}),
        ((3, 1), {}),
        ((2, 3), {"mask": torch.zeros(2, 3)}),
    ):
        leaf = torch.zeros(shape, requires_grad=True)
        loss, metrics = rlk.rank_list_loss(leaf, **given, **options)
        assert loss.item() == 0.0 and all(x.item() == 0.0 for x in metrics.values()), shape
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert gradient.shape == shape and not gradient.any()


def test_equal_scores_are_not_sorted():
    _, metrics = rlk.rank_list_loss(torch.tensor([[2.0, 1.0, 1.0], [3.0, 2.0, 1.0]]), return_metrics=True)
    assert metrics["accuracy"].item() == 0.5 and metrics["pair_accuracy"].item() == pytest.approx(5 / 6)


def test_lists_of_one_length_have_the_same_loss_under_both_aggregations():
    scores = torch.randn(5, 4, dtype=torch.float64)
    by_pair, by_list = (rlk.rank_list_loss(scores, aggregation=x) for x in AGGREGATIONS)
    torch.testing.assert_close(by_pair, by_list, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_far_scores_keep_their_digits(kind, backend):
    scores = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss = rlk.rank_list_loss(scores, [2], kind=kind)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert loss.item() == (2e4 if kind == "logsigmoid" else 0.0)
    assert gradient.tolist() == ([-1.0, 1.0] if kind == "logsigmoid" else [0.0, 0.0])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_derivative_is_that_of_the_differences(kind, aggregation):
    with rlk.use_backend("eager"):
        assert torch.autograd.gradcheck(
            lambda x: rlk.rank_list_loss(x, LENGTHS, kind=kind, aggregation=aggregation), scores_of().requires_grad_()
        )


S = torch.zeros(6)
BAD = {
    "no lengths": (ValueError, r"scores has shape \(6,\), expected \[..., K\], or \[N\] together", (S,), {}),
    "lengths and rows": (
        ValueError,
        r"scores has shape \(2, 3\), expected \[N\]: lengths says",
        (S.view(2, 3), [3, 3]),
        {},
    ),
    "floats": (TypeError, "lengths must be an integer tensor", (S, torch.tensor([6.0])), {}),
    "a list of floats": (TypeError, "lengths must be int", (S, [2.0, 4.0]), {}),
    "two dimensions": (ValueError, r"lengths has shape \(1, 2\)", (S, torch.tensor([[2, 4]])), {}),
    "scores": (TypeError, "scores has dtype torch.int64", (S.long(), [6]), {}),
    "kind": (ValueError, "kind must be one of logsigmoid, sigmoid; got 'hinge'", (S, [6]), {"kind": "hinge"}),
    "aggregation": (ValueError, "aggregation must be one of pair-mean, list-mean", (S, [6]), {"aggregation": "mean"}),
    "mask": (ValueError, r"mask has shape \(5,\)", (S, [6]), {"mask": torch.ones(5)}),
}


@pytest.mark.parametrize("case", BAD)
def test_rank_list_loss_refuses_what_it_would_guess(case):
    error, message, arguments, options = BAD[case]
    with pytest.raises(error, match=f"^rank_list_loss: .*{message}"):
        rlk.rank_list_loss(*arguments, **options)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_the_accuracy_has_the_digits_of_the_scores_whatever_the_default_dtype_is(dtype):
    lists = torch.tensor([[2.0, 1.0], [0.0, 1.0], [0.0, 1.0]], dtype=dtype)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        metrics = rlk.rank_list_loss(lists, return_metrics=True)[1]
    finally:
        torch.set_default_dtype(before)
    assert metrics["accuracy"].item() == torch.tensor(1 / 3, dtype=dtype).item()
