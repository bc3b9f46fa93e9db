"""Metrics of losses of values, pairs and steps: what has no weight is not counted, whatever it holds."""

import math

import pytest
import torch

import rlkernels as rlk

NAN = math.nan


@pytest.mark.parametrize("rubbish", [100.0, NAN, math.inf])
@pytest.mark.parametrize("clip_range", [None, 0.2])
def test_values_of_weight_0_are_not_counted(backend, rubbish, clip_range):
    values, weights = torch.tensor([[1.0, rubbish, 3.0]]), torch.tensor([[1.0, 0.0, 2.0]])
    old = None if clip_range is None else torch.tensor([[0.0, 0.0, 3.0]])
    loss, metrics = rlk.value_loss(
        values, old, torch.zeros(1, 3), weights=weights, clip_range=clip_range, return_metrics=True
    )
    assert math.isfinite(loss.item()) and metrics["error"].item() == (1.0 + 9.0) / 2
    if clip_range is not None:  # the clip of the first makes its error smaller, and so counts for nothing
        assert metrics["clip_fraction"].item() == 0.0


@pytest.mark.parametrize("rubbish", [-100.0, NAN, math.inf])
def test_pairs_of_weight_0_are_not_counted(backend, rubbish):
    chosen, rejected = torch.tensor([1.0, rubbish, 2.0]), torch.tensor([0.0, 0.0, 3.0])
    weights = torch.tensor([1.0, 0.0, 0.5])
    _, metrics = rlk.pairwise_reward_loss(chosen, rejected, pair_weights=weights, return_metrics=True)
    found = {name: x.item() for name, x in metrics.items()}
    assert found == {"reward_chosen": 1.5, "reward_rejected": 1.5, "reward_margin": 0.0, "accuracy": 0.5}
    mask = torch.tensor([True, True, False])
    _, metrics = rlk.pairwise_reward_loss(chosen, rejected, mask=mask, pair_weights=weights, return_metrics=True)
    assert metrics["reward_margin"].item() == 1.0 and metrics["accuracy"].item() == 1.0


@pytest.mark.parametrize("soft", [False, True])
def test_steps_of_weight_0_are_not_counted(backend, soft):
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 2.0]])
    labels = torch.tensor([1.0, 1.0, 0.0]) if soft else torch.tensor([0, 0, 1])
    options = {"reward_token_ids": [0, 1]} if soft else {}
    weights = torch.tensor([1.0, 0.0, 1.0])
    _, metrics = rlk.process_reward_loss(logits, labels, weights=weights, return_metrics=True, **options)
    assert metrics["accuracy"].item() == 1.0
    _, metrics = rlk.process_reward_loss(logits, labels, return_metrics=True, **options)
    assert metrics["accuracy"].item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("weights", [torch.ones(2), [1.0, 1.0, 1.0], torch.ones(3, dtype=torch.int64)])
def test_weights_of_steps_that_do_not_fit_are_refused_by_name_with_and_without_metrics(soft, weights):
    labels, options = (torch.ones(3), {"reward_token_ids": [0, 1]}) if soft else (torch.zeros(3, dtype=torch.int64), {})
    told = set()
    for return_metrics in (False, True):
        with pytest.raises((TypeError, ValueError), match="^process_reward_loss: weights ") as refusal:
            rlk.process_reward_loss(
                torch.zeros(3, 2), labels, weights=weights, return_metrics=return_metrics, **options
            )
        told.add(str(refusal.value))
    assert len(told) == 1
