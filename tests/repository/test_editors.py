"""An editor's view of the library: signature with types and defaults, and the formula, over each public name.

``inspect`` is asked always, and a language server of pyright where one is on PATH (``pip install basedpyright``).
"""

import ast
import inspect
import pydoc
import re

import pytest
from language_server import SERVER, LanguageServer
from paths import ROOT

import rlkernels
from rlkernels.losses.row_options import ROW_KINDS
from rlkernels.objectives import OBJECTIVES, codegen

FUNCTIONS = [name for name in rlkernels.__all__ if inspect.isfunction(getattr(rlkernels, name))]
CLASSES = [name for name in rlkernels.__all__ if inspect.isclass(getattr(rlkernels, name))]
WITHOUT_FORMULA = {
    "available_backends",
    "status",
    "objective",
    "pack",
    "unpack",
    "broadcast_advantages",
    "broadcast_to_tokens",
    "end_scores",
    "extended_mask",
    "spans_to_mask",
}
"""Functions that compute nothing: they tell, register, choose, copy or lay out."""
FORMULA = re.compile(r" [-+=/<>.] | <= |sum_|prod_|min_|log |exp\(|\^|\b[a-z]_[a-z] [a-z]|\bcoef [a-z]")
GROUP = r"\([^)]*\)|\[(?:[^\[\]]|\[[^]]*\])*\]"
"""Parentheses, or brackets two deep, within the type of a parameter."""
KINDS = [name for name in codegen.builtin() if {"advantage", "rollout_logp"} & {*OBJECTIVES[name].columns}]


def head(text):
    """Returns what stands before the arguments, which is what a hover shows without scrolling."""
    return re.split(r"\n *(?:Args|Returns|Raises|Example):", text)[0]


def formulas(name):
    text = " ".join(head(inspect.getdoc(getattr(rlkernels, name))).split())
    return [span for span in re.findall(r"``(.+?)``", text) if FORMULA.search(span)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_docstring_shows_the_formula_before_the_arguments(name):
    assert bool(formulas(name)) != (name in WITHOUT_FORMULA), formulas(name)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_signature_has_types_and_its_own_parameters(name):
    signature = inspect.signature(getattr(rlkernels, name))
    bare = [p.name for p in signature.parameters.values() if p.annotation is p.empty]
    assert not bare and signature.return_annotation is not signature.empty
    assert not any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values()), "a wrapper's (*args)"


def entry(name):
    """Returns an objective as the docstring of ``policy_loss`` lists it: its keywords with their defaults."""
    if name in ROW_KINDS:
        keywords = [f"{key}={value}" for key, value in ROW_KINDS[name].numbers.items()] + [*ROW_KINDS[name].tensors]
    else:
        defaults = dict(OBJECTIVES[name].defaults)
        keywords = [f"{key}={defaults[key]}" if key in defaults else key for key in OBJECTIVES[name].params]
    return f"``{name}({', '.join(keywords)})``" if keywords else f"``{name}``"


def test_help_of_the_policy_loss_lists_every_objective_with_its_parameters_and_defaults():
    text = " ".join(pydoc.render_doc(rlkernels.policy_loss, renderer=pydoc.plaintext).split())
    told = text.split("Every objective with its parameters")[1].split(". Others by their names")[0]
    assert re.findall(r"``[^`]+``", told) == [entry(name) for name in [*KINDS, *ROW_KINDS]]


@pytest.mark.parametrize("name", ["logits_policy_loss", "linear_policy_loss"])
def test_the_other_policy_losses_say_where_the_objectives_are_listed(name):
    assert "``policy_loss`` lists the objectives with their parameters" in inspect.getdoc(getattr(rlkernels, name))


@pytest.mark.parametrize("name", [*KINDS, *ROW_KINDS])
def test_the_page_of_objectives_shows_parameters_and_defaults(name):
    (row,) = re.findall(rf"^\| `{name}` \|.*$", (ROOT / "docs/objectives.md").read_text(), re.MULTILINE)
    keywords = re.findall(r"[\w=.]+", entry(name).partition("(")[2].replace("``", ""))
    assert keywords == [keyword for keyword in keywords if f"`{keyword}`" in row]


@pytest.fixture(scope="module")
def hovers():
    names = [*FUNCTIONS, *CLASSES]
    server = LanguageServer(ROOT, "import rlkernels\n" + "".join(f"rlkernels.{name}\n" for name in names))
    yield {name: server.hover(line, len("rlkernels.") + 1) for line, name in enumerate(names, 1)}
    server.close()


def value_of(text):
    """Returns the value of a default as it is written, or the text where it is no literal."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def has_default(written, parameter):
    """Tells whether ``type = default`` ends with the default of ``parameter``, or has none where it has none."""
    default = written.partition(" = ")[2]
    if parameter.default is parameter.empty:
        return not default
    return value_of(default) in (parameter.default, str(parameter.default))


@pytest.mark.skipif(SERVER is None, reason="no language server of pyright is on PATH")
@pytest.mark.parametrize("name", [*FUNCTIONS, *CLASSES])
def test_a_hover_shows_types_defaults_and_the_formula(hovers, name):
    text, thing = hovers[name], getattr(rlkernels, name)
    signature, docstring, _ = text.partition(inspect.getdoc(thing).split("\n")[0][:40])
    assert docstring, f"the hover has no docstring: {text}"
    for parameter in inspect.signature(thing).parameters.values():
        written = re.findall(rf"\b{parameter.name}: ((?:{GROUP}|[^,()\[\]])+)", signature)
        written = [" ".join(one.split()) for one in written]
        assert any(has_default(one, parameter) for one in written), f"{parameter} reads {written}"
    plain = " ".join(text.split())
    assert all(formula in plain for formula in (formulas(name) if name in FUNCTIONS else []))
