"""A beta per pair, three answers, rewards, parts of a batch, losses per pair and weights, by hand in float64."""

import math

import pytest
import torch
from torch import sigmoid
from torch.nn.functional import logsigmoid as ls

import rlkernels as rlk
from rlkernels.losses.preference_types import KINDS


def batch(pairs=6, seed=0):
    draw = torch.Generator().manual_seed(seed)
    policy, reference = (-5 * torch.rand(2, pairs, generator=draw, dtype=torch.float64) - 1 for _ in range(2))
    return *policy.requires_grad_().unbind(), *reference, *torch.randint(2, 9, (2, pairs), generator=draw)


def given_for(name, n, m):
    options = {"loss_type": name, "chosen_lengths": n, "rejected_lengths": m}
    if name == "rpo":
        options |= {"chosen_rewards": torch.linspace(0, 1, len(n)), "rejected_rewards": torch.ones(len(n))}
    if name in ("exo_pair", "robust"):
        options["label_smoothing"] = 0.1
    return options | ({"tpo_alpha": 0.0} if name.startswith("tpo") else {})


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.separable])
def test_a_beta_per_pair_is_the_loss_of_each_pair_with_its_own(name):
    C, R, f, g, n, m = batch()
    beta, options = torch.linspace(0.2, 2.0, 6, dtype=torch.float64), given_for(name, n, m)
    refs = (f, g) if KINDS[name].reference else (None, None)
    losses, metrics = rlk.dpo_loss(C, R, *refs, beta=beta, reduction="none", return_metrics=True, **options)
    alone = []
    for i in range(6):
        one = {k: x[i : i + 1] if isinstance(x, torch.Tensor) else x for k, x in options.items()}
        at = [None if x is None else x[i : i + 1] for x in (C, R, *refs)]
        counts = (
            {"num_pairs": 6, "num_chosen_tokens": n.sum()} if name in ("sft", "cpo", "cpo_hinge", "cpo_ipo") else {}
        )
        alone.append(rlk.dpo_loss(*at, beta=beta[i].item(), **one, **counts) * (6 if counts else 1))
    torch.testing.assert_close(losses, torch.stack(alone))
    mean = rlk.dpo_loss(C, R, *refs, beta=beta, **options)
    torch.testing.assert_close(mean, losses.mean())
    torch.testing.assert_close(rlk.dpo_loss(C, R, *refs, beta=beta, reduction="sum", **options), losses.sum())
    for got, want in zip(
        torch.autograd.grad(mean, (C, R), allow_unused=True),
        torch.autograd.grad(losses.mean(), (C, R), allow_unused=True),
        strict=True,
    ):
        assert (got is None) == (want is None)
        torch.testing.assert_close(got, want)
    assert all(x.shape == (6,) and not x.requires_grad for x in metrics.values())
    weights = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.0, 1.0])
    dirty = torch.where(weights == 0, torch.nan, beta)
    weighed = rlk.dpo_loss(C, R, *refs, beta=dirty, pair_weights=weights, **options)
    torch.testing.assert_close(weighed, (losses * weights).mean())
    assert all(x is None or x.isfinite().all() for x in torch.autograd.grad(weighed, (C, R), allow_unused=True))


def test_the_margin_of_rewards_is_what_rpo_asks_the_implicit_rewards_for():
    C, R, f, g, *_ = batch()
    wins, losses = torch.tensor([[3.0, 1.0, 2.0, 0.0, 9.0, -90.0], [1.0, 1.0, 4.0, 0.5, 0.0, 90.0]]).double()
    loss = rlk.dpo_loss(
        C, R, f, g, loss_type="rpo", beta=0.5, rpo_eta=0.7, chosen_rewards=wins, rejected_rewards=losses
    )
    p, q = sigmoid(0.7 * (wins - losses)), sigmoid(0.5 * (C - f - R + g))
    want = (torch.xlogy(p, p) - p * q.log() + torch.xlogy(1 - p, 1 - p) - (1 - p) * (1 - q).log()).mean()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(loss, C), torch.autograd.grad(want, C))
    margin = 0.5 * (C - f - R + g).detach()
    matched = rlk.dpo_loss(
        C, R, f, g, loss_type="rpo", beta=0.5, chosen_rewards=margin, rejected_rewards=torch.zeros_like(margin)
    )
    assert abs(matched.item()) < 1e-15 and torch.autograd.grad(matched, C)[0].abs().max() < 1e-15


def test_dpop_adds_what_the_chosen_answer_has_lost():
    C, R, f, g, *_ = batch()
    loss = rlk.dpo_loss(C, R, f, g, loss_type="dpop", beta=0.3, dpop_lambda=5.0, label_smoothing=0.1)
    x = 0.3 * ((C - f) - (R - g) - 5.0 * torch.relu(f - C))
    want = (-0.9 * ls(x) - 0.1 * ls(-x)).mean()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(torch.autograd.grad(loss, (C, R)), torch.autograd.grad(want, (C, R)))


@pytest.mark.parametrize("name", ("tpo", "tpo_hinge", "tpo_ipo", "tpo_l"))
def test_three_answers_are_two_and_the_likelihood_of_the_third(name):
    C, R, _, _, n, m = batch()
    gold, k = batch(seed=1)[0].detach().requires_grad_(), torch.tensor([3, 4, 0, 7, 2, 5])
    c, r = (C / n, R / m) if name in ("tpo_ipo", "tpo_l") else (C, R)  # as TRL's trainer
    x = 0.4 * (c - r) - (0.8 if name == "tpo_l" else 0.0)
    want = {"tpo": -ls(x), "tpo_hinge": torch.relu(1 - x), "tpo_ipo": (c - r - 1.25) ** 2, "tpo_l": -ls(x)}[name]
    want = want.mean() - 0.5 * gold.sum() / k.sum()
    options = {"tpo_ipo": {"length_normalized": True}, "tpo_l": {"simpo_gamma": 0.8}}.get(name, {})
    options |= {"chosen_lengths": n, "rejected_lengths": m, "gold_lengths": k, "tpo_alpha": 0.5, "beta": 0.4}
    loss = rlk.dpo_loss(C, R, loss_type=name, gold_logps=gold, **options)
    torch.testing.assert_close(loss, want)
    for got, slope in zip(
        torch.autograd.grad(loss, (C, R, gold)), torch.autograd.grad(want, (C, R, gold)), strict=True
    ):
        torch.testing.assert_close(got, slope)
    each = rlk.dpo_loss(C, R, loss_type=name, gold_logps=gold, reduction="none", **options)
    torch.testing.assert_close(each.mean(), loss)


def test_parts_of_a_batch_with_its_counts_add_up_to_it():
    C, R, f, g, n, m = batch()
    names, shares = ("sigmoid", "sft", "ipo_norm"), (1.0, 0.3, 0.1)
    options = {"loss_type": names, "loss_weights": shares}
    whole = rlk.dpo_loss(C, R, f, g, chosen_lengths=n, rejected_lengths=m, **options)
    for counts in ((6, n.sum().item()), (torch.tensor(6), n.sum())):
        parts = [
            rlk.dpo_loss(
                *(x[s] for x in (C, R, f, g)),
                chosen_lengths=n[s],
                rejected_lengths=m[s],
                num_pairs=counts[0],
                num_chosen_tokens=counts[1],
                **options,
            )
            for s in (slice(0, 1), slice(1, 6))
        ]
        torch.testing.assert_close(sum(parts), whole)


def test_orpo_with_a_likelihood_over_tokens_is_a_mixture():
    C, R, _, _, n, m = batch()
    lengths = {"chosen_lengths": n, "rejected_lengths": m}
    odds = rlk.dpo_loss(C, R, loss_type="orpo_odds_ratio", **lengths)
    both = rlk.dpo_loss(C, R, loss_type=("orpo_odds_ratio", "sft"), **lengths)
    torch.testing.assert_close(both, odds - C.sum() / n.sum())


def test_beta_of_0_moves_nothing_and_smoothing_may_swap_the_labels():
    C, R, f, g, *_ = batch()
    loss = rlk.dpo_loss(C, R, f, g, beta=0.0)
    assert loss.item() == pytest.approx(math.log(2)) and not torch.autograd.grad(loss, C)[0].any()
    swapped = rlk.dpo_loss(C, R, f, g, label_smoothing=1.0)
    torch.testing.assert_close(swapped, rlk.dpo_loss(R, C, g, f))
    for name in ("ipo", "cpo_ipo", "sppo_hard", "simpo"):
        with pytest.raises(ValueError, match="beta must be positive and finite, got 0"):
            rlk.dpo_loss(C, R, f, g, loss_type=name, beta=0.0)


def test_bad_options_are_refused():
    C, R, f, g, n, _ = batch()
    for options, words in (
        ({"loss_type": "rpo"}, "loss_type 'rpo' needs chosen_rewards"),
        ({"chosen_rewards": f}, "takes no chosen_rewards"),
        ({"dpop_lambda": 1.0}, "takes no dpop_lambda"),
        ({"loss_type": "tpo"}, "needs gold_logps of the third answers, or tpo_alpha=0"),
        ({"loss_type": "tpo", "tpo_alpha": 0.0, "gold_logps": f}, "are not looked at with tpo_alpha=0"),
        ({"gold_logps": f}, "takes no gold_logps"),
        ({"loss_type": "sft", "chosen_lengths": n, "num_pairs": 9}, "needs num_pairs and num_chosen_tokens"),
        ({"num_chosen_tokens": 9}, "takes no num_chosen_tokens"),
        ({"num_pairs": 9, "reduction": "sum"}, "num_pairs divides a mean"),
        ({"loss_type": "aot", "reduction": "none"}, "no loss per pair"),
        ({"loss_type": "aot", "beta": f.abs()}, "takes no beta per pair"),
        ({"beta": torch.full((6,), -1.0)}, "beta must be positive and finite, got -1"),
        ({"beta": torch.ones(5)}, "beta has shape"),
        ({"reduction": "max"}, "reduction"),
        ({"label_smoothing": 1.1}, "label_smoothing"),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "must not be 0.5"),
        ({"loss_type": "exo_pair", "label_smoothing": 1.0}, r"must be in \(0, 1\)"),
    ):
        with pytest.raises(ValueError, match=f"^dpo_loss: .*{words}"):
            rlk.dpo_loss(C.detach(), R.detach(), f, g, **options)


@pytest.mark.parametrize("packed", (False, True))
def test_the_weights_of_wpo_are_those_of_trl_and_of_open_instruct(packed):
    draw = torch.Generator().manual_seed(4)
    logp, squares = (-torch.rand(4, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    live = torch.rand(4, 5, generator=draw) < 0.7
    live[:, 0] = True
    means = [torch.stack([x[i][live[i]].mean() for i in range(4)]) for x in (logp - squares, logp)]
    want = means[0].view(2, 2).sum(0).exp(), means[1].view(2, 2).sum(0).exp().clamp(max=1)
    logp[~live] = torch.nan
    layout = (lambda x: x.flatten()) if packed else (lambda x: x)
    more = {"cu_seqlens": [0, 5, 10, 15, 20]} if packed else {}
    leaf = layout(logp).requires_grad_()
    got = rlk.wpo_weights(leaf, layout(live), log_sum_sq_probs=layout(squares), **more)
    torch.testing.assert_close(got, want[0])
    torch.testing.assert_close(rlk.wpo_weights(leaf, layout(live), **more), want[1])
    assert not got.requires_grad
    with pytest.raises(ValueError, match="wpo_weights: logprobs holds 3 answers; they come in pairs"):
        rlk.wpo_weights(torch.zeros(3, 2), torch.ones(3, 2))
