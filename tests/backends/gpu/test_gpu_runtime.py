"""What only a device shows: graphs, hidden syncs, streams, the device guard, size, memory and compilations."""

import gpu_support as gpu
import pytest
import torch

import rlkernels

pytestmark = gpu.CUDA_ONLY
both = pytest.mark.parametrize("backend", gpu.BACKENDS, indirect=True)
T, V = 64, 32000


def inputs(seed=0, rows=T, vocab=V, dtype=torch.bfloat16):
    generator = torch.Generator(device=gpu.DEVICE).manual_seed(seed)
    targets = torch.randint(vocab, (rows,), generator=generator, device=gpu.DEVICE)
    old, advantage, ref_logp = (
        -gpu.noise(rows, seed=seed + 3).abs() - 9,
        gpu.noise(rows, seed=seed + 4),
        -gpu.noise(rows, seed=seed + 5).abs() - 9,
    )
    return {
        "x": gpu.noise(rows, vocab, seed=seed + 1, dtype=dtype),
        "ref": gpu.noise(rows, vocab, seed=seed + 2, dtype=dtype),
        "targets": targets,
        "old": old,
        "advantage": advantage,
        "ref_logp": ref_logp,
        "rewards": gpu.noise(8, rows, seed=seed + 6),
        "values": gpu.noise(8, rows, seed=seed + 7),
    }


def logprobs(a):
    leaf = a["x"].detach().requires_grad_()
    logp = rlkernels.token_logprobs(leaf, a["targets"])
    return logp.detach(), *torch.autograd.grad(logp, leaf, a["advantage"])


def statistics(a):
    leaf = a["x"].detach().requires_grad_()
    stats = rlkernels.token_stats(leaf, a["targets"], temperature=0.9)
    return (
        stats.logprobs.detach(),
        stats.logsumexp.detach(),
        *torch.autograd.grad((stats.logprobs, stats.entropy), leaf, (a["advantage"], a["old"])),
    )


def two_models(a):
    leaf = a["x"].detach().requires_grad_()
    stats = rlkernels.token_stats(leaf, a["targets"], ref_logits=a["ref"], kl="exact")
    return stats.kl.detach(), stats.ref_logprobs.detach(), *torch.autograd.grad(stats.kl, leaf, a["advantage"])


def policy(a):
    leaf = a["x"].detach().requires_grad_()
    loss = rlkernels.logits_policy_loss(
        leaf, a["targets"], a["old"], a["advantage"], ref_logprobs=a["ref_logp"], kl_coef=0.04, entropy_coef=0.01
    )
    return loss.detach(), *torch.autograd.grad(loss, leaf)


def scaled_policy(a):
    leaf = a["x"].detach().requires_grad_()
    loss = rlkernels.logits_policy_loss(leaf, a["targets"], a["old"], a["advantage"], entropy_coef=0.01)
    return loss.detach(), *torch.autograd.grad(loss, leaf, a["advantage"][1])  # read by the kernel, never by the host


def columns(a):
    leaf = a["old"].detach().requires_grad_()
    loss = rlkernels.policy_loss(leaf, a["ref_logp"], a["advantage"], ref_logprobs=a["ref_logp"], kl_coef=0.04)
    return loss.detach(), *torch.autograd.grad(loss, leaf)


def pairs(a):
    leaf = a["old"].detach().requires_grad_()
    loss = rlkernels.pairwise_reward_loss(leaf, a["ref_logp"]) + rlkernels.dpo_loss(
        leaf, a["ref_logp"], a["old"], a["ref_logp"]
    )
    return loss.detach(), *torch.autograd.grad(loss, leaf)


def scan(a):
    return rlkernels.gae(a["rewards"], a["values"])


CALLS = {f.__name__: f for f in (logprobs, statistics, two_models, policy, scaled_policy, columns, pairs, scan)}
every_call = pytest.mark.parametrize("call", CALLS)


def same(got, expected):
    return all(gpu.bits(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.fault(48)
@both
@every_call
def test_a_captured_graph_replays_to_the_bits_of_eager(backend, call):
    function, static = CALLS[call], inputs(0)
    with gpu.using(backend):
        graph, captured = gpu.captured(function, static)
        for seed in (10, 20, 30):
            other = inputs(seed)
            for name, value in other.items():
                static[name].copy_(value)
            graph.replay()
            torch.cuda.synchronize()
            assert same(captured, function(other)), f"replay with seed {seed}"


@pytest.mark.fault(48)
@both
@every_call
def test_nothing_makes_the_host_wait(backend, call):
    function, a = CALLS[call], inputs(1)
    with gpu.using(backend):
        function(a)  # compiles
        torch.cuda.synchronize()
        with gpu.hidden_syncs_raise():
            function(a)


@pytest.mark.fault(104)
@both
@every_call
def test_work_runs_on_the_current_stream_behind_a_slow_producer(backend, call):
    function, a = CALLS[call], inputs(2)
    late = {k: torch.zeros_like(v) for k, v in a.items()}
    side = torch.cuda.Stream()
    with gpu.using(backend):
        expected = function(a)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            torch.cuda._sleep(100_000_000)  # tens of milliseconds
            for k, v in a.items():
                late[k].copy_(v)
            got = function(late)
        side.synchronize()
    assert same(got, expected)


@pytest.mark.fault(45)
@both
@every_call
def test_the_tensors_device_is_used_whichever_is_current(backend, call):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs; with one, the guard's entry is tested")
    function, a = CALLS[call], inputs(3)
    with gpu.using(backend):
        expected = function(a)
        moved = {k: v.to("cuda:1") for k, v in a.items()}
        assert torch.cuda.current_device() == 0
        got = function(moved)
    assert all(t.device.index == 1 for t in got) and same([t.to("cuda:0") for t in got], expected)


@pytest.mark.fault(45)
def test_triton_launches_inside_the_guard_of_the_tensors_device(monkeypatch):
    reason = gpu.missing("triton")
    if reason is not None:
        pytest.skip(f"backend triton: {reason}")
    entered, plain = [], torch.cuda.device_of

    def recorded(tensor):
        entered.append(tensor.device)
        return plain(tensor)

    monkeypatch.setattr(torch.cuda, "device_of", recorded)
    with gpu.using("triton"):
        for name, function in CALLS.items():
            before = len(entered)
            function(inputs(4))
            assert len(entered) > before, f"{name} launched without a guard"


@pytest.mark.fault(13)
@both
def test_seventy_thousand_rows(backend):
    x = gpu.noise(70_000, 37, seed=1)
    targets = torch.randint(37, (70_000,), device=gpu.DEVICE)
    leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    with gpu.using(backend):
        logp = rlkernels.token_logprobs(leaf, targets)
        (grad,) = torch.autograd.grad(logp.sum(), leaf)
        loss = rlkernels.logits_policy_loss(leaf, targets, logp.detach(), torch.ones(70_000, device=gpu.DEVICE))
        rewards, values = gpu.noise(70_000, 5), gpu.noise(70_000, 5, seed=1)
        advantages, _ = rlkernels.gae(rewards, values)
        tail = rlkernels.gae(rewards[-1:], values[-1:])[0]
    expected = torch.log_softmax(wide, -1).gather(1, targets[:, None])[:, 0]
    (slope,) = torch.autograd.grad(expected.sum(), wide)
    torch.testing.assert_close(logp.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(grad.double(), slope, rtol=1e-5, atol=1e-6)
    assert abs(loss.item() + 1.0) < 1e-5  # ratio 1, advantage 1
    assert gpu.bits(advantages[-1:], tail)


@pytest.mark.fault(1)
@both
def test_more_than_two_to_the_31_logits(backend):
    rows, vocab = 16384, 151936
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip(f"needs 16 GiB of free device memory, {torch.cuda.mem_get_info()[0] / 2**30:.0f} are free")
    x = torch.empty(rows, vocab, dtype=torch.bfloat16, device=gpu.DEVICE)
    for start in range(0, rows, 1024):
        x[start : start + 1024].normal_(generator=torch.Generator(device=gpu.DEVICE).manual_seed(start))
    targets = torch.randint(vocab, (rows,), device=gpu.DEVICE)
    old, advantage = torch.full((rows,), -12.0, device=gpu.DEVICE), gpu.noise(rows)
    weight = torch.full((rows,), 1.0 / rows, device=gpu.DEVICE)
    # 14134 * 151936 is the last offset below 2^31.
    ends = torch.tensor([0, 1, 14134, 14135, rows - 2, rows - 1], device=gpu.DEVICE)

    def both_passes(index):
        leaf = x[index].detach().requires_grad_() if index is not None else x.detach().requires_grad_()
        pick = slice(None) if index is None else index
        loss = rlkernels.logits_policy_loss(
            leaf, targets[pick], old[pick], advantage[pick], weights=weight[pick], entropy_coef=0.01
        )
        (grad,) = torch.autograd.grad(loss, leaf)
        grad = grad if index is not None else grad[ends]
        with torch.no_grad():
            stats = rlkernels.token_stats(leaf, targets[pick])
        return (*((s if index is not None else s[ends]) for s in (stats.logprobs, stats.entropy)), grad)

    with gpu.using(backend):
        whole, alone = both_passes(None), both_passes(ends)
    assert not any(t.isnan().any() for t in whole)
    assert same(whole, alone)


def growth(function):
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = function()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del kept
    return peak


@pytest.mark.fault(92)
@both
def test_the_forward_takes_no_memory_and_the_backward_one_gradient(backend):
    a = inputs(5, rows=1024, vocab=64000)
    size = a["x"].numel() * a["x"].element_size()
    leaf = a["x"].detach().requires_grad_()

    made = leaf * 1

    def in_place():
        return torch.autograd.grad(
            rlkernels.token_logprobs(made, a["targets"], inplace_backward=True), made, a["advantage"]
        )

    def policy_in_place():
        loss = rlkernels.logits_policy_loss(
            made, a["targets"], a["old"], a["advantage"], entropy_coef=0.01, inplace_backward=True
        )
        return torch.autograd.grad(loss, made)

    with gpu.using(backend):
        for function in (logprobs, two_models, policy, scaled_policy):
            function(a)
        assert growth(lambda: rlkernels.token_stats(leaf, a["targets"], ref_logits=a["ref"], kl="exact")) <= 0.01 * size
        assert growth(lambda: rlkernels.token_logprobs(leaf, a["targets"])) <= 0.01 * size
        for function in (logprobs, two_models, policy, scaled_policy):
            assert growth(lambda function=function: function(a)) <= 1.02 * size, function.__name__
        assert growth(in_place) <= 0.01 * size and growth(policy_in_place) <= 0.01 * size


@pytest.mark.fault(49)
def test_twenty_lengths_temperatures_and_betas_compile_each_kernel_at_most_twice():
    reason = gpu.missing("triton")
    if reason is not None:
        pytest.skip(f"backend triton: {reason}")
    from triton.runtime.jit import JITFunction

    from rlkernels.backends.triton import column_kernels, row_kernels
    from rlkernels.backends.triton import gae_kernel as scans

    found = {
        f"{m.__name__}.{k}": v
        for m in (row_kernels, column_kernels, scans)
        for k, v in vars(m).items()
        if isinstance(v, JITFunction)
    }

    def variants():
        return {name: sum(len(cache[0]) for cache in kernel.device_caches.values()) for name, kernel in found.items()}

    for kernel in found.values():
        kernel.device_caches.clear()
    with gpu.using("triton"):
        for k in range(20):
            a = inputs(k, rows=3 + 5 * k + k % 2, vocab=4096)
            leaf = a["x"].detach().requires_grad_()
            stats = rlkernels.token_stats(leaf, a["targets"], temperature=0.5 + 0.1 * k)
            torch.autograd.grad((stats.logprobs, stats.entropy), leaf, (a["old"], a["advantage"]))
            loss = rlkernels.logits_policy_loss(
                leaf,
                a["targets"],
                a["old"],
                a["advantage"],
                temperature=0.5 + 0.1 * k,
                clip_low=0.1 + 0.01 * k,
                kl_coef=0.01 * (k + 1),
                ref_logprobs=a["ref_logp"],
                entropy_coef=0.001 * (k + 1),
            )
            torch.autograd.grad(loss, leaf)
            rlkernels.dpo_loss(a["old"], a["ref_logp"], a["old"], a["ref_logp"], beta=0.05 * (k + 1))
            rlkernels.gae(a["rewards"], a["values"], gamma=0.9 + 0.005 * k, lam=0.8 + 0.01 * k)
    counted = variants()
    used = {name: n for name, n in counted.items() if n}
    assert len(used) >= 4, f"the kernels that were compiled: {counted}"
    assert max(used.values()) <= 2, f"variants of each kernel: {used}"


@pytest.mark.fault(47)
def test_torch_compile_makes_one_graph_for_five_lengths():
    torch._dynamo.reset()
    graphs = []

    def counting(module, example_inputs):
        graphs.append(module)
        return module.forward

    def step(x, targets, old, advantage):
        loss = rlkernels.logits_policy_loss(x, targets, old, advantage, entropy_coef=0.01)
        return loss + rlkernels.token_logprobs(x, targets).sum()

    fast = torch.compile(step, backend=counting, fullgraph=True, dynamic=True)
    for rows in (16, 24, 40, 56, 72):
        a = inputs(rows, rows=rows, vocab=517)
        arguments = (a["x"], a["targets"], a["old"], a["advantage"])
        assert gpu.bits(fast(*arguments), step(*arguments))
    assert len(graphs) == 1, f"{len(graphs)} graphs"
