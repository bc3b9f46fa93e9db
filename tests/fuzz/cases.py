"""All cases, by kind."""

from fuzz import divergences, heads, hostile, policies, preferences, rows, sequences  # noqa: F401  (a module's cases register themselves)
from fuzz import advantages, heads, hostile, policies, preferences, rows, sequences  # noqa: F401  (a module's cases register themselves)
from fuzz import heads, hostile, packing, policies, preferences, rows, sequences  # noqa: F401  (a module's cases register themselves)
from fuzz.trial import CASES

__all__ = ["CASES"]
