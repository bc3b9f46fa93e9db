"""Prints docs/objectives.md from the registry: ``python docs/objectives.py > docs/objectives.md``; a test holds the
page fresh.
"""

from tables import table, users, users_of

from rlkernels.losses.row_objectives import LOSSES
from rlkernels.losses.row_options import ROW_KINDS
from rlkernels.objectives import OBJECTIVES, codegen, functions

HEAD = """# Objectives

Printed by `python docs/objectives.py` from the registry; a test holds it fresh. Each objective is one function that
returns its value and its derivative with respect to the first column; it serves `policy_loss`, `logits_policy_loss` and
the fused kernels alike.
*Columns* are numbers per token (or per sequence, or per pair), *parameters* are run-time floats, some with a default.
Presets are those of [presets.md](presets.md).

"""

ROWS = """
## Of sequences, groups and batches

The loss of a token depends on others here, so each is computed from log-probabilities: `logits_policy_loss` takes two
passes, `linear_policy_loss` four matmuls. *One loss per* says what an aggregation weighs: the loss of a sequence or a
group weighs what its live tokens weigh together, and `token-mean` is the mean of these losses. Only where it is a
token or a sequence do losses of micro-batches add up, and not for `kl_cov` and `clip_cov`, which look at the whole
batch; those of groups add up where no group is cut.

"""

TAIL = """
## Your own

Decorate a function with `@rlkernels.objective`. It may call {}, imported from `rlkernels.objectives`; anything else
raises and says what to write instead. `clip`, `maximum` and `minimum` of a NaN are NaN. Where a function has no
derivative, the convention is 0 for `abs` at 0, infinity for `sqrt` at 0, and that of the second operand for `maximum`
and `minimum` of equal operands. `rlkernels.check_objective` holds the derivative to central differences and says
where it is wrong.

With `@objective(columns=k)` the first `k` arguments are columns, whatever their names. A loss takes those that it has
no argument for as keywords, tensors shaped like its other columns. First column `logp`, with an `advantage`:
`policy_loss`, `logits_policy_loss`, `linear_policy_loss`. First column `value`: `value_loss`. The one column `margin`:
`dpo_loss` and `linear_dpo_loss`, as `loss_type`.
"""


def meaning(function):
    """Returns the first paragraph of the docstring."""
    return function.__doc__.strip().split("\n\n")[0]


def used(name, function):
    """Returns the presets that have an objective, or the page that tells."""
    family = function.__module__.rsplit(".", 1)[-1]
    if family in ("kl", "preference"):
        return f"[{family}.md]({family}.md)"
    if family == "value":
        return users("value_loss", lambda keywords: (keywords["clip_range"] is None) == (name == "value_plain")) or "-"
    if family == "sft":
        return users_of("sft_loss", "kind", name)
    return users_of("policy_loss", "objective", name)


def page():
    """Returns the whole page."""
    rows = []
    for name in codegen.builtin():
        entry = OBJECTIVES[name]
        defaults = dict(entry.defaults)
        params = (f"{x}={defaults[x]}" if x in defaults else x for x in entry.params)
        columns, params = (", ".join(f"`{x}`" for x in names) or "-" for names in (entry.columns, params))
        rows.append((f"`{name}`", columns, params, meaning(entry.function), used(name, entry.function)))
    return (
        HEAD
        + table(("objective", "columns", "parameters", "meaning", "presets"), rows)
        + ROWS
        + table(("objective", "columns", "one loss per", "options and defaults", "meaning", "presets"), of_rows())
        + TAIL.format(", ".join(f"`{name}`" for name in functions.FUNCTIONS))
    )


def of_rows():
    """Yields the rows of the second table."""
    for name, kind in ROW_KINDS.items():
        options = [f"`{option}={default}`" for option, default in kind.numbers.items()]
        options += [f"`{option}`" for option in kind.tensors]
        columns = ", ".join(f"`{x}`" for x in kind.columns)
        presets = users_of("policy_loss", "objective", name)
        yield f"`{name}`", columns, kind.unit, ", ".join(options), LOSSES[name].__doc__, presets


if __name__ == "__main__":
    print(page(), end="")
