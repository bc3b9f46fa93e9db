"""Calls of preference and supervised losses with their further options, for ``public_calls``."""

import torch


def calls(rlk):
    """``{name: call}``; ``rlk``: the library, seen through ``public_calls``."""
    return {
        "token_logprobs of several targets": lambda d: rlk.token_logprobs(
            d["logits"],
            torch.stack([d["targets"], d["targets"].flip(0), d["targets"].clamp(max=3)], -1),
            temperature=d["temperature"],
            vocab_mask=d["columns"],
        ),
        "sft_loss of terms": lambda d: rlk.sft_loss(
            d["logits"],
            d["targets"],
            d["mask"],
            temperature=d["temperature"],
            vocab_mask=d["vocab_mask"],
            z_loss_coef=0.1,
            label_smoothing=0.2,
            return_metrics=True,
        ),
        "sft_loss of entropies": lambda d: rlk.sft_loss(
            d["logits"],
            d["targets"],
            d["mask"],
            kind="eaft",
            vocab_mask=d["vocab_mask"],
            sample_weights=d["advantages"],
            normalize_by_weight=True,
        ),
        "sft_loss of a reference": lambda d: rlk.sft_loss(
            d["logits"], d["targets"], d["mask"], kind="asft", ref_logits=d["ref_logits"], vocab_mask=d["columns"]
        ),
        "linear_sft_loss of a reference": lambda d: rlk.linear_sft_loss(
            d["hidden"],
            d["weight"],
            d["targets"],
            d["mask"],
            kind="asft",
            bias=d["bias"],
            ref_hidden=d["teacher_hidden"],
            ref_weight=d["teacher_head"],
            ref_bias=d["teacher_bias"],
        ),
        "best_of_n": lambda d: rlk.best_of_n(d["pair_c"], d["groups"]),
        "wpo_weights": lambda d: rlk.wpo_weights(
            d["values"].view(-1), d["mask"].view(-1), log_sum_sq_probs=d["old"].view(-1), cu_seqlens=d["answers"]
        ),
        "dpo_loss of rewards and gold": lambda d: rlk.dpo_loss(
            d["pair_a"],
            d["pair_b"],
            d["pair_c"],
            d["pair_d"],
            loss_type=("rpo", "tpo_l", "dpop"),
            beta=d["token_weights"].view(-1)[:6],
            chosen_lengths=d["lengths"],
            rejected_lengths=d["lengths"],
            chosen_rewards=d["pair_d"],
            rejected_rewards=d["pair_c"],
            gold_logps=d["pair_b"],
            gold_lengths=d["lengths"],
            return_metrics=True,
        ),
        "linear_dpo_loss of rewards and gold": lambda d: rlk.linear_dpo_loss(
            d["hidden"].flatten(0, 1),
            d["weight"],
            d["targets"].view(-1),
            d["mask"].view(-1),
            cu_seqlens=d["answers"],
            chunk_tokens=4,
            loss_type=("rpo", "tpo"),
            beta=d["token_weights"].view(-1)[:2],
            ref_chosen_logps=d["pair_c"][:2],
            ref_rejected_logps=d["pair_d"][:2],
            chosen_rewards=d["old"].view(-1)[:2],
            rejected_rewards=d["old"].view(-1)[2:4],
            gold_logps=d["pair_a"][:2],
            gold_lengths=d["lengths"][:2],
            ld_alpha=0.5,
        ),
        "linear_unpaired_preference_loss of averages": lambda d: rlk.linear_unpaired_preference_loss(
            d["hidden"],
            d["weight"],
            d["targets"],
            d["pair_c"][:3],
            d["groups"][:3] == 4,
            d["mask"],
            kl=0.1,
            length_normalized=True,
            lengths=d["lengths"][:3],
        ),
        "unpaired_preference_loss of averages": lambda d: rlk.unpaired_preference_loss(
            d["pair_a"], d["pair_c"], d["groups"] == 4, kl=0.1, length_normalized=True, lengths=d["lengths"]
        ),
    }
