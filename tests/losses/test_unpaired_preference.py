"""Losses of answers judged one by one, against their formulas in float64; and the token weights of LD-DPO."""

import math

import preference_oracles as oracle
import pytest
import torch

import rlkernels as rlk
from rlkernels.backends import DEVICES, absent, use_backend
from rlkernels.losses.unpaired_preference import LOSS_TYPES, sequence_losses, unpaired_options

PRESENT = [name for name in DEVICES["cpu"] if absent(name) is None]
BETA, KL, DELTA = 0.3, 0.7, -0.2
NEEDS = {"kto": {"kl": KL}, "bco": {"delta": DELTA}}


def batch(n=9, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    logps = -5 * torch.rand(n, generator=draw, dtype=torch.float64)
    return (
        logps.to(dtype),
        (logps + torch.randn(n, generator=draw, dtype=torch.float64)).to(dtype),
        torch.rand(n, generator=draw) < 0.4,
    )


def formula(name, logps, ref, good):
    rho = logps - ref
    if name == "kto_paired_batch":
        up, down = (
            rho[one].mean().clamp(min=0) if one.any() else torch.tensor(0.0, dtype=rho.dtype) for one in (good, ~good)
        )
        return torch.where(good, 1 - torch.sigmoid(BETA * (rho - down)), 1 - torch.sigmoid(BETA * (up - rho)))
    return oracle.OF_ONE[name](rho, good, BETA, KL, DELTA)


def gradient(function, logps):
    leaf = logps.detach().clone().requires_grad_()
    value = function(leaf)
    return value.detach(), torch.autograd.grad(value.sum(), leaf)[0]


@pytest.mark.parametrize("backend", PRESENT)
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize("classes", ("both", "desirable", "undesirable"))
@pytest.mark.parametrize("name", LOSS_TYPES)
def test_loss_and_gradient_are_those_of_the_formula(name, classes, dtype, backend):
    logps, ref, good = batch(dtype=dtype)
    good = good if classes == "both" else torch.full_like(good, classes == "desirable")
    scale = torch.where(good, 1.5, 0.5).double()
    want, slope = gradient(lambda x: (scale * formula(name, x, ref.double(), good)).mean(), logps.double())
    given = {"loss_type": name, "beta": BETA, "desirable_weight": 1.5, "undesirable_weight": 0.5, **NEEDS.get(name, {})}
    with use_backend(backend):
        loss, got = gradient(lambda x: rlk.unpaired_preference_loss(x, ref, good, **given), logps)
        options = unpaired_options("test", logps, **given)
        losses, slopes = gradient(lambda x: sequence_losses("test", x, ref, good, options), logps)
    tolerance = {"rtol": 1e-11, "atol": 1e-13} if dtype == torch.float64 else {"rtol": 2e-5, "atol": 1e-6}
    torch.testing.assert_close(loss.double(), want, **tolerance)
    torch.testing.assert_close(got.double(), slope, **tolerance)
    torch.testing.assert_close(losses.double(), scale * formula(name, logps.double(), ref.double(), good), **tolerance)
    torch.testing.assert_close(slopes / len(logps), got, rtol=1e-5, atol=1e-7)


def test_a_batch_is_separable_but_for_the_baselines_of_the_other_class():
    logps, ref, good = batch(dtype=torch.float32)
    for name in LOSS_TYPES:
        options = unpaired_options("test", logps, loss_type=name, **NEEDS.get(name, {}))
        whole = sequence_losses("test", logps, ref, good, options)
        parts = torch.cat(
            [sequence_losses("test", logps[s], ref[s], good[s], options) for s in (slice(0, 4), slice(4, 9))]
        )
        assert torch.equal(whole, parts) == options.separable() == (name != "kto_paired_batch")


def test_kl_is_the_mean_drift_of_other_answers_and_never_negative():
    logps, ref, good = batch()
    drift = torch.tensor([-3.0, -1.0, -2.0], dtype=torch.float64)
    for offset, kl in ((0.4, 0.4), (-0.4, 0.0)):
        loss, metrics = rlk.unpaired_preference_loss(
            logps, ref, good, kl_logps=drift + offset, ref_kl_logps=drift, return_metrics=True
        )
        assert (
            metrics["kl"].item() == pytest.approx(kl)
            and loss.item() == rlk.unpaired_preference_loss(logps, ref, good, kl=metrics["kl"]).item()
        )
    trained = (drift + 0.4).requires_grad_()
    x = logps.clone().requires_grad_()
    rlk.unpaired_preference_loss(x, ref, good, kl_logps=trained, ref_kl_logps=drift).backward()
    assert trained.grad is None and x.grad.abs().sum() > 0
    _, metrics = rlk.unpaired_preference_loss(
        logps, ref, good, kl_logps=drift[:0], ref_kl_logps=drift[:0], return_metrics=True
    )
    assert metrics["kl"] == 0


@pytest.mark.fault(25)
@pytest.mark.parametrize("name", LOSS_TYPES)
def test_extreme_log_ratios_are_finite_with_a_finite_gradient(name):
    rho = torch.tensor([20.0, 88.0, 200.0, 1e4, -20.0, -88.0, -200.0, -1e4]).repeat(2)
    good = torch.arange(16) < 8
    given = {
        "loss_type": name,
        "beta": 1.0,
        **({"kl": 0.0} if name == "kto" else {"delta": 0.0} if name == "bco" else {}),
    }
    loss, slope = gradient(lambda x: rlk.unpaired_preference_loss(x, torch.zeros(16), good, **given), rho)
    assert loss.isfinite() and slope.isfinite().all()
    if name == "bco":
        torch.testing.assert_close(loss.item(), (20 + 88 + 200 + 1e4) / 8, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_no_answer_gives_0_that_is_attached_to_the_graph(name):
    none = torch.zeros(0, requires_grad=True)
    loss, metrics = rlk.unpaired_preference_loss(
        none,
        torch.zeros(0),
        torch.zeros(0, dtype=torch.bool),
        loss_type=name,
        **NEEDS.get(name, {}),
        return_metrics=True,
    )
    assert loss == 0 and torch.autograd.grad(loss, none)[0].shape == (0,)
    assert metrics["reward_desirable"] == 0 and metrics["reward_undesirable"] == 0


def test_rewards_are_means_of_each_class():
    logps, ref, good = batch()
    _, metrics = rlk.unpaired_preference_loss(logps, ref, good.int(), beta=BETA, kl=0.0, return_metrics=True)
    rewards = BETA * (logps - ref)
    torch.testing.assert_close(metrics["reward_desirable"], rewards[good].mean())
    torch.testing.assert_close(metrics["reward_undesirable"], rewards[~good].mean())


@pytest.mark.parametrize(
    "given,message",
    [
        ({}, "kl is missing; pass kl, or kl_logps and ref_kl_logps"),
        ({"loss_type": "bco"}, "delta is missing; pass delta"),
        ({"loss_type": "bco", "delta": 0.0, "kl": 0.0}, "loss_type 'bco' takes no kl; leave it out"),
        ({"loss_type": "apo_zero_unpaired", "kl": 0.0}, "loss_type 'apo_zero_unpaired' takes no kl"),
        ({"kl": 0.0, "delta": 0.0}, "loss_type 'kto' takes no delta"),
        (
            {"kl": 0.0, "kl_logps": torch.zeros(2), "ref_kl_logps": torch.zeros(2)},
            "kl_logps and ref_kl_logps go together, instead of kl",
        ),
        ({"kl_logps": torch.zeros(2)}, "kl_logps and ref_kl_logps go together"),
        (
            {"kl_logps": torch.zeros(2), "ref_kl_logps": torch.zeros(3)},
            r"ref_kl_logps has shape \(3,\), expected \(2,\)",
        ),
        ({"kl": math.nan}, "kl must be finite, got nan"),
        ({"kl": torch.zeros(2)}, r"kl has shape \(2,\), expected \(\)"),
        ({"kl": torch.zeros((), requires_grad=True)}, "kl gets no gradient; detach it"),
    ],
)
def test_bad_options_are_named(given, message):
    x = torch.zeros(3)
    with pytest.raises(ValueError, match=f"^unpaired_preference_loss: {message}"):
        rlk.unpaired_preference_loss(x, x, x, **given)


def test_ld_weights_count_live_tokens_up_to_the_shorter_answer():
    chosen = torch.tensor([[0, 1, 0, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    rejected = torch.tensor([[1, 0, 1], [1, 1, 1], [1, 1, 1]])
    first, second = rlk.length_desensitized_weights(chosen, rejected, 0.25)
    assert first.tolist() == [[0, 1, 0, 1, 0.25], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]]
    assert second.tolist() == [[1, 0, 1], [1, 1, 0.25], [0.25, 0.25, 0.25]]
    with pytest.raises(ValueError, match=r"ld_alpha must be in \[0, 1\], got 1.5"):
        rlk.length_desensitized_weights(chosen, rejected, 1.5)


def test_a_class_of_weight_zero_is_left_out_of_the_losses_whatever_it_holds():
    options = unpaired_options("test", torch.empty(2), kl=0.1, undesirable_weight=0.0)
    logps = torch.tensor([-3.0, float("nan")], requires_grad=True)
    losses = sequence_losses("test", logps, torch.zeros(2), torch.tensor([True, False]), options)
    losses.sum().backward()
    assert losses[0] > 0 and losses[1] == 0 and logps.grad[0] < 0 and logps.grad[1] == 0
