"""Every metric that a function returns stands in its docstring, or in that of the function it refers to."""

import inspect
import re

import pytest
import torch

import rlkernels as rlk

LOGP, OLD, ENGINE = (-1.0 - torch.rand(2, 3, generator=torch.Generator().manual_seed(i)) for i in range(3))
LOGITS, TARGETS = torch.linspace(-1, 1, 24).sin().view(2, 3, 4), torch.tensor([[0, 1, 2], [3, 0, 1]])
HIDDEN, WEIGHT = LOGITS[..., :3], torch.linspace(-1, 1, 12).view(4, 3)
ADVANTAGES, MASK, PAIR = torch.tensor([1.0, -1.0]), torch.ones(2, 3), torch.tensor([-1.0, -2.0])
POLICY = [
    {"objective": "ppo_clip", "ref_logprobs": OLD, "kl": rlk.KLTerm("k3", ratio_weighted=True)},
    {"objective": "dual_clip", "ratio_level": "sequence", "ref_logprobs": OLD},
    {"objective": "ppo_clip_cap", "ratio_cap": 5.0},
    {"objective": "cispo", "clip_low": 0.2, "clip_high": 0.2, "ratio_level": "sequence_token"},
    {"objective": "dppo_tv", "ratio_level": "sequence_sum"},
    {"objective": "gmpo"},
    {"rollout_logprobs": ENGINE, "correction": rlk.Correction(high=2.0, opsm_delta=0.1)},
]
REWARDS = {"loss_type": "rpo", "chosen_rewards": PAIR, "rejected_rewards": PAIR}
LENGTHS = {"chosen_lengths": torch.tensor([2, 2]), "rejected_lengths": torch.tensor([3, 2])}
PAIRS, ANSWERS = torch.cat([HIDDEN, -HIDDEN]), torch.tensor([True, False])
CALLS = [
    *((rlk.policy_loss, (LOGP, OLD, ADVANTAGES, MASK), {"entropy": -LOGP} | given) for given in POLICY),
    *((rlk.logits_policy_loss, (LOGITS, TARGETS, OLD, ADVANTAGES, MASK), given) for given in POLICY),
    *((rlk.linear_policy_loss, (HIDDEN, WEIGHT, TARGETS, OLD, ADVANTAGES, MASK), given) for given in POLICY),
    (rlk.value_loss, (LOGP, OLD, ENGINE), {"clip_range": 0.1}),
    *((rlk.dpo_loss, (PAIR, PAIR, PAIR, PAIR), given) for given in ({}, REWARDS, {"loss_type": "orpo"} | LENGTHS)),
    (rlk.linear_dpo_loss, (PAIRS, WEIGHT, TARGETS.repeat(2, 1), MASK.repeat(2, 1)), {"loss_type": "orpo"}),
    *(
        (rlk.unpaired_preference_loss, (PAIR, PAIR, ANSWERS), x)
        for x in ({"kl": 0.1}, {"loss_type": "bco", "delta": 0.1})
    ),
    (rlk.linear_unpaired_preference_loss, (HIDDEN, WEIGHT, TARGETS, PAIR, ANSWERS, MASK), {"kl": 0.1}),
    (rlk.sft_loss, (LOGITS, TARGETS, MASK), {"z_loss_coef": 0.1}),
    (rlk.logprobs_sft_loss, (LOGP, MASK), {}),
    (rlk.linear_sft_loss, (HIDDEN, WEIGHT, TARGETS, MASK), {"z_loss_coef": 0.1}),
    (rlk.divergence_loss, (LOGITS, -LOGITS, MASK), {}),
    (rlk.linear_distillation_loss, (HIDDEN, WEIGHT, -HIDDEN, WEIGHT, MASK), {}),
    (rlk.pairwise_reward_loss, (PAIR, -PAIR), {}),
    (rlk.process_reward_loss, (LOGITS, TARGETS), {}),
    (rlk.rank_list_loss, (LOGP,), {}),
    (rlk.rollout_weights, (OLD, ENGINE, MASK), {}),
    (rlk.rejection_mask, (OLD, ENGINE, MASK), {"rules": {"seq_mean_k3": 0.1}}),
]


def words(text):
    """The words of a text in code font or in quotes."""
    return set(re.findall(r'[`"](\w+)[`"]', text))


def named(function):
    """The words below ``Returns:``, and those of the function whose metrics they refer to."""
    text = re.search(r"^Returns:\n(.*?)\n(?=\S)", inspect.getdoc(function), re.DOTALL | re.MULTILINE)[1]
    others = re.findall(r"metrics\s+of\s+``(\w+)``", text)
    return words(text).union(*(named(getattr(rlk, other)) for other in others))


@pytest.mark.parametrize("function", dict.fromkeys(call[0] for call in CALLS), ids=lambda function: function.__name__)
def test_every_metric_stands_in_the_docstring(function):
    keys = set()
    for called, inputs, options in CALLS:
        if called is function:
            keys |= called(*inputs, **options, return_metrics=True)[1].keys()
    assert keys and sorted(keys - named(function)) == []


def test_no_function_with_metrics_is_left_out():
    public = (getattr(rlk, name) for name in rlk.__all__ if inspect.isfunction(getattr(rlk, name)))
    assert {f for f in public if "return_metrics" in inspect.signature(f).parameters} == {call[0] for call in CALLS}


def test_the_metrics_of_a_mismatch_stand_in_the_docstring():
    assert sorted(rlk.rollout_metrics(OLD, ENGINE, MASK).keys() - words(rlk.rollout_metrics.__doc__)) == []
