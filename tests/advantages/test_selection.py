"""The best responses of each group, against sorting by hand."""

import pytest
import torch

import rlkernels as rlk


@pytest.mark.parametrize("count", (1, 2, 5))
def test_the_best_of_each_group_are_those_of_a_sort(count):
    draw = torch.Generator().manual_seed(count)
    rewards, groups = torch.randint(4, (40,), generator=draw).float(), torch.randint(7, (40,), generator=draw)
    rewards[::9] = torch.nan
    want = torch.zeros(40, dtype=torch.bool)
    for group in groups.unique():
        scored = [i for i in range(40) if groups[i] == group and not rewards[i].isnan()]
        want[sorted(scored, key=lambda i: (-rewards[i], i))[:count]] = True
    assert torch.equal(rlk.best_of_n(rewards, groups, count=count), want)


def test_infinite_rewards_are_rewards_and_no_response_selects_none():
    rewards = torch.tensor([-torch.inf, torch.nan, torch.nan, torch.inf])
    assert rlk.best_of_n(rewards, torch.tensor([0, 0, 1, 2])).tolist() == [True, False, False, True]
    assert rlk.best_of_n(torch.zeros(0), torch.zeros(0, dtype=torch.long)).shape == (0,)


def test_a_count_below_1_is_refused():
    with pytest.raises(ValueError, match="best_of_n: count must be at least 1, got 0"):
        rlk.best_of_n(torch.zeros(2), torch.zeros(2, dtype=torch.long), count=0)
