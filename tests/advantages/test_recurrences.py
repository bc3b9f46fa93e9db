"""Lambdas of sequences, turns, resets, V-trace and episodes, against loops and sums written out from the papers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkernels.advantages.environments import rollout_gae
from rlkernels.advantages.gae import MASKED, discounted_returns, gae
from rlkernels.advantages.vtrace import vtrace

MASK = torch.tensor(
    [[1, 1, 0, 0, 1, 1, 0], [0, 1, 0, 1, 0, 1, 1], [1, 1, 1, 1, 1, 1, 1], [0] * 7, [0, 0, 0, 1, 0, 0, 0]],
    dtype=torch.bool,
)
B, L = MASK.shape
NAN = float("nan")


def randn(*shape, seed):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


REWARDS, VALUES, LOGPROBS, OLD = (randn(B, L, seed=k) for k in range(4))
LAM = torch.tensor([0.0, 0.5, 0.95, 1.0, 0.7], dtype=torch.float64)
BOOTSTRAP = torch.tensor([0.5, -1.0, 2.0, 9.0, 0.25], dtype=torch.float64)
TURNS = torch.tensor(
    [[1, 0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 0, 0], [0, 1, 0, 0, 1, 0, 1], [1] * 7, [0] * 7], dtype=torch.bool
)


def packed(*tensors):
    """The rows as one packed batch, with an empty sequence between the second and the third."""
    return [x.reshape(-1) for x in tensors], torch.tensor([0, L, 2 * L, 2 * L, 3 * L, 4 * L, 5 * L])


def of_six(x):
    return torch.cat([x[:2], x[:1], x[2:]])


def same(got, want, rtol=1e-12):
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("masked", MASKED)
@pytest.mark.parametrize("bootstrap", [None, BOOTSTRAP])
def test_a_lambda_of_each_sequence_is_that_of_its_row_alone(masked, bootstrap):
    got = gae(REWARDS, VALUES, MASK, gamma=0.9, lam=LAM, masked=masked, bootstrap_values=bootstrap)
    for row in range(B):
        one = slice(row, row + 1)
        end = None if bootstrap is None else bootstrap[one]
        want = gae(
            REWARDS[one], VALUES[one], MASK[one], gamma=0.9, lam=LAM[row].item(), masked=masked, bootstrap_values=end
        )
        same([x[one] for x in got], want)


def turns_loop(rewards, values, live, ends, gamma, lam, turn_gamma, turn_lam, bootstrap):
    """RAGEN's two loops over one row; the last live token ends a turn."""
    places = [t for t in range(len(rewards)) if live[t]]
    ends = [t for t in places if ends[t] or t == places[-1]]
    rewards, advantages, returns = list(rewards), [0.0] * len(rewards), [0.0] * len(rewards)
    following, trace, turn_return = bootstrap, 0.0, {}
    for t in reversed(ends):
        trace = rewards[t] + turn_gamma * following - values[t] + turn_gamma * turn_lam * trace
        following, turn_return[t] = values[t], trace + values[t]
    for t in ends:
        rewards[t] = turn_return[t]
    following = trace = 0.0
    for t in reversed(places):
        if t in ends:
            following = trace = 0.0
        trace = rewards[t] + gamma * following - values[t] + gamma * lam * trace
        following = values[t]
        advantages[t], returns[t] = trace, trace + values[t]
    return advantages, returns


@pytest.mark.parametrize("bootstrap", [None, BOOTSTRAP])
def test_turns_are_a_level_above_the_tokens(bootstrap):
    given = (0.9, 0.8, 0.7, 0.6)
    ends = [0.0] * B if bootstrap is None else bootstrap.tolist()
    rows = [
        turns_loop(*row, *given, end)
        for *row, end in zip(*(x.tolist() for x in (REWARDS, VALUES, MASK, TURNS)), ends, strict=True)
    ]
    want = [torch.tensor(x, dtype=torch.float64) for x in zip(*rows, strict=True)]
    options = {"gamma": 0.9, "lam": 0.8, "turn_gamma": 0.7, "turn_lam": 0.6}
    garbage = torch.where(MASK, REWARDS, NAN)
    got = gae(garbage, VALUES, MASK, **options, bootstrap_values=bootstrap, turn_ends=TURNS)
    same(got, want)
    flat, cu_seqlens = packed(garbage, VALUES, MASK, TURNS)
    end = None if bootstrap is None else of_six(bootstrap)
    flat = gae(*flat[:3], **options, turn_ends=flat[3], cu_seqlens=cu_seqlens, bootstrap_values=end)
    assert all(torch.equal(x.view(B, L), y) for x, y in zip(flat, got, strict=True))


def test_one_turn_per_row_is_plain_gae():
    none = torch.zeros_like(MASK)
    got = gae(REWARDS, VALUES, MASK, gamma=0.9, lam=0.8, turn_ends=none, turn_gamma=0.3)
    same(got, gae(REWARDS, VALUES, MASK, gamma=0.9, lam=0.8))


def test_a_reset_lets_no_reward_pass_a_gap():
    want = torch.zeros(B, L, dtype=torch.float64)
    for row in range(B):
        total = 0.0
        for t in reversed(range(L)):
            total = REWARDS[row, t].item() + 0.9 * total if MASK[row, t] else 0.0
            want[row, t] = total
    garbage = torch.where(MASK, REWARDS, NAN)
    got = discounted_returns(garbage, MASK, gamma=0.9, masked="reset")
    same([got], [want])
    (rewards, mask), cu_seqlens = packed(garbage, MASK)
    flat = discounted_returns(rewards, mask, gamma=0.9, masked="reset", cu_seqlens=cu_seqlens)
    assert torch.equal(flat.view(B, L), got)


def vtrace_sums(rewards, values, ratios, gamma, lam, rho_max, c_max, over, bootstrap):
    """The sum of the paper's definition, ``O(T^2)``, over the steps of one row."""
    count = len(rewards)

    def ahead(x, t):
        return 0.0 if over[t] else x[t + 1] if t + 1 < count else bootstrap

    deltas = [min(rho_max, ratios[t]) * (rewards[t] + gamma * ahead(values, t) - values[t]) for t in range(count)]
    targets = []
    for s in range(count):
        total, factor = values[s], 1.0
        for t in range(s, count):
            total += factor * deltas[t]
            factor *= 0.0 if over[t] else gamma * lam * min(c_max, ratios[t])
        targets.append(total)
    gains = [min(rho_max, ratios[t]) * (rewards[t] + gamma * ahead(targets, t) - values[t]) for t in range(count)]
    return gains, targets


@pytest.mark.parametrize("bootstrap", [None, BOOTSTRAP])
def test_vtrace_is_the_sum_of_its_definition(bootstrap):
    over = torch.zeros_like(MASK)
    over[0, 1] = over[2, 3] = True
    advantages, targets = torch.zeros(B, L, dtype=torch.float64), torch.zeros(B, L, dtype=torch.float64)
    for row in range(B):
        live = MASK[row]
        columns = [x[row][live].tolist() for x in (REWARDS, VALUES, (LOGPROBS - OLD).exp())]
        end = 0.0 if bootstrap is None else bootstrap[row].item()
        found = vtrace_sums(*columns, 0.9, 0.8, 1.1, 1.5, over[row][live].tolist(), end)
        advantages[row, live], targets[row, live] = (torch.tensor(x, dtype=torch.float64) for x in found)
    options = {"gamma": 0.9, "lam": 0.8, "rho_max": 1.1, "c_max": 1.5}
    given = [torch.where(MASK, x, NAN) for x in (REWARDS, VALUES, LOGPROBS, OLD)]
    got = vtrace(*given, MASK, **options, terminated=over, bootstrap_values=bootstrap)
    same(got, (advantages, targets))
    flat, cu_seqlens = packed(*given, MASK, over)
    end = None if bootstrap is None else of_six(bootstrap)
    flat = vtrace(*flat[:5], **options, terminated=flat[5], cu_seqlens=cu_seqlens, bootstrap_values=end)
    assert all(torch.equal(x.view(B, L), y) for x, y in zip(flat, got, strict=True))


def test_vtrace_of_the_policy_that_sampled_is_gae():
    advantages, returns = gae(REWARDS, VALUES, MASK, gamma=0.9, lam=0.8, bootstrap_values=BOOTSTRAP)
    got = vtrace(REWARDS, VALUES, OLD, OLD, MASK, gamma=0.9, lam=0.8, bootstrap_values=BOOTSTRAP)[1]
    same([got], [returns])
    one = vtrace(REWARDS, VALUES, OLD, OLD, MASK, gamma=0.9, bootstrap_values=BOOTSTRAP)[0]
    same([one], [gae(REWARDS, VALUES, MASK, gamma=0.9, lam=1.0, bootstrap_values=BOOTSTRAP)[0]])
    bounded = vtrace(REWARDS, VALUES, LOGPROBS, OLD, MASK, advantage_rho_max=1e-9)[0]
    assert bounded.abs().max() < 1e-7


def rollout(seed=9, steps=6, environments=3):
    rewards, values, following = (randn(steps, environments, seed=seed + k) for k in range(3))
    terminated, truncated = randn(steps, environments, seed=seed + 3) > 0.8, randn(steps, environments, seed=20) > 1.0
    return rewards, values, following, terminated, truncated & ~terminated


def sum_of_differences(rewards, values, following, terminated, end, gamma, lam):
    """``A_t = sum_k (gamma lam)^k d_{t+k}`` up to the end of the episode, ``O(T^2)``, ``[T, N]``."""
    difference = rewards + gamma * torch.where(terminated, 0.0, following) - values
    want = torch.zeros_like(rewards)
    for t in range(len(rewards)):
        for n in range(rewards.shape[1]):
            for s in range(t, len(rewards)):
                want[t, n] += (gamma * lam) ** (s - t) * difference[s, n]
                if end[s, n]:
                    break
    return want


@pytest.mark.parametrize("layout", ["[T, N]", "[N, T]", "[N, T, 1]"])
def test_rollout_gae_is_the_sum_of_its_definition(layout):
    rewards, values, following, terminated, truncated = rollout()
    want = sum_of_differences(rewards, values, following, terminated, terminated | truncated, 0.9, 0.8)
    dim = {"[T, N]": 0, "[N, T]": 1, "[N, T, 1]": -2}[layout]

    def turned(x):
        return x if dim == 0 else x.T if dim == 1 else x.T[..., None]

    given = {
        "terminated": turned(terminated),
        "truncated": turned(truncated).double(),
        "next_values": torch.where(turned(terminated), NAN, turned(following)),
    }
    got = rollout_gae(turned(rewards), turned(values), time_dim=dim, gamma=0.9, lam=0.8, **given)
    same(got, (turned(want), turned(want + values)))
    # TorchRL's names: done is either of them.
    given = {
        "dones": turned(terminated | truncated),
        "terminated": given["terminated"],
        "next_values": given.pop("next_values"),
    }
    again = rollout_gae(turned(rewards), turned(values), time_dim=dim, gamma=0.9, lam=0.8, **given)
    same(again, (turned(want), turned(want + values)))


def test_dones_of_cleanrl_stand_one_step_later():
    rewards, values, _, ends, _ = rollout()
    last, starts = randn(3, seed=30), torch.cat([torch.zeros(1, 3, dtype=torch.bool), ends[:-1]])
    # CleanRL, ppo.py: the loop over nextnonterminal.
    want, trace = torch.zeros_like(rewards), torch.zeros(3, dtype=torch.float64)
    for t in reversed(range(6)):
        go_on = 1.0 - (ends[-1] if t == 5 else starts[t + 1]).double()
        following = last if t == 5 else values[t + 1]
        trace = rewards[t] + 0.99 * following * go_on - values[t] + 0.99 * 0.95 * go_on * trace
        want[t] = trace
    got = rollout_gae(rewards, values, last, time_dim=0, dones=starts.float(), dones_at="start", last_dones=ends[-1])
    same(got, (want, want + values))
    same(rollout_gae(rewards, values, last, time_dim=0, dones=ends), (want, want + values))


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 20), st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.floats(-2.0, 2.0))
def test_a_constant_reward_has_a_closed_form(length, gamma, lam, reward):
    # V = 0 everywhere: A_t = r (1 - (gamma lam)^n) / (1 - gamma lam), n the steps that are left.
    rewards = torch.full((length, 1), reward, dtype=torch.float64)
    got = rollout_gae(
        rewards, torch.zeros_like(rewards), torch.zeros(1, dtype=torch.float64), time_dim=0, gamma=gamma, lam=lam
    )[0]
    for t in range(length):
        want = math.fsum(reward * (gamma * lam) ** k for k in range(length - t))
        assert got[t, 0].item() == pytest.approx(want, rel=1e-12, abs=1e-14)


def test_inserting_dead_tokens_changes_no_live_one():
    few = {"turn_ends": TURNS[2:3, :4], "turn_gamma": 0.7, "lam": LAM[2:3]}
    want = gae(REWARDS[2:3, :4], VALUES[2:3, :4], **few, gamma=0.9)
    at = torch.tensor([0, 2, 3, 6])
    rewards, values = torch.full((1, 8), NAN, dtype=torch.float64), torch.full((1, 8), NAN, dtype=torch.float64)
    mask, ends = torch.zeros(1, 8, dtype=torch.bool), torch.ones(1, 8, dtype=torch.bool)
    rewards[0, at], values[0, at], mask[0, at], ends[0, at] = REWARDS[2, :4], VALUES[2, :4], True, TURNS[2, :4]
    got = gae(rewards, values, mask, **{**few, "turn_ends": ends}, gamma=0.9)
    assert all(torch.equal(g[:, at], w) for g, w in zip(got, want, strict=True))


def test_a_live_nan_stays_in_its_sequence_and_behind_its_own_turn():
    rewards = REWARDS.clone()
    rewards[2, 5] = NAN
    (flat, values, mask), cu_seqlens = packed(rewards, VALUES, MASK)
    for found in (
        gae(flat, values, mask, lam=of_six(LAM), cu_seqlens=cu_seqlens)[0],
        vtrace(flat, values, values, values, mask, cu_seqlens=cu_seqlens)[0],
        discounted_returns(flat, mask, masked="reset", cu_seqlens=cu_seqlens),
    ):
        found = found.view(B, L)
        assert found[2, 5].isnan() and not found[[0, 1, 3, 4]].isnan().any()
    ends = torch.zeros(L, 1, dtype=torch.bool)
    ends[3] = True
    found = rollout_gae(rewards[2][:, None], VALUES[2][:, None], torch.zeros(1), time_dim=0, dones=ends)[0]
    assert found[:, 0].isnan().tolist() == [False] * 4 + [True] * 2 + [False]


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
def test_nothing_gives_nothing(shape):
    zeros, rows = torch.zeros(shape), torch.zeros(shape[0])
    results = [
        *gae(zeros, zeros, lam=rows),
        *gae(zeros, zeros, turn_ends=zeros),
        discounted_returns(zeros, zeros, masked="reset"),
        *vtrace(zeros, zeros, zeros, zeros, zeros),
        *rollout_gae(zeros, zeros, rows, time_dim=1),
    ]
    assert all(x.shape == shape and x.dtype == torch.float32 for x in results)
    results = [
        *gae(rows, rows, turn_ends=rows, cu_seqlens=[0, shape[0]]),
        *vtrace(*[rows] * 4, cu_seqlens=[0, len(rows)]),
    ]
    assert all(x.shape == rows.shape and not x.any() for x in results)


def test_16_bit_inputs_give_float32_of_the_rounded_inputs():
    short = [x.bfloat16() for x in (REWARDS, VALUES, LOGPROBS, OLD)]
    wide = [x.double() for x in short]
    pairs = [
        (gae(*short[:2], MASK, lam=LAM.bfloat16()), gae(*wide[:2], MASK, lam=LAM.bfloat16().double())),
        (vtrace(*short, MASK), vtrace(*wide, MASK)),
        (rollout_gae(*short[:2], short[2][:, 0], time_dim=1), rollout_gae(*wide[:2], wide[2][:, 0], time_dim=1)),
    ]
    for got, want in pairs:
        assert all(x.dtype == torch.float32 for x in got)
        same(got, want, rtol=1e-6)


Z = torch.zeros(2, 3)
REFUSED = [
    (lambda: gae(Z, Z, lam=torch.tensor([0.5, 1.5])), r"gae: lam must be in \[0, 1\], got 1.5"),
    (
        lambda: gae(Z, Z, lam=torch.zeros(3)),
        r"gae: lam must be a number, or one of each sequence, \(2,\); got a tensor of shape \(3,\)",
    ),
    (lambda: gae(Z, Z, Z, masked="zero", turn_ends=Z), "gae: turn_ends takes masked 'skip', got 'zero'"),
    (lambda: gae(Z, Z, turn_gamma=0.5), "gae: turn_gamma needs turn_ends"),
    (lambda: gae(Z, Z, turn_lam=0.5), "gae: turn_lam needs turn_ends"),
    (lambda: gae(Z, Z, Z, masked="reset"), "gae: masked must be one of skip, zero, none; got 'reset'"),
    (lambda: vtrace(Z, Z, Z, Z, rho_max=0.0), "vtrace: rho_max must be positive"),
    (lambda: rollout_gae(Z, Z, time_dim=0), "rollout_gae: pass last_values or next_values"),
    (lambda: rollout_gae(Z, Z, Z[0], time_dim=2), r"rollout_gae: time_dim is 2, rewards has shape \(2, 3\)"),
    (lambda: rollout_gae(Z, Z, Z[0], time_dim=0, truncated=Z), "rollout_gae: a cut needs next_values"),
    (lambda: rollout_gae(Z, Z, Z[0], time_dim=0, last_dones=Z[0]), "rollout_gae: last_dones needs dones_at 'start'"),
    (
        lambda: rollout_gae(Z, Z, Z[0], time_dim=0, dones_at="start", terminated=Z),
        "rollout_gae: dones_at 'start' takes dones, and neither",
    ),
]


@pytest.mark.parametrize("call,message", REFUSED, ids=range(len(REFUSED)))
def test_what_these_functions_cannot_take_is_refused(call, message):
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        call()
