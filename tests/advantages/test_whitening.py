"""Whitening over live elements against a loop in Python floats."""

import math

import pytest
import torch

from rlkernels.advantages.whitening import masked_whiten

# Holes at the start, in the middle and at the end; no hole; nothing alive; one element.
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


def randn(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X, UPSTREAM = randn(*MASK.shape, seed=0), randn(*MASK.shape, seed=1)


def whiten_loop(x, live, unbiased, eps, mode, shift):
    """One population, in Python floats."""
    kept = [v for v, m in zip(x, live, strict=True) if m]
    if not kept:
        return [0.0] * len(x)
    mean = math.fsum(kept) / len(kept)
    variance = math.fsum((v - mean) ** 2 for v in kept) / max(len(kept) - unbiased, 1)
    floor = variance + eps if mode == "add" else max(variance, eps)
    spread = 0.0 if len(set(kept)) == 1 else 1 / math.sqrt(floor)
    return [((v - mean) * spread + (0.0 if shift else mean)) if m else 0.0 for v, m in zip(x, live, strict=True)]


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("eps_mode,eps", [("add", 1e-8), ("add", 0.5), ("clamp", 1e-8), ("clamp", 0.5)])
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("dim", [None, 1])
def test_whitening_equals_a_loop_over_live_elements(dim, unbiased, eps_mode, eps, shift_mean):
    options = {"unbiased": unbiased, "eps": eps, "eps_mode": eps_mode, "shift_mean": shift_mean}
    arguments = unbiased, eps, eps_mode, shift_mean
    if dim is None:
        want = whiten_loop(X.flatten().tolist(), MASK.flatten().tolist(), *arguments)
    else:
        want = [y for x, m in zip(X.tolist(), MASK.tolist(), strict=True) for y in whiten_loop(x, m, *arguments)]
    want = torch.tensor(want, dtype=torch.float64).view(X.shape)
    for x in (X, torch.where(MASK, X, float("nan"))):
        torch.testing.assert_close(masked_whiten(x, MASK, dim=dim, **options), want, rtol=1e-12, atol=1e-14)


@pytest.mark.fault(89)
@pytest.mark.parametrize("eps", [0.0, 1e-8])
@pytest.mark.parametrize("eps_mode", ["add", "clamp"])
def test_whitening_without_spread_gives_exactly_zero(eps_mode, eps):
    for x in (
        torch.full((3, 7), 0.1, dtype=torch.float64),
        torch.full((3, 7), 0.1),
        torch.zeros(1, 4),
        torch.zeros(0, 4),
    ):
        assert torch.equal(masked_whiten(x, eps=eps, eps_mode=eps_mode), torch.zeros_like(x))
    one, none = torch.tensor([[3.5, 7.0]]), torch.tensor([[0, 0]])
    assert masked_whiten(one, torch.tensor([[1, 0]]), eps=eps, eps_mode=eps_mode).tolist() == [[0.0, 0.0]]
    assert masked_whiten(one, torch.tensor([[1, 0]]), eps=eps, eps_mode=eps_mode, shift_mean=False).tolist() == [
        [3.5, 0.0]
    ]
    assert masked_whiten(one, none, eps=eps, eps_mode=eps_mode).tolist() == [[0.0, 0.0]]


def test_whitening_survives_a_large_offset_in_float32():
    x = 1e4 + randn(4096, seed=2).float()
    want = (x.double() - x.double().mean()) / (x.double().var() + 1e-8).sqrt()
    got = masked_whiten(x)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-7, atol=1e-9)


@pytest.mark.fault(26)
def test_whitening_lets_no_gradient_out_of_dead_elements():
    x = torch.where(MASK, X, float("inf")).requires_grad_()
    (grad,) = torch.autograd.grad((masked_whiten(x, MASK) * UPSTREAM).sum(), x)
    clean = X.clone().requires_grad_()
    live = clean[MASK]
    ((live - live.mean()) / (live.var() + 1e-8).sqrt() * UPSTREAM[MASK]).sum().backward()
    torch.testing.assert_close(grad, clean.grad)


def test_nan_in_a_live_element_poisons_its_population_and_no_other():
    x = X.clone()
    x[1, 2] = float("nan")
    assert masked_whiten(x, MASK)[MASK].isnan().all()
    rows = masked_whiten(x, MASK, dim=1)
    assert rows[1][MASK[1]].isnan().all() and not rows[[0, 2, 3, 4]].isnan().any()


BAD = {
    "B15": (ValueError, r"^masked_whiten: mask has shape \(8,\), expected \(5, 8\)", lambda: masked_whiten(X, MASK[0])),
    "B16": (
        TypeError,
        "^masked_whiten: mask must be bool, integer or floating",
        lambda: masked_whiten(X, MASK.to(torch.complex64)),
    ),
    "B44": (
        ValueError,
        "^masked_whiten: eps_mode must be one of add, clamp; got 'max'",
        lambda: masked_whiten(X, eps_mode="max"),
    ),
    "eps": (
        ValueError,
        "^masked_whiten: eps must be finite and not negative, got nan",
        lambda: masked_whiten(X, eps=float("nan")),
    ),
    "integers": (TypeError, "^masked_whiten: x has dtype torch.int64", lambda: masked_whiten(MASK.long())),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    error, message, call = BAD[case]
    with pytest.raises(error, match=message):
        call()
