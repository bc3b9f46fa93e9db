"""Values and gradients of every loss against float64."""

import oracles
import pytest
import torch
from loss_batches import LEVELS, PARAMS, B, batch, true_loss, truth_of
from reference import draw_rows, gradient_allowance, same_bits, statistics

import rlkernels as rlk
from rlkernels.backends import absent, use_backend
from rlkernels.objectives import OBJECTIVES, clip, exp, objective, where


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize("name", PARAMS)
def test_policy_loss_and_its_gradients_equal_the_truth(name, kl, backend):
    d = batch()
    logp, entropy = d["logp"].clone().requires_grad_(), d["entropy"].clone().requires_grad_()
    loss = rlk.policy_loss(
        logp,
        d["old"],
        d["advantages"],
        d["mask"],
        objective=name,
        ref_logprobs=d["ref"],
        kl=kl,
        kl_coef=0.3,
        entropy=entropy,
        entropy_coef=0.1,
        **PARAMS[name],
    )
    wide = [x.detach().double().requires_grad_() for x in (logp, entropy)]
    expected = true_loss(name, d, *wide, kl, 0.3, 0.1)
    assert loss.item() == pytest.approx(expected.item(), rel=2e-6, abs=2e-7)
    got, truth = torch.autograd.grad(1.7 * loss, (logp, entropy)), torch.autograd.grad(1.7 * expected, wide)
    for a, b in zip(got, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=4e-6, atol=2e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
# Not DRO, because its derivative is a difference that cancels: a bound relative to the derivative does not hold there.
@pytest.mark.parametrize("name", [name for name in PARAMS if name != "dro"])
def test_logits_policy_loss_and_its_gradient_equal_the_truth(name, dtype, backend):
    d = batch(shape=(3, 5))
    x, targets, vocab_mask = draw_rows((3, 5), 1037, dtype)
    t = torch.rand(3, 5, generator=torch.Generator().manual_seed(3)) + 0.5
    options = {"temperature": t, "vocab_mask": vocab_mask}
    with torch.no_grad():
        logp = statistics(x, targets, **options)["logprobs"].float()
    d["old"], d["ref"], d["mask"] = (
        logp + d["old"] - d["logp"],
        logp + d["ref"] - d["logp"],
        d["mask"] & (targets != -100),
    )
    leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    loss = rlk.logits_policy_loss(
        leaf,
        targets,
        d["old"],
        d["advantages"],
        d["mask"],
        objective=name,
        ref_logprobs=d["ref"],
        kl_coef=0.3,
        entropy_coef=0.1,
        **options,
        **PARAMS[name],
    )
    found = statistics(wide, targets, **options)
    expected = true_loss(name, d, found["logprobs"], found["entropy"], "k3", 0.3, 0.1)
    assert loss.item() == pytest.approx(expected.item(), rel=4e-6)
    # An upstream gradient of exactly 1 takes over what the forward made; any other computes it.
    dlogp, dentropy = torch.autograd.grad(expected, (found["logprobs"], found["entropy"]), retain_graph=True)
    for g in (1.0, -1.7):
        (got,) = torch.autograd.grad(loss, leaf, torch.tensor(g), retain_graph=True)
        (want,) = torch.autograd.grad(expected, wide, torch.tensor(g, dtype=torch.float64), retain_graph=True)
        upstream = {"logprobs": 1.7 * dlogp, "entropy": 1.7 * dentropy}
        # The derivative is rounded once, and follows a log-probability that is exact to 2 units in its last place.
        allowed = (
            gradient_allowance(upstream, x, targets, **options)
            + 8e-6 * want.abs()
            + 4e-6 * (dlogp.abs() / t)[..., None]
        )
        low, high = (want - allowed).to(dtype), (want + allowed).to(dtype)
        assert ((low <= got) & (got <= high)).all()
        assert not got[~d["mask"]].any()


@pytest.mark.skipif(absent("cpu") is not None, reason=f"the native CPU backend is absent: {absent('cpu')}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_fused_gradient_has_the_bits_of_the_two_passes(dtype):
    d = batch(shape=(3, 5))
    x, targets, vocab_mask = draw_rows((3, 5), 533, dtype)
    old = rlk.token_logprobs(x, targets, vocab_mask=vocab_mask) + 0.1 * d["old"]
    with use_backend("cpu"):
        leaf = x.clone().requires_grad_()
        stats = rlk.token_stats(leaf, targets, vocab_mask=vocab_mask)
        logp, entropy = stats.logprobs.detach().requires_grad_(), stats.entropy.detach().requires_grad_()
        parts = rlk.policy_loss(
            logp, old, d["advantages"].to(old.dtype), d["mask"] & (targets != -100), entropy=entropy, entropy_coef=0.1
        )
        (expected,) = torch.autograd.grad(
            (stats.logprobs, stats.entropy), leaf, torch.autograd.grad(parts, (logp, entropy))
        )
        fused = rlk.logits_policy_loss(
            leaf, targets, old, d["advantages"].to(old.dtype), d["mask"], vocab_mask=vocab_mask, entropy_coef=0.1
        )
        (held,) = torch.autograd.grad(fused, leaf, retain_graph=True)
        (again,) = torch.autograd.grad(fused, leaf)
    assert same_bits(held, expected) and same_bits(again, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_users_objective_is_fused_on_every_backend(dtype, backend):
    @objective
    def my_ppo(logp, old_logp, advantage, low, high):
        """PPO under another name, which no backend has compiled in."""
        ratio = exp(logp - old_logp)
        free = ratio * advantage
        held = clip(ratio, 1.0 - low, 1.0 + high) * advantage
        return -where(held < free, held, free), -where(held < free, 0.0, free)

    d = batch(shape=(3, 5))
    x, targets, _ = draw_rows((3, 5), 133, dtype)
    old = rlk.token_logprobs(x, targets) + 0.1 * d["old"]
    try:
        results = []
        for name, params in (("my_ppo", {"low": 0.2, "high": 0.28}), ("ppo_clip", PARAMS["ppo_clip"])):
            leaf = x.clone().requires_grad_()
            loss = rlk.logits_policy_loss(
                leaf,
                targets,
                old,
                d["advantages"],
                d["mask"],
                objective=name,
                ref_logprobs=d["ref"],
                kl_coef=0.1,
                entropy_coef=0.1,
                **params,
            )
            results.append((loss, *torch.autograd.grad(loss, leaf, torch.tensor(1.7))))
        torch.testing.assert_close(*(r[0] for r in results), rtol=2e-6, atol=1e-7)
        torch.testing.assert_close(*(r[1] for r in results), rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-7)
    finally:
        del OBJECTIVES["my_ppo"]


@pytest.mark.parametrize("name", ["ppo_clip", "sapo"])
@pytest.mark.parametrize("level", LEVELS)
def test_sequence_ratios_equal_the_truth(level, name, backend):
    d = batch()
    logp, wide = d["logp"].clone().requires_grad_(), d["logp"].double().requires_grad_()
    advantages = d["advantages"][:, 0]
    loss = rlk.policy_loss(
        logp,
        d["old"],
        advantages,
        d["mask"],
        ratio_level=level,
        aggregation="seq-mean-token-mean",
        objective=name,
        **PARAMS[name],
    )
    rows = []
    for i in range(B):
        m = d["mask"][i]
        now, old, a = wide[i][m], d["old"][i][m].double(), advantages[i].double()
        if level == "token":
            rows.append(truth_of(name, now, old, a.expand_as(now)).mean())
        elif level == "sequence_token":  # GSPO-token: the value of the sequence's ratio, a gradient per token
            rows.append(truth_of(name, now, now.detach() - (now.detach() - old).mean(), a.expand_as(now)).mean())
        else:
            reduce = torch.sum if level == "sequence_sum" else torch.mean
            rows.append(truth_of(name, reduce(now), reduce(old), a))
    expected = torch.stack(rows).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=2e-6)
    got, want = torch.autograd.grad(1.7 * loss, logp)[0], torch.autograd.grad(1.7 * expected, wide)[0]
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=2e-8)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_pair_losses_and_their_gradients_equal_the_truth(smoothing, backend):
    a, b, c, e = (3 * torch.randn(9, generator=torch.Generator().manual_seed(k)) for k in range(4))

    def ours(a, b, c):
        return rlk.dpo_loss(
            a, b, c.detach(), e.to(a.dtype), beta=0.3, label_smoothing=smoothing
        ) + 1.3 * rlk.pairwise_reward_loss(a, b, margin=c, center_coef=0.1)

    def truth(a, b, c):
        margin = (a - c.detach()) - (b - e.double())
        return oracles.dpo_sigmoid(margin, 0.3, smoothing).mean() + 1.3 * (
            oracles.pairwise(a - b - c).mean() + 0.1 * (a + b).square().mean()
        )

    narrow, wide = [x.clone().requires_grad_() for x in (a, b, c)], [x.double().requires_grad_() for x in (a, b, c)]
    got, expected = ours(*narrow), truth(*wide)
    assert got.item() == pytest.approx(expected.item(), rel=2e-6)
    for x, y in zip(torch.autograd.grad(got, narrow), torch.autograd.grad(expected, wide), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=4e-6, atol=1e-7)


@pytest.mark.parametrize("clip_range", [None, 0.2])
def test_value_loss_and_its_gradient_equal_the_truth(clip_range, backend):
    d = batch()
    values, wide = d["logp"].clone().requires_grad_(), d["logp"].double().requires_grad_()
    loss, metrics = rlk.value_loss(values, d["old"], d["ref"], d["mask"], clip_range=clip_range, return_metrics=True)
    m = d["mask"]
    v, old, r = wide[m], d["old"].double()[m], d["ref"].double()[m]
    expected = (oracles.value_plain(v, r) if clip_range is None else oracles.value_clip(v, old, r, clip_range)).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=2e-6)
    torch.testing.assert_close(
        torch.autograd.grad(1.7 * loss, values)[0].double(),
        torch.autograd.grad(1.7 * expected, wide)[0],
        rtol=4e-6,
        atol=2e-8,
    )
    assert metrics["error"].item() == pytest.approx((v - r).square().mean().item(), rel=2e-6)
    if clip_range is not None:
        held = (old + (v - old).clamp(-0.2, 0.2) - r).square() > (v - r).square()
        assert metrics["clip_fraction"].item() == pytest.approx(held.double().mean().item())
