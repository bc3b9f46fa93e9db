"""An extension of mkdocstrings: the section that our docstrings call "Example" is a program with its output.

Its parser knows "Examples" alone, and would print the prompts as three quotations in one another.
"""

import re

import griffe


class Examples(griffe.Extension):
    def on_object(self, *, obj, **others):
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M)
