"""What the language refuses, and that the refusal says what to write."""

import math

import pytest
from paths import ROOT

from rlkernels.objectives import OBJECTIVES, clip, codegen, exp, functions, objective, where  # noqa: F401


def power(logp, advantage):
    """d"""
    return logp**2.0, 2.0 * logp


def branch(logp, advantage):
    """d"""
    if advantage > 0.0:
        return logp, 1.0
    return -logp, -1.0


def integer(logp, advantage):
    """d"""
    return 2 * logp, 2.0


def foreign_call(logp, advantage):
    """d"""
    return math.exp(logp), 1.0


SCALE = 2.0


def free_name(logp, advantage):
    """d"""
    return logp * SCALE, SCALE


def bare_comparison(logp, advantage):
    """d"""
    live = advantage > 0.0
    return where(live, logp, 0.0), 1.0


def reassigned(logp, advantage):
    """d"""
    x = logp * advantage
    x = x * 2.0
    return x, 2.0 * advantage


def one_output(logp, advantage):
    """d"""
    return logp * advantage


def no_docstring(logp, advantage):
    return logp * advantage, advantage


def default(logp, advantage, beta="0.1"):
    """d"""
    return beta * logp, beta


def default_of_a_column(logp, advantage=1.0):
    """d"""
    return advantage * logp, advantage


def by_keyword(logp, advantage, *, beta):
    """d"""
    return beta * logp, beta


def parameter_first(beta, logp):
    """d"""
    return beta * logp, beta


def keyword(logp, advantage):
    """d"""
    return clip(logp, low=0.0, high=1.0), 1.0


def cxx_keyword(logp, advantage):
    """d"""
    new = logp * advantage
    return new, advantage


REFUSED = {
    power: "x \\* x",
    branch: "where\\(",
    integer: "2.0",
    foreign_call: "exp/1",
    free_name: "arguments, earlier locals",
    bare_comparison: "first argument of where",
    reassigned: "a new name",
    one_output: "return value, derivative",
    no_docstring: "docstring",
    default: "default of 'beta' must be a number, got '0.1'",
    default_of_a_column: "'advantage' is a column and has a default",
    by_keyword: "positional arguments only",
    parameter_first: "columns .* first",
    keyword: "positional",
    cxx_keyword: "another name",
}


@pytest.mark.parametrize("function", REFUSED, ids=lambda f: f.__name__)
def test_refused_with_a_reason_and_a_remedy(function):
    with pytest.raises(TypeError, match=REFUSED[function]) as error:
        objective(function)
    assert function.__name__ in str(error.value) and function.__name__ not in OBJECTIVES


def test_a_second_function_of_the_same_name_is_refused():
    def cispo(logp, advantage):
        """d"""
        return -advantage * logp, -advantage

    with pytest.raises(ValueError, match="already registered by rlkernels.objectives.policy"):
        objective(cispo)


def test_decorator_returns_the_function_itself():
    assert OBJECTIVES["cispo"].function.__name__ == "cispo" and not hasattr(OBJECTIVES["cispo"].function, "__wrapped__")


def test_checked_in_header_is_fresh():
    printed = ROOT / "csrc/objectives.h"
    assert printed.read_text() == codegen.header(), "run: python -m rlkernels.objectives.codegen > csrc/objectives.h"


def test_every_math_name_has_a_cxx_twin():
    header = (ROOT / "csrc/objective_functions.h").read_text()
    for name in functions.FUNCTIONS:
        assert f" {name}(" in header, name


def test_message_names_line_and_construct():
    with pytest.raises(
        TypeError,
        match=r"objective 'power', line 3: 'logp \*\* 2.0' is not in the language; write "
        r"multiply: x \* x",
    ):
        objective(power)
