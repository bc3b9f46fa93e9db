"""Every example in a docstring runs and prints what it says."""

import doctest
import importlib
import inspect
import pkgutil

import pytest
import torch

import rlkernels

OUTSIDE = ("_cpu", "_cuda", "cli", "integrations", "backends.triton")  # compiled, or their imports need extras
MODULES = [
    name.removeprefix("rlkernels.")
    for _, name, _ in pkgutil.walk_packages(rlkernels.__path__, "rlkernels.", onerror=lambda name: None)
]
MODULES = [name for name in MODULES if not f"{name}.".startswith(tuple(f"{outside}." for outside in OUTSIDE))]
PER_TOKEN = (
    "aggregation",
    "sequences",
    "advantages.gae",
    "advantages.group",
    "advantages.moments",
    "advantages.whitening",
    "rollout.weights",
)
PER_TOKEN += ("rollout.masks", "rollout.metrics", "packing")
PER_TOKEN += ("trajectories.batches", "trajectories.logs", "trajectories.rows")


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_print_what_they_say(name):
    module = importlib.import_module(f"rlkernels.{name}")
    assert doctest.testmod(module, extraglobs={"torch": torch}).failed == 0


@pytest.mark.parametrize("name", PER_TOKEN)
def test_every_function_over_tokens_shows_an_example(name):
    module = importlib.import_module(f"rlkernels.{name}")
    functions = [f for f in vars(module).values() if inspect.isfunction(f) and f.__module__ == module.__name__]
    public = [f for f in functions if "Raises:" in (f.__doc__ or "")]
    assert public
    assert not [f.__name__ for f in public if ">>>" not in f.__doc__]


@pytest.mark.parametrize("name", [n for n in rlkernels.__all__ if callable(getattr(rlkernels, n))])
def test_every_public_function_shows_an_example(name):
    assert ">>>" in inspect.getdoc(getattr(rlkernels, name))
