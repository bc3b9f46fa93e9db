"""Faults of the fused head: its precision, its dtypes, what is frozen, what is empty."""

import pytest
import torch
from reference import assert_within_policy, statistics
from trained_functions import H, V, head_problem, problem

import rlkernels as rlk


@pytest.mark.fault(67)
def test_the_fused_head_keeps_the_accumulator_of_its_logits(backend):
    h, w, targets, _ = head_problem(3, 1024, 32_000, torch.bfloat16)
    kept, rounded = (
        rlk.linear_token_logprobs(h, w, targets, logits_dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    logits = h.double() @ w.double().t()
    truth = statistics(logits, targets)["logprobs"]
    assert_within_policy(
        kept, truth, statistics(h.float() @ w.float().t(), targets, dtype=torch.float32)["logprobs"], "logprobs"
    )
    assert (kept - truth).abs().max() <= 4e-6
    assert (rounded - truth).abs().max() > 1e-3  # rounding, where it is asked for, is that of the logits
    assert (rounded - statistics(logits.bfloat16(), targets)["logprobs"]).abs().max() < 2e-2


@pytest.mark.fault(21, 76)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_the_head_do_not_depend_on_the_number_of_chunks(dtype, backend):
    h, w, targets, g = head_problem(48, 32, 133, dtype)
    wide = [x.double().requires_grad_() for x in (h, w)]
    truth = torch.autograd.grad(statistics(wide[0] @ wide[1].t(), targets)["logprobs"], wide, g.double())
    best = [(t.to(dtype).double() - t).norm() / t.norm() for t in truth]  # one cast of the truth
    errors = []
    for chunk in (1, 7, 48, None):
        leaves = [x.clone().requires_grad_() for x in (h, w)]
        rlk.linear_token_logprobs(*leaves, targets, chunk_tokens=chunk).backward(g)
        errors.append([((x.grad.double() - t).norm() / t.norm()).item() for x, t in zip(leaves, truth, strict=True)])
    for error in errors:
        for got, once in zip(error, best, strict=True):
            assert got <= 1.05 * once, f"{errors}, one cast costs {best}"
    weights = [e[1] for e in errors]
    assert max(weights) <= 1.02 * min(weights)


@pytest.mark.fault(39)
@pytest.mark.parametrize("trained", [(h, w, b) for h in (0, 1) for w in (0, 1) for b in (0, 1)])
def test_what_is_frozen_gets_no_gradient_and_no_buffer(trained, backend):
    d = problem()
    operands = [
        d[k].clone().requires_grad_(bool(on)) for k, on in zip(("hidden", "weight", "bias"), trained, strict=True)
    ]
    logp = rlk.linear_token_logprobs(operands[0], operands[1], d["targets"], bias=operands[2], chunk_tokens=4)
    assert logp.requires_grad == any(trained)
    if not any(trained):
        return
    logp.backward(d["a"])
    wide = [x.detach().double().requires_grad_() for x in operands]
    truth = torch.autograd.grad(
        statistics(wide[0] @ wide[1].t() + wide[2], d["targets"])["logprobs"], wide, d["a"].double()
    )
    for x, expected, on in zip(operands, truth, trained, strict=True):
        assert (x.grad is not None) == bool(on)
        if on:
            torch.testing.assert_close(x.grad.double(), expected, rtol=1e-5, atol=2e-6 * expected.abs().max().item())


@pytest.mark.fault(43)
@pytest.mark.parametrize("hidden", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [None, torch.float32])
def test_autocast_takes_any_mix_of_dtypes_and_gradients_come_in_the_parameters_dtype(hidden, weight, bias, backend):
    d = problem()
    operands = [
        d["hidden"].to(hidden).requires_grad_(),
        d["weight"].to(weight).requires_grad_(),
        None if bias is None else d["bias"].to(bias).requires_grad_(),
    ]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp = rlk.linear_token_logprobs(operands[0], operands[1], d["targets"], bias=operands[2])
    assert logp.dtype == torch.float32
    rounded = [None if x is None else x.detach().bfloat16().double() for x in operands]
    logits = rounded[0] @ rounded[1].t() + (0 if bias is None else rounded[2])
    torch.testing.assert_close(
        logp.detach().double(), statistics(logits, d["targets"])["logprobs"], atol=1e-5, rtol=1e-5
    )
    logp.backward(d["a"])
    for x in operands:
        assert x is None or x.grad.dtype == x.dtype and x.grad.isfinite().all() and x.grad.any()


@pytest.mark.fault(54)
def test_an_empty_shard_of_the_head_is_refused_with_what_to_do():
    d = problem()
    for empty in (torch.empty(0), torch.empty(0, H), torch.empty(V, 0)):
        with pytest.raises(ValueError, match=r"weight has 0 elements; gather it first \(ZeRO-3"):
            rlk.linear_token_logprobs(d["hidden"], empty, d["targets"])
