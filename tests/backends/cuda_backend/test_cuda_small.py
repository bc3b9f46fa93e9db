"""Objectives over columns and the advantage scan on the CUDA backend, run on the CPU."""

import math

import pytest
import torch
from reference import gae as gae_by_hand
from reference import same_bits
from row_calls import same
from weighted_losses import CASES, check, check_without_a_live_element

from rlkernels.backends import eager
from rlkernels.objectives import OBJECTIVES

KL_TERM = OBJECTIVES["kl_term"]
PARAMS = {
    "ratio_cap": 1.1,
    "ratio_max": 1.5,
    "delta_low": 0.03,
    "delta_high": 0.02,
    "delta": 0.05,
    "clip_low": 0.2,
    "clip_high": 0.28,
    "dual_clip": 3.0,
    "tau_pos": 1.0,
    "tau_neg": 1.05,
    "beta": 0.3,
    "label_smoothing": 0.1,
    "clip_range": 0.2,
    "tau": 0.05,
    "alpha": 0.5,
    **dict(zip(KL_TERM.params, (3.0, -20.0, 20.0, -10.0, 10.0, 2.0, 1.0, 0.0), strict=True)),
}
NATIVE = [name for name, o in OBJECTIVES.items() if o.function.__module__.startswith("rlkernels.")]


def grid(name):
    """Every combination of the values where formulas break: zeros of both signs, ties, overflow of exp, infinities,
    NaN.
    """
    values = torch.tensor([0.0, -0.0, 0.2, -0.25, 1.5, 88.0, -88.0, 1e4, -1e4, math.inf, -math.inf, math.nan])
    columns = torch.cartesian_prod(*[values] * len(OBJECTIVES[name].columns))
    columns = columns[:, None] if columns.dim() == 1 else columns
    return list(columns.T.contiguous()), [PARAMS[p] for p in OBJECTIVES[name].params]


@pytest.mark.parametrize("name", NATIVE)
def test_every_functor_gives_the_value_and_derivative_of_its_python_source(backend, name):
    columns, params = grid(name)
    _, value, derivative = backend.elementwise(name, columns, params, None)
    _, value_py, derivative_py = eager.elementwise(name, columns, params, None)
    for got, expected in ((value, value_py), (derivative, derivative_py)):
        torch.testing.assert_close(got, expected, rtol=2e-6, atol=1e-37, equal_nan=True)


@pytest.mark.parametrize("name", ("ppo_clip", "dpo_sigmoid", "value_clip"))
def test_float64_columns_stay_float64(backend, name):
    columns = [
        c.double() for c in torch.randn(len(OBJECTIVES[name].columns), 1500, generator=torch.Generator().manual_seed(1))
    ]
    params = [PARAMS[p] for p in OBJECTIVES[name].params]
    for got, expected in zip(
        backend.elementwise(name, columns, params, None), eager.elementwise(name, columns, params, None), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


# 1024 elements make a block: one short, one block, one over; 70 000: 69 blocks. 300 000: more blocks than threads that
# add their parts. 1 100 000: more parts than those threads load at once.
@pytest.mark.parametrize("n", (1, 31, 1023, 1024, 1025, 70_000, 300_000, 1_100_000))
def test_the_weighted_sum_is_exact_to_the_last_rounding(backend, n):
    generator = torch.Generator().manual_seed(n)
    columns = list(torch.randn(2, n, generator=generator))
    weight = torch.rand(n, generator=generator) - 0.3
    loss, value, _ = backend.elementwise("reinforce", columns, [], weight)
    exact = math.fsum((weight.double() * value.double()).tolist())
    assert abs(float(loss) - exact) <= 2**-23 * max(abs(exact), 1e-9 * n)
    loss, value, _ = backend.elementwise("reinforce", columns, [], None)
    exact = math.fsum(value.double().tolist())
    assert abs(float(loss) - exact) <= 2**-23 * max(abs(exact), 1e-9 * n)


def test_no_order_of_blocks_and_threads_changes_a_bit_of_the_sum(backend, host_module):
    n = 9000
    columns = list(torch.randn(3, n, generator=torch.Generator().manual_seed(2)))
    weight = torch.rand(n) * 10.0 ** torch.arange(n).remainder(9)
    found = []
    for order in ("forward", "reverse", "random:1", "random:2"):
        host_module[1](order)
        found.append(backend.elementwise("ppo_clip", columns, [0.2, 0.28], weight))
    assert all(same(found[0], other) for other in found[1:])


@pytest.mark.fault(26)
def test_an_element_of_weight_zero_is_not_evaluated(backend):
    columns = list(torch.randn(3, 1030, generator=torch.Generator().manual_seed(3)))
    weight = torch.rand(1030)
    weight[[3, 1029]] = 0.0
    expected = backend.elementwise("ppo_clip", columns, [0.2, 0.28], weight)
    for bad in (math.nan, math.inf):
        for column in columns:
            column[[3, 1029]] = bad
        got = backend.elementwise("ppo_clip", columns, [0.2, 0.28], weight)
        assert same(got, expected)
        assert got[0].isfinite() and (got[1][[3, 1029]] == 0).all() and (got[2][[3, 1029]] == 0).all()


@pytest.mark.fault(24)
def test_the_pair_loss_keeps_its_tails(backend):
    margin = torch.tensor([-1000.0, -90.0, 20.0, 80.0])
    _, value, derivative = backend.elementwise("pairwise", [margin], [], None)
    torch.testing.assert_close(value.double(), torch.nn.functional.softplus(-margin.double()), rtol=2e-6, atol=1e-38)
    assert derivative[0] == -1 and 0 < -derivative[3] < 1e-34


def test_no_elements_sum_to_zero(backend):
    loss, value, derivative = backend.elementwise("reinforce", [torch.empty(0), torch.empty(0)], [], None)
    assert float(loss) == 0.0 and value.shape == derivative.shape == (0,)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("n", (1, 1025, 3000))
@pytest.mark.parametrize(("objective", "taken", "kind"), CASES)
def test_a_weighted_loss_and_its_slopes_are_the_definition(backend, objective, taken, kind, n, dtype):
    check(backend.weighted_loss, objective, taken, kind, n, dtype)


def test_a_weighted_loss_without_a_live_element_is_zero(backend):
    check_without_a_live_element(backend.weighted_loss)


def by_hand(rewards, values, live, gamma, lam, masked):
    """One sequence, from the definition of the three conventions, in Python floats."""
    keep = [i for i, alive in enumerate(live) if alive]
    r, v = rewards.double().tolist(), values.double().tolist()
    if masked == "skip":
        found = dict(zip(keep, gae_by_hand([r[i] for i in keep], [v[i] for i in keep], gamma, lam), strict=True))
    else:
        clean = [[x if alive else 0.0 for x, alive in zip(column, live, strict=True)] for column in (r, v)]
        found = {i: a for i, a in enumerate(gae_by_hand(*clean, gamma, lam)) if live[i]}
    advantages = torch.tensor([found.get(i, 0.0) for i in range(len(r))], dtype=torch.float64)
    return advantages, torch.tensor(
        [found[i] + v[i] if i in found else 0.0 for i in range(len(r))], dtype=torch.float64
    )


def draw(shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, *shape, generator=generator, dtype=torch.float64).to(dtype)
    return rewards, values, torch.rand(shape, generator=generator) < 0.6


# 8 tokens per thread, 256 threads, 2048 tokens per chunk: inside a thread, one warp, a chunk short, whole, one over,
# several chunks.
@pytest.mark.fault(85)
@pytest.mark.parametrize("length", (1, 7, 8, 9, 256, 257, 2047, 2048, 2049, 6000))
@pytest.mark.parametrize("masked", ("skip", "zero", "none"))
def test_the_scan_is_the_loop_for_every_mask_and_length(backend, length, masked):
    rewards, values, mask = draw((2, length), seed=length)
    mask[1, : length // 2] = False
    advantages, returns = backend.gae(rewards, values, mask, None, 0.99, 0.95, masked)
    for row in range(2):
        live = [True] * length if masked == "none" else mask[row].tolist()
        for got, expected in zip(
            (advantages[row], returns[row]), by_hand(rewards[row], values[row], live, 0.99, 0.95, masked), strict=True
        ):
            torch.testing.assert_close(got.double(), expected, rtol=2e-7, atol=2e-7)


@pytest.mark.parametrize("gamma, lam", ((1.0, 1.0), (0.9, 0.0), (0.0, 0.5)))
def test_the_edges_of_gamma_and_lambda_are_exact(backend, gamma, lam):
    rewards, values, mask = draw((1, 300), seed=4, dtype=torch.float64)
    got = backend.gae(rewards, values, mask, None, gamma, lam, "skip")
    for g, expected in zip(got, by_hand(rewards[0], values[0], mask[0].tolist(), gamma, lam, "skip"), strict=True):
        torch.testing.assert_close(g[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.fault(26)
@pytest.mark.parametrize("masked", ("skip", "zero"))
def test_what_stands_at_a_dead_token_changes_nothing(backend, masked):
    rewards, values, mask = draw((3, 2100), seed=5)
    mask[2] = False
    expected = backend.gae(rewards, values, mask, None, 0.99, 0.95, masked)
    for bad in (math.nan, math.inf):
        dirty = [torch.where(mask, x, bad) for x in (rewards, values)]
        assert same(backend.gae(*dirty, mask, None, 0.99, 0.95, masked), expected)
    assert all((x[~mask] == 0).all() for x in expected)


@pytest.mark.fault(87)
@pytest.mark.parametrize("masked", ("skip", "zero", "none"))
def test_packed_sequences_have_the_bits_of_sequences_apart(backend, masked):
    bounds = torch.tensor([0, 5, 5, 2305, 2306])  # one is empty, one is longer than a chunk
    rewards, values, mask = draw((2306,), seed=6)
    packed = backend.gae(rewards, values, mask, bounds, 0.99, 0.95, masked)
    for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        if end > begin:
            apart = backend.gae(
                rewards[None, begin:end].contiguous(),
                values[None, begin:end].contiguous(),
                mask[None, begin:end],
                None,
                0.99,
                0.95,
                masked,
            )
            assert same([x[begin:end] for x in packed], [x[0] for x in apart])


def test_no_order_of_threads_changes_a_bit_of_the_scan(backend, host_module):
    rewards, values, mask = draw((2, 4500), seed=7)
    found = []
    for order in ("forward", "reverse", "random:1"):
        host_module[1](order)
        found.append(backend.gae(rewards, values, mask, None, 0.99, 0.95, "skip"))
    assert same(found[0], found[1]) and same(found[0], found[2])


def test_a_nan_poisons_what_comes_before_it_in_its_sequence_and_nothing_else(backend):
    rewards, values, _ = draw((2, 2100), seed=8)
    clean = backend.gae(rewards, values, None, None, 0.99, 0.95, "none")
    rewards[0, 50] = math.nan
    got = backend.gae(rewards, values, None, None, 0.99, 0.95, "none")
    assert got[0][0, :51].isnan().all()
    assert same_bits(got[0][0, 51:], clean[0][0, 51:]) and same([x[1] for x in got], [x[1] for x in clean])


def test_no_tokens_give_empty_advantages(backend):
    none = torch.empty(0)
    assert backend.gae(none, none, None, torch.tensor([0]), 0.99, 0.95, "none")[0].shape == (0,)
    assert backend.gae(none.view(3, 0), none.view(3, 0), None, None, 0.99, 0.95, "none")[0].shape == (3, 0)
