"""One call of every public function that takes ``cu_seqlens``, on eight packed tokens: the offsets come last,
everything else is fixed.
"""

import torch

import rlkernels as rlk

T, H, V = 8, 4, 5
_draw = torch.Generator().manual_seed(0)
Z, OLD, REWARDS, VALUES = (torch.randn(T, generator=_draw) for _ in range(4))
HIDDEN, WEIGHT, LOGITS = (torch.randn(n, m, generator=_draw) for n, m in ((T, H), (V, H), (T, V)))
TARGETS, EVERY = torch.randint(0, V, (T,), generator=_draw), torch.ones(T)
GOOD = (0, 3, 4, 6, 8)  # four sequences: two pairs


def _ones(cu, *shape):
    """One number per sequence: what the shape says, whatever the values do."""
    return torch.ones(len(cu) - 1, *shape)


CALLS = {
    "gae": lambda cu: torch.stack(rlk.gae(REWARDS, VALUES, cu_seqlens=cu)),
    "gae with bootstrap values": lambda cu: torch.stack(
        rlk.gae(REWARDS, VALUES, cu_seqlens=cu, bootstrap_values=_ones(cu))
    ),
    "discounted_returns": lambda cu: rlk.discounted_returns(REWARDS, gamma=0.9, cu_seqlens=cu),
    "discounted_returns with resets": lambda cu: rlk.discounted_returns(REWARDS, masked="reset", cu_seqlens=cu),
    "gae of turns": lambda cu: torch.stack(
        rlk.gae(REWARDS, VALUES, turn_ends=EVERY, lam=_ones(cu), cu_seqlens=cu, bootstrap_values=_ones(cu))
    ),
    "vtrace": lambda cu: torch.stack(rlk.vtrace(REWARDS, VALUES, Z, OLD, cu_seqlens=cu, bootstrap_values=_ones(cu))),
    "step_advantages": lambda cu: rlk.step_advantages(REWARDS, EVERY, _ones(cu).long(), cu_seqlens=cu),
    "optimal_token_advantages": lambda cu: torch.stack(
        rlk.optimal_token_advantages(REWARDS, OLD, OLD, _ones(cu).long(), cu_seqlens=cu)
    ),
    "assemble_rewards": lambda cu: rlk.assemble_rewards(_ones(cu), EVERY, placement="trl-end", cu_seqlens=cu),
    "extended_mask": lambda cu: rlk.extended_mask(EVERY, cu),
    "sequence_sums": lambda cu: rlk.sequence_sums(Z, cu_seqlens=cu),
    "sequence_means": lambda cu: rlk.sequence_means(Z, EVERY, cu),
    "broadcast_to_tokens": lambda cu: rlk.broadcast_to_tokens(_ones(cu), EVERY, cu),
    "token_weights": lambda cu: rlk.token_weights(EVERY, "seq-mean-token-mean", cu_seqlens=cu),
    "token_weights of a sum": lambda cu: rlk.token_weights(EVERY, "token-sum", cu_seqlens=cu),
    "aggregate": lambda cu: rlk.aggregate(Z, None, "seq-mean-token-sum", cu_seqlens=cu),
    "policy_loss": lambda cu: rlk.policy_loss(Z, OLD, VALUES, cu_seqlens=cu),
    "policy_loss with weights": lambda cu: rlk.policy_loss(Z, OLD, VALUES, weights=EVERY, cu_seqlens=cu),
    "policy_loss, an advantage per sequence": lambda cu: rlk.policy_loss(
        Z, OLD, _ones(cu, 1), weights=EVERY, cu_seqlens=cu
    ),
    "policy_loss of sequences": lambda cu: rlk.policy_loss(Z, OLD, VALUES, cu_seqlens=cu, ratio_level="sequence"),
    "policy_loss of sequences with weights": lambda cu: rlk.policy_loss(
        Z, OLD, VALUES, weights=EVERY, cu_seqlens=cu, ratio_level="sequence_token"
    ),
    "policy_loss of sums": lambda cu: rlk.policy_loss(Z, OLD, VALUES, cu_seqlens=cu, ratio_level="sequence_sum"),
    "logits_policy_loss": lambda cu: rlk.logits_policy_loss(LOGITS, TARGETS, OLD, VALUES, cu_seqlens=cu),
    "logits_policy_loss with weights": lambda cu: rlk.logits_policy_loss(
        LOGITS, TARGETS, OLD, VALUES, weights=EVERY, cu_seqlens=cu
    ),
    "logits_policy_loss of sequences": lambda cu: rlk.logits_policy_loss(
        LOGITS, TARGETS, OLD, VALUES, cu_seqlens=cu, ratio_level="sequence"
    ),
    "linear_policy_loss": lambda cu: rlk.linear_policy_loss(HIDDEN, WEIGHT, TARGETS, OLD, VALUES, cu_seqlens=cu),
    "linear_policy_loss with weights": lambda cu: rlk.linear_policy_loss(
        HIDDEN, WEIGHT, TARGETS, OLD, VALUES, weights=EVERY, cu_seqlens=cu
    ),
    "linear_policy_loss of sequences": lambda cu: rlk.linear_policy_loss(
        HIDDEN, WEIGHT, TARGETS, OLD, VALUES, weights=EVERY, cu_seqlens=cu, ratio_level="sequence"
    ),
    "value_loss": lambda cu: rlk.value_loss(Z, OLD, VALUES, cu_seqlens=cu),
    "value_loss with weights": lambda cu: rlk.value_loss(Z, OLD, VALUES, clip_range=0.2, weights=EVERY, cu_seqlens=cu),
    "sft_loss": lambda cu: rlk.sft_loss(LOGITS, TARGETS, cu_seqlens=cu),
    "sft_loss with weights": lambda cu: rlk.sft_loss(LOGITS, TARGETS, weights=EVERY, cu_seqlens=cu),
    "sft_loss, a weight per sequence": lambda cu: rlk.sft_loss(
        LOGITS, TARGETS, weights=EVERY, sample_weights=_ones(cu, 1), cu_seqlens=cu
    ),
    "logprobs_sft_loss": lambda cu: rlk.logprobs_sft_loss(Z, cu_seqlens=cu),
    "logprobs_sft_loss with weights": lambda cu: rlk.logprobs_sft_loss(Z, weights=EVERY, cu_seqlens=cu),
    "linear_sft_loss": lambda cu: rlk.linear_sft_loss(HIDDEN, WEIGHT, TARGETS, cu_seqlens=cu),
    "linear_sft_loss with weights": lambda cu: rlk.linear_sft_loss(
        HIDDEN, WEIGHT, TARGETS, weights=EVERY, cu_seqlens=cu
    ),
    "wpo_weights": lambda cu: rlk.wpo_weights(Z, cu_seqlens=cu),
    "linear_dpo_loss": lambda cu: rlk.linear_dpo_loss(HIDDEN, WEIGHT, TARGETS, reference_free=True, cu_seqlens=cu),
    "linear_unpaired_preference_loss": lambda cu: rlk.linear_unpaired_preference_loss(
        HIDDEN, WEIGHT, TARGETS, _ones(cu), _ones(cu), kl=0.0, cu_seqlens=cu
    ),
    "divergence_loss": lambda cu: rlk.divergence_loss(LOGITS, LOGITS.flip(0), cu_seqlens=cu),
    "linear_distillation_loss": lambda cu: rlk.linear_distillation_loss(
        HIDDEN, WEIGHT, HIDDEN.flip(0), WEIGHT, cu_seqlens=cu
    ),
    "process_reward_loss": lambda cu: rlk.process_reward_loss(LOGITS, TARGETS, cu_seqlens=cu),
    "solution_scores": lambda cu: rlk.solution_scores(Z, cu_seqlens=cu),
    "end_scores": lambda cu: rlk.end_scores(Z, cu_seqlens=cu)[0],
    "reward_scores": lambda cu: rlk.reward_scores(HIDDEN, WEIGHT[:1], cu_seqlens=cu),
}
BAD = {
    "ends behind the last token": (0, 3, 4, 6, 80),
    "ends far behind it": (0, 3, 4, 6, 10**8),
    "leaves tokens over": (0, 2, 3, 4, 6),
    "decreases": (0, 6, 7, 3, 8),
    "starts behind the first token": (1, 3, 4, 6, 8),
    "starts before it": (-4, 3, 4, 6, 8),
    "goes below it": (0, -3, 4, 6, 8),
    "decreases to nothing": (0, 8, 0, 0, 0),
}
"""Offsets of as many sequences as ``GOOD``: in a compiled program the shapes do not tell them apart."""
