"""Rows that are not ordinary, on the device: infinities, NaN, bad labels, dead rows, and what lies beside a row."""

import gpu_support as gpu
import pytest
import reference
import torch

import rlkernels

INF, NAN = float("inf"), float("nan")
VOCAB = 5003  # several blocks, and no multiple of one
both = pytest.mark.parametrize("backend", gpu.BACKENDS, indirect=True)
every_dtype = pytest.mark.parametrize("dtype", gpu.DTYPES, ids=str)


def special(dtype):
    """Rows of the table of special values between ordinary ones; returns logits, targets and the kind of each row."""
    x, targets, _ = gpu.rows((16,), VOCAB, dtype, seed=11)
    targets = torch.randint(
        4096, VOCAB, (16,), device=gpu.DEVICE, generator=torch.Generator(device=gpu.DEVICE).manual_seed(3)
    )
    kinds = ["ordinary"] * 16

    def make(row, kind, index, value):
        kinds[row] = kind
        x[row, index] = value

    make(1, "some -inf", slice(10, 700, 3), -INF)
    make(3, "leading blocks -inf", slice(0, 4096), -INF)
    make(5, "-inf at the target", targets[5], -INF)
    kept = x[7, targets[7]].clone()
    make(7, "only the target finite", slice(None), -INF)
    x[7, targets[7]] = kept
    make(9, "all -inf", slice(None), -INF)
    make(11, "NaN", 4999, NAN)
    make(13, "+inf", 17, INF)
    make(15, "dead, NaN inside", slice(None), NAN)
    targets[15] = -100
    return x, targets, kinds


@pytest.mark.fault(16, 17)
@both
@every_dtype
def test_special_rows_follow_the_contract(backend, dtype):
    x, targets, _ = special(dtype)
    with gpu.using(backend):
        got = rlkernels.token_stats(x, targets)
    truth = reference.statistics(x, targets)
    base = reference.statistics(x, targets, dtype=torch.float32)
    for name in ("logprobs", "entropy"):
        expected = truth[name].clone()
        for row in (9, 11, 13):  # torch's entropy of such rows depends on where 0 * inf is met; the contract says NaN
            expected[row] = NAN
        reference.assert_within_policy(getattr(got, name), expected, base[name], name)


@both
@every_dtype
def test_a_special_row_changes_no_bit_of_another(backend, dtype):
    x, targets, kinds = special(dtype)
    clean, _, _ = gpu.rows((16,), VOCAB, dtype, seed=11)
    ordinary = [r for r, kind in enumerate(kinds) if kind == "ordinary"]
    g = gpu.noise(16, seed=1)
    results = []
    for values in (x, clean):
        leaf = values.detach().requires_grad_()
        with gpu.using(backend):
            stats = rlkernels.token_stats(leaf, targets)
        (grad,) = torch.autograd.grad((stats.logprobs, stats.entropy), leaf, (g, g))
        results.append((stats.logprobs[ordinary], stats.entropy[ordinary], grad[ordinary]))
    assert all(gpu.bits(a, b) for a, b in zip(*results, strict=True))


@both
@every_dtype
def test_gradients_of_special_rows_follow_the_contract(backend, dtype):
    x, targets, _ = special(dtype)
    leaf = x.detach().requires_grad_()
    with gpu.using(backend):
        logp = rlkernels.token_logprobs(leaf, targets)
    (grad,) = torch.autograd.grad(logp, leaf, torch.ones_like(logp))
    assert (grad[1, 10:700:3] == 0).all() and grad[1].isfinite().all()
    assert (grad[3, :4096] == 0).all() and grad[3].isfinite().all()
    assert grad[5, targets[5]] == 1 and grad[5].isfinite().all()  # as torch: g at the target, -g p elsewhere
    assert (grad[7] == 0).all()
    assert grad[9].isnan().any() and grad[11].isnan().any() and grad[13].isnan().any()
    assert (grad[15] == 0).all(), "a dead row's gradient is written as 0"


@pytest.mark.fault(2)
@both
@pytest.mark.parametrize("fused", (False, True), ids=("token_stats", "fused_policy"))
def test_a_bad_label_makes_its_row_nan_and_reads_nothing(backend, fused):
    if gpu.REHEARSAL:
        pytest.skip("on the CPU a bad label is an IndexError")
    # Finite beside the rows: a stray read would give a finite number.
    parent = torch.full((8, 1200), 3.0, device=gpu.DEVICE)
    x = parent[:, 100:1125]
    x.copy_(gpu.noise(8, 1025))
    targets = torch.tensor([0, 1025, 1030, -1, 2**40, -(2**40), 1024, 7], device=gpu.DEVICE)
    bad = torch.tensor([False, True, True, True, True, True, False, False], device=gpu.DEVICE)
    leaf = x.detach().requires_grad_()
    with gpu.using(backend):
        if fused:
            old, advantage = -gpu.noise(8, seed=1).abs(), gpu.noise(8, seed=2)
            loss = rlkernels.logits_policy_loss(leaf, targets, old, advantage)
            assert loss.isnan()
            out = loss
        else:
            stats = rlkernels.token_stats(leaf, targets)
            assert torch.equal(stats.logprobs.isnan(), bad) and torch.equal(stats.entropy.isnan(), bad)
            out = stats.logprobs
        good = rlkernels.token_stats(x[~bad].contiguous(), targets[~bad])
    if not fused:
        assert gpu.bits(stats.logprobs[~bad], good.logprobs)
    (grad,) = torch.autograd.grad(out, leaf, torch.ones_like(out))
    assert grad[bad].isnan().all() and not grad[~bad].isnan().any()


@pytest.mark.fault(12)
@both
@every_dtype
def test_dead_rows_are_zero_in_every_output_and_never_read(backend, dtype):
    x, _, _ = gpu.rows((5,), 2053, dtype)
    x[::2] = NAN
    targets = torch.tensor([-100, 3, -100, 2052, -100], device=gpu.DEVICE)
    leaf = x.detach().requires_grad_()
    with gpu.using(backend):
        stats = rlkernels.token_stats(
            leaf, targets, ref_logits=x, kl="exact", outputs=("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
        )
    for name, values in zip(stats._fields, stats, strict=True):
        assert (values[::2] == 0).all(), name
        assert not values[1::2].isnan().any(), name
    (grad,) = torch.autograd.grad(stats.logprobs.sum() + stats.entropy.sum() + stats.kl.sum(), leaf)
    assert (grad[::2] == 0).all() and grad[1::2].isfinite().all()


@both
def test_nothing_is_written_outside_the_rows_in_place(backend):
    parent = torch.full((6, 1300), NAN, device=gpu.DEVICE, dtype=torch.bfloat16)
    view = parent[1:5, 130:1155]
    view.copy_(gpu.noise(4, 1025).to(torch.bfloat16))
    targets = torch.tensor([0, 1024, -100, 500], device=gpu.DEVICE)
    inside = torch.zeros_like(parent, dtype=torch.bool)
    inside[1:5, 130:1155] = True
    before = view.clone().requires_grad_()
    with gpu.using(backend):
        (expected,) = torch.autograd.grad(rlkernels.token_logprobs(before, targets).sum(), before)
        made = view.detach().copy_(before)  # as a model makes logits: no leaf
        torch.autograd.grad(rlkernels.token_logprobs(made, targets, inplace_backward=True).sum(), made)
    assert gpu.bits(view, expected)
    assert parent[~inside].isnan().all()


@pytest.mark.fault(18, 66)
@both
@pytest.mark.parametrize("offset", (1e4, -1e4))
def test_a_common_offset_keeps_every_digit(backend, offset):
    x = torch.randint(-64, 64, (4, 2053), device=gpu.DEVICE).float() / 8  # exact in fp32 after the shift
    targets = torch.tensor([0, 1, 1024, 2052], device=gpu.DEVICE)
    with gpu.using(backend):
        plain, moved = rlkernels.token_stats(x, targets), rlkernels.token_stats(x + offset, targets)
    assert (plain.logprobs - moved.logprobs).abs().max() <= 4e-6
    assert (plain.entropy - moved.entropy).abs().max() <= 4e-6


@pytest.mark.fault(11)
@both
@pytest.mark.parametrize("shape", ((0, 37), (1, 1), (3, 1), (0, 2, 37)))
def test_empty_and_degenerate_shapes(backend, shape):
    leaf = torch.zeros(shape, device=gpu.DEVICE, requires_grad=True)
    targets = torch.zeros(shape[:-1], dtype=torch.long, device=gpu.DEVICE)
    with gpu.using(backend):
        stats = rlkernels.token_stats(leaf, targets)
    assert stats.logprobs.shape == shape[:-1]
    (grad,) = torch.autograd.grad(stats.logprobs.sum() + stats.entropy.sum(), leaf)
    assert (
        grad.shape == shape
        and (grad == 0).all()
        and (stats.logprobs == 0).all()
        and (stats.entropy == 0).all()
        or shape[-1] > 1
    )


@pytest.mark.fault(140)
@both
@pytest.mark.parametrize("layout", ("every other column", "columns first", "one column for all"))
def test_a_vocab_mask_of_any_strides_is_read_as_it_is_meant(backend, layout):
    x, targets, _ = gpu.rows((16,), VOCAB, torch.bfloat16, seed=21)
    mask = gpu.noise(16, VOCAB, seed=22) > -1
    mask[:, 0] = True
    bent = {
        "every other column": lambda m: m.repeat_interleave(2, -1)[..., ::2],
        "columns first": lambda m: m.t().contiguous().t(),
        "one column for all": lambda m: m[:, :1].expand(m.shape),
    }[layout](mask)
    plain = bent.clone(memory_format=torch.contiguous_format)
    with gpu.using(backend):
        got, expected = (rlkernels.token_stats(x, targets, vocab_mask=m) for m in (bent, plain))
    for a, b in zip(got, expected, strict=True):
        assert a is b is None or reference.same_bits(a, b)
