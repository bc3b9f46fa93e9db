"""The laws of the library, each with the tests that hold it, named after it. Law 3 is in test_laws_bits."""

import inspect

import pytest
import torch
import torch._dynamo.testing
from present_backends import native
from public_calls import CALLS, B, L, V, call, data, policy, rows_of
from reference import cotangents, draw_rows, same_bits, statistics
from row_runs import ALL

import rlkernels as rlk
from rlkernels import backends
from rlkernels.backends import BACKENDS, absent, use_backend

NO_TENSORS = {
    "EntropyController",
    "KLController",
    "KLTerm",
    "Moments",
    "Packed",
    "ProcessedSequences",
    "RewardNormalizer",
    "WeightAverage",
    "TokenStats",
    "available_backends",
    "check_objective",
    "Correction",
    "objective",
    "objectives",
    "presets",
    "status",
    "use_backend",
}


def test_every_public_function_is_held_to_the_laws():
    assert {name.split(" ")[0] for name in CALLS} == set(rlk.__all__) - NO_TENSORS
    assert all(inspect.isfunction(getattr(rlk, name.split(" ")[0])) for name in CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_law_1_inputs_are_never_changed(name, backend):
    before, inputs = data(), data()
    assert call(name, inputs)
    for key, x in inputs.items():
        assert same_bits(x, before[key]), f"{name} changed {key}"


def loss_in_place(function, x, d, inplace):
    if function == "logits_policy_loss":
        return 0.7 * rlk.logits_policy_loss(
            x, d["targets"], d["old"], d["advantages"], d["mask"], entropy_coef=0.1, inplace_backward=inplace
        )
    if function == "token_stats":
        stats = rlk.token_stats(
            x,
            d["targets"],
            vocab_mask=d["vocab_mask"],
            ref_logits=d["ref_logits"].to(x.dtype),
            kl="exact",
            inplace_backward=inplace,
        )
        return ((stats.logprobs + stats.kl) * d["ref"] + stats.entropy * d["old"]).sum()
    return (
        rlk.token_logprobs(x, d["targets"], temperature=d["temperature"], inplace_backward=inplace) * d["ref"]
    ).sum()


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_divergence_of_a_row_from_itself_is_exactly_zero_wherever_its_maximum_lies(dtype, backend):
    # Each block's maximum is larger than the last.
    x = torch.randn(4, 5000, generator=torch.Generator().manual_seed(1)).mul(3).sort(-1)[0].to(dtype)
    x[1] = x[1].flip(-1)
    columns = torch.arange(5000) % 3 > 0
    for mask in (None, columns):
        assert not rlk.token_stats(
            x, torch.full((4,), 4999), ref_logits=x.clone(), kl="exact", vocab_mask=mask
        ).kl.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_divergence_is_right_wherever_the_maxima_lie(dtype, backend):
    draw = torch.Generator().manual_seed(1)
    rising, other = (torch.randn(5000, generator=draw).mul(2).sort()[0].to(dtype) for _ in range(2))
    peaked = torch.cat([torch.tensor([9.0]), other[1:].float()]).to(dtype)  # its largest column comes first
    for p, q in ((rising, other.flip(0)), (other.flip(0), rising), (peaked, rising), (rising, peaked), (rising, other)):
        log_p, log_q = (x.double().log_softmax(-1) for x in (p, q))
        want = (log_p.exp() * (log_p - log_q)).sum()
        got = rlk.token_stats(p[None], torch.tensor([0]), ref_logits=q[None], kl="exact").kl[0]
        assert abs(got.item() - want.item()) <= 2e-6 * (log_p.exp() * (log_p - log_q).abs()).sum(), (got, want)


def test_law_2_a_target_outside_of_the_mask_moves_nothing_whatever_the_row_holds(backend):
    x, mask = torch.randn(4, 9, generator=torch.Generator().manual_seed(1)), torch.arange(9) != 3
    x[0, 5], x[1, 5], x[2, :] = float("nan"), float("inf"), -float("inf")
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        logits = x.to(dtype).requires_grad_()
        stats = rlk.token_stats(logits, torch.full((4,), 3), vocab_mask=mask)
        assert not torch.autograd.grad(stats.logprobs.sum(), logits, retain_graph=True)[0].any()
        (gradient,) = torch.autograd.grad(stats.logprobs.sum() + stats.entropy.sum(), logits)
        assert gradient[:3, mask].isnan().all() and gradient[3].isfinite().all()


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


@pytest.mark.fault(91)
def test_law_4_a_forced_backend_never_hands_over_to_another(monkeypatch):
    x, targets, _ = draw_rows((3,), 37)
    for name in ("eager", *(["cpu"] if absent("cpu") is None else [])):
        before = rlk.ops.calls()
        with use_backend(name):
            rlk.token_logprobs(x, targets)
        assert rlk.ops.calls() - before == {("token_stats", name): 1}
    monkeypatch.setitem(backends.DEVICES, "cpu", ("eager",))  # as if the native backend did not serve this device
    monkeypatch.setattr(backends, "absent", lambda name: None)
    with (
        use_backend("cpu"),
        pytest.raises(RuntimeError, match="backend 'cpu' does not serve device cpu .*token_stats.*; move the tensors"),
    ):
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
        return (
            rlk.dpo_loss(logp[0], logp[1], reference_free=True, beta=beta, label_smoothing=beta / 4)
            + rlk.value_loss(logp, logp.detach(), logp.detach(), clip_range=beta)
            + rlk.policy_loss(logp, logp.detach(), logp.detach(), clip_low=beta / 2, clip_high=beta)
        )

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
    for got, expected in zip(
        rows_of(sparse, targets, g, ref_logits=sparse), rows_of(small, targets, g, ref_logits=small), strict=True
    ):
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
