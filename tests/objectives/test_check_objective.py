"""``check_objective``: it passes right derivatives, and says of a wrong one where it is wrong."""

import pytest
from test_objectives import PARAMS

import rlkernels as rlk
from rlkernels.objectives import OBJECTIVES, codegen, exp, objective, where

WEIGHTED = ("cispo", "cispo_max_only", "cispo_absolute", "rollout_is", "dppo_tv", "dppo_kl")
STOPPED = {
    **dict.fromkeys(WEIGHTED, ["weight"]),
    "ref_kl": ["gain"],
    "dft": ["prob"],
}  # what their papers take as constants


@pytest.fixture(autouse=True)
def nothing_stays_registered():
    before = dict(OBJECTIVES)
    yield
    for name in set(OBJECTIVES) - set(before):
        del OBJECTIVES[name]


@pytest.mark.parametrize("name", codegen.builtin())
def test_the_derivatives_of_the_library_are_right(name):
    params = {p: PARAMS[p] for p in OBJECTIVES[name].params}
    assert rlk.check_objective(name, stop_gradient=STOPPED.get(name, ()), **params) is None


@pytest.mark.parametrize("name", STOPPED)
def test_a_constant_of_the_paper_must_be_named(name):
    params = {p: PARAMS[p] for p in OBJECTIVES[name].params}
    with pytest.raises(ValueError, match="has a wrong derivative"):
        rlk.check_objective(name, **params)


def test_a_wrong_sign_for_bad_actions_alone_is_found_there():
    @objective
    def one_sided(logp, old_logp, advantage, scale=0.5):
        """Right for a positive advantage."""
        ratio = exp(logp - old_logp)
        return -scale * ratio * advantage, -scale * ratio * where(advantage > 0.0, advantage, -advantage)

    with pytest.raises(ValueError) as caught:
        rlk.check_objective(one_sided)
    message = str(caught.value)
    assert message.startswith("check_objective: objective 'one_sided' has a wrong derivative at logp=")
    assert "advantage=-" in message and "scale=0.5: got -" in message and "32 of 80 points are wrong" in message


def test_an_error_of_one_percent_is_found_and_the_tolerance_says_so():
    @objective
    def nearly(logp, advantage, k):
        """1 % too much."""
        return -advantage * logp, -k * advantage

    with pytest.raises(ValueError, match="wrong derivative at .*advantage=2.3, k=1.01: got -2.323, expected -2.3 by"):
        rlk.check_objective(nearly, k=1.01)
    rlk.check_objective(nearly, k=1.0)
    rlk.check_objective(nearly, k=1.01, tolerance=0.1)


def test_a_derivative_that_is_nan_is_wrong_and_a_value_that_is_nan_is_left_out():
    @objective(columns=2)
    def of_a_root(logp, gate):
        """The derivative divides by a 0 of its own."""
        return logp * gate, gate / (gate - gate) * (gate - gate)

    with pytest.raises(ValueError, match="got nan, expected"):
        rlk.check_objective(of_a_root)

    @objective(columns=2)
    def nowhere(logp, gate):
        """0 / 0"""
        return logp * gate / (gate - gate), gate

    with pytest.raises(ValueError, match="has no derivative at any of 16 points"):
        rlk.check_objective(nowhere)


def test_kinks_of_a_grid_of_the_callers_are_left_out():
    ties = {"logp": [-1.0, -0.5], "old_logp": [-1.0, -0.5], "advantage": [1.0, -1.0]}
    rlk.check_objective("ppo_clip", grid=ties, clip_low=0.0, clip_high=0.0)


def test_more_columns_than_a_grid_can_hold_are_sampled():
    @objective(columns=9)
    def of_nine(logp, a, b, c, d, e, f, g, h):
        """A product."""
        rest = a * b * c * d * e * f * g * h
        return rest * logp, rest

    rlk.check_objective(of_nine)


def test_bad_arguments_are_named():
    def unregistered(logp, advantage):
        """d"""
        return logp, advantage

    for given, error, message in (
        ((unregistered,), ValueError, "must be registered, got <function"),
        (("ppo",), ValueError, "must be registered, got 'ppo'"),
    ):
        with pytest.raises(error, match=f"^check_objective: objective {message}"):
            rlk.check_objective(*given)
    for options, error, message in (
        ({"grid": {"margin": [1.0]}}, ValueError, "grid has 'margin', expected columns: logp, advantage"),
        ({"grid": {"logp": []}}, ValueError, r"grid\['logp'\] has shape"),
        ({"stop_gradient": ["weight"]}, ValueError, "stop_gradient has 'weight', .* it assigns none"),
        ({"tolerance": 0.0}, ValueError, "tolerance must be positive"),
        ({"beta": 1.0}, TypeError, "takes no 'beta'"),
    ):
        with pytest.raises(error, match=f"^check_objective: .*{message}"):
            rlk.check_objective("reinforce", **options)
