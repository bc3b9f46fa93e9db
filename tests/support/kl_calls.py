"""Calls of the functions with a KL term; see ``public_calls``."""

import rlkernels


def calls(rlk):
    """Returns the calls by their names; ``rlk``: the library, as ``public_calls`` sees it."""
    return {
        "kl_estimate": lambda d: rlk.kl_estimate(
            d["logprobs"], d["ref"], mask=d["mask"], old_logprobs=d["old"], value_clamp=2.0, ratio_weighted=True
        ),
        "policy_loss with a KL term": lambda d: rlk.policy_loss(
            d["logprobs"],
            d["old"],
            d["advantages"],
            d["mask"],
            ref_logprobs=d["ref"],
            kl=rlkernels.KLTerm(ratio_weighted=True, ratio_cap=2.0),
            kl_coef=0.1,
            return_metrics=True,
        ),
        "logits_policy_loss with an exact KL": lambda d: rlk.logits_policy_loss(
            d["logits"],
            d["targets"],
            d["old"],
            d["advantages"],
            d["mask"],
            temperature=d["temperature"],
            ref_logits=d["ref_logits"],
            kl="reverse_kl",
            kl_coef=0.1,
            return_metrics=True,
        ),
        "linear_policy_loss with an exact KL": lambda d: rlk.linear_policy_loss(
            d["hidden"],
            d["weight"],
            d["targets"],
            d["old"],
            d["advantages"],
            d["mask"],
            bias=d["bias"],
            temperature=d["temperature"],
            chunk_tokens=4,
            ref_hidden=d["teacher_hidden"],
            ref_weight=d["teacher_head"],
            ref_bias=d["teacher_bias"],
            kl="forward_kl",
            kl_coef=0.1,
            return_metrics=True,
        ),
        "linear_policy_loss with a KL term": lambda d: rlk.linear_policy_loss(
            d["hidden"],
            d["weight"],
            d["targets"],
            d["old"],
            d["advantages"],
            d["mask"],
            bias=d["bias"],
            chunk_tokens=4,
            ref_logprobs=d["ref"],
            kl=rlkernels.KLTerm("abs", value_clamp=2.0, mask=d["mask"].flip(0)),
            kl_coef=0.1,
            return_metrics=True,
        ),
    }
