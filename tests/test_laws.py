"""The laws of the library, each with the tests that hold it, named after it."""
import ctypes
import inspect
import mmap
import os
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
from reference import assert_within_policy, cotangents, draw_rows, same_bits, statistics

import rlkernels as rlk
from rlkernels.backends import BACKENDS, absent, use_backend

PRESENT = [name for name in BACKENDS if absent(name) is None]
ALL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
native = pytest.mark.skipif(absent("cpu") is not None, reason=f"the native CPU backend is absent: {absent('cpu')}")


@pytest.fixture(params=PRESENT)
def backend(request):
    with use_backend(request.param):
        yield request.param


# One call of every public function, with every tensor argument that it takes. Those of REAL come as leaves that require a gradient.
B, L, V, H = 3, 5, 37, 8


def data(seed=0):
    draw = torch.Generator().manual_seed(seed)
    logits, targets, vocab_mask = draw_rows((B, L), V, seed=seed)
    columns = {name: torch.randn(B, L, generator=draw) for name in ("logprobs", "old", "ref", "advantages", "values", "old_values", "returns", "rewards")}
    mask = torch.rand(B, L, generator=draw) < 0.8
    mask[:, 0] = True
    return {**columns, "logits": logits, "targets": targets, "vocab_mask": vocab_mask, "ref_logits": logits.flip(-1).clone(), "mask": mask,
            "temperature": torch.rand(B, L, generator=draw) + 0.5, "entropy": torch.rand(B, L, generator=draw), "cu": torch.tensor([0, 4, 9, 15]),
            "hidden": torch.randn(B, L, H, generator=draw), "weight": torch.randn(V, H, generator=draw), "bias": torch.randn(V, generator=draw),
            "head": torch.randn(1, H, generator=draw), "pair_a": torch.randn(6, generator=draw), "pair_b": torch.randn(6, generator=draw),
            "pair_c": torch.randn(6, generator=draw), "pair_d": torch.randn(6, generator=draw), "groups": torch.tensor([4, 1, 4, 1, 4, 4]),
            "token_weights": torch.rand(B, L, generator=draw)}


TRAINED = ("logits", "logprobs", "entropy", "values", "hidden", "weight", "bias", "head", "pair_a", "pair_b")
CALLS = {
    "token_logprobs": lambda d: rlk.token_logprobs(d["logits"], d["targets"], temperature=d["temperature"], vocab_mask=d["vocab_mask"]),
    "token_stats": lambda d: rlk.token_stats(d["logits"], d["targets"], temperature=d["temperature"], vocab_mask=d["vocab_mask"],
                                             ref_logits=d["ref_logits"], kl="exact", outputs=ALL),
    "linear_token_logprobs": lambda d: rlk.linear_token_logprobs(d["hidden"], d["weight"], d["targets"], bias=d["bias"], softcap=5.0, chunk_tokens=4),
    "linear_token_stats": lambda d: rlk.linear_token_stats(d["hidden"], d["weight"], d["targets"], bias=d["bias"], temperature=d["temperature"]),
    "policy_loss": lambda d: rlk.policy_loss(d["logprobs"], d["old"], d["advantages"], d["mask"], ref_logprobs=d["ref"], kl_coef=0.1,
                                             entropy=d["entropy"], entropy_coef=0.1, return_metrics=True),
    "policy_loss of sequences": lambda d: rlk.policy_loss(d["logprobs"], d["old"], d["advantages"], d["mask"], ratio_level="sequence"),
    "logits_policy_loss": lambda d: rlk.logits_policy_loss(
        d["logits"], d["targets"], d["old"], d["advantages"], d["mask"], temperature=d["temperature"], vocab_mask=d["vocab_mask"],
        ref_logprobs=d["ref"], kl_coef=0.1, entropy_coef=0.1, weights=d["token_weights"], return_metrics=True),
    "logits_policy_loss of sequences": lambda d: rlk.logits_policy_loss(d["logits"], d["targets"], d["old"], d["advantages"], d["mask"],
                                                                        ratio_level="sequence_token", aggregation="seq-mean-token-mean"),
    "value_loss": lambda d: rlk.value_loss(d["values"], d["old_values"], d["returns"], d["mask"], clip_range=0.2, return_metrics=True),
    "dpo_loss": lambda d: rlk.dpo_loss(d["pair_a"], d["pair_b"], d["pair_c"], d["pair_d"], label_smoothing=0.1, return_metrics=True),
    "pairwise_reward_loss": lambda d: rlk.pairwise_reward_loss(d["pair_a"], d["pair_b"], margin=d["pair_c"], center_coef=0.1),
    "reward_scores": lambda d: rlk.reward_scores(d["hidden"], d["head"], attention_mask=d["mask"]),
    "gae": lambda d: rlk.gae(d["rewards"], d["values"], d["mask"], lam=0.9),
    "discounted_returns": lambda d: rlk.discounted_returns(d["rewards"].view(-1), d["mask"].view(-1), gamma=0.9, cu_seqlens=d["cu"]),
    "masked_whiten": lambda d: rlk.masked_whiten(d["values"], d["mask"]),
    "group_advantages": lambda d: rlk.group_advantages(d["pair_c"], d["groups"]),
    "token_weights": lambda d: rlk.token_weights(d["mask"].view(-1), "seq-mean-token-mean", cu_seqlens=d["cu"]),
    "aggregate": lambda d: rlk.aggregate(d["values"], d["mask"], "seq-mean-token-mean"),
    "sequence_sums": lambda d: rlk.sequence_sums(d["values"], d["mask"]),
    "sequence_means": lambda d: rlk.sequence_means(d["values"].view(-1), d["mask"].view(-1), d["cu"]),
    "broadcast_to_tokens": lambda d: rlk.broadcast_to_tokens(d["values"][:, 0], d["mask"]),
    "spans_to_mask": lambda d: rlk.spans_to_mask(d["cu"].view(2, 2), 16),
}
NO_TENSORS = {"TokenStats", "backends", "objective", "objectives", "use_backend"}


def test_every_public_function_is_held_to_the_laws():
    assert {name.split(" ")[0] for name in CALLS} == set(rlk.__all__) - NO_TENSORS
    assert all(inspect.isfunction(getattr(rlk, name.split(" ")[0])) for name in CALLS)


def tensors(x):
    """Every tensor in a result: alone, in a tuple, in a dict of metrics."""
    if isinstance(x, torch.Tensor):
        return [x]
    return [t for part in (x.values() if isinstance(x, dict) else x or ()) for t in tensors(part)]


def call(name, d, seed=3):
    """Results and gradients, with cotangents that are not 1."""
    d = {k: v.detach().requires_grad_() if k in TRAINED else v for k, v in d.items()}
    results = tensors(CALLS[name](d))
    trained = [t for t in results if t.requires_grad]
    inputs = [d[k] for k in TRAINED]
    draw = torch.Generator().manual_seed(seed)
    gradients = torch.autograd.grad(trained, inputs, [torch.randn(t.shape, generator=draw).to(t.dtype) for t in trained], allow_unused=True) if trained else ()
    return [t.detach() for t in results] + [g for g in gradients if g is not None]


@pytest.mark.parametrize("name", CALLS)
def test_law_1_inputs_are_never_changed(name, backend):
    before, inputs = data(), data()
    assert call(name, inputs)
    for key, x in inputs.items():
        assert same_bits(x, before[key]), f"{name} changed {key}"


def loss_in_place(function, x, d, inplace):
    if function == "logits_policy_loss":
        return 0.7 * rlk.logits_policy_loss(x, d["targets"], d["old"], d["advantages"], d["mask"], entropy_coef=0.1, inplace_backward=inplace)
    if function == "token_stats":
        stats = rlk.token_stats(x, d["targets"], vocab_mask=d["vocab_mask"], ref_logits=d["ref_logits"].to(x.dtype), kl="exact", inplace_backward=inplace)
        return ((stats.logprobs + stats.kl) * d["ref"] + stats.entropy * d["old"]).sum()
    return (rlk.token_logprobs(x, d["targets"], temperature=d["temperature"], inplace_backward=inplace) * d["ref"]).sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", ["token_logprobs", "token_stats", "logits_policy_loss"])
def test_law_1_only_inplace_backward_writes_and_autograd_is_told(function, dtype, backend):
    d = data()
    leaf = d["logits"].to(dtype).requires_grad_()
    fresh = leaf * 1
    (expected,) = torch.autograd.grad(loss_in_place(function, fresh, d, False), leaf)
    x = leaf * 1
    later = (x * x).sum()  # autograd has saved x
    loss = loss_in_place(function, x, d, True)
    before, address = x.detach().clone(), x.data_ptr()
    assert same_bits(x.detach(), before)  # the forward writes nothing
    (got,) = torch.autograd.grad(loss, leaf)
    assert same_bits(got, expected)
    assert x.data_ptr() == address and same_bits(x.detach(), expected)  # the gradient lies where the logits lay
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        later.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("function", ["token_logprobs", "token_stats", "logits_policy_loss"])
def test_law_1_an_inplace_gradient_stays_inside_its_view(function, dtype, backend):
    d = data()
    parent = torch.full((B + 2, L + 2, V + 3), 7.0, dtype=dtype)
    parent[1:-1, 1:-1, 1:-2] = d["logits"]
    canary = torch.ones_like(parent, dtype=torch.bool)
    canary[1:-1, 1:-1, 1:-2] = False
    leaf = parent.requires_grad_()
    whole = leaf * 1
    loss_in_place(function, whole[1:-1, 1:-1, 1:-2], d, True).backward()
    assert (whole.detach()[canary] == 7.0).all()
    assert not leaf.grad[canary].any() and leaf.grad[~canary].any()


POISON = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("poison", POISON)
def test_law_2_masked_columns_and_rows_are_left_out_by_where(poison, backend):
    d = data()
    clean = {k: v.clone() for k, v in d.items()}
    live = d["targets"] != -100
    d["logits"] = torch.where(d["vocab_mask"] & live[..., None], d["logits"], poison)
    d["ref_logits"] = torch.where(d["vocab_mask"] & live[..., None], d["ref_logits"], poison)
    for name in ("token_logprobs", "token_stats"):
        for got, expected in zip(call(name, d), call(name, clean), strict=True):
            assert same_bits(got, expected), name
    dead = ~d["mask"] | ~live
    for key in ("old", "ref", "advantages", "token_weights", "logprobs", "entropy"):
        d[key] = d[key].masked_fill(dead, poison)
        clean[key] = clean[key].masked_fill(dead, 0.5)
    d["logits"] = d["logits"].masked_fill(dead[..., None], poison)
    for name in ("logits_policy_loss", "policy_loss", "policy_loss of sequences"):
        inputs = [{**x, "mask": ~dead} for x in (d, clean)]
        for got, expected in zip(call(name, inputs[0]), call(name, inputs[1]), strict=True):
            assert same_bits(got, expected), name
            assert got.isfinite().all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_law_2_nan_poisons_its_row_and_no_other(poison, dtype, backend):
    x, targets, _ = draw_rows((2, 4), 133, dtype)
    reference = draw_rows((2, 4), 133, dtype, seed=7)[0]
    g = cotangents((2, 4), 3, dtype=torch.float64 if dtype == torch.float64 else torch.float32)

    def results(x):
        x = x.clone().requires_grad_()
        stats = rlk.token_stats(x, targets, ref_logits=reference, kl="exact", outputs=ALL)
        (gradient,) = torch.autograd.grad((stats.logprobs, stats.entropy, stats.kl), x, g)
        return {**stats._asdict(), "gradient": gradient}
    clean = results(x)
    x[1, 0, 130] = poison
    got = results(x)
    others = torch.ones(2, 4, dtype=torch.bool)
    others[1, 0] = False
    for name, value in got.items():
        assert same_bits(value[others], clean[name][others]), name
    for name in ("logprobs", "entropy", "kl", "gradient"):
        assert got[name][1, 0].isnan().all(), name


def test_law_2_nan_in_a_live_token_reaches_the_loss(backend):
    for name in ("logits", "old", "advantages", "ref", "token_weights"):
        d = data()
        d["mask"][0, 0], d["targets"][0, 0] = True, 3
        d[name][0, 0] = float("nan")
        loss = call("logits_policy_loss", d)[0]
        assert loss.isnan(), name


def policy(x, targets, columns, **options):
    """Loss and gradient of the fused pass, with KL and entropy terms. Weights of 1: a row's gradient then depends on that row alone."""
    x, options = x.detach().requires_grad_(), {"weights": torch.ones_like(columns[0]), **options}
    loss = rlk.logits_policy_loss(x, targets, *columns[:2], ref_logprobs=columns[2], kl="k2", kl_coef=0.1, entropy_coef=0.2, **options)
    return loss.detach(), torch.autograd.grad(loss, x, torch.tensor(0.7, dtype=loss.dtype))[0]


def rows_of(x, targets, g, **options):
    x = x.detach().requires_grad_()
    stats = rlk.token_stats(x, targets, outputs=ALL, kl="exact", **options)
    (gradient,) = torch.autograd.grad((stats.logprobs, stats.entropy, stats.kl), x, g)
    return [t.detach() for t in stats] + [gradient]


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("vocab", [37, 4133, 9001])  # below a chunk; one block and a tail; several blocks and a tail
def test_law_3_F53_a_row_does_not_depend_on_the_rows_around_it(vocab, dtype):
    real = torch.float64 if dtype == torch.float64 else torch.float32
    rows = 12
    x, targets, mask = draw_rows((rows,), vocab, dtype)
    reference = draw_rows((rows,), vocab, dtype, seed=4)[0]
    g, columns = cotangents((rows,), 3, dtype=real), [c.clone() for c in cotangents((rows,), 3, seed=5, dtype=real)]
    t = torch.rand(rows, generator=torch.Generator().manual_seed(6), dtype=real) + 0.5

    def compute(pick, x=x):
        options = {"temperature": t[pick], "vocab_mask": mask[pick]}
        _, gradient = policy(x[pick], targets[pick], [c[pick] for c in columns], **options)
        return [*rows_of(x[pick], targets[pick], tuple(v[pick] for v in g), ref_logits=reference[pick], **options), gradient]

    with use_backend("cpu"):
        whole = compute(torch.arange(rows))
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(8))
        wide = torch.full((rows, 3 * vocab + 1), float("nan"), dtype=dtype)
        wide[:, 5:5 + vocab] = x
        variants = {"again": compute(torch.arange(rows)), "half of them": compute(torch.arange(5, rows)), "permuted": compute(order),
                    "alone": [torch.cat(parts) for parts in zip(*(compute(torch.tensor([r])) for r in range(rows)), strict=True)],
                    "rows apart": compute(slice(None), wide[:, 5:5 + vocab])}
        picked = {"half of them": torch.arange(5, rows), "permuted": order}
    for variant, results in variants.items():
        for k, (got, expected) in enumerate(zip(results, whole, strict=True)):
            assert same_bits(got, expected[picked.get(variant, slice(None))]), f"{variant}: result {k} of dtype {dtype}"


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_law_3_results_do_not_depend_on_the_number_of_threads(dtype):
    real = torch.float64 if dtype == torch.float64 else torch.float32
    x, targets, mask = draw_rows((70,), 533, dtype)
    g, columns = cotangents((70,), 3, dtype=real), cotangents((70,), 3, seed=5, dtype=real)
    rewards, values = torch.randn(9, 40, dtype=real), torch.randn(9, 40, dtype=real)
    before, found = torch.get_num_threads(), []
    try:
        with use_backend("cpu"):
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append([*rows_of(x, targets, g, ref_logits=x.flip(0)), *policy(x, targets, columns, vocab_mask=mask), *rlk.gae(rewards, values),
                              rlk.policy_loss(values, rewards, values + rewards)])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for k, (got, expected) in enumerate(zip(other, found[0], strict=True)):
            assert same_bits(got, expected), f"result {k}"


@pytest.mark.parametrize("name", CALLS)
def test_law_3_two_runs_are_equal_in_every_bit(name, backend):
    for first, second in zip(call(name, data()), call(name, data()), strict=True):
        assert same_bits(first, second)


@native
def test_law_3_the_forward_is_the_same_with_and_without_gradients():
    d = data()
    for name in ("token_logprobs", "token_stats", "logits_policy_loss", "policy_loss", "linear_token_stats"):
        trained = tensors(CALLS[name]({k: v.clone().requires_grad_() if k in TRAINED else v for k, v in d.items()}))
        with torch.no_grad():
            plain = tensors(CALLS[name](d))
        with torch.inference_mode():
            inference = tensors(CALLS[name](d))
        for a, b, c in zip(trained, plain, inference, strict=True):
            assert same_bits(a.detach(), b) and same_bits(b, c), name


def test_law_4_a_forced_backend_never_hands_over_to_another(monkeypatch):
    x, targets, _ = draw_rows((3,), 37)
    for name in ("eager", *(["cpu"] if absent("cpu") is None else [])):
        before = rlk.ops.calls()
        with use_backend(name):
            rlk.token_logprobs(x, targets)
        assert rlk.ops.calls() - before == {("token_stats", name): 1}
    module = sys.modules["rlkernels.backends"]  # the package's attribute of that name is the function
    monkeypatch.setitem(module.DEVICES, "cpu", ("eager",))  # as if the native backend did not serve this device
    monkeypatch.setattr(module, "absent", lambda name: None)
    with use_backend("cpu"), pytest.raises(RuntimeError, match="backend 'cpu' does not serve device cpu .*token_stats.*; move the tensors"):
        rlk.token_logprobs(x, targets)


@native
def test_law_4_what_the_native_backend_lacks_raises_and_names_it():
    half = torch.zeros(4, dtype=torch.float16)
    native_backend = BACKENDS["cpu"]
    says = r"of dtype torch.float16 are not supported by backend 'cpu'; cast to float32 or use_backend\(\"eager\"\)"
    with pytest.raises(NotImplementedError, match=says):
        native_backend.elementwise("k1", [half, half], [], None)
    with pytest.raises(NotImplementedError, match=says):
        native_backend.gae(half[None], half[None], None, None, 1.0, 1.0, "skip")


def test_law_5_a_new_beta_temperature_or_length_compiles_nothing(backend):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def loss(x, targets, beta):
        logp = rlk.token_logprobs(x, targets, temperature=beta)
        return rlk.dpo_loss(logp[0], logp[1], reference_free=True, beta=beta, label_smoothing=beta / 4) + rlk.value_loss(
            logp, logp.detach(), logp.detach(), clip_range=beta) + rlk.policy_loss(logp, logp.detach(), logp.detach(), clip_low=beta / 2, clip_high=beta)

    for length, beta in ((3, 0.5), (8, 0.6), (11, 0.7), (17, 1.3)):
        loss(torch.randn(2, length, V), torch.zeros(2, length, dtype=torch.int64), beta)
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_law_6_offsets_are_64_bit(dtype, backend):
    far = 2**30  # row 2 starts at element 2**31; only three pages of the 4 to 8 GB are ever touched
    small, targets, _ = draw_rows((3,), V, dtype)
    targets[2] = 5
    sparse = torch.empty(2 * far + V, dtype=dtype).as_strided((3, V), (far, 1))
    sparse.copy_(small)
    columns = cotangents((3,), 3)
    g = cotangents((3,), 3, seed=2)
    for got, expected in zip(rows_of(sparse, targets, g, ref_logits=sparse), rows_of(small, targets, g, ref_logits=small), strict=True):
        assert same_bits(got, expected)
    for got, expected in zip(policy(sparse, targets, columns), policy(small, targets, columns), strict=True):
        assert same_bits(got, expected)


def test_law_6_an_inplace_gradient_lands_in_a_row_beyond_32_bits(backend):
    far = 2**30
    small, targets, _ = draw_rows((3,), V, torch.bfloat16)
    targets[2] = 5
    leaf = small.clone().requires_grad_()
    (expected,) = torch.autograd.grad(rlk.token_logprobs(leaf * 1, targets).sum(), leaf)
    sparse = torch.empty(2 * far + V, dtype=torch.bfloat16).as_strided((3, V), (far, 1))
    x = SparseCopy.apply(leaf, sparse)
    (got,) = torch.autograd.grad(rlk.token_logprobs(x, targets, inplace_backward=True).sum(), leaf)
    assert same_bits(got, expected) and same_bits(sparse.clone(memory_format=torch.contiguous_format), expected)


class SparseCopy(torch.autograd.Function):
    """A non-leaf tensor whose rows are far apart."""

    @staticmethod
    def forward(ctx, x, place):
        return place.copy_(x)

    @staticmethod
    def backward(ctx, g):
        return g.clone(memory_format=torch.contiguous_format), None


def test_law_6_many_rows_and_few_columns(backend):
    x = torch.randn(70_001, 2, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(70_001) % 2
    loss, gradient = policy(x, targets, [torch.zeros(70_001)] * 3)
    wide = x.double().requires_grad_()
    truth = statistics(wide, targets)
    logp = truth["logprobs"]
    expected = (0.1 * logp**2 / 2 - 0.2 * truth["entropy"]).sum()  # advantage 0, ref 0
    assert loss.item() == pytest.approx(expected.item(), rel=2e-6)
    torch.testing.assert_close(gradient.double(), 0.7 * torch.autograd.grad(expected, wide)[0], atol=1e-6, rtol=1e-5)


def test_law_7_a_figure_carries_the_machine_and_the_sources_it_came_from():
    from rlkernels.cli import machine

    described = str(machine.describe())
    for fact in ("torch", "commit", "native_sha256"):
        assert fact in described, fact


@contextmanager
def nan_filled_empty():
    """``torch.empty`` returns NaN: an output that is never written shows."""
    before, fill = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.mark.parametrize("name", CALLS)
def test_F12_nothing_is_left_unwritten_where_empty_memory_is_nan(name, backend):
    expected = call(name, data())
    with nan_filled_empty():
        assert torch.empty(3).isnan().all() and torch.zeros(2).new_empty(3).isnan().all()
        got = call(name, data())
    for k, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert same_bits(a, b), f"result {k} of {name}"
        assert not a.is_floating_point() or a.isfinite().all(), f"result {k} of {name}"


def test_F12_every_row_is_written_also_where_all_are_dead(backend):
    x, _, _ = draw_rows((4,), 133)
    dead = torch.full((4,), -100)
    with nan_filled_empty():
        for result in rows_of(x, dead, cotangents((4,), 3), ref_logits=x):
            assert not result.any()
        for result in policy(x, dead, [torch.zeros(4)] * 3):
            assert not result.any()
        alive = torch.zeros(4, dtype=torch.int64)
        zero = torch.zeros(4)
        assert not rows_of(x, alive, (zero, zero, zero), ref_logits=x)[-1].any()  # no upstream gradient: row not read, but written


def guarded(t, unreadable=0):
    """A copy of ``t`` that ends at an unreadable page, or whose last ``unreadable`` bytes, whole pages, are that page. For child processes."""
    size, page = t.numel() * t.element_size(), mmap.PAGESIZE
    pages = -(-size // page) + (unreadable == 0)
    memory = mmap.mmap(-1, pages * page)
    copy = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=0 if unreadable else (pages - 1) * page - size).view(t.shape).copy_(t)
    base = ctypes.addressof((ctypes.c_char * len(memory)).from_buffer(memory))
    hidden = unreadable or page
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(base + pages * page - hidden), hidden, 0) == 0
    return copy


GUARD_PAGES = textwrap.dedent("""
    import mmap
    import torch
    from reference import draw_rows, same_bits
    from test_laws import guarded, policy, rows_of
    import rlkernels as rlk

    with rlk.use_backend("cpu"):
        # Every tensor ends at an unreadable page: one element read too far ends the process.
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            real = torch.float64 if dtype == torch.float64 else torch.float32
            for vocab in (1, 33, 1037, 9001):
                x, y, mask = draw_rows((3,), vocab, dtype)
                y[2] = vocab - 1
                g = [torch.randn(3, dtype=real) for _ in range(3)]
                t = torch.rand(3, dtype=real) + 0.5
                for options in ({}, {"vocab_mask": mask}, {"temperature": t}):
                    close = {k: guarded(v) for k, v in options.items()}
                    labels = y if options else y.int()
                    a = rows_of(guarded(x), guarded(labels), [guarded(v) for v in g], ref_logits=guarded(x), **close)
                    b = rows_of(x, y, g, ref_logits=x, **options)
                    assert all(same_bits(p, q) for p, q in zip(a, b))
                    a, b = policy(guarded(x), guarded(y), [guarded(v) for v in g], **close), policy(x, y, g, **options)
                    assert all(same_bits(p, q) for p, q in zip(a, b))
        x, y, _ = draw_rows((3,), 1024)
        for bad in (1024, 1029, -1, 2**40):
            y[1] = bad
            try:
                rlk.token_logprobs(guarded(x), guarded(y))
            except IndexError as error:
                assert f"target {bad} at row 1 is outside [0, 1024)" in str(error)
            else:
                raise SystemExit("a label outside the vocabulary was accepted")
        for n in (1, 7, 15, 33):
            a = [torch.randn(n) for _ in range(3)]
            b = [guarded(v) for v in a]
            assert same_bits(rlk.policy_loss(*a), rlk.policy_loss(*b))
            assert all(same_bits(p, q) for p, q in zip(rlk.gae(a[0][None], a[1][None]), rlk.gae(b[0][None], b[1][None])))
        # A row that is ignored or weighs nothing lies on an unreadable page itself: it is not read.
        columns = 4 * mmap.PAGESIZE  # a row of fp32 fills whole pages, of 4 or of 64 KiB
        safe = torch.randn(3, columns)
        whole = guarded(safe, unreadable=columns * 4)
        y = torch.tensor([3, 5, -100])
        g = [torch.tensor([0.3, -1.0, 2.0])] * 3
        pairs = [(rows_of(whole, y, g, ref_logits=whole), rows_of(safe, y, g, ref_logits=safe)), (policy(whole, y, g), policy(safe, y, g))]
        live = torch.tensor([1, 1, 0])
        pairs.append((policy(whole, y.clamp(min=0), g, mask=live), policy(safe, y.clamp(min=0), g, mask=live)))
        assert all(same_bits(p, q) for a, b in pairs for p, q in zip(a, b))
    print("survived")
""")


@pytest.mark.skipif(os.name != "posix" or sys.platform == "darwin", reason="mprotect of an anonymous mapping is used as on Linux")
@native
def test_F02_F93_no_byte_outside_a_tensor_and_no_dead_row_is_read():
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    child = subprocess.run([sys.executable, "-c", GUARD_PAGES], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120)
    assert child.returncode == 0 and "survived" in child.stdout, f"exit {child.returncode}: {child.stderr[-2000:]}"


def test_canary_parents_stay_as_they_are_and_are_not_read(backend):
    source, targets, mask = draw_rows((2, 3), V)
    parent = torch.full((4, 5, V + 6), float("nan"))
    parent[1:3, 1:4, 2:2 + V] = source
    before = parent.clone()
    columns = [torch.full((4, 5), float("nan")) for _ in range(3)]
    for k, column in enumerate(columns):
        column[1:3, 1:4] = 0.1 * k - 0.3
    stats = rlk.token_stats(parent[1:3, 1:4, 2:2 + V], targets, outputs=ALL)
    truth, base = statistics(source, targets), statistics(source, targets, dtype=torch.float32)
    for name in ("logprobs", "entropy", "mean_logits"):
        assert_within_policy(getattr(stats, name), truth[name], base[name], name)
    loss, gradient = policy(parent[1:3, 1:4, 2:2 + V], targets, [c[1:3, 1:4] for c in columns])
    assert loss.isfinite() and gradient.isfinite().all()
    assert same_bits(parent, before)
