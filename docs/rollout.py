"""Prints docs/rollout.md from the functions of the mismatch of rollout engine and trainer: ``python docs/rollout.py >
docs/rollout.md``; a test holds the page fresh.
"""

from tables import described, users

import rlkernels
from rlkernels.rollout.masks import RULES

HEAD = """# Rollout engine and trainer

Printed by `python docs/rollout.py` from the docstrings; a test holds it fresh. The engine that samples tokens computes
their log-probabilities a little differently than the trainer does. These functions weigh tokens, leave tokens out, or
tell how far the two are apart. Presets are those of [presets.md](presets.md).

* As `correction=` of a policy loss, weights and masks multiply the loss of a token, and the count of a mean stays.
* As its `mask=`, a mask changes the count, too.
* The objectives `rollout_is`, `tv_symmetric` and `ref_kl` have the engine's log-probabilities as a column, and
  `ratio_denominator="rollout"` puts them in the place of the old ones ([objectives.md](objectives.md)).
"""
NAMES = (
    "rollout_weights",
    "rho_correction",
    "Correction",
    "rejection_mask",
    "off_policy_sequence_mask",
    "m2po_mask",
    "rollout_metrics",
)
SHARED = ("old_logprobs", "rollout_logprobs", "mask", "cu_seqlens")
"""The arguments that all functions have in common, shown once."""


def page():
    """Returns the whole page."""
    parts = [HEAD]
    for name in NAMES:
        thing = getattr(rlkernels, name)
        parts.append(f"\n## `{name}`\n\n{described(thing, () if name == NAMES[0] else SHARED)}")
        if name == "rejection_mask":
            parts.append(f"\nRules: {', '.join(f'`{rule}`' for rule in RULES)}.\n")
        found = users(name)
        if found:
            parts.append(f"\nPresets: {found}.\n")
    return "".join(parts)


if __name__ == "__main__":
    print(page(), end="")
