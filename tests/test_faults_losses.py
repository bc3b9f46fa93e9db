"""Faults of losses: values and gradients against float64, nothing from masked places, no normaliser that drifts, the sign, the ends of the range."""
import math

import oracles
import pytest
import torch
from reference import cotangents, draw_rows, gradient_allowance, same_bits, statistics

import rlkernels as rlk
from rlkernels.backends import BACKENDS, absent, use_backend
from rlkernels.objectives import OBJECTIVES, clip, exp, objective, where

NAN, INF = math.nan, math.inf
PRESENT = [name for name in BACKENDS if absent(name) is None]
PARAMS = {"ppo_clip": {"clip_low": 0.2, "clip_high": 0.28}, "dual_clip": {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 2.0},
          "cispo": {"clip_low": 1.0, "clip_high": 0.5}, "sapo": {"tau_pos": 1.0, "tau_neg": 1.05}, "reinforce": {}}
LEVELS = ("token", "sequence", "sequence_token", "sequence_sum")
# A sum per sequence is averaged over sequences and takes no other aggregation.
AGGREGATED = [(level, a) for level in LEVELS for a in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "token-sum")
              if level != "sequence_sum" or a == "token-mean"]
B, L = 3, 6


@pytest.fixture(params=PRESENT)
def backend(request):
    with use_backend(request.param):
        yield request.param


def batch(seed=0, shape=(B, L)):
    """Log-probabilities as float32, a mask with holes; ratios from 0.3 to 3, so that every branch of every clip is taken."""
    draw = torch.Generator().manual_seed(seed)
    logp = -3 * torch.rand(shape, generator=draw) - 0.1
    d = {"logp": logp, "old": logp + 0.5 * torch.randn(shape, generator=draw), "ref": logp + 0.5 * torch.randn(shape, generator=draw),
         "advantages": torch.randn(shape, generator=draw), "entropy": 2 * torch.rand(shape, generator=draw),
         "mask": torch.rand(shape, generator=draw) < 0.7}
    d["mask"][..., 1] = True
    return d


def truth_of(name, logp, old, advantages):
    arguments = (logp, advantages) if name == "reinforce" else (logp, old, advantages)
    return getattr(oracles, name)(*arguments, **PARAMS[name])


def true_loss(name, d, logp, entropy, kl, kl_coef, entropy_coef):
    """Token mean in float64, in autograd, from the oracles."""
    mask = d["mask"]
    loss = truth_of(name, logp[mask], d["old"].double()[mask], d["advantages"].double()[mask])
    loss = loss + kl_coef * getattr(oracles, kl)(logp[mask], d["ref"].double()[mask])
    return (loss - entropy_coef * entropy[mask]).mean()


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize("name", PARAMS)
def test_policy_loss_and_its_gradients_equal_the_truth(name, kl, backend):
    d = batch()
    logp, entropy = d["logp"].clone().requires_grad_(), d["entropy"].clone().requires_grad_()
    loss = rlk.policy_loss(logp, d["old"], d["advantages"], d["mask"], objective=name, ref_logprobs=d["ref"], kl=kl, kl_coef=0.3, entropy=entropy,
                           entropy_coef=0.1, **PARAMS[name])
    wide = [x.detach().double().requires_grad_() for x in (logp, entropy)]
    expected = true_loss(name, d, *wide, kl, 0.3, 0.1)
    assert loss.item() == pytest.approx(expected.item(), rel=2e-6, abs=2e-7)
    got, truth = torch.autograd.grad(1.7 * loss, (logp, entropy)), torch.autograd.grad(1.7 * expected, wide)
    for a, b in zip(got, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=4e-6, atol=2e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PARAMS)
def test_logits_policy_loss_and_its_gradient_equal_the_truth(name, dtype, backend):
    d = batch(shape=(3, 5))
    x, targets, vocab_mask = draw_rows((3, 5), 1037, dtype)
    t = torch.rand(3, 5, generator=torch.Generator().manual_seed(3)) + 0.5
    options = {"temperature": t, "vocab_mask": vocab_mask}
    with torch.no_grad():
        logp = statistics(x, targets, **options)["logprobs"].float()
    d["old"], d["ref"], d["mask"] = logp + d["old"] - d["logp"], logp + d["ref"] - d["logp"], d["mask"] & (targets != -100)
    leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    loss = rlk.logits_policy_loss(leaf, targets, d["old"], d["advantages"], d["mask"], objective=name, ref_logprobs=d["ref"], kl_coef=0.3,
                                  entropy_coef=0.1, **options, **PARAMS[name])
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
        allowed = gradient_allowance(upstream, x, targets, **options) + 8e-6 * want.abs() + 4e-6 * (dlogp.abs() / t)[..., None]
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
        parts = rlk.policy_loss(logp, old, d["advantages"].to(old.dtype), d["mask"] & (targets != -100), entropy=entropy, entropy_coef=0.1)
        (expected,) = torch.autograd.grad((stats.logprobs, stats.entropy), leaf, torch.autograd.grad(parts, (logp, entropy)))
        fused = rlk.logits_policy_loss(leaf, targets, old, d["advantages"].to(old.dtype), d["mask"], vocab_mask=vocab_mask, entropy_coef=0.1)
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
            loss = rlk.logits_policy_loss(leaf, targets, old, d["advantages"], d["mask"], objective=name, ref_logprobs=d["ref"], kl_coef=0.1,
                                          entropy_coef=0.1, **params)
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
    aggregation = "token-mean" if level == "sequence_sum" else "seq-mean-token-mean"
    advantages = d["advantages"][:, 0]
    loss = rlk.policy_loss(logp, d["old"], advantages, d["mask"], ratio_level=level, aggregation=aggregation, objective=name, **PARAMS[name])
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


@pytest.mark.parametrize("level,aggregation", AGGREGATED)
def test_F23_no_live_token_gives_loss_zero_with_zero_gradients(level, aggregation, backend):
    d = batch()
    x, targets, _ = draw_rows((B, L), 37)
    nothing = torch.zeros(B, L)
    poisoned = [torch.full((B, L), NAN)] * 2
    logp, entropy, leaf, value = (y.requires_grad_() for y in (torch.full((B, L), NAN), torch.full((B, L), NAN), torch.full_like(x, NAN), poisoned[0].clone()))
    options = {"ref_logprobs": poisoned[0], "kl_coef": 0.1, "entropy_coef": 0.1, "aggregation": aggregation, "ratio_level": level}
    losses = [(rlk.policy_loss(logp, *poisoned, nothing, entropy=entropy, **options), logp),
              (rlk.logits_policy_loss(leaf, targets, *poisoned, nothing, **options), leaf),
              (rlk.logits_policy_loss(leaf, torch.full_like(targets, -100), d["old"], d["advantages"], **options | {"ref_logprobs": d["ref"]}), leaf),
              (rlk.value_loss(value, *poisoned, nothing, clip_range=0.2, aggregation=aggregation), value)]
    for loss, source in losses:
        assert loss.item() == 0.0
        (gradient,) = torch.autograd.grad(loss, source)
        assert gradient.shape == source.shape and not gradient.any()


def test_F23_no_pair_gives_loss_zero(backend):
    a, b = torch.empty(0, requires_grad=True), torch.empty(0)
    for loss in (rlk.pairwise_reward_loss(a, b, center_coef=0.1), rlk.dpo_loss(a, b, b, b)):
        assert loss.item() == 0.0
        assert torch.autograd.grad(loss, a)[0].shape == (0,)


@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 3e38])
@pytest.mark.parametrize("level", LEVELS)
def test_F26_F81_garbage_at_masked_tokens_changes_neither_loss_nor_gradient_nor_metric(level, garbage, backend):
    d = batch()
    mask = d["mask"]

    def run(d, weights):
        logp, entropy = (d[k].clone().requires_grad_() for k in ("logp", "entropy"))
        loss, metrics = rlk.policy_loss(logp, d["old"], d["advantages"], mask, ref_logprobs=d["ref"], kl_coef=0.1, entropy=entropy, entropy_coef=0.1,
                                        weights=weights, ratio_level=level, return_metrics=True)
        return [loss, *torch.autograd.grad(loss, (logp, entropy)), *metrics.values()]

    for weights in (None, torch.rand(B, L)) if level != "sequence_sum" else (None,):
        clean = run(d, weights)
        dirty = run({k: v if k == "mask" else v.masked_fill(~mask, garbage) for k, v in d.items()},
                    None if weights is None else weights.masked_fill(~mask, garbage))
        for got, expected in zip(dirty, clean, strict=True):
            assert same_bits(got.detach(), expected.detach()) and got.isfinite().all()


@pytest.mark.parametrize("garbage", [NAN, INF, -INF])
@pytest.mark.parametrize("clip_range", [None, 0.2])
def test_F26_garbage_under_the_mask_of_the_value_loss_changes_nothing(clip_range, garbage, backend):
    d = batch()

    def run(values, old, returns):
        values = values.clone().requires_grad_()
        loss, metrics = rlk.value_loss(values, old, returns, d["mask"], clip_range=clip_range, return_metrics=True)
        return [loss, *torch.autograd.grad(loss, values), *metrics.values()]
    columns = [d[k] for k in ("logp", "old", "ref")]
    clean, dirty = run(*columns), run(*(c.masked_fill(~d["mask"], garbage) for c in columns))
    for got, expected in zip(dirty, clean, strict=True):
        assert same_bits(got.detach(), expected.detach()) and got.isfinite().all()


def test_F26_a_dead_row_may_hold_a_nan_advantage(backend):
    d = batch()
    d["mask"][1] = False
    advantages = torch.tensor([1.0, NAN, -0.5])
    for level in LEVELS:
        loss = rlk.policy_loss(d["logp"], d["old"], advantages, d["mask"], ratio_level=level)
        assert same_bits(loss, rlk.policy_loss(d["logp"], d["old"], advantages.nan_to_num(), d["mask"], ratio_level=level)), level


@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("gap", [20.0, 88.0, 200.0, 1e4, -20.0, -88.0, -200.0, -1e4])
@pytest.mark.parametrize("name", PARAMS)
def test_F25_extreme_log_ratios_give_the_true_value_and_no_nan(name, gap, advantage, backend):
    logp, old = torch.tensor([[gap - 1.0]], requires_grad=True), torch.tensor([[-1.0]])
    a = torch.tensor([[advantage]])
    loss = rlk.policy_loss(logp, old, a, objective=name, **PARAMS[name])
    wide = logp.detach().double().requires_grad_()
    expected = truth_of(name, wide, old.double(), a.double()).sum()
    (got,), (want,) = torch.autograd.grad(loss, logp), torch.autograd.grad(expected, wide)
    assert not got.isnan().any() and not loss.isnan()
    assert loss.item() == pytest.approx(expected.float().nan_to_num(nan=0.0, posinf=INF, neginf=-INF).item(), rel=3e-5)  # exp(88) to 88 eps32
    if want.isfinite().all():
        assert got.item() == pytest.approx(want.float().item(), rel=3e-5, abs=1e-37)


@pytest.mark.parametrize("d,value", [(-1000.0, 1000.0), (-90.0, 90.0), (20.0, 2.0611536e-9), (-20.0, 20.0 + 2.0611536e-9), (90.0, 8.1940126e-40), (1e4, 0.0),
                                     (-1e4, 1e4)])
def test_F24_the_tails_of_the_pair_losses_keep_their_digits(d, value, backend):
    chosen = torch.tensor([d / 2], requires_grad=True)
    for loss in (rlk.pairwise_reward_loss(chosen, torch.tensor([-d / 2])), rlk.dpo_loss(chosen, torch.tensor([-d / 2]), reference_free=True, beta=1.0)):
        assert loss.item() == pytest.approx(value, rel=2e-6, abs=1e-44)
        (gradient,) = torch.autograd.grad(loss, chosen)
        slope = -1 / (1 + math.exp(d)) if d < 700 else 0.0
        assert gradient.item() == pytest.approx(slope, rel=2e-6, abs=1.2e-38)  # torch's sigmoid has no subnormal results


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_pair_losses_and_their_gradients_equal_the_truth(smoothing, backend):
    a, b, c, e = (3 * torch.randn(9, generator=torch.Generator().manual_seed(k)) for k in range(4))

    def ours(a, b, c):
        return (rlk.dpo_loss(a, b, c.detach(), e.to(a.dtype), beta=0.3, label_smoothing=smoothing)
                + 1.3 * rlk.pairwise_reward_loss(a, b, margin=c, center_coef=0.1))

    def truth(a, b, c):
        margin = (a - c.detach()) - (b - e.double())
        return (oracles.dpo_sigmoid(margin, 0.3, smoothing).mean()
                + 1.3 * (oracles.pairwise(a - b - c).mean() + 0.1 * (a + b).square().mean()))
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
    torch.testing.assert_close(torch.autograd.grad(1.7 * loss, values)[0].double(), torch.autograd.grad(1.7 * expected, wide)[0], rtol=4e-6, atol=2e-8)
    assert metrics["error"].item() == pytest.approx((v - r).square().mean().item(), rel=2e-6)
    if clip_range is not None:
        held = (old + (v - old).clamp(-0.2, 0.2) - r).square() > (v - r).square()
        assert metrics["clip_fraction"].item() == pytest.approx(held.double().mean().item())


def test_F64_every_metric_is_a_mean_over_live_tokens(backend):
    d = batch()
    m = d["mask"]
    padded = {k: v if k == "mask" else v.masked_fill(~m, 1e6) for k, v in d.items()}
    _, metrics = rlk.policy_loss(padded["logp"], padded["old"], padded["advantages"], m, clip_low=0.2, clip_high=0.28, ref_logprobs=padded["ref"],
                                 entropy=padded["entropy"], return_metrics=True)
    logp, old, ref, a, h = (d[k].double()[m] for k in ("logp", "old", "ref", "advantages", "entropy"))
    ratio = (logp - old).exp()
    low, high = ((ratio < 0.8) & (a < 0)).double().mean(), ((ratio > 1.28) & (a > 0)).double().mean()
    expected = {"ppo_kl": (old - logp).mean(), "approx_kl": ((logp - old).square() / 2).mean(), "ratio": ratio.mean(), "clip_fraction_low": low,
                "clip_fraction_high": high, "clip_fraction": low + high, "kl": ((ref - logp).exp() - 1 - (ref - logp)).mean(), "entropy": h.mean()}
    assert low > 0 and high > 0
    assert metrics.keys() == expected.keys()
    for name, value in metrics.items():
        assert value.item() == pytest.approx(expected[name].item(), rel=2e-6, abs=1e-7), name
        assert not value.requires_grad


def test_F69_an_entropy_bonus_alone_has_its_gradient(backend):
    x, targets, _ = draw_rows((2, 5), 37)
    leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    zero = torch.zeros(2, 5)
    loss = rlk.logits_policy_loss(leaf, targets, rlk.token_logprobs(x, targets), zero, entropy_coef=0.3)
    live = targets != -100
    expected = -0.3 * statistics(wide, targets)["entropy"][live].mean()
    assert loss.item() == pytest.approx(expected.item(), rel=2e-6)
    got, want = torch.autograd.grad(loss, leaf)[0], torch.autograd.grad(expected, wide)[0]
    assert want.abs().max() > 1e-3
    allowed = gradient_allowance({"entropy": torch.full((2, 5), 0.3 / int(live.sum()))}, x, targets)
    assert ((got - want).abs() <= allowed + 4e-6 * want.abs()).all()
    entropy = torch.rand(2, 5, requires_grad=True)
    loss = rlk.policy_loss(zero, zero, zero, entropy=entropy, entropy_coef=0.3)
    torch.testing.assert_close(torch.autograd.grad(loss, entropy)[0], torch.full((2, 5), -0.03))


def test_F71_a_good_action_becomes_more_likely_and_its_gradient_is_the_one_by_hand(backend):
    for a in (1.0, -1.0):
        x = torch.zeros(1, 1, 2, requires_grad=True)
        loss = rlk.logits_policy_loss(x, torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[math.log(0.5)]]), torch.tensor([[a]]))
        assert loss.item() == -a
        (gradient,) = torch.autograd.grad(loss, x)
        assert gradient.flatten().tolist() == pytest.approx([-0.5 * a, 0.5 * a], rel=1e-6)
        after = rlk.token_logprobs(x - 0.1 * gradient, torch.zeros(1, 1, dtype=torch.int64))
        assert (after > math.log(0.5)) == (a > 0)


def test_F73_one_advantage_per_row_belongs_to_the_row_also_in_a_square_batch(backend):
    d = batch(shape=(4, 4))
    per_row = torch.tensor([1.0, -2.0, 0.5, 3.0])
    expected = rlk.policy_loss(d["logp"], d["old"], per_row[:, None].expand(4, 4).contiguous(), d["mask"])
    for advantages in (per_row, per_row[:, None]):
        assert same_bits(rlk.policy_loss(d["logp"], d["old"], advantages, d["mask"]), expected)
    wrong = rlk.policy_loss(d["logp"], d["old"], per_row.expand(4, 4).contiguous(), d["mask"])
    assert abs(wrong.item() - expected.item()) > 1e-2


def test_F74_values_and_gradients_of_the_estimators_against_an_enumerated_vocabulary(backend):
    logits = torch.tensor([0.3, -1.0, 0.8, 0.1, -0.4])
    ref = torch.tensor([-0.2, 0.5, 0.4, -0.9, 0.0]).log_softmax(0)
    words = torch.arange(5)

    def kls(z):
        log_p = z.log_softmax(0)
        return (log_p.exp() * (log_p - ref.double())).sum(), (ref.double().exp() * (ref.double() - log_p)).sum()
    wide = logits.double().requires_grad_()
    forward, reverse = kls(wide)  # KL(pi || ref), KL(ref || pi)
    (forward_gradient,), (reverse_gradient,) = torch.autograd.grad(forward, wide, retain_graph=True), torch.autograd.grad(reverse, wide)
    p = logits.softmax(0)
    gradients = {"k1": torch.zeros(5, dtype=torch.float64), "k2": forward_gradient, "k3": reverse_gradient}
    for kl, expected in gradients.items():
        leaf = logits.clone().requires_grad_()
        # Every word once, weighed by its probability: an expectation over samples.
        loss, = [rlk.policy_loss(rlk.token_logprobs(leaf.expand(5, 5), words)[None], None, torch.zeros(1, 5), objective="reinforce", weights=p[None],
                                 ref_logprobs=ref[None], kl=kl, kl_coef=1.0)]
        if kl != "k2":
            assert loss.item() == pytest.approx(forward.item(), rel=1e-5), f"{kl} is an unbiased value"
        torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0].double(), expected, atol=1e-6, rtol=1e-5)
    leaf = logits.clone().requires_grad_()
    exact = rlk.token_stats(leaf[None], words[:1], ref_logits=ref[None], kl="exact").kl.sum()
    assert exact.item() == pytest.approx(forward.item(), rel=1e-5)
    torch.testing.assert_close(torch.autograd.grad(exact, leaf)[0].double(), forward_gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_F80_losses_over_8192_tokens_of_16_bits_are_summed_in_fp32(dtype, backend):
    draw = torch.Generator().manual_seed(0)
    logp, old, a = ((-torch.rand(2, 4096, generator=draw)).to(dtype) for _ in range(3))
    loss = rlk.policy_loss(logp, old, a, **PARAMS["ppo_clip"])
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(truth_of("ppo_clip", logp.double(), old.double(), a.double()).mean().item(), rel=2e-6)
    value = rlk.value_loss(logp, None, old)
    assert value.item() == pytest.approx(oracles.value_plain(logp.double(), old.double()).mean().item(), rel=2e-6)


def test_F83_a_convention_in_dispute_has_no_default(backend):
    d = batch()
    for given in ({}, {"clip_low": 1.0}, {"clip_high": 0.5}):
        with pytest.raises(TypeError, match="objective 'cispo' needs 'clip_"):
            rlk.policy_loss(d["logp"], d["old"], d["advantages"], objective="cispo", **given)
    # The two bounds are two: swapping them is another loss.
    losses = {rlk.policy_loss(d["logp"], d["old"], d["advantages"], clip_low=low, clip_high=high).item() for low, high in ((0.1, 0.4), (0.4, 0.1))}
    assert len(losses) == 2


@pytest.mark.parametrize("level", LEVELS)
def test_F86_more_padding_changes_no_bit(level, backend):
    d = batch()

    def run(d):
        logp = d["logp"].clone().requires_grad_()
        aggregation = "seq-mean-token-mean" if level == "sequence" else "token-mean"
        loss = rlk.policy_loss(logp, d["old"], d["advantages"], d["mask"], ratio_level=level, aggregation=aggregation, ref_logprobs=d["ref"], kl_coef=0.1)
        return loss, torch.autograd.grad(loss, logp)[0]
    loss, gradient = run(d)
    wide_loss, wide_gradient = run({k: torch.nn.functional.pad(v, (0, 77), value=0) for k, v in d.items()})
    assert wide_loss.item() == pytest.approx(loss.item(), rel=1e-7)
    assert same_bits(wide_gradient[:, :L], gradient) and not wide_gradient[:, L:].any()


@pytest.mark.parametrize("level,aggregation", AGGREGATED)
def test_F87_a_packed_batch_has_the_loss_of_the_padded_one(level, aggregation, backend):
    d = batch()
    lengths = torch.tensor([6, 2, 4])
    inside = torch.arange(L) < lengths[:, None]
    d["mask"] &= inside
    cu = torch.tensor([0, 6, 8, 12])
    per_sequence = torch.tensor([1.0, -0.5, 2.0])

    def run(pick, advantages, **options):
        logp = pick(d["logp"]).clone().requires_grad_()
        loss = rlk.policy_loss(logp, pick(d["old"]), advantages, pick(d["mask"]), ratio_level=level, aggregation=aggregation, ref_logprobs=pick(d["ref"]),
                               kl_coef=0.1, entropy=pick(d["entropy"]), entropy_coef=0.1, **options)
        return loss, torch.autograd.grad(loss, logp)[0]
    padded_loss, padded = run(lambda x: x, per_sequence)
    for dtype in (torch.int32, torch.int64):
        packed_loss, packed = run(lambda x: x[inside], per_sequence, cu_seqlens=cu.to(dtype))
        assert packed_loss.item() == pytest.approx(padded_loss.item(), rel=1e-6)
        torch.testing.assert_close(packed, padded[inside], rtol=1e-6, atol=1e-9)


def test_F30_micro_batches_add_up_to_the_batch(backend):
    d = batch(shape=(4, 6))
    x, targets, _ = draw_rows((4, 6), 37)
    targets = targets.clamp(min=0)
    for aggregation, normalizers in (("token-mean", {"batch_num_tokens": int(d["mask"].sum())}), ("seq-mean-token-mean", {"num_sequences": 4})):
        options = {"aggregation": aggregation, "ref_logprobs": d["ref"], "kl_coef": 0.1}
        whole = x.clone().requires_grad_()
        loss = rlk.logits_policy_loss(whole, targets, d["old"], d["advantages"], d["mask"], **options)
        parts, leaf = 0.0, x.clone().requires_grad_()
        for rows in (slice(0, 1), slice(1, 4)):
            options["ref_logprobs"] = d["ref"][rows]
            part = rlk.logits_policy_loss(leaf[rows], targets[rows], d["old"][rows], d["advantages"][rows], d["mask"][rows], normalizers=normalizers, **options)
            part.backward()
            parts += part.item()
        assert parts == pytest.approx(loss.item(), rel=2e-6)
        torch.testing.assert_close(leaf.grad, torch.autograd.grad(loss, whole)[0], rtol=4e-6, atol=1e-7)


def test_a_token_of_weight_zero_is_not_evaluated(backend):
    d = batch()
    x, targets, _ = draw_rows((B, L), 37)
    weights = torch.rand(B, L) + 0.1
    weights[1, 2] = weights[0, 0] = 0.0
    targets[1, 2] = targets[0, 0] = 3
    dead = weights == 0
    results = []
    for poison in (0.5, NAN):
        leaf = x.masked_fill(dead[..., None], poison).requires_grad_()
        loss = rlk.logits_policy_loss(leaf, targets, *(d[k].masked_fill(dead, poison) for k in ("old", "advantages")), weights=weights, entropy_coef=0.1,
                                      ref_logprobs=d["ref"].masked_fill(dead, poison), kl_coef=0.1)
        results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
    assert results[1][0].isfinite() and not results[1][1][dead].any()


def test_F29_a_zero_advantage_gives_no_gradient_even_at_a_tie(backend):
    logp = torch.tensor([[1.25, 0.75, 1.0, 4.0]]).log().requires_grad_()
    for name in ("ppo_clip", "dual_clip"):
        params = {**PARAMS[name], "clip_low": 0.25, "clip_high": 0.25}
        loss = rlk.policy_loss(logp, torch.zeros(1, 4), torch.zeros(1, 4), objective=name, **params)
        assert loss.item() == 0.0 and not torch.autograd.grad(loss, logp)[0].any()


def test_F44_an_overflow_in_fp16_reaches_the_grad_scaler(backend):
    x, targets, _ = draw_rows((2, 5), 37, torch.float16)
    targets = targets.clamp(min=0)
    leaf = x.requires_grad_()
    for scale, finite in ((1.0, True), (2.0**20, False)):
        for loss in (rlk.token_logprobs(leaf, targets).sum(), 3 * rlk.logits_policy_loss(leaf, targets, *cotangents((2, 5), 2), objective="reinforce")):
            (gradient,) = torch.autograd.grad(loss * scale, leaf)
            assert gradient.isfinite().all() == finite


