"""Faults of memory: what is saved for the backward, and the most that is held at once."""

import pytest
import torch
from peak_memory import peak_bytes
from reference import draw_rows, same_bits
from trained_functions import FUNCTIONS, T, head_problem, output_of, problem

import rlkernels as rlk
from rlkernels.backends import absent, use_backend


@pytest.mark.fault(40)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_is_saved_without_gradients_and_the_bits_are_those_of_training(name, backend):
    d, saved = problem(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        trained, leaf = output_of(name, d)
        assert saved and trained.grad_fn is not None
        saved.clear()
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                output = FUNCTIONS[name][1](leaf, d)
            assert not saved and not output.requires_grad and same_bits(output, trained.detach())
        FUNCTIONS[name][1](leaf.detach(), d)
        assert not saved


@pytest.mark.fault(94)
def test_only_what_the_backward_needs_is_saved(backend):
    d = problem()

    def saved_bytes(**options):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            rlk.token_stats(d["x"].clone().requires_grad_(), d["targets"], **options)
        return sum(x.numel() * x.element_size() for x in kept)

    row = T * 4
    assert saved_bytes(outputs=("entropy",)) - saved_bytes(outputs=()) == row
    # The reference's logits are not kept for an estimator.
    assert saved_bytes(outputs=(), ref_logits=d["ref"], kl="k3") < d["x"].numel() * 4 * 2


@pytest.mark.fault(92)
@pytest.mark.skipif(absent("cpu") is not None, reason=f"the native CPU backend is absent: {absent('cpu')}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_second_tensor_of_the_logits_size_exists(dtype):
    x, targets, _ = draw_rows((64,), 8192, dtype)
    size = x.numel() * x.element_size()
    t, old = torch.full((64,), 0.7), torch.zeros(64)
    leaf = x.requires_grad_()

    def stats():
        s = rlk.token_stats(leaf, targets, temperature=t)
        return torch.autograd.grad((s.logprobs, s.entropy), leaf, (old + 0.3, old - 1))

    def policy(g=1.0, **options):
        return torch.autograd.grad(
            rlk.logits_policy_loss(leaf, targets, old, old, temperature=t, entropy_coef=0.1, **options),
            leaf,
            torch.tensor(g),
        )

    with use_backend("cpu"):
        with torch.no_grad():
            assert peak_bytes(lambda: rlk.token_stats(x, targets, temperature=t)) < 0.05 * size
        assert size <= peak_bytes(stats) < 1.05 * size
        assert size <= peak_bytes(policy) < 1.05 * size
        made = leaf * 1
        assert (
            peak_bytes(
                lambda: torch.autograd.grad(rlk.token_logprobs(made, targets, inplace_backward=True).sum(), made)
            )
            < 0.05 * size
        )
        made = leaf * 1
        loss = rlk.logits_policy_loss(made, targets, old, old, entropy_coef=0.1, inplace_backward=True)
        assert peak_bytes(lambda: torch.autograd.grad(loss, made)) < 0.05 * size


@pytest.mark.fault(92, 95)
@pytest.mark.skipif(absent("cpu") is not None, reason=f"the native CPU backend is absent: {absent('cpu')}")
def test_the_fused_head_holds_one_chunk_of_logits():
    h, w, targets, g = head_problem(256, 32, 4096, torch.float32)
    leaves = [h.requires_grad_(), w.requires_grad_()]

    def run(chunk):
        return torch.autograd.grad(rlk.linear_token_logprobs(*leaves, targets, chunk_tokens=chunk), leaves, g)

    dense, weight = 256 * 4096 * 4, w.numel() * 4
    with use_backend("cpu"):
        peaks = {chunk: peak_bytes(lambda chunk=chunk: run(chunk)) for chunk in (8, 64, 256)}
    for chunk, peak in peaks.items():
        assert peak <= dense * chunk / 256 * 1.1 + 3 * weight, f"{peaks}, dense logits take {dense}"
    assert peaks[8] < 0.5 * dense + 2 * weight < peaks[256] + dense
