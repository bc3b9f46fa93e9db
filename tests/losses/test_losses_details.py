"""Faults of losses: the ends of the range, the sign, metrics, estimators, what belongs to which row, precision,
defaults.
"""

import math

import oracles
import pytest
import torch
from loss_batches import PARAMS, batch, truth_of
from reference import cotangents, draw_rows, gradient_allowance, same_bits, statistics

import rlkernels as rlk

INF = math.inf


@pytest.mark.fault(25)
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("gap", [20.0, 88.0, 200.0, 1e4, -20.0, -88.0, -200.0, -1e4])
@pytest.mark.parametrize("name", PARAMS)
def test_extreme_log_ratios_give_the_true_value_and_no_nan(name, gap, advantage, backend):
    logp, old = torch.tensor([[gap - 1.0]], requires_grad=True), torch.tensor([[-1.0]])
    a = torch.tensor([[advantage]])
    loss = rlk.policy_loss(logp, old, a, objective=name, **PARAMS[name])
    wide = logp.detach().double().requires_grad_()
    expected = truth_of(name, wide, old.double(), a.double()).sum()
    (got,), (want,) = torch.autograd.grad(loss, logp), torch.autograd.grad(expected, wide)
    assert not got.isnan().any() and not loss.isnan()
    # exp(88) to 88 eps32.
    assert loss.item() == pytest.approx(expected.float().nan_to_num(nan=0.0, posinf=INF, neginf=-INF).item(), rel=3e-5)
    if want.isfinite().all():
        assert got.item() == pytest.approx(want.float().item(), rel=3e-5, abs=1e-37)


@pytest.mark.fault(24)
@pytest.mark.parametrize(
    "d,value",
    [
        (-1000.0, 1000.0),
        (-90.0, 90.0),
        (20.0, 2.0611536e-9),
        (-20.0, 20.0 + 2.0611536e-9),
        (90.0, 8.1940126e-40),
        (1e4, 0.0),
        (-1e4, 1e4),
    ],
)
def test_the_tails_of_the_pair_losses_keep_their_digits(d, value, backend):
    chosen = torch.tensor([d / 2], requires_grad=True)
    for loss in (
        rlk.pairwise_reward_loss(chosen, torch.tensor([-d / 2])),
        rlk.dpo_loss(chosen, torch.tensor([-d / 2]), reference_free=True, beta=1.0),
    ):
        assert loss.item() == pytest.approx(value, rel=2e-6, abs=1e-44)
        (gradient,) = torch.autograd.grad(loss, chosen)
        slope = -1 / (1 + math.exp(d)) if d < 700 else 0.0
        # Torch's sigmoid has no subnormal results.
        assert gradient.item() == pytest.approx(slope, rel=2e-6, abs=1.2e-38)


@pytest.mark.fault(64)
def test_every_metric_is_a_mean_over_live_tokens(backend):
    d = batch()
    m = d["mask"]
    padded = {k: v if k == "mask" else v.masked_fill(~m, 1e6) for k, v in d.items()}
    _, metrics = rlk.policy_loss(
        padded["logp"],
        padded["old"],
        padded["advantages"],
        m,
        clip_low=0.2,
        clip_high=0.28,
        ref_logprobs=padded["ref"],
        entropy=padded["entropy"],
        return_metrics=True,
    )
    logp, old, ref, a, h = (d[k].double()[m] for k in ("logp", "old", "ref", "advantages", "entropy"))
    ratio = (logp - old).exp()
    low, high = ((ratio < 0.8) & (a < 0)).double().mean(), ((ratio > 1.28) & (a > 0)).double().mean()
    expected = {
        "ppo_kl": (old - logp).mean(),
        "approx_kl": ((logp - old).square() / 2).mean(),
        "ratio": ratio.mean(),
        "ratio_min": ratio.min(),
        "ratio_max": ratio.max(),
        "clip_fraction_low": low,
        "clip_fraction_high": high,
        "clip_fraction": low + high,
        "kl": ((ref - logp).exp() - 1 - (ref - logp)).mean(),
        "entropy": h.mean(),
    }
    assert low > 0 and high > 0
    assert metrics.keys() == expected.keys()
    for name, value in metrics.items():
        assert value.item() == pytest.approx(expected[name].item(), rel=2e-6, abs=1e-7), name
        assert not value.requires_grad


@pytest.mark.fault(69)
def test_an_entropy_bonus_alone_has_its_gradient(backend):
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


@pytest.mark.fault(71)
def test_a_good_action_becomes_more_likely_and_its_gradient_is_the_one_by_hand(backend):
    for a in (1.0, -1.0):
        x = torch.zeros(1, 1, 2, requires_grad=True)
        loss = rlk.logits_policy_loss(
            x, torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[math.log(0.5)]]), torch.tensor([[a]])
        )
        assert loss.item() == -a
        (gradient,) = torch.autograd.grad(loss, x)
        assert gradient.flatten().tolist() == pytest.approx([-0.5 * a, 0.5 * a], rel=1e-6)
        after = rlk.token_logprobs(x - 0.1 * gradient, torch.zeros(1, 1, dtype=torch.int64))
        assert (after > math.log(0.5)) == (a > 0)


@pytest.mark.fault(73)
def test_one_advantage_per_row_belongs_to_the_row_also_in_a_square_batch(backend):
    d = batch(shape=(4, 4))
    per_row = torch.tensor([1.0, -2.0, 0.5, 3.0])
    expected = rlk.policy_loss(d["logp"], d["old"], per_row[:, None].expand(4, 4).contiguous(), d["mask"])
    for advantages in (per_row, per_row[:, None]):
        assert same_bits(rlk.policy_loss(d["logp"], d["old"], advantages, d["mask"]), expected)
    wrong = rlk.policy_loss(d["logp"], d["old"], per_row.expand(4, 4).contiguous(), d["mask"])
    assert abs(wrong.item() - expected.item()) > 1e-2


@pytest.mark.fault(74)
def test_values_and_gradients_of_the_estimators_against_an_enumerated_vocabulary(backend):
    logits = torch.tensor([0.3, -1.0, 0.8, 0.1, -0.4])
    ref = torch.tensor([-0.2, 0.5, 0.4, -0.9, 0.0]).log_softmax(0)
    words = torch.arange(5)

    def kls(z):
        log_p = z.log_softmax(0)
        return (log_p.exp() * (log_p - ref.double())).sum(), (ref.double().exp() * (ref.double() - log_p)).sum()

    wide = logits.double().requires_grad_()
    forward, reverse = kls(wide)  # KL(pi || ref), KL(ref || pi)
    (forward_gradient,), (reverse_gradient,) = (
        torch.autograd.grad(forward, wide, retain_graph=True),
        torch.autograd.grad(reverse, wide),
    )
    p = logits.softmax(0)
    gradients = {"k1": torch.zeros(5, dtype=torch.float64), "k2": forward_gradient, "k3": reverse_gradient}
    for kl, expected in gradients.items():
        leaf = logits.clone().requires_grad_()
        # Every word once, weighed by its probability: an expectation over samples.
        (loss,) = [
            rlk.policy_loss(
                rlk.token_logprobs(leaf.expand(5, 5), words)[None],
                None,
                torch.zeros(1, 5),
                objective="reinforce",
                weights=p[None],
                ref_logprobs=ref[None],
                kl=kl,
                kl_coef=1.0,
            )
        ]
        if kl != "k2":
            assert loss.item() == pytest.approx(forward.item(), rel=1e-5), f"{kl} is an unbiased value"
        torch.testing.assert_close(torch.autograd.grad(loss, leaf)[0].double(), expected, atol=1e-6, rtol=1e-5)
    leaf = logits.clone().requires_grad_()
    exact = rlk.token_stats(leaf[None], words[:1], ref_logits=ref[None], kl="exact").kl.sum()
    assert exact.item() == pytest.approx(forward.item(), rel=1e-5)
    torch.testing.assert_close(torch.autograd.grad(exact, leaf)[0].double(), forward_gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.fault(80)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_over_8192_tokens_of_16_bits_are_summed_in_fp32(dtype, backend):
    draw = torch.Generator().manual_seed(0)
    logp, old, a = ((-torch.rand(2, 4096, generator=draw)).to(dtype) for _ in range(3))
    loss = rlk.policy_loss(logp, old, a, **PARAMS["ppo_clip"])
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(
        truth_of("ppo_clip", logp.double(), old.double(), a.double()).mean().item(), rel=2e-6
    )
    value = rlk.value_loss(logp, None, old)
    assert value.item() == pytest.approx(oracles.value_plain(logp.double(), old.double()).mean().item(), rel=2e-6)


@pytest.mark.fault(83)
def test_a_convention_in_dispute_has_no_default(backend):
    d = batch()
    for given in ({}, {"clip_low": 1.0}, {"clip_high": 0.5}):
        with pytest.raises(TypeError, match="objective 'cispo' needs 'clip_"):
            rlk.policy_loss(d["logp"], d["old"], d["advantages"], objective="cispo", **given)
    # The two bounds are two: swapping them is another loss.
    losses = {
        rlk.policy_loss(d["logp"], d["old"], d["advantages"], clip_low=low, clip_high=high).item()
        for low, high in ((0.1, 0.4), (0.4, 0.1))
    }
    assert len(losses) == 2


@pytest.mark.fault(29)
def test_a_zero_advantage_gives_no_gradient_even_at_a_tie(backend):
    logp = torch.tensor([[1.25, 0.75, 1.0, 4.0]]).log().requires_grad_()
    for name in ("ppo_clip", "dual_clip"):
        params = {**PARAMS[name], "clip_low": 0.25, "clip_high": 0.25}
        loss = rlk.policy_loss(logp, torch.zeros(1, 4), torch.zeros(1, 4), objective=name, **params)
        assert loss.item() == 0.0 and not torch.autograd.grad(loss, logp)[0].any()


@pytest.mark.fault(44)
def test_an_overflow_in_fp16_reaches_the_grad_scaler(backend):
    x, targets, _ = draw_rows((2, 5), 37, torch.float16)
    targets = targets.clamp(min=0)
    leaf = x.requires_grad_()
    for scale, finite in ((1.0, True), (2.0**20, False)):
        for loss in (
            rlk.token_logprobs(leaf, targets).sum(),
            3 * rlk.logits_policy_loss(leaf, targets, *cotangents((2, 5), 2), objective="reinforce"),
        ):
            (gradient,) = torch.autograd.grad(loss * scale, leaf)
            assert gradient.isfinite().all() == finite
