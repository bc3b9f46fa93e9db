"""Faults that concern where rows of logits lie: addresses, layouts, strides, blocks, no rows and
many.
"""

import math

import pytest
import torch
from reference import LAYOUTS, assert_within_policy, cotangents, draw_rows, judge, same_bits, statistics
from row_runs import ALL, DTYPES, SIXTEEN, assert_same, assert_same_bits, run

import rlkernels as rlk

INF, NAN = math.inf, math.nan


@pytest.mark.fault(1)
def test_offsets_beyond_32_bits_reach_the_right_row(backend):
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


@pytest.mark.fault(2)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("bad", [37, 42, -1, -99, 2**31 - 1])
def test_a_label_outside_the_vocabulary_is_an_index_error_that_names_row_and_range(bad, dtype, backend):
    x, targets, _ = draw_rows((2, 4), 37)
    targets.view(-1)[5] = bad
    for function in (
        rlk.token_logprobs,
        lambda x, y: rlk.token_logprobs(x.mT.contiguous().mT, y),
        lambda x, y: rlk.logits_policy_loss(x, y, torch.zeros(2, 4), torch.ones(2, 4)),
    ):
        with pytest.raises(IndexError, match=rf"target {bad} at row 5 is outside \[0, 37\)"):
            function(x, targets.to(dtype))


@pytest.mark.fault(3)
@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 36, 1000])
def test_the_ignore_index_is_no_address_and_its_row_is_zero(ignore_index, backend):
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


# Around every width in use: 8 and 16 lanes, 32 and 64 columns per chunk, blocks of 4096 columns; 1, 2 and primes beside
# them.
@pytest.mark.fault(4)
@pytest.mark.parametrize(
    "vocab,dtype",
    [(v, torch.float32) for v in (1, 2, 7, 15, 16, 17, 63, 64, 65, 1023, 1025, 2053, 4095, 4096, 4097, 8197)]
    + [(v, dtype) for v in (1, 17, 65, 1025, 4097) for dtype in SIXTEEN],
)
def test_no_vocabulary_size_adds_phantom_columns(vocab, dtype, backend):
    x, targets, mask = draw_rows((6,), vocab, dtype, seed=vocab)
    other = draw_rows((6,), vocab, dtype, seed=vocab + 1)[0]
    for vocab_mask in (None, mask):
        stats = judge(rlk.token_stats, x, targets, 0.7, vocab_mask=vocab_mask, ref_logits=other)
        assert (stats.logprobs <= 0).all()


@pytest.mark.fault(6)
def test_vocab_mask_takes_padded_columns_out_and_without_it_they_count(backend):
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
    assert_within_policy(
        counted,
        statistics(wide, targets)["logprobs"],
        statistics(wide, targets, dtype=torch.float32)["logprobs"],
        "padding counted",
    )
    assert (counted < truth["logprobs"] - 0.1).all()


@pytest.mark.fault(7, 15)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_logits_gives_the_bits_of_the_contiguous_one(layout, dtype, backend):
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
    "transposed leading dimensions": lambda m: (
        m.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1)
    ),
    "one row for all": lambda m: m[:1, :1].expand(m.shape),
    "all columns alike": lambda m: m.any(-1, keepdim=True).expand(m.shape),
}


@pytest.mark.fault(7)
@pytest.mark.parametrize("layout", VOCAB_MASKS)
def test_strides_of_the_vocab_mask_are_followed(layout, backend):
    x, targets, mask = draw_rows((2, 3), 37)
    mask = VOCAB_MASKS[layout](mask)
    assert_same(run(x, targets, vocab_mask=mask), run(x, targets, vocab_mask=mask.contiguous()), backend)
    one, flat = mask[0, 1], mask.reshape(-1, 37) if mask.stride(-1) == 1 else mask[0]
    assert_same(run(x, targets, vocab_mask=one), run(x, targets, vocab_mask=one.contiguous()), backend)
    x, targets = x.view(-1, 37)[: len(flat)], targets.view(-1)[: len(flat)]
    assert_same(run(x, targets, vocab_mask=flat), run(x, targets, vocab_mask=flat.contiguous()), backend)


@pytest.mark.fault(7)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_strides_of_targets_and_temperatures_are_followed(dtype, backend):
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


@pytest.mark.fault(8)
def test_a_gradient_of_stride_zero_is_read_as_it_is_meant(backend):
    x, targets, _ = draw_rows((3, 4), 37)
    assert torch.tensor(0.3).expand(3, 4).stride() == (0, 0)
    for one in (torch.tensor(0.3), torch.tensor([[0.3], [-1.0], [0.0]]), torch.tensor([0.3, -1.0, 0.0, 2.0])):
        expanded = one.expand(3, 4)
        assert same_bits(
            gradient_with((expanded, expanded), x, targets),
            gradient_with((expanded.contiguous(), expanded.contiguous()), x, targets),
        )
    x.requires_grad_()
    (got,) = torch.autograd.grad(rlk.token_logprobs(x, targets).sum(), x)
    (expected,) = torch.autograd.grad(rlk.token_logprobs(x, targets), x, torch.ones(3, 4))
    assert same_bits(got, expected)


@pytest.mark.fault(9)
def test_a_gradient_with_the_strides_of_a_larger_tensor_is_read_as_it_is_meant(backend):
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
    assert same_bits(
        gradient_with((steps, steps.flip(0)), x, targets),
        gradient_with((steps.contiguous(), steps.flip(0).contiguous()), x, targets),
    )


@pytest.mark.fault(11)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), (2, 0, 3)])
def test_no_rows_give_empty_results_and_gradients(shape, dtype, backend):
    x = torch.empty(*shape, 37, dtype=dtype)
    got = run(x, torch.empty(shape, dtype=torch.int64), ref_logits=x, kl="exact")
    for name, value in got.items():
        assert value.shape == (x.shape if name == "gradient" else shape), name
    x.requires_grad_()
    loss = rlk.logits_policy_loss(
        x,
        torch.empty(shape, dtype=torch.int64),
        torch.empty(shape),
        torch.empty(shape),
        kl_coef=0.1,
        ref_logprobs=torch.empty(shape),
        entropy_coef=0.1,
    )
    (gradient,) = torch.autograd.grad(loss, x)
    assert loss.item() == 0.0 and gradient.shape == x.shape


@pytest.mark.fault(11)
def test_one_column_has_logprob_and_entropy_zero(backend):
    got = run(torch.tensor([[3.0], [-1e30], [7.0]]), torch.tensor([0, 0, -100]))
    assert not got["logprobs"].any() and not got["entropy"].any() and not got["gradient"].any()
    assert got["logsumexp"].tolist() == [3.0, pytest.approx(-1e30, rel=1e-6), 0.0] and got["is_top1"].tolist() == [
        True,
        True,
        False,
    ]


@pytest.mark.fault(11)
def test_no_columns_are_refused(backend):
    with pytest.raises(ValueError, match="vocabulary dimension is empty"):
        rlk.token_logprobs(torch.empty(3, 0), torch.zeros(3, dtype=torch.int64))


@pytest.mark.fault(11)
def test_a_single_row_may_come_without_a_row_dimension(backend):
    x, _, mask = draw_rows((1,), 37)
    mask = mask[0].index_fill(0, torch.tensor(5), True)
    got = run(
        x[0], torch.tensor(5), vocab_mask=mask, temperature=torch.tensor(0.7), g=(torch.tensor(0.4), torch.tensor(-0.2))
    )
    expected = run(
        x,
        torch.tensor([5]),
        vocab_mask=mask,
        temperature=torch.tensor([0.7]),
        g=(torch.tensor([0.4]), torch.tensor([-0.2])),
    )
    assert_same_bits(got, {k: v[0] for k, v in expected.items()})


@pytest.mark.fault(13)
def test_seventy_thousand_rows(backend):
    x = torch.randn(70_000, 3, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(70_000) % 3
    got = run(x, targets)
    truth, base = statistics(x, targets), statistics(x, targets, dtype=torch.float32)
    for name in ("logprobs", "entropy"):
        assert_within_policy(got[name], truth[name], base[name], name)
    last = run(x[-5:], targets[-5:], g=tuple(g[-5:] for g in cotangents((70_000,), 2)))
    assert_same({k: v[-5:] for k, v in got.items()}, last, backend)
