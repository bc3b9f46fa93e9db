"""What every backend's ``weighted_loss`` is held against: its definition in float64, through autograd."""

import itertools

import oracles
import torch

PARAMS = {"ppo_clip": [0.2, 0.28], "pairwise": [], "k2": []}
OTHERS = {"ppo_clip": 2, "pairwise": 0, "k2": 1}
KINDS = ("every element", "mask", "counted mask", "weights", "counted weights")
CASES = [
    *itertools.product(("ppo_clip",), (0,), KINDS),
    *itertools.product(("pairwise",), (1, 2), KINDS),
    ("k2", 1, "counted mask"),
]


def columns(n, count, dtype, seed=0):
    return [
        x.clone()
        for x in torch.randn(count, n, generator=torch.Generator().manual_seed(seed + n), dtype=torch.float64).to(dtype)
    ]


def weighing(kind, n, dtype):
    """``(weight, total)``: a third of the elements is dead, wherever there is a weight."""
    weight = columns(n, 1, dtype, seed=9)[0]
    weight[::3] = 0.0
    live = weight != 0
    return {"every element": None, "mask": live, "counted mask": live}.get(
        kind, weight
    ), live.sum() if "counted" in kind else None


def definition(objective, first, minus, others, weight, total, share):
    """Loss and slopes in float64."""
    first = first.double().clone().requires_grad_()
    x = first
    for m in minus:
        x = x - m.double()
    w = torch.ones(first.shape, dtype=torch.float64) if weight is None else weight.double()
    live = w != 0
    # max(total, 1): without a live element there is nothing to divide.
    w = w[live] * share / (1 if total is None else max(int(total), 1))
    loss = (w * getattr(oracles, objective)(x[live], *(c.double()[live] for c in others), *PARAMS[objective])).sum()
    (slope,) = torch.autograd.grad(loss, first)
    return loss.detach(), torch.stack([slope, -slope] if minus else [slope])


def check(weighted_loss, objective, taken, kind, n, dtype=torch.float32):
    """``weighted_loss`` of a backend against the definition; NaN and infinity under dead elements reach nothing."""
    first, *rest = columns(n, 1 + taken + OTHERS[objective], dtype)
    minus, others = rest[:taken], rest[taken:]
    (weight, total), share = weighing(kind, n, dtype), 0.3
    want, slopes = definition(objective, first, minus, others, weight, total, share)
    if weight is not None:
        for k, x in enumerate((first, *minus, *others)):
            x[weight == 0] = (torch.nan, torch.inf)[k % 2]
    loss, got = weighted_loss(objective, first, minus, others, PARAMS[objective], weight, total, share)
    unit = torch.finfo(dtype).eps
    assert loss.shape == () and loss.dtype == dtype and got.shape == slopes.shape and got.dtype == dtype
    scale = slopes.abs().max().item()
    torch.testing.assert_close(got.double(), slopes, rtol=20 * unit, atol=2 * unit * scale)
    torch.testing.assert_close(loss.double(), want, rtol=20 * unit, atol=2 * unit * scale * n**0.5)
    if minus:
        assert torch.equal(got[1], -got[0])


def check_without_a_live_element(weighted_loss):
    nan = torch.full((5,), torch.nan)
    dead, none = torch.zeros(5, dtype=torch.bool), torch.tensor(0)
    for weight, total in ((dead, none), (dead, None), (torch.zeros(5), none), (torch.zeros(5), None)):
        loss, slopes = weighted_loss("pairwise", nan, [nan], [], [], weight, total, 1.0)
        assert loss.item() == 0.0 and not slopes.any() and slopes.shape == (2, 5)
    empty = torch.empty(0)
    for weight, total in ((None, None), (dead[:0], none)):
        loss, slopes = weighted_loss("pairwise", empty, [], [], [], weight, total, 1.0)
        assert loss.item() == 0.0 and slopes.shape == (1, 0)
