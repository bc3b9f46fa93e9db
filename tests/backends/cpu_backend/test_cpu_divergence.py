"""The native kernel of divergences against float64: widths around its chunks, every dtype, special values.

``test_cpu_rows.py`` runs a part of it again on each lower instruction set.
"""

import math

import pytest
import torch
from present_backends import native

import rlkernels as rlk

pytestmark = native
KINDS = {"forward_kl": {}, "reverse_kl": {}, "jsd": {"beta": 0.2}, "cross_entropy": {}}
WIDTHS = (1, 31, 65, 129, 4097)
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10, torch.float64: 1e-12}


def pair(vocab, dtype, rows=5):
    draw = torch.Generator().manual_seed(vocab)
    x, y = (3 * torch.randn(rows, vocab, generator=draw, dtype=torch.float64) for _ in range(2))
    return x.to(dtype), y.to(dtype)


def both(x, y, weights, backend, **options):
    leaf = x.clone().requires_grad_()
    with rlk.use_backend(backend):
        value = rlk.token_divergences(leaf, y, **options)
        (gradient,) = torch.autograd.grad(value, leaf, weights.to(value.dtype))
    return value.detach().double(), gradient.double()


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("kind", KINDS)
def test_every_width_and_mask_gives_the_definition_in_float64(kind, dtype):
    for vocab in WIDTHS:
        x, y = pair(vocab, dtype)
        weights = torch.tensor([1.0, -0.5, 0.0, 2.0, 1e-3])
        keep = torch.arange(vocab) % 3 != 1
        for mask in (None, keep, keep.repeat(5, 1)):
            options = {"kind": kind, "vocab_mask": mask, "temperature": 0.7, **KINDS[kind]}
            value, gradient = both(x, y, weights, "cpu", **options)
            want, expected = both(x.double(), y.double(), weights, "eager", **options)
            exact = dtype == torch.float64
            torch.testing.assert_close(value, want, rtol=1e-12 if exact else 1e-6, atol=1e-12 if exact else 1e-6)
            torch.testing.assert_close(gradient, expected, rtol=ROUNDING[dtype], atol=1e-12 if exact else 4e-6)
            assert (gradient[2] == 0).all()


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_a_row_is_at_no_distance_from_itself_and_its_gradient_is_next_to_nothing(kind, dtype):
    for vocab in WIDTHS:
        x, _ = pair(vocab, dtype)
        value, gradient = both(x, x, torch.ones(5), "cpu", kind=kind, **KINDS[kind])
        assert (value == 0).all() and gradient.abs().max() < 1e-7


@pytest.mark.parametrize("kind", KINDS)
def test_extremes_are_those_of_eager(kind):
    """Columns that either model excludes, distributions of one column, logits far apart, NaN and infinity."""
    x, y = pair(130, torch.float32, 9)
    x[1, 3:] = y[1, 3:] = -math.inf
    x[2], y[2] = 0.0, 0.0
    x[2, 5], y[2, 70] = 300.0, 250.0
    x[3] *= 100
    y[4] *= 100
    y[5, 9] = -math.inf
    x[6, 9] = -math.inf
    x[7, 0], y[8, 1] = math.nan, math.inf
    with rlk.use_backend("eager"):
        wide = rlk.token_divergences(x.double(), y.double(), kind=kind, **KINDS[kind])
    value, gradient = both(x, y, torch.ones(9), "cpu", kind=kind, **KINDS[kind])
    _, expected = both(x.double(), y.double(), torch.ones(9), "eager", kind=kind, **KINDS[kind])
    torch.testing.assert_close(value, wide, rtol=1e-5, atol=1e-5, equal_nan=True)
    for row in range(9):
        if wide[row].isfinite():
            torch.testing.assert_close(gradient[row], expected[row], rtol=1e-4, atol=1e-4 if row in (3, 4) else 1e-5)


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_a_large_gradient_is_stored_around_the_cache_with_the_same_bits_on_two_threads(kind):
    x, y = pair(131072, torch.bfloat16, 65)
    one = [both(x[k : k + 1], y[k : k + 1], torch.ones(1), "cpu", kind=kind, **KINDS[kind]) for k in (0, 64)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        value, gradient = both(x, y, torch.ones(65), "cpu", kind=kind, **KINDS[kind])
    finally:
        torch.set_num_threads(threads)
    for k, (alone, of_row) in zip((0, 64), one, strict=True):
        assert torch.equal(value[k : k + 1], alone) and torch.equal(gradient[k : k + 1], of_row)
