"""The exact KL over the vocabulary as a term of a policy loss, forward and reverse, against float64 torch."""

import math

import pytest
import torch

import rlkernels as rlk

B, L, V, H = 2, 4, 9, 5
NAN = math.nan


def problem(seed=0):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    d = {"hidden": normal(B, L, H), "weight": normal(V, H), "ref_hidden": normal(B, L, H + 2)}
    d |= {"ref_weight": normal(V, H + 2), "old": normal(B, L) - 2, "advantages": normal(B, L)}
    d["targets"] = torch.randint(V, (B, L), generator=draw)
    d["targets"][0, 3] = -100
    d["mask"] = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 0]])
    d["tools"] = torch.tensor([[0, 1, 1, 1], [1, 0, 1, 0]])
    return d


def divergence(logits, ref, kind, temperature=1.0, keep=None):
    """KL(pi || ref) or KL(ref || pi) of each row, by hand."""
    if keep is not None:
        logits, ref = logits[..., keep], ref[..., keep]
    logp, logq = torch.log_softmax(logits / temperature, -1), torch.log_softmax(ref / temperature, -1)
    return (logp.exp() * (logp - logq)).sum(-1) if kind == "reverse_kl" else (logq.exp() * (logq - logp)).sum(-1)


def loss_of(function, d, hidden, level="token", dtype=torch.float64, **options):
    rest = d["targets"], d["old"].to(dtype), d["advantages"].to(dtype), d["mask"]
    options |= {"ratio_level": level, "return_metrics": True}
    if function == "linear":
        reference = {"ref_hidden": d["ref_hidden"].to(dtype), "ref_weight": d["ref_weight"].to(dtype)}
        return rlk.linear_policy_loss(hidden, d["weight"].to(dtype), *rest, chunk_tokens=3, **reference, **options)
    ref_logits = (d["ref_hidden"] @ d["ref_weight"].t()).to(dtype)
    return rlk.logits_policy_loss(hidden @ d["weight"].to(dtype).t(), *rest, ref_logits=ref_logits, **options)


def without_kl(d, hidden, level, temperature):
    rest = d["targets"], d["old"], d["advantages"], d["mask"]
    logits = hidden @ d["weight"].t()
    return rlk.logits_policy_loss(logits, *rest, ratio_level=level, temperature=temperature, aggregation="token-sum")


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize("function", ["logits", "linear"])
def test_value_gradient_and_metric_are_those_of_the_formula(function, kind, level, own, backend):
    d = problem()
    hidden = d["hidden"].clone().requires_grad_()
    kl = rlk.KLTerm(kind, mask=d["tools"]) if own else kind
    options = {"kl": kl, "kl_coef": 0.3, "temperature": 0.7, "aggregation": "token-sum"}
    loss, metrics = loss_of(function, d, hidden, level, **options)
    scored = (d["tools"] if own else d["mask"]).bool() & (d["targets"] != -100)
    values = divergence(hidden @ d["weight"].t(), d["ref_hidden"] @ d["ref_weight"].t(), kind, 0.7)
    want = without_kl(d, hidden, level, 0.7) + 0.3 * values[scored].sum()
    torch.testing.assert_close(loss, want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(metrics["kl"], values[scored].mean().detach(), rtol=1e-10, atol=1e-12)
    got, expected = (torch.autograd.grad(x, hidden)[0] for x in (loss, want))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
@pytest.mark.parametrize("function", ["logits", "linear"])
def test_float32_and_bfloat16_stay_near_the_formula(function, kind, backend):
    for dtype, rtol, atol in ((torch.float32, 1e-5, 1e-5), (torch.bfloat16, 3e-2, 1e-2)):
        d = problem(1)
        d = {name: x.to(dtype).double() if x.is_floating_point() else x for name, x in d.items()}
        hidden = d["hidden"].to(dtype).requires_grad_()
        loss, metrics = loss_of(function, d, hidden, dtype=dtype, kl=kind, kl_coef=1.0, objective="reinforce")
        assert loss.dtype == torch.float32
        live = d["mask"].bool() & (d["targets"] != -100)
        values = divergence(d["hidden"] @ d["weight"].t(), d["ref_hidden"] @ d["ref_weight"].t(), kind)
        torch.testing.assert_close(metrics["kl"].double(), values[live].mean(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
def test_dead_rows_and_columns_that_are_masked_take_no_part(kind, backend):
    d = problem(2)
    keep = torch.arange(V) % 3 > 0
    d["targets"] = d["targets"].clamp(min=0) // 3 * 3 + 1
    logits, ref = d["hidden"] @ d["weight"].t(), d["ref_hidden"] @ d["ref_weight"].t()
    dead = d["mask"] == 0
    broken = [x.masked_fill(dead[..., None], NAN).requires_grad_(k == 0) for k, x in enumerate((logits, ref))]
    options = {"objective": "reinforce", "aggregation": "token-sum", "vocab_mask": keep, "kl": kind, "kl_coef": 2.0}
    zeros = torch.zeros(B, L, dtype=torch.float64)
    loss = rlk.logits_policy_loss(broken[0], d["targets"], None, zeros, d["mask"], ref_logits=broken[1], **options)
    clean = logits.clone().requires_grad_()
    want = 2.0 * divergence(clean, ref, kind, keep=keep)[~dead].sum()
    torch.testing.assert_close(loss, want, rtol=1e-10, atol=1e-12)
    got, expected = torch.autograd.grad(loss, broken[0])[0], torch.autograd.grad(want, clean)[0]
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    assert not got[dead].any() and not got[..., ~keep].any()
    nothing = rlk.logits_policy_loss(
        broken[0], d["targets"], None, zeros, 0 * d["mask"], ref_logits=broken[1], **options
    )
    assert nothing.item() == 0.0 and not torch.autograd.grad(nothing, broken[0])[0].any()


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl", "k3"])
def test_a_packed_batch_gives_the_number_of_the_padded_one(kind, backend):
    d = problem(3)
    hidden, options = d["hidden"], {"kl": kind, "kl_coef": 0.5, "aggregation": "seq-mean-token-mean"}
    padded, _ = loss_of("logits", d, hidden, **options)
    flat = {name: x.flatten(0, 1) if name not in ("weight", "ref_weight") else x for name, x in d.items()}
    packed, _ = loss_of("logits", flat, hidden.flatten(0, 1), cu_seqlens=[0, L, 2 * L], **options)
    torch.testing.assert_close(packed, padded, rtol=1e-12, atol=0)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kl", ["k3", rlk.KLTerm("k3", ratio_weighted=True)])
def test_an_estimate_takes_its_log_probabilities_from_the_reference_logits(kl, level, backend):
    d = problem(4)
    logits, ref = d["hidden"] @ d["weight"].t(), d["ref_hidden"] @ d["ref_weight"].t()
    rest = d["targets"], d["old"], d["advantages"], d["mask"]
    options = {"kl": kl, "kl_coef": 0.5, "ratio_level": level, "return_metrics": True}
    got = rlk.logits_policy_loss(logits, *rest, ref_logits=ref, **options)
    want = rlk.logits_policy_loss(logits, *rest, ref_logprobs=rlk.token_logprobs(ref, d["targets"]), **options)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
def test_a_tensor_of_one_number_is_a_coefficient_and_0_leaves_the_metric(kind):
    d = problem(5)
    for function in ("logits", "linear"):
        by_number, by_tensor, none = (
            loss_of(function, d, d["hidden"], kl=kind, kl_coef=c) for c in (0.3, torch.tensor(0.3).double(), 0.0)
        )
        torch.testing.assert_close(by_tensor, by_number, rtol=1e-6, atol=0)
        torch.testing.assert_close(none[1]["kl"], by_number[1]["kl"], rtol=1e-12, atol=0)
        assert none[0] != by_number[0]


X, Y, A = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3)
HEAD = torch.zeros(2, 3, 4), torch.zeros(5, 4)


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: logits(kl="reverse_kl"), "kl='reverse_kl' needs ref_logits where kl_coef is not 0"),
        (lambda: logits(kl="reverse_kl", ref_logits=X[:1]), "ref_logits has shape"),
        (lambda: logits(kl="k3", ref_logits=X, ref_logprobs=A), "ref_logprobs and ref_logits both give the reference"),
        (lambda: linear(kl="forward_kl"), "kl='forward_kl' needs ref_hidden where kl_coef is not 0"),
        (lambda: linear(kl="forward_kl", ref_hidden=HEAD[0]), "ref_hidden came without ref_weight"),
        (lambda: linear(kl="k3", ref_hidden=HEAD[0], ref_weight=HEAD[1]), "ref_hidden belongs to kl='reverse_kl'"),
        (lambda: linear(kl="k3", ref_weight=HEAD[1]), "ref_weight belongs to ref_hidden"),
        (lambda: linear(kl="reverse_kl", ref_hidden=HEAD[0][:1], ref_weight=HEAD[1]), "ref_hidden has shape"),
        (lambda: rlk.policy_loss(A, A, A, kl="reverse_kl"), "policy_loss: kl='reverse_kl' needs whole rows"),
        (lambda: rlk.policy_loss(A, A, A, kl=rlk.KLTerm("reverse_kl")), "kl='reverse_kl' needs whole rows of logits"),
        (lambda: rlk.KLTerm("forward_kl", value_clamp=1.0), "is no estimate of sampled tokens"),
        (lambda: rlk.kl_estimate(A, A, "reverse_kl"), "kl_estimate: kind must be one of k1, k2, k3, abs"),
    ],
)
def test_what_does_not_fit_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def logits(**options):
    return rlk.logits_policy_loss(X, Y, A, A, kl_coef=0.1, **options)


def linear(**options):
    return rlk.linear_policy_loss(*HEAD, Y, A, A, kl_coef=0.1, **options)


def test_the_forward_kl_has_no_gradient_in_place():
    x = (X.clone().requires_grad_() * 1.0) + 0.0
    with pytest.raises(ValueError, match="inplace_backward=True with kl='forward_kl'"):
        rlk.logits_policy_loss(x, Y, A, A, kl="forward_kl", kl_coef=0.1, ref_logits=X, inplace_backward=True)
    leaf = torch.randn(2, 3, 5, requires_grad=True)
    gradients = []
    for inplace in (False, True):
        loss = rlk.logits_policy_loss(
            leaf * 1.0, Y, A, A + 1, kl="reverse_kl", kl_coef=0.1, ref_logits=X, inplace_backward=inplace
        )
        gradients.append(torch.autograd.grad(loss, leaf)[0])
    assert torch.equal(*gradients)
