"""``reduction="none"`` of every loss: its elements are the formula's, and their weighted sum is the summed loss."""

import pytest
import torch
from not_summed import (
    ADV,
    CASES,
    FACTOR,
    HIDDEN,
    IDS,
    LOGITS,
    LOGP,
    MASK,
    OF_ROW,
    OLD,
    REF_HIDDEN,
    REF_WEIGHT,
    RETURNS,
    RHO,
    TARGETS,
    TEACHER,
    TOLERANCES,
    TOOLS,
    VALUES,
    WEIGHT,
    B,
    L,
    called,
    kl_of,
    policy,
    truth_of,
)

import rlkernels as rlk


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", CASES)
def test_a_loss_that_is_not_summed_has_the_numbers_of_its_formula(name, dtype):
    case = CASES[name]
    each, leaves = called(case, dtype, reduction="none")
    true, wide = truth_of(case)
    assert each.shape == case.shape and each.dtype == dtype
    torch.testing.assert_close(each.double(), true, **TOLERANCES[dtype])
    upstream = torch.randn(case.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = torch.autograd.grad(each, leaves, upstream.to(dtype))
    want = torch.autograd.grad(true, wide, upstream)
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.double(), y, **TOLERANCES[dtype])


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].sums])
def test_the_weighted_sum_of_the_elements_is_the_loss(name):
    case = CASES[name]
    each, leaves = called(case, torch.float64, reduction="none")
    for options, weights in case.sums:
        summed, others = called(case, torch.float64, **options)
        total = (weights.double() * each).sum()
        torch.testing.assert_close(summed, total, rtol=1e-9, atol=1e-12)
        pairs = zip(
            torch.autograd.grad(summed, others), torch.autograd.grad(total, leaves, retain_graph=True), strict=True
        )
        for x, y in pairs:
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


REFUSED = {
    "takes weights": (lambda **o: rlk.value_loss(VALUES, None, RETURNS, MASK, weights=FACTOR, **o), "weighs no token"),
    "divides by weights": (
        lambda **o: rlk.logprobs_sft_loss(LOGP, MASK, sample_weights=OF_ROW, normalize_by_weight=True, **o),
        "has no mean; leave out normalize_by_weight",
    ),
    "takes an aggregation": (
        lambda **o: rlk.divergence_loss(LOGITS, TEACHER, MASK, aggregation="token-sum", **o),
        "weighs no token",
    ),
    "takes normalisers": (
        lambda **o: rlk.span_reward_loss(RHO[0].view(2, 3), IDS[:2, :3], 0, normalizers={"scale": 2.0}, **o),
        "normalizers divide a mean",
    ),
    "weighs lists": (lambda **o: rlk.rank_list_loss(RHO[0], [3, 1, 2], aggregation="list-mean", **o), "weighs no list"),
    "sorts the batch": (
        lambda **o: rlk.dpo_loss(*RHO, *RHO, loss_type="aot", **o),
        "a loss_type that sorts the batch has no loss per pair",
    ),
    "has a KL with weights": (
        lambda **o: policy(lambda x: x, LOGP, kl=rlk.KLTerm(weights=FACTOR), **o),
        "leave out kl.weights, kl.aggregation and kl.normalizers",
    ),
    "has a KL of tokens that the sequences lack": (
        lambda **o: policy(lambda x: x, LOGP, kl=rlk.KLTerm(mask=TOOLS), ratio_level="sequence_sum", **o),
        "averages the KL over the tokens of the objective; leave out kl.mask",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_loss_that_is_not_summed_refuses_what_it_cannot_honour(what):
    call, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        call(reduction="none")


@pytest.mark.parametrize("name", ["value_loss", "logprobs_sft_loss", "policy_loss", "divergence_loss", "sft_loss"])
def test_a_packed_row_gives_a_row_and_another_name_is_refused(name):
    offsets = torch.tensor([0, L, 2 * L, 3 * L, 4 * L])
    x, *others = {
        "value_loss": (VALUES, None, RETURNS),
        "policy_loss": (LOGP, OLD, ADV),
        "divergence_loss": (LOGITS, TEACHER),
        "sft_loss": (LOGITS, TARGETS),
    }.get(name, (LOGP,))

    def call(view, **options):
        at = [y if y is None else view(y) for y in (x, *others, MASK)]
        return getattr(rlk, name)(*at, **options)

    padded = call(lambda y: y, reduction="none")
    for view in (lambda y: y.flatten(0, 1)[None], lambda y: y.flatten(0, 1)):
        packed = call(view, reduction="none", cu_seqlens=offsets)
        assert packed.shape == view(MASK).shape
        torch.testing.assert_close(packed, view(padded), rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match=f"^{name}: .*reduction"):
        call(lambda y: y, reduction="mean")


@pytest.mark.parametrize("objective", [{"ratio_level": "sequence_sum"}, {"objective": "gmpo"}], ids=["sum", "gmpo"])
def test_one_loss_per_sequence_of_a_packed_row_has_no_row(objective):
    offsets, columns = torch.tensor([0, L, 2 * L, 3 * L, 4 * L]), [x.view(1, -1) for x in (LOGP, OLD, ADV, MASK)]
    packed = rlk.policy_loss(*columns, cu_seqlens=offsets, reduction="none", **objective)
    padded = rlk.policy_loss(LOGP, OLD, ADV, MASK, reduction="none", **objective)
    assert packed.shape == (B,)
    torch.testing.assert_close(packed, padded, rtol=1e-12, atol=1e-14)


def test_asft_needs_a_reference_and_other_kinds_take_none():
    for options, message in (
        ({"kind": "asft"}, "kind 'asft' needs ref_logits"),
        ({"ref_logits": TEACHER}, "ref_logits goes with kind 'asft', got 'nll'"),
        ({"asft_alpha": 0.2, "kind": "dft"}, "asft_alpha goes with kind 'asft', got 'dft'"),
        ({"kind": "asft", "ref_logits": TEACHER, "asft_alpha": -1.0}, "asft_alpha must not be negative"),
        ({"kind": "asft", "ref_logits": TEACHER[:2]}, "ref_logits has shape"),
        ({"kind": "asft", "ref_logits": TEACHER, "inplace_backward": True}, "leave inplace_backward out"),
    ):
        with pytest.raises(ValueError, match=f"^sft_loss: .*{message}"):
            rlk.sft_loss(LOGITS.clone(), TARGETS, MASK, **options)
    for options, message in (
        ({"kind": "asft"}, "kind 'asft' needs ref_hidden"),
        ({"kind": "asft", "ref_hidden": REF_HIDDEN}, "ref_hidden came without ref_weight"),
        ({"ref_weight": REF_WEIGHT}, "ref_weight belongs to ref_hidden"),
    ):
        with pytest.raises(ValueError, match=f"^linear_sft_loss: .*{message}"):
            rlk.linear_sft_loss(HIDDEN, WEIGHT, TARGETS, MASK, **options)
    _, metrics = rlk.sft_loss(LOGITS, TARGETS, MASK, kind="asft", ref_logits=TEACHER, return_metrics=True)
    torch.testing.assert_close(metrics["kl"], kl_of(LOGITS, TEACHER)[MASK].mean(), rtol=1e-9, atol=0)


def test_the_divergences_of_a_head_compile_and_take_likeliest_tokens():
    ids = TEACHER.topk(3).indices
    topk = ids, TEACHER.log_softmax(-1).gather(-1, ids)
    leaf, wide = HIDDEN.clone().requires_grad_(), HIDDEN.clone().requires_grad_()

    def function(hidden):
        return rlk.linear_distillation_loss(hidden, WEIGHT, mask=MASK, teacher_topk=topk, reduction="none")

    found = torch.compile(function, fullgraph=True, backend="aot_eager")(leaf)
    true = rlk.token_divergences(wide @ WEIGHT.T, None, MASK, teacher_topk=topk)
    torch.testing.assert_close(found, true, rtol=1e-10, atol=1e-12)
    (got,), (want,) = (torch.autograd.grad(x, leaf, FACTOR) for x, leaf in ((found, leaf), (true, wide)))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
