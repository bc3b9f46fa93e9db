"""Where an objective cannot move for want of an advantage: what is shown from its source, held against its numbers."""

import pytest
import torch
from test_objectives import PARAMS

import rlkernels as rlk
from rlkernels.objectives import OBJECTIVES, exp, objective, where
from rlkernels.objectives.zero_gradient import still_where_zero


@objective
def drifts_without_advantage(logp, old_logp, advantage):
    """``-A log pi + (log pi - log pi_old)^2``: it moves where the advantage is 0."""
    gap = logp - old_logp
    return gap * gap - advantage * logp, 2.0 * gap - advantage


@objective
def moves_below_a_bound(logp, old_logp, advantage):
    """Still where the advantage is 0, but only on the first side of a condition that is not known beforehand."""
    ratio = exp(logp - old_logp)
    slope = where(ratio < 1.0, advantage, -ratio)
    return slope * logp, slope


@objective
def divides_by_the_advantage(logp, advantage):
    """``log pi / A`` has no derivative where the advantage is 0."""
    return logp / advantage, 1.0 / advantage


# Only this file's tests see them: others walk through all that is registered.
THEIRS = {
    name: OBJECTIVES.pop(name)
    for name in ("drifts_without_advantage", "moves_below_a_bound", "divides_by_the_advantage")
}


@pytest.fixture(autouse=True)
def their_objectives(monkeypatch):
    for name, entry in THEIRS.items():
        monkeypatch.setitem(OBJECTIVES, name, entry)


OURS = [
    name
    for name, entry in OBJECTIVES.items()
    if "advantage" in entry.columns and name != "dro" and entry.function.__module__.startswith("rlkernels.")
]


def test_the_pull_of_dro_is_shown_to_need_no_advantage():
    assert not still_where_zero("dro", "advantage")


@pytest.mark.parametrize("name", OURS)
def test_our_objectives_are_shown_to_stand_still_and_do(name):
    entry = OBJECTIVES[name]
    assert still_where_zero(name, "advantage")
    draw = torch.Generator().manual_seed(0)
    columns = [torch.zeros(500) if c == "advantage" else torch.randn(500, generator=draw) * 3 for c in entry.columns]
    _, derivative = entry.function(*columns, *(torch.tensor(PARAMS[p]) for p in entry.params))
    assert not derivative.any()


@pytest.mark.parametrize("name", THEIRS)
def test_what_may_move_is_never_taken_to_stand_still(name):
    assert not still_where_zero(name, "advantage")


def test_a_column_that_is_not_there_shows_nothing():
    assert not still_where_zero("nll", "advantage")


def test_a_token_without_advantage_keeps_the_gradient_of_an_objective_that_moves_there(backend):
    draw = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(6, 8, generator=draw, requires_grad=True), torch.randn(21, 8, generator=draw)
    targets, old = torch.randint(21, (6,), generator=draw), torch.randn(6, generator=draw) - 3
    loss = rlk.linear_policy_loss(hidden, weight, targets, old, torch.zeros(6), objective="drifts_without_advantage")
    wide = hidden.detach().double().requires_grad_()
    gap = (wide @ weight.double().t()).log_softmax(-1).gather(1, targets[:, None])[:, 0] - old.double()
    (expected,) = torch.autograd.grad(gap.square().mean(), wide)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0].double(), expected, rtol=1e-5, atol=1e-7)
