"""Prints docs/preference.md from the losses of pairs and answers: ``python docs/preference.py > docs/preference.md``; a
test holds the page fresh.
"""

import inspect

from tables import bullets, options, plain, table, users_of

from rlkernels import dpo_loss, unpaired_preference_loss
from rlkernels.losses.preference_options import DEFAULTS
from rlkernels.losses.preference_types import KINDS
from rlkernels.losses.unpaired_preference import LOSS_TYPES

HEAD = """# Preference losses

Printed by `python docs/preference.py` from tables and docstrings of `dpo_loss` and `unpaired_preference_loss`; a test
holds it fresh. `linear_dpo_loss` and `linear_unpaired_preference_loss` have the same types and options, from hidden
states. Presets are those of [presets.md](presets.md).

## Of pairs: `loss_type` of `dpo_loss`

{letters}

*Of* says whether the log-probabilities are sums or averages per token; *sums or averages* are averages with
`length_normalized`. *Reference* says whether a loss looks at one. Every type takes `beta`. Those that sort the batch
(`aot`, `aot_unpaired`) take no `pair_weights` and no `reduction="none"`. A tuple of names with `loss_weights` is a
mixture.

"""
UNPAIRED = """
## Options of `dpo_loss`

"""
ANSWERS = """
## Of answers judged one by one: `loss_type` of `unpaired_preference_loss`

{letters}
Log-probabilities are sums, and averages per token with `length_normalized`.

"""


def letters(function):
    """Returns the paragraph of a docstring that says what its letters mean."""
    return plain(inspect.getdoc(function).split("\n\n")[1]).rstrip(":") + "."


def of(kind):
    """Returns whether a type looks at sums or at averages per token."""
    if kind.averages:
        return "averages"
    return "sums or averages" if "length_normalized" in kind.takes else "sums"


def taken(kind):
    """Returns the options of a type with their defaults."""
    signature = inspect.signature(dpo_loss).parameters
    shown = []
    for name in kind.takes:
        default = DEFAULTS.get(name, kind.likelihood if name == "cpo_alpha" else signature[name].default)
        if name != "length_normalized":
            shown.append(f"`{name}`" if default is None else f"`{name}={default!r}`")
    return ", ".join(shown) or "-"


def page():
    """Returns the whole page."""
    rows = []
    for names, text in bullets(dpo_loss):
        for name in names:
            kind, used = KINDS[name], users_of("dpo_loss", "loss_type", name)
            rows.append((f"`{name}`", text, of(kind), "yes" if kind.reference else "no", taken(kind), used))
    assert sorted(cells[0].strip("`") for cells in rows) == sorted(KINDS), "dpo_loss lacks a line for some types"
    answers = [
        (f"`{name}`", text, users_of("unpaired_preference_loss", "loss_type", name))
        for names, text in bullets(unpaired_preference_loss)
        for name in names
    ]
    assert [cells[0].strip("`") for cells in answers if cells[0].strip("`") not in LOSS_TYPES] == []
    assert len(answers) == len(LOSS_TYPES), "unpaired_preference_loss lacks a line for some types"
    return (
        HEAD.format(letters=letters(dpo_loss))
        + table(("loss_type", "formula and source", "of", "reference", "options and defaults", "presets"), rows)
        + UNPAIRED
        + options(dpo_loss)
        + ANSWERS.format(letters=letters(unpaired_preference_loss))
        + table(("loss_type", "formula and source", "presets"), answers)
        + "\n## Options of `unpaired_preference_loss`\n\n"
        + options(unpaired_preference_loss)
    )


if __name__ == "__main__":
    print(page(), end="")
