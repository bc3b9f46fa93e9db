"""``linear_sft_loss``: likelihoods of given tokens from the head, weighted, against all logits in float64."""

import linear_problems as problems
import pytest
import torch
from linear_problems import B, L, assert_gradients, assert_loss, gradients, own, problem
from reference import same_bits

import rlkernels as rlk

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CU = torch.tensor([0, 5, 5, 6, 14, 21])


def weights_of(
    d, *, aggregation="token-mean", normalizers=None, weights=None, sample_weights=None, cu_seqlens=None, **head
):
    live, (ids, count) = problems.live_of(d, **head).reshape(-1), problems.sequences(d["targets"].shape, cu_seqlens)
    if weights is None:
        w = problems.aggregation(aggregation, live, ids, count, d["targets"].shape[-1], **(normalizers or {}))
    else:
        w = torch.where(live, weights.reshape(-1).double(), 0.0)
    if sample_weights is None:
        return w
    v = sample_weights.double().reshape(-1)
    return w * (v if v.numel() == live.numel() else v[ids])


def truth_of(d, operands, kind="nll", **options):
    head = {k: v for k, v in options.items() if k in problems.HEAD}
    logp, _ = problems.rows(d, operands, **head)
    w, logp = weights_of(d, **options), logp.reshape(-1)
    losses = -logp if kind == "nll" else -logp.detach().exp() * logp
    return (w * losses)[w != 0].sum()


def loss_of(d, operands, **options):
    return rlk.linear_sft_loss(operands[0], operands[1], d["targets"], d["mask"], bias=operands[2], **options)


def judge(d, bias=True, execution=({"chunk_tokens": 5}, {"max_live_tokens": 21}), **options):
    wide, operands = problems.leaves(d, bias), own(d, bias)
    truth = truth_of(d, wide, **options)
    want = gradients(truth, wide, 3.1)
    for extra in execution:
        loss = loss_of(d, operands, **options, **extra)
        assert loss.dtype == d["old"].dtype
        assert_loss(loss, truth)
        assert_gradients(gradients(loss, operands, 3.1), want)


OPTIONS = {
    "nothing": lambda d: {},
    "a temperature per token": lambda d: {"temperature": d["temperature"]},
    "a softcap, a scale and a temperature": lambda d: {"softcap": 4.0, "logit_scale": 1.7, "temperature": 1.4},
    "padding behind the vocabulary": lambda d: {"valid_vocab": 121},
    "another ignored index": lambda d: {"ignore_index": 7},
    "weights": lambda d: {"weights": d["token_weights"] - 0.2},
    "rewards per token": lambda d: {"sample_weights": d["advantages"]},
    "rewards per sequence": lambda d: {"sample_weights": d["advantages"][:, 0], "aggregation": "seq-mean-token-mean"},
    "a column of rewards": lambda d: {"sample_weights": d["advantages"][:, :1], "weights": d["token_weights"]},
    "accepted samples alone": lambda d: {"sample_weights": torch.tensor([1.0, 0.0, 1.0])},
    "a global number of tokens": lambda d: {"normalizers": {"batch_num_tokens": 90}},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["nll", "dft"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_that_of_all_logits(name, kind, dtype, backend):
    blank = {"temperature": 1.0, "token_weights": 0.0, "advantages": torch.zeros(1, 1)}
    d = problem(dtype, **{k: v for k, v in OPTIONS[name](blank).items() if k in problems.HEAD})
    for bias in (True, False):
        judge(d, bias, kind=kind, **OPTIONS[name](d))


@pytest.mark.parametrize(
    "mode,normalizers",
    [("token-sum", {}), ("seq-mean-token-sum", {}), ("fixed-horizon", {"horizon": 12}), ("seq-mean-token-mean", {})],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_sequences_with_rewards_each(mode, normalizers, dtype, backend):
    d = problem(dtype, shape=(21,), seed=3)
    judge(d, cu_seqlens=CU, aggregation=mode, normalizers=normalizers, sample_weights=d["advantages"][:5].clone())


def test_the_likelihood_is_torchs_cross_entropy(backend):
    d = problem()
    d["mask"][:] = True
    operands, wide = own(d), problems.leaves(d)
    z = wide[0] @ wide[1].t() + wide[2]
    truth = torch.nn.functional.cross_entropy(z.view(B * L, -1), d["targets"].view(-1))
    loss = loss_of(d, operands)
    assert_loss(loss, truth)
    assert_gradients(gradients(loss, operands), gradients(truth, wide))


def test_metrics_are_means_over_the_tokens_with_a_weight(backend):
    d = problem()
    logp, _ = problems.rows(d, problems.leaves(d))
    read = problems.live_of(d) & (torch.arange(L) % 3 != 1)
    loss, metrics = loss_of(
        d, own(d), sample_weights=(torch.arange(L) % 3 != 1).float().expand(B, L), chunk_tokens=4, return_metrics=True
    )
    assert loss.requires_grad and metrics.keys() == {"nll", "probability"} and not metrics["nll"].requires_grad
    assert metrics["nll"].item() == pytest.approx(-logp[read].mean().item(), rel=1e-5)
    assert metrics["probability"].item() == pytest.approx(logp[read].exp().mean().item(), rel=1e-5)


def test_an_identity_for_a_head_is_the_loss_of_logits(backend):
    """Hidden states are then the logits, and their gradient is that of ``sft_loss``."""
    logits = torch.randn(4, 6, 37, generator=torch.Generator().manual_seed(0)).mul_(3).requires_grad_()
    targets = torch.randint(37, (4, 6), generator=torch.Generator().manual_seed(1))
    targets[0, :2] = -100
    for kind in ("nll", "dft"):
        ours = rlk.linear_sft_loss(logits, torch.eye(37), targets, kind=kind, temperature=0.7)
        theirs = rlk.sft_loss(logits, targets, kind=kind, temperature=0.7)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (ours, theirs)), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_law_2_what_stands_where_nothing_is_read_changes_no_bit(poison, backend):
    d = problem()
    live = problems.live_of(d)
    for extra in ({}, {"max_live_tokens": 19}, {"sample_weights": d["advantages"].clone()}):
        results = []
        for dead in (0.0, poison):
            inputs, extra = {**d, "hidden": d["hidden"].masked_fill(~live[..., None], dead)}, dict(extra)
            if "sample_weights" in extra:
                extra["sample_weights"] = extra["sample_weights"].masked_fill(~live, dead)
            operands = own(inputs)
            loss = loss_of(inputs, operands, kind="dft", **extra)
            results.append([loss.detach(), *gradients(loss, operands)])
        assert all(same_bits(a, b) and a.isfinite().all() for a, b in zip(*results, strict=True))


@pytest.mark.fault(23)
def test_nothing_to_learn_costs_nothing_and_stays_differentiable(backend):
    d = problem()
    for change in ({"mask": torch.zeros_like(d["mask"])}, {"targets": torch.full_like(d["targets"], -100)}):
        operands = own(d)
        loss = loss_of({**d, **change}, operands)
        assert loss.item() == 0.0 and loss.requires_grad
        assert all(g.shape == x.shape and not g.any() for g, x in zip(gradients(loss, operands), operands, strict=True))
    empty = problem(shape=(0, L))
    operands = own(empty)
    loss = loss_of(empty, operands)
    assert loss.item() == 0.0 and not gradients(loss, operands)[1].any()
