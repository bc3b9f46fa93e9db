"""Calls of the policy losses with corrections, with entropies that are selected, and with objectives of sequences; see
``public_calls``.
"""

import rlkernels


def of_a2po(d):
    """The inputs that stand for advantages there."""
    return {"rewards": d["per_row"], "value_pool": d["advantages"], "ref_logprobs": d["ref"]}


def calls(rlk):
    """Returns the calls by their names; ``rlk``: the library, as ``public_calls`` sees it."""
    return {
        "top_entropy_mask": lambda d: rlk.top_entropy_mask(d["entropy"], d["mask"], 0.4),
        "policy_loss of a correction": lambda d: rlk.policy_loss(
            d["logprobs"],
            d["old"],
            d["advantages"],
            d["mask"],
            rollout_logprobs=d["ref"],
            correction=rlkernels.Correction(high=2.0, opsm_delta=0.5),
            entropy=d["entropy"],
            entropy_coef=0.1,
            top_entropy_fraction=0.6,
            return_metrics=True,
        ),
        "policy_loss of factors": lambda d: rlk.policy_loss(
            d["logprobs"], d["old"], d["advantages"], d["mask"], correction=d["token_weights"]
        ),
        "logits_policy_loss of a correction": lambda d: rlk.logits_policy_loss(
            d["logits"],
            d["targets"],
            d["old"],
            d["advantages"],
            d["mask"],
            rollout_logprobs=d["ref"],
            correction={"mode": "mask", "high": 2.0},
        ),
        "logits_policy_loss of factors": lambda d: rlk.logits_policy_loss(
            d["logits"], d["targets"], d["old"], d["advantages"], d["mask"], correction=d["token_weights"]
        ),
        "linear_policy_loss of a correction": lambda d: rlk.linear_policy_loss(
            d["hidden"],
            d["weight"],
            d["targets"],
            d["old"],
            d["advantages"],
            d["mask"],
            rollout_logprobs=d["ref"],
            correction={"high": 2.0},
            chunk_tokens=4,
        ),
        "linear_policy_loss of factors": lambda d: rlk.linear_policy_loss(
            d["hidden"],
            d["weight"],
            d["targets"],
            d["old"],
            d["advantages"],
            d["mask"],
            correction=d["token_weights"],
            chunk_tokens=4,
        ),
        "policy_loss by fipo": lambda d: rlk.policy_loss(
            d["logprobs"].view(-1),
            d["old"].view(-1),
            d["per_row"],
            d["mask"].view(-1),
            objective="fipo",
            cu_seqlens=d["cu"],
        ),
        "policy_loss by real": lambda d: rlk.policy_loss(
            d["logprobs"], d["old"], d["per_row"], d["mask"], objective="real", group_ids=d["rows"]
        ),
        "policy_loss by a2po": lambda d: rlk.policy_loss(
            d["logprobs"], None, None, d["mask"], objective="a2po", **of_a2po(d)
        ),
        "linear_policy_loss by vespo": lambda d: rlk.linear_policy_loss(
            d["hidden"],
            d["weight"],
            d["targets"],
            d["old"],
            d["per_row"],
            d["mask"],
            objective="vespo",
            chunk_tokens=4,
            return_metrics=True,
        ),
    }
