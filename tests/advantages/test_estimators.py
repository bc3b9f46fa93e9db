"""The estimators of the field: best of a group, several rewards, groups of one, steps, states, optimal baselines."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rlkernels as rlk

NAN = float("nan")
R = torch.tensor([1.0, 2.0, 0.0, 7.0, NAN, 0.5, 3.0, NAN], dtype=torch.float64)
IDS = torch.tensor([4, -1, 4, 9, 4, 4, -1, 9])
ALONE = 3


def randn(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def std(xs):
    return math.sqrt(sum((x - sum(xs) / len(xs)) ** 2 for x in xs) / (len(xs) - 1))


def test_the_best_of_a_group_leads_the_second():
    got = rlk.group_advantages(R, IDS, baseline="runner-up", eps=0.0)
    want = [(1.0 - 0.5) / std([1.0, 0.0, 0.5]), 0, 0, 0, 0, 0, 1.0 / std([2.0, 3.0]), 0]
    assert got.tolist() == pytest.approx(want)
    tied = rlk.group_advantages(torch.tensor([2.0, 2.0, 1.0]), torch.zeros(3).long(), baseline="runner-up", scale=None)
    assert tied.tolist() == [0.0, 0.0, 0.0]


def test_gpg_divides_by_the_share_of_rewards_that_are_not_zero():
    rewards, ids = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0]), torch.tensor([0, 0, 1, 1, 2, 2])
    got = rlk.group_advantages(rewards, ids, scale="nonzero-share", eps=0.0)
    assert got.tolist() == [1.5, -1.5, -1.5, 1.5, 0.0, 0.0]
    assert not rlk.group_advantages(torch.zeros(6), ids, scale="nonzero-share").any()


@pytest.mark.parametrize("baseline", ["mean", "leave-one-out", "length-mean", "runner-up"])
def test_a_group_of_one_gets_what_was_asked_for(baseline):
    lengths = torch.ones(8) if baseline == "length-mean" else None
    options = {"baseline": baseline, "lengths": lengths, "eps": 0.25}
    want = {"zero": 0.0, "raw": 7.0, "scaled": 7.0 / 1.25}
    plain = rlk.group_advantages(R, IDS, **options)
    for singleton, value in want.items():
        got = rlk.group_advantages(R, IDS, singleton=singleton, **options)
        assert got[ALONE].item() == pytest.approx(value)
        assert torch.equal(got[torch.arange(8) != ALONE], plain[torch.arange(8) != ALONE])
    raw = rlk.group_advantages(R, IDS, singleton="raw", **{**options, "eps": 0.0}, scale="batch-std")
    assert raw[ALONE].item() == pytest.approx(7.0 / std([1.0, 2.0, 0.0, 7.0, 0.5, 3.0]))


def test_several_rewards_are_normalised_one_by_one_and_added():
    rewards, ids = torch.stack([R, R.flip(0), randn(8, seed=1)], 1), IDS
    weights = (1.0, 0.5, -2.0)
    want = sum(w * rlk.group_advantages(rewards[:, k], ids) for k, w in enumerate(weights))
    for given_weights in (weights, torch.tensor(weights)):
        torch.testing.assert_close(rlk.group_advantages(rewards, ids, reward_weights=given_weights), want)
    # TRL's GDPO: the rows of the batch, then normalised with eps 1e-4.
    got = rlk.group_advantages(want, ids, baseline="batch-mean", scale="batch-std", eps=1e-4)
    torch.testing.assert_close(got, (want - want.mean()) / (want.std() + 1e-4))
    assert rlk.group_advantages(rewards[:, :0], ids, reward_weights=()).tolist() == [0.0] * 8


def steps_loop(rewards, ends, live, ids, eps):
    """Each token in turn: the normalised rewards of the steps of its row that end at it or later."""
    want = torch.zeros(rewards.shape, dtype=torch.float64)
    for row, t in itertools.product(*map(range, rewards.shape)):
        group = [
            rewards[j, s].item()
            for j, s in itertools.product(*map(range, rewards.shape))
            if ids[j] == ids[row] and ends[j, s] and live[j, s] and not rewards[j, s].isnan()
        ]
        if live[row, t] and len(group) > 1:
            mean, spread = sum(group) / len(group), std(group)
            want[row, t] = sum(
                (rewards[row, s].item() - mean) / (spread + eps)
                for s in range(t, rewards.shape[1])
                if ends[row, s] and live[row, s] and not rewards[row, s].isnan()
            )
    return want


def test_steps_are_normalised_over_their_group_and_summed_from_the_end():
    rewards, live, ends = randn(4, 6, seed=2), randn(4, 6, seed=3) > -0.8, randn(4, 6, seed=4) > 0.0
    rewards[2, 3], ends[2, 3] = NAN, True
    ids = torch.tensor([5, 1, 5, 5])
    want = steps_loop(rewards, ends, live, ids, 1e-3)
    garbage = torch.where(ends & live, rewards, NAN)
    got = rlk.step_advantages(garbage, ends, ids, live, eps=1e-3)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)
    flat = rlk.step_advantages(
        garbage.view(-1), ends.view(-1), ids, live.view(-1), eps=1e-3, cu_seqlens=torch.arange(5) * 6
    )
    torch.testing.assert_close(flat.view(4, 6), want, rtol=1e-10, atol=1e-12)


def test_gigpo_adds_the_episode_and_the_step_among_equal_states():
    episode = torch.tensor([1.0, 1.0, 1.0, 0.0, 2.0, 4.0], dtype=torch.float64)
    step, ids = randn(6, seed=5), torch.tensor([0, 0, 0, 0, 1, 1])
    anchors, trajectories = torch.tensor([7, 8, 7, 7, 7, 8]), torch.tensor([3, 3, 3, 1, 2, 9])
    of_steps = torch.zeros(6, dtype=torch.float64)
    of_steps[[0, 2, 3]] = step[[0, 2, 3]] - step[[0, 2, 3]].mean()
    rows = torch.tensor([0.25, 0.25, 0.25, -0.75, -1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(
        rlk.gigpo_advantages(episode, step, ids, anchors, step_weight=0.5), rows + 0.5 * of_steps
    )
    once = torch.tensor([0.5, 0.5, 0.5, -0.5, -1.0, 1.0], dtype=torch.float64)
    got = rlk.gigpo_advantages(episode, step, ids, anchors, trajectory_ids=trajectories)
    torch.testing.assert_close(got, once + of_steps)
    spread = step[[0, 2, 3]].std()
    got = rlk.gigpo_advantages(episode, step, ids, anchors, scale="std", eps=0.0)
    torch.testing.assert_close(got[[0, 2]], 0.5 + of_steps[[0, 2]] / spread)


def test_a_trajectory_of_many_rows_counts_once():
    # Three rollouts of one prompt in 1, 3 and 2 rows, the reward at the last row.
    trajectories, last = torch.tensor([4, 9, 9, 2, 9, 2]), torch.tensor([True, False, False, False, True, True])
    scores = torch.tensor([1.0, NAN, NAN, NAN, 0.0, 5.0])
    once = rlk.group_advantages(torch.where(last, scores, NAN), torch.zeros(6).long(), scale=None)
    got = rlk.broadcast_advantages(once, last, trajectories)
    assert got.tolist() == [-1.0, -2.0, -2.0, 3.0, -2.0, 3.0]


def baseline_loop(rewards, logp, log_squares, ids, live, weights, aligned, singleton):
    """The optimal token baseline, one token at a time."""
    rows, length = rewards.shape
    returns, variance, column = ({} for _ in range(3))
    for i in range(rows):
        places = [t for t in range(length) if live[i, t]]
        for k, t in enumerate(places):
            returns[i, t] = sum(rewards[i, s].item() for s in places[k:])
            variance[i, t] = sum(
                weights[i, s].item() ** 2 * (1 - 2 * math.exp(logp[i, s].item()) + math.exp(log_squares[i, s].item()))
                for s in places[: k + 1]
            )
            column[i, t] = k if aligned else t
    want = torch.zeros(rows, length, dtype=torch.float64)
    for i, t in returns:
        mine = [at for at in returns if ids[at[0]] == ids[i]]
        counts = {c: sum(column[at] == c for at in mine) for c in {column[at] for at in mine}}
        last = max((c for c, n in counts.items() if n > 1), default=-1)
        here = [at for at in mine if column[at] == column[i, t]]
        total = sum(variance[at] for at in here) + 1e-8
        base = sum(returns[at] * variance[at] for at in here) / total if column[i, t] <= last else 0.0
        want[i, t] = 0.0 if last < 0 and singleton == "zero" else returns[i, t] - base
    return want


@pytest.mark.parametrize("singleton", ["zero", "raw"])
@pytest.mark.parametrize("alignment", ["position", "live"])
def test_the_optimal_baseline_is_the_mean_weighted_with_the_variance_so_far(alignment, singleton):
    rewards, logp, weights = randn(5, 6, seed=6), -randn(5, 6, seed=7).abs(), randn(5, 6, seed=8).exp()
    log_squares, live = -randn(5, 6, seed=9).abs(), randn(5, 6, seed=10) > -0.7
    ids = torch.tensor([3, 8, 3, 3, 5])
    want = baseline_loop(rewards, logp, log_squares, ids, live, weights, alignment == "live", singleton)
    given_columns = [torch.where(live, x, NAN) for x in (rewards, logp, log_squares, weights)]
    options = {"alignment": alignment, "singleton": singleton}
    got = rlk.optimal_token_advantages(*given_columns[:3], ids, live, weights=given_columns[3], **options)
    torch.testing.assert_close(got[0], want, rtol=1e-9, atol=1e-10)
    flat = [x.view(-1) for x in given_columns]
    packed = rlk.optimal_token_advantages(
        *flat[:3], ids, live.view(-1), weights=flat[3], cu_seqlens=torch.arange(6) * 6, **options
    )
    assert all(torch.equal(p.view(5, 6), g) for p, g in zip(packed, got, strict=True))


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(5)), st.integers(-3, 3))
def test_rows_may_come_in_any_order_and_groups_have_any_names(order, shift):
    rewards, logp, live = randn(5, 4, seed=11), -randn(5, 4, seed=12).abs(), randn(5, 4, seed=13) > -0.7
    ids, order = torch.tensor([3, 8, 3, 3, 8]), torch.tensor(order)
    names = (ids * 7 + shift)[order]
    for function in (
        lambda k, i: rlk.step_advantages(rewards[k], live[k], i, live[k]),
        lambda k, i: rlk.optimal_token_advantages(rewards[k], logp[k], logp[k], i, live[k])[0],
        lambda k, i: rlk.gigpo_advantages(rewards[k, 0], rewards[k, 1], i, ids[k]),
    ):
        torch.testing.assert_close(function(order, names), function(torch.arange(5), ids)[order], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_nothing_gives_nothing(shape):
    zeros, ids = torch.zeros(shape), torch.zeros(shape[0], dtype=torch.int64)
    results = [rlk.step_advantages(zeros, zeros, ids), *rlk.optimal_token_advantages(zeros, zeros, zeros, ids)]
    dead = torch.zeros(2, 3)
    results += [rlk.step_advantages(dead + NAN, dead, torch.zeros(2).long())]
    results += rlk.optimal_token_advantages(*[dead + NAN] * 3, torch.zeros(2).long(), dead)
    assert not any(x.any() for x in results)
    empty = torch.zeros(0)
    assert rlk.gigpo_advantages(empty, empty, ids[:0], ids[:0]).shape == (0,)


def test_16_bit_rewards_give_float32_of_the_rounded_rewards():
    rewards, live, ids = randn(3, 4, seed=14).bfloat16(), torch.ones(3, 4), torch.tensor([1, 1, 1])
    for function in (
        lambda x: rlk.step_advantages(x, live, ids),
        lambda x: rlk.optimal_token_advantages(x, -x.abs(), -x.abs(), ids)[0],
        lambda x: rlk.gigpo_advantages(x[:, 0], x[:, 1], ids, ids),
    ):
        got = function(rewards)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), function(rewards.double()), rtol=1e-5, atol=1e-6)


Z, I2 = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
REFUSED = [
    (
        lambda: rlk.gigpo_advantages(*[Z[:, 0]] * 2, I2, I2, singleton="scaled"),
        "gigpo_advantages: singleton 'scaled' needs scale 'std', got None",
    ),
    (
        lambda: rlk.group_advantages(Z[:, 0], I2, singleton="scaled", scale=None),
        "group_advantages: singleton 'scaled' needs",
    ),
    (
        lambda: rlk.group_advantages(Z[:, 0], I2, reward_weights=[1.0]),
        r"group_advantages: rewards has shape \(2,\), expected \[N, K\]",
    ),
    (
        lambda: rlk.group_advantages(Z, I2, reward_weights=[1.0]),
        r"group_advantages: reward_weights has shape \(1,\), expected",
    ),
    (
        lambda: rlk.group_advantages(
            Z, I2, reward_weights=(1, 1, 1), scale="batch-std", moments=rlk.Moments(2, 0.0, 0.0)
        ),
        "group_advantages: moments are those of one reward",
    ),
    (
        lambda: rlk.step_advantages(Z, Z, I2, scale="mean"),
        "step_advantages: scale must be one of std, None; got 'mean'",
    ),
    (lambda: rlk.step_advantages(Z, Z, I2[:1]), r"step_advantages: group_ids has shape \(1,\), expected \(2,\)"),
    (
        lambda: rlk.gigpo_advantages(Z, Z, I2, I2),
        r"gigpo_advantages: episode_rewards has shape \(2, 3\), expected \[N\]",
    ),
    (
        lambda: rlk.optimal_token_advantages(Z, Z, Z, I2, singleton="scaled"),
        "optimal_token_advantages: singleton must be one of zero, raw; got 'scaled'",
    ),
]


@pytest.mark.parametrize("call,message", REFUSED, ids=range(len(REFUSED)))
def test_what_the_estimators_cannot_take_is_refused(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call()
