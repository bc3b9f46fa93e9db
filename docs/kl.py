"""Prints docs/kl.md from the KL estimators and the divergences: ``python docs/kl.py > docs/kl.md``; a test holds the
page fresh.
"""

from tables import argument, bullets, described, options, plain, table, users_of

from rlkernels import KLTerm, linear_policy_loss, logits_policy_loss, objectives, token_divergences
from rlkernels.losses.divergence import KINDS
from rlkernels.losses.kl_term import EXACT, KLS, named_objective

HEAD = """# KL and distillation

Printed by `python docs/kl.py` from the code; a test holds it fresh. Presets are those of [presets.md](presets.md).

## Estimators

`kl=` of the three policy losses, `kind` of `kl_estimate`, `kl` of `assemble_rewards`. An objective of your own serves,
too, as `estimator` of a `KLTerm`.

"""
EXACT_KL = """
## The exact KL over the vocabulary

{} of `kl=`, with `logits_policy_loss` and `linear_policy_loss`.
`token_stats` gives the reverse KL of each row (`kl="exact"`).

* `ref_logits`: {}
* `ref_hidden`, `ref_weight`, `ref_bias`: {}
"""
DISTILLATION = """
## Distillation

`divergence_loss` and `token_divergences` take these as `kind`, from logits; `linear_distillation_loss` from the hidden
states and the heads of both models. `p` is the student, `q` the teacher, `T` the temperature of both. On own samples,
where only the teacher's log-probability of the sampled token is known, the objective `ref_kl` of a policy loss serves
([objectives.md](objectives.md)).

"""


def used(estimator):
    """Returns the presets that have an estimator as a term of the loss, as a reward, and per token."""
    return tuple(
        users_of(function, name, estimator)
        for function, name in (("policy_loss", "kl"), ("assemble_rewards", "kl"), ("kl_estimate", "kind"))
    )


def page():
    """Returns the whole page."""
    formulas = [(name, objectives.OBJECTIVES[named_objective(name)].function.__doc__) for name in KLS]
    rows = [(f"`{name}`", text.split(":", 1)[1], *used(name)) for name, text in formulas]
    kinds = [(f"`{name}`", text) for names, text in bullets(token_divergences) for name in names]
    assert [name.strip("`") for name, _ in kinds] == list(KINDS), "token_divergences lacks a line for some kinds"
    return (
        HEAD
        + table(("kl", "formula", "presets: in the loss", "in the reward", "per token"), rows)
        + f"\n{plain(objectives.kl.__doc__.split(chr(10) * 2)[1])}\n"
        + "\n## `KLTerm`\n\n"
        + described(KLTerm)
        + EXACT_KL.format(
            " and ".join(f"`{name}`" for name in EXACT),
            argument(logits_policy_loss, "ref_logits"),
            argument(linear_policy_loss, "ref_hidden"),
        )
        + f"\nPresets with `forward_kl`: {users_of('policy_loss', 'kl', 'forward_kl')}.\n"
        + DISTILLATION
        + table(("kind", "formula and source"), kinds)
        + "\n"
        + options(token_divergences)
    )


if __name__ == "__main__":
    print(page(), end="")
