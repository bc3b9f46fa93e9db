"""What goes into a paired preference loss and comes out beside it: metrics, references, dtypes, and options that are
refused.
"""

import math

import preference_oracles as oracle
import pytest
import torch
from test_preference import BETA, SMOOTHING, batch, expected, options_for

import rlkernels as rlk
from rlkernels.losses.preference_types import KINDS


def test_metrics_are_rewards_under_the_reference_whatever_the_loss():
    C, R, f, g, n, m = batch()
    rewards = BETA * (C - f), BETA * (R - g)
    want = {
        "reward_chosen": rewards[0].mean(),
        "reward_rejected": rewards[1].mean(),
        "reward_margin": (rewards[0] - rewards[1]).mean(),
        "accuracy": (rewards[0] > rewards[1]).double().mean(),
        "logps_chosen": C.mean(),
        "logps_rejected": R.mean(),
    }
    assert 0 < want["accuracy"] < 1
    for given in (
        {},
        {"reference_free": True},
        {"loss_type": "sft", "chosen_lengths": n},
        {"f_divergence": "forward_kl"},
    ):
        _, metrics = rlk.dpo_loss(C.requires_grad_(), R, f, g, beta=BETA, **given, return_metrics=True)
        assert metrics.keys() == want.keys() and not any(x.requires_grad for x in metrics.values())
        for name, value in want.items():
            torch.testing.assert_close(metrics[name], value.detach(), rtol=1e-12, atol=1e-15)
    weights = torch.tensor([1.0, 0.0, 1.0, 3.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    _, metrics = rlk.dpo_loss(C, R, f, g, beta=BETA, pair_weights=weights, return_metrics=True)
    torch.testing.assert_close(metrics["reward_chosen"], rewards[0][weights != 0].mean().detach())


def test_metrics_without_a_reference_are_those_of_the_scores():
    C, R, _, _, n, m = batch()
    for name, scores in {"simpo": (C / n, R / m), "cpo_hinge": (C, R), "orpo": (C / n, R / m)}.items():
        _, metrics = rlk.dpo_loss(C, R, **options_for(name, n, m), return_metrics=True)
        torch.testing.assert_close(metrics["reward_margin"], BETA * (scores[0] - scores[1]).mean())
        torch.testing.assert_close(metrics["accuracy"], (scores[0] > scores[1]).double().mean())
    odds = oracle.log_odds(C / n) - oracle.log_odds(R / m)
    torch.testing.assert_close(metrics["log_odds_ratio"], odds.mean())


def test_a_tie_costs_ln_2_and_is_no_success():
    C = torch.tensor([-3.0])
    loss, metrics = rlk.dpo_loss(C, C, C, C, return_metrics=True)
    assert loss.item() == pytest.approx(math.log(2)) and metrics["accuracy"] == 0


def test_reference_free_is_a_reference_of_zero():
    C, R, f, g, n, m = batch()
    zero = torch.zeros_like(C)
    for name in (name for name, kind in KINDS.items() if kind.reference):
        given = options_for(name, n, m)
        torch.testing.assert_close(
            rlk.dpo_loss(C, R, f, g, reference_free=True, **given),
            rlk.dpo_loss(C, R, zero, zero, **given),
            rtol=0,
            atol=0,
        )
        assert torch.equal(
            rlk.dpo_loss(C, R, reference_free=True, **given), rlk.dpo_loss(C, R, f, g, reference_free=True, **given)
        )


REFUSED = {
    "label_smoothing that hinge does not know": (
        dict(loss_type="hinge", label_smoothing=0.1),
        "loss_type 'hinge' takes no label_smoothing",
    ),
    "a divergence that one of two does not know": (
        dict(loss_type=("sigmoid", "bco_pair"), f_divergence="forward_kl"),
        "takes no f_divergence",
    ),
    "alpha of another divergence": (dict(alpha=0.5), "alpha needs f_divergence='alpha_divergence', got 'reverse_kl'"),
    "gamma of another loss": (dict(simpo_gamma=0.5), "loss_type 'sigmoid' takes no simpo_gamma"),
    "tau of another loss": (dict(discopop_tau=0.1), "takes no discopop_tau"),
    "AlphaPO under a reference": (dict(alphapo_alpha=0.1), "takes no alphapo_alpha"),
    "likelihood of another loss": (dict(cpo_alpha=1.0), "takes no cpo_alpha"),
    "averages of likelihoods": (dict(loss_type="sft", length_normalized=True), "takes no length_normalized"),
    "averages without lengths": (
        dict(loss_type="sigmoid_norm"),
        "loss_type 'sigmoid_norm' needs chosen_lengths: the number of tokens",
    ),
    "likelihood without lengths": (dict(loss_type="cpo"), "needs chosen_lengths: .*, or cpo_alpha=0"),
    "rejected lengths": (dict(length_normalized=True, chosen_lengths=torch.ones(3)), "needs rejected_lengths"),
    "lengths of another batch": (
        dict(loss_type="sft", chosen_lengths=torch.ones(4)),
        r"chosen_lengths has shape \(4,\), expected \(3,\)",
    ),
    "weights of a sorted batch": (
        dict(loss_type="aot", pair_weights=torch.ones(3)),
        "loss_type 'aot' sorts the batch and takes no pair_weights",
    ),
    "weights with a gradient": (
        dict(pair_weights=torch.ones(3, requires_grad=True)),
        "pair_weights gets no gradient; detach it",
    ),
    "one weight for two losses": (
        dict(loss_type=("sigmoid", "sft"), loss_weights=(1.0,)),
        "loss_weights has 1 elements, loss_type 2",
    ),
    "no loss": (dict(loss_type=()), "at least one type"),
    "a weight that is no number": (
        dict(loss_type=("sigmoid",), loss_weights=(math.nan,)),
        "loss_weights must be finite, got nan",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_loss_does_not_look_at_is_refused(case):
    given, message = REFUSED[case]
    x = torch.zeros(3)
    with pytest.raises(ValueError, match=f"^dpo_loss: .*{message}"):
        rlk.dpo_loss(x, x, x, x, **given)


def test_one_reference_of_two_is_refused():
    x = torch.zeros(3)
    for given in ({"loss_type": "cpo", "cpo_alpha": 0.0}, {"reference_free": True}):
        with pytest.raises(ValueError, match="ref_rejected_logps is missing; pass both references, or none of them"):
            rlk.dpo_loss(x, x, x, **given)


def test_half_precision_log_probabilities_are_computed_in_float32_and_get_their_own_dtype_back():
    C, R, f, g, *_ = (x.bfloat16() for x in batch())
    C.requires_grad_()
    loss = rlk.dpo_loss(C, R, f, g, beta=BETA, loss_type="robust", label_smoothing=SMOOTHING)
    want = expected("robust", *(x.detach().double() for x in (C, R, f, g)), None, None).mean()
    loss.backward()
    torch.testing.assert_close(loss, want.float(), rtol=1e-5, atol=1e-6)
    assert loss.dtype == torch.float32 and C.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"loss_type": "orpo"},
        {"loss_type": "simpo"},
        {"loss_type": ("sft", "discopop"), "loss_weights": (0.5, 2.0)},
        {"loss_type": "aot"},
    ],
    ids=str,
)
def test_a_new_beta_or_number_of_pairs_compiles_nothing(given):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()

    @torch.compile(backend=counter, fullgraph=True, dynamic=True)
    def compiled(C, R, f, g, n, m, beta):
        references = () if given.get("loss_type") in ("orpo", "simpo") else (f, g)
        return rlk.dpo_loss(C, R, *references, beta=beta, chosen_lengths=n, rejected_lengths=m, **given)

    for trial, (pairs, beta) in enumerate(((5, 0.11), (7, 0.23), (11, 0.37), (6, 0.41))):
        C, R, f, g, n, m = batch(pairs)
        C.requires_grad_()
        loss = compiled(C, R, f, g, n, m, beta)
        (gradient,) = torch.autograd.grad(loss, C)
        want = rlk.dpo_loss(
            C,
            R,
            *(() if given.get("loss_type") in ("orpo", "simpo") else (f, g)),
            beta=beta,
            chosen_lengths=n,
            rejected_lengths=m,
            **given,
        )
        torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient, torch.autograd.grad(want, C)[0], rtol=1e-12, atol=1e-15)
        if trial == 0:
            first = counter.frame_count
    assert counter.frame_count == first
