"""An extension of mkdocstrings for what its parser of docstrings takes otherwise than they mean it.

It knows the section "Examples" alone, and would print the prompts of an "Example" as three quotations in one another.
And it takes a line for one exception, where several share the line.
"""

import re

import griffe


class Docstrings(griffe.Extension):
    def on_object(self, *, obj, **others):
        if obj.docstring:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M)
            obj.docstring.value = re.sub(
                r"^Raises:\n(?: +.*\n?)+", lambda section: one_a_line(section[0]), text, flags=re.M
            )


def one_a_line(section):
    """Returns a section of exceptions with a line for each of them."""
    return re.sub(r"(?<=[.;]) ([A-Z]\w+Error: )", r"\n    \1", section)
