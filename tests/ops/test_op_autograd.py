"""Faults of gradients and of their owners."""

import pytest
import torch
from reference import draw_rows, same_bits, statistics
from trained_functions import FUNCTIONS, H, V, output_of, problem

import rlkernels as rlk


@pytest.mark.fault(31)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_gradient_is_linear_in_what_comes_from_above(name, backend):
    output, leaf = output_of(name, problem())

    def gradient(g):
        return torch.autograd.grad(output, leaf, g, retain_graph=True)[0]

    g, h = (torch.randn(output.shape, generator=torch.Generator().manual_seed(k)) for k in (1, 2))
    gg, hh = gradient(g), gradient(h)
    scale = max(gg.abs().max().item(), hh.abs().max().item())
    assert scale > 1e-3
    torch.testing.assert_close(gradient(2.5 * g - 0.5 * h), 2.5 * gg - 0.5 * hh, rtol=1e-5, atol=3e-6 * scale)
    torch.testing.assert_close(gradient(-2 * g), -2 * gg, rtol=0, atol=1e-37)  # a power of two; a subnormal may round
    assert not gradient(torch.zeros_like(g)).any()
    if output.dim():  # one element at a time adds up
        parts = sum(gradient(torch.zeros_like(g).index_copy(0, torch.tensor([t]), g[t : t + 1])) for t in range(len(g)))
        torch.testing.assert_close(parts, gg, rtol=1e-5, atol=3e-6 * scale)


@pytest.mark.fault(33, 34)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_three_backwards_equal_fresh_graphs_also_when_a_gradient_is_edited(name, backend):
    output, leaf = output_of(name, problem())
    for k in range(3):
        # Exactly 1 first: a gradient made in the forward is handed out for it, and must not be handed out twice.
        g = torch.ones_like(output) if k == 0 else torch.randn(output.shape, generator=torch.Generator().manual_seed(k))
        (got,) = torch.autograd.grad(output, leaf, g, retain_graph=True)
        fresh, fresh_leaf = output_of(name, problem())
        assert same_bits(got, torch.autograd.grad(fresh, fresh_leaf, g)[0])
        got.fill_(float("nan"))
    (twice,) = torch.autograd.grad(output, leaf, torch.ones_like(output), retain_graph=True)
    fresh, fresh_leaf = output_of(name, problem())
    assert same_bits(twice, torch.autograd.grad(fresh, fresh_leaf, torch.ones_like(output))[0])


@pytest.mark.fault(35)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_editing_an_output_before_the_backward_changes_no_gradient_in_silence(name, backend):
    output, leaf = output_of(name, problem())
    g = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad(*output_of(name, problem()), g)[0]
    with torch.no_grad():
        output.zero_()
    try:
        (got,) = torch.autograd.grad(output, leaf, g)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        assert same_bits(got, expected)


@pytest.mark.fault(35)
def test_an_edited_metric_or_statistic_changes_no_gradient_in_silence(backend):
    d = problem()
    for editable in ("logsumexp", "entropy", "logprobs", "log_sum_sq_probs"):
        leaf = d["x"].clone().requires_grad_()
        stats = rlk.token_stats(leaf, d["targets"], outputs=("entropy", "log_sum_sq_probs"))
        (expected,) = torch.autograd.grad((stats.logprobs, stats.entropy), leaf, (d["a"], d["b"]), retain_graph=True)
        with torch.no_grad():
            getattr(stats, editable).zero_()
        try:
            (got,) = torch.autograd.grad((stats.logprobs, stats.entropy), leaf, (d["a"], d["b"]))
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error), editable
        else:
            assert same_bits(got, expected), editable


@pytest.mark.fault(32)
@pytest.mark.parametrize("inplace", [False, True])
def test_two_losses_on_the_same_logits(inplace, backend):
    d = problem()
    leaf = d["x"].clone().requires_grad_()
    x = leaf * 1
    first, second = rlk.token_logprobs(x, d["targets"], inplace_backward=inplace), rlk.token_logprobs(x, d["targets"])
    (got,) = torch.autograd.grad(first, leaf, d["a"], retain_graph=True)
    expected = torch.autograd.grad(rlk.token_logprobs(leaf, d["targets"]), leaf, d["a"])[0]
    assert same_bits(got, expected)
    if inplace:  # the logits are gone: later use of them raises
        for later in (first, second):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(later, leaf, d["a"], retain_graph=True)
    else:
        assert same_bits(x.detach(), d["x"]) and same_bits(torch.autograd.grad(second, leaf, d["a"])[0], expected)


@pytest.mark.fault(70)
def test_every_parameter_of_a_small_model_gets_a_finite_gradient(backend):
    torch.manual_seed(0)
    d = problem()
    body, head = torch.nn.Linear(H, H), torch.nn.Linear(H, V)
    parameters = [*body.parameters(), *head.parameters()]
    stats = rlk.linear_token_stats(body(d["hidden"]), head.weight, d["targets"], bias=head.bias)
    losses = [
        rlk.policy_loss(
            stats.logprobs,
            stats.logprobs.detach(),
            d["c"],
            d["targets"] != -100,
            entropy=stats.entropy,
            entropy_coef=0.1,
        ),
        rlk.logits_policy_loss(
            head(body(d["hidden"])), d["targets"], stats.logprobs.detach(), d["c"], entropy_coef=0.1
        ),
    ]
    gradients = []
    for loss in losses:
        assert loss.grad_fn is not None
        gradients.append(torch.autograd.grad(loss, parameters))
        assert all(g.isfinite().all() and g.any() for g in gradients[-1])
    for linear, dense in zip(*gradients, strict=True):
        torch.testing.assert_close(linear, dense, rtol=1e-4, atol=1e-6)


@pytest.mark.fault(84, 31)
def test_a_loss_scaled_from_above_has_one_rounding(backend):
    # fp16: a gradient made in the forward for g = 1 would have underflowed before the loss scale arrives.
    x, targets, _ = draw_rows((4,), V, torch.float16)
    leaf = x.requires_grad_()
    loss = rlk.logits_policy_loss(leaf, targets, torch.zeros(4), torch.full((4,), 1e-7), objective="reinforce")
    (got,) = torch.autograd.grad(loss, leaf, torch.tensor(2.0**16))
    wide = x.detach().double().requires_grad_()
    live = targets != -100
    (want,) = torch.autograd.grad(-(1e-7 * 2.0**16) * statistics(wide, targets)["logprobs"][live].mean(), wide)
    assert want.abs().max() < 6e-3 and got.any()
    torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=6e-8)
