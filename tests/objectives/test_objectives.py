"""Every registered objective on every backend against its oracle: value, derivative, NaN, tails, ties."""

import inspect

import oracles
import pytest
import torch
from loss_batches import objective_columns

import rlkernels
from rlkernels import available_backends, objectives
from rlkernels.backends import BACKENDS, DEVICES, absent
from rlkernels.objectives import codegen

OBJECTIVES = objectives.OBJECTIVES
BUILTIN = codegen.builtin()
PRESENT = [name for name in DEVICES["cpu"] if absent(name) is None]
PARAMS = {
    "clip_low": 0.2,
    "clip_high": 0.28,
    "dual_clip": 3.0,
    "tau_pos": 1.0,
    "tau_neg": 1.05,
    "clip_range": 0.2,
    "beta": 0.5,
    "label_smoothing": 0.1,
    "tau": 0.05,
    "alpha": 0.5,
    "ratio_cap": 1.1,
    "ratio_max": 1.5,
    "delta_low": 0.03,
    "delta_high": 0.02,
    "delta": 0.05,
    "order": 3.0,
    "low": -0.5,
    "high": 0.7,
    "value_low": -0.1,
    "value_high": 0.2,
    "cap": 1.5,
    "moving": 1.0,
    "straight": 0.0,
}

OF_RATIOS = [
    n
    for n in BUILTIN
    if "advantage" in OBJECTIVES[n].columns and {"old_logp", "rollout_logp"} & set(OBJECTIVES[n].columns)
]


def case(name, n=1000, dtype=torch.float32, seed=0):
    """Columns and parameters of an objective."""
    draw = torch.Generator().manual_seed(seed)
    columns = objective_columns(n, dtype, draw)
    entry = OBJECTIVES[name]
    return [columns[c].clone() for c in entry.columns], [PARAMS[p] for p in entry.params]


def run(backend, name, columns, params, weight=None):
    loss, value, derivative = BACKENDS[backend].elementwise(name, columns, params, weight)
    return value, derivative


def expected(name, columns, params):
    first = columns[0].clone().requires_grad_()
    value = getattr(oracles, name)(first, *columns[1:], *params)
    (derivative,) = torch.autograd.grad(value.sum(), first)
    return value.detach(), derivative


def test_every_objective_has_an_oracle():
    assert [name for name in BUILTIN if not hasattr(oracles, name)] == []


def test_native_backend_is_among_those_tested():
    # Without a compiler the suite still runs; with one, a build that went missing must not pass unnoticed.
    import shutil

    assert "cpu" in PRESENT or shutil.which("c++") is None, available_backends()


@pytest.mark.parametrize("backend", PRESENT)
@pytest.mark.parametrize("name", BUILTIN)
def test_value_and_derivative_equal_the_oracle(name, backend):
    columns, params = case(name)
    value, derivative = run(backend, name, columns, params)
    want_value, want_derivative = expected(name, [c.double() for c in columns], params)
    torch.testing.assert_close(value, want_value.float(), atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(derivative, want_derivative.float(), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("backend", PRESENT)
@pytest.mark.parametrize("name", BUILTIN)
def test_derivative_is_exact_in_float64(name, backend):
    columns, params = case(name, dtype=torch.float64)
    for got, want in zip(run(backend, name, columns, params), expected(name, columns, params), strict=True):
        torch.testing.assert_close(got, want, atol=1e-13, rtol=1e-12)


@pytest.mark.parametrize("backend", PRESENT)
@pytest.mark.parametrize("name", BUILTIN)
def test_nan_poisons_its_row_and_no_other(name, backend):
    columns, params = case(name, n=16)
    for k, column in enumerate(columns):
        column[k] = float("nan")
    value, derivative = run(backend, name, columns, params)
    _, slope = expected(name, columns, params)
    rows = torch.arange(16) < len(columns)
    assert value.isnan().equal(rows)
    # Autograd lets some NaN pass as a finite slope (max, clamp); we may be stricter, never laxer.
    assert derivative.isnan().logical_or(~slope.isnan()).all() and derivative[~rows].isfinite().all()


@pytest.mark.fault(25)
@pytest.mark.parametrize("backend", PRESENT)
@pytest.mark.parametrize("name", OF_RATIOS)
def test_overflowing_ratio_never_gives_a_nan_gradient(name, backend):
    gap = torch.tensor([20.0, 88.0, 200.0, 1e4]).repeat_interleave(3).repeat(2)
    gap[12:] *= -1
    advantage = torch.tensor([1.0, -1.0, 0.0]).repeat(8)
    columns = [gap, torch.zeros(24), advantage]
    params = [PARAMS[p] for p in OBJECTIVES[name].params]
    value, derivative = run(backend, name, columns, params)
    assert not value.isnan().any() and not derivative.isnan().any()
    if name != "dro":  # its penalty has no advantage
        assert (value[advantage == 0] == 0).all() and (derivative[advantage == 0] == 0).all()
    finite = gap.abs() <= 88  # float64 itself overflows at 1e4; the oracle's 0 * inf is NaN there
    want_value, want_derivative = expected(name, [c[finite].double() for c in columns], params)
    torch.testing.assert_close(value[finite], want_value.float(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(derivative[finite], want_derivative.float(), atol=1e-6, rtol=1e-5)


@pytest.mark.fault(24)
@pytest.mark.parametrize("backend", PRESENT)
def test_tails_keep_their_digits(backend):
    # exp(x) - 1 and log(1 + x) by themselves give 0 here; a margin of -90 must not give inf.
    gap = torch.tensor([1e-8, 1e-4, -1e-4, 80.0, -80.0, 0.0])
    value, derivative = run(backend, "k3", [torch.zeros(6), gap], [])
    torch.testing.assert_close(derivative, -gap.double().expm1().float(), atol=0, rtol=2e-6)
    assert (value >= 0).all()
    margin = torch.tensor([20.0, 80.0, -90.0, 1000.0, -1000.0, 1e4, -1e4])
    value, derivative = run(backend, "pairwise", [margin], [])
    torch.testing.assert_close(value, -torch.nn.functional.logsigmoid(margin.double()).float(), atol=0, rtol=2e-6)
    torch.testing.assert_close(derivative, -torch.sigmoid(-margin.double()).float(), atol=1e-30, rtol=2e-6)


TAILS = [20.0, 88.0, 90.0, 200.0, 1e4, 1e6]


@pytest.mark.fault(24, 25)
@pytest.mark.parametrize("backend", PRESENT)
@pytest.mark.parametrize("name", [n for n in BUILTIN if OBJECTIVES[n].columns[0] in ("margin", "log_ratio")])
def test_both_tails_are_finite_and_those_of_the_oracle_where_it_is(name, backend):
    column = torch.tensor([*TAILS, *(-x for x in TAILS), 0.0, 1e-8])
    params = [PARAMS[p] for p in OBJECTIVES[name].params]
    value, derivative = run(backend, name, [column], params)
    assert value.isfinite().all() and derivative.isfinite().all()
    want_value, want_derivative = expected(name, [column.double()], params)
    # Ratios of 1e4 overflow float64, and DiscoPOP's formula is inf * 0 then.
    sound = want_value.isfinite() & want_derivative.isfinite()
    if name == "alpha_divergence":
        sound &= 0.5 * column.abs() < 80  # capped beyond
        assert (derivative[-0.5 * column > 80] == 0).all()
    assert sound.sum() >= 8
    torch.testing.assert_close(value[sound], want_value[sound].float(), atol=2e-7, rtol=4e-6)
    torch.testing.assert_close(derivative[sound], want_derivative[sound].float(), atol=2e-7, rtol=4e-6)


@pytest.mark.fault(79)
@pytest.mark.parametrize("backend", PRESENT)
def test_log_odds_keep_their_digits_up_to_a_certain_answer(backend):
    logp = torch.tensor([-1e-30, -1e-8, -1e-4, -0.69, -0.7, -50.0, -1e4, 0.0])
    value, derivative = run(backend, "log_odds", [logp], [])
    exact = logp.double()
    torch.testing.assert_close(value, (exact - (-exact.expm1()).log()).float(), atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(derivative[:-1], (-1 / exact.expm1()).float()[:-1], atol=0, rtol=1e-6)
    assert derivative[-1] == 0  # at probability 1: documented


@pytest.mark.fault(29)
@pytest.mark.parametrize("backend", PRESENT)
@pytest.mark.parametrize("name", ["ppo_clip", "dual_clip"])
def test_at_an_exact_tie_the_derivative_is_the_unclipped_one(name, backend):
    # ratio 1.25 and 0.75 are exact in binary, so are the bounds.
    columns = [torch.tensor([1.25, 0.75, 1.25, 0.75]).log(), torch.zeros(4), torch.tensor([1.0, 1.0, -1.0, -1.0])]
    ratio = columns[0].exp()
    exact = ratio.eq(torch.tensor([1.25, 0.75, 1.25, 0.75]))
    _, derivative = run(backend, name, columns, [0.25, 0.25, 3.0][: len(OBJECTIVES[name].params)])
    torch.testing.assert_close(derivative[exact], (-ratio * columns[2])[exact])
    # A = 0: value and derivative are 0 on both sides of the clip.
    value, derivative = run(
        backend, name, [columns[0] * 3, columns[1], torch.zeros(4)], [0.25, 0.25, 3.0][: len(OBJECTIVES[name].params)]
    )
    assert (value == 0).all() and (derivative == 0).all()


@pytest.mark.parametrize("backend", PRESENT)
@pytest.mark.parametrize("name", BUILTIN)
def test_weight_zero_excludes_a_row_whatever_it_holds(name, backend):
    columns, params = case(name, n=100)
    weight = torch.rand(100)
    weight[::3] = 0
    clean, value, _ = BACKENDS[backend].elementwise(name, columns, params, weight)
    for column in columns:
        column[::3] = torch.tensor([float("nan"), float("inf")])[torch.arange(34) % 2]
    dirty, again, derivative = BACKENDS[backend].elementwise(name, columns, params, weight)
    assert torch.equal(clean, dirty) and torch.equal(value, again) and (derivative[::3] == 0).all() and clean.isfinite()
    want, _ = expected(name, [c[weight != 0].double() for c in columns], params)
    torch.testing.assert_close(dirty, (want * weight[weight != 0].double()).sum().float(), atol=2e-6, rtol=2e-6)


def test_a_users_objective_is_served_on_every_backend():
    @objectives.objective
    def regression_to_old(logp, old_logp, advantage, pull):
        r"""``-(A log pi - pull/2 (log pi - log old)^2)``: DRO, Richemond et al. 2024, arXiv:2405.19107."""
        gap = logp - old_logp
        return 0.5 * pull * gap * gap - advantage * logp, pull * gap - advantage

    draw = torch.Generator().manual_seed(0)
    logp, old, advantage = (torch.randn(50, generator=draw) for _ in range(3))
    x = logp.double().requires_grad_()
    want = -(advantage * x - 0.7 / 2 * (x - old).square())
    (slope,) = torch.autograd.grad(want.sum(), x)
    try:
        for backend in PRESENT:
            value, derivative = run(backend, "regression_to_old", [logp, old, advantage], [0.7])
            torch.testing.assert_close(value, want.detach().float(), atol=2e-6, rtol=2e-6)
            torch.testing.assert_close(derivative, slope.float(), atol=2e-6, rtol=2e-6)
    finally:
        del OBJECTIVES["regression_to_old"]


def test_no_objective_of_ours_has_a_parameter_with_the_name_of_an_argument_of_its_loss():
    losses = (rlkernels.policy_loss, rlkernels.logits_policy_loss, rlkernels.linear_policy_loss)
    taken = set().union(*(inspect.signature(loss).parameters for loss in losses))
    of_values = set(inspect.signature(rlkernels.value_loss).parameters) - {"clip_range"}
    for name in BUILTIN:
        entry = OBJECTIVES[name]
        assert not set(entry.params) & (of_values if entry.columns[0] == "value" else taken), name
