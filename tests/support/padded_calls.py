"""Calls on packed tokens with padding behind the last sequence, which holds NaN.

``CALLS[name](count, mask, offsets)`` is a call on the first ``count`` tokens.
"""

import torch

import rlkernels as rlk

T, V, H, END = 10, 5, 4, 7
CU = (0, 2, 4, 5, 7)
_draw = torch.Generator().manual_seed(3)


def garbage(*shape):
    """Numbers, and NaN at the padding."""
    x = torch.randn(*shape, generator=_draw, dtype=torch.float64)
    x[END:] = torch.nan
    return x


LOGP, OLD, ADVANTAGES, VALUES, REWARDS = (garbage(T) for _ in range(5))
LOGITS, HIDDEN = garbage(T, V), garbage(T, H)
WEIGHT = torch.randn(V, H, generator=_draw, dtype=torch.float64)
TARGETS = torch.randint(0, V, (T,), generator=_draw)
TARGETS[END:] = 10**6
MASK = torch.tensor([1, 1, 0, 1, 1, 1, 1, 0, 0, 0])
PER_SEQUENCE = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
EVERY = torch.ones(T, dtype=torch.float64)

CALLS = {
    "gae": lambda k, m, cu: torch.stack(rlk.gae(REWARDS[:k], VALUES[:k], m, gamma=0.9, lam=0.8, cu_seqlens=cu)),
    "gae, zero": lambda k, m, cu: torch.stack(
        rlk.gae(REWARDS[:k], VALUES[:k], m, lam=0.8, masked="zero", cu_seqlens=cu, bootstrap_values=PER_SEQUENCE)
    ),
    "discounted_returns": lambda k, m, cu: rlk.discounted_returns(REWARDS[:k], m, gamma=0.9, cu_seqlens=cu),
    "sequence_sums": lambda k, m, cu: rlk.sequence_sums(LOGP[:k], m, cu),
    "sequence_means": lambda k, m, cu: rlk.sequence_means(LOGP[:k], m, cu),
    "broadcast_to_tokens": lambda k, m, cu: rlk.broadcast_to_tokens(PER_SEQUENCE, m, cu),
    "token_weights": lambda k, m, cu: rlk.token_weights(m, "seq-mean-token-mean", cu_seqlens=cu),
    "aggregate": lambda k, m, cu: rlk.aggregate(LOGP[:k], m, "seq-mean-token-sum", cu_seqlens=cu),
    "policy_loss": lambda k, m, cu: rlk.policy_loss(LOGP[:k], OLD[:k], ADVANTAGES[:k], m, cu_seqlens=cu),
    "policy_loss of sequences": lambda k, m, cu: rlk.policy_loss(
        LOGP[:k], OLD[:k], PER_SEQUENCE, m, ratio_level="sequence", aggregation="seq-mean-token-mean", cu_seqlens=cu
    ),
    "policy_loss of weights": lambda k, m, cu: rlk.policy_loss(
        LOGP[:k], OLD[:k], ADVANTAGES[:k], m, weights=EVERY[:k], cu_seqlens=cu
    ),
    "logits_policy_loss": lambda k, m, cu: rlk.logits_policy_loss(
        LOGITS[:k], TARGETS[:k], OLD[:k], ADVANTAGES[:k], m, cu_seqlens=cu
    ),
    "linear_policy_loss": lambda k, m, cu: rlk.linear_policy_loss(
        HIDDEN[:k], WEIGHT, TARGETS[:k], OLD[:k], ADVANTAGES[:k], m, cu_seqlens=cu
    ),
    "value_loss": lambda k, m, cu: rlk.value_loss(LOGP[:k], OLD[:k], VALUES[:k], m, clip_range=0.2, cu_seqlens=cu),
    "sft_loss": lambda k, m, cu: rlk.sft_loss(LOGITS[:k], TARGETS[:k], m, cu_seqlens=cu),
    "logprobs_sft_loss": lambda k, m, cu: rlk.logprobs_sft_loss(LOGP[:k], m, cu_seqlens=cu),
    "linear_sft_loss": lambda k, m, cu: rlk.linear_sft_loss(HIDDEN[:k], WEIGHT, TARGETS[:k], m, cu_seqlens=cu),
    "linear_dpo_loss": lambda k, m, cu: rlk.linear_dpo_loss(
        HIDDEN[:k], WEIGHT, TARGETS[:k], m, reference_free=True, cu_seqlens=cu
    ),
    "linear_unpaired_preference_loss": lambda k, m, cu: rlk.linear_unpaired_preference_loss(
        HIDDEN[:k], WEIGHT, TARGETS[:k], PER_SEQUENCE, PER_SEQUENCE > 0, m, kl=0.0, cu_seqlens=cu
    ),
    "rollout_weights": lambda k, m, cu: rlk.rollout_weights(
        OLD[:k], LOGP[:k], m, level="sequence", high=3.0, cu_seqlens=cu
    ),
    "off_policy_sequence_mask": lambda k, m, cu: rlk.off_policy_sequence_mask(
        LOGP[:k], OLD[:k], ADVANTAGES[:k], m, delta=0.1, cu_seqlens=cu
    ),
    "solution_scores": lambda k, m, cu: rlk.solution_scores(LOGP[:k].exp(), m, cu_seqlens=cu),
}
