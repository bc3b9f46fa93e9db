"""Objectives over ``[N]`` and the scan of advantages, against oracles and a Python loop."""

import math

import oracles
import pytest
import torch
from loss_batches import objective_columns
from problems import NAN, PARAMS
from reference import gae as gae_loop
from reference import same_bits
from weighted_losses import CASES, check, check_without_a_live_element

from rlkernels.backends.triton import launch as kernels
from rlkernels.backends.triton import launch_configs
from rlkernels.objectives import OBJECTIVES

BUILTIN = [name for name, entry in OBJECTIVES.items() if entry.function.__module__.startswith("rlkernels.")]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(launch_configs, "BLOCK", 16)
    monkeypatch.setattr(launch_configs, "SCAN", 16)


def objective_problem(name, n, dtype):
    draw = torch.Generator().manual_seed(n)
    columns = objective_columns(n, dtype, draw)
    weight = torch.randn(n, generator=draw, dtype=dtype)
    weight[::3] = 0.0
    entry = OBJECTIVES[name]
    return [columns[c].clone() for c in entry.columns], [PARAMS[p] for p in entry.params], weight


def oracle(name, columns, params):
    first = columns[0].double().requires_grad_()
    value = getattr(oracles, name)(first, *(c.double() for c in columns[1:]), *params)
    return value.detach(), torch.autograd.grad(value.sum(), first)[0]


# A block holds 16: a part, one, one and a part, several, and more partial sums than one block adds.
@pytest.mark.parametrize("n", [1, 16, 17, 70, 300])
@pytest.mark.parametrize("name", BUILTIN)
def test_value_derivative_and_weighted_sum_equal_the_oracle(name, n):
    columns, params, weight = objective_problem(name, n, torch.float32)
    value, derivative = oracle(name, columns, params)
    loss, got_value, got_derivative = kernels.elementwise(name, columns, params, None)
    torch.testing.assert_close(got_value.double(), value, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(got_derivative.double(), derivative, atol=2e-6, rtol=4e-6)
    torch.testing.assert_close(loss.double(), got_value.double().sum(), rtol=2e-7, atol=1e-30)  # rounded once
    dead = weight == 0
    for column in columns:
        column[dead] = NAN  # F26: garbage at masked positions
    loss, weighted_value, weighted_derivative = kernels.elementwise(name, columns, params, weight)
    assert same_bits(weighted_value, torch.where(dead, 0.0, got_value)) and same_bits(
        weighted_derivative, torch.where(dead, 0.0, got_derivative)
    )
    torch.testing.assert_close(loss.double(), (weight.double() * weighted_value.double()).sum(), rtol=2e-7, atol=1e-30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 16, 70])
@pytest.mark.parametrize(("objective", "taken", "kind"), CASES)
def test_a_weighted_loss_and_its_slopes_are_the_definition(objective, taken, kind, n, dtype):
    check(kernels.weighted_loss, objective, taken, kind, n, dtype)


def test_a_weighted_loss_without_a_live_element_is_zero():
    check_without_a_live_element(kernels.weighted_loss)


@pytest.mark.parametrize("name", BUILTIN)
def test_float64_columns_and_numbers_are_exact(name):
    columns, params, _ = objective_problem(name, 40, torch.float64)
    for got, want in zip(
        kernels.elementwise(name, columns, params, None)[1:], oracle(name, columns, params), strict=True
    ):
        torch.testing.assert_close(got, want, atol=1e-13, rtol=1e-12)


@pytest.mark.parametrize("name", BUILTIN)
def test_nan_poisons_its_row_and_no_other(name):
    columns, params, _ = objective_problem(name, 20, torch.float32)
    for k, column in enumerate(columns):
        column[k] = NAN
    _, value, derivative = kernels.elementwise(name, columns, params, None)
    rows = torch.arange(20) < len(columns)
    slope = oracle(name, columns, params)[1]
    assert value.isnan().equal(rows)
    assert (derivative.isnan() | ~slope.isnan()).all() and derivative[~rows].isfinite().all()


@pytest.mark.fault(24)
def test_log_sigmoid_keeps_both_tails():
    margin = torch.tensor([-1e4, -1000.0, -90.0, -20.0, 0.0, 20.0, 90.0, 1e4])
    _, value, derivative = kernels.elementwise("pairwise", [margin], [], None)
    truth, slope = oracle("pairwise", [margin], [])
    torch.testing.assert_close(value.double(), truth, rtol=4e-6, atol=1e-45)
    torch.testing.assert_close(derivative.double(), slope, rtol=4e-6, atol=1e-38)


@pytest.mark.fault(25)
@pytest.mark.parametrize("gap", [1e-8, 1e-4, 0.5, -1e-8, 20.0, 88.0, -1e4])
def test_k3_keeps_its_digits_near_zero_and_its_tails(gap):
    logp = torch.tensor([0.0], dtype=torch.float32)
    _, value, derivative = kernels.elementwise("k3", [logp, torch.tensor([gap])], [], None)
    exact = torch.tensor([gap]).double()
    torch.testing.assert_close(derivative.double(), -torch.expm1(exact), rtol=2e-6, atol=0)
    torch.testing.assert_close(value.double(), torch.expm1(exact) - exact, rtol=4e-6, atol=2**-23 * abs(gap))


@pytest.mark.fault(29)
def test_ties_take_the_unclipped_side():
    advantage = torch.tensor([1.0, -1.0, 0.0])
    zero = torch.zeros(3)
    _, _, derivative = kernels.elementwise("ppo_clip", [zero, zero, advantage], [0.0, 0.0], None)
    assert derivative.tolist() == [-1.0, 1.0, 0.0]


# scan -----------------------------------------------------------------------------------------------------------------


def gae_truth(rewards, values, mask, gamma, lam, masked):
    """One row at a time by the loop of the textbook; "skip": the dead tokens are not there; "zero": their reward and
    value are 0.
    """
    advantages, returns = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for row in range(rewards.shape[0]):
        live = mask[row] if masked != "none" else torch.ones_like(mask[row])
        at = live.nonzero()[:, 0] if masked == "skip" else torch.arange(rewards.shape[1])
        r, v = (torch.where(live, x[row].double(), 0.0)[at].tolist() for x in (rewards, values))
        a = torch.tensor(gae_loop(r, v, gamma, lam), dtype=torch.float64)
        advantages[row, at], returns[row, at] = (
            a.to(rewards.dtype),
            (a + torch.tensor(v, dtype=torch.float64)).to(rewards.dtype),
        )
    return torch.where(mask, advantages, 0.0) if masked != "none" else advantages, torch.where(
        mask, returns, 0.0
    ) if masked != "none" else returns


@pytest.mark.fault(85)
@pytest.mark.parametrize("masked", ["skip", "zero", "none"])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_advantages_equal_the_loop_and_garbage_at_dead_tokens_changes_nothing(masked, length, dtype):
    draw = torch.Generator().manual_seed(length)
    rewards, values = (torch.randn(4, length, generator=draw, dtype=dtype) for _ in range(2))
    mask = torch.rand(4, length, generator=draw) < 0.6
    mask[1], mask[2] = True, False
    mask[3, : length // 2] = False
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 3e-7, "atol": 3e-7}
    for gamma, lam in ((0.99, 0.95), (1.0, 1.0), (0.9, 0.0)):
        expected = gae_truth(rewards, values, mask, gamma, lam, masked)
        r, v = rewards.clone(), values.clone()
        if masked != "none":
            r[~mask], v[~mask] = NAN, math.inf
        for got, want in zip(kernels.gae(r, v, mask, None, gamma, lam, masked), expected, strict=True):
            torch.testing.assert_close(got, want, **tolerance)


def test_dead_tokens_between_two_blocks_do_not_hide_the_value_behind_them():
    rewards, values = torch.randn(2, 1, 50, generator=torch.Generator().manual_seed(2))
    mask = torch.ones(1, 50, dtype=torch.bool)
    mask[0, [34, 17, 18, 19]] = False  # a block ends at token 34, the next one at 18
    for lam in (0.0, 0.9):
        for got, want in zip(
            kernels.gae(rewards, values, mask, None, 0.9, lam, "skip"),
            gae_truth(rewards, values, mask, 0.9, lam, "skip"),
            strict=True,
        ):
            torch.testing.assert_close(got, want, rtol=3e-7, atol=3e-7)


def test_gae_without_a_mask_is_returns_minus_values_at_gamma_and_lambda_one():
    rewards, values = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(0))
    advantages, returns = kernels.gae(rewards, values, None, None, 1.0, 1.0, "skip")
    total = rewards.double().flip(-1).cumsum(-1).flip(-1)
    torch.testing.assert_close(returns.double(), total, rtol=2e-7, atol=1e-6)
    torch.testing.assert_close(advantages.double(), total - values.double(), rtol=2e-7, atol=1e-6)


@pytest.mark.fault(97)
def test_a_long_trace_keeps_its_digits(monkeypatch):
    monkeypatch.setattr(launch_configs, "SCAN", 256)
    rewards = torch.full((1, 4096), 0.1)
    values = torch.zeros(1, 4096)
    got = kernels.gae(rewards, values, None, None, 0.9995, 1.0, "skip")[0][0]
    powers = 0.9995 ** torch.arange(4096, dtype=torch.float64)
    torch.testing.assert_close(got.double(), rewards[0, 0].double() * powers.cumsum(0).flip(0), rtol=2e-7, atol=0)


@pytest.mark.fault(87)
@pytest.mark.parametrize("masked", ["skip", "zero", "none"])
@pytest.mark.parametrize("index", [torch.int64, torch.int32])
def test_a_packed_batch_has_the_bits_of_its_sequences_alone(masked, index):
    draw = torch.Generator().manual_seed(1)
    ends = torch.tensor([0, 5, 5, 38, 39, 60], dtype=index)  # an empty sequence and one of one token among them
    rewards, values = torch.randn(2, 60, generator=draw)
    mask = torch.rand(60, generator=draw) < 0.7
    got = kernels.gae(rewards, values, mask, ends, 0.97, 0.9, masked)
    for start, stop in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        part = slice(start, stop)
        alone = kernels.gae(
            rewards[None, part].contiguous(), values[None, part].contiguous(), mask[None, part], None, 0.97, 0.9, masked
        )
        for whole, one in zip(got, alone, strict=True):
            assert same_bits(whole[part], one[0])


@pytest.mark.fault(11)
def test_nothing_to_do_launches_nothing():
    empty = torch.empty(0)
    loss, value, derivative = kernels.elementwise("pairwise", [empty], [], None)
    assert loss.item() == 0.0 and value.shape == derivative.shape == (0,)
    for shape in ((0, 5), (3, 0)):
        assert [x.shape for x in kernels.gae(torch.empty(shape), torch.empty(shape), None, None, 0.9, 0.9, "skip")] == [
            shape,
            shape,
        ]
    advantages, _ = kernels.gae(empty, empty, None, torch.tensor([0, 0]), 0.9, 0.9, "skip")
    assert advantages.shape == (0,)
