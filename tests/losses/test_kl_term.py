"""`kl=KLTerm(...)` in the three policy losses, against the formula in float64 torch: estimators, ratio, own tokens."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kl_estimate import OPTIONS, reference

import rlkernels as rlk
from rlkernels.objectives import OBJECTIVES, exp, objective

NAN = math.nan
B, L, V, H = 3, 6, 11, 5


def problem(seed=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    hidden, weight = normal(B, L, H), normal(V, H)
    targets = torch.randint(V, (B, L), generator=draw)
    logp = torch.log_softmax(hidden @ weight.t(), -1).gather(-1, targets[..., None])[..., 0]
    d = {
        "hidden": hidden,
        "weight": weight,
        "old": logp + 0.4 * normal(B, L),
        "ref": logp + 0.4 * normal(B, L),
        "advantages": normal(B, L),
    }
    d = {name: x.to(dtype) for name, x in d.items()} | {"targets": targets}
    d["mask"] = torch.rand(B, L, generator=draw) < 0.6
    d["mask"][:, 0] = True
    d["tools"] = torch.rand(B, L, generator=draw) < 0.7
    d["tools"][:, 1] = True
    return d


def losses(d, level="token", **options):
    """Loss, gradient of the hidden states and metrics of each of the three functions, on one problem."""
    found = {}
    options |= {"ref_logprobs": d["ref"], "clip_low": 0.2, "clip_high": 0.2, "ratio_level": level}
    for name in ("policy_loss", "logits_policy_loss", "linear_policy_loss"):
        hidden = d["hidden"].clone().requires_grad_()
        rest = d["old"], d["advantages"], d["mask"]
        if name == "linear_policy_loss":
            head = hidden, d["weight"], d["targets"], *rest
            loss, metrics = rlk.linear_policy_loss(*head, chunk_tokens=7, return_metrics=True, **options)
        else:
            logits = hidden @ d["weight"].t()
            if name == "policy_loss":
                logp = rlk.token_logprobs(logits, d["targets"])
                loss, metrics = rlk.policy_loss(logp, *rest, return_metrics=True, **options)
            else:
                loss, metrics = rlk.logits_policy_loss(logits, d["targets"], *rest, return_metrics=True, **options)
        found[name] = loss, torch.autograd.grad(loss, hidden)[0], metrics
    return found


def truth(d, kind, options, kl_coef, mask=None, weights=None, aggregation="token-mean"):
    """Clipped PPO plus the KL term by hand."""
    hidden = d["hidden"].double().clone().requires_grad_()
    logits = hidden @ d["weight"].double().t()
    logp = torch.log_softmax(logits, -1).gather(-1, d["targets"][..., None])[..., 0]
    ratio = (logp - d["old"].double()).exp()
    advantages = d["advantages"].double()
    policy = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    kl = reference(logp, d["ref"].double(), d["old"].double(), kind, options)
    own = d["mask"] if mask is None else mask
    shares = share(own, aggregation) if weights is None else torch.where(own, weights.double(), 0.0)
    loss = (share(d["mask"], aggregation) * policy).sum() + kl_coef * (shares * kl).sum()
    return loss.detach(), torch.autograd.grad(loss, hidden)[0], (kl[own].mean().detach())


def share(mask, aggregation):
    m = mask.double()
    if aggregation == "token-mean":
        return m / m.sum()
    return m / m.sum(-1, keepdim=True).clamp(min=1) / len(m)


def check(found, want, rtol=1e-9, atol=1e-11):
    for name, (loss, gradient, metrics) in found.items():
        for got, expected in zip((loss, gradient, metrics["kl"]), want, strict=True):
            torch.testing.assert_close(
                got.double(), expected, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("option", [name for name in OPTIONS if name != "plain"])
def test_every_option_in_the_three_functions_is_the_formula(option, aggregation, backend):
    d = problem()
    term = rlk.KLTerm("k3", **OPTIONS[option])
    want = truth(d, "k3", OPTIONS[option], 0.3, aggregation=aggregation)
    check(losses(d, kl=term, kl_coef=0.3, aggregation=aggregation), want)


@pytest.mark.parametrize("kind", ["k1", "abs", "k2", "k3"])
def test_a_plain_term_is_the_name_to_the_bit_and_the_formula(kind, backend):
    d = problem(1, torch.float32)
    by_name, by_term = (losses(d, kl=kl, kl_coef=0.3) for kl in (kind, rlk.KLTerm(kind)))
    for name, (loss, gradient, metrics) in by_name.items():
        assert torch.equal(loss, by_term[name][0]) and torch.equal(gradient, by_term[name][1])
        assert torch.equal(metrics["kl"], by_term[name][2]["kl"])
    check(by_name, truth(d, kind, {}, 0.3), rtol=3e-5, atol=3e-6)


@pytest.mark.parametrize("options", [{}, {"ratio_weighted": True}])
def test_a_mask_of_its_own_and_weights_of_its_own(options, backend):
    d = problem(2)
    d["hidden"][~(d["mask"] | d["tools"])] = NAN  # read by no term
    d["ref"][~d["tools"]] = NAN
    clean = {**d, "hidden": d["hidden"].nan_to_num(0.0), "ref": d["ref"].nan_to_num(0.0)}
    want = truth(clean, "k3", options, 0.3, mask=d["tools"])
    dead = ~(d["mask"] | d["tools"])
    for name, (loss, gradient, metrics) in losses(d, kl=rlk.KLTerm(mask=d["tools"], **options), kl_coef=0.3).items():
        torch.testing.assert_close(loss, want[0], rtol=1e-9, atol=0)
        if name == "linear_policy_loss":
            assert not gradient[dead].any()
        torch.testing.assert_close(gradient[~dead], want[1][~dead], rtol=1e-8, atol=1e-11)
        torch.testing.assert_close(metrics["kl"], want[2], rtol=1e-9, atol=0)
    weights = torch.rand(B, L, dtype=torch.float64)
    want = truth(clean, "k3", options, 0.3, mask=d["tools"], weights=weights)
    term = rlk.KLTerm(mask=d["tools"], weights=weights, **options)
    for loss, *_ in losses(d, kl=term, kl_coef=0.3).values():
        torch.testing.assert_close(loss, want[0], rtol=1e-9, atol=0)


@pytest.mark.parametrize("level", ["sequence", "sequence_token", "sequence_sum"])
def test_sequence_ratios_beside_a_term_with_its_own_tokens(level, backend):
    d = problem(3)
    term = rlk.KLTerm("k3", ratio_weighted=True, value_clamp=5.0, mask=d["tools"])
    options = {"kl_coef": 0.2, "aggregation": "seq-mean-token-mean"}
    both, without = (losses(d, level, kl=term, **options | {"kl_coef": c}) for c in (0.2, 0.0))
    zero = {**d, "advantages": torch.zeros_like(d["advantages"])}
    want = truth(zero, "k3", {"ratio_weighted": True}, 0.2, mask=d["tools"], aggregation="seq-mean-token-mean")
    for name in both:
        torch.testing.assert_close(both[name][0] - without[name][0], want[0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(both[name][1] - without[name][1], want[1], rtol=1e-8, atol=1e-11)


@settings(max_examples=6, deadline=None, derandomize=True)
@given(st.integers(0, 99), st.sampled_from(["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"]), st.booleans())
def test_micro_batches_with_the_normalisers_of_the_whole_batch_add_up(seed, mode, packed):
    d = problem(seed)

    def normalizers(mask):
        return {"batch_num_tokens": float(mask.sum())} if mode == "token-mean" else {"num_sequences": float(B)}

    def loss(rows):
        part = {name: d[name][rows] for name in ("old", "ref", "advantages", "mask", "tools", "hidden", "targets")}
        logp = rlk.token_logprobs(part["hidden"] @ d["weight"].t(), part["targets"])
        cu = None
        if packed:
            part, logp = {name: x.flatten(0, 1) for name, x in part.items()}, logp.flatten()
            cu = [L * k for k in range(len(d["old"][rows]) + 1)]
        term = rlk.KLTerm(ratio_weighted=True, mask=part["tools"], normalizers=normalizers(d["tools"]))
        options = {"aggregation": mode, "normalizers": normalizers(d["mask"]), "cu_seqlens": cu}
        tensors = logp, part["old"], part["advantages"], part["mask"]
        return rlk.policy_loss(*tensors, ref_logprobs=part["ref"], kl=term, kl_coef=0.3, **options)

    whole = loss(slice(0, B))
    torch.testing.assert_close(sum(loss(slice(k, k + 1)) for k in range(B)), whole, rtol=1e-10, atol=1e-13)


def test_without_old_logprobs_the_ratio_is_one_and_carries_the_gradient(backend):
    d = problem(4)
    logp, ref, zeros = d["old"].requires_grad_(), d["ref"], torch.zeros(B, L, dtype=torch.float64)
    term = rlk.KLTerm(ratio_weighted=True)
    options = {"objective": "reinforce", "ref_logprobs": ref, "kl": term, "kl_coef": 1.0}
    gradients = [
        torch.autograd.grad(rlk.policy_loss(logp, old, zeros, d["mask"], **options), logp)[0]
        for old in (None, logp.detach())
    ]
    assert torch.equal(*gradients)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"kl": rlk.KLTerm(mask=torch.ones(2, 3))}, "policy_loss: kl.mask has shape"),
        ({"kl": rlk.KLTerm(weights=torch.ones(2, 3))}, "policy_loss: kl.weights has shape"),
        (
            {"kl": rlk.KLTerm(mask=torch.ones(2, 2)), "normalizers": {"batch_num_tokens": 4}},
            "policy_loss: kl has a mask of its own, and normalizers of the loss count other tokens",
        ),
        (
            {"kl": rlk.KLTerm(mask=torch.ones(2, 2)), "weights": torch.ones(2, 2)},
            "policy_loss: kl has weights of its own beside weights of the loss",
        ),
        ({"kl": rlk.KLTerm(value_clamp=1.0), "ref_logprobs": None}, "policy_loss: kl='k3' needs ref_logprobs"),
        ({"kl": "k4"}, "policy_loss: kl must be one of k1, k2, k3, abs; got 'k4'"),
    ],
)
def test_a_term_that_does_not_fit_is_refused(options, message):
    zeros = torch.zeros(2, 2)
    with pytest.raises(ValueError, match=message):
        rlk.policy_loss(zeros, zeros, zeros, **{"ref_logprobs": zeros, "kl_coef": 0.1} | options)


def test_a_wrong_term_is_refused_where_it_is_made():
    for options, message in (
        ({"estimator": "k5"}, "KLTerm: estimator must be one of k1, k2, k3, abs, reverse_kl, forward_kl; got 'k5'"),
        ({"value_clamp": (2.0, 1.0)}, "KLTerm: value_clamp must be"),
        ({"ratio_level": "loss"}, "KLTerm: ratio_level belongs to ratio_weighted=True"),
        ({"weights": torch.ones(1), "aggregation": "token-sum"}, "KLTerm: weights and aggregation or normalizers"),
    ):
        with pytest.raises(ValueError, match=message):
            rlk.KLTerm(**options)


SEQUENCE_OPTIONS = {
    "moving": {},
    "constant": {"ratio_detached": True},
    "capped": {"ratio_cap": 1.05},
    "straight-through": {"gradient": "k2"},
}


@pytest.mark.parametrize("option", SEQUENCE_OPTIONS)
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("level", ["sequence", "sequence_token", "sequence_sum"])
def test_the_ratio_of_the_loss_weighs_the_term_with_its_gradient(level, own, option, backend):
    d, options = problem(5), SEQUENCE_OPTIONS[option]
    d["old"] = d["old"].masked_fill(~d["mask"], NAN)  # the ratio is that of the objective's tokens
    tokens = d["tools"] if own else d["mask"]
    weights = torch.rand(B, L, dtype=torch.float64)
    term = {"mask": d["tools"], "weights": weights} if own else {}
    kl = rlk.KLTerm("k3", ratio_weighted=True, ratio_level="loss", **term, **options)
    shares = torch.where(tokens, weights, 0.0) if own else share(d["mask"], "seq-mean-token-mean")

    hidden = d["hidden"].clone().requires_grad_()
    logp = torch.log_softmax(hidden @ d["weight"].t(), -1).gather(-1, d["targets"][..., None])[..., 0]
    gap = torch.where(d["mask"], logp - d["old"].nan_to_num(0.0), 0.0)
    total = gap.sum(-1, keepdim=True)
    mean = total / d["mask"].sum(-1, keepdim=True)
    drift = total if level == "sequence_sum" else mean
    ratio = (logp - logp.detach() + drift.detach() if level == "sequence_token" else drift.expand(B, L)).exp()
    ratio = ratio.clamp(max=options.get("ratio_cap", math.inf))
    delta = logp - d["ref"]
    value = (-delta).exp() - 1 + delta
    if option == "straight-through":
        values = value.detach() + ratio.detach() * (delta**2 / 2 - delta.detach() ** 2 / 2)
    else:
        values = (ratio.detach() if option == "constant" else ratio) * value
    want = 0.3 * (shares * values).sum()
    (want_gradient,) = torch.autograd.grad(want, hidden)
    quiet = {**d, "advantages": torch.zeros_like(d["advantages"])}
    found = losses(quiet, level, kl=kl, kl_coef=0.3, aggregation="seq-mean-token-mean")
    for name, (loss, gradient, metrics) in found.items():
        torch.testing.assert_close(loss, want.detach(), rtol=1e-9, atol=1e-12, msg=lambda text, name=name: name + text)
        torch.testing.assert_close(gradient, want_gradient, rtol=1e-8, atol=1e-11)
        torch.testing.assert_close(metrics["kl"], values[tokens].mean().detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("function", ["policy_loss", "linear_policy_loss"])
@pytest.mark.parametrize("level", ["sequence", "sequence_sum"])
def test_a_packed_batch_has_the_ratio_of_the_padded_one(level, function, backend):
    d = problem(6, torch.float32)
    flat = {name: x if name == "weight" else x.flatten(0, 1) for name, x in d.items()}
    kl = rlk.KLTerm("k3", ratio_weighted=True, ratio_level="loss")
    options = {"kl": kl, "kl_coef": 0.3, "aggregation": "seq-mean-token-mean"}
    padded = losses(d, level, **options)[function]
    packed = losses(flat, level, cu_seqlens=[0, L, 2 * L, 3 * L], **options)[function]
    torch.testing.assert_close(packed[0], padded[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(packed[1].view_as(padded[1]), padded[1], rtol=1e-4, atol=1e-6)


def test_an_estimator_of_a_users_own_in_the_three_functions(backend):
    @objective
    def half_square(logp, ref_logp, old_logp, scale=0.5):
        r"""``rho d^2 scale``, the ratio a constant. A test."""
        gap = logp - ref_logp
        ratio = exp(logp - old_logp)
        return ratio * scale * gap * gap, 2.0 * ratio * scale * gap

    @objective
    def cubed(logp, ref_logp):
        r"""``d^3``. A test."""
        gap = logp - ref_logp
        return gap * gap * gap, 3.0 * gap * gap

    d = problem(7)
    try:
        found = losses(d, kl=rlk.KLTerm(half_square), kl_coef=0.3)
        check(found, truth(d, "k2", {"ratio_weighted": True, "ratio_detached": True}, 0.3))
        by_function, by_name = (losses(d, kl=rlk.KLTerm(x), kl_coef=0.3) for x in (cubed, "cubed"))
        logits = d["hidden"] @ d["weight"].t()
        gap = torch.log_softmax(logits, -1).gather(-1, d["targets"][..., None])[..., 0] - d["ref"]
        for name, (loss, *_, metrics) in by_function.items():
            assert torch.equal(loss, by_name[name][0])
            torch.testing.assert_close(metrics["kl"], (gap**3)[d["mask"]].mean(), rtol=1e-9, atol=1e-12)
        with pytest.raises(ValueError, match="KLTerm: estimator='cubed' takes no clamp, ratio or other gradient"):
            rlk.KLTerm(cubed, value_clamp=1.0)
        with pytest.raises(ValueError, match="KLTerm: estimator='ppo_clip' has columns logp, old_logp, advantage"):
            rlk.KLTerm("ppo_clip")
    finally:
        for name in ("half_square", "cubed"):
            OBJECTIVES.pop(name, None)


@pytest.mark.parametrize(("mode", "of_tools"), [("token-mean", False), ("token-mean", True), (None, True)])
@pytest.mark.parametrize("objective", ["real", "ppo_clip"])
def test_groups_of_the_loss_are_no_normalizers_of_a_term_that_has_none(objective, mode, of_tools):
    d, ids = problem(8), torch.tensor([0, 1, 0])
    d["advantages"] = torch.zeros_like(d["advantages"])  # both objectives have a constant loss then
    groups = {"group_ids": ids} if objective == "real" else {"normalizers": {"group_ids": ids}}
    term = rlk.KLTerm("k2", aggregation=mode, mask=d["tools"] if of_tools else None)
    logp = torch.log_softmax(d["hidden"] @ d["weight"].t(), -1).gather(-1, d["targets"][..., None])[..., 0]
    given = logp, d["old"], d["advantages"], d["mask"]
    options = {"objective": objective, "ref_logprobs": d["ref"], "kl": term, "kl_coef": 0.3, **groups}
    loss = rlk.policy_loss(*given, aggregation="group-mean", **options)
    tokens = d["tools"] if of_tools else d["mask"]
    shares = rlk.token_weights(
        tokens, mode or "group-mean", dtype=torch.float64, **({} if mode else {"group_ids": ids})
    )
    want = 0.3 * (shares * (logp - d["ref"]) ** 2 / 2).sum()
    torch.testing.assert_close(loss, want, rtol=1e-9, atol=1e-12)


def test_a_normalizer_of_the_loss_that_the_term_does_not_take_is_named():
    term, x = rlk.KLTerm(aggregation="seq-mean-token-mean"), torch.zeros(1, 2)
    with pytest.raises(
        ValueError, match=r"policy_loss: kl.aggregation='seq-mean-token-mean' takes no batch_num_tokens"
    ):
        rlk.policy_loss(x, x, x, ref_logprobs=x, kl=term, kl_coef=0.1, normalizers={"batch_num_tokens": 4})


def test_the_metric_of_a_term_in_a_compiled_program():
    torch._dynamo.reset()
    x, term = torch.tensor([[-1.0, -2.0]]), rlk.KLTerm("k2", value_clamp=1.0)

    def call(x):
        return rlk.policy_loss(x, x, x, ref_logprobs=x - 1.0, kl=term, kl_coef=0.5, return_metrics=True)

    (loss, metrics), (want, of_eager) = torch.compile(call, backend="eager", fullgraph=True)(x), call(x)
    assert torch.equal(loss, want) and torch.equal(metrics["kl"], of_eager["kl"])


def test_an_unknown_aggregation_of_a_term_is_refused_even_where_no_reference_is_given():
    with pytest.raises(ValueError, match="KLTerm: aggregation must be one of token-mean, .*; got 'mean'"):
        rlk.KLTerm(aggregation="mean")


@pytest.mark.parametrize("name", ("k3", "kl_term", "kl_abs"))
def test_an_estimator_is_no_objective_of_a_policy(name):
    x = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="objective must be one of"):
        rlk.policy_loss(x, x, torch.ones(1), ref_logprobs=x, objective=name)
