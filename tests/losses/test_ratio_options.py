"""The options of a policy loss's ratio: its denominator, the bounds of its logarithm, its square, and no old policy."""

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_batches import PARAMS, batch

import rlkernels as rlk
from rlkernels.objectives import OBJECTIVES, objective
from rlkernels.objectives.log_ratio import log_ratio

ALONE = ("surrogate", "ppo_clip", "dual_clip", "ppo_clip_cap", "sapo")
WEIGHTS = ("cispo", "cispo_max_only", "cispo_absolute")
BOUNDS = (-0.3, 0.25)
V, H = 11, 6


def problem(seed=0, dtype=torch.float64):
    """A head whose log-probabilities are near those of the other policies; NaN and wild ids under the mask."""
    d, draw = batch(seed), torch.Generator().manual_seed(seed)
    d["hidden"] = torch.randn(*d["mask"].shape, H, generator=draw, dtype=dtype)
    d["weight"] = torch.randn(V, H, generator=draw, dtype=dtype) / 2
    d["targets"] = torch.randint(0, V, d["mask"].shape, generator=draw)
    logp = torch.log_softmax(d["hidden"] @ d["weight"].T, -1).gather(-1, d["targets"][..., None])[..., 0]
    for name in ("old", "rollout", "ref"):
        d[name] = (logp + 0.5 * torch.randn(logp.shape, generator=draw, dtype=dtype)).masked_fill(~d["mask"], torch.nan)
    d["targets"][~d["mask"]] = 10**9
    d["advantages"] = d["advantages"].to(dtype).masked_fill(~d["mask"], torch.inf)
    return d


def three_ways(d, old, **options):
    """``(loss, gradient of the hidden states)`` by each of the three policy functions."""
    for way in ("policy_loss", "logits_policy_loss", "linear_policy_loss"):
        hidden = d["hidden"].clone().requires_grad_()
        arguments = old, d["advantages"], d["mask"]
        if way == "linear_policy_loss":
            loss = rlk.linear_policy_loss(hidden, d["weight"], d["targets"], *arguments, chunk_tokens=8, **options)
        elif way == "logits_policy_loss":
            loss = rlk.logits_policy_loss(hidden @ d["weight"].T, d["targets"], *arguments, **options)
        else:
            targets = torch.where(d["mask"], d["targets"], -100)
            loss = rlk.policy_loss(rlk.token_logprobs(hidden @ d["weight"].T, targets), *arguments, **options)
        yield way, loss, torch.autograd.grad(loss, hidden)[0]


def by_hand(d, terms):
    """The token mean of ``terms(logp, live columns)`` in float64, and its gradient of the hidden states."""
    hidden, m = d["hidden"].clone().requires_grad_(), d["mask"]
    logp = torch.log_softmax(hidden[m] @ d["weight"].T, -1).gather(-1, d["targets"][m][:, None])[:, 0]
    loss = terms(logp, {name: d[name][m] for name in ("old", "rollout", "ref", "advantages")}).mean()
    return loss, torch.autograd.grad(loss, hidden)[0]


def check(d, old, terms, **options):
    want, slope = by_hand(d, terms)
    for way, loss, found in three_ways(d, old, **options):
        torch.testing.assert_close(loss, want, rtol=1e-10, atol=1e-12, msg=lambda text, way=way: f"{way}: {text}")
        torch.testing.assert_close(found, slope, rtol=1e-9, atol=1e-12, msg=lambda text, way=way: f"{way}: {text}")


@pytest.mark.parametrize("name", ALONE)
def test_a_clamped_log_ratio_has_no_gradient_beyond_its_bounds(name, backend):
    """The objective of ``clamp(d)``, in autograd."""
    d = problem()

    def terms(logp, c):
        return getattr(oracles, name)((logp - c["old"]).clamp(*BOUNDS), 0 * logp, c["advantages"], **PARAMS[name])

    check(d, d["old"], terms, objective=name, log_ratio_clamp=BOUNDS, **PARAMS[name])


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_clamped_weight_leaves_the_gradient_that_passes_by_it(name, backend):
    """verl's CISPO: ``-sg[clip(exp(clamp(d)))] A log pi``."""
    d = problem()

    def terms(logp, c):
        fixed = logp.detach() - (logp.detach() - c["old"]).clamp(*BOUNDS)
        return getattr(oracles, name)(logp, fixed, c["advantages"], **PARAMS[name])

    check(d, d["old"], terms, objective=name, log_ratio_clamp=list(BOUNDS), **PARAMS[name])


def test_a_clamp_of_one_number_holds_on_both_sides_and_one_side_may_be_open(backend):
    d = problem()
    for bounds, sides in ((0.2, (-0.2, 0.2)), ((None, 0.1), (None, 0.1)), ((-0.1, None), (-0.1, None))):

        def terms(logp, c, sides=sides):
            return -(logp - c["old"]).clamp(*sides).exp() * c["advantages"]

        check(d, d["old"], terms, objective="surrogate", log_ratio_clamp=bounds)


@pytest.mark.parametrize("level", ["sequence", "sequence_token", "sequence_sum"])
def test_a_clamp_at_a_sequence_level_is_one_of_the_sequence_s_log_ratio(level, backend):
    d = problem()
    A, m = d["advantages"][:, 1], d["mask"]
    losses, hidden = [], d["hidden"].clone().requires_grad_()
    for k in range(m.shape[0]):
        logp = torch.log_softmax(hidden[k][m[k]] @ d["weight"].T, -1).gather(-1, d["targets"][k][m[k]][:, None])[:, 0]
        gap = logp - d["old"][k][m[k]]
        if level == "sequence_token":
            gap = logp - logp.detach() + gap.detach().mean()
        else:
            gap = (gap.sum() if level == "sequence_sum" else gap.mean())[None]
        losses.append(oracles.ppo_clip(gap.clamp(*BOUNDS), 0 * gap, A[k].expand_as(gap), 0.2, 0.2).mean())
    want = torch.stack(losses).mean()
    (slope,) = torch.autograd.grad(want, hidden)
    options = {"ratio_level": level, "aggregation": "seq-mean-token-mean", "log_ratio_clamp": BOUNDS}
    d["advantages"] = A
    if level == "sequence_sum":
        options["aggregation"] = "seq-mean"
    for way, loss, found in three_ways(d, d["old"], **options):
        torch.testing.assert_close(loss, want, rtol=1e-10, atol=1e-12, msg=lambda text, way=way: f"{way}: {text}")
        torch.testing.assert_close(found, slope, rtol=1e-9, atol=1e-12, msg=lambda text, way=way: f"{way}: {text}")


def test_a_clamp_that_nothing_reaches_changes_no_bit():
    d = batch()
    for name in (*ALONE, *WEIGHTS):
        plain, bounded = (
            rlk.policy_loss(d["logp"], d["old"], d["advantages"], d["mask"], objective=name, **PARAMS[name], **more)
            for more in ({}, {"log_ratio_clamp": 20})
        )
        assert torch.equal(plain, bounded), name


def test_without_old_log_probabilities_the_ratio_is_1_and_has_its_gradient(backend):
    d = problem()
    for name in ("ppo_clip", "cispo", "dppo_tv"):
        check(
            d,
            None,
            lambda logp, c, name=name: getattr(oracles, name)(logp, logp.detach(), c["advantages"], **PARAMS[name]),
            objective=name,
            **PARAMS[name],
        )
    bf16 = batch()["logp"].bfloat16().requires_grad_()
    loss, metrics = rlk.policy_loss(bf16, None, batch()["advantages"], return_metrics=True)
    assert metrics["ratio_min"] == metrics["ratio_max"] == 1 and loss.dtype == torch.float32
    A, m = batch()["advantages"][:, 0], d["mask"]
    for level in ("sequence", "sequence_token", "sequence_sum"):
        _, metrics = rlk.policy_loss(d["old"], None, A, m, ratio_level=level, return_metrics=True)
        assert metrics["ratio"] == 1
        want = rlk.policy_loss(d["old"], d["old"].clone(), A, m, ratio_level=level)
        assert torch.equal(rlk.policy_loss(d["old"], None, A, m, ratio_level=level), want)


@pytest.mark.parametrize("kl", [0.0, 0.3])
def test_the_square_of_the_log_ratio_to_the_rollout_is_added_on_live_tokens(kl, backend):
    d = problem()

    def terms(logp, c):
        loss = oracles.ppo_clip(logp, c["old"], c["advantages"], 0.2, 0.2) + 0.7 * (logp - c["rollout"]).square()
        return loss + kl * oracles.k3(logp, c["ref"])

    more = {"ref_logprobs": d["ref"], "kl_coef": kl} if kl else {}
    check(d, d["old"], terms, rollout_logprobs=d["rollout"], log_ratio_sq_coef=0.7, **more)
    check(
        d,
        d["old"],
        terms,
        rollout_logprobs=d["rollout"],
        log_ratio_sq_coef=torch.tensor(0.7, dtype=torch.float64),
        **more,
    )


def test_the_rollout_may_be_the_denominator(backend):
    d = problem()
    check(
        d,
        None,
        lambda logp, c: oracles.ppo_clip(logp, c["rollout"], c["advantages"], 0.2, 0.2),
        rollout_logprobs=d["rollout"],
        ratio_denominator="rollout",
    )


@pytest.mark.parametrize("name", ["rollout_is", "tv_symmetric", "ref_kl"])
def test_objectives_of_the_rollout_equal_their_oracles(name, backend):
    d = problem()
    params = {
        "rollout_is": {"clip_low": 0.5, "clip_high": 0.5},
        "tv_symmetric": {"delta": 0.02},
        "ref_kl": {"delta_low": 0.02},
    }[name]
    more = {"ref_logprobs": d["ref"]} if name == "ref_kl" else {}

    def terms(logp, c):
        last = c["ref"] if name == "ref_kl" else c["advantages"]
        return getattr(oracles, name)(logp, c["rollout"], last, **params)

    d_call = {**d, "advantages": None} if name == "ref_kl" else d
    want, slope = by_hand(d, terms)
    assert want != 0
    for way, loss, found in three_ways(d_call, None, objective=name, rollout_logprobs=d["rollout"], **more, **params):
        torch.testing.assert_close(loss, want, rtol=1e-10, atol=1e-12, msg=lambda text, way=way: f"{way}: {text}")
        torch.testing.assert_close(found, slope, rtol=1e-9, atol=1e-12, msg=lambda text, way=way: f"{way}: {text}")


def test_packed_equals_padded_with_every_option():
    d = problem()
    m = d["mask"]
    lengths = m.sum(-1)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    options = {"log_ratio_clamp": 0.3, "log_ratio_sq_coef": 0.1, "ratio_denominator": "rollout"}
    for level in ("token", "sequence"):
        padded = rlk.policy_loss(
            d["ref"], None, d["advantages"], m, rollout_logprobs=d["rollout"], ratio_level=level, **options
        )
        packed = rlk.policy_loss(
            d["ref"][m],
            None,
            d["advantages"][m],
            cu_seqlens=offsets,
            rollout_logprobs=d["rollout"][m],
            ratio_level=level,
            **options,
        )
        torch.testing.assert_close(packed, padded, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_token"])
def test_without_a_reduction_the_tokens_have_their_losses_and_their_sum_is_the_loss(level, backend):
    d = problem()
    options = {
        "ratio_level": level,
        "ref_logprobs": d["ref"],
        "kl_coef": 0.3,
        "rollout_logprobs": d["rollout"],
        "log_ratio_sq_coef": torch.tensor(0.2, dtype=torch.float64),
        "entropy_coef": 0.1,
    }
    for way in ("logits_policy_loss", "linear_policy_loss"):
        found = []
        for more in ({"reduction": "none"}, {"aggregation": "token-sum"}):
            hidden, weight = d["hidden"].clone().requires_grad_(), d["weight"].clone().requires_grad_()
            head = (hidden, weight) if way == "linear_policy_loss" else (hidden @ weight.T,)
            loss = getattr(rlk, way)(*head, d["targets"], d["old"], d["advantages"], d["mask"], **options, **more)
            if more == {"reduction": "none"}:
                assert loss.shape == d["mask"].shape and (loss[~d["mask"]] == 0).all() and (loss[d["mask"]] != 0).all()
            found.append((loss.sum(), *torch.autograd.grad(loss.sum(), (hidden, weight))))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=lambda text, way=way: f"{way}: {text}")


def test_the_loss_of_each_token_is_that_of_the_paper(backend):
    d = batch()
    leaf, m = d["logp"].clone().requires_grad_(), d["mask"]
    each = rlk.policy_loss(leaf, d["old"].masked_fill(~m, torch.nan), d["advantages"], m, reduction="none")
    wide = d["logp"].double().requires_grad_()
    want = torch.where(m, oracles.ppo_clip(wide, d["old"].double(), d["advantages"].double(), 0.2, 0.2), 0.0)
    torch.testing.assert_close(each.double(), want, rtol=4e-6, atol=1e-6)
    factors = torch.rand(m.shape)
    corrected = rlk.policy_loss(
        leaf, d["old"], d["advantages"], m, correction=factors, reduction="none", ref_logprobs=d["ref"], kl_coef=0.3
    )
    kl = torch.where(m, 0.3 * oracles.k3(wide, d["ref"].double()), 0.0)
    torch.testing.assert_close(corrected.double(), factors * want + kl, rtol=4e-6, atol=1e-6)
    both = {"log_ratio_sq_coef": 0.1, "rollout_logprobs": d["ref"]}  # factors beside an option that takes the engine
    squared = rlk.policy_loss(leaf, d["old"], d["advantages"], m, correction=factors, reduction="none", **both)
    square = torch.where(m, 0.1 * (wide - d["ref"].double()).square(), 0.0)
    torch.testing.assert_close(squared.double(), factors * want + square, rtol=4e-6, atol=1e-6)
    upstream = torch.rand(m.shape)
    (got,), (slope,) = torch.autograd.grad(each, leaf, upstream), torch.autograd.grad(want, wide, upstream.double())
    torch.testing.assert_close(got.double(), slope, rtol=4e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (2, 3)])
def test_without_a_live_token_every_option_gives_0(shape):
    logp = torch.full(shape, torch.nan, requires_grad=True)
    nothing = torch.full(shape, torch.inf)
    for old in (None, nothing):
        loss, metrics = rlk.policy_loss(
            logp,
            old,
            nothing,
            torch.zeros(shape),
            rollout_logprobs=nothing,
            log_ratio_clamp=1.0,
            log_ratio_sq_coef=0.1,
            return_metrics=True,
        )
        assert loss == 0 and not torch.autograd.grad(loss, logp)[0].any()
        assert all(x == 0 for x in metrics.values()), metrics


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.floats(-3, 3), st.floats(0.05, 2.0), st.sampled_from(ALONE))
def test_a_common_shift_of_both_policies_changes_nothing(shift, bound, name):
    """An objective of the log-ratio alone, and its clamp."""
    d = {name: x.double() if x.is_floating_point() else x for name, x in batch().items()}
    losses = [
        rlk.policy_loss(
            d["logp"] + s,
            d["old"] + s,
            d["advantages"],
            d["mask"],
            objective=name,
            log_ratio_clamp=bound,
            **PARAMS[name],
        )
        for s in (0.0, shift)
    ]
    torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-12)


def test_how_an_objective_depends_on_its_log_ratio_is_read_in_its_source():
    assert [name for name in PARAMS if log_ratio(OBJECTIVES[name]) == ("old_logp", "alone")] == [
        "ppo_clip",
        "dual_clip",
        "sapo",
        "surrogate",
        "ppo_clip_cap",
    ]
    assert log_ratio(OBJECTIVES["rollout_is"]) == ("rollout_logp", "weight")

    @objective
    def with_a_probability(logp, old_logp, advantage):
        "The ratio, and the log-probability itself."
        return -advantage * (logp - old_logp) * logp, -advantage * (2.0 * logp - old_logp)

    assert log_ratio(OBJECTIVES.pop("with_a_probability")) is None


X = torch.zeros(2, 3)
WRONG = [
    ({"log_ratio_clamp": (1, 2, 3)}, ValueError, r"log_ratio_clamp must be a number or a pair \(low, high\)"),
    ({"log_ratio_clamp": (1.0, -1.0)}, ValueError, "log_ratio_clamp must be a pair low < high"),
    ({"log_ratio_clamp": (torch.nan, 1.0)}, ValueError, "log_ratio_clamp must be a pair low < high"),
    ({"log_ratio_clamp": -1.0}, ValueError, "log_ratio_clamp must be positive"),
    ({"log_ratio_clamp": "20"}, TypeError, "log_ratio_clamp must be a number, got str"),
    ({"log_ratio_clamp": 20, "objective": "dppo_tv"}, ValueError, "'dppo_tv' depends on its log-probabilities in"),
    (
        {"log_ratio_clamp": 20, "objective": "reinforce"},
        ValueError,
        "log_ratio_clamp needs an objective of a log-ratio",
    ),
    ({"ratio_denominator": "engine"}, ValueError, "ratio_denominator must be one of .*old.*rollout"),
    ({"ratio_denominator": "rollout"}, ValueError, "ratio_denominator='rollout' needs rollout_logprobs"),
    (
        {"ratio_denominator": "rollout", "rollout_logprobs": X, "objective": "reinforce"},
        ValueError,
        "needs an objective with the column 'old_logp'",
    ),
    ({"log_ratio_sq_coef": 0.1}, ValueError, "log_ratio_sq_coef needs rollout_logprobs"),
    ({"log_ratio_sq_coef": torch.inf}, ValueError, "log_ratio_sq_coef must be finite"),
    ({"log_ratio_sq_coef": 0.1, "rollout_logprobs": X[0]}, ValueError, "rollout_logprobs"),
    ({"rollout_logprobs": X}, ValueError, "rollout_logprobs would have no effect"),
    ({"objective": "ref_kl", "rollout_logprobs": X, "ref_logprobs": X}, ValueError, "advantages would have no effect"),
    ({"reduction": "mean"}, ValueError, "reduction must be one of .*aggregation.*none"),
    ({"reduction": "none", "weights": X}, ValueError, "reduction='none' weighs no token"),
    ({"reduction": "none", "aggregation": "token-sum"}, ValueError, "reduction='none' weighs no token"),
    (
        {"reduction": "none", "kl": rlk.KLTerm("k3", weights=X), "kl_coef": 0.1, "ref_logprobs": X},
        ValueError,
        "leave out kl.weights",
    ),
    ({"objective": "dro"}, TypeError, "'dro' needs 'beta'"),
    ({"objective": "ppo_clip_cap", "ratio_cap": 0.0}, ValueError, "ratio_cap must be positive"),
    ({"objective": "dppo_kl", "delta_low": -0.1}, ValueError, "delta_low must be >= 0"),
]


@pytest.mark.parametrize("options,error,message", WRONG)
def test_what_an_option_cannot_mean_raises(options, error, message):
    with pytest.raises(error, match=message):
        rlk.policy_loss(X, X, X, **options)
    with pytest.raises(error, match=message):
        rlk.logits_policy_loss(X[..., None].expand(2, 3, 4), X.long(), X, X, **options)
    with pytest.raises(error, match=message):
        rlk.linear_policy_loss(torch.zeros(2, 3, 5), torch.zeros(4, 5), X.long(), X, X, **options)


@pytest.mark.parametrize("name", [name for name in PARAMS if name not in (*WEIGHTS, "dppo_tv", "dppo_kl")])
def test_the_derivative_is_that_of_differences(name):
    """fp64, by gradcheck, where the loss is differentiated through its ratio; a constant weight has no such check."""
    d = problem()
    m, old = d["mask"], d["old"]
    leaf = (torch.nan_to_num(old) + 0.1).requires_grad_()

    def loss(x):
        return rlk.policy_loss(x, old, d["advantages"], m, objective=name, **PARAMS[name])

    assert torch.autograd.gradcheck(loss, leaf)


@pytest.mark.parametrize("correction", ({"high": 2.0}, rlk.Correction(mode="mask", high=2.0)), ids=("dict", "object"))
def test_the_mismatch_is_not_corrected_by_the_ratio_and_by_weights(correction):
    x, advantages = -torch.ones(2, 3), torch.ones(2)
    with pytest.raises(ValueError, match="each correct the mismatch"):
        rlk.policy_loss(x, x, advantages, rollout_logprobs=x, ratio_denominator="rollout", correction=correction)
    factors = torch.full((2, 3), 0.5)  # the caller's own stand
    loss = rlk.policy_loss(x, x, advantages, rollout_logprobs=x, ratio_denominator="rollout", correction=factors)
    assert loss.item() == -0.5
