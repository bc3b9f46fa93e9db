"""Faults of rewards: F130, F139 and F147, negative rewards of MaxRL, lengths that are none, and rewards that are no
floats.
"""

import math

import host_reads
import pytest
import torch

import rlkernels as rlk

IDS = torch.tensor([7, 7, 7, 3, 3, 7, 3])


def maxrl(rewards, ids=IDS, **options):
    return rlk.group_advantages(torch.as_tensor(rewards), ids, scale="mean", **options)


def by_hand(rewards, ids=IDS, eps=1e-6):
    """``(R - mean) / (mean + eps)`` of each group, one after the other in Python."""
    found = []
    for r, i in zip(rewards, ids.tolist(), strict=True):
        group = [x for x, j in zip(rewards, ids.tolist(), strict=True) if j == i]
        mean = sum(group) / len(group)
        found.append(0.0 if mean == 0 else (r - mean) / (mean + eps))
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.fault(130)
@pytest.mark.parametrize("baseline", ["mean", "leave-one-out", "batch-mean", None], ids=str)
def test_a_negative_reward_is_refused_where_the_scale_is_the_mean(baseline):
    for rewards, named in (
        ([-1.0, 1.0, -1.0, -1.0, 0.0, 0.0, 2.0], "-1.0 at entry 0"),
        ([1.0, 1.0, 1.0, 1.0, 0.0, 0.0, -(2.0**-20)], "-9.5367431640625e-07 at entry 6"),
        ([1.0, 1.0, 1.0, 1.0, -math.inf, 0.0, 1.0], "-inf at entry 4"),
    ):
        with pytest.raises(
            ValueError, match=f"^group_advantages: rewards holds {named}; it needs rewards >= 0 for scale 'mean'"
        ):
            maxrl(rewards, baseline=baseline)
    with pytest.raises(ValueError, match="rewards holds -3.0 at entry 2"):
        maxrl(torch.tensor([1, 1, -3, 1, 0, 0, 0]))
    assert (
        rlk.group_advantages(torch.tensor([-1.0, 1.0, -1.0, -1.0, 0.0, 0.0, 2.0]), IDS, baseline=baseline)
        .isfinite()
        .all()
    )


@pytest.mark.fault(130)
def test_rewards_that_are_not_negative_keep_their_advantages():
    for rewards in (
        [0.0, 1.0, 0.0, 1.0, 1.0, 1.0, 0.0],
        [0.0, 0.0, 0.0, 1e-9, 0.0, -0.0, 3e-7],
        [math.nan, 2.0, 1.0, 0.5, 0.25, 0.0, 0.125],
    ):
        live = [x for x in rewards if not math.isnan(x)]
        want = by_hand(live, IDS[[not math.isnan(x) for x in rewards]])
        got = maxrl(torch.tensor(rewards, dtype=torch.float64))
        torch.testing.assert_close(got[[not math.isnan(x) for x in rewards]], want, rtol=1e-12, atol=0)
        assert got.isfinite().all() and got.abs().max() <= len(rewards)


def unread(monkeypatch):
    host_reads.answer(monkeypatch, False)


@pytest.mark.fault(130)
@pytest.mark.parametrize("baseline", ["mean", "leave-one-out", "batch-mean", None], ids=str)
def test_where_values_are_not_read_a_negative_reward_makes_its_group_nan_and_no_other(baseline, monkeypatch):
    unread(monkeypatch)
    got = maxrl([-1.0, 1.0, -1.0, 1.0, 0.5, 0.0, 2.0], baseline=baseline)
    assert got.isnan().tolist() == (IDS == 7).tolist()


@pytest.mark.fault(130)
def test_a_compiled_program_gives_nan_as_an_accelerator_does():
    torch._dynamo.reset()
    got = torch.compile(lambda r: maxrl(r), backend="eager", fullgraph=True)(
        torch.tensor([-1.0, 1.0, -1.0, 1.0, 0.5, 0.0, 2.0])
    )
    assert got.isnan().tolist() == (IDS == 7).tolist()


REWARDS = torch.tensor([1.0, 0.0, 2.0, 1.0, 0.5, 0.0, 2.0])


@pytest.mark.fault(139)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf, -math.inf])
def test_lengths_that_are_no_lengths_are_refused(bad, dtype):
    lengths = torch.tensor([1, 2, 3, 4, bad, 5, 6], dtype=dtype)
    with pytest.raises(
        ValueError, match=f"^group_advantages: lengths holds {bad} at entry 4; it needs finite lengths >= 0"
    ):
        rlk.group_advantages(REWARDS, IDS, baseline="length-mean", lengths=lengths)
    # Under a reward that could not be scored it is not looked at.
    unscored = torch.where(torch.arange(7) == 4, torch.nan, REWARDS)
    got = rlk.group_advantages(unscored, IDS, baseline="length-mean", scale=None, lengths=lengths)
    weights = torch.tensor([1, 2, 3, 4, 0, 5, 6], dtype=torch.float64)
    for i in range(7):
        group = (IDS == IDS[i]) & (torch.arange(7) != 4)
        mean = (weights * REWARDS.double())[group].sum() / weights[group].sum()
        assert got[i].item() == pytest.approx(0.0 if i == 4 else (REWARDS[i].double() - mean).item(), abs=1e-7)


@pytest.mark.fault(139)
@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_where_values_are_not_read_a_bad_length_makes_its_group_nan_and_no_other(bad, monkeypatch):
    unread(monkeypatch)
    got = rlk.group_advantages(REWARDS, IDS, baseline="length-mean", lengths=torch.tensor([1, 2, 3, 4, bad, 5, 6]))
    assert got.isnan().tolist() == (IDS == 3).tolist()


WHOLE = torch.tensor([[0, 1, 3, 0], [2, 0, 1, 1]])
NUMBERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]


@pytest.mark.fault(147)
@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
def test_rewards_may_be_integers_or_bools(dtype, backend):
    rewards, values = WHOLE.to(dtype), torch.tensor([[0.5, -1.0, 2.0, 0.25], [1.0, 0.0, -0.5, 0.75]])
    real = rewards.float()
    for v in (values, values.double()):
        for got, want in zip(
            rlk.gae(rewards, v, gamma=0.9, lam=0.8), rlk.gae(real.to(v.dtype), v, gamma=0.9, lam=0.8), strict=True
        ):
            assert got.dtype == v.dtype and torch.equal(got, want)
    returns = [[sum(0.9 ** (u - t) * float(row[u]) for u in range(t, 4)) for t in range(4)] for row in real]
    got = rlk.discounted_returns(rewards, gamma=0.9)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.tensor(returns), rtol=1e-6, atol=1e-7)
    ids = torch.tensor([0, 0, 1, 1])
    got = rlk.group_advantages(rewards[0], ids, scale=None)
    assert got.dtype == torch.float32 and torch.equal(
        got, real[0] - torch.tensor([real[0, :2].mean()] * 2 + [real[0, 2:].mean()] * 2)
    )
    packed = rlk.gae(rewards.view(-1), values.view(-1), cu_seqlens=[0, 4, 8], bootstrap_values=torch.ones(2))
    assert torch.equal(packed[0].view(2, 4), rlk.gae(real, values, bootstrap_values=torch.ones(2))[0])


@pytest.mark.fault(147)
@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn], ids=str)
def test_other_rewards_are_refused_by_name(dtype):
    rewards = torch.ones(2, 4).to(dtype)
    for where, call in (
        ("gae", lambda: rlk.gae(rewards, torch.ones(2, 4))),
        ("discounted_returns", lambda: rlk.discounted_returns(rewards)),
        ("group_advantages", lambda: rlk.group_advantages(rewards[0], IDS[:4])),
    ):
        with pytest.raises(TypeError, match=f"^{where}: rewards has dtype {dtype}; supported: .*, bool and integers"):
            call()
    with pytest.raises(TypeError, match="^group_advantages: rewards must be a torch.Tensor, got list"):
        rlk.group_advantages([1, 0], IDS[:2])
