"""Files of the fused head import from the layers below their own, as the docstring of the package lists them."""

import ast
import re
from pathlib import Path

import pytest

import rlkernels.linear

FOLDER = Path(rlkernels.linear.__file__).parent
FILES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")
LAYERS = [
    [name.strip() for name in layer.split(",")]
    for layer in " ".join(line for line in rlkernels.linear.__doc__.splitlines() if line.startswith("    ")).split("<")
]


def test_the_docstring_places_every_file():
    assert sorted(name for layer in LAYERS for name in layer) == FILES


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_from_the_layers_below_it(name):
    below = set()
    for layer in LAYERS:
        if name in layer:
            break
        below |= set(layer)
    imported = set()
    for node in ast.walk(ast.parse((FOLDER / f"{name}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "rlkernels.linear":
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module.startswith("rlkernels.linear."):
            imported.add(node.module.split(".")[2])
    assert imported <= below, f"{name} imports {imported - below}"


@pytest.mark.parametrize("name", FILES)
def test_a_file_has_at_most_440_lines_beside_its_signatures(name):
    # Three overloads repeat a signature of forty lines each.
    text = (FOLDER / f"{name}.py").read_text()
    repeated = sum(
        1 + len(m.splitlines()) for m in re.findall(r"^@overload\n(?:.*\n)*?\) -> .*: \.\.\.$", text, re.MULTILINE)
    )
    assert len(text.splitlines()) - repeated <= 440
