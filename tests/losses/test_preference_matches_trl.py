"""Preference losses against the code of TRL itself, run on a stand-in for its trainers."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

import rlkernels as rlk

trl = pytest.importorskip("trl")
BETA = 0.3


def tokens(pairs=5, length=8, seed=0):
    """Log-probabilities of the tokens, chosen rows first, and the mask of the answers over the unshifted tokens."""
    draw = torch.Generator().manual_seed(seed)
    mask = torch.zeros(2 * pairs, length + 1, dtype=torch.int64)
    for row in range(2 * pairs):
        start = int(torch.randint(1, 4, (), generator=draw))
        mask[row, start : start + int(torch.randint(1, 6, (), generator=draw))] = 1
    policy, reference, squares = (-2 * torch.rand(2 * pairs, length, generator=draw) for _ in range(3))
    live = mask[:, 1:]
    return policy * live, reference * live, squares, mask


def identity(x):
    return x


def theirs(policy, reference, squares, mask, **settings):
    """DPOTrainer._compute_loss, with the model's outputs given."""
    from trl.trainer.dpo_trainer import DPOTrainer

    settings = {
        "loss_types": ["sigmoid"],
        "loss_weights": [1.0],
        "ld_alpha": None,
        "f_divergence_type": "reverse_kl",
        "label_smoothing": 0.0,
        "f_alpha_divergence_coef": 0.5,
        "use_weighting": False,
        **settings,
    }
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=SimpleNamespace(device=policy.device, gather=identity, gather_for_metrics=identity),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        beta=BETA,
        args=SimpleNamespace(discopop_tau=0.05),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )
    outputs = SimpleNamespace(
        log_probs=policy,
        log_sum_sq_probs=squares,
        entropy=torch.zeros_like(policy),
        mean_logits=torch.zeros_like(policy),
        is_top1=torch.zeros_like(policy, dtype=torch.bool),
    )
    chosen, rejected = reference_sums(reference, mask, settings["ld_alpha"])
    inputs = {
        "input_ids": mask,
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
    }
    loss = DPOTrainer._compute_loss(trainer, lambda **given: outputs, inputs, False)
    return loss, {name: values[0] for name, values in trainer._metrics["eval"].items()}


def reference_sums(x, mask, ld_alpha=None):
    live, pairs = mask[:, 1:], len(mask) // 2
    weights = torch.ones_like(x)
    if ld_alpha is not None:
        weights = torch.cat(rlk.length_desensitized_weights(live[:pairs], live[pairs:], ld_alpha))
    return rlk.sequence_sums(weights * x, live).chunk(2)


def ours(policy, reference, squares, mask, ld_alpha=None, wpo=False, **options):
    live, pairs = mask[:, 1:], len(mask) // 2
    if wpo:
        likelihood = rlk.sequence_means(policy.detach() - squares, live).exp()
        options["pair_weights"] = likelihood[:pairs] * likelihood[pairs:]
    lengths = live.sum(1)
    return rlk.dpo_loss(
        *reference_sums(policy, mask, ld_alpha),
        *reference_sums(reference, mask, ld_alpha),
        beta=BETA,
        return_metrics=True,
        chosen_lengths=lengths[:pairs],
        rejected_lengths=lengths[pairs:],
        **options,
    )


CASES = {
    **{
        name: ({"loss_types": [name]}, {"loss_type": name})
        for name in (
            "sigmoid",
            "hinge",
            "nca_pair",
            "bco_pair",
            "sppo_hard",
            "aot",
            "aot_unpaired",
            "apo_zero",
            "apo_down",
            "discopop",
            "sft",
            "sigmoid_norm",
        )
    },
    **{
        f"{name} smoothed": (
            {"loss_types": [name], "label_smoothing": 0.1},
            {"loss_type": name, "label_smoothing": 0.1},
        )
        for name in ("exo_pair", "robust", "aot", "aot_unpaired")
    },
    "ipo": ({"loss_types": ["ipo"]}, {"loss_type": "ipo", "length_normalized": True}),
    **{
        f"sigmoid under {name}": ({"f_divergence_type": name}, {"f_divergence": name})
        for name in ("forward_kl", "js_divergence", "alpha_divergence")
    },
    "alpha of 1": (
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
        {"f_divergence": "alpha_divergence", "alpha": 1.0},
    ),
    "hinge under alpha 2": (
        {"loss_types": ["hinge"], "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 2.0},
        {"loss_type": "hinge", "f_divergence": "alpha_divergence", "alpha": 2.0},
    ),
    "mixture": (
        {"loss_types": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]},
        {"loss_type": ("sigmoid", "bco_pair", "sft"), "loss_weights": (0.8, 0.2, 1.0)},
    ),
    "length-desensitised": ({"ld_alpha": 0.4}, {"ld_alpha": 0.4}),
    # Of sigmoid: TRL multiplies in place, which the backward of its hinge and IPO does not survive.
    "weighted": ({"use_weighting": True}, {"wpo": True}),
}


@pytest.mark.fault(111)
@pytest.mark.parametrize("case", CASES)
def test_dpo_trainer_computes_the_same_loss_gradient_and_metrics(case):
    settings, options = CASES[case]
    policy, reference, squares, mask = tokens()
    leaf, other = (policy.clone().requires_grad_() for _ in range(2))
    want, want_metrics = theirs(leaf, reference, squares, mask, **settings)
    loss, metrics = ours(other, reference, squares, mask, **options)
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    want.backward()
    loss.backward()
    torch.testing.assert_close(other.grad, leaf.grad * mask[:, 1:], rtol=1e-4, atol=1e-6)
    for name, key in {
        "reward_chosen": "chosen",
        "reward_rejected": "rejected",
        "reward_margin": "margins",
        "accuracy": "accuracies",
    }.items():
        assert metrics[name].item() == pytest.approx(want_metrics[f"rewards/{key}"], abs=1e-6), name


@pytest.mark.fault(111)
@pytest.mark.parametrize(
    "kind,name", [("sigmoid", "cpo"), ("hinge", "cpo_hinge"), ("ipo", "cpo_ipo"), ("simpo", "simpo")]
)
@pytest.mark.parametrize("alpha", [0.0, 0.25])
def test_cpo_trainer_computes_the_same_losses(kind, name, alpha):
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    draw = torch.Generator().manual_seed(1)
    chosen, rejected = (-2 * torch.rand(6, generator=draw) for _ in range(2))
    smoothing = 0.1 if kind in ("sigmoid", "simpo") else 0.0
    trainer = SimpleNamespace(
        alpha=alpha,
        beta=BETA,
        loss_type=kind,
        simpo_gamma=0.7,
        label_smoothing=smoothing,
        accelerator=SimpleNamespace(device=chosen.device),
    )
    leaves, others = ([x.clone().requires_grad_() for x in (chosen, rejected)] for _ in range(2))
    want, rewards, _ = CPOTrainer.cpo_loss(trainer, *leaves)
    one = torch.ones(6)
    extra = {"simpo_gamma": 0.7} if kind == "simpo" else {"length_normalized": True}
    loss, metrics = rlk.dpo_loss(
        *others,
        loss_type=name,
        beta=BETA,
        label_smoothing=smoothing,
        alphapo_alpha=alpha,
        cpo_alpha=0.0,
        chosen_lengths=one,
        rejected_lengths=one,
        return_metrics=True,
        **extra,
    )
    torch.testing.assert_close(loss, want.mean(), rtol=1e-5, atol=1e-6)
    for got, slope in zip(torch.autograd.grad(loss, others), torch.autograd.grad(want.mean(), leaves), strict=True):
        torch.testing.assert_close(got, slope, rtol=1e-4, atol=1e-6)
    if kind == "simpo":
        torch.testing.assert_close(metrics["reward_chosen"], rewards.mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.fault(111)
def test_orpo_trainer_computes_the_same_odds_ratio():
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    draw = torch.Generator().manual_seed(2)
    chosen, rejected = (-2 * torch.rand(6, generator=draw) for _ in range(2))
    trainer = SimpleNamespace(beta=BETA, accelerator=SimpleNamespace(device=chosen.device))
    gains, *_, odds = ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)
    loss, metrics = rlk.dpo_loss(
        chosen,
        rejected,
        loss_type="orpo_odds_ratio",
        beta=BETA,
        chosen_lengths=torch.ones(6),
        rejected_lengths=torch.ones(6),
        return_metrics=True,
    )
    torch.testing.assert_close(loss, -gains.mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metrics["log_odds_ratio"], odds, rtol=1e-5, atol=1e-6)
