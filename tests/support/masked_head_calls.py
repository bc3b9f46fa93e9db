"""Calls of the functions over a head under a mask of the vocabulary, for ``public_calls``."""


def calls(rlk):
    """Returns the calls by their names; ``rlk``: the library, as ``public_calls`` sees it."""
    return {
        "linear_token_logprobs under a mask": lambda d: rlk.linear_token_logprobs(
            d["hidden"], d["weight"], d["targets"], vocab_mask=d["vocab_mask"]
        ),
        "linear_token_stats under a mask": lambda d: rlk.linear_token_stats(
            d["hidden"], d["weight"], d["targets"], vocab_mask=d["columns"], outputs=("entropy",)
        ),
        "linear_policy_loss under a mask": lambda d: rlk.linear_policy_loss(
            d["hidden"], d["weight"], d["targets"], d["old"], d["advantages"], d["mask"], vocab_mask=d["columns"]
        ),
        "linear_sft_loss under a mask": lambda d: rlk.linear_sft_loss(
            d["hidden"], d["weight"], d["targets"], d["mask"], vocab_mask=d["columns"]
        ),
        "linear_dpo_loss under a mask": lambda d: rlk.linear_dpo_loss(
            d["hidden"].flatten(0, 1),
            d["weight"],
            d["targets"].view(-1),
            ref_chosen_logps=d["per_row"][:2],
            ref_rejected_logps=d["per_row"][1:],
            vocab_mask=d["columns"],
            cu_seqlens=d["answers"],
        ),
        "linear_unpaired_preference_loss under a mask": lambda d: rlk.linear_unpaired_preference_loss(
            d["hidden"],
            d["weight"],
            d["targets"],
            d["per_row"],
            d["rows"] == 7,
            d["mask"],
            kl=d["number"],
            vocab_mask=d["columns"],
        ),
        "linear_distillation_loss under a mask": lambda d: rlk.linear_distillation_loss(
            d["hidden"],
            d["weight"],
            d["hidden"].detach().flip(-1),
            d["weight"].detach(),
            d["mask"],
            vocab_mask=d["columns"],
        ),
    }
