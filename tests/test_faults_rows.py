"""Faults of FAULTS.md 1 and 4 that concern rows of logits: addresses, layouts, blocks, special values, precision."""
import math

import pytest
import torch
from reference import EPS32, LAYOUTS, assert_within_policy, cotangents, draw_rows, gradient_allowance, judge, same_bits, statistics

import rlkernels as rlk
from rlkernels.backends import BACKENDS, absent, use_backend

INF, NAN = math.inf, math.nan
PRESENT = [name for name in BACKENDS if absent(name) is None]
SIXTEEN = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *SIXTEEN)
ALL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


@pytest.fixture(params=PRESENT)
def backend(request):
    with use_backend(request.param):
        yield request.param


def run(x, targets, *, g=None, **options):
    """Every statistic and the gradient of logprobs and entropy together."""
    x = x.detach().requires_grad_()
    stats = rlk.token_stats(x, targets, outputs=ALL, **options)
    g = cotangents(targets.shape, 2) if g is None else g
    (gradient,) = torch.autograd.grad((stats.logprobs, stats.entropy), x, g)
    return {**{k: v.detach() for k, v in stats._asdict().items() if v is not None}, "gradient": gradient}


def assert_same_bits(got, expected):
    for name, x in expected.items():
        assert same_bits(got[name], x), f"{name}: {got[name]} against {x}"


def assert_same(got, expected, backend):
    """Equal in every bit on the native backend; torch's own reductions follow strides, so eager is equal within rounding."""
    if backend != "eager":
        return assert_same_bits(got, expected)
    for name, x in expected.items():
        tolerance = 1e-5 if x.dtype == torch.float32 else 2e-2
        torch.testing.assert_close(got[name], x, atol=tolerance * 0.1, rtol=tolerance, equal_nan=True, msg=f"{name}: {got[name]} against {x}")


def test_F01_offsets_beyond_32_bits_reach_the_right_row(backend):
    vocab, far = 37, 2**30
    x, targets, mask = draw_rows((2, 2), vocab, torch.bfloat16, seed=1)
    expected = run(x, targets, vocab_mask=mask.view(2, 2, vocab))
    # Only the pages of the four rows become resident. Row 3 starts at element 2**31 + 2**10.
    sparse = torch.empty(2 * far + 2**11, dtype=torch.bfloat16).as_strided((2, 2, vocab), (2 * far, 2**10, 1))
    sparse.copy_(x)
    masks = torch.empty(3 * far + vocab, dtype=torch.bool).as_strided((4, vocab), (far, 1))
    masks.copy_(mask.view(4, vocab))
    labels = torch.empty(3 * far // 4 + 1, dtype=torch.int64).as_strided((4,), (far // 4,))
    labels.copy_(targets.view(4))
    assert_same(run(sparse, targets, vocab_mask=mask), expected, backend)
    flat = {k: v.view(4, *v.shape[2:]) for k, v in expected.items()}
    g = tuple(x.view(4) for x in cotangents((2, 2), 2))
    assert_same(run(x.view(4, vocab), labels, vocab_mask=masks, g=g), flat, backend)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("bad", [37, 42, -1, -99, 2**31 - 1])
def test_F02_a_label_outside_the_vocabulary_is_an_index_error_that_names_row_and_range(bad, dtype, backend):
    x, targets, _ = draw_rows((2, 4), 37)
    targets.view(-1)[5] = bad
    for function in (rlk.token_logprobs, lambda x, y: rlk.token_logprobs(x.mT.contiguous().mT, y),
                     lambda x, y: rlk.logits_policy_loss(x, y, torch.zeros(2, 4), torch.ones(2, 4))):
        with pytest.raises(IndexError, match=rf"target {bad} at row 5 is outside \[0, 37\)"):
            function(x, targets.to(dtype))


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 36, 1000])
def test_F03_the_ignore_index_is_no_address_and_its_row_is_zero(ignore_index, backend):
    x, targets, _ = draw_rows((6,), 37)
    targets = torch.where(targets == ignore_index, 5, targets.clamp(min=0))
    expected = run(x, targets)
    targets[2] = targets[4] = ignore_index
    x[2], x[4] = NAN, INF
    got = run(x, targets, ignore_index=ignore_index)
    for name, value in got.items():
        assert not value[2].any() and not value[4].any(), name
    others = torch.tensor([0, 1, 3, 5])
    assert_same_bits({k: v[others] for k, v in got.items()}, {k: v[others] for k, v in expected.items()})


# Around every width in use: 8 and 16 lanes, 32 and 64 columns per chunk, blocks of 4096 columns; 1, 2 and primes beside them.
@pytest.mark.parametrize("vocab,dtype", [(v, torch.float32) for v in (1, 2, 7, 15, 16, 17, 63, 64, 65, 1023, 1025, 2053, 4095, 4096, 4097, 8197)]
                         + [(v, dtype) for v in (1, 17, 65, 1025, 4097) for dtype in SIXTEEN])
def test_F04_no_vocabulary_size_adds_phantom_columns(vocab, dtype, backend):
    x, targets, mask = draw_rows((6,), vocab, dtype, seed=vocab)
    other = draw_rows((6,), vocab, dtype, seed=vocab + 1)[0]
    for vocab_mask in (None, mask):
        stats = judge(rlk.token_stats, x, targets, 0.7, vocab_mask=vocab_mask, ref_logits=other)
        assert (stats.logprobs <= 0).all()


def test_F06_vocab_mask_takes_padded_columns_out_and_without_it_they_count(backend):
    real, padded = 151_665, 151_936
    x = torch.randn(2, real, generator=torch.Generator().manual_seed(0))
    wide = torch.nn.functional.pad(x, (0, padded - real), value=5.0)
    targets = torch.tensor([0, real - 1])
    mask = torch.arange(padded) < real
    truth, base = statistics(x, targets), statistics(x, targets, dtype=torch.float32)
    for vocab_mask in (mask, mask.expand(2, -1)):
        got = rlk.token_stats(wide, targets, vocab_mask=vocab_mask, outputs=ALL)
        for name in ("logprobs", "entropy", "logsumexp", "log_sum_sq_probs", "mean_logits"):
            assert_within_policy(getattr(got, name), truth[name], base[name], name)
    counted = rlk.token_logprobs(wide, targets)
    assert_within_policy(counted, statistics(wide, targets)["logprobs"], statistics(wide, targets, dtype=torch.float32)["logprobs"], "padding counted")
    assert (counted < truth["logprobs"] - 0.1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_F07_F15_every_layout_of_logits_gives_the_bits_of_the_contiguous_one(layout, dtype, backend):
    source, _, _ = draw_rows((2, 3), 1037, dtype)
    x = LAYOUTS[layout](source)
    targets = torch.randint(1037, x.shape[:-1], generator=torch.Generator().manual_seed(2))
    mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(3)) < 0.8
    reference = LAYOUTS[layout](source.flip(-1))
    for options in ({}, {"vocab_mask": mask}):
        expected = run(x.contiguous(), targets, **options, ref_logits=reference.contiguous(), kl="exact")
        assert_same(run(x, targets, **options, ref_logits=reference, kl="exact"), expected, backend)


def strided(x):
    return torch.stack([x, torch.zeros_like(x)], -1)[..., 0]


VOCAB_MASKS = {
    "every other element": lambda m: strided(m),
    "vocabulary first": lambda m: m.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "rows apart": lambda m: torch.nn.functional.pad(m, (1, 2))[..., 1:-2],
    "transposed leading dimensions": lambda m: m.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1),
    "one row for all": lambda m: m[:1, :1].expand(m.shape),
    "all columns alike": lambda m: m.any(-1, keepdim=True).expand(m.shape),
}


@pytest.mark.parametrize("layout", VOCAB_MASKS)
def test_F07_strides_of_the_vocab_mask_are_followed(layout, backend):
    x, targets, mask = draw_rows((2, 3), 37)
    mask = VOCAB_MASKS[layout](mask)
    assert_same(run(x, targets, vocab_mask=mask), run(x, targets, vocab_mask=mask.contiguous()), backend)
    one, flat = mask[0, 1], mask.reshape(-1, 37) if mask.stride(-1) == 1 else mask[0]
    assert_same(run(x, targets, vocab_mask=one), run(x, targets, vocab_mask=one.contiguous()), backend)
    x, targets = x.view(-1, 37)[:len(flat)], targets.view(-1)[:len(flat)]
    assert_same(run(x, targets, vocab_mask=flat), run(x, targets, vocab_mask=flat.contiguous()), backend)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_F07_strides_of_targets_and_temperatures_are_followed(dtype, backend):
    x, targets, _ = draw_rows((3, 4), 37)
    targets, t = targets.to(dtype), torch.rand(3, 4, generator=torch.Generator().manual_seed(4)) + 0.5
    expected = run(x, targets, temperature=t)
    turned = [y.t().contiguous().t() for y in (targets, t)]
    assert not turned[0].is_contiguous()
    assert_same_bits(run(x, turned[0], temperature=turned[1]), expected)
    assert_same_bits(run(x, strided(targets), temperature=strided(t)), expected)
    flat = {k: v.reshape(12, *v.shape[2:]) for k, v in expected.items()}
    g = tuple(y.view(12) for y in cotangents((3, 4), 2))
    assert_same(run(x.view(12, 37), strided(targets).view(12), temperature=strided(t).view(12), g=g), flat, backend)
    same = targets[:1, :1].clamp(min=0)
    assert_same_bits(run(x, same.expand(3, 4)), run(x, same.expand(3, 4).contiguous()))


def gradient_with(upstream, x, targets):
    x = x.detach().requires_grad_()
    stats = rlk.token_stats(x, targets)
    return torch.autograd.grad(stats[::2][:2], x, upstream)[0]  # logprobs, entropy


def test_F08_a_gradient_of_stride_zero_is_read_as_it_is_meant(backend):
    x, targets, _ = draw_rows((3, 4), 37)
    assert torch.tensor(0.3).expand(3, 4).stride() == (0, 0)
    for one in (torch.tensor(0.3), torch.tensor([[0.3], [-1.0], [0.0]]), torch.tensor([0.3, -1.0, 0.0, 2.0])):
        expanded = one.expand(3, 4)
        assert same_bits(gradient_with((expanded, expanded), x, targets), gradient_with((expanded.contiguous(), expanded.contiguous()), x, targets))
    x.requires_grad_()
    (got,) = torch.autograd.grad(rlk.token_logprobs(x, targets).sum(), x)
    (expected,) = torch.autograd.grad(rlk.token_logprobs(x, targets), x, torch.ones(3, 4))
    assert same_bits(got, expected)


def test_F09_a_gradient_with_the_strides_of_a_larger_tensor_is_read_as_it_is_meant(backend):
    x, targets, _ = draw_rows((3, 4), 37)
    x.requires_grad_()
    g = torch.randn(6, 8, generator=torch.Generator().manual_seed(5))
    for dim, part in ((1, g[:3, :4]), (0, g[:3, :4])):
        outputs = torch.cat([rlk.token_logprobs(x, targets), torch.zeros(3, 4)], dim)
        whole = g[:3] if dim == 1 else g[:, :4]
        (got,) = torch.autograd.grad(outputs, x, whole)
        (expected,) = torch.autograd.grad(rlk.token_logprobs(x, targets), x, part.contiguous())
        assert same_bits(got, expected)
    steps = torch.randn(3, 8, generator=torch.Generator().manual_seed(6))[:, ::2]
    assert same_bits(gradient_with((steps, steps.flip(0)), x, targets), gradient_with((steps.contiguous(), steps.flip(0).contiguous()), x, targets))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), (2, 0, 3)])
def test_F11_no_rows_give_empty_results_and_gradients(shape, dtype, backend):
    x = torch.empty(*shape, 37, dtype=dtype)
    got = run(x, torch.empty(shape, dtype=torch.int64), ref_logits=x, kl="exact")
    for name, value in got.items():
        assert value.shape == (x.shape if name == "gradient" else shape), name
    x.requires_grad_()
    loss = rlk.logits_policy_loss(x, torch.empty(shape, dtype=torch.int64), torch.empty(shape), torch.empty(shape), kl_coef=0.1,
                                  ref_logprobs=torch.empty(shape), entropy_coef=0.1)
    (gradient,) = torch.autograd.grad(loss, x)
    assert loss.item() == 0.0 and gradient.shape == x.shape


def test_F11_one_column_has_logprob_and_entropy_zero(backend):
    got = run(torch.tensor([[3.0], [-1e30], [7.0]]), torch.tensor([0, 0, -100]))
    assert not got["logprobs"].any() and not got["entropy"].any() and not got["gradient"].any()
    assert got["logsumexp"].tolist() == [3.0, pytest.approx(-1e30, rel=1e-6), 0.0] and got["is_top1"].tolist() == [True, True, False]


def test_F11_no_columns_are_refused(backend):
    with pytest.raises(ValueError, match="vocabulary dimension is empty"):
        rlk.token_logprobs(torch.empty(3, 0), torch.zeros(3, dtype=torch.int64))


def test_F11_a_single_row_may_come_without_a_row_dimension(backend):
    x, _, mask = draw_rows((1,), 37)
    mask = mask[0].index_fill(0, torch.tensor(5), True)
    got = run(x[0], torch.tensor(5), vocab_mask=mask, temperature=torch.tensor(0.7), g=(torch.tensor(0.4), torch.tensor(-0.2)))
    expected = run(x, torch.tensor([5]), vocab_mask=mask, temperature=torch.tensor([0.7]), g=(torch.tensor([0.4]), torch.tensor([-0.2])))
    assert_same_bits(got, {k: v[0] for k, v in expected.items()})


def test_F13_seventy_thousand_rows(backend):
    x = torch.randn(70_000, 3, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(70_000) % 3
    got = run(x, targets)
    truth, base = statistics(x, targets), statistics(x, targets, dtype=torch.float32)
    for name in ("logprobs", "entropy"):
        assert_within_policy(got[name], truth[name], base[name], name)
    last = run(x[-5:], targets[-5:], g=tuple(g[-5:] for g in cotangents((70_000,), 2)))
    assert_same({k: v[-5:] for k, v in got.items()}, last, backend)


# The table of FAULTS 9.3. Neighbours of a special row stay as they are, in every bit.
SPECIAL = {
    "some -inf": (lambda x: x.index_fill(0, torch.tensor([0, 5, 36]), -INF), "finite"),
    "-inf at the target": (lambda x: x.index_fill(0, torch.tensor([7]), -INF), "-inf"),
    "only the target finite": (lambda x: torch.full_like(x, -INF).index_fill(0, torch.tensor([7]), 2.0), "certain"),
    "top-3 replay": (lambda x: torch.full_like(x, -INF).index_copy(0, torch.tensor([7, 20, 30]), torch.tensor([0.5, 1.5, -1.0], dtype=x.dtype)), "finite"),
    "all -inf": (lambda x: torch.full_like(x, -INF), "nan"),
    "a NaN": (lambda x: x.index_fill(0, torch.tensor([3]), NAN), "nan"),
    "NaN at the target": (lambda x: x.index_fill(0, torch.tensor([7]), NAN), "nan"),
    "+inf": (lambda x: x.index_fill(0, torch.tensor([3]), INF), "nan"),
    "+inf at the target": (lambda x: x.index_fill(0, torch.tensor([7]), INF), "nan"),
    "a NaN behind -inf": (lambda x: torch.full_like(x, -INF).index_fill(0, torch.tensor([36]), NAN), "nan"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("masked", [False, True], ids=["whole vocabulary", "vocab_mask"])
@pytest.mark.parametrize("case", SPECIAL)
def test_F16_special_values_follow_the_table_and_leave_the_neighbours_alone(case, masked, dtype, backend):
    make, outcome = SPECIAL[case]
    x, targets, _ = draw_rows((3,), 37, dtype)
    targets[:] = torch.tensor([1, 7, 2])
    options = {"vocab_mask": torch.arange(37) != 11} if masked else {}
    clean = run(x, targets, **options)
    x[1] = make(x[1])
    got = run(x, targets, **options)
    for row in (0, 2):
        assert_same_bits({k: v[row] for k, v in got.items()}, {k: v[row] for k, v in clean.items()})
    logp, entropy, gradient = got["logprobs"][1], got["entropy"][1], got["gradient"][1]
    if outcome == "nan":
        assert logp.isnan() and entropy.isnan() and not got["is_top1"][1]
        assert (gradient.isnan() | (torch.arange(37) == 11 if masked else False)).all()
        assert not masked or gradient[11] == 0
        return
    assert entropy.isfinite() and gradient.isfinite().all()
    if outcome == "-inf":
        assert logp == -INF
    if outcome == "certain":
        assert logp == 0 and entropy == 0 and not gradient.any()
    judge(rlk.token_stats, x, targets, 0.7, **options)
    absent_columns = x[1] == -INF
    absent_columns[7] = False
    assert not gradient[absent_columns].any()


def test_F16_a_target_outside_the_support_has_logprob_minus_infinity_and_moves_nothing(backend):
    x, targets, _ = draw_rows((3,), 37)
    targets[:] = 7
    got = run(x, targets, vocab_mask=torch.arange(37) != 7, g=(torch.tensor([1.3, 0.0, -0.2]), torch.zeros(3)))
    assert (got["logprobs"] == -INF).all() and got["entropy"].isfinite().all() and not got["gradient"].any() and not got["is_top1"].any()
    entropy_alone = run(x, targets, vocab_mask=torch.arange(37) != 7, g=(torch.zeros(3), torch.tensor([1.3, 0.4, -0.2])))["gradient"]
    wide = x.double().requires_grad_()
    (truth,) = torch.autograd.grad(statistics(wide, targets, vocab_mask=torch.arange(37) != 7)["entropy"], wide, torch.tensor([1.3, 0.4, -0.2]).double())
    torch.testing.assert_close(entropy_alone.double(), truth, atol=5e-7, rtol=4e-6)


def test_F16_kl_where_one_model_excludes_a_column(backend):
    x, targets, _ = draw_rows((3,), 37)
    reference = draw_rows((3,), 37, seed=9)[0]
    targets[:] = 7
    x[0, 5], reference[1, 5] = -INF, -INF
    x[2, 5] = reference[2, 5] = -INF
    got = rlk.token_stats(x, targets, ref_logits=reference, kl="exact").kl
    truth = statistics(x, targets, ref_logits=reference)["kl"]
    assert truth[0].isfinite() and truth[1] == INF and truth[2].isfinite()
    assert_within_policy(got, truth, statistics(x, targets, ref_logits=reference, dtype=torch.float32)["kl"], "kl")
    finite = torch.tensor([0, 2])
    judge(rlk.token_stats, x[finite], targets[finite], ref_logits=reference[finite])


@pytest.mark.parametrize("leading,dtype", [(n, torch.float32) for n in (1, 64, 4096, 5000, 8192, 9000)] + [(4096, dtype) for dtype in SIXTEEN])
def test_F17_leading_blocks_of_minus_infinity_change_nothing(leading, dtype, backend):
    x, targets, _ = draw_rows((4,), 9001, dtype)
    targets[:] = torch.tensor([9000, 9000, -100, 9000])
    short, short_targets = x[:, leading:].clone(), torch.where(targets == -100, -100, targets - leading)
    x[:, :leading] = -INF
    for hidden in ({}, {"vocab_mask": torch.arange(9001) >= leading}):
        got = run(x, targets, **hidden)
        expected = statistics(short, short_targets)
        base = statistics(short.float(), short_targets, dtype=torch.float32)
        for name in ("logprobs", "logsumexp", "entropy", "log_sum_sq_probs"):
            assert_within_policy(got[name], expected[name], base[name], name)
        assert not got["gradient"][:, :leading].any() and got["gradient"].isfinite().all()
    judge(rlk.token_stats, x, targets)


def test_F18_a_common_offset_changes_nothing(backend):
    x, targets, _ = draw_rows((6,), 1025)
    grid = (x * 256).round() / 256  # 1e4 + grid is exact in fp32
    at_zero, at_ten_thousand = run(grid, targets), run(grid + 1e4, targets)
    for name in ("logprobs", "entropy", "log_sum_sq_probs"):
        assert (at_zero[name] - at_ten_thousand[name]).abs().max() <= 4e-6, name
    far = grid.round()
    judge(rlk.token_stats, far + 1e6, targets)
    torch.testing.assert_close(run(far + 1e6, targets)["gradient"], run(far, targets)["gradient"], atol=1e-7, rtol=4e-6)


def test_F18_a_peaked_row_keeps_its_tiny_entropy(backend):
    x = torch.zeros(2, 1025)
    x[:, 7] = torch.tensor([34.0, 20.0])
    for offset in (0.0, 5000.0):
        got = run(x + offset, torch.tensor([7, 7]))["entropy"]
        truth = statistics(x + offset, torch.tensor([7, 7]))["entropy"]
        assert truth[0] < 1e-10
        torch.testing.assert_close(got.double(), truth, rtol=0.05, atol=0)


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_F19_sixteen_bit_logits_give_the_bits_of_the_same_values_in_fp32(dtype, backend):
    x, targets, mask = draw_rows((6,), 4133, dtype)
    reference = draw_rows((6,), 4133, dtype, seed=5)[0]
    for options in ({}, {"vocab_mask": mask}):
        narrow = run(x, targets, ref_logits=reference, kl="exact", **options)
        wide = run(x.float(), targets, ref_logits=reference.float(), kl="exact", **options)
        assert same_bits(narrow.pop("gradient"), wide.pop("gradient").to(dtype))  # one rounding, of the fp32 gradient
        assert_same_bits(narrow, wide)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.9, 0.99, 0.999, 0.9999])
def test_F20_the_true_class_keeps_its_gradient_near_certainty(p, dtype, backend):
    x = torch.zeros(1, 65, dtype=dtype)
    x[0, 3] = math.log(p / (1 - p) * 64)
    got = run(x, torch.tensor([3]), g=(torch.tensor([0.7]), torch.tensor([0.0])))["gradient"][0, 3]
    truth = 0.7 * (1 - statistics(x, torch.tensor([3]))["logprobs"].exp().item())
    assert got.item() == pytest.approx(truth, rel=5e-3)


def test_F22_gradients_below_any_filter_are_exact(backend):
    x = torch.zeros(1, 4096)
    x[0, 3] = 14.0  # every other column has p = 8e-7, far below 2**-12
    got = run(x, torch.tensor([3]), g=(torch.tensor([0.7]), torch.tensor([0.0])))["gradient"][0]
    p = x[0].double().softmax(0)
    assert (got[4:] != 0).all()
    torch.testing.assert_close(got[4:].double(), -0.7 * p[4:], rtol=4e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_F27_a_temperature_per_row_is_a_loop_over_temperatures(dtype, backend):
    x, targets, mask = draw_rows((8,), 133, dtype)
    t = torch.tensor([1.0, 0.5, 1e-3, 0.7, 100.0, 1.0, 0.7, 3.0])
    reference = draw_rows((8,), 133, dtype, seed=5)[0]
    g = cotangents((8,), 2)
    got = run(x, targets, temperature=t, vocab_mask=mask, g=g, ref_logits=reference, kl="exact")
    for r in range(8):
        one = run(x[r:r + 1], targets[r:r + 1], temperature=t[r].item(), vocab_mask=mask[r:r + 1], g=tuple(v[r:r + 1] for v in g),
                  ref_logits=reference[r:r + 1], kl="exact")
        assert_same({k: v[r:r + 1] for k, v in got.items()}, one, backend)
    judge(rlk.token_stats, x, targets, t, vocab_mask=mask)


def test_F66_rows_far_below_zero_do_not_underflow(backend):
    noise, targets, _ = draw_rows((4,), 9000)
    x = noise - 1e4
    x[1, :5000] = -1e30
    x[3] = -1e30
    targets[:] = torch.tensor([8999, 8999, -100, 4])
    judge(rlk.token_stats, x, targets)
    assert rlk.token_logprobs(x, targets)[3].item() == pytest.approx(-math.log(9000), rel=1e-6)


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_F68_entropy_is_not_rounded_to_sixteen_bits(dtype, backend):
    x = (0.05 * torch.randn(5, 9000, generator=torch.Generator().manual_seed(0))).to(dtype)
    targets = torch.zeros(5, dtype=torch.int64)
    entropy = rlk.token_stats(x, targets).entropy
    truth = statistics(x, targets)["entropy"]
    assert entropy.dtype == torch.float32 and (truth > 9).all()
    assert (entropy - truth).abs().max() <= 1e-5


@pytest.mark.parametrize("vocab", [262_144, 300_000])
def test_F75_large_vocabularies_stay_within_the_bounds(vocab, backend):
    x, targets, _ = draw_rows((2,), vocab, torch.bfloat16)
    targets[1] = vocab - 1
    stats = judge(rlk.token_stats, x, targets)
    truth = statistics(x, targets)
    for name in ("logprobs", "logsumexp", "entropy"):
        assert (getattr(stats, name) - truth[name]).abs().max() <= 1e-5, name


@pytest.mark.parametrize("shape", ["rising", "falling", "peak in the last block", "equal"])
def test_F76_rescaling_between_blocks_does_not_drift(shape, backend):
    x = torch.linspace(-30, 30, 20_000)
    x = {"rising": x, "falling": x.flip(0), "peak in the last block": torch.cat([x[:-1] / 30, x[-1:] * 2]), "equal": torch.zeros_like(x)}[shape]
    x = torch.stack([x, x + 100, x * 0.1])
    judge(rlk.token_stats, x, torch.tensor([0, 19_999, 7_000]), ref_logits=x.flip(-1).contiguous())


def test_F77_a_replayed_top_p_support_has_ratio_one_and_the_whole_vocabulary_has_the_kept_mass(backend):
    x, _, _ = draw_rows((1,), 50)
    p, order = x[0].double().softmax(0).sort(descending=True)
    kept = order[:int((p.cumsum(0) < 0.8).sum()) + 1]
    support = torch.zeros(50, dtype=torch.bool).index_fill(0, kept, True)
    sampled = x[0].double().index_fill(0, (~support).nonzero()[:, 0], -INF).log_softmax(0)
    rows = x.expand(len(kept), 50)
    ratio = (rlk.token_logprobs(rows, kept, vocab_mask=support).double() - sampled[kept]).exp()
    assert (ratio - 1).abs().max() <= 16 * EPS32
    whole = (rlk.token_logprobs(rows, kept).double() - sampled[kept]).exp()
    mass = p[:len(kept)].sum()
    assert mass < 0.999 and whole.mean().item() == pytest.approx(mass.item(), rel=1e-5)


def test_F72_temperature_is_applied_once(backend):
    x, targets, _ = draw_rows((5,), 37)
    ours, callers = rlk.token_logprobs(x, targets, temperature=0.5), rlk.token_logprobs(x / 0.5, targets)
    torch.testing.assert_close(ours, callers, atol=2e-6, rtol=2e-6)  # division by a power of two is exact
    assert ((ours - rlk.token_logprobs(x, targets)).abs() > 1e-3).sum() >= 3
    assert ((ours - rlk.token_logprobs(x / 0.5, targets, temperature=0.5)).abs() > 1e-3).sum() >= 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_F84_old_and_new_logprobs_from_any_of_our_functions_have_ratio_exactly_one(dtype, backend):
    x, targets, mask = draw_rows((2, 6), 1037, dtype)
    options = {"temperature": 0.7, "vocab_mask": mask}
    old = rlk.token_logprobs(x, targets, **options)
    for new in (rlk.token_stats(x, targets, outputs=(), **options).logprobs, rlk.token_stats(x, targets, outputs=ALL, **options).logprobs,
                rlk.token_stats(x, targets, ref_logits=x, kl="exact", **options).logprobs,
                rlk.token_stats(x, targets, ref_logits=x, kl="exact", **options).ref_logprobs,
                rlk.token_logprobs(x.clone().requires_grad_(), targets, **options)):
        assert same_bits(new.detach(), old)
    _, metrics = rlk.logits_policy_loss(x.requires_grad_(), targets, old, torch.ones(2, 6), return_metrics=True, **options)
    assert metrics["ratio"].item() == 1.0 and metrics["ppo_kl"].item() == 0.0 and metrics["approx_kl"].item() == 0.0


def test_F65_logits_at_t_score_the_target_at_t(backend):
    # p = 1/6, 2/6, 3/6 in every row, by hand.
    logits = torch.tensor([1.0, 2.0, 3.0]).log().expand(3, 3)
    got = rlk.token_logprobs(logits, torch.tensor([2, 0, 1]))
    assert got.tolist() == pytest.approx([math.log(1 / 2), math.log(1 / 6), math.log(1 / 3)], rel=1e-6)
    shifted = rlk.token_logprobs(logits[:-1], torch.tensor([2, 0, 1])[1:])  # the caller's shift for next-token prediction
    assert shifted.tolist() == pytest.approx([math.log(1 / 6), math.log(1 / 3)], rel=1e-6)


def test_F87_F88_shards_and_packed_samples_of_shifted_labels_equal_the_whole(backend):
    x, targets, _ = draw_rows((8,), 133)
    whole, g = run(x, targets), cotangents((8,), 2)
    for cut in (1, 4, 7):
        parts = [run(x[part], targets[part], g=tuple(v[part] for v in g)) for part in (slice(0, cut), slice(cut, 8))]
        assert_same({k: torch.cat([p[k] for p in parts]) for k in whole}, whole, backend)


def test_F94_what_is_not_asked_for_is_not_computed(backend):
    x, targets, _ = draw_rows((4,), 37)
    assert [k for k, v in rlk.token_stats(x, targets, outputs=())._asdict().items() if v is not None] == ["logprobs", "logsumexp"]
    for name in ALL:
        found = rlk.token_stats(x, targets, outputs=(name,))._asdict()
        assert {k for k, v in found.items() if v is not None} == {"logprobs", "logsumexp", name}
        assert same_bits(found[name], run(x, targets)[name])


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_F74_sampled_estimators_of_two_models_equal_their_formula_and_get_its_gradient(kl, backend):
    x, targets, _ = draw_rows((6,), 37)
    x = x.clamp(-6, 6)  # log-probabilities below 20: their difference is known to 1e-5
    reference = x + 0.3 * torch.randn(6, 37, generator=torch.Generator().manual_seed(8))
    leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    got = rlk.token_stats(leaf, targets, ref_logits=reference, kl=kl, temperature=0.7).kl
    truth = statistics(wide, targets, 0.7, ref_logits=reference)
    gap = truth["ref_logprobs"] - truth["logprobs"]
    expected = {"k1": -gap, "k2": gap**2 / 2, "k3": gap.exp() - 1 - gap}[kl]
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=4e-6)
    (g,) = cotangents((6,), 1)
    (gradient,), (expected_gradient,) = torch.autograd.grad(got, leaf, g), torch.autograd.grad(expected, wide, g.double())
    allowed = gradient_allowance({"logprobs": 3 * g}, x, targets, 0.7) + 1.5e-5 * (g.abs() / 0.7)[:, None]
    assert ((gradient - expected_gradient).abs() <= allowed).all() and expected_gradient.abs().max() > 1e-3
