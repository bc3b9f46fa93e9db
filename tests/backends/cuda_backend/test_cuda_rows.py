"""Row statistics and their gradient on the CUDA backend, run on the CPU: against float64, and bit by bit between
layouts.
"""

import math

import pytest
import torch
from flat_backend import Flat
from reference import (
    EPS32,
    LAYOUTS,
    assert_gradient,
    cotangents,
    draw_rows,
    gradient_allowance,
    judge,
    same_bits,
    statistics,
)
from row_calls import NAMES, gradient, run, same

ENTROPY, LOG_SUM_SQ, MEAN_LOGITS, IS_TOP1, KL = 1, 2, 4, 8, 16

# 1, 2, 7: less than one group of eight columns. 1023 to 1025: a group short, whole, and one over. 8191, 8200: one step
# of all lanes and a bit more. 20001: three steps, odd, so that every other row is unaligned.
VOCABULARIES = (1, 2, 7, 1023, 1024, 1025, 2053, 8191, 8200)


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_statistics_and_gradients_match_float64(public, dtype, vocab):
    x, targets, _ = draw_rows((2, 2), vocab, dtype, seed=vocab)
    judge(public.token_stats, x, targets, 0.7, seed=vocab)


@pytest.mark.fault(27)
@pytest.mark.parametrize("vocab", (1, 7, 1025, 20001))
def test_masks_a_temperature_per_row_and_a_reference_match_float64(public, dtype, vocab):
    x, targets, mask = draw_rows((1, 5), vocab, dtype, seed=3)
    ref, _, _ = draw_rows((1, 5), vocab, dtype, seed=4)
    temperature = torch.tensor([[0.5, 1.0, 2.0, 1.3, 0.9]])
    judge(public.token_stats, x, targets, temperature, vocab_mask=mask, ref_logits=ref)


@pytest.mark.fault(136)
@pytest.mark.parametrize("vocab", (7, 1025))
def test_the_coldest_and_the_hottest_temperature_match_float64(public, vocab):
    x, targets, _ = draw_rows((1, 6), vocab, seed=5)
    temperature = torch.tensor([[2.0**-40, 2.0**40, 1e-12, 1e12, 1e-6, 1e6]])
    judge(public.token_stats, x, targets, temperature, ref_logits=draw_rows((1, 6), vocab, seed=6)[0])


def test_the_gradient_kernel_writes_nothing_where_unless_is_exactly_1(backend, dtype):
    x, targets, mask = draw_rows((4,), 9001, dtype, seed=12)
    stats, g = run(backend, x, targets, mask=mask), cotangents(targets.shape, 2)
    saved = (*g, None, x, targets, 1.0, -100, mask, None, *stats[1:4], None, None, None)
    expected, before = Flat(backend).token_stats_backward(*saved, None), torch.full_like(x, 7.0)
    for unless in (1.0, 2.0**16, -0.5, 0.0, 1.0 + 2.0**-23, math.nan):
        out = Flat(backend).token_stats_backward(*saved, before.clone(), torch.tensor([math.nan, unless])[1])
        assert same_bits(out, before if unless == 1.0 else expected), unless


@pytest.mark.fault(75)
def test_a_large_vocabulary_matches_float64(public):
    x, targets, _ = draw_rows((1, 2), 151_936, torch.bfloat16, seed=5)
    judge(public.token_stats, x, targets)


# Whole steps of the lanes alone, and steps with whole groups and a part of one behind them.
@pytest.mark.parametrize("vocab", [9001, 24576, 30003])
@pytest.mark.parametrize("with_ref", [False, True])
def test_every_choice_of_outputs_gives_the_bits_of_all_of_them(backend, dtype, with_ref, vocab):
    """Their kernels differ in the threads of a row, and in the loads that they issue before any arithmetic."""
    x, targets, _ = draw_rows((3,), vocab, dtype, seed=6)
    ref = draw_rows((3,), vocab, dtype, seed=7)[0] if with_ref else None
    everything = run(backend, x, targets, ref=ref)
    for wanted in (0, ENTROPY, LOG_SUM_SQ, MEAN_LOGITS | IS_TOP1, ENTROPY | KL):
        for name, some, all_of_them in zip(
            NAMES, run(backend, x, targets, ref=ref, wanted=wanted), everything, strict=True
        ):
            if some.numel():
                assert same_bits(some, all_of_them), f"{name} with wanted={wanted}"


@pytest.mark.fault(19)
def test_bf16_and_fp16_give_the_bits_of_the_same_values_in_fp32(backend):
    for narrow in (torch.bfloat16, torch.float16):
        x, targets, _ = draw_rows((4,), 9001, narrow, seed=8)
        assert same(run(backend, x, targets, ref=x.flip(-1)), run(backend, x.float(), targets, ref=x.float().flip(-1)))


@pytest.mark.fault(7, 15)
@pytest.mark.parametrize(
    "layout", [name for name in LAYOUTS if name not in ("stride 2 in the row", "vocabulary first")]
)
def test_every_layout_gives_the_bits_of_contiguous_rows(backend, layout):
    x, _, _ = draw_rows((3, 4), 1030, torch.bfloat16, seed=9)
    laid = LAYOUTS[layout](x)
    flat = laid if laid.dim() <= 3 else laid.reshape(-1, 4, 1030)
    flat = flat[None] if flat.dim() == 1 else flat
    targets = torch.randint(1030, flat.shape[:-1], generator=torch.Generator().manual_seed(1)).view(-1)
    plain = flat.contiguous().view(-1, 1030)
    stats = run(backend, flat, targets)
    assert same(stats, run(backend, plain, targets))
    g = cotangents(targets.shape, 2)
    assert same_bits(
        gradient(backend, (*g, None), flat, targets, stats), gradient(backend, (*g, None), plain, targets, stats)
    )


@pytest.mark.fault(15)
def test_no_storage_offset_changes_a_bit(backend, dtype):
    x, targets, _ = draw_rows((3,), 8200, dtype, seed=10)
    aligned = run(backend, x, targets)
    g = (*cotangents(targets.shape, 2), None)
    for offset in (1, 2, 4, 7):
        parent = torch.full((x.numel() + 16,), math.nan, dtype=dtype)
        moved = parent[offset : offset + x.numel()].view(x.shape).copy_(x)
        assert same(run(backend, moved, targets), aligned)
        assert same_bits(gradient(backend, g, moved, targets, aligned), gradient(backend, g, x, targets, aligned))


@pytest.mark.fault(1)
def test_a_row_that_begins_behind_2_to_the_31_elements_has_its_bits(backend):
    x, targets, _ = draw_rows((3,), 1030, torch.bfloat16, seed=14)
    # 4 GB, of which three pages become resident.
    far = torch.empty(2**31 + 2048, dtype=torch.bfloat16).as_strided((3, 1030), (2**30, 1))
    far.copy_(x)
    stats, g = run(backend, x, targets), (*cotangents(targets.shape, 2), None)
    assert same(run(backend, far, targets), stats)
    expected = gradient(backend, g, x, targets, stats)
    assert same_bits(gradient(backend, g, far, targets, stats, out=far), expected) and same_bits(far, expected)


@pytest.mark.fault(53)
def test_a_row_has_the_same_bits_alone_and_in_any_company(backend, dtype):
    x, targets, mask = draw_rows((5,), 2053, dtype, seed=11)
    together = run(backend, x, targets, mask=mask, ref=x.roll(1, -1))
    order = torch.tensor([3, 1, 4, 0])
    shuffled = run(backend, x[order], targets[order], mask=mask[order], ref=x.roll(1, -1)[order])
    assert same([s for s in shuffled], [t[order] for t in together])
    for r in range(5):
        alone = run(backend, x[r : r + 1], targets[r : r + 1], mask=mask[r : r + 1], ref=x.roll(1, -1)[r : r + 1])
        assert same(alone, [t[r : r + 1] for t in together])


def test_one_mask_for_all_rows_is_that_mask_in_every_row(backend):
    x, targets, mask = draw_rows((4,), 1030, torch.bfloat16, seed=12)
    targets = targets.clamp(min=0)
    shared = mask[0].clone()
    shared[targets] = True
    assert same(run(backend, x, targets, mask=shared), run(backend, x, targets, mask=shared.expand(4, -1).contiguous()))
    assert same(run(backend, x, targets, mask=shared), run(backend, x, targets, mask=shared.expand(4, -1)))


@pytest.mark.fault(7)
def test_targets_may_have_any_stride_and_be_int32(backend):
    x, targets, _ = draw_rows((4,), 37, torch.float32, seed=13)
    wide = torch.full((4, 3), 36)
    wide[:, 1] = targets
    expected = run(backend, x, targets)
    assert same(run(backend, x, wide[:, 1]), expected)
    assert same(run(backend, x, targets.int()), expected)


@pytest.mark.parametrize("terms", [(0,), (1,), (2,), (0, 1), (0, 1, 2)])
def test_each_upstream_gradient_alone_and_together_matches_float64(backend, dtype, terms):
    x, targets, mask = draw_rows((4,), 2053, dtype, seed=22)
    ref, _, _ = draw_rows((4,), 2053, dtype, seed=23)
    temperature = torch.tensor([0.5, 1.0, 2.0, 1.3])
    stats = run(backend, x, targets, temperature=temperature, mask=mask, ref=ref)
    g = [c if k in terms else None for k, c in enumerate(cotangents(targets.shape, 3))]
    got = gradient(backend, g, x, targets, stats, temperature=temperature, mask=mask, ref=ref)
    leaf = x.double().requires_grad_()
    options = {"vocab_mask": mask, "ref_logits": ref.double()}
    truth = statistics(leaf, targets, temperature, **options)
    upstream = {("logprobs", "entropy", "kl")[k]: g[k] for k in terms}
    (expected,) = torch.autograd.grad(sum((truth[name] * c.double()).sum() for name, c in upstream.items()), leaf)
    assert_gradient(
        got, expected, gradient_allowance(upstream, x, targets, temperature, vocab_mask=mask, ref_logits=ref), "dlogits"
    )


def test_a_target_outside_the_mask_gets_no_gradient_of_the_entropy_either(backend, dtype):
    x, targets, mask = draw_rows((4,), 2053, dtype, seed=29)
    targets[:2] = torch.tensor([5, 2052])
    mask[0, 5] = mask[1, 2052] = False
    stats = run(backend, x, targets, mask=mask)
    dx = gradient(backend, (None, torch.ones(4), None), x, targets, stats, mask=mask)
    assert (dx[~mask] == 0).all() and dx[:2].any(-1).all()


@pytest.mark.fault(20)
@pytest.mark.parametrize("probability", (0.9, 0.99, 0.999, 0.9999))
def test_the_gradient_of_a_confident_target_keeps_its_digits(backend, dtype, probability):
    vocab = 5000
    x = torch.zeros(1, vocab)
    x[0, 4321] = math.log(probability / (1 - probability) * (vocab - 1))
    x = x.to(dtype)
    targets = torch.tensor([4321])
    dx = gradient(backend, (torch.ones(1), None, None), x, targets, run(backend, x, targets))
    truth = 1 - x.double().softmax(-1)[0, 4321]
    assert (dx[0, 4321].double() - truth).abs() <= 0.005 * truth


def test_the_gradient_of_a_row_sums_to_nothing(backend):
    x, targets, _ = draw_rows((4,), 9001, torch.float32, seed=24)
    g = torch.tensor([1.0, -3.0, 0.5, 2.0])
    sums = gradient(backend, (g, None, None), x, targets, run(backend, x, targets)).double().sum(-1)
    assert (sums.abs() <= 8 * EPS32 * g.abs()).all(), sums


def test_in_place_the_gradient_has_the_bits_of_a_fresh_one_and_the_gaps_keep_theirs(backend, dtype):
    for shape, slice_of in (((4, 1040), lambda p: p[:, 3:1034]), ((2, 3, 1040), lambda p: p[:, :2, :1031])):
        parent = torch.full(shape, math.nan, dtype=dtype)
        x = slice_of(parent)
        rows = x.shape[:-1].numel()
        values, targets, _ = draw_rows((rows,), 1031, dtype, seed=25)
        x.copy_(values.view(x.shape))
        stats = run(backend, x, targets)
        g = (*cotangents((rows,), 2), None)
        fresh = gradient(backend, g, x, targets, stats)
        assert gradient(backend, g, x, targets, stats, out=x).data_ptr() == x.data_ptr()
        assert same_bits(x.reshape(rows, -1), fresh)
        x.fill_(math.nan)
        assert parent.isnan().all()


def test_the_slices_of_a_row_do_not_change_its_gradient(backend, host_module):
    x, targets, _ = draw_rows((2,), 20001, torch.bfloat16, seed=27)
    stats = run(backend, x, targets)
    g = (*cotangents((2,), 2), None)
    expected = gradient(backend, g, x, targets, stats)
    for slice_columns in (2048, 2056, 8192, 32768):
        host_module[0].choose(0, slice_columns)
        assert same_bits(gradient(backend, g, x, targets, stats), expected)


@pytest.mark.fault(11)
def test_no_rows_give_empty_outputs_and_launch_nothing(backend):
    empty = torch.empty(0, 37)
    stats = run(backend, empty, torch.empty(0, dtype=torch.long))
    assert stats[0].shape == (0,) and stats[6].dtype == torch.bool
    assert gradient(backend, (torch.empty(0), None, None), empty, torch.empty(0, dtype=torch.long), stats).shape == (
        0,
        37,
    )


@pytest.mark.fault(1)
def test_rows_two_to_the_thirty_elements_apart_are_found(backend):
    vocab, stride = 70, 2**30
    far = torch.empty(2 * stride + vocab, dtype=torch.bfloat16).as_strided((3, vocab), (stride, 1))
    x, targets, _ = draw_rows((3,), vocab, torch.bfloat16, seed=28)
    far.copy_(x)
    stats = run(backend, far, targets)
    assert same(stats, run(backend, x, targets))
    g = (*cotangents((3,), 2), None)
    expected = gradient(backend, g, x, targets, stats)
    gradient(backend, g, far, targets, stats, out=far)
    assert same_bits(far.contiguous(), expected)
