"""Calls of the divergences from a teacher, for ``public_calls``."""

import torch


def data(shape, vocab, features, draw):
    """What these calls need beside the data of the others; ``shape``: that of a padded batch."""
    logprobs, ids = torch.randn(*shape, vocab, generator=draw).log_softmax(-1).topk(4)
    return {
        "teacher_hidden": torch.randn(*shape, features - 3, generator=draw),
        "teacher_head": torch.randn(vocab + 2, features - 3, generator=draw),
        "teacher_bias": torch.randn(vocab + 2, generator=draw),
        "top_ids": ids,
        "top_logprobs": logprobs,
    }


def calls(rlk):
    """The calls, by their names; ``rlk``: the library, as the caller sees it."""
    return {
        "token_divergences": lambda d: rlk.token_divergences(
            d["logits"],
            d["ref_logits"],
            d["mask"],
            kind="jsd",
            beta=0.3,
            temperature=d["temperature"],
            vocab_mask=d["columns"],
        ),
        "token_divergences of top log-probabilities": lambda d: rlk.token_divergences(
            d["logits"], mask=d["mask"], teacher_topk=(d["top_ids"], d["top_logprobs"]), kind="reverse_kl"
        ),
        "divergence_loss": lambda d: rlk.divergence_loss(
            d["logits"],
            d["ref_logits"],
            d["mask"],
            temperature=d["temperature"],
            vocab_mask=d["columns"],
            weights=d["token_weights"],
            return_metrics=True,
        ),
        "divergence_loss of a packed batch": lambda d: rlk.divergence_loss(
            d["logits"].flatten(0, 1),
            d["ref_logits"].flatten(0, 1),
            d["mask"].view(-1),
            kind="cross_entropy",
            cu_seqlens=d["cu"],
            aggregation="seq-mean-token-mean",
            normalizers={"num_sequences": d["count"]},
        ),
        "divergence_loss of top log-probabilities": lambda d: rlk.divergence_loss(
            d["logits"], mask=d["mask"], teacher_topk=(d["top_ids"], d["top_logprobs"]), temperature=d["temperature"]
        ),
        "linear_distillation_loss": lambda d: rlk.linear_distillation_loss(
            d["hidden"],
            d["weight"],
            d["teacher_hidden"],
            d["teacher_head"],
            d["mask"],
            bias=d["bias"],
            teacher_bias=d["teacher_bias"],
            temperature=d["temperature"],
            softcap=5.0,
            chunk_tokens=4,
            weights=d["token_weights"],
            return_metrics=True,
        ),
        "linear_distillation_loss of a packed batch": lambda d: rlk.linear_distillation_loss(
            d["hidden"].flatten(0, 1),
            d["weight"],
            mask=d["mask"].view(-1),
            teacher_topk=(d["top_ids"].flatten(0, 1), d["top_logprobs"].flatten(0, 1)),
            kind="jsd",
            chunk_tokens=4,
            cu_seqlens=d["cu"],
            aggregation="seq-mean-token-mean",
            normalizers={"num_sequences": d["count"]},
        ),
    }
