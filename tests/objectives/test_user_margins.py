"""A user's objective of a margin as a loss type of ``dpo_loss`` and ``linear_dpo_loss``."""

import pytest
import torch

import rlkernels as rlk
from rlkernels.objectives import OBJECTIVES, objective, sigmoid, where

H, V, L, PAIRS = 4, 7, 5, 3


def squared(margin, beta, label_smoothing, power=2.0, shift=0.1):
    r"""Squared hinge of a shifted margin, mixed with that of the flipped pair."""
    up = where(power - beta * margin - shift < 0.0, 0.0, power - beta * margin - shift)
    down = where(power + beta * margin < 0.0, 0.0, power + beta * margin)
    keep = 1.0 - label_smoothing
    return (keep * up * up + label_smoothing * down * down, 2.0 * beta * (label_smoothing * down - keep * up))


def plain(margin, steep):
    """A sigmoid without a beta."""
    tail = sigmoid(-steep * margin)
    return tail, -steep * tail * (1.0 - tail)


def by_hand(margin, beta=0.1, smoothing=0.0, power=2.0, shift=0.1):
    up, down = (power - beta * margin - shift).clamp(min=0), (power + beta * margin).clamp(min=0)
    return (1 - smoothing) * up**2 + smoothing * down**2


@pytest.fixture(autouse=True)
def registered():
    objective(squared), objective(plain)
    yield
    del OBJECTIVES["squared"], OBJECTIVES["plain"]


@pytest.fixture
def pairs():
    draw = torch.Generator().manual_seed(2)
    return [3 * torch.randn(6, generator=draw, dtype=torch.float64) for _ in range(4)]


def margin(chosen, rejected, ref_chosen, ref_rejected):
    return chosen - ref_chosen - (rejected - ref_rejected)


@pytest.mark.parametrize("function", [squared, "squared"], ids=["function", "name"])
@pytest.mark.parametrize("options", [{}, {"power": 0.5}, {"shift": torch.tensor(0.3)}], ids=str)
def test_value_and_gradients_are_those_by_hand(pairs, function, options):
    expected = by_hand(margin(*(x.requires_grad_() for x in pairs[:2]), *pairs[2:]), 0.7, 0.2, **options).mean()
    want = torch.autograd.grad(expected, pairs[:2])
    got = rlk.dpo_loss(*pairs, loss_type=function, beta=0.7, label_smoothing=0.2, **options)
    torch.testing.assert_close(got, expected)
    for a, b in zip(torch.autograd.grad(got, pairs[:2]), want, strict=True):
        torch.testing.assert_close(a, b)
    rlk.check_objective(function, beta=0.7, label_smoothing=0.2)


def test_it_mixes_with_other_losses_and_takes_their_options(pairs):
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 1.0], dtype=torch.float64)
    lengths = torch.arange(1.0, 7.0)
    pairs[0][1] = float("nan")  # of a pair of weight 0
    got = rlk.dpo_loss(
        *pairs,
        loss_type=("sigmoid", squared, plain),
        loss_weights=(1.0, 0.5, 2.0),
        beta=0.3,
        steep=1.5,
        length_normalized=True,
        chosen_lengths=lengths,
        rejected_lengths=2 * lengths,
        pair_weights=weights,
    )
    scaled = margin(pairs[0] / lengths, pairs[1] / lengths / 2, pairs[2] / lengths, pairs[3] / lengths / 2)
    each = -(0.3 * scaled).sigmoid().log() + 0.5 * by_hand(scaled, 0.3) + 2.0 * (-1.5 * scaled).sigmoid()
    torch.testing.assert_close(got, torch.where(weights != 0, weights * each, 0.0).sum() / 6)


def test_a_loss_per_pair_metrics_and_a_free_reference(pairs):
    loss, metrics = rlk.dpo_loss(
        *pairs[:2], loss_type=squared, reference_free=True, reduction="none", return_metrics=True
    )
    torch.testing.assert_close(loss, by_hand(pairs[0] - pairs[1]))
    assert "reward_margin" in metrics


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("packed", [False, True])
def test_linear_dpo_loss_takes_it_from_hidden_states(chunk, packed):
    draw = torch.Generator().manual_seed(4)
    hidden = torch.randn(2 * PAIRS, L, H, generator=draw, dtype=torch.float64)
    weight = torch.randn(V, H, generator=draw, dtype=torch.float64)
    targets, mask = torch.randint(V, (2 * PAIRS, L), generator=draw), torch.ones(2 * PAIRS, L)
    mask[0, 3:], mask[2, 0] = 0, 0
    refs = [torch.randn(PAIRS, generator=draw, dtype=torch.float64) for _ in range(2)]
    h, w, a, b = (x.clone().requires_grad_() for x in (hidden, weight, hidden, weight))
    options = {"loss_type": squared, "power": 0.5, "chunk_tokens": chunk}
    references = {"ref_chosen_logps": refs[0], "ref_rejected_logps": refs[1]}
    inputs, cu = (h, w, targets, mask), {}
    if packed:
        inputs, cu = (h.reshape(-1, H), w, targets.view(-1), mask.view(-1)), {"cu_seqlens": torch.arange(7) * L}
    got = rlk.linear_dpo_loss(*inputs, **references, **options, **cu)
    logp = (a @ b.T).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    sums = torch.where(mask != 0, logp, 0.0).sum(-1)
    expected = by_hand(margin(sums[:PAIRS], sums[PAIRS:], *refs), power=0.5).mean()
    torch.testing.assert_close(got, expected)
    for x, y in zip(torch.autograd.grad(got, (h, w)), torch.autograd.grad(expected, (a, b)), strict=True):
        torch.testing.assert_close(x, y)


def test_no_pair_is_0_with_zero_gradients():
    none = torch.zeros(0, requires_grad=True)
    rlk.dpo_loss(none, none, none.detach(), none.detach(), loss_type=squared).backward()
    assert none.grad.shape == (0,)


def refused(margin, alpha):
    """d"""
    return alpha * margin, alpha


def with_a_default(margin, beta=0.5):
    """d"""
    return beta * margin, beta


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loss_type": "sqared"}, ValueError, "loss_type must be one of"),
        ({"loss_type": "ppo_clip"}, ValueError, "loss_type must be one of"),
        ({"loss_type": by_hand}, ValueError, "loss_type must be one of"),
        ({"loss_type": OBJECTIVES["kto"].function}, ValueError, "loss_type must be one of"),
        ({"power": 1.0}, TypeError, "loss_type 'sigmoid' takes no 'power'; it takes no parameters of its own"),
        ({"loss_type": squared, "powr": 1.0}, TypeError, "takes no 'powr'; it takes 'power', 'shift'"),
        ({"loss_type": plain}, TypeError, "objective 'plain' needs 'steep'"),
        ({"loss_type": plain, "steep": 1.0, "label_smoothing": 0.1}, ValueError, "'plain' takes no label_smoothing"),
        ({"loss_type": refused, "alpha": 0.1}, ValueError, "alpha needs f_divergence"),
        ({"loss_type": refused}, ValueError, "parameter 'alpha' of loss_type 'refused' has the name of an option"),
        ({"loss_type": with_a_default}, ValueError, "'beta' of loss_type 'with_a_default' is the option beta"),
        ({"loss_type": squared, "beta": 0.0}, ValueError, "beta must be positive"),
        ({"loss_type": squared, "beta": torch.ones(6)}, ValueError, "'squared' takes no beta per pair"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(pairs, options, error, message):
    objective(refused), objective(with_a_default)
    try:
        with pytest.raises(error, match=f"^dpo_loss: .*{message}"):
            rlk.dpo_loss(*pairs, **options)
    finally:
        del OBJECTIVES["refused"], OBJECTIVES["with_a_default"]
