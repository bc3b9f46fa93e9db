"""`kl_estimate`: every estimator with every option against the formula in float64, dead tokens, layouts, refusals."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rlkernels as rlk

NAN, INF = math.nan, math.inf
OPTIONS = {
    "plain": {},
    "clamps": {"diff_clamp": (-0.5, 0.7), "value_clamp": 0.2},
    "one bound": {"diff_clamp": (None, 0.3), "value_clamp": (-0.1, None)},
    "straight-through": {"gradient": "k2", "value_clamp": 0.2},
    "ratio": {"ratio_weighted": True},
    "capped ratio": {"ratio_weighted": True, "ratio_cap": 1.1, "diff_clamp": 0.6},
    "constant ratio": {"ratio_weighted": True, "ratio_detached": True},
    "straight-through with the ratio": {"gradient": "k2", "ratio_weighted": True, "ratio_cap": 1.1},
}


def reference(logp, ref, old, kind, options):
    """The formula by hand, in autograd."""
    low, high = bounds(options.get("diff_clamp"))
    gap = (logp - ref).clamp(low, high)
    value = {"k1": gap, "abs": gap.abs(), "k2": gap**2 / 2, "k3": (-gap).exp() - 1 + gap}[kind]
    value = value.clamp(*bounds(options.get("value_clamp")))
    ratio = torch.ones_like(gap)
    if options.get("ratio_weighted"):
        ratio = (logp - old).exp().clamp(max=options.get("ratio_cap", INF))
    if options.get("gradient") == "k2":
        moving = ratio.detach() * (logp - ref) ** 2 / 2
        return value.detach() + moving - moving.detach()
    return (ratio.detach() if options.get("ratio_detached") else ratio) * value


def bounds(clamp):
    if isinstance(clamp, float):
        return -clamp, clamp
    return tuple(side if x is None else x for x, side in zip(clamp or (None, None), (-INF, INF), strict=True))


def drawn(shape=(4, 50), seed=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    logp = -3 * torch.rand(shape, generator=draw, dtype=torch.float64)
    near = [logp + 0.6 * torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(2)]
    return [x.to(dtype) for x in (logp, *near)]


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", ["k1", "abs", "k2", "k3"])
def test_value_and_gradient_are_those_of_the_formula(kind, option, backend):
    options = OPTIONS[option]
    for dtype, rtol, atol in ((torch.float64, 1e-11, 1e-12), (torch.float32, 3e-5, 2e-6), (torch.bfloat16, 3e-5, 2e-6)):
        logp, ref, old = drawn(dtype=dtype)
        logp.requires_grad_()
        wide = logp.detach().double().requires_grad_()
        upstream = torch.linspace(-1, 2, logp.numel(), dtype=torch.float64).view(logp.shape)
        passed = {"old_logprobs": old} if options.get("ratio_weighted") else {}
        got = rlk.kl_estimate(logp, ref, kind, **passed, **options)
        want = reference(wide, ref.double(), old.double(), kind, options)
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(got.double(), want, rtol=rtol, atol=atol)
        (slope,) = torch.autograd.grad(got, logp, upstream.to(got.dtype))
        (want_slope,) = torch.autograd.grad(want, wide, upstream)
        assert slope.dtype == dtype
        coarse = 1e-2 if dtype == torch.bfloat16 else rtol
        torch.testing.assert_close(slope.double(), want_slope, rtol=coarse, atol=atol)


@pytest.mark.parametrize("option", ["plain", "clamps", "ratio", "constant ratio"])
def test_gradcheck_in_float64(option, backend):
    logp, ref, old = drawn((2, 5), seed=3)
    options = OPTIONS[option]
    if options.get("ratio_detached"):  # a constant of the graph, which differences would move
        old = logp.clone()
        options = {**options, "ratio_cap": 1e-3}
    passed = {"old_logprobs": old} if options.get("ratio_weighted") else {}
    assert torch.autograd.gradcheck(
        lambda x: rlk.kl_estimate(x, ref, "k3", **passed, **options), logp.requires_grad_(), atol=1e-7
    )


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("broken", [NAN, INF, -INF])
def test_dead_tokens_touch_neither_value_nor_gradient(option, broken, backend):
    logp, ref, old = drawn(seed=1, dtype=torch.float32)
    options = OPTIONS[option]
    mask = torch.rand(logp.shape) < 0.5
    results = []
    for fill in (0.0, broken):
        x, *rest = (y.masked_fill(~mask, fill) for y in (logp, ref, old))
        x.requires_grad_()
        passed = {"old_logprobs": rest[1]} if options.get("ratio_weighted") else {}
        value = rlk.kl_estimate(x, rest[0], mask=mask.int(), **passed, **options)
        results.append((value, *torch.autograd.grad(value.sum(), x)))
        assert not results[-1][0][~mask].any() and not results[-1][1][~mask].any()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_no_token_and_an_all_dead_batch_give_zeros(backend):
    empty = torch.empty(0, 3, requires_grad=True)
    assert torch.autograd.grad(rlk.kl_estimate(empty, empty.detach()).sum(), empty)[0].shape == (0, 3)
    x = torch.full((2, 3), NAN, requires_grad=True)
    value = rlk.kl_estimate(x, x.detach(), mask=torch.zeros(2, 3), value_clamp=1.0)
    assert not value.any() and not torch.autograd.grad(value.sum(), x)[0].any()


def test_a_packed_or_strided_batch_gives_the_same_bits(backend):
    logp, ref, old = drawn((4, 6), dtype=torch.float32)
    options = {"ratio_weighted": True, "ratio_cap": 1.2, "value_clamp": 0.3}
    whole = rlk.kl_estimate(logp, ref, old_logprobs=old, **options)
    flat = rlk.kl_estimate(logp.view(-1), ref.view(-1), old_logprobs=old.view(-1), **options)
    assert torch.equal(whole.view(-1), flat)
    turned = [x.t().contiguous().t() for x in (logp, ref, old)]
    assert torch.equal(whole, rlk.kl_estimate(turned[0], turned[1], old_logprobs=turned[2], **options))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.floats(-30, 30), st.sampled_from(["k1", "abs", "k2", "k3"]), st.floats(0.1, 20), st.floats(0.1, 20))
def test_bounds_that_nothing_reaches_change_no_more_than_rounding_and_others_hold(gap, kind, diff, bound):
    logp, ref = torch.tensor([gap], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    plain = rlk.kl_estimate(logp, ref, kind)
    clamped = rlk.kl_estimate(logp, ref, kind, diff_clamp=diff, value_clamp=bound)
    assert -bound <= clamped.item() <= bound
    if abs(gap) < diff and abs(plain.item()) < bound:
        torch.testing.assert_close(clamped, plain, rtol=1e-12, atol=1e-15)
    straight = rlk.kl_estimate(logp, ref, kind, gradient="k2")
    torch.testing.assert_close(straight, plain, rtol=1e-12, atol=1e-15)


def test_an_infinite_ratio_leaves_a_term_of_zero_at_zero(backend):
    logp, old = torch.tensor([0.0, 0.0], requires_grad=True), torch.tensor([-200.0, -1e4])
    value = rlk.kl_estimate(logp, logp.detach(), "k2", old_logprobs=old, ratio_weighted=True)
    assert not value.any() and not torch.autograd.grad(value.sum(), logp)[0].any()


@pytest.mark.parametrize(
    "options,message",
    [
        ({"kind": "k4"}, "kl_estimate: kind must be one of k1, k2, k3, abs; got 'k4'"),
        ({"gradient": "k3"}, "kl_estimate: gradient must be one of pathwise, k2; got 'k3'"),
        ({"ratio_cap": 2.0}, "kl_estimate: ratio_cap belongs to ratio_weighted=True"),
        ({"ratio_detached": True}, "kl_estimate: ratio_detached belongs to ratio_weighted=True"),
        ({"old_logprobs": torch.zeros(2)}, "kl_estimate: old_logprobs belongs to ratio_weighted=True"),
        ({"diff_clamp": (1.0, -1.0)}, "kl_estimate: diff_clamp must be .low, high. with low < high"),
        ({"value_clamp": (1.0,)}, "kl_estimate: value_clamp has 1 entries"),
        ({"value_clamp": -1.0}, "kl_estimate: value_clamp must be positive and finite, got -1.0"),
        ({"ratio_weighted": True, "ratio_cap": 0.0}, "kl_estimate: ratio_cap must be positive"),
        ({"ratio_weighted": True, "ratio_detached": True, "gradient": "k2"}, "kl_estimate: ratio_detached=True with"),
        ({"mask": torch.ones(3)}, "kl_estimate: mask has shape"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        rlk.kl_estimate(torch.zeros(2), torch.zeros(2), **options)


def test_bad_tensors_and_flags_are_named():
    with pytest.raises(TypeError, match="kl_estimate: ratio_weighted must be True or False, got str"):
        rlk.kl_estimate(torch.zeros(2), torch.zeros(2), ratio_weighted="yes")
    with pytest.raises(ValueError, match="kl_estimate: ref_logprobs has shape"):
        rlk.kl_estimate(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="kl_estimate: ref_logprobs gets no gradient"):
        rlk.kl_estimate(torch.zeros(2), torch.zeros(2, requires_grad=True))
