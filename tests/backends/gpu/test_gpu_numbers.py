"""Row statistics and their gradients on the device against float64 (the bounds of the error policy, with the device's
own exp).
"""

import gpu_support as gpu
import pytest
import reference
import torch

import rlkernels

# Around the block sizes (1023 .. 1025, 2053), degenerate (1, 2, 7), real vocabularies, and one above 262144 (F75).
VOCABULARIES = (1, 2, 7, 1023, 1024, 1025, 2053, 32000, 128256, 151936, 262144, 300000)
both = pytest.mark.parametrize("backend", gpu.BACKENDS, indirect=True)
every_dtype = pytest.mark.parametrize("dtype", gpu.DTYPES, ids=str)


@both
@every_dtype
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_statistics_and_gradients_are_within_the_error_policy(backend, dtype, vocab):
    x, targets, _ = gpu.rows((6,), vocab, dtype)
    gpu.judge(backend, x, targets)


@both
@pytest.mark.parametrize("seed", range(5))
def test_statistics_hold_for_five_seeds(backend, seed):
    x, targets, _ = gpu.rows((3, 5), 4099, torch.bfloat16, seed)
    gpu.judge(backend, x, targets, seed=seed)


@both
@every_dtype
@pytest.mark.parametrize("vocab", (37, 2053, 151936))
def test_temperature_per_row_and_vocabulary_mask_are_within_the_error_policy(backend, dtype, vocab):
    x, targets, mask = gpu.rows((6,), vocab, dtype, seed=2)
    temperature = torch.linspace(0.5, 2.0, 6, device=gpu.DEVICE)
    gpu.judge(backend, x, targets, temperature)
    gpu.judge(backend, x, targets, 0.7, vocab_mask=mask)
    gpu.judge(backend, x, targets, temperature, vocab_mask=mask[0])


@both
@every_dtype
@pytest.mark.parametrize("vocab", (1, 1025, 32000, 262144))
def test_two_model_statistics_and_exact_kl_are_within_the_error_policy(backend, dtype, vocab):
    x, targets, mask = gpu.rows((6,), vocab, dtype, seed=3)
    ref = (x.double() + 0.3 * gpu.noise(6, vocab, seed=4).double()).to(dtype)
    gpu.judge(backend, x, targets, ref_logits=ref)
    if vocab == 1025:
        gpu.judge(backend, x, targets, 1.3, ref_logits=ref, vocab_mask=mask)


@both
@pytest.mark.parametrize("vocab", (37, 4099))
def test_double_logits_are_served_in_double_or_refused_by_name(backend, vocab):
    x, targets, _ = gpu.rows((5,), vocab, torch.float64)
    try:
        with gpu.using(backend):
            got = rlkernels.token_stats(x, targets)
    except NotImplementedError as error:
        assert backend in str(error) and "float64" in str(error)
        return
    truth = reference.statistics(x, targets)
    assert got.logprobs.dtype == torch.float64
    torch.testing.assert_close(got.logprobs, truth["logprobs"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.entropy, truth["entropy"], rtol=1e-11, atol=1e-11)


@pytest.mark.fault(19)
@both
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("vocab", (1, 1025, 32000, 151936))
def test_sixteen_bit_logits_give_the_bits_of_the_same_values_in_fp32(backend, dtype, vocab):
    x, targets, _ = gpu.rows((6,), vocab, dtype, seed=5)
    ref = gpu.noise(6, vocab, seed=6, dtype=dtype)
    with gpu.using(backend):
        narrow = rlkernels.token_stats(
            x, targets, ref_logits=ref, kl="exact", outputs=("entropy", "log_sum_sq_probs", "mean_logits")
        )
        wide = rlkernels.token_stats(
            x.float(),
            targets,
            ref_logits=ref.float(),
            kl="exact",
            outputs=("entropy", "log_sum_sq_probs", "mean_logits"),
        )
    for name, a, b in zip(narrow._fields, narrow, wide, strict=True):
        assert a is None or gpu.bits(a, b), name


@pytest.mark.fault(7)
@both
@pytest.mark.parametrize("layout", reference.LAYOUTS)
def test_no_layout_of_the_logits_changes_a_bit_or_touches_what_lies_between(backend, layout):
    x, targets, _ = gpu.rows((2, 3), 517, torch.bfloat16, seed=7)
    moved = gpu.laid_out(layout, x)
    flat = moved.reshape(-1, 517).contiguous()
    y = torch.randint(
        517, moved.shape[:-1], generator=torch.Generator(device=gpu.DEVICE).manual_seed(1), device=gpu.DEVICE
    )
    g = gpu.noise(flat.shape[0], seed=8)
    leaf, plain = moved.detach().requires_grad_(), flat.detach().requires_grad_()
    with gpu.using(backend):
        got, expected = rlkernels.token_stats(leaf, y), rlkernels.token_stats(plain, y.reshape(-1))
    assert gpu.bits(got.logprobs.reshape(-1), expected.logprobs) and gpu.bits(got.entropy.reshape(-1), expected.entropy)
    (a,), (b,) = (
        torch.autograd.grad(got.logprobs, leaf, g.view(y.shape)),
        torch.autograd.grad(expected.logprobs, plain, g),
    )
    assert gpu.bits(a.reshape(flat.shape), b)


@pytest.mark.fault(8)
@both
def test_a_broadcast_upstream_gradient_counts_for_every_row(backend):
    x, targets, _ = gpu.rows((7,), 1025, torch.float32, seed=9)
    leaf = x.detach().requires_grad_()
    with gpu.using(backend):
        logp = rlkernels.token_logprobs(leaf, targets)
    (summed,) = torch.autograd.grad(logp.sum(), leaf, retain_graph=True)
    (given,) = torch.autograd.grad(logp, leaf, torch.ones_like(logp))
    assert gpu.bits(summed, given)


@pytest.mark.fault(20)
@both
@pytest.mark.parametrize("p", (0.9, 0.99, 0.999, 0.9999))
def test_the_gradient_of_a_confident_token_keeps_its_digits_in_bf16(backend, p):
    vocab = 2053
    x = torch.zeros(4, vocab, dtype=torch.float64, device=gpu.DEVICE)
    targets = torch.tensor([0, 5, 1024, vocab - 1], device=gpu.DEVICE)
    x[torch.arange(4), targets] = torch.log(torch.tensor(p * (vocab - 1) / (1 - p), dtype=torch.float64)).item()
    leaf = x.to(torch.bfloat16).requires_grad_()
    wide = leaf.detach().double().requires_grad_()
    with gpu.using(backend):
        logp = rlkernels.token_logprobs(leaf, targets)
    (got,) = torch.autograd.grad(logp.sum(), leaf)
    (expected,) = torch.autograd.grad(reference.statistics(wide, targets)["logprobs"].sum(), wide)
    at = torch.arange(4), targets
    assert ((got[at].double() - expected[at]).abs() / expected[at].abs()).max() <= 5e-3
