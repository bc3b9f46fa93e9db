"""Factors of a policy loss: corrections of the rollout mismatch, the off-policy mask, the largest entropies."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rlkernels as rlk
from rlkernels import Correction
from rlkernels.objectives import OBJECTIVES, exp, objective

B, L, V, H = 4, 5, 9, 6
CU = [0, 5, 10, 15, 20]


def problem(seed=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    d = {"hidden": randn(B, L, H), "head": randn(V, H), "targets": torch.randint(0, V, (B, L), generator=draw)}
    logits = d["hidden"] @ d["head"].T
    d["logp"] = logits.log_softmax(-1).gather(-1, d["targets"][..., None])[..., 0]
    d["entropy"] = torch.special.entr(logits.softmax(-1)).sum(-1)
    for name, width in (("old", 0.3), ("rollout", 0.8), ("ref", 0.5)):
        d[name] = d["logp"] + width * randn(B, L)
    d["rollout"][1, 2] = float("nan")  # the engine could not score it
    d["advantages"] = torch.tensor([0.7, -1.3, 0.4, -0.6]).to(dtype)
    d["mask"] = torch.rand(B, L, generator=draw) < 0.75
    d["mask"][:, 0], d["mask"][1, 2] = True, True
    return d


def log_ratio(d, of="old"):
    q = torch.where(d["rollout"].isnan(), 0.0, d[of].double() - d["rollout"].double())
    return torch.where(d["mask"], q, 0.0)


def factor(d, name, logp):
    """What multiplies a token's loss, by hand."""
    q, mask = log_ratio(d), d["mask"]
    count = mask.sum(-1, keepdim=True)
    if name == "tis":
        return q.exp().clamp(0.5, 2.0)
    if name == "icepop":
        return torch.where((q.exp() >= 0.5) & (q.exp() <= 2.0), q.exp(), 0.0)
    if name == "masked sequences":
        mean = (q.sum(-1, keepdim=True) / count).exp()
        return torch.where((mean >= 0.8) & (mean <= 1.3), q.exp(), 0.0)
    if name == "sequence":
        return q.sum(-1, keepdim=True).exp().clamp(max=3.0).expand_as(q)
    if name == "normalized":
        w = q.exp().clamp(max=2.0)
        return w / (torch.where(mask, w, 0.0).sum() / mask.sum())
    drift = torch.where(mask, d["old"].double() - logp.detach(), 0.0)
    if name == "opsm of the engine":
        drift = torch.where(mask & ~d["rollout"].isnan(), d["rollout"].double() - logp.detach(), 0.0)
    kept = (d["advantages"][:, None] >= 0) | (drift.sum(-1, keepdim=True) / count <= 0.02)
    w = q.exp().clamp(max=2.0) if name == "opsm of the engine" else 1.0
    return torch.where(kept, w, 0.0) * torch.ones_like(q)


CORRECTIONS = {
    "tis": {"low": 0.5, "high": 2.0},
    "icepop": {"mode": "mask", "low": 0.5, "high": 2.0},
    "masked sequences": {"mode": "mask", "gate_level": "sequence_mean", "low": 0.8, "high": 1.3},
    "sequence": {"level": "sequence", "high": 3.0},
    "normalized": {"high": 2.0, "batch_normalize": True},
    "opsm": {"mode": None, "opsm_delta": 0.02},
    "opsm of the engine": {"high": 2.0, "opsm_delta": 0.02},
}


def truth(d, logp, entropy, multiplier, top=None):
    """PPO with KL and entropy terms: a token mean of all live tokens, whatever a factor leaves out."""
    mask, a = d["mask"], d["advantages"].double()[:, None]
    ratio = (logp - d["old"]).exp()
    policy = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a) * multiplier
    gap = d["ref"] - logp
    bonus = entropy if top is None else torch.where(top, entropy, 0.0)
    policy = policy if top is None else torch.where(top, policy, 0.0)
    total = policy + 0.3 * (gap.exp() - 1 - gap) - 0.2 * bonus
    return torch.where(mask, total, 0.0).sum() / mask.sum()


TERMS = {"kl_coef": 0.3, "entropy_coef": 0.2}


def losses(d, **options):
    """``(loss, gradient of hidden states, metrics)`` of the three policy losses, the first one packed, too."""
    hidden = d["hidden"].clone().requires_grad_()
    state, options = (d["old"], d["advantages"], d["mask"]), {"ref_logprobs": d["ref"], **TERMS, **options}
    logits = hidden @ d["head"].T
    logp = logits.log_softmax(-1).gather(-1, d["targets"][..., None])[..., 0]
    entropy = torch.special.entr(logits.softmax(-1)).sum(-1)
    flat = {k: x.view(-1) if isinstance(x, torch.Tensor) and x.shape == (B, L) else x for k, x in options.items()}
    for loss, metrics in (
        rlk.policy_loss(logp, *state, entropy=entropy, return_metrics=True, **options),
        rlk.policy_loss(
            logp.view(-1),
            d["old"].view(-1),
            d["advantages"],
            d["mask"].view(-1),
            entropy=entropy.view(-1),
            cu_seqlens=CU,
            return_metrics=True,
            **flat,
        ),
        rlk.logits_policy_loss(logits, d["targets"], *state, return_metrics=True, **options),
        rlk.linear_policy_loss(hidden, d["head"], d["targets"], *state, return_metrics=True, chunk_tokens=8, **options),
    ):
        yield loss, torch.autograd.grad(loss, hidden, retain_graph=True)[0], metrics


def assert_all(d, want, **options):
    hidden = d["hidden"].clone().requires_grad_()
    logits = hidden @ d["head"].T
    logp = logits.log_softmax(-1).gather(-1, d["targets"][..., None])[..., 0]
    total = want(logp, torch.special.entr(logits.softmax(-1)).sum(-1))
    (slope,) = torch.autograd.grad(total, hidden)
    for k, (loss, got, _) in enumerate(losses(d, **options)):
        torch.testing.assert_close(loss, total, rtol=1e-10, atol=1e-12, msg=lambda m, k=k: f"{k}: {m}")
        torch.testing.assert_close(got, slope, rtol=1e-8, atol=1e-10, msg=lambda m, k=k: f"{k}: {m}")


@pytest.mark.parametrize("name", CORRECTIONS)
def test_a_correction_multiplies_the_policy_term_alone(name, backend):
    d = problem()
    options = {"correction": Correction(**CORRECTIONS[name])}
    if name != "opsm":
        options["rollout_logprobs"] = d["rollout"]
    assert_all(d, lambda logp, h: truth(d, logp, h, factor(d, name, logp)), **options)
    assert_all(
        d, lambda logp, h: truth(d, logp, h, factor(d, name, logp)), **{**options, "correction": CORRECTIONS[name]}
    )


def test_a_tensor_of_factors_multiplies_like_weights_of_the_policy_term(backend):
    d = problem()
    for factors in (rlk.rollout_weights(d["old"], d["rollout"], d["mask"], high=2.0), d["mask"] & (d["old"] > -2.0)):
        assert_all(d, lambda logp, h, w=factors: truth(d, logp, h, w.double()), correction=factors)


def test_the_metrics_of_a_correction_are_those_of_rollout_weights():
    d = problem()
    known = rlk.rollout_weights(d["old"], d["rollout"], d["mask"], high=2.0, return_metrics=True)[1]
    for _, _, metrics in losses(d, rollout_logprobs=d["rollout"], correction=Correction(high=2.0)):
        for name, want in known.items():
            torch.testing.assert_close(metrics[name], want)


@pytest.mark.parametrize("level", ["sequence", "sequence_token"])
def test_the_engine_is_the_denominator_of_the_ratio_of_a_sequence(level, backend):
    d = problem()
    engine = torch.where(d["rollout"].isnan(), d["old"], d["rollout"])
    options = {"ratio_level": level, "aggregation": "seq-mean-token-mean"}
    plain = list(losses({**d, "old": engine}, **options))
    for (loss, got, _), (want, slope, _) in zip(
        losses(d, rollout_logprobs=d["rollout"], correction=Correction(), **options), plain, strict=True
    ):
        torch.testing.assert_close(loss, want, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(got, slope, rtol=1e-10, atol=1e-14)


def test_one_loss_per_sequence_weighs_what_the_factors_of_its_tokens_weigh():
    d = problem()
    w = factor(d, "sequence", d["logp"])[:, 0]
    mask, a = d["mask"], d["advantages"]
    ratio = torch.where(mask, d["logp"] - d["old"], 0.0).sum(-1).exp()
    want = (w * -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)).mean()
    got = rlk.policy_loss(
        d["logp"],
        d["old"],
        a,
        mask,
        ratio_level="sequence_sum",
        rollout_logprobs=d["rollout"],
        correction=Correction(level="sequence", high=3.0),
    )
    torch.testing.assert_close(got, want)


def test_vespo_takes_the_weights_into_its_own_ratio():
    d = problem()
    mask, a = d["mask"], d["advantages"][:, None]
    weights = log_ratio(d).exp().clamp(max=2.0)
    gap = torch.where(mask, d["logp"] - d["old"] + weights.log(), 0.0).sum(-1, keepdim=True)
    k, scale = torch.where(a >= 0, 2.0, 3.0).double(), torch.where(a >= 0, 3.0, 2.0).double()
    phi = (scale + k * gap - scale * gap.exp()).exp()
    want = torch.where(mask, -phi * a * d["logp"], 0.0).sum() / mask.sum()
    call = {"objective": "vespo", "rollout_logprobs": d["rollout"]}
    got = rlk.policy_loss(d["logp"], d["old"], d["advantages"], mask, correction=Correction(high=2.0), **call)
    torch.testing.assert_close(got, want)
    with pytest.raises(ValueError, match="level 'token' alone, got 'sequence'"):
        rlk.policy_loss(d["logp"], d["old"], d["advantages"], correction=Correction(level="sequence"), **call)


@pytest.mark.parametrize("fraction", [0.2, 0.55, 1.0])
def test_policy_term_and_bonus_keep_the_largest_entropies_alone(fraction, backend):
    d = problem()
    quantile = torch.quantile(d["entropy"][d["mask"]], 1 - fraction)
    top = d["mask"] & (d["entropy"] >= quantile)
    assert torch.equal(rlk.top_entropy_mask(d["entropy"], d["mask"], fraction), top)
    assert_all(d, lambda logp, h: truth(d, logp, h, 1.0, top), top_entropy_fraction=fraction)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 30), st.floats(0.01, 1.0), st.integers(0, 99))
def test_the_quantile_is_that_of_torch(count, fraction, seed):
    draw = torch.Generator().manual_seed(seed)
    # Ties, and dead tokens of any value.
    entropy = torch.randint(0, 9, (count,), generator=draw).double() / 4
    mask = torch.rand(count, generator=draw) < 0.7
    dirty = torch.where(mask, entropy, float("nan"))
    got = rlk.top_entropy_mask(dirty, mask, fraction)
    assert not got[~mask].any()
    if mask.any():
        # A quantile that meets a number is met by it: 1 - fraction is rounded in either.
        quantile = torch.quantile(entropy[mask], 1 - fraction)
        near = (entropy - quantile).abs() < 1e-9
        assert torch.equal(got | near, mask & (entropy >= quantile) | near)
        assert got.sum() >= 1


def test_the_mask_of_entropies_in_odd_inputs():
    nan = float("nan")
    assert rlk.top_entropy_mask(torch.zeros(0, 3), None, 0.5).shape == (0, 3)
    assert not rlk.top_entropy_mask(torch.ones(2, 3), torch.zeros(2, 3), 0.5).any()
    # NaN counts as the largest and stays, so that the loss shows it.
    assert rlk.top_entropy_mask(torch.tensor([nan, 1.0, 2.0, 3.0]), None, 0.5).tolist() == [True, False, False, True]
    half = rlk.top_entropy_mask(torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.bfloat16).T, None, 0.5)
    assert half.tolist() == [[False, True], [False, True]]
    for fraction in (0.0, 1.5, nan):
        with pytest.raises(ValueError, match="^top_entropy_mask: fraction must be"):
            rlk.top_entropy_mask(torch.ones(3), None, fraction)


def test_factors_of_16_bits_and_what_dead_tokens_hold():
    for dtype in (torch.bfloat16, torch.float32):
        d = problem(dtype=dtype)
        found = []
        for value in (None, float("nan"), float("inf")):
            x = dict(d)
            if value is not None:
                x |= {k: torch.where(d["mask"], d[k], value) for k in ("logp", "old", "rollout", "entropy")}
            leaf = x["logp"].clone().requires_grad_()
            loss = rlk.policy_loss(
                leaf,
                x["old"],
                d["advantages"],
                d["mask"],
                rollout_logprobs=x["rollout"],
                correction=Correction(high=2.0, opsm_delta=0.02),
                entropy=x["entropy"],
                top_entropy_fraction=0.5,
            )
            found.append((loss, torch.autograd.grad(loss, leaf)[0]))
            assert loss.dtype == torch.float32 and loss.isfinite()
        assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))
        empty = rlk.policy_loss(
            d["logp"],
            d["old"],
            d["advantages"],
            torch.zeros(B, L),
            rollout_logprobs=d["rollout"],
            correction=Correction(high=2.0, batch_normalize=True),
        )
        assert empty == 0


X, A = torch.zeros(2, 3), torch.ones(2)
BAD = {
    "without a correction": ({"rollout_logprobs": X}, ValueError, "rollout_logprobs would have no effect"),
    "without the engine": ({"correction": Correction()}, ValueError, "mode 'clip' needs rollout_logprobs"),
    "nothing": ({"correction": Correction(mode=None)}, ValueError, "needs opsm_delta"),
    "an option of weights": (
        {"correction": Correction(mode=None, high=2.0, opsm_delta=0.1)},
        ValueError,
        "makes no weights, so it takes no high",
    ),
    "an unknown option": ({"correction": {"hihg": 2.0}}, ValueError, "unknown 'hihg'.*did you mean high"),
    "a mode": (
        {"correction": Correction(mode="drop"), "rollout_logprobs": X},
        ValueError,
        "correction: mode must be one of",
    ),
    "bounds": (
        {"correction": Correction(low=3.0, high=2.0), "rollout_logprobs": X},
        ValueError,
        "correction: low must not be above high",
    ),
    "a name": ({"correction": "tis"}, TypeError, "must be a Correction, a dict of its options, or a tensor"),
    "factors and engine": ({"correction": X, "rollout_logprobs": X}, ValueError, "leave rollout_logprobs out"),
    "shape": ({"correction": X[:, :2]}, ValueError, "correction has shape"),
    "shape of the engine": (
        {"correction": Correction(), "rollout_logprobs": X[:, :2]},
        ValueError,
        "rollout_logprobs has shape",
    ),
    "integers": ({"correction": X.long()}, TypeError, "correction has dtype torch.int64"),
    "gspo": (
        {"correction": Correction(high=2.0), "rollout_logprobs": X, "ratio_level": "sequence"},
        ValueError,
        "takes no high; for weights beside the ratio",
    ),
    "delta": (
        {"correction": Correction(mode=None, opsm_delta=-1.0)},
        ValueError,
        "correction: opsm_delta must be finite",
    ),
    "fraction": ({"top_entropy_fraction": 0.0, "entropy": X}, ValueError, "top_entropy_fraction must be positive"),
    "entropy": ({"top_entropy_fraction": 0.5}, ValueError, "top_entropy_fraction needs entropy"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_factors_are_refused_by_name(name):
    options, error, message = BAD[name]
    with pytest.raises(error, match=f"^policy_loss: .*{message}"):
        rlk.policy_loss(X, X, A, **options)
    logits, targets = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)
    if name != "entropy":
        options = {k: x for k, x in options.items() if k != "entropy"}
        with pytest.raises(error, match=f"^logits_policy_loss: .*{message}"):
            rlk.logits_policy_loss(logits, targets, X, A, **options)
        with pytest.raises(error, match=f"^linear_policy_loss: .*{message}"):
            rlk.linear_policy_loss(logits, torch.zeros(5, 4), targets, X, A, **options)


def test_the_weights_of_a_loss_in_float64_have_its_digits():
    d = problem()
    narrow = {k: d[k].float() for k in ("old", "rollout")}
    got = rlk.policy_loss(
        d["logp"],
        narrow["old"],
        d["advantages"],
        d["mask"],
        rollout_logprobs=narrow["rollout"],
        correction=Correction(high=2.0),
    )
    d |= {k: x.double() for k, x in narrow.items()}
    a, ratio = d["advantages"][:, None], (d["logp"] - d["old"]).exp()
    want = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a) * log_ratio(d).exp().clamp(max=2.0)
    torch.testing.assert_close(got, torch.where(d["mask"], want, 0.0).sum() / d["mask"].sum(), rtol=1e-12, atol=0)


def test_an_objective_without_old_log_probabilities_takes_factors():
    got = rlk.policy_loss(X - 1.0, None, A, objective="reinforce", correction=torch.full((2, 3), 0.5))
    assert got.item() == pytest.approx(0.5)
    with pytest.raises(ValueError, match="correction needs old_logprobs"):
        rlk.policy_loss(X, None, A, objective="reinforce", correction=Correction(), rollout_logprobs=X)
    with pytest.raises(ValueError, match="opsm_delta needs an objective of advantages"):
        rlk.policy_loss(
            X,
            X,
            None,
            objective="a2po",
            ref_logprobs=X,
            rewards=A,
            value_pool=X,
            correction=Correction(mode=None, opsm_delta=0.1),
        )


@pytest.mark.parametrize("terms", [{}, {"entropy_coef": 0.1}, {"kl_coef": 0.1}])
def test_metrics_count_the_tokens_that_a_correction_leaves_out(terms, backend):
    d = problem(5)
    kept = torch.rand(B, L, generator=torch.Generator().manual_seed(1)) < 0.5
    options = {"correction": kept, "ref_logprobs": d["ref"], "return_metrics": True, **terms}
    given = d["old"], d["advantages"], d["mask"]
    _, want = rlk.policy_loss(d["logp"], *given, **{**options, "entropy": d["entropy"]})
    ratio = (d["logp"] - d["old"]).exp()[d["mask"]]
    torch.testing.assert_close(want["ratio"], ratio.mean(), rtol=1e-9, atol=0)
    for function, model in (
        (rlk.logits_policy_loss, (d["hidden"] @ d["head"].T,)),
        (rlk.linear_policy_loss, (d["hidden"], d["head"])),
    ):
        _, got = function(*model, d["targets"], *given, **options)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("level", ["sequence", "sequence_token"])
def test_the_engine_takes_the_column_of_the_behaviour_policy_wherever_it_stands(level):
    @objective
    def advantage_first(logp, advantage, old_logp):
        """``-rho A``. A test."""
        gain = exp(logp - old_logp) * advantage
        return -gain, -gain

    @objective
    def of_the_reference(logp, advantage, ref_logp):
        """``-A log pi``. A test."""
        return -advantage * logp + 0.0 * ref_logp, -advantage

    d = problem(6)
    given = d["logp"], d["old"], d["advantages"], d["mask"]
    options = {"rollout_logprobs": d["rollout"], "correction": {}, "ratio_level": level}
    try:
        want, got = (rlk.policy_loss(*given, objective=x, **options) for x in ("surrogate", advantage_first))
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
        with pytest.raises(ValueError, match="correction with ratio_level .* needs an objective with the column"):
            rlk.policy_loss(*given, objective="of_the_reference", ref_logprobs=d["ref"], **options)
    finally:
        for name in ("advantage_first", "of_the_reference"):
            OBJECTIVES.pop(name, None)


def test_options_that_would_have_no_effect_are_refused():
    d = problem(7)
    given = d["logp"], d["old"], d["advantages"], d["mask"]
    with pytest.raises(ValueError, match="correction of mode None makes no weights, so it takes no nan_ratio"):
        rlk.policy_loss(*given, correction={"mode": None, "opsm_delta": 0.1, "nan_ratio": 0.5})
    with pytest.raises(ValueError, match="clip_cov_low must not be above clip_cov_high, got 5.0 and 1.0"):
        rlk.policy_loss(*given, objective="clip_cov", clip_cov_low=5.0, clip_cov_high=1.0)


@pytest.mark.parametrize(("count", "fraction", "kept"), [(26, 0.4, 11), (51, 0.7, 36), (96, 0.4, 39), (91, 0.3, 28)])
def test_the_token_at_the_quantile_stays_although_its_place_is_rounded(count, fraction, kept):
    for dtype in (torch.float32, torch.float64):
        entropy = torch.linspace(0.1, 2.0, count, dtype=dtype)
        assert rlk.top_entropy_mask(entropy, None, fraction).sum() == kept
        assert rlk.top_entropy_mask(entropy, None, torch.tensor(fraction)).sum() == kept
