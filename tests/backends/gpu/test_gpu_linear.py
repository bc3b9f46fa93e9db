"""The losses of a head on the device: against all logits in float64 on the host, and what only a device shows."""

import gpu_support as gpu
import linear_problems as problems
import pytest
import torch

import rlkernels

both = pytest.mark.parametrize("backend", gpu.BACKENDS, indirect=True)
every_dtype = pytest.mark.parametrize("dtype", gpu.DTYPES, ids=str)
LEVELS = ("token", "sequence", "sequence_token", "sequence_sum")
SHAPE, H, V = (6, 24), 256, 1030
# 144: every token.
CHUNKS = ({}, {"chunk_tokens": 32}, {"max_live_tokens": 144}, {"max_live_tokens": 144, "chunk_tokens": 48})
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 3e-3, torch.float16: 4e-4}
"""Of a gradient's norm.

One rounding to bf16 is 1.7e-3 of it; 16-bit products take the gradient of the logits rounded, and their sum is rounded
too.
"""


def problem(dtype, shape=SHAPE, hidden=H, vocab=V, seed=0):
    d = problems.problem(dtype, shape, hidden, vocab, seed)
    sums, _ = problems.answers(d, problems.leaves(d))
    d["reference"] = sums.detach().float() + torch.linspace(-2, 2, len(sums))
    return d


def placed(d):
    return {name: gpu.put(x) for name, x in d.items()}


def leaves(d):
    return [d[name].detach().clone().requires_grad_() for name in ("hidden", "weight", "bias")]


def policy(d, operands, level="token", **options):
    h, w, b = operands
    return rlkernels.linear_policy_loss(
        h,
        w,
        d["targets"],
        d["old"],
        d["advantages"],
        d["mask"],
        bias=b,
        ratio_level=level,
        **problems.PARAMS["ppo_clip"],
        **options,
    )


def pairs(d, operands, **options):
    h, w, b = operands
    chosen, rejected = d["reference"].chunk(2)
    return rlkernels.linear_dpo_loss(
        h, w, d["targets"], d["mask"], bias=b, ref_chosen_logps=chosen, ref_rejected_logps=rejected, **options
    )


def answers(d, operands, **options):
    h, w, b = operands
    return rlkernels.linear_unpaired_preference_loss(
        h,
        w,
        d["targets"],
        d["reference"],
        d["advantages"][:, 0] > 0,
        d["mask"],
        bias=b,
        loss_type="apo_zero_unpaired",
        **options,
    )


def sft(d, operands, **options):
    h, w, b = operands
    return rlkernels.linear_sft_loss(h, w, d["targets"], d["mask"], bias=b, **options)


def statistics(d, operands, **options):
    h, w, b = operands
    stats = rlkernels.linear_token_stats(h, w, d["targets"], bias=b, temperature=d["temperature"], **options)
    return (stats.logprobs * d["advantages"] + stats.entropy * d["token_weights"]).sum()


CALLS = {
    **{f"policy {level}": lambda d, o, level=level, **k: policy(d, o, level, **k) for level in LEVELS},
    "pairs": pairs,
    "answers": answers,
    "sft": sft,
    "statistics": statistics,
}
every_call = pytest.mark.parametrize("call", CALLS)


def truth_of(call, d):
    """Loss and gradients in float64, on the host."""
    operands = problems.leaves(d)
    if call.startswith("policy"):
        loss = problems.policy(d, operands, ratio_level=call.split()[1])
    elif call == "statistics":
        logp, entropy = problems.rows(d, operands, temperature=d["temperature"])
        loss = (logp * d["advantages"] + entropy * d["token_weights"]).sum()
    elif call == "sft":
        logp, _ = problems.rows(d, operands)
        loss = -logp[problems.live_of(d)].mean()
    else:
        sums, n = problems.answers(d, operands)
        half, reference = len(sums) // 2, d["reference"].double()
        if call == "pairs":
            loss = problems.pairs(
                "sigmoid",
                sums[:half],
                sums[half:],
                reference[:half],
                reference[half:],
                n[:half],
                n[half:],
                beta=0.1,
                smoothing=0.0,
            ).mean()
        else:
            gap = torch.sigmoid(0.1 * (sums - reference))
            loss = torch.where(d["advantages"][:, 0] > 0, 1 - gap, gap).mean()
    return loss.detach(), problems.gradients(loss, operands)


@pytest.mark.fault(102)
@both
@every_dtype
@every_call
def test_every_loss_of_a_head_is_that_of_all_logits(backend, call, dtype):
    d = problem(dtype)
    loss, gradients = truth_of(call, d)
    on_device = placed(d)
    with gpu.using(backend):
        for options in CHUNKS:
            operands = leaves(on_device)
            got = CALLS[call](on_device, operands, **options)
            got.backward()
            scale = max(abs(loss.item()), 1.0)
            assert abs(got.item() - loss.item()) <= 1e-5 * scale, (options, got.item(), loss.item())
            for x, expected, name in zip(operands, gradients, ("hidden", "weight", "bias"), strict=True):
                error = problems.frobenius(x.grad.cpu(), expected)
                assert error <= ALLOWED[dtype], f"{name}, {options}: {error:.3g} of the gradient's norm"


@pytest.mark.fault(44)
@both
@every_dtype
def test_a_mean_over_a_million_tokens_reaches_16_bits_before_its_loss_scale(backend, dtype):
    d, total, upstream = problem(dtype), 2.0**20, 2.0**12
    wide = problems.leaves(d)
    expected = problems.gradients(problems.policy(d, wide, normalizers={"batch_num_tokens": total}), wide, upstream)
    on_device = placed(d)
    operands = leaves(on_device)
    with gpu.using(backend):
        loss = policy(on_device, operands, normalizers={"batch_num_tokens": total})
        loss.backward(torch.tensor(upstream, device=gpu.DEVICE))
    for x, t in zip(operands, expected, strict=True):
        assert problems.frobenius(x.grad.cpu(), t) <= ALLOWED[dtype]


@pytest.mark.fault(48)
@both
@every_call
def test_with_a_bound_the_host_does_not_wait(backend, call):
    d = placed(problem(torch.bfloat16))
    with gpu.using(backend):
        for options in ({"max_live_tokens": 144}, {"max_live_tokens": 144, "chunk_tokens": 48}):
            for wait in (True, False):  # the first call compiles
                operands = leaves(d)
                gpu.sync()
                if wait:
                    CALLS[call](d, operands, **options).backward()
                    continue
                with gpu.hidden_syncs_raise():
                    CALLS[call](d, operands, **options).backward()


@pytest.mark.fault(48)
@both
@gpu.CUDA_ONLY
@every_call
def test_with_a_bound_a_captured_graph_replays_to_the_bits_of_eager(backend, call):
    static = placed(problem(torch.bfloat16))

    def run(d):
        operands = leaves(d)
        loss = CALLS[call](d, operands, max_live_tokens=144)
        return loss.detach(), *torch.autograd.grad(loss, operands)

    with gpu.using(backend):
        graph, captured = gpu.captured(run, static)
        for seed in (1, 2):
            other = placed(problem(torch.bfloat16, seed=seed))
            for name, value in other.items():
                static[name].copy_(value)
            graph.replay()
            gpu.sync()
            assert all(gpu.bits(a, b) for a, b in zip(captured, run(other), strict=True)), f"replay with seed {seed}"


@pytest.mark.fault(93)
@both
@every_dtype
def test_what_stands_in_dead_rows_changes_no_bit(backend, dtype):
    d = placed(problem(dtype))
    live = d["mask"] & (d["targets"] != -100)
    with gpu.using(backend):
        for call in ("policy token", "policy sequence", "pairs", "sft"):
            for options in CHUNKS:
                results = []
                for filling in (0.25, float("nan")):
                    filled = {**d, "hidden": d["hidden"].masked_fill(~live[..., None], filling)}
                    operands = leaves(filled)
                    loss = CALLS[call](filled, operands, **options)
                    results.append([loss.detach(), *torch.autograd.grad(loss, operands)])
                assert all(gpu.bits(a, b) and a.isfinite().all() for a, b in zip(*results, strict=True)), (
                    call,
                    options,
                )


@both
@every_dtype
def test_the_ratio_of_unchanged_weights_is_1_whatever_the_batch(backend, dtype):
    """To the bit on a CPU. cuBLAS chooses its kernel, and the order of its sums, by the number of rows."""
    rows, hidden, vocab = (64, 128, 4099) if gpu.REHEARSAL else (4096, 1024, 128256)
    h, w = gpu.noise(rows, hidden, seed=1, dtype=dtype), gpu.noise(vocab, hidden, seed=2, dtype=dtype)
    targets = gpu.put(torch.arange(rows) * 7919 % vocab)

    def agree(alone, whole):
        if gpu.REHEARSAL:
            assert gpu.bits(alone, whole)
        # Logits have a spread of sqrt(hidden), and a row keeps 4 eps of its largest number.
        largest = whole.abs().max().clamp(min=5 * hidden**0.5)
        assert (alone - whole).abs().max() <= 4 * torch.finfo(torch.float32).eps * largest

    with gpu.using(backend), torch.no_grad():
        whole = rlkernels.linear_token_logprobs(h, w, targets)
        for part in (slice(0, 1), slice(3, 20), slice(rows // 3, rows)):
            agree(rlkernels.linear_token_logprobs(h[part], w, targets[part]), whole[part])
        for chunk in (16, 48):
            agree(rlkernels.linear_token_logprobs(h[:64], w, targets[:64], chunk_tokens=chunk), whole[:64])


@both
def test_the_gradients_of_a_plan_of_several_stretches_are_those_of_one_chunk(backend):
    rows, hidden, vocab, limit = (200, 64, 1031, 32) if gpu.REHEARSAL else (5000, 1024, 32000, 512)
    h, w = (gpu.noise(n, hidden, seed=n, dtype=torch.bfloat16).requires_grad_() for n in (rows, vocab))
    targets, old, advantages = (
        gpu.put(torch.arange(rows) * 7919 % vocab),
        gpu.noise(rows, seed=3) - 12,
        gpu.noise(rows, seed=4),
    )
    found = []
    with gpu.using(backend):
        for options in ({"logits_budget": limit * 6 * (vocab + 16)}, {"chunk_tokens": rows}):
            loss = rlkernels.linear_policy_loss(h, w, targets, old, advantages, entropy_coef=0.1, **options)
            found.append((loss, *torch.autograd.grad(loss, (h, w))))
    # The gradient of a logit may round to the next number of 16 bits.
    for got, expected in zip(*found, strict=True):
        error = ((got.double() - expected.double()).norm() / expected.double().norm()).item()
        assert error <= 2e-3, f"{error:.3g}"


@both
def test_logprobs_of_bf16_hidden_states_are_those_of_float64(backend):
    rows, hidden, vocab = (32, 128, 4099) if gpu.REHEARSAL else (64, 4096, 128256)
    h, w = (
        gpu.noise(rows, hidden, seed=1, dtype=torch.bfloat16),
        gpu.noise(vocab, hidden, seed=2, dtype=torch.bfloat16) / hidden**0.5,
    )
    targets = gpu.put(torch.arange(rows) * 7919 % vocab)
    expected = torch.log_softmax(h.double() @ w.double().t(), -1).gather(1, targets[:, None])[:, 0]
    with gpu.using(backend):
        got = rlkernels.linear_token_logprobs(h, w, targets)
    error = (got.double() - expected).abs().max().item()
    # Fp32 cannot say more of a number near -11 than 1e-6.
    assert error <= 2e-6 * max(1.0, expected.abs().max().item() / 10), f"{error:.3g}"


@both
@gpu.CUDA_ONLY
def test_memory_is_gradients_and_budget(backend):
    rows, hidden, vocab, budget = 8192, 1024, 128256, 2**29
    h = gpu.noise(rows, hidden, seed=1, dtype=torch.bfloat16).requires_grad_()
    w = gpu.noise(vocab, hidden, seed=2, dtype=torch.bfloat16).requires_grad_()
    targets = gpu.put(torch.arange(rows) * 7919 % vocab)
    old, advantages = gpu.noise(rows, seed=3) - 12, gpu.noise(rows, seed=4)

    def step():
        loss = rlkernels.linear_policy_loss(h, w, targets, old, advantages, logits_budget=budget)
        return torch.autograd.grad(loss, (h, w))

    with gpu.using(backend):
        step()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = step()
        torch.cuda.synchronize()
    # Summed in fp32, then cast.
    peak, gradients = torch.cuda.max_memory_allocated() - before, 6 * hidden * (vocab + rows)
    assert peak <= 1.05 * budget + gradients + 2**26, f"{(peak - gradients) / 2**20:.0f} MiB beside the gradients"
    del kept


@both
def test_a_group_of_one_rank_equals_no_group(backend):
    distributed = torch.distributed
    if not distributed.is_available() or gpu.DEVICE.type == "cuda" and not distributed.is_nccl_available():
        pytest.skip("torch has no NCCL here")
    d = placed(problem(torch.bfloat16))
    distributed.init_process_group(
        "gloo" if gpu.REHEARSAL else "nccl", store=distributed.HashStore(), rank=0, world_size=1
    )
    try:
        with gpu.using(backend):
            for call in ("policy token", "policy sequence", "pairs"):
                results = []
                for options in ({}, {"process_group": distributed.group.WORLD}):
                    operands = leaves(d)
                    loss = CALLS[call](d, operands, **options)
                    results.append([loss.detach(), *torch.autograd.grad(loss, operands)])
                for a, b in zip(*results, strict=True):
                    assert problems.frobenius(b.float(), a.double()) <= 1e-3, call
    finally:
        distributed.destroy_process_group()
