"""Distillation from two heads: the loss of the logits, its gradients, without the logits."""

import math

import pytest
import torch
from peak_memory import peak_bytes

import rlkernels as rlk

B, L, V, H, G = 2, 9, 23, 5, 4
KINDS = {"forward_kl": {}, "reverse_kl": {}, "jsd": {"beta": 0.3}, "cross_entropy": {}}
MASK = torch.rand(B, L, generator=torch.Generator().manual_seed(1)) < 0.7


def problem(dtype=torch.float64, columns=V):
    draw = torch.Generator().manual_seed(0)
    shapes = {"hidden": (B, L, H), "weight": (V, H), "bias": (V,), "theirs": (B, L, G), "head": (columns, G)}
    d = {name: torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}
    for name in ("hidden", "weight", "bias"):
        d[name].requires_grad_()
    d["teacher_bias"] = torch.randn(columns, generator=draw, dtype=torch.float64).to(dtype)
    return d


def of_logits(d, wide, **options):
    """``divergence_loss`` of logits that are formed in float64."""
    z = 3.0 * torch.tanh(0.8 * (wide["hidden"] @ wide["weight"].T + wide["bias"]) / 3.0)
    q = 2.0 * torch.tanh(1.2 * (d["theirs"].double() @ d["head"].double().T + d["teacher_bias"].double()) / 2.0)
    with rlk.use_backend("eager"):
        return rlk.divergence_loss(z, q, MASK, temperature=0.7, **options)


def call(d, hidden=None, theirs=None, mask=MASK, **options):
    return rlk.linear_distillation_loss(
        d["hidden"] if hidden is None else hidden,
        d["weight"],
        d["theirs"] if theirs is None else theirs,
        d["head"],
        mask,
        bias=d["bias"],
        softcap=3.0,
        logit_scale=0.8,
        teacher_bias=d["teacher_bias"],
        teacher_softcap=2.0,
        teacher_logit_scale=1.2,
        temperature=0.7,
        **options,
    )


LEAVES = ("hidden", "weight", "bias")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_the_logits(kind, dtype, backend):
    d = problem(dtype, V - 3 if kind == "jsd" else V + 4)
    wide = {name: d[name].detach().double().requires_grad_() for name in LEAVES}
    want = of_logits(d, wide, kind=kind, aggregation="seq-mean-token-mean", **KINDS[kind])
    expected = torch.autograd.grad(want, list(wide.values()))
    unit = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
    for chunk in (16, 1000):
        loss, metrics = call(
            d, kind=kind, aggregation="seq-mean-token-mean", chunk_tokens=chunk, return_metrics=True, **KINDS[kind]
        )
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(loss.double(), want, rtol=min(unit, 1e-5), atol=1e-6 if unit > 1e-9 else 1e-11)
        found = torch.autograd.grad(2.0 * loss, [d[name] for name in LEAVES], retain_graph=True)
        again = torch.autograd.grad(loss, [d[name] for name in LEAVES])
        for name, g, h, w in zip(LEAVES, found, again, expected, strict=True):
            assert g.dtype == dtype
            torch.testing.assert_close(g.double(), 2.0 * w, rtol=unit, atol=unit * w.abs().max().item(), msg=name)
            torch.testing.assert_close(h.double(), w, rtol=unit, atol=unit * w.abs().max().item(), msg=name)
    mean = of_logits(d, wide, kind=kind, **KINDS[kind]).detach()
    torch.testing.assert_close(metrics["divergence"].double(), mean, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_of_top_log_probabilities_needs_no_second_head(kind, backend):
    d, V_ = problem(), V - 2
    logprobs, ids = (d["theirs"] @ d["head"][:V_].T).log_softmax(-1).topk(5)
    logits = d["hidden"] @ d["weight"][:V_].T
    want = rlk.divergence_loss(logits, None, MASK, teacher_topk=(ids, logprobs), kind=kind, **KINDS[kind])
    expected = torch.autograd.grad(want, [d["hidden"], d["weight"]])
    loss = rlk.linear_distillation_loss(
        d["hidden"],
        d["weight"],
        mask=MASK,
        teacher_topk=(torch.where(MASK[..., None], ids, -7), torch.where(MASK[..., None], logprobs, math.nan)),
        kind=kind,
        valid_vocab=V_,
        chunk_tokens=16,
        **KINDS[kind],
    )
    torch.testing.assert_close(loss, want)
    for g, w in zip(torch.autograd.grad(loss, [d["hidden"], d["weight"]]), expected, strict=True):
        torch.testing.assert_close(g, w)


def test_dead_tokens_enter_no_matmul_whatever_they_hold(backend):
    d = problem(torch.float32)
    want = call(d)
    expected = torch.autograd.grad(want, [d[name] for name in LEAVES])
    hidden = torch.where(MASK[..., None], d["hidden"].detach(), math.nan).requires_grad_()
    theirs = torch.where(MASK[..., None], d["theirs"], math.inf)
    for bound in (None, int(MASK.sum()) + 3):
        loss = call(d, hidden, theirs, max_live_tokens=bound)
        found = torch.autograd.grad(loss, [hidden, d["weight"], d["bias"]])
        torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
        for g, w in zip(found, expected, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-7)
        assert (found[0][~MASK] == 0).all()


def test_nothing_alive_is_zero_with_zero_gradients_and_a_packed_batch_is_the_padded_one(backend):
    d = problem(torch.float32)
    loss = call(d, mask=torch.zeros(B, L))
    assert loss == 0 and all((g == 0).all() for g in torch.autograd.grad(loss, [d[name] for name in LEAVES]))
    want = call(d, mask=None, aggregation="seq-mean-token-sum")
    packed = call(
        d,
        d["hidden"].view(B * L, H),
        d["theirs"].view(B * L, G),
        None,
        aggregation="seq-mean-token-sum",
        cu_seqlens=[0, L, 2 * L],
    )
    torch.testing.assert_close(packed, want)


def test_a_small_budget_changes_the_chunks_and_not_the_loss(backend):
    d = problem(torch.float32)
    torch.testing.assert_close(call(d, logits_budget=1), call(d))


def test_the_logits_of_a_chunk_are_all_that_exists_of_them():
    draw = torch.Generator().manual_seed(2)
    hidden, theirs = (torch.randn(512, n, generator=draw) for n in (8, 4))
    weight, head = (torch.randn(4096, n, generator=draw).requires_grad_(n == 8) for n in (8, 4))
    leaf = hidden.requires_grad_()

    def run(chunk):
        loss = rlk.linear_distillation_loss(leaf, weight, theirs, head, kind="jsd", chunk_tokens=chunk)
        return torch.autograd.grad(loss, [leaf, weight])

    with rlk.use_backend("eager"):
        one_model = 512 * 4096 * 4
        assert peak_bytes(lambda: run(16)) < 0.6 * one_model
        assert peak_bytes(lambda: run(512)) > 2 * one_model


BAD = {
    "no teacher": ({}, ValueError, "got neither teacher_hidden nor teacher_topk"),
    "no head": ({"teacher_hidden": torch.ones(B, L, G)}, ValueError, "teacher_hidden came without teacher_weight"),
    "other tokens": (
        {"teacher_hidden": torch.ones(B, L + 1, G), "teacher_weight": torch.ones(V, G)},
        ValueError,
        "teacher_hidden has shape",
    ),
    "other features": (
        {"teacher_hidden": torch.ones(B, L, G), "teacher_weight": torch.ones(V, G + 1)},
        ValueError,
        "teacher_hidden has 4 features, teacher_weight has 5",
    ),
    "another bias": (
        {"teacher_hidden": torch.ones(B, L, G), "teacher_weight": torch.ones(V, G), "teacher_bias": torch.ones(V + 1)},
        ValueError,
        "teacher_bias has shape",
    ),
    "a trained teacher": (
        {"teacher_hidden": torch.ones(B, L, G), "teacher_weight": torch.ones(V, G, requires_grad=True)},
        ValueError,
        "teacher_weight gets no gradient",
    ),
    "a cap without a head": (
        {"teacher_topk": (torch.zeros(B, L, 1).long(), torch.zeros(B, L, 1)), "teacher_softcap": 2.0},
        ValueError,
        "teacher_softcap belongs to teacher_hidden",
    ),
    "float64 beside float32": (
        {"teacher_hidden": torch.ones(B, L, G).double(), "teacher_weight": torch.ones(V, G).double()},
        TypeError,
        "hidden has dtype torch.float32, teacher_hidden torch.float64",
    ),
    "temperature": (
        {"teacher_hidden": torch.ones(B, L, G), "teacher_weight": torch.ones(V, G), "temperature": 0.0},
        ValueError,
        "temperature must be",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_argument_raises_and_says_which(name):
    arguments, error, text = BAD[name]
    with pytest.raises(error, match=f"^linear_distillation_loss.*{text}"):
        rlk.linear_distillation_loss(torch.ones(B, L, H), torch.ones(V, H), **arguments)
