"""Bits on the device: the same in every run, in any batch, with and without gradients, beside other work."""

import contextlib

import gpu_support as gpu
import pytest
import torch

import rlkernels

both = pytest.mark.parametrize("backend", gpu.BACKENDS, indirect=True)
RUNS = 3 if gpu.REHEARSAL else 100


@contextlib.contextmanager
def other_stream_multiplies():
    """Matrix products on another stream, enqueued before and during what is inside."""
    if gpu.REHEARSAL:
        yield lambda: None
        return
    stream, a = torch.cuda.Stream(), gpu.noise(4096, 4096, dtype=torch.bfloat16)
    stream.wait_stream(torch.cuda.current_stream())

    def multiply():
        with torch.cuda.stream(stream):
            for _ in range(4):
                a @ a

    multiply()
    yield multiply
    torch.cuda.current_stream().wait_stream(stream)


def everything(x, ref, targets, old, advantage, rewards, values):
    """One call of each function: outputs and gradients in a flat tuple."""
    leaf, second = x.detach().requires_grad_(), x.detach().requires_grad_()
    stats = rlkernels.token_stats(
        leaf, targets, ref_logits=ref, kl="exact", outputs=("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    )
    grads = torch.autograd.grad((stats.logprobs, stats.entropy, stats.kl), leaf, (old, advantage, old))
    loss = rlkernels.logits_policy_loss(
        second, targets, old, advantage, kl_coef=0.04, ref_logprobs=old, entropy_coef=0.01
    )
    columns = old.clone().requires_grad_()
    small = rlkernels.policy_loss(columns, advantage, advantage)
    pairs = rlkernels.pairwise_reward_loss(columns, advantage)
    return (
        *(s for s in stats if s is not None),
        *grads,
        loss.detach(),
        *torch.autograd.grad(loss, second),
        small.detach(),
        *torch.autograd.grad(small, columns),
        pairs.detach(),
        *torch.autograd.grad(pairs, columns),
        *rlkernels.gae(rewards, values),
    )


@pytest.mark.fault(52)
@both
@pytest.mark.parametrize("vocab", (4099, 151936))
def test_a_hundred_runs_beside_other_work_give_the_same_bits(backend, vocab):
    dtype, rows = torch.bfloat16, 48
    x, ref = gpu.noise(rows, vocab, seed=1, dtype=dtype) * 3, gpu.noise(rows, vocab, seed=2, dtype=dtype) * 3
    targets = torch.randint(
        vocab, (rows,), generator=torch.Generator(device=gpu.DEVICE).manual_seed(3), device=gpu.DEVICE
    )
    old, advantage = -gpu.noise(rows, seed=4).abs(), gpu.noise(rows, seed=5)
    rewards, values = gpu.noise(64, 1100, seed=6), gpu.noise(64, 1100, seed=7)
    different = torch.zeros((), dtype=torch.long, device=gpu.DEVICE)
    with gpu.using(backend), other_stream_multiplies() as multiply:
        first = everything(x, ref, targets, old, advantage, rewards, values)
        assert not any(t.isnan().any() for t in first)
        for _ in range(RUNS - 1):
            multiply()
            again = everything(x, ref, targets, old, advantage, rewards, values)
            for a, b in zip(first, again, strict=True):
                different += (a != b).sum()
    assert different.item() == 0


def outputs(backend, x, targets, ref):
    leaf = x.detach().requires_grad_()
    with gpu.using(backend):
        stats = rlkernels.token_stats(leaf, targets, ref_logits=ref, kl="exact")
    g = torch.full_like(stats.logprobs, 0.75)
    (grad,) = torch.autograd.grad((stats.logprobs, stats.entropy, stats.kl), leaf, (g, g, g))
    return stats.logprobs.detach(), stats.entropy.detach(), stats.kl.detach(), grad


@pytest.mark.fault(53)
@both
@pytest.mark.parametrize("vocab", (517, 32000, 151936))
def test_a_row_has_the_same_bits_alone_permuted_strided_and_padded(backend, vocab):
    rows, dtype = 33, torch.bfloat16
    x, ref = gpu.noise(rows, vocab, seed=1, dtype=dtype) * 3, gpu.noise(rows, vocab, seed=2, dtype=dtype) * 3
    generator = torch.Generator(device=gpu.DEVICE).manual_seed(3)
    targets = torch.randint(vocab, (rows,), generator=generator, device=gpu.DEVICE)
    batch = outputs(backend, x, targets, ref)
    for r in (0, 17, rows - 1):
        alone = outputs(backend, x[r : r + 1], targets[r : r + 1], ref[r : r + 1])
        assert all(gpu.bits(a[r : r + 1], b) for a, b in zip(batch, alone, strict=True)), f"row {r} alone"
    order = torch.randperm(rows, generator=generator, device=gpu.DEVICE)
    permuted = outputs(backend, x[order], targets[order], ref[order])
    assert all(gpu.bits(a[order], b) for a, b in zip(batch, permuted, strict=True)), "permuted"
    parent, parent_ref = (
        torch.full((rows, vocab + 24), float("nan"), dtype=dtype, device=gpu.DEVICE) for _ in range(2)
    )
    for p, values in ((parent, x), (parent_ref, ref)):
        p[:, 8 : 8 + vocab] = values
    strided = outputs(backend, parent[:, 8 : 8 + vocab], targets, parent_ref[:, 8 : 8 + vocab])
    assert all(gpu.bits(a, b) for a, b in zip(batch, strided, strict=True)), "strided"
    many = 4 * rows
    padded = outputs(
        backend,
        torch.cat([x, *[torch.zeros_like(x)] * 3]),
        torch.cat([targets, *[torch.full_like(targets, -100)] * 3]),
        torch.cat([ref, *[torch.zeros_like(ref)] * 3]),
    )
    assert padded[0].shape[0] == many and all(gpu.bits(a, b[:rows]) for a, b in zip(batch, padded, strict=True)), (
        "padded"
    )


@pytest.mark.fault(40)
@both
@pytest.mark.parametrize("vocab", (517, 151936))
def test_no_grad_inference_mode_and_training_give_the_same_bits(backend, vocab):
    x = gpu.noise(9, vocab, seed=1, dtype=torch.bfloat16) * 3
    targets = torch.randint(vocab, (9,), generator=torch.Generator(device=gpu.DEVICE).manual_seed(3), device=gpu.DEVICE)
    with gpu.using(backend):
        training = rlkernels.token_stats(x.detach().requires_grad_(), targets)
        with torch.no_grad():
            frozen = rlkernels.token_stats(x, targets)
        with torch.inference_mode():
            inference = rlkernels.token_stats(x, targets)
    for other in (frozen, inference):
        assert gpu.bits(training.logprobs, other.logprobs) and gpu.bits(training.entropy, other.entropy)
        assert not other.logprobs.requires_grad


@pytest.mark.fault(84)
@both
@pytest.mark.parametrize("dtype", gpu.DTYPES, ids=str)
@pytest.mark.parametrize("vocab", (517, 32000, 151936, 262144))
def test_the_ratio_is_exactly_one_where_old_logprobs_came_from_the_same_kernel(backend, vocab, dtype):
    """``token_logprobs``, ``token_stats`` with every output and ``fused_policy`` give one log-probability."""
    from rlkernels import ops

    x, targets, _ = gpu.rows((6,), vocab, dtype, seed=8)
    with gpu.using(backend), torch.no_grad():
        old = rlkernels.token_logprobs(x, targets)
        stats = rlkernels.token_stats(
            x, targets, outputs=("entropy", "log_sum_sq_probs", "mean_logits"), ref_logits=x, kl="exact"
        )
        weight = torch.ones_like(old)
        fused = ops.fused_policy_op(
            "ppo_clip",
            x,
            targets,
            ops.number(1.0),
            -100,
            None,
            [old, weight],
            ops.numbers((0.2, 0.2)),
            weight,
            weight,
            None,
            None,
            None,
            True,
            False,
            backend,
        )
    assert gpu.bits(old, stats.logprobs) and gpu.bits(old, fused[2]) and gpu.bits(old, stats.ref_logprobs)
    assert (stats.kl.abs() <= 1e-6).all()
