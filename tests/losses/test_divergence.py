"""Divergences from a teacher: the definitions in float64, dead tokens, layouts, teachers of top log-probabilities."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peak_memory import peak_bytes
from present_backends import PRESENT
from torch.library import opcheck

import rlkernels as rlk
from rlkernels import ops
from rlkernels.backends import eager_divergence

B, L, V = 2, 3, 11
KINDS = {"forward_kl": None, "reverse_kl": None, "jsd": 0.3, "cross_entropy": None}
UNITS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}
NAN = float("nan")


def written_out(student, teacher, kind, beta=None):
    """The definitions over log-probabilities of outcomes; autograd gives the gradient."""
    p, q = student.exp(), teacher.exp()
    if kind == "forward_kl":
        return (q * (teacher - student)).sum(-1)
    if kind == "reverse_kl":
        return (p * (student - teacher)).sum(-1)
    if kind == "cross_entropy":
        return -(q * student).sum(-1)
    mixture = ((1 - beta) * p + beta * q).log()
    return beta * (q * (teacher - mixture)).sum(-1) + (1 - beta) * (p * (student - mixture)).sum(-1)


def problem(dtype=torch.float64, seed=0, vocab=V):
    draw = torch.Generator().manual_seed(seed)
    x, y = (2 * torch.randn(B, L, vocab, generator=draw, dtype=torch.float64) for _ in range(2))
    return x.to(dtype).requires_grad_(), y.to(dtype)


def options(kind):
    return {"kind": kind} if KINDS[kind] is None else {"kind": kind, "beta": KINDS[kind]}


@pytest.mark.parametrize("dtype", UNITS)
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient_are_those_of_the_definition(kind, dtype, backend):
    x, y = problem(dtype)
    temperature = torch.tensor([[0.7, 1.0, 2.0], [1.5, 1.0, 0.5]], dtype=torch.float64)
    wide = x.detach().double().requires_grad_()
    want = written_out(
        (wide / temperature[..., None]).log_softmax(-1),
        (y.double() / temperature[..., None]).log_softmax(-1),
        kind,
        KINDS[kind],
    )
    upstream = torch.linspace(-1, 1, B * L, dtype=torch.float64).view(B, L)
    got = rlk.token_divergences(x, y, temperature=temperature, **options(kind))
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (gradient,) = torch.autograd.grad(got, x, upstream.to(got.dtype))
    (expected,) = torch.autograd.grad(want, wide, upstream)
    unit = UNITS[dtype]
    torch.testing.assert_close(got.double(), want, rtol=unit, atol=unit)
    rounding = 0.0 if dtype == torch.float64 else torch.finfo(dtype).eps
    torch.testing.assert_close(gradient.double(), expected, rtol=max(unit, rounding), atol=2 * unit)
    loss = rlk.divergence_loss(x, y, temperature=temperature, weights=upstream.to(got.dtype), **options(kind))
    (of_loss,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(loss.double(), (want * upstream).sum(), rtol=8 * unit, atol=8 * unit)
    torch.testing.assert_close(of_loss, gradient, rtol=max(unit, rounding), atol=unit)


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_backward_and_an_upstream_gradient_scale_the_same_gradient(kind, backend):
    x, y = problem()
    loss = rlk.divergence_loss(x, y, **options(kind))
    first, second, third = (
        torch.autograd.grad(loss, x, torch.tensor(u, dtype=torch.float64), retain_graph=True)[0]
        for u in (1.0, 1.0, -3.0)
    )
    assert torch.equal(first, second)
    torch.testing.assert_close(third, -3.0 * first, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_in_float64(kind, backend):
    x, y = problem(vocab=5)
    ids = y.topk(2).indices
    topk = ids, y.log_softmax(-1).gather(-1, ids)
    assert torch.autograd.gradcheck(lambda x: rlk.token_divergences(x, y, **options(kind)), x)
    assert torch.autograd.gradcheck(lambda x: rlk.token_divergences(x, teacher_topk=topk, **options(kind)), x)


@pytest.mark.parametrize("kind", KINDS)
def test_dead_tokens_touch_nothing_whatever_they_hold(kind, backend):
    x, y = problem(torch.float32)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    clean = rlk.divergence_loss(x, y, mask, **options(kind))
    (expected,) = torch.autograd.grad(clean, x)
    for garbage in (NAN, math.inf, -math.inf):
        dirty = torch.where(mask[..., None], x.detach(), garbage).requires_grad_()
        other = torch.where(mask[..., None], y, garbage)
        loss, metrics = rlk.divergence_loss(dirty, other, mask, return_metrics=True, **options(kind))
        (gradient,) = torch.autograd.grad(loss, dirty)
        assert torch.equal(loss, clean) and torch.equal(gradient, expected)
        torch.testing.assert_close(metrics["divergence"], clean.detach())
        values = rlk.token_divergences(dirty, other, mask, **options(kind))
        assert (values[~mask] == 0).all() and values.isfinite().all()
    ids = torch.where(mask[..., None], y.topk(3).indices, 10**6)
    logprobs = torch.where(mask[..., None], y.log_softmax(-1).topk(3).values, NAN)
    loss = rlk.divergence_loss(dirty, teacher_topk=(ids, logprobs), mask=mask, **options(kind))
    (gradient,) = torch.autograd.grad(loss, dirty)
    assert loss.isfinite() and gradient.isfinite().all() and (gradient[~mask] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_alive_or_nothing_at_all_is_zero_with_a_zero_gradient(kind, backend):
    x, y = problem(torch.float32)
    for leaf, other, mask in (
        (x, y, torch.zeros(B, L)),
        (torch.zeros(0, L, V, requires_grad=True), torch.zeros(0, L, V), None),
        (torch.zeros(B, 0, V, requires_grad=True), torch.zeros(B, 0, V), None),
    ):
        loss = rlk.divergence_loss(leaf, other, mask, **options(kind))
        (gradient,) = torch.autograd.grad(loss, leaf)
        known = torch.zeros(*leaf.shape[:2], 1).long(), torch.full((*leaf.shape[:2], 1), -1.0)
        (of_topk,) = torch.autograd.grad(rlk.divergence_loss(leaf, None, mask, teacher_topk=known), leaf)
        assert torch.equal(of_topk, gradient)
        assert loss == 0 and gradient.shape == leaf.shape and (gradient == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_batch_is_the_padded_one_and_strides_change_no_number(kind, backend):
    x, y = problem(torch.float32)
    lengths = torch.tensor([3, 2])
    mask = torch.arange(L) < lengths[:, None]
    padded = rlk.divergence_loss(x, y, mask, aggregation="seq-mean-token-mean", **options(kind))
    (want,) = torch.autograd.grad(padded, x)
    flat = x.detach()[mask].requires_grad_()
    packed = rlk.divergence_loss(
        flat, y[mask], cu_seqlens=[0, 3, 5], aggregation="seq-mean-token-mean", **options(kind)
    )
    (got,) = torch.autograd.grad(packed, flat)
    torch.testing.assert_close(packed, padded)
    torch.testing.assert_close(got, want[mask])
    whole = torch.randn(B, L + 1, 2 * V)
    whole[:, :-1, ::2] = x.detach()
    for view, other in ((whole[:, :-1, ::2], y), (x.detach().transpose(0, 1).contiguous().transpose(0, 1), y)):
        leaf = view.detach().requires_grad_()
        again = rlk.divergence_loss(leaf, other, mask, aggregation="seq-mean-token-mean", **options(kind))
        torch.testing.assert_close(again, padded)
        torch.testing.assert_close(torch.autograd.grad(again, leaf)[0], want)


def test_more_rows_than_a_chunk_and_a_shifted_view_give_the_same_rows(monkeypatch):
    draw = torch.Generator().manual_seed(3)
    x, y = (torch.randn(3, 6, V, generator=draw) for _ in range(2))
    with rlk.use_backend("eager"):
        want = rlk.token_divergences(x, y, kind="jsd")[:, :-1]
        monkeypatch.setattr(eager_divergence, "CHUNK_BYTES", 4 * V * 2)  # two rows
        leaf = x.clone().requires_grad_()
        got = rlk.token_divergences(leaf[:, :-1], y[:, :-1], kind="jsd")
        (gradient,) = torch.autograd.grad(got.sum(), leaf)
    torch.testing.assert_close(got.detach(), want)
    assert (gradient[:, -1] == 0).all() and (gradient[:, :-1] != 0).any(-1).all()


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_no_second_tensor_of_the_size_of_the_logits_exists(kind, monkeypatch):
    x, y = (torch.randn(64, 4096, generator=torch.Generator().manual_seed(k)).bfloat16() for k in range(2))
    leaf, size = x.requires_grad_(), 2 * 64 * 4096
    monkeypatch.setattr(eager_divergence, "CHUNK_BYTES", 4 * 4096)  # one row
    for backend in PRESENT:
        with rlk.use_backend(backend):
            loss = peak_bytes(lambda: torch.autograd.grad(rlk.divergence_loss(leaf, y, kind=kind), leaf))
            assert size <= loss < 1.5 * size
            with torch.no_grad():
                assert peak_bytes(lambda: rlk.token_divergences(leaf, y, kind=kind)) < 0.5 * size


@pytest.mark.parametrize("kind", KINDS)
def test_columns_outside_of_the_support_or_of_the_smaller_vocabulary_do_not_count(kind, backend):
    x, y = problem()
    keep = torch.arange(V) % 3 > 0
    got = rlk.token_divergences(x, y, vocab_mask=keep, **options(kind))
    (gradient,) = torch.autograd.grad(got.sum(), x)
    inner = x.detach()[..., keep].requires_grad_()
    want = rlk.token_divergences(inner, y[..., keep], **options(kind))
    (expected,) = torch.autograd.grad(want.sum(), inner)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradient[..., keep], expected)
    assert (gradient[..., ~keep] == 0).all()
    padded = torch.cat([x.detach(), torch.full((B, L, 5), NAN, dtype=x.dtype)], -1).requires_grad_()
    longer = rlk.token_divergences(padded, y, **options(kind))
    torch.testing.assert_close(longer, rlk.token_divergences(x, y, **options(kind)))
    (gradient,) = torch.autograd.grad(longer.sum(), padded)
    assert (gradient[..., V:] == 0).all() and gradient.isfinite().all()
    teacher = torch.cat([y, torch.full((B, L, 5), NAN, dtype=y.dtype)], -1)
    torch.testing.assert_close(rlk.token_divergences(x, teacher, **options(kind)), longer)


@pytest.mark.parametrize("per_row", (False, True), ids=("one", "per row"))
def test_the_mask_of_a_larger_vocabulary_than_the_teacher_s_is_the_student_s(per_row):
    x, y = problem()
    keep = torch.arange(V) % 3 != 0
    want = rlk.token_divergences(x[..., :9], y[..., :9], vocab_mask=keep[:9])
    got = rlk.token_divergences(x, y[..., :9], vocab_mask=keep.expand(B, L, V) if per_row else keep)
    assert torch.equal(got, want)


@pytest.mark.parametrize("kind", KINDS)
def test_a_column_of_minus_infinity_counts_for_nothing(kind, backend):
    x, y = problem()
    short = rlk.token_divergences(x[..., :-2], y[..., :-2], **options(kind))
    leaf = torch.cat([x.detach()[..., :-2], torch.full((B, L, 2), -math.inf, dtype=x.dtype)], -1).requires_grad_()
    other = torch.cat([y[..., :-2], torch.full((B, L, 2), -math.inf, dtype=x.dtype)], -1)
    value = rlk.token_divergences(leaf, other, **options(kind))
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    torch.testing.assert_close(value, short)
    assert gradient.isfinite().all() and (gradient[..., -2:] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_of_top_log_probabilities_has_one_outcome_for_all_other_tokens(kind, backend):
    x, y = problem()
    temperature, K = 1.3, 4
    teacher, ids = (y / temperature).log_softmax(-1).topk(K)
    wide = x.detach().requires_grad_()

    def with_tail(z):
        top = (z / temperature).log_softmax(-1).gather(-1, ids)
        rest = (z / temperature).log_softmax(-1).scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
        return torch.cat([top, rest], -1)

    want = written_out(with_tail(wide), with_tail(y), kind, KINDS[kind])
    upstream = torch.linspace(-1, 1, B * L, dtype=torch.float64).view(B, L)
    (expected,) = torch.autograd.grad(want, wide, upstream)
    # Two entries more that stand for nothing, one of which has the id of another entry.
    unused = torch.cat([ids, ids[..., :1], torch.zeros_like(ids[..., :1])], -1)
    padded = torch.cat([teacher, torch.full((B, L, 2), -math.inf, dtype=teacher.dtype)], -1)
    for pair in ((ids, teacher), (unused.int(), padded), (ids.flip(-1), teacher.flip(-1))):
        got = rlk.token_divergences(x, teacher_topk=pair, temperature=temperature, **options(kind))
        (gradient,) = torch.autograd.grad(got, x, upstream)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(gradient, expected)
    loss = rlk.divergence_loss(x, None, teacher_topk=(ids, teacher), temperature=temperature, **options(kind))
    (gradient,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(loss, want.mean())
    torch.testing.assert_close(gradient, torch.autograd.grad(want_mean(wide, with_tail, y, kind), wide)[0])


def want_mean(wide, with_tail, y, kind):
    return written_out(with_tail(wide), with_tail(y), kind, KINDS[kind]).mean()


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_whose_every_token_is_known_is_the_teacher_of_logits(kind, backend):
    x, y = problem()
    ids = torch.arange(V).expand(B, L, V)
    got = rlk.token_divergences(x, teacher_topk=(ids, y.log_softmax(-1)), **options(kind))
    want = rlk.token_divergences(x, y, **options(kind))
    (gradient,), (expected,) = (torch.autograd.grad(v.sum(), x) for v in (got, want))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(0, 10**6), st.floats(0.05, 0.95))
def test_no_divergence_is_negative_and_that_of_a_model_from_itself_is_zero(seed, beta):
    x, y = problem(seed=seed)
    for kind in ("forward_kl", "reverse_kl", "jsd"):
        more = {"beta": beta} if kind == "jsd" else {}
        assert (rlk.token_divergences(x, y, kind=kind, **more) >= 0).all()
        itself = rlk.token_divergences(x, x.detach(), kind=kind, **more)
        (gradient,) = torch.autograd.grad(itself.sum(), x)
        assert itself.abs().max() < 1e-14 and gradient.abs().max() < 1e-14
    swapped = rlk.token_divergences(y, x.detach(), kind="jsd", beta=1 - beta)
    torch.testing.assert_close(rlk.token_divergences(x, y, kind="jsd", beta=beta), swapped)
    torch.testing.assert_close(
        rlk.token_divergences(x, y, kind="reverse_kl"), rlk.token_divergences(y, x.detach(), kind="forward_kl")
    )
    shifted = rlk.token_divergences(x + 7.0, y - 3.0, kind="jsd", beta=beta)
    torch.testing.assert_close(shifted, rlk.token_divergences(x, y, kind="jsd", beta=beta))


def test_the_numbering_of_trl_has_the_two_kl_at_its_ends():
    x, y = problem()
    for beta, kind in ((0.0, "forward_kl"), (1, "reverse_kl")):
        got, want = rlk.token_divergences(x, y, kind="jsd", beta=beta), rlk.token_divergences(x, y, kind=kind)
        assert torch.equal(got, want)


def test_the_sum_of_micro_batches_is_the_batch(backend):
    x, y = problem()
    whole = rlk.divergence_loss(x, y)
    (want,) = torch.autograd.grad(whole, x)
    parts = [rlk.divergence_loss(x[i : i + 1], y[i : i + 1], normalizers={"batch_num_tokens": B * L}) for i in range(B)]
    (got,) = torch.autograd.grad(sum(parts), x)
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(got, want)


TEACHER, IDS, TOP = torch.zeros(B, L, V), torch.zeros(B, L, 1, dtype=torch.long), torch.full((B, L, 1), -1.0)
BAD = {
    "no teacher": ({}, ValueError, "got neither teacher_logits nor teacher_topk"),
    "two teachers": ({"teacher_logits": TEACHER, "teacher_topk": (IDS, TOP)}, ValueError, "got both"),
    "kind": ({"teacher_logits": TEACHER, "kind": "kl"}, ValueError, "kind must be one of forward_kl, "),
    "beta": ({"teacher_logits": TEACHER, "kind": "jsd", "beta": 1.5}, ValueError, r"beta must be in \[0, 1\], got 1.5"),
    "beta of a kl": ({"teacher_logits": TEACHER, "beta": 0.1}, ValueError, "beta=0.1 belongs to kind='jsd'"),
    "shape": ({"teacher_logits": TEACHER[:1]}, ValueError, "teacher_logits has shape"),
    "dtype": ({"teacher_logits": TEACHER.double()}, TypeError, "teacher_logits has dtype torch.float64, logits"),
    "gradient": ({"teacher_logits": TEACHER.clone().requires_grad_()}, ValueError, "teacher_logits gets no gradient"),
    "mask": ({"teacher_logits": TEACHER, "mask": torch.ones(B)}, ValueError, "mask has shape"),
    "support": ({"teacher_topk": (IDS, TOP), "vocab_mask": torch.ones(V) > 0}, ValueError, "exclude each other"),
    "pair": ({"teacher_topk": IDS}, TypeError, r"teacher_topk must be \(ids, logprobs\)"),
    "ids": ({"teacher_topk": (IDS.float(), TOP)}, TypeError, "ids of teacher_topk must be int32 or int64"),
    "shape of ids": ({"teacher_topk": (IDS[..., 0], TOP)}, ValueError, "ids of teacher_topk has shape"),
    "shape of logprobs": ({"teacher_topk": (IDS, TOP[:1])}, ValueError, "logprobs of teacher_topk has shape"),
    "id outside": ({"teacher_topk": (IDS + V, TOP)}, IndexError, "id 11 of teacher_topk at row 0 is outside"),
    "one id twice": (
        {"teacher_topk": (IDS.expand(B, L, 2), TOP.expand(B, L, 2))},
        ValueError,
        "hold one id twice at row 0",
    ),
    "nan": ({"teacher_topk": (IDS, TOP * NAN)}, ValueError, "logprobs of teacher_topk hold nan"),
    "probabilities": ({"teacher_topk": (IDS, -TOP)}, ValueError, "logprobs of teacher_topk hold 1.0"),
}


@pytest.mark.parametrize("function,name", list(itertools.product(("token_divergences", "divergence_loss"), BAD)))
def test_a_bad_argument_raises_and_says_which(function, name):
    arguments, error, text = BAD[name]
    with pytest.raises(error, match=f"^{function}: .*{text}"):
        getattr(rlk, function)(torch.zeros(B, L, V), **arguments)


@pytest.mark.parametrize("kind", ["jsd"])
def test_the_op_keeps_the_contract_of_torch(kind, backend):
    """Schema, fake, autograd registration, and the dispatcher of AOTAutograd."""
    x, y = (z.detach().flatten(0, 1).float() for z in problem())
    targets, weight = torch.tensor([0, 0, -100, 0, 0, 0]), torch.tensor([1.0, 0.5, 0.0, 0.0, 2.0, 1.0])
    rows = targets, ops.number(0.7), -100, torch.arange(V) > 0, y
    beta = ops.number(0.3)
    opcheck(ops.divergence_op.op, (x.requires_grad_(), *rows, None, None, kind, beta, weight, False, backend))
    opcheck(ops.divergence_op.op, (x, *rows, None, None, kind, beta, None, False, backend))
    ids, known = y.topk(2).indices, torch.full((6, 2), -2.0)
    opcheck(ops.divergence_op.op, (x, *rows[:3], None, None, ids, known, kind, beta, weight, False, backend))
    opcheck(ops.divergence_backward.op, (x.detach(), *rows, None, None, kind, beta, weight, backend))
