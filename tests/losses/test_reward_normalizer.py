"""RewardNormalizer: the mean and spread of all rewards, however they are split."""

import math

import pytest
import torch

import rlkernels as rlk


def rewards(seed=0):
    return 3 * torch.randn(40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 1000


def test_mean_and_spread_are_torchs_and_normalised_rewards_have_neither(unbiased=True):
    x = rewards()
    for unbiased in (True, False):
        normalizer = rlk.RewardNormalizer(unbiased=unbiased)
        normalizer.update(x)
        torch.testing.assert_close(normalizer.mean, x.mean(), rtol=1e-13, atol=0)
        torch.testing.assert_close(normalizer.std, x.std(unbiased=unbiased), rtol=1e-12, atol=0)
        y = normalizer.normalize(x)
        torch.testing.assert_close(
            torch.stack([y.mean(), y.std(unbiased=unbiased)]), torch.tensor([0.0, 1.0], dtype=torch.float64)
        )


@pytest.mark.parametrize("cuts", [(), (1,), (0, 7, 7, 39), tuple(range(1, 40))])
def test_any_split_into_updates_and_ranks_gives_the_same_state(cuts):
    x = rewards()
    whole, split = rlk.RewardNormalizer(), rlk.RewardNormalizer()
    whole.update(x)
    ranks = []
    for part in x.tensor_split(cuts):
        split.update(part.view(1, -1))
        rank = rlk.RewardNormalizer()
        rank.update(part)
        ranks.append(rank.moments)
    gathered = rlk.RewardNormalizer()
    gathered.merge(torch.stack(ranks))
    for other in (split, gathered):
        torch.testing.assert_close(other.moments, whole.moments, rtol=1e-12, atol=0)


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_a_dead_reward_is_not_looked_at(garbage):
    x, mask = rewards(), torch.arange(40) % 3 != 0
    normalizer, other = rlk.RewardNormalizer(), rlk.RewardNormalizer()
    normalizer.update(x.masked_fill(~mask, garbage), mask)
    other.update(x[mask])
    torch.testing.assert_close(normalizer.moments, other.moments, rtol=1e-12, atol=0)


def test_before_two_rewards_there_is_no_spread_and_equal_rewards_have_the_smallest():
    normalizer = rlk.RewardNormalizer(std_min=0.25)
    x = torch.tensor([3.0])
    assert normalizer.normalize(x).item() == 3.0
    normalizer.update(torch.zeros(0))
    normalizer.update(x.half())
    assert normalizer.normalize(x).item() == 0.0 and normalizer.std.item() == 1.0
    normalizer.update(x)
    assert normalizer.std.item() == 0.25 and normalizer.normalize(x + 1).item() == 4.0


def test_normalised_rewards_are_differentiable_and_keep_their_precision():
    normalizer = rlk.RewardNormalizer()
    normalizer.update(torch.tensor([1.0, 5.0]))
    for dtype, real in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        x = torch.tensor([2.0], dtype=dtype, requires_grad=True)
        y = normalizer.normalize(x)
        assert y.dtype == real and torch.autograd.grad(y, x)[0].dtype == dtype
        assert y.item() == pytest.approx(-1 / math.sqrt(8), rel=1e-6)


def test_a_checkpoint_goes_on_where_it_was_written():
    first, second = rlk.RewardNormalizer(), rlk.RewardNormalizer()
    first.update(rewards())
    state = first.state_dict()
    second.load_state_dict(state)
    first.update(rewards(1))
    second.update(rewards(1))
    assert torch.equal(first.moments, second.moments) and not torch.equal(state["moments"], first.moments)


BAD = {
    "update": (TypeError, r"RewardNormalizer.update: rewards has dtype", lambda n: n.update(torch.ones(2).long())),
    "mask": (ValueError, r"RewardNormalizer.update: mask has shape", lambda n: n.update(torch.ones(2), torch.ones(3))),
    "merge": (ValueError, r"RewardNormalizer.merge: moments has shape \(2,\)", lambda n: n.merge(torch.ones(2))),
    "load": (ValueError, "load_state_dict: moments", lambda n: n.load_state_dict({"moments": torch.ones(2)})),
    "std_min": (ValueError, "std_min must be positive", lambda n: rlk.RewardNormalizer(std_min=0.0)),
    "unbiased": (TypeError, "unbiased must be True or False", lambda n: rlk.RewardNormalizer(unbiased=1)),
}


@pytest.mark.parametrize("case", BAD)
def test_the_normalizer_refuses_what_it_would_guess(case):
    error, message, call = BAD[case]
    with pytest.raises(error, match=message):
        call(rlk.RewardNormalizer())
