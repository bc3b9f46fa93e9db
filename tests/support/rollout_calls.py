"""Calls of the functions of the rollout mismatch, and of the policy losses with their corrections; see
``public_calls``.
"""

import policy_calls


def calls(rlk):
    """Returns the calls by their names; ``rlk``: the library, as ``public_calls`` sees it."""
    return {
        **policy_calls.calls(rlk),
        "rollout_weights": lambda d: rlk.rollout_weights(
            d["old"],
            d["ref"],
            d["mask"],
            level="sequence_mean",
            high=d["number"],
            batch_normalize=True,
            batch_mean=d["count"],
            return_metrics=True,
        ),
        "rollout_weights of a packed batch": lambda d: rlk.rollout_weights(
            d["old"].view(-1),
            d["ref"].view(-1),
            d["mask"].view(-1),
            mode="mask",
            gate="tv",
            gate_level="sequence",
            high=0.5,
            batch_normalize=True,
            nan_ratio=0.5,
            cu_seqlens=d["cu"],
        ),
        "rho_correction": lambda d: rlk.rho_correction(
            d["old"], d["ref"], d["mask"], advantages=d["advantages"], gate="tv", mask_high=0.5, clamp_high=2.0
        ),
        "rho_correction of a packed batch": lambda d: rlk.rho_correction(
            d["old"].view(-1),
            d["ref"].view(-1),
            d["mask"].view(-1),
            level="sequence_mean",
            mask_low=0.5,
            cu_seqlens=d["cu"],
        ),
        "rejection_mask": lambda d: rlk.rejection_mask(
            d["old"], d["ref"], d["mask"], rules={"token_k1": (0.2, 5.0), "seq_max_k3": 3.0}, return_metrics=True
        ),
        "rejection_mask of a packed batch": lambda d: rlk.rejection_mask(
            d["old"].view(-1),
            d["ref"].view(-1),
            d["mask"].view(-1),
            rules={"seq_mean_k2": 0.5, "seq_max_k2": 3.0},
            cu_seqlens=d["cu"],
            return_metrics=True,
        ),
        "off_policy_sequence_mask": lambda d: rlk.off_policy_sequence_mask(
            d["logprobs"], d["old"], d["advantages"], d["mask"], delta=d["number"]
        ),
        "off_policy_sequence_mask of a packed batch": lambda d: rlk.off_policy_sequence_mask(
            d["logprobs"].view(-1), d["old"].view(-1), d["per_row"], d["mask"].view(-1), delta=0.1, cu_seqlens=d["cu"]
        ),
        "m2po_mask": lambda d: rlk.m2po_mask(d["old"], d["ref"], d["mask"], threshold=0.5),
        "rollout_metrics": lambda d: rlk.rollout_metrics(d["old"], d["ref"], d["mask"]),
        "rollout_metrics of a packed batch": lambda d: rlk.rollout_metrics(
            d["old"].view(-1), d["ref"].view(-1), d["mask"].view(-1), cu_seqlens=d["cu"]
        ),
        "policy_loss of a rollout": lambda d: rlk.policy_loss(
            d["logprobs"],
            None,
            d["advantages"],
            d["mask"],
            rollout_logprobs=d["old"],
            log_ratio_clamp=0.5,
            log_ratio_sq_coef=0.1,
            return_metrics=True,
        ),
        "logits_policy_loss of a rollout": lambda d: rlk.logits_policy_loss(
            d["logits"],
            d["targets"],
            None,
            d["advantages"],
            d["mask"],
            ratio_denominator="rollout",
            rollout_logprobs=d["old"],
            log_ratio_clamp=0.5,
            log_ratio_sq_coef=0.1,
            return_metrics=True,
        ),
        "linear_policy_loss of a rollout": lambda d: rlk.linear_policy_loss(
            d["hidden"],
            d["weight"],
            d["targets"],
            None,
            d["advantages"],
            d["mask"],
            chunk_tokens=4,
            rollout_logprobs=d["old"],
            log_ratio_clamp=0.5,
            log_ratio_sq_coef=0.1,
            return_metrics=True,
        ),
    }
