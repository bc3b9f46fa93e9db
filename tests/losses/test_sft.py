"""Supervised losses from logits and from log-probabilities against plain torch in float64: values, gradients, masks,
weights, refusals.
"""

import math

import pytest
import torch

import rlkernels as rlk
from rlkernels.backends import DEVICES, absent, use_backend

PRESENT = [name for name in DEVICES["cpu"] if absent(name) is None]
B, L, V = 3, 6, 41


def problem(dtype=torch.float32, seed=0):
    """Logits, targets with some of them ignored, and a mask with holes; the first row of the mask is dead."""
    draw = torch.Generator().manual_seed(seed)
    logits, targets = (2 * torch.randn(B, L, V, generator=draw)).to(dtype), torch.randint(V, (B, L), generator=draw)
    mask = torch.rand(B, L, generator=draw) < 0.7
    mask[0], mask[1:, 0] = False, True
    targets[1, 2] = targets[2, 3] = -100
    return logits, targets, mask


def truth(logits, targets, mask, kind, weights=None, temperature=1.0):
    """The loss in float64 by the formula, and its gradient; weights of a token mean unless given."""
    x = logits.detach().double().requires_grad_()
    live = mask & (targets != -100)
    logp = torch.log_softmax(x / temperature, -1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    losses = -logp if kind == "nll" else -logp.exp().detach() * logp
    weights = live.double() / live.sum() if weights is None else weights
    loss = torch.where(live, weights * losses, 0.0).sum()
    return loss.detach(), torch.autograd.grad(loss, x)[0]


def close(got, want, dtype):
    rtol, atol = {torch.float64: (1e-11, 1e-13), torch.float32: (1e-5, 1e-7), torch.bfloat16: (8e-3, 1e-5)}[dtype]
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=atol)


@pytest.mark.parametrize("backend", PRESENT)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("kind", ("nll", "dft"))
def test_loss_and_gradient_are_those_of_the_formula(kind, dtype, backend):
    logits, targets, mask = problem(dtype)
    want, slope = truth(logits, targets, mask, kind, temperature=0.7)
    logits.requires_grad_()
    with use_backend(backend):
        loss = rlk.sft_loss(logits, targets, mask, kind=kind, temperature=0.7)
        loss.backward()
    close(loss.detach(), want, torch.float64 if dtype == torch.float64 else torch.float32)
    close(logits.grad, slope, dtype)
    assert logits.grad.dtype == dtype and (logits.grad[~(mask & (targets != -100))] == 0).all()


@pytest.mark.parametrize("backend", PRESENT)
@pytest.mark.parametrize("kind", ("nll", "dft"))
def test_log_probabilities_give_the_loss_of_the_logits(kind, backend):
    logits, targets, mask = problem(torch.float64)
    want, slope = truth(logits, targets, mask, kind)
    logits.requires_grad_()
    with use_backend(backend):
        loss, metrics = rlk.logprobs_sft_loss(
            rlk.token_logprobs(logits, targets), mask & (targets != -100), kind=kind, return_metrics=True
        )
        loss.backward()
        _, from_logits = rlk.sft_loss(logits, targets, mask, kind=kind, return_metrics=True)
    close(loss.detach(), want, torch.float64)
    close(logits.grad, slope, torch.float64)
    nll, _ = truth(logits, targets, mask, "nll")
    for found in (metrics, from_logits):
        close(found["nll"], nll, torch.float64)
        assert 0 < found["probability"] < 1 and not found["nll"].requires_grad
    row = torch.log_softmax(logits.detach(), -1)
    live = mask & (targets != -100)
    close(from_logits["entropy"], -(row.exp() * row).sum(-1)[live].mean(), torch.float64)


def test_nll_is_cross_entropy():
    logits, targets, _ = problem()
    loss = rlk.sft_loss(logits, targets)
    torch.testing.assert_close(
        loss, torch.nn.functional.cross_entropy(logits.view(-1, V), targets.view(-1)), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("aggregation", ("token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum"))
@pytest.mark.parametrize("shape", ("token", "row", "column"))
def test_sample_weights_multiply_the_weights_of_the_aggregation(shape, aggregation):
    logits, targets, mask = problem(torch.float64)
    live = mask & (targets != -100)
    draw = torch.Generator().manual_seed(1)
    per_token = torch.randn(B, L, generator=draw, dtype=torch.float64)  # either sign
    given = per_token if shape == "token" else per_token[:, 0] if shape == "row" else per_token[:, :1]
    spread = per_token if shape == "token" else per_token[:, :1].expand(B, L)
    weights = spread * rlk.token_weights(live, aggregation, dtype=torch.float64)
    want, slope = truth(logits, targets, mask, "nll", weights)
    x = logits.clone().requires_grad_()
    loss = rlk.sft_loss(x, targets, mask, aggregation=aggregation, sample_weights=given)
    loss.backward()
    close(loss.detach(), want, torch.float64)
    close(x.grad, slope, torch.float64)
    logp = rlk.token_logprobs(logits, targets)
    close(rlk.logprobs_sft_loss(logp, live, aggregation=aggregation, sample_weights=given), want, torch.float64)


def test_sample_weights_of_packed_sequences_are_those_of_their_tokens():
    logits, targets, mask = problem(torch.float64)
    cu_seqlens, factors = torch.tensor([0, 4, 4, 18]), torch.tensor([2.0, 5.0, -1.0], dtype=torch.float64)
    flat = (logits.view(-1, V), targets.view(-1), mask.view(-1))
    spread = factors.repeat_interleave(cu_seqlens.diff())
    loss = rlk.sft_loss(*flat, cu_seqlens=cu_seqlens, sample_weights=factors)
    torch.testing.assert_close(loss, rlk.sft_loss(*flat, cu_seqlens=cu_seqlens, sample_weights=spread), rtol=0, atol=0)


def test_a_sample_weight_of_0_gives_exactly_no_gradient_and_weights_of_1_change_nothing():
    logits, targets, mask = problem()
    factors = torch.tensor([1.0, 0.0, 1.0])
    x = logits.clone().requires_grad_()
    x.data[1] = math.nan  # a row of weight 0 is not read
    loss = rlk.sft_loss(x, targets, mask, sample_weights=factors)
    loss.backward()
    assert loss.isfinite() and (x.grad[1] == 0).all() and (x.grad[2] != 0).any()
    assert torch.equal(
        rlk.sft_loss(logits, targets, mask, sample_weights=torch.ones(B)), rlk.sft_loss(logits, targets, mask)
    )


def test_advantages_as_sample_weights_are_reinforce():
    logits, targets, mask = problem()
    advantages = torch.randn(B, L, generator=torch.Generator().manual_seed(2))
    live = mask & (targets != -100)
    reinforce = rlk.logits_policy_loss(logits, targets, None, advantages, live, objective="reinforce")
    torch.testing.assert_close(
        rlk.sft_loss(logits, targets, mask, sample_weights=advantages), reinforce, rtol=1e-6, atol=1e-7
    )


@pytest.mark.parametrize("backend", PRESENT)
@pytest.mark.parametrize("dead", ("ignored", "masked", "empty"))
def test_nothing_alive_gives_0_with_a_gradient_of_0(dead, backend):
    rows = 0 if dead == "empty" else 2
    logits = torch.full((rows, 5), math.nan, requires_grad=True)
    targets = torch.full((rows,), -100 if dead == "ignored" else 1)
    with use_backend(backend):
        loss, metrics = rlk.sft_loss(
            logits, targets, torch.zeros(rows) if dead == "masked" else None, return_metrics=True
        )
        loss.backward()
    assert (
        loss == 0
        and torch.equal(logits.grad, torch.zeros_like(logits))
        and all(value == 0 for value in metrics.values())
    )
    logp = torch.full((rows,), math.nan, requires_grad=True)
    loss = rlk.logprobs_sft_loss(logp, torch.zeros(rows))
    loss.backward()
    assert loss == 0 and torch.equal(logp.grad, torch.zeros_like(logp))


@pytest.mark.parametrize("backend", PRESENT)
def test_dft_pulls_a_token_in_proportion_to_its_probability_however_small(backend):
    logp = torch.tensor([[0.0, -1e-8, -1e-4, -50.0, -200.0, -1e4]], requires_grad=True)
    with use_backend(backend):
        loss = rlk.logprobs_sft_loss(logp, kind="dft", aggregation="token-sum")
        loss.backward()
    p = logp.detach().double().exp()
    torch.testing.assert_close(logp.grad.double(), -p, rtol=1e-6, atol=1e-40)
    assert loss.item() == pytest.approx((-p * logp.detach().double()).sum().item(), rel=1e-6)


def test_the_gradient_may_take_the_place_of_the_logits():
    logits, targets, mask = problem()
    leaf = logits.clone().requires_grad_()
    x = leaf * 1.0
    rlk.sft_loss(x, targets, mask, kind="dft", inplace_backward=True).backward()
    _, slope = truth(logits, targets, mask, "dft")
    close(leaf.grad, slope, torch.float32)
    assert torch.equal(x.detach(), leaf.grad)


@pytest.mark.parametrize(
    "call,message",
    [
        (
            lambda x, y, m: rlk.sft_loss(x, y, m, sample_weights=torch.ones(5)),
            r"sample_weights has shape \(5,\), expected "
            r"\(3, 6\)",
        ),
        (
            lambda x, y, m: rlk.sft_loss(x, y, m, sample_weights=torch.ones(3, requires_grad=True)),
            "sample_weights gets no gradient; detach it",
        ),
        (
            lambda x, y, m: rlk.sft_loss(x, y, m, weights=torch.ones(B, L), aggregation="token-sum"),
            "both decide the weights",
        ),
        (lambda x, y, m: rlk.sft_loss(x, y, m[0]), r"mask has shape \(6,\), expected \(3, 6\)"),
        (lambda x, y, m: rlk.sft_loss(x[0, 0], y[0, 0]), r"logits has shape \(41,\), expected \[T, V\] or \[B, L, V\]"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=f"^sft_loss: .*{message}"):
        call(*problem())
