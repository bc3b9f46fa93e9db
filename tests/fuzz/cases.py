"""All cases, by kind."""

from fuzz import (  # noqa: F401  (a module's cases register themselves)
    advantages,  # noqa: F401  (a module's cases register themselves)
    divergences,
    heads,
    hostile,
    packing,  # noqa: F401  (a module's cases register themselves)
    policies,
    preferences,
    rows,
    sequences,
)
from fuzz.trial import CASES

__all__ = ["CASES"]
