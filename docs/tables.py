"""Rows and sections of the printed pages, made of docstrings, signatures and presets."""

import inspect
import re

from rlkernels import presets


def plain(text):
    """Returns a text of a docstring as one line."""
    return " ".join(text.split()).replace("``", "`")


def cell(text):
    """Returns a text of a docstring as one cell of a table."""
    return plain(text).replace("|", r"\|")


def row(*cells):
    """Returns one row of a table."""
    return f"| {' | '.join(cells)} |\n"


def table(names, rows):
    """Returns a table from the names of its columns and its rows."""
    return (
        row(*names) + row(*("---" for _ in names)).replace(" ", "") + "".join(row(*map(cell, cells)) for cells in rows)
    )


def bullets(function):
    """Returns ``(names, text)`` of each bullet of a docstring that begins with names in quotes."""
    found = re.findall(r'^- ((?:``"\w+"``(?:, )?)+): (.*?)(?=\n- |\n\n)', inspect.getdoc(function), re.M | re.S)
    return [(re.findall(r"\w+", names), plain(text)) for names, text in found]


def arguments(function):
    """Returns ``(names, text)`` of each entry of ``Args:``."""
    section = re.search(r"^Args:\n(.*?)\n\n", inspect.getdoc(function), re.M | re.S)[1]
    found = re.findall(r"^    ([\w, ]+): (.*?)(?=\n    \S|\Z)", section, re.M | re.S)
    return [(names.split(", "), plain(text)) for names, text in found]


def argument(function, name):
    """Returns the text of one argument."""
    return next(text for names, text in arguments(function) if name in names)


def options(function, skip=()):
    """Returns the table of a function's arguments, but those of the names in ``skip``."""
    signature, rows = inspect.signature(function).parameters, []
    for names, text in arguments(function):
        known = [(name, signature[name].default) for name in names if name in signature and name not in skip]
        if known:
            shown = (
                f"`{name}`" if default is inspect.Parameter.empty else f"`{name}={default!r}`"
                for name, default in known
            )
            rows.append((", ".join(shown), text))
    return table(("argument and default", "meaning"), rows)


def described(function, skip=()):
    """Returns what a docstring says, without its examples: first sentence, formulas, a table of arguments, sources."""
    before, after = re.split(r"^Args:\n.*?\n\n", inspect.getdoc(function), maxsplit=1, flags=re.M | re.S)
    sources = re.split(r"^Example:\n.*?\n\n", after + "\n\n", maxsplit=1, flags=re.M | re.S)[-1].strip()
    text = f"{before.strip()}\n\n{options(function, skip)}" + (f"\n{sources}\n" if sources else "")
    return text.replace("``", "`")


def users(function, fits=lambda keywords: True):
    """Returns the presets whose keywords of a function fit, or nothing."""
    found = []
    for preset, entry in presets.PRESETS.items():
        for key, keywords in entry.settings.items():
            called, _, variant = key.partition("/")
            if called == function and fits(keywords):
                found.append(f"`{preset}`" + (f" ({variant})" if variant else ""))
    return ", ".join(found)


def users_of(function, name, value):
    """Returns the presets that set an argument of a function to a value, or a dash.

    Of a ``KLTerm`` the estimator counts.
    """
    return users(function, lambda given: getattr(given.get(name), "estimator", given.get(name)) == value) or "-"
