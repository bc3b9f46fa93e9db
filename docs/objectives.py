"""Prints docs/objectives.md from the registry: ``python docs/objectives.py > docs/objectives.md``; a test holds the
page fresh.
"""

import re

from rlkernels.objectives import OBJECTIVES, codegen

HEAD = """# Objectives

Printed by `python docs/objectives.py` from the registry; a test holds it fresh. Each objective is one function that
returns its value and its derivative with respect to the first column; it serves `policy_loss`, `logits_policy_loss` and
the fused kernels alike.
*Columns* are numbers per token (or per sequence, or per pair), *parameters* are run-time floats, some with a default.

| objective | columns | parameters | meaning |
|---|---|---|---|
"""


def meaning(function):
    """The first paragraph of the docstring, as one table cell."""
    paragraph = function.__doc__.strip().split("\n\n")[0]
    return re.sub(r"``", "`", " ".join(paragraph.split())).replace("|", r"\|")


def page():
    rows = []
    for name in codegen.builtin():
        entry = OBJECTIVES[name]
        defaults = dict(entry.defaults)
        params = (f"{x}={defaults[x]}" if x in defaults else x for x in entry.params)
        columns, params = (", ".join(f"`{x}`" for x in names) or "-" for names in (entry.columns, params))
        rows.append(f"| `{name}` | {columns} | {params} | {meaning(entry.function)} |\n")
    return HEAD + "".join(rows)


if __name__ == "__main__":
    print(page(), end="")
