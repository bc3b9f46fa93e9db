"""The products of an accelerator, on the host: the gradient of fp32 logits is written in the 16 bits that they take,
and in no other case.
"""

import linear_problems as problems
import pytest
import torch
from linear_problems import gradients, own, problem
from reference import same_bits

import rlkernels as rlk
from rlkernels.linear import head as heads
from rlkernels.linear import matmul, projection
from rlkernels.linear.chunk_plan import full_chunks

NARROW = (torch.bfloat16, torch.float16)


class OnHost(matmul.AcceleratorMatmul):
    """Operands and results as on the device, products in fp32 and one order."""

    seen, rows = None, None

    def logits(self, hidden, out):
        out.copy_(hidden.float() @ self.weight.float().t())

    def gradients(self, dlogits, hidden, want_hidden, dweight, first):
        OnHost.seen.append(dlogits.dtype)
        OnHost.rows.append(len(dlogits))
        assert len(hidden) == len(dlogits)
        dlogits = dlogits.to(self.weight.dtype).float()
        if dweight is not None:
            dweight.addmm_(dlogits.t(), hidden.float(), beta=0 if first else 1)
        return dlogits @ self.weight.float() if want_hidden else None


@pytest.fixture
def on_host(monkeypatch):
    OnHost.seen, OnHost.rows = [], []
    monkeypatch.setattr(projection, "matmul_for", lambda weight, logits_dtype, backend: OnHost(weight))
    with rlk.use_backend("eager"):  # as a kernel it takes an output of another dtype
        yield


def losses(d, h, w, b, **options):
    y, mask = d["targets"], d["mask"]
    stats = rlk.linear_token_stats(h, w, y, bias=b, **options)
    yield (stats.logprobs * d["advantages"] + stats.entropy * d["token_weights"]).sum()
    for level in ("token", "sequence"):
        yield rlk.linear_policy_loss(
            h, w, y, d["old"], d["advantages"], mask, bias=b, ratio_level=level, entropy_coef=0.1, **options
        )
    yield rlk.linear_dpo_loss(h, w, y, mask, bias=b, reference_free=True, **options)
    yield rlk.linear_sft_loss(h, w, y, mask, bias=b, **options)


@pytest.mark.parametrize("chunk", [{}, {"chunk_tokens": 16}, {"max_live_tokens": 28}], ids=str)
def test_rounding_at_once_changes_no_bit_and_spares_a_pass(chunk, on_host, monkeypatch):
    dtype = torch.bfloat16  # fp16 is brought near 1 as well
    d, results = problem(dtype, (4, 7)), []
    for seen in (dtype, torch.float32):
        found = []
        for k in range(5):
            operands = [*own(d)[:2], None]
            loss = list(losses(d, *operands, **chunk))[k]
            found += [loss.detach(), *gradients(loss, operands)]
        assert set(OnHost.seen) == {seen}
        OnHost.seen.clear()
        results.append(found)
        # Written in fp32, over the logits, and rounded by the product.
        monkeypatch.setattr(projection.HeadProjection, "gradient_buffer", lambda self, logits: logits)
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


@pytest.fixture
def planned(on_host, monkeypatch):
    """Chunks as on an accelerator, but so small that a plan would let nothing wait."""

    def stretches(rows, limit, shape, keeps):
        full = full_chunks(rows, limit)
        if not keeps or len(full) < 2:
            return full
        assert limit == 32
        sizes = full_chunks(rows, 16)
        return tuple(tuple(size for (size,) in sizes[i : i + 4]) for i in range(0, len(sizes), 4))

    monkeypatch.setattr(heads, "on_accelerator", lambda kind: True)
    monkeypatch.setattr(heads, "planned_stretches", stretches)


def loss_of(kind, d, h, w, **options):
    """A loss whose rows belong to no sequence, or one of statistics."""
    y, mask, a = d["targets"], d["mask"], d["advantages"]
    if kind == "stats":
        stats = rlk.linear_token_stats(h, w, y, **options)
        return (stats.logprobs * a + stats.entropy * d["token_weights"]).sum()
    if kind == "policy":
        return rlk.linear_policy_loss(h, w, y, d["old"], a, mask, entropy_coef=0.1, **options)
    if kind == "policy with a clamp":  # which no kernel over rows holds
        return rlk.linear_policy_loss(h, w, y, None, a, mask, log_ratio_clamp=1.0, **options)
    if kind == "sft":
        return rlk.linear_sft_loss(h, w, y, mask, **options)
    return rlk.linear_distillation_loss(h, w, d["hidden"] * 0.5, d["weight"] * 1.5, mask, **options)


BUDGET = 32 * 6 * (133 + 16)
"""Of 32 rows: fp32 logits and their gradient in 16 bits."""


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("kind", ["stats", "policy", "policy with a clamp", "sft", "distillation"])
def test_gradients_that_wait_for_those_of_later_chunks_are_the_same(kind, dtype, planned, monkeypatch):
    d = problem(dtype, (3, 67))
    # The other half of the budget is the teacher's.
    budget, found, logits = BUDGET * (2 if kind == "distillation" else 1), [], []
    to = OnHost.logits
    monkeypatch.setattr(OnHost, "logits", lambda self, hidden, out: logits.append(len(out)) or to(self, hidden, out))
    for options in ({"logits_budget": budget}, {"chunk_tokens": 32}, {"logits_budget": 2**30}):
        operands = own(d)[:2]
        OnHost.rows.clear(), logits.clear()
        loss = loss_of(kind, d, *operands, **options)
        found.append((loss.detach(), *gradients(loss, operands)))
        if options == {"logits_budget": budget}:
            # Clipped rows have no gradient, and the next ones take their place.
            assert 48 < max(OnHost.rows) <= 64 and max(logits) <= 32
            assert all(rows > 48 for rows in OnHost.rows[:-1]), OnHost.rows
        else:
            assert max(OnHost.rows) <= (32 if "chunk_tokens" in options else 201)
    for other in found[1:]:
        for got, expected in zip(found[0], other, strict=True):
            # Sums of fp32 in another order, of which some round to the next number of 16 bits.
            assert problems.frobenius(got, expected.double()) <= (2e-6 if got.dtype == torch.float32 else 2e-4)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_gradients_that_wait_leave_out_what_is_frozen(frozen, planned):
    d = problem(torch.bfloat16, (3, 67))
    full = own(d)[:2]
    want = dict(zip(("hidden", "weight"), gradients(policy_of(d, *full), full), strict=True))
    h, w = (x.detach().requires_grad_(name != frozen) for name, x in zip(("hidden", "weight"), full, strict=True))
    policy_of(d, h, w).backward()
    for name, x in (("hidden", h), ("weight", w)):
        assert x.grad is None if name == frozen else same_bits(x.grad, want[name])


def policy_of(d, h, w, **options):
    y, mask = d["targets"], d["mask"]
    return rlk.linear_policy_loss(h, w, y, d["old"], d["advantages"], mask, logits_budget=BUDGET, **options)


def test_what_needs_its_logits_on_the_way_back_never_waits(planned):
    d = problem(torch.bfloat16, (3, 67))
    for options in ({"softcap": 5.0}, {"logit_scale": 0.7}, {"logits_dtype": torch.bfloat16}):
        OnHost.rows.clear()
        h, w, _ = own(d)
        policy_of(d, h, w, **options).backward()
        assert OnHost.rows and max(OnHost.rows) <= 48


@pytest.mark.parametrize(
    "options", [{"softcap": 5.0}, {"logit_scale": 0.7}, {"bias": True}, {"logits_dtype": torch.bfloat16}], ids=str
)
def test_what_needs_the_gradient_unrounded_gets_it(options, on_host):
    d, options = problem(torch.bfloat16, (4, 7)), dict(options)
    own_bias = options.pop("bias", False)
    for k in range(5):
        h, w, b = own(d)
        loss = list(losses(d, h, w, b if own_bias else None, **options))[k]
        loss.backward()
    assert set(OnHost.seen) == {options.get("logits_dtype", torch.float32)}


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_a_frozen_bias_keeps_nothing_unrounded(dtype, on_host):
    d = problem(dtype, (4, 7))
    h, w, b = own(d)
    list(losses(d, h, w, b.detach()))[1].backward()
    assert set(OnHost.seen) == {dtype}


@pytest.mark.fault(44)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("level", ["token", "sequence", "sequence_sum"])
@pytest.mark.parametrize("tokens", [None, 2.0**20, 2.0**-9])
def test_gradients_made_before_the_loss_scale_are_those_of_float64(tokens, level, dtype, on_host):
    """Over a million tokens in all: without a scale of its own the gradient of a logit would be 0 in fp16; with weights
    of 512, infinite.
    """
    d = problem(dtype, (4, 48), hidden=64, vocab=515)
    normal = {} if level == "sequence_sum" or tokens is None else {"normalizers": {"batch_num_tokens": tokens}}
    # A gradient scaler's, by a power of 2, so that the result is in reach of fp16.
    upstream = 1.0 if tokens is None else tokens / 2.0**8
    upstream = upstream if level != "sequence_sum" else 2.0**-6  # whose gradient is in the ten thousands
    wide = problems.leaves(d, bias=False)
    mode = "seq-mean" if level == "sequence_sum" else "token-mean"
    truth = problems.policy(d, wide, ratio_level=level, aggregation_=mode, **normal)
    want = gradients(truth, wide, upstream)
    for chunk in ({}, {"chunk_tokens": 64}, {"chunk_tokens": 16}):
        operands = own(d, bias=False)
        loss = rlk.linear_policy_loss(
            *operands[:2],
            d["targets"],
            d["old"],
            d["advantages"],
            d["mask"],
            clip_low=0.2,
            clip_high=0.28,
            ratio_level=level,
            **normal,
            **chunk,
        )
        torch.testing.assert_close(loss.double(), truth, rtol=1e-4, atol=0)
        # One rounding of the operand, one of the result.
        for x, t in zip(gradients(loss, operands, upstream), want, strict=True):
            assert t.to(dtype).isfinite().all() and x.any()
            assert problems.frobenius(x, t) <= 2.0 * problems.frobenius(t.to(dtype), t), chunk


@pytest.mark.fault(44)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_gradients_of_pairs_are_those_of_float64(dtype, on_host):
    d = problem(dtype, (16, 12), hidden=64, vocab=515)
    wide = problems.leaves(d, bias=False)
    sums, n = problems.answers(d, wide)
    nothing = torch.zeros(8, dtype=torch.float64)
    want = gradients(
        problems.pairs("sigmoid", sums[:8], sums[8:], nothing, nothing, n[:8], n[8:], beta=0.01, smoothing=0.0).mean(),
        wide,
        2.0**8,
    )
    operands = own(d, bias=False)
    loss = rlk.linear_dpo_loss(*operands[:2], d["targets"], d["mask"], reference_free=True, beta=0.01)
    for x, t in zip(gradients(loss, operands, 2.0**8), want, strict=True):
        assert problems.frobenius(x, t) <= 2.0 * problems.frobenius(t.to(dtype), t)
