"""Gradients of the statistics besides the log-probability, and the refusal of those that have none."""

import pytest
import torch

import rlkernels as rlk

V = 37


def problem(dtype=torch.float64, masked=None):
    """Logits with a row behind each sequence, targets of which one is ignored, temperatures, and a mask of columns."""
    draw = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(2, 6, V, generator=draw, dtype=torch.float64)).to(dtype)
    targets = torch.randint(V, (2, 5), generator=draw)
    targets[0, 1] = -100
    temperature = torch.rand(2, 5, generator=draw).to(torch.float64 if dtype == torch.float64 else torch.float32) + 0.5
    mask = None if masked is None else torch.rand((V,) if masked == "V" else (2, 5, V), generator=draw) < 0.6
    if mask is not None:
        mask[..., 3] = True  # no row without a column
    return logits, targets, temperature, mask


def scalar(logprobs, logsumexp, entropy, mean_logits):
    return (2 * logprobs).sum() + (0.3 * logsumexp**2 + 0.7 * entropy + 1.7 * mean_logits).sum()


def truth(logits, targets, temperature, mask):
    """The gradient of ``scalar`` in float64, by torch."""
    leaf = logits.double().requires_grad_()
    z = leaf[:, :-1] / temperature.double()[..., None]
    kept = torch.ones(2, 5, V, dtype=torch.bool) if mask is None else mask.expand(2, 5, V)
    logsumexp = torch.where(kept, z, -torch.inf).logsumexp(-1)
    log_p = torch.where(kept, z - logsumexp[..., None], 0.0)
    live, column = targets != -100, targets.clamp(min=0)[..., None]
    scored = live & kept.gather(-1, column)[..., 0]  # outside of the mask the log-probability is -inf
    loss = scalar(
        torch.where(scored, log_p.gather(-1, column)[..., 0], 0.0),
        torch.where(live, logsumexp, 0.0),
        torch.where(live, -torch.where(kept, log_p.exp() * log_p, 0.0).sum(-1), 0.0),
        torch.where(live, torch.where(kept, z, 0.0).sum(-1) / kept.sum(-1), 0.0),
    )
    return torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("inplace", (False, True))
@pytest.mark.parametrize("masked", (None, "V", "TV"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
def test_a_loss_of_all_statistics_has_the_gradient_of_the_formula(dtype, masked, inplace, backend):
    logits, targets, temperature, mask = problem(dtype, masked)
    logits[:, -1] = torch.nan  # the row that scores nothing
    want = truth(logits, targets, temperature, mask)
    leaf = logits.requires_grad_()
    stats = rlk.token_stats(
        (leaf * 1)[:, :-1],
        targets,
        temperature=temperature,
        vocab_mask=mask,
        outputs=("entropy", "mean_logits"),
        inplace_backward=inplace,
    )
    logprobs = torch.where(stats.logprobs.isfinite(), stats.logprobs, 0.0)
    (got,) = torch.autograd.grad(scalar(logprobs, stats.logsumexp, stats.entropy, stats.mean_logits), leaf)
    rtol, atol = {torch.float64: (1e-12, 1e-13), torch.float32: (1e-5, 1e-6), torch.bfloat16: (1e-2, 2e-2)}[dtype]
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=atol)
    assert got.dtype == dtype and not got[0, 1].any() and not got[:, -1].any()


def test_the_logsumexp_alone_is_differentiable_through_every_layout():
    logits, targets, _, _ = problem()
    assert torch.autograd.gradcheck(
        lambda x: rlk.token_stats(x, targets).logsumexp, logits[:, :-1].clone().requires_grad_()
    )
    packed = logits[:, :-1].reshape(-1, V).requires_grad_()
    rlk.token_stats(packed, targets.view(-1), outputs=()).logsumexp.sum().backward()
    want = torch.softmax(packed.detach(), -1).masked_fill((targets.view(-1) == -100)[:, None], 0.0)
    torch.testing.assert_close(packed.grad, want, rtol=1e-12, atol=1e-15)


def test_a_target_of_probability_0_keeps_the_gradient_of_the_logsumexp():
    leaf = torch.tensor([[0.0, -torch.inf, 1.0]], dtype=torch.float64, requires_grad=True)
    rlk.token_stats(leaf, torch.tensor([1])).logsumexp.sum().backward()
    torch.testing.assert_close(leaf.grad, torch.softmax(leaf.detach(), -1))


def test_a_loss_of_a_statistic_without_a_gradient_raises():
    leaf, targets = torch.randn(3, 5, requires_grad=True), torch.tensor([0, 1, 2])
    stats = rlk.token_stats(leaf, targets, outputs=("log_sum_sq_probs", "is_top1"))
    with pytest.raises(RuntimeError, match="log_sum_sq_probs has no gradient; detach"):
        (stats.logprobs + stats.log_sum_sq_probs).sum().backward()
    (stats.logprobs + stats.log_sum_sq_probs.detach()).sum().backward()
    assert not rlk.token_stats(leaf.detach(), targets, outputs=("log_sum_sq_probs",)).log_sum_sq_probs.requires_grad


def test_a_loss_of_a_statistic_of_a_head_without_a_gradient_raises():
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    stats = rlk.linear_token_stats(hidden, weight, torch.tensor([0, 1, 2]), outputs=("mean_logits",))
    with pytest.raises(RuntimeError, match="mean_logits has no gradient; detach"):
        stats.mean_logits.sum().backward()


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("chunk", (2, 64))
def test_the_logsumexp_of_a_head_is_differentiable(chunk, dtype, backend):
    draw = torch.Generator().manual_seed(1)
    leaves = [torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype) for shape in ((7, 5), (V, 5), (V,))]
    leaves, targets = [x.requires_grad_() for x in leaves], torch.randint(V, (7,), generator=draw)
    targets[2] = -100
    options = {"temperature": torch.rand(7, generator=draw).to(leaves[0].dtype).double().float() + 0.5}
    options["temperature"] = options["temperature"].double() if dtype == torch.float64 else options["temperature"]
    stats = rlk.linear_token_stats(
        leaves[0], leaves[1], targets, bias=leaves[2], softcap=4.0, logit_scale=1.1, chunk_tokens=chunk, **options
    )
    for terms in ((1, 1, 1), (0, 1, 0)):
        loss = (terms[0] * stats.logprobs + terms[1] * stats.logsumexp**2 + terms[2] * stats.entropy).sum()
        wide = [x.detach().double().requires_grad_() for x in leaves]
        z = 4.0 * torch.tanh(1.1 * (wide[0] @ wide[1].T + wide[2]) / 4.0) / options["temperature"].double()[:, None]
        logp = torch.log_softmax(z, -1)
        each = terms[0] * logp.gather(-1, targets.clamp(min=0)[:, None])[:, 0] + terms[1] * z.logsumexp(-1) ** 2
        each = each - terms[2] * (logp.exp() * logp).sum(-1)
        want = torch.autograd.grad(torch.where(targets != -100, each, 0.0).sum(), wide)
        rtol = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 3e-2}[dtype]
        got = torch.autograd.grad(loss, leaves, retain_graph=True)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=rtol, atol=rtol * b.abs().max().item())
