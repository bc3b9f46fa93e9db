"""Rows with infinities, NaN, masks and bad labels on the CUDA backend, run on the CPU."""

import math

import pytest
import torch
from reference import assert_within_policy, cotangents, draw_rows, same_bits, statistics
from row_calls import NAMES, gradient, run, same


def hostile_rows(vocab):
    """Rows that break a careless softmax, each with its target; one plain row last."""
    generator = torch.Generator().manual_seed(14)
    x = torch.randn(10, vocab, generator=generator) * 3
    targets = torch.full((10,), vocab - 2)
    x[0, 5] = -math.inf
    x[1, : vocab - 5] = -math.inf  # whole leading blocks
    x[2] = -math.inf  # only the target is finite
    x[2, targets[2]] = 1.5
    x[3, targets[3]] = -math.inf
    x[4] += 1e4
    x[5] = x[5] - 1e4  # far below 0
    x[6, : vocab // 2] = -1e30
    x[7, targets[7]] += 40  # peaked
    x[8] = -3.4028234663852886e38  # the lowest number of all, everywhere
    return x, targets


@pytest.mark.fault(16, 17, 18, 66)
@pytest.mark.parametrize("vocab", (37, 9000))
def test_rows_with_minus_infinity_and_offsets_match_float64(public, vocab):
    x, targets = hostile_rows(vocab)
    ref = torch.randn(x.shape, generator=torch.Generator().manual_seed(15))
    ref[1, : vocab - 5] = -math.inf
    stats = public.token_stats(
        x, targets, ref_logits=ref, kl="exact", outputs=("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    )
    truth, base = (
        statistics(x.double(), targets, ref_logits=ref.double()),
        statistics(x, targets, ref_logits=ref, dtype=torch.float32),
    )
    for name, expected in truth.items():
        if name == "is_top1":
            assert torch.equal(stats.is_top1, expected)
        else:
            rows = slice(8 if name == "mean_logits" else None)  # the sum of row 8 is beyond fp32, for torch too
            assert_within_policy(getattr(stats, name)[rows], expected[rows], base[name][rows], name)
    assert stats.logprobs[2] == 0 and stats.entropy[2] == 0
    assert stats.logprobs[3] == -math.inf and stats.entropy[3].isfinite()
    # 1e4 is exact in fp32, the rounding of x + 1e4 is in both; the statistics may lose 4e-6 and no more.
    assert (stats.logprobs[4].double() - truth["logprobs"][4]).abs() <= 4e-6


def test_a_peaked_row_keeps_the_digits_of_its_small_entropy(public):
    x = torch.zeros(1, 9000)
    x[0, 8000] = 36.0
    x += 5000
    truth = statistics(x.double(), torch.tensor([8000]))["entropy"]
    assert 0 < truth < 1e-10
    got = public.token_stats(x, torch.tensor([8000]), outputs=("entropy",)).entropy.double()
    assert (got - truth).abs() <= 0.05 * truth


def test_a_reference_that_rules_out_a_probable_column_makes_the_divergence_infinite(public):
    x, targets, _ = draw_rows((2,), 9000, torch.float32, seed=16)
    ref = x.clone()
    ref[0, 3] = -math.inf
    kl = public.token_stats(x, targets, ref_logits=ref, kl="exact").kl
    assert kl[0] == math.inf and kl[1].abs() < 1e-5


def test_nan_and_plus_infinity_poison_their_row_and_no_other(backend):
    x, targets, _ = draw_rows((6,), 1025, torch.float32, seed=17)
    targets = targets.clamp(min=0)
    clean = run(backend, x, targets)
    g = (*cotangents(targets.shape, 2), None)
    g[0][0] = 0.5
    clean_gradient = gradient(backend, g, x, targets, clean)
    x[1, 700], x[4, 3], x[5] = math.nan, math.inf, -math.inf
    stats = run(backend, x, targets)
    after = gradient(backend, g, x, targets, stats)
    for name, got, before in zip(NAMES, stats, clean, strict=True):
        if name in ("logprobs", "sum_exp", "entropy", "log_sum_sq_probs"):
            assert got[[1, 4, 5]].isnan().all(), name
        if got.numel() and got.dtype != torch.bool:
            assert same_bits(got[[0, 2, 3]], before[[0, 2, 3]]), name
    assert not stats[6][[1, 4, 5]].any()
    assert after[[1, 4, 5]].isnan().all()
    assert same_bits(after[[0, 2, 3]], clean_gradient[[0, 2, 3]])


@pytest.mark.fault(3, 12)
def test_an_ignored_row_is_not_read_and_all_its_outputs_are_zero(backend, dtype):
    x, targets, _ = draw_rows((4,), 1030, dtype, seed=18)
    targets = targets.clamp(min=0)
    targets[2] = -100
    expected = run(backend, x, targets, ref=x.flip(0))
    poisoned, ref = x.clone(), x.flip(0).clone()
    poisoned[2], ref[2] = math.nan, math.nan
    stats = run(backend, poisoned, targets, ref=ref)
    assert same(stats, expected)
    assert all((s[2] == 0).all() for s in stats)
    g = cotangents(targets.shape, 3)
    assert (gradient(backend, g, poisoned, targets, stats, ref=ref)[2] == 0).all()


@pytest.mark.fault(2)
@pytest.mark.parametrize("label", (1030, 1035, -1, 2**40, -(2**40)))
def test_a_target_outside_the_vocabulary_is_nan_in_its_row_and_reads_nothing_else(backend, label):
    parent = torch.full((5, 1100), 7.0)  # a gap behind every row: a stray read would find a legal number there
    x = parent[:, :1030]
    x.normal_(generator=torch.Generator().manual_seed(19))
    targets = torch.tensor([4, 5, label, 6, 7])
    stats = run(backend, x, targets, ref=x.flip(0))
    for name, got in zip(NAMES, stats, strict=True):
        assert not got[2] if name == "is_top1" else got[2].isnan(), name
    rest = [0, 1, 3, 4]
    assert same([s[rest] for s in stats], run(backend, x[rest], targets[rest], ref=x.flip(0)[rest]))
    dx = gradient(backend, (torch.ones(5), None, None), x, targets, stats)
    assert dx[2].isnan().all() and dx[rest].isfinite().all()


def test_the_first_of_equal_maxima_is_the_top_one(backend):
    x = torch.zeros(4, 9000)
    x[0, [4100, 8500]] = 3.0
    x[1, [7, 8]] = 3.0
    x[2, 0] = -0.0
    x[3, :8999] = -math.inf
    for targets, expected in (([4100, 7, 0, 8999], [True] * 4), ([8500, 8, 1, 0], [False] * 4)):
        assert run(backend, x, torch.tensor(targets))[6].tolist() == expected


def test_a_target_outside_the_mask_has_logp_minus_infinity_and_moves_nothing(backend, dtype):
    x, targets, mask = draw_rows((4,), 1030, dtype, seed=20)
    targets = targets.clamp(min=0)
    mask[1, targets[1]] = False
    stats = run(backend, x, targets, mask=mask)
    assert stats[0][1] == -math.inf and stats[3][1].isfinite()
    dx = gradient(backend, (torch.ones(4), None, None), x, targets, stats, mask=mask)
    assert (dx[1] == 0).all() and (dx[0] != 0).any()


def test_masked_columns_are_not_looked_at_and_get_gradient_zero(backend, dtype):
    x, targets, mask = draw_rows((4,), 1030, dtype, seed=21)
    expected = run(backend, x, targets, mask=mask)
    g = (*cotangents(targets.shape, 2), None)
    dx = gradient(backend, g, x, targets, expected, mask=mask)
    poisoned = torch.where(mask, x, torch.tensor(math.nan, dtype=dtype))
    stats = run(backend, poisoned, targets, mask=mask)
    assert same(stats, expected)
    assert torch.equal(gradient(backend, g, poisoned, targets, stats, mask=mask), dx)
    assert (dx[~mask] == 0).all()


def test_a_row_with_zero_upstream_is_not_read_and_gets_zero(backend):
    x, targets, _ = draw_rows((3,), 1030, torch.bfloat16, seed=26)
    stats = run(backend, x, targets)
    x[1] = math.nan
    dx = gradient(backend, (torch.tensor([1.0, 0.0, 1.0]), torch.tensor([0.5, -0.0, 0.5]), None), x, targets, stats)
    assert (dx[1] == 0).all() and dx[0].isfinite().all()
