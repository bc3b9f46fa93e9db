"""Several targets per row: values and gradients against torch in float64, duplicates, ignored and excluded targets,
layouts.
"""

import pytest
import torch

import rlkernels as rlk

V, K = 23, 4


def problem(dtype=torch.float64, masked=None):
    """Logits, targets of which some are ignored, equal or excluded, temperatures, and a mask of columns."""
    draw = torch.Generator().manual_seed(0)
    logits = (2 * torch.randn(2, 6, V, generator=draw, dtype=torch.float64)).to(dtype)
    targets = torch.randint(V, (2, 5, K), generator=draw)
    targets[0, 1], targets[0, 2, 0], targets[1, 0, 2] = -100, -100, -100
    targets[1, 1], targets[1, 2, 3], targets[0, 3, 0] = 7, targets[1, 2, 0], 0
    temperature = torch.rand(2, 5, generator=draw).to(torch.float64 if dtype == torch.float64 else torch.float32) + 0.5
    mask = None if masked is None else torch.rand((V,) if masked == "V" else (2, 5, V), generator=draw) < 0.6
    if mask is not None:
        mask[..., 3] = True
    return logits, targets, temperature, mask, torch.randn(2, 5, K, generator=draw, dtype=torch.float64)


@pytest.mark.parametrize("inplace", (False, True))
@pytest.mark.parametrize("masked", (None, "V", "TV"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
def test_values_and_gradient_are_those_of_a_log_softmax(dtype, masked, inplace, backend):
    logits, targets, temperature, mask, upstream = problem(dtype, masked)
    wide = logits.double().requires_grad_()
    z = wide[:, :-1] / temperature.double()[..., None]
    kept = torch.ones(2, 5, V, dtype=torch.bool) if mask is None else mask.expand(2, 5, V)
    logp = torch.where(kept, z - torch.where(kept, z, -torch.inf).logsumexp(-1, keepdim=True), 0.0)
    index, live = targets.clamp(min=0), targets != -100
    inside = live & kept.gather(-1, index)
    want = torch.where(inside, logp.gather(-1, index), 0.0)
    (slope,) = torch.autograd.grad((want * upstream).sum(), wide)
    leaf = logits.clone().requires_grad_()
    got = rlk.token_logprobs(
        (leaf * 1)[:, :-1], targets, temperature=temperature, vocab_mask=mask, inplace_backward=inplace
    )
    assert (got[live & ~inside] == -torch.inf).all() and (got[~live] == 0).all()
    rtol, atol = {torch.float64: (1e-12, 1e-13), torch.float32: (1e-5, 2e-6), torch.bfloat16: (1e-2, 2e-2)}[dtype]
    torch.testing.assert_close(torch.where(inside, got, 0.0).double(), want, rtol=min(rtol, 1e-5), atol=min(atol, 2e-6))
    (found,) = torch.autograd.grad(got, leaf, upstream.to(got.dtype))
    torch.testing.assert_close(found.double(), slope, rtol=rtol, atol=atol)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and not found[0, 1].any()


def test_each_target_is_the_one_of_a_call_of_its_own():
    logits, targets, *_ = problem(torch.float32)
    got = rlk.token_logprobs(logits[:, :-1], targets)
    for k in range(K):
        torch.testing.assert_close(got[..., k], rlk.token_logprobs(logits[:, :-1], targets[..., k]))
    packed = rlk.token_logprobs(logits[:, :-1].reshape(-1, V), targets.view(-1, K).int())
    assert torch.equal(packed.view(got.shape), got)
    assert torch.equal(rlk.token_logprobs(logits[0, 0], targets[0, 0]), got[0, 0])


@pytest.mark.parametrize("inplace", (False, True))
@pytest.mark.parametrize("rows", ((0,), (0, 3), (2, 0)), ids=str)
def test_no_row_has_no_log_probability_and_a_gradient_of_nothing(rows, inplace, backend):
    logits = torch.zeros(*rows, V, requires_grad=True)
    got = rlk.token_logprobs(logits * 1, torch.zeros(*rows, K, dtype=torch.long), inplace_backward=inplace)
    assert got.shape == (*rows, K)
    got.sum().backward()
    assert logits.grad.shape == logits.shape


def test_nan_stays_in_its_row_and_ids_outside_of_the_vocabulary_raise():
    logits, targets, *_ = problem(torch.float32)
    dirty = logits.clone()
    dirty[1, 3, 2], dirty[0, 1] = torch.nan, torch.nan  # a scored row, and one whose targets are all ignored
    leaf = dirty.requires_grad_()
    got = rlk.token_logprobs(leaf[:, :-1], targets)
    clean = rlk.token_logprobs(logits[:, :-1], targets)
    assert got[1, 3].isnan().all() and not got[0].isnan().any()
    assert torch.equal(got[0], clean[0]) and torch.equal(got[1, :3], clean[1, :3])
    got[0].sum().backward()
    assert leaf.grad.isfinite().all() and not leaf.grad[0, 1].any()
    targets[1, 2, 1] = V
    with pytest.raises(IndexError, match=f"target {V} at row 7 "):
        rlk.token_logprobs(logits[:, :-1], targets)
    with pytest.raises(ValueError, match="targets has shape"):
        rlk.token_logprobs(logits[:, :-1], targets[:, :, :0])


def test_gradcheck():
    logits, targets, temperature, *_ = problem()
    x = logits[:, :-1].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rlk.token_logprobs(x, targets, temperature=temperature), x)
