"""An objective of a user's own: it goes through the same losses as the shipped ones.

Registered in the child processes alone.
"""

from fuzz import terms
from rlkernels.objectives import objective


def regression(logp, old_logp, advantage, beta):
    r"""``-(A log pi - beta/2 (log pi - log pi_old)^2)``."""
    gap = logp - old_logp
    return 0.5 * beta * gap * gap - advantage * logp, beta * gap - advantage


def register():
    objective(regression)
    terms.PARAMETERS["regression"], terms.CHOICES["beta"] = {"beta": 0.5}, (0.1, 2.0)
    terms.ORACLES["regression"] = lambda logp, old, advantage, beta: (
        -(advantage * logp - beta / 2 * (logp - old).square())
    )
