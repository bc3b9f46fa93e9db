"""All cases, by kind."""

from fuzz import (  # noqa: F401  (a module's cases register themselves)
    advantages,  # noqa: F401  (a module's cases register themselves)
    divergences,
    heads,
    hostile,
    packing,  # noqa: F401  (a module's cases register themselves)
    policies,
    preferences,
    references,
    rewards,
    rollouts,
    rows,
    sequences,
)
from fuzz.trial import CASES

__all__ = ["CASES", "WITHOUT_KERNELS"]
WITHOUT_KERNELS = {
    "assemble_rewards",
    "broadcast_advantages",
    "dynamic_sampling_mask",
    "extended_mask",
    "gae_of_turns",
    "gigpo_advantages",
    "group_advantages",
    "length_desensitized_weights",
    "length_penalty",
    "m2po_mask",
    "masked_whiten",
    "off_policy_sequence_mask",
    "pack",
    "process_sequences",
    "rejection_mask",
    "rho_correction",
    "rollout_gae",
    "rollout_metrics",
    "rollout_weights",
    "shift_targets",
    "spans_to_mask",
    "token_weights",
    "top_entropy_mask",
    "truncation_penalty",
    "unpack",
    "vtrace",
}
"""Cases without kernels of their own: what they are made of is called by the others."""
