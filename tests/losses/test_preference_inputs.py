"""Answers without tokens, and log-probabilities of tokens where those of answers belong."""

import math

import pytest
import torch
from linear_problems import gradients

import rlkernels as rlk
from rlkernels.losses.preference_types import KINDS

# The third pair is empty, the fourth has no rejected answer, the fifth no chosen one; the last two are certain in one
# or both of their answers.
CHOSEN = torch.tensor([-2.0, -3.5, 0.0, -1.5, 0.0, 0.0, 0.0])
REJECTED = torch.tensor([-2.5, -1.0, 0.0, 0.0, -2.5, -3.0, 0.0])
N, M = torch.tensor([3, 4, 0, 2, 0, 3, 2]), torch.tensor([2, 5, 0, 0, 4, 2, 1])
USUAL = [0, 1]
BETA = 0.3


def log_odds(logp):
    return logp - torch.log1p(-logp.exp())


def odds_ratios(C, R):
    """``-b log sigmoid(log odds_c - log odds_r)`` by the formula; ln 2 where a pair has an empty answer or two certain
    ones.
    """
    losses = [-BETA * torch.nn.functional.logsigmoid(log_odds(C[i] / N[i]) - log_odds(R[i] / M[i])) for i in USUAL]
    even = torch.tensor(BETA * math.log(2), dtype=C.dtype)
    return [*losses, even, even, even, torch.zeros((), dtype=C.dtype), even]  # a certain chosen answer has won


@pytest.mark.fault(129)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["orpo", "orpo_odds_ratio"])
def test_an_empty_answer_leaves_the_odds_ratio_of_its_pair_even(name, dtype, backend):
    wide = [x.double().requires_grad_() for x in (CHOSEN, REJECTED)]
    losses = odds_ratios(*wide)
    if name == "orpo":
        losses = [x - wide[0][i] / N[i].clamp(min=1) for i, x in enumerate(losses)]
    want = torch.stack(losses).mean()
    own = [x.to(dtype).requires_grad_() for x in (CHOSEN, REJECTED)]
    loss, metrics = rlk.dpo_loss(
        *own, loss_type=name, beta=BETA, chosen_lengths=N, rejected_lengths=M, return_metrics=True
    )
    tight = {"rtol": 1e-12, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 2e-6, "atol": 1e-7}
    torch.testing.assert_close(loss.double(), want, **tight)
    for got, truth in zip(gradients(loss, own), gradients(want, wide), strict=True):
        torch.testing.assert_close(got.double(), truth, **tight)
    del metrics["log_odds_ratio"]  # of a certain chosen answer it is infinite
    assert all(x.isfinite() for x in metrics.values())


@pytest.mark.fault(129)
def test_the_pair_of_the_report_leaves_the_others_as_they_are(backend):
    c, r = torch.tensor([-2.0, -3.5, 0.0], requires_grad=True), torch.tensor([-2.5, -1.0, 0.0], requires_grad=True)
    loss, metrics = rlk.dpo_loss(
        c,
        r,
        loss_type="orpo",
        chosen_lengths=torch.tensor([3, 4, 0]),
        rejected_lengths=torch.tensor([2, 5, 0]),
        return_metrics=True,
    )
    two = rlk.dpo_loss(
        c[:2], r[:2], loss_type="orpo", chosen_lengths=torch.tensor([3, 4]), rejected_lengths=torch.tensor([2, 5])
    )
    assert loss.item() == pytest.approx((2 * two.item() + 0.1 * math.log(2)) / 3, rel=2e-6)
    assert all(x.isfinite() for x in metrics.values())
    for got, want in zip(gradients(loss, (c, r)), gradients(2 / 3 * two, (c, r)), strict=True):
        # The third answer is a sum of no tokens: nothing is behind its slope.
        torch.testing.assert_close(got[:2], want[:2], rtol=2e-6, atol=1e-8)


@pytest.mark.fault(129)
@pytest.mark.parametrize("name", KINDS)
def test_no_loss_of_pairs_is_nan_for_empty_answers(name, backend):
    given = {"label_smoothing": 0.1} if name == "exo_pair" else {}
    if name == "rpo":
        given = {"chosen_rewards": torch.ones(3), "rejected_rewards": torch.zeros(3)}
    if KINDS[name].gold:
        given = {"gold_logps": torch.tensor([-1.0, 0.0, 0.0]), "gold_lengths": torch.tensor([2, 0, 0])}
    refs = {"ref_chosen_logps": torch.zeros(3), "ref_rejected_logps": torch.zeros(3)} if KINDS[name].reference else {}
    for normalized in (False, True) if "length_normalized" in KINDS[name].takes else (False,):
        c, r = (torch.tensor([-2.0, 0.0, 0.0], requires_grad=True) for _ in range(2))
        loss = rlk.dpo_loss(
            c,
            r,
            **refs,
            loss_type=name,
            chosen_lengths=torch.tensor([3, 0, 0]),
            rejected_lengths=torch.tensor([2, 4, 0]),
            length_normalized=normalized,
            **given,
        )
        assert loss.isfinite() and all(g.isfinite().all() for g in gradients(loss, (c, r)))


@pytest.mark.fault(129)
@pytest.mark.parametrize(
    "name", ["orpo", "simpo", "cpo", "sigmoid", "kto", "apo_zero_unpaired", "bco", "kto_paired_batch"]
)
def test_a_head_s_answers_without_a_live_token_are_empty_answers(name, backend):
    draw = torch.Generator().manual_seed(0)
    hidden, head = (
        torch.randn(4, 5, 6, generator=draw, requires_grad=True),
        torch.randn(11, 6, generator=draw, requires_grad=True),
    )
    targets, mask = torch.randint(0, 11, (4, 5), generator=draw), torch.ones(4, 5, dtype=torch.bool)
    mask[1], mask[3] = False, False
    if name in KINDS:
        refs = (
            {"ref_chosen_logps": torch.zeros(2), "ref_rejected_logps": torch.zeros(2)} if KINDS[name].reference else {}
        )
        loss = rlk.linear_dpo_loss(hidden, head, targets, mask, loss_type=name, **refs)
        sums = rlk.sequence_sums(rlk.linear_token_logprobs(hidden, head, targets), mask)
        want = rlk.dpo_loss(
            sums[:2],
            sums[2:],
            loss_type=name,
            chosen_lengths=mask[:2].sum(-1),
            rejected_lengths=mask[2:].sum(-1),
            **refs,
        )
        torch.testing.assert_close(loss, want)
    else:
        given = {"kto": {"kl": 0.1}, "bco": {"delta": 0.0}}.get(name, {})
        loss = rlk.linear_unpaired_preference_loss(
            hidden, head, targets, torch.zeros(4), torch.tensor([1, 1, 0, 0]), mask, loss_type=name, **given
        )
    found = gradients(loss, (hidden, head))
    assert loss.isfinite() and all(g.isfinite().all() for g in found)
    assert not found[0][~mask].any()


PER_TOKEN = torch.zeros(2, 6)
CALLS = {
    "dpo_loss": ("chosen_logps", lambda: rlk.dpo_loss(PER_TOKEN, PER_TOKEN, PER_TOKEN, PER_TOKEN)),
    "dpo_loss without a reference": (
        "chosen_logps",
        lambda: rlk.dpo_loss(
            PER_TOKEN, PER_TOKEN, loss_type="simpo", chosen_lengths=PER_TOKEN + 1, rejected_lengths=PER_TOKEN + 1
        ),
    ),
    "unpaired_preference_loss": (
        "logps",
        lambda: rlk.unpaired_preference_loss(PER_TOKEN, PER_TOKEN, torch.ones(2, 6), kl=0.0),
    ),
    "unpaired_preference_loss of other prompts": (
        "kl_logps",
        lambda: rlk.unpaired_preference_loss(
            PER_TOKEN[0], PER_TOKEN[0], torch.ones(6), kl_logps=PER_TOKEN, ref_kl_logps=PER_TOKEN
        ),
    ),
}


@pytest.mark.fault(138)
@pytest.mark.parametrize("case", CALLS)
def test_log_probabilities_of_tokens_are_not_taken_for_those_of_answers(case):
    name, call = CALLS[case]
    with pytest.raises(
        ValueError,
        match=rf"^{case.split()[0]}: {name} has shape \(2, 6\), expected \[B\]; sum over "
        r"tokens first",
    ):
        call()
