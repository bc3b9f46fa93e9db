"""Divergences in the interpreter: every kind over several tiles, with masks, dead rows and columns that a model
excludes, against float64.
"""

import math

import pytest
import torch

import rlkernels as rlk

KINDS = {"forward_kl": {}, "reverse_kl": {}, "jsd": {"beta": 0.3}, "cross_entropy": {}}
ROUNDING = {torch.float32: 4e-6, torch.bfloat16: 2.0**-7, torch.float64: 1e-11}


def both(x, y, mask, upstream, **options):
    leaf = x.clone().requires_grad_()
    value = rlk.token_divergences(leaf, y, mask, **options)
    (gradient,) = torch.autograd.grad(value, leaf, upstream.to(value.dtype))
    return value.detach().double(), gradient.double()


@pytest.mark.parametrize("vocab", [1, 33, 69])
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient_are_those_of_float64_over_several_tiles(kind, vocab, small_tiles, backend):
    draw = torch.Generator().manual_seed(vocab)
    for dtype, unit in ROUNDING.items():
        x, y = ((2 * torch.randn(4, vocab, generator=draw)).to(dtype) for _ in range(2))
        y[0] = x[0]
        mask, upstream = torch.tensor([True, True, False, True]), torch.tensor([1.0, -0.5, 2.0, 0.0])
        keep = None
        if dtype != torch.float32 and vocab > 1:
            keep = torch.arange(vocab) % 4 > 0
            if kind in ("reverse_kl", "jsd"):
                x[1, 5] = -math.inf
        options = {"kind": kind, "vocab_mask": keep, "temperature": torch.tensor([0.7, 1.0, 0.0, 2.0]), **KINDS[kind]}
        dirty, other = (torch.where(mask[:, None], z, math.nan) for z in (x, y))
        got, gradient = both(dirty, other, mask, upstream, **options)
        with rlk.use_backend("eager"):
            want, expected = both(x.double(), y.double(), mask, upstream, **options)
        torch.testing.assert_close(got, want, rtol=min(unit, 4e-6), atol=min(unit, 4e-6))
        torch.testing.assert_close(gradient, expected, rtol=unit, atol=min(unit, 1e-5))
        assert kind == "cross_entropy" or got[0] == 0
        assert (gradient[2:] == 0).all() and got[2] == 0


def test_the_gradient_of_a_loss_is_made_anew_for_an_upstream_gradient_that_is_not_one(small_tiles, backend):
    x, y = torch.randn(2, 3, 33, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 3, 33)
    whole = torch.cat([x, x], 1).requires_grad_()
    loss = rlk.divergence_loss(whole[:, :3], y, kind="jsd")
    one, two = (torch.autograd.grad(loss, whole, torch.tensor(u), retain_graph=True)[0] for u in (1.0, 3.0))
    torch.testing.assert_close(two, 3.0 * one)
    assert (one[:, 3:] == 0).all() and (one[:, :3] != 0).any()


def test_a_teacher_of_top_log_probabilities_and_a_head_run_on_the_same_kernels(small_tiles, backend):
    draw = torch.Generator().manual_seed(1)
    hidden, weight, theirs = (torch.randn(*shape, generator=draw) for shape in ((4, 3), (33, 3), (33, 3)))
    leaf = hidden.clone().requires_grad_()
    known, ids = (hidden @ theirs.T).log_softmax(-1).topk(5)
    for options in ({"teacher_topk": (ids, known)}, {"teacher_hidden": hidden, "teacher_weight": theirs}):
        loss = rlk.linear_distillation_loss(leaf, weight, chunk_tokens=16, **options)
        (gradient,) = torch.autograd.grad(loss, leaf)
        with rlk.use_backend("eager"):
            want = rlk.linear_distillation_loss(leaf, weight, **options)
            (expected,) = torch.autograd.grad(want, leaf)
        torch.testing.assert_close(loss, want)
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
