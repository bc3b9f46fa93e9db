"""Losses and advantages of batches of rows: padded, packed, and with more masked tokens between the sampled ones."""

import math
import runpy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import ROOT

import rlkernels as rlk
from rlkernels.trajectories import TokenRow, token_batch

MODES = {
    "token-mean": {},
    "seq-mean-token-mean": {},
    "seq-mean-token-sum": {},
    "token-sum": {},
    "prompt-mean": ("group_ids",),
    "rollout-mean": ("rollout_ids",),
}


def row_of(sampled, **attributes):
    """A row whose sampled tokens have the log-probabilities -0.1, -0.2, ... and one reward at the last one."""
    count = len(sampled)
    places = [i for i, s in enumerate(sampled) if s]
    logprobs = [-0.1 * (1 + places.index(i)) if i in places else math.nan for i in range(count)]
    rewards = [1.0 if i == places[-1] else 0.0 for i in range(count)] if places else [0.0] * count
    return TokenRow(tuple(range(1, count + 1)), tuple(sampled), tuple(logprobs), tuple(rewards), (), **attributes)


def trained(batch, logp, mode):
    """Loss, gradient of the sampled tokens' log-probabilities, and skip-convention advantages and returns of them.

    Dead tokens hold NaN.
    """
    leaf = logp.clone().requires_grad_()
    shape, at = batch.mask.shape, batch.mask.flatten().nonzero()[:, 0]
    dead = torch.full((batch.mask.numel(),), math.nan, dtype=torch.float64)
    policy = dead.index_put((at,), leaf).view(shape)
    values = dead.index_put((at,), logp.sin()).view(shape)
    advantages, returns = rlk.gae(
        batch.rewards.double(), values, batch.mask, gamma=0.9, lam=0.8, masked="skip", cu_seqlens=batch.cu_seqlens
    )
    loss = rlk.policy_loss(
        policy,
        batch.rollout_logprobs.double(),
        advantages,
        batch.mask,
        aggregation=mode,
        cu_seqlens=batch.cu_seqlens,
        normalizers={name: getattr(batch, name) for name in MODES[mode]},
    )
    loss.backward()
    return loss.detach(), leaf.grad, advantages[batch.mask], returns[batch.mask]


def assert_same(got, expected):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


ROWS = [
    row_of((0, 1, 1, 0, 0, 1), reward=1.0, group_id=4, rollout_id=7),
    row_of((0, 0, 0), reward=0.0, group_id=4, rollout_id=8),
    row_of((0, 0, 1, 1), reward=1.0, group_id=4, rollout_id=7),
    row_of((1, 1), reward=None, group_id=4, rollout_id=9),
]


@pytest.mark.parametrize("mode", MODES)
def test_padded_on_either_side_and_packed_batches_agree(mode):
    count = int(token_batch(ROWS).mask.sum())
    assert count == 3 + 0 + 2 + 1
    logp = torch.linspace(-2, -0.1, count, dtype=torch.float64)
    expected = trained(token_batch(ROWS), logp, mode)
    assert expected[1].abs().sum() > 0
    for options in ({"padding": "left"}, {"layout": "packed"}, {"layout": "packed", "pad_to": 8}, {"pad_to": 5}):
        batch = token_batch(ROWS, **options)
        assert batch.mask.shape[-1] % options.get("pad_to", 1) == 0
        assert_same(trained(batch, logp, mode), expected)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.data())
def test_more_masked_tokens_change_no_loss_no_other_gradient_and_no_skip_advantage(data):
    rows, longer = [], []
    for i in range(data.draw(st.integers(1, 3))):
        sampled = [False, *data.draw(st.lists(st.booleans(), min_size=1, max_size=6))]
        more = list(sampled)
        for _ in range(data.draw(st.integers(0, 4))):
            more.insert(data.draw(st.integers(0, len(more))), False)
        for into, what in ((rows, sampled), (longer, more)):
            into.append(row_of(what, rollout_id=i % 2))
    options = data.draw(st.sampled_from(({}, {"padding": "left"}, {"layout": "packed"})))
    short = token_batch(rows)
    logp = torch.linspace(-2, -0.1, int(short.mask.sum()), dtype=torch.float64)
    for mode in MODES:
        assert_same(trained(token_batch(longer, **options), logp, mode), trained(short, logp, mode))


def test_a_rollout_counts_once_in_its_group_and_hands_its_advantage_to_all_rows():
    batch = token_batch(ROWS)
    assert batch.is_last_row.tolist() == [False, True, True, True]
    advantages = batch.of_rollouts(rlk.group_advantages(batch.row_rewards, batch.group_ids, scale=None))
    # Rewards 1 and 0 of rollouts 7 and 8; rollout 9 could not be scored.
    assert advantages.tolist() == [0.5, -0.5, 0.5, 0.0]


def test_positions_begin_anew_in_each_row_and_targets_cross_no_row():
    batch = token_batch(ROWS, layout="packed", pad_to=8, pad_id=99, ignore_index=-1)
    assert batch.cu_seqlens.tolist() == [0, 6, 9, 13, 16]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 0, 1, 2, 3, 0, 1, 0]
    assert batch.input_ids[-1] == 99 and not batch.attention_mask[-1]
    assert batch.targets.tolist() == [2, 3, -1, -1, 6, -1, -1, -1, -1, -1, 3, 4, -1, 2, -1, -1]
    moved = batch.to("meta")
    assert moved.mask.is_meta and moved.cu_seqlens.is_meta


@pytest.mark.parametrize("layout", ("padded", "packed"))
def test_no_row_and_a_row_without_tokens(layout):
    none = token_batch([], layout=layout)
    assert none.mask.numel() == 0 and none.group_ids.shape == (0,)
    empty = TokenRow((), (), (), (), ())
    batch = token_batch([empty, *ROWS[:1]], layout=layout)
    assert int(batch.mask.sum()) == 3


def test_rollout_weights_take_an_answer_whose_log_probabilities_were_not_recorded():
    row = TokenRow((1, 2, 3), (False, True, True), (math.nan, -1.0, math.nan), (0.0,) * 3, ())
    batch = token_batch([row])
    weights = rlk.rollout_weights(torch.full((1, 3), -0.5), batch.rollout_logprobs, batch.mask, high=5.0)
    torch.testing.assert_close(weights, torch.tensor([[math.exp(0.5), 1.0, 0.0]]))


def test_the_example_trains_the_answers_alone_and_the_rewarded_rollout_gains(capsys):
    runpy.run_path(str(ROOT / "examples/agent_trajectories.py"), run_name="__main__")
    trained, changes = capsys.readouterr().out.splitlines()
    assert trained == "trained: search(capital of France) | Paris | search(capital of France) | Lyon | "
    better, worse = (float(word) for word in changes.split() if word[0] in "+-")
    assert better > 1 and worse < -1
