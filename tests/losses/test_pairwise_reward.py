"""pairwise_reward_loss with weights, masks, labels, kinds, reductions and metrics, against its formula in float64."""

import math

import pytest
import torch
from reference import same_bits
from torch.nn.functional import softplus

import rlkernels as rlk

NAN, INF = math.nan, math.inf
REDUCTIONS, COUNT = ("mean", "sum", "none"), 9


def columns(shape, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [(2 * torch.randn(shape, generator=draw, dtype=torch.float64)).to(dtype) for _ in range(3)]


def truth(c, q, g, weights, live, center, reduction):
    each = softplus(-(c - q - g)) + center * (c + q).square()
    each = torch.where(live, weights * torch.where(live, each, 0.0), 0.0)
    return each if reduction == "none" else each.sum() / (live.sum() if reduction == "mean" else 1)


@pytest.mark.parametrize("center", [0.0, 0.3])
@pytest.mark.parametrize("given", ["nothing", "mask", "weights", "both"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_loss_and_gradients_are_the_formula(dtype, reduction, given, center, backend):
    for shape in ((COUNT,), (3, 4), ()):
        inputs = [x.requires_grad_() for x in columns(shape, dtype)]
        wide = [x.detach().double().requires_grad_() for x in inputs]
        draw = torch.Generator().manual_seed(1)
        live = torch.rand(shape, generator=draw) < 0.7 if given in ("mask", "both") and shape else None
        weights = torch.rand(shape, generator=draw) + 0.5 if given in ("weights", "both") else None
        got = rlk.pairwise_reward_loss(
            *inputs[:2], margin=inputs[2], center_coef=center, pair_weights=weights, mask=live, reduction=reduction
        )
        every = torch.ones(shape, dtype=torch.bool)
        want = truth(
            *wide,
            every.double() if weights is None else weights.double(),
            every if live is None else live,
            center,
            reduction,
        )
        rtol = 1e-6 if dtype != torch.float64 or weights is not None else 1e-12
        assert got.shape == want.shape and got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(got.double(), want, rtol=5 * rtol, atol=rtol)
        upstream = torch.randn(want.shape, dtype=torch.float64)
        found, slopes = (
            torch.autograd.grad(x, leaves, upstream.to(x.dtype)) for x, leaves in ((got, inputs), (want, wide))
        )
        coarse = {torch.float64: 1e-6, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
        for a, b in zip(found, slopes, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=coarse, atol=coarse)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_logexp_ignores_the_margin_and_does_not_overflow(reduction, backend):
    c, q, g = columns((COUNT,), torch.float32)
    plain, other = (
        rlk.pairwise_reward_loss(c, q, reduction=reduction, **options)
        for options in ({}, {"margin": g, "kind": "logexp"})
    )
    assert same_bits(plain, other)
    chosen = torch.tensor([0.0], requires_grad=True)
    loss = rlk.pairwise_reward_loss(chosen, torch.tensor([1e4]), kind="logexp", reduction=reduction).sum()
    assert loss.item() == 1e4 and torch.autograd.grad(loss, chosen)[0].item() == -1.0


@pytest.mark.parametrize("garbage", [NAN, INF, -INF])
@pytest.mark.parametrize("way", ["mask", "weights"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_dead_pair_and_one_of_weight_0_reach_neither_loss_nor_gradient_nor_metric(reduction, way, garbage, backend):
    live = torch.arange(COUNT) % 3 != 0
    options = {"mask": live} if way == "mask" else {"pair_weights": live.double() * 0.7}
    results = []
    for poison in (0.5, garbage):
        c, q, g = (x.masked_fill(~live, poison).requires_grad_() for x in columns((COUNT,), torch.float32))
        loss, metrics = rlk.pairwise_reward_loss(
            c, q, margin=g, center_coef=0.1, reduction=reduction, return_metrics=True, **options
        )
        gradients = torch.autograd.grad(loss.sum(), (c, q, g))
        results.append((loss.detach(), *gradients, *(metrics.values() if way == "mask" else ())))
        assert all(not x[~live].any() and x.isfinite().all() for x in gradients)
        assert loss.isfinite().all()
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_live_pair_gives_zero_with_a_gradient_of_zeros(reduction, backend):
    for shape, mask in (((0,), None), ((4,), torch.zeros(4)), ((0, 2), torch.zeros(0, 2))):
        c, q, g = (torch.full(shape, NAN).requires_grad_() for _ in range(3))
        loss, metrics = rlk.pairwise_reward_loss(
            c, q, margin=g, center_coef=0.1, mask=mask, reduction=reduction, return_metrics=True
        )
        assert not loss.any() and all(x.item() == 0 for x in metrics.values())
        for gradient in torch.autograd.grad(loss.sum(), (c, q, g)):
            assert gradient.shape == shape and not gradient.any()


def test_the_metrics_are_means_over_the_live_pairs_and_a_tie_is_no_hit(backend):
    c, q = torch.tensor([2.0, 1.0, 0.5, NAN]), torch.tensor([1.0, 3.0, 0.5, 1.0])
    for mask in (torch.tensor([1, 1, 1, 0]), None):
        c = c if mask is not None else c[:3]
        _, metrics = rlk.pairwise_reward_loss(c, q[: len(c)], mask=mask, return_metrics=True)
        found = {name: x.item() for name, x in metrics.items()}
        assert found == pytest.approx(
            {"accuracy": 1 / 3, "reward_chosen": 3.5 / 3, "reward_rejected": 1.5, "reward_margin": -1 / 3}
        )


def test_several_labels_of_a_head_are_pairs_of_their_own(backend):
    draw = torch.Generator().manual_seed(3)
    hidden, head = torch.randn(6, 4, 5, generator=draw), torch.randn(3, 5, generator=draw, requires_grad=True)
    labelled = torch.rand(3, 3, generator=draw) < 0.6
    scores = rlk.reward_scores(hidden, head)
    loss = rlk.pairwise_reward_loss(scores[:3], scores[3:], mask=labelled)
    each = [
        rlk.pairwise_reward_loss(
            *rlk.reward_scores(hidden, head[k : k + 1]).split(3), mask=labelled[:, k], reduction="sum"
        )
        for k in range(3)
    ]
    torch.testing.assert_close(loss, sum(each) / labelled.sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        *(torch.autograd.grad(x, head)[0] for x in (loss, sum(each) / labelled.sum())), rtol=1e-5, atol=1e-7
    )


def test_micro_batches_of_sums_add_up_to_the_sum():
    c, q, g = columns((COUNT,))
    weights = torch.rand(COUNT, dtype=torch.float64)
    parts = [
        rlk.pairwise_reward_loss(
            *(x[i:j] for x in (c, q)), margin=g[i:j], pair_weights=weights[i:j], center_coef=0.2, reduction="sum"
        )
        for i, j in ((0, 2), (2, 7), (7, 9))
    ]
    whole = rlk.pairwise_reward_loss(c, q, margin=g, pair_weights=weights, center_coef=0.2, reduction="sum")
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_derivative_is_that_of_the_differences(reduction):
    inputs = [x.requires_grad_() for x in columns((COUNT,))]
    mask, weights = torch.arange(COUNT) != 4, inputs[0].detach().abs().clone()
    with rlk.use_backend("eager"):
        assert torch.autograd.gradcheck(
            lambda c, q, g: rlk.pairwise_reward_loss(
                c, q, margin=g, center_coef=0.3, mask=mask, pair_weights=weights, reduction=reduction
            ),
            inputs,
        )


C, Q, _ = columns((COUNT,), torch.float32)
BAD = {
    "kind": (ValueError, "kind must be one of logsigmoid, logexp; got 'hinge'", {"kind": "hinge"}),
    "reduction": (ValueError, "reduction must be one of mean, sum, none; got None", {"reduction": None}),
    "weights that train": (
        ValueError,
        "pair_weights gets no gradient",
        {"pair_weights": torch.ones(COUNT, requires_grad=True)},
    ),
    "weights of another shape": (ValueError, r"pair_weights has shape \(3,\)", {"pair_weights": torch.ones(3)}),
    "integers": (TypeError, "pair_weights has dtype", {"pair_weights": torch.ones(COUNT, dtype=torch.int64)}),
    "mask of another shape": (ValueError, r"mask has shape \(3,\)", {"mask": torch.ones(3)}),
    "a weighing mask": (ValueError, "mask holds 0.5", {"mask": torch.full((COUNT,), 0.5)}),
}


@pytest.mark.parametrize("case", BAD)
def test_pairwise_reward_loss_refuses_what_it_would_guess(case):
    error, message, options = BAD[case]
    with pytest.raises(error, match=f"^pairwise_reward_loss: .*{message}"):
        rlk.pairwise_reward_loss(C, Q, **options)
