"""A small set that launches every kernel on awkward shapes: run by itself under a memory, race, initialisation and
barrier checker.

Results are compared with torch where that costs no further kernel of note; the checker judges the rest.
"""

import gpu_support as gpu
import pytest
import torch

import rlkernels
from rlkernels.objectives import OBJECTIVES

both = pytest.mark.parametrize("backend", gpu.BACKENDS, indirect=True)
# One column, no multiple of any block, and one that takes the widest configuration.
VOCABULARIES = (1, 1025, 33333)


def logits(rows, vocab, dtype=torch.float32):
    """A view with a gap behind every row: reading past a row reads what was never written."""
    parent = torch.empty(rows, vocab + 7, device=gpu.DEVICE, dtype=dtype)
    view = parent[:, :vocab]
    view.copy_(torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0)))
    return view


def labels(rows, vocab):
    targets = torch.arange(rows) * 7919 % vocab
    targets[rows // 2] = -100
    return gpu.put(targets)


@both
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_statistics_forward_and_backward(backend, vocab, dtype):
    x, ref, targets = logits(5, vocab, dtype), logits(5, vocab, dtype), labels(5, vocab)
    leaf = x.detach().requires_grad_()
    with gpu.using(backend):
        stats = rlkernels.token_stats(
            leaf, targets, ref_logits=ref, kl="exact", outputs=("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
        )
        (grad,) = torch.autograd.grad(stats.logprobs.sum() + stats.entropy.sum() + stats.kl.sum(), leaf)
    expected = torch.log_softmax(x.double(), -1).gather(1, targets.clamp(min=0)[:, None])[:, 0]
    torch.testing.assert_close(stats.logprobs.double(), torch.where(targets == -100, 0.0, expected), rtol=0, atol=1e-5)
    assert grad.isfinite().all() and (grad[2] == 0).all()


@both
@pytest.mark.parametrize("inplace", (False, True))
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_fused_policy_forward_and_backward(backend, vocab, inplace):
    x, targets = logits(5, vocab, torch.bfloat16), labels(5, vocab)
    old, advantage = gpu.put(torch.linspace(-9, -1, 5)), gpu.put(torch.linspace(-1, 1, 5))
    leaf = x.detach().requires_grad_()
    with gpu.using(backend):
        loss = rlkernels.logits_policy_loss(
            leaf * 1,
            targets,
            old,
            advantage,
            ref_logprobs=old,
            kl_coef=0.1,
            entropy_coef=0.01,
            inplace_backward=inplace,
        )
        (grad,) = torch.autograd.grad(loss, leaf)
    assert loss.isfinite() and grad.isfinite().all() and (grad[2] == 0).all()


@both
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_the_op_with_the_gradient_in_the_forward(backend, vocab):
    from rlkernels import ops

    x, targets, weight = logits(5, vocab, torch.bfloat16), labels(5, vocab), gpu.put(torch.full((5,), 0.2))
    loss, dlogits, *_ = ops.fused_policy_op(
        "ppo_clip",
        x,
        targets,
        ops.number(1.0),
        -100,
        None,
        [weight - 5, weight],
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
    assert loss.isfinite() and dlogits.isfinite().all() and (dlogits[2] == 0).all()


@pytest.mark.parametrize("backend", gpu.BACKENDS[-1:], indirect=True)
@pytest.mark.parametrize("inplace", (False, True))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("vocab", VOCABULARIES[1:])
@pytest.mark.parametrize("blocks", gpu.TEAMS)
def test_a_row_kept_by_so_many_blocks_or_read_twice(backend, blocks, vocab, dtype, inplace):
    """Barriers of clusters, shared memory of other blocks, and the second sweep: no vocabulary above takes them."""
    from rlkernels import ops

    x, targets, weight = logits(5, vocab, dtype), labels(5, vocab), gpu.put(torch.full((5,), 0.2))
    arguments = (targets, ops.number(1.0), -100, None, [weight - 5, weight], ops.numbers((0.2, 0.2)), weight, weight)
    with torch.no_grad(), gpu.team(blocks):
        loss, dlogits, *_ = ops.fused_policy_op("ppo_clip", x, *arguments, None, None, None, True, inplace, backend)
    assert loss.isfinite() and dlogits.isfinite().all() and (dlogits[2] == 0).all() and dlogits.any()


@both
def test_a_bad_label_reads_nothing(backend):
    if gpu.REHEARSAL:
        pytest.skip("on the CPU a bad label is an IndexError")
    x = logits(4, 1025)
    targets = gpu.put(torch.tensor([2**40, -1, 1025, 0]))
    with gpu.using(backend):
        logp = rlkernels.token_logprobs(x, targets)
    assert logp.isnan().tolist() == [True, True, True, False]


@both
@pytest.mark.parametrize("n", (1, 1025, 70_001))
@pytest.mark.parametrize("objective", ("ppo_clip", "value_clip", "pairwise"))
def test_elementwise(backend, objective, n):
    from rlkernels import ops

    entry = OBJECTIVES[objective]
    columns = [gpu.put(torch.linspace(-1, 1, n)) for _ in entry.columns]
    loss, value, derivative = ops.elementwise(
        objective,
        columns[0],
        columns[1:],
        ops.numbers([0.2] * len(entry.params)),
        torch.full_like(columns[0], 1 / n),
        backend,
    )
    assert loss.isfinite() and value.isfinite().all() and derivative.isfinite().all()
    torch.testing.assert_close(loss, value.mean(), rtol=1e-5, atol=1e-6)


@both
@pytest.mark.parametrize("shape", ((1, 1), (3, 1025), (70, 33)))
def test_gae_with_a_mask(backend, shape):
    rewards = torch.ones(shape, device=gpu.DEVICE)
    with gpu.using(backend):
        advantages, returns = rlkernels.gae(rewards, torch.zeros_like(rewards), rewards.bool(), gamma=1.0, lam=1.0)
    steps = torch.arange(shape[1], 0, -1, device=gpu.DEVICE).float().expand(shape)
    assert torch.equal(advantages, steps) and torch.equal(returns, steps)


@both
def test_gae_of_packed_sequences(backend):
    offsets = gpu.put(torch.tensor([0, 1, 1030, 1033]))
    rewards = torch.ones(1033, device=gpu.DEVICE)
    with gpu.using(backend):
        advantages, _ = rlkernels.gae(rewards, torch.zeros_like(rewards), cu_seqlens=offsets, gamma=1.0, lam=1.0)
    assert advantages[[0, 1, 1029, 1030, 1032]].tolist() == [1, 1029, 1, 3, 1]
