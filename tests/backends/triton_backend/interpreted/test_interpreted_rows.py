"""Statistics and gradients of rows: every output and each upstream gradient against float64, over several tiles and all
layouts.
"""

import itertools

import pytest
import torch
from flat_backend import Flat
from problems import EVERYTHING, NAN
from reference import EPS32, assert_gradient, cotangents, draw_rows, gradient_allowance, judge, same_bits, statistics

import rlkernels as rlk
from rlkernels.backends.triton import launch as kernels
from rlkernels.backends.triton import launch_configs
from rlkernels.backends.triton.launch_configs import Config

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# A tile holds 32 columns here: one column, fewer than a lane, around one tile, around two tiles ahead, several and a
# part.
@pytest.mark.fault(4)
@pytest.mark.parametrize("vocab", [1, 2, 7, 31, 32, 33, 69])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_statistic_and_gradient_holds_its_bound_at_every_vocabulary_size(vocab, dtype, small_tiles, backend):
    x, targets, mask = draw_rows((4,), vocab, dtype, seed=vocab)
    reference = draw_rows((4,), vocab, dtype, seed=vocab + 1)[0]
    stats = judge(rlk.token_stats, x, targets, 0.7, vocab_mask=mask if vocab % 2 else None, ref_logits=reference)
    assert (stats.logprobs <= 0).all()


def test_a_temperature_and_a_mask_per_row_hold_the_bounds(small_tiles, backend):
    x, targets, mask = draw_rows((4,), 69, torch.bfloat16)
    temperature = torch.tensor([1.0, 0.5, 100.0, 1e-2])
    judge(
        rlk.token_stats,
        x,
        targets,
        temperature,
        vocab_mask=mask,
        ref_logits=draw_rows((4,), 69, torch.bfloat16, seed=3)[0],
    )


@pytest.mark.fault(136)
def test_the_coldest_and_the_hottest_temperature_hold_the_bounds(small_tiles, backend):
    x, targets, _ = draw_rows((6,), 69)
    judge(
        rlk.token_stats,
        x,
        targets,
        torch.tensor([2.0**-40, 2.0**40, 1e-12, 1e12, 1e-6, 1e6]),
        ref_logits=draw_rows((6,), 69, seed=3)[0],
    )


@pytest.mark.fault(136)
@pytest.mark.parametrize("t", [1.0, 1e-3])
def test_an_exact_kl_counts_how_far_the_reference_moves_over_tiles_that_either_side_excludes(t, small_tiles, backend):
    """Tiles hold 32 columns: the policy, the reference or both are -inf in the first, and the reference's maximum comes
    last.
    """
    x, targets, _ = draw_rows((4,), 96, seed=9)
    ref, x = draw_rows((4,), 96, seed=10)[0].nan_to_num(), x.nan_to_num()
    ref[:, 64:] += torch.arange(32) * 3.0
    x[:2, :32], ref[1:3, :32] = -torch.inf, -torch.inf
    x[2, :32] = -torch.inf
    judge(rlk.token_stats, x, targets.clamp(min=32), t, ref_logits=ref)


def backward_problem(dtype, vocab=69, rows=5):
    x, targets, mask = draw_rows((rows,), vocab, dtype, seed=7)
    reference = draw_rows((rows,), vocab, dtype, seed=8)[0]
    found = Flat(kernels).token_stats(x, targets, 0.7, -100, None, reference, EVERYTHING)
    _, shift, total, entropy, _, _, _, _, ref_shift, ref_total, kl = found
    return x, targets, reference, (shift, total, entropy, ref_shift, ref_total, kl)


@pytest.mark.fault(38)
@pytest.mark.parametrize("subset", [s for n in (1, 2, 3) for s in itertools.combinations(range(3), n)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_subset_of_upstream_gradients_gives_its_gradient(subset, dtype, small_tiles):
    x, targets, reference, saved = backward_problem(dtype)
    names = ("logprobs", "entropy", "kl")
    g = [v if k in subset else None for k, v in enumerate(cotangents((5,), 3))]
    got = Flat(kernels).token_stats_backward(*g, x, targets, 0.7, -100, None, reference, *saved, None)
    wide = x.double().requires_grad_()
    truth = statistics(wide, targets, 0.7, ref_logits=reference)
    upstream = {names[k]: g[k] for k in subset}
    (expected,) = torch.autograd.grad([truth[n] for n in upstream], wide, [v.double() for v in upstream.values()])
    assert_gradient(
        got, expected, gradient_allowance(upstream, x, targets, 0.7, ref_logits=reference), str(list(upstream))
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounded_gradients_are_within_one_ulp_and_nearly_all_are_the_nearest(dtype, small_tiles):
    x, targets, _ = draw_rows((6,), 500, dtype, seed=5)
    (g,) = cotangents((6,), 1)
    found = Flat(kernels).token_stats(x, targets, 1.0, -100, None, None, 0)
    got = Flat(kernels).token_stats_backward(
        g, None, None, x, targets, 1.0, -100, None, None, *found[1:3], None, None, None, None, None
    )
    wide = x.double().requires_grad_()
    (truth,) = torch.autograd.grad(statistics(wide, targets)["logprobs"], wide, g.double())
    if dtype == torch.float32:
        assert (truth.sum(-1).abs() < 1e-12).all() and (got.double().sum(-1).abs() <= 8 * EPS32 * g.abs()).all()
    else:

        def steps(x):  # consecutive numbers are one apart, and both zeros are 0
            bits = x.view(torch.int16).int()
            return torch.where(bits < 0, -(bits & 0x7FFF), bits)

        ulp = (steps(truth.to(dtype)) - steps(got)).abs()
        assert (ulp <= 1).all() and (ulp == 0).double().mean() >= 0.999


@pytest.mark.fault(7, 15, 53)
@pytest.mark.parametrize("layout", ["rows apart", "next-token", "offset", "expanded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_do_not_depend_on_layout_rows_or_batch(layout, dtype, small_tiles):
    x, targets, _ = draw_rows((2, 3), 69, dtype)
    reference = draw_rows((2, 3), 69, dtype, seed=3)[0]
    targets = targets.view(-1)

    def laid_out(x):
        if layout == "rows apart":
            parent = torch.full((2, 3, 80), NAN, dtype=dtype)
            view = parent[:, :, 3:72]
        elif layout == "next-token":
            parent = torch.full((2, 4, 69), NAN, dtype=dtype)
            view = parent[:, :-1]
        elif layout == "offset":
            view = torch.full((2 * 3 * 69 + 1,), NAN, dtype=dtype)[1:].view(2, 3, 69)
        else:
            return x[:1].expand(2, 3, 69)
        return view.copy_(x)

    def run(x, reference, rows=slice(None)):
        y = targets[rows]
        stats = Flat(kernels).token_stats(x, y, 0.7, -100, None, reference, EVERYTHING)
        _, shift, total, entropy, _, _, _, _, ref_shift, ref_total, kl = stats
        g = [v[rows] for v in cotangents((6,), 3)]
        return *stats, Flat(kernels).token_stats_backward(
            *g, x, y, 0.7, -100, None, reference, shift, total, entropy, ref_shift, ref_total, kl, None
        )

    plain = x if layout != "expanded" else x[:1].repeat(2, 1, 1)
    plain_reference = reference if layout != "expanded" else reference[:1].repeat(2, 1, 1)
    expected = run(plain.reshape(6, 69), plain_reference.reshape(6, 69))
    for got, want in zip(run(laid_out(x), laid_out(reference)), expected, strict=True):
        assert same_bits(got, want)
    alone = run(plain.reshape(6, 69)[4:5], plain_reference.reshape(6, 69)[4:5], slice(4, 5))
    for got, want in zip(alone, expected, strict=True):
        assert same_bits(got, want[4:5])


@pytest.mark.fault(32)
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_gives_the_same_bits_and_otherwise_the_logits_keep_theirs(dtype, small_tiles):
    x, targets, reference, saved = backward_problem(dtype)
    g = cotangents((5,), 3)
    before = x.clone()
    expected = Flat(kernels).token_stats_backward(*g, x, targets, 0.7, -100, None, reference, *saved, None)
    assert same_bits(x, before)
    parent = torch.full((5, 90), NAN, dtype=dtype)
    for target in (x.clone(), parent[:, 5:74].copy_(x)):
        got = Flat(kernels).token_stats_backward(*g, target, targets, 0.7, -100, None, reference, *saved, target)
        assert got is target and same_bits(target, expected)
    assert parent[:, :5].isnan().all() and parent[:, 74:].isnan().all()


@pytest.mark.fault(53)
def test_a_gradient_in_slices_has_the_bits_of_a_whole_one(small_tiles, monkeypatch):
    x, targets, reference, saved = backward_problem(torch.float32)
    g = cotangents((5,), 3)
    results = []
    for slices in (1, 10, 2048):  # per row: 1, 2 and 3 programs
        monkeypatch.setattr(kernels, "SLICES", slices)
        results.append(Flat(kernels).token_stats_backward(*g, x, targets, 0.7, -100, None, reference, *saved, None))
    assert same_bits(results[0], results[1]) and same_bits(results[0], results[2])


@pytest.mark.fault(51)
def test_bits_depend_on_lanes_alone_not_on_tiles_ahead_or_threads():
    x, targets, mask = draw_rows((5,), 133, torch.float32)
    results = []
    for config in (Config(4, 32), Config(4, 128), Config(4, 32, 2), Config(4, 32, 4)):
        with launch_configs.override(token_stats=config):
            results.append(Flat(kernels).token_stats(x, targets, 0.7, -100, mask, x.flip(0), EVERYTHING))
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.fault(19, 84)
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_lanes_agree_between_ops_and_dtypes(itemsize):
    for vocab in (1, 1024, 1025, 32_000, 32_768, 32_769, 151_936, 300_000):
        lanes = launch_configs.row_config("token_stats", itemsize, vocab).lanes
        assert lanes == launch_configs.row_config("fused_policy", itemsize, vocab).lanes
        assert itemsize == 8 or lanes == launch_configs.row_config("token_stats", 6 - itemsize, vocab).lanes


@pytest.mark.fault(19)
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_sixteen_bit_logits_give_the_bits_of_the_same_values_in_fp32(dtype, small_tiles):
    x, targets, mask = draw_rows((5,), 69, dtype)
    other = x.flip(0)
    narrow = Flat(kernels).token_stats(x, targets, 0.7, -100, mask, other, EVERYTHING)
    wide = Flat(kernels).token_stats(x.float(), targets, 0.7, -100, mask, other.float(), EVERYTHING)
    assert all(same_bits(a, b) for a, b in zip(narrow, wide, strict=True))


# Whole tiles of 32 at the front, parts of one, and everything but the target's tile.
@pytest.mark.fault(17)
@pytest.mark.parametrize("leading", [1, 32, 50, 64, 95])
@pytest.mark.parametrize("masked", [False, True])
def test_leading_tiles_of_minus_infinity_change_nothing(leading, masked, small_tiles, backend):
    x, targets, _ = draw_rows((3,), 100, torch.bfloat16)
    targets[:] = torch.tensor([99, 97, 98])
    mask = torch.arange(100) >= leading if masked else None
    if not masked:
        x[:, :leading] = -torch.inf
    stats = judge(rlk.token_stats, x, targets, 0.7, vocab_mask=mask, ref_logits=x.flip(0).contiguous())
    assert stats.entropy.isfinite().all()


@pytest.mark.fault(66, 76)
@pytest.mark.parametrize(
    "shape", ["rising", "falling", "peak in the last tile", "equal", "far below zero", "huge negative numbers"]
)
def test_rescaling_between_tiles_does_not_drift(shape, small_tiles, backend):
    x = torch.linspace(-30, 30, 200)
    x = {
        "rising": x,
        "falling": x.flip(0),
        "peak in the last tile": torch.cat([x[:-1] / 30, x[-1:] * 2]),
        "equal": torch.zeros_like(x),
        "far below zero": x * 0.1 - 1e4,
        "huge negative numbers": x * 1e33 - 1e36,
    }[shape]
    judge(rlk.token_stats, x.expand(3, 200), torch.tensor([0, 199, 70]), ref_logits=x.flip(-1).expand(3, 200))


# In the lane that meets the peak later, and in another one, which meets it when the lanes do.
@pytest.mark.fault(16)
@pytest.mark.parametrize("peak", [32, 40])
def test_a_column_that_only_the_reference_excludes_counts_as_nothing_once_its_probability_is_zero(peak, small_tiles):
    x, reference, targets = torch.zeros(1, 69), torch.zeros(1, 69), torch.tensor([peak])
    x[0, peak], reference[0, 0] = 5000.0, -torch.inf
    kl = Flat(kernels).token_stats(x, targets, 1.0, -100, None, reference, EVERYTHING)[10]
    torch.testing.assert_close(kl.double(), statistics(x, targets, ref_logits=reference)["kl"], rtol=1e-6, atol=0)


@pytest.mark.fault(16)
@pytest.mark.parametrize("masked", [False, True])
def test_a_row_without_a_finite_logit_has_no_sum(masked, small_tiles):
    x, targets, _ = draw_rows((3,), 69)
    mask = torch.ones(3, 69, dtype=torch.bool)
    if masked:
        mask[1] = False
    else:
        x[1] = -torch.inf
    stats = Flat(kernels).token_stats(x, targets.clamp(min=0), 0.7, -100, mask, x, EVERYTHING)
    for found in (stats[0], stats[2], stats[3], stats[9]):  # logp, sum_exp, entropy, the reference's sum_exp
        assert found[1].isnan() and found[[0, 2]].isfinite().all()
    assert not stats[6][1]
