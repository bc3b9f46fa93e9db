"""Every example in a docstring runs and prints what it says."""
import doctest
import importlib
import inspect
import pkgutil

import pytest
import torch

import rlkernels

OUTSIDE = ("cli", "integrations")  # their imports need extras
MODULES = [name for _, name, _ in pkgutil.iter_modules(rlkernels.__path__) if not name.startswith("_") and name not in OUTSIDE]
PER_TOKEN = ("weights", "segments", "advantages", "groups")


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
