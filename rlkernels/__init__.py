"""rlkernels: the loss layer of reinforcement learning for language models. Exact, fused, one import.

Log-probabilities and statistics of logits (``token_logprobs``, ``token_stats``), the same from hidden states
(``linear_*``), policy, value, reward, preference, supervised and distillation losses, aggregations (``token_weights``,
``aggregate``), advantages (``gae``, ``group_advantages``), the mismatch with a rollout engine (``rollout_weights``,
``Correction``), batches of agents (``rlkernels.trajectories``), and the conventions of published systems (``presets``).
"""

import os as _os

from rlkernels import objectives, presets
from rlkernels.advantages.assemble import ProcessedSequences, assemble_rewards, extended_mask, process_sequences
from rlkernels.advantages.controllers import EntropyController, KLController, WeightAverage
from rlkernels.advantages.environments import rollout_gae
from rlkernels.advantages.gae import discounted_returns, gae
from rlkernels.advantages.group import broadcast_advantages, group_advantages
from rlkernels.advantages.moments import Moments, masked_moments, merge_moments
from rlkernels.advantages.selection import best_of_n
from rlkernels.advantages.shaping import dynamic_sampling_mask, length_penalty, truncation_penalty
from rlkernels.advantages.steps import gigpo_advantages, optimal_token_advantages, step_advantages
from rlkernels.advantages.vtrace import vtrace
from rlkernels.advantages.whitening import masked_whiten
from rlkernels.aggregation import aggregate, token_weights
from rlkernels.backends import available_backends, use_backend
from rlkernels.integrations import patch_from_environment as _patch_from_environment
from rlkernels.integrations import status
from rlkernels.linear.distillation_loss import linear_distillation_loss
from rlkernels.linear.policy_loss import linear_policy_loss
from rlkernels.linear.preference_loss import linear_dpo_loss
from rlkernels.linear.sft_loss import linear_sft_loss
from rlkernels.linear.token_stats import linear_token_logprobs, linear_token_stats
from rlkernels.linear.unpaired_preference_loss import linear_unpaired_preference_loss
from rlkernels.logprobs import TokenStats, token_logprobs, token_stats
from rlkernels.losses.divergence import divergence_loss, token_divergences
from rlkernels.losses.kl_estimate import kl_estimate
from rlkernels.losses.kl_term import KLTerm
from rlkernels.losses.logits_policy import logits_policy_loss
from rlkernels.losses.policy import policy_loss
from rlkernels.losses.preference import dpo_loss, length_desensitized_weights
from rlkernels.losses.preference_weights import wpo_weights
from rlkernels.losses.process_reward import process_reward_loss, solution_scores
from rlkernels.losses.rank_list import rank_list_loss
from rlkernels.losses.reward_head import end_scores, reward_scores
from rlkernels.losses.reward_model import pairwise_reward_loss
from rlkernels.losses.reward_normalizer import RewardNormalizer
from rlkernels.losses.sft import logprobs_sft_loss, sft_loss
from rlkernels.losses.span_reward import span_reward_loss
from rlkernels.losses.top_entropy import top_entropy_mask
from rlkernels.losses.unpaired_preference import unpaired_preference_loss
from rlkernels.losses.value import value_loss
from rlkernels.objectives import check_objective, objective
from rlkernels.packing import Packed, pack, shift_targets, unpack
from rlkernels.rollout.correction import Correction
from rlkernels.rollout.masks import m2po_mask, off_policy_sequence_mask, rejection_mask
from rlkernels.rollout.metrics import rollout_metrics
from rlkernels.rollout.weights import rho_correction, rollout_weights
from rlkernels.sequences import broadcast_to_tokens, sequence_means, sequence_sums, spans_to_mask

__version__ = "0.2.0.dev0"
__all__ = [
    "Correction",
    "EntropyController",
    "KLController",
    "KLTerm",
    "Moments",
    "Packed",
    "ProcessedSequences",
    "RewardNormalizer",
    "TokenStats",
    "WeightAverage",
    "aggregate",
    "assemble_rewards",
    "available_backends",
    "best_of_n",
    "broadcast_advantages",
    "broadcast_to_tokens",
    "check_objective",
    "discounted_returns",
    "divergence_loss",
    "dpo_loss",
    "dynamic_sampling_mask",
    "end_scores",
    "extended_mask",
    "gae",
    "gigpo_advantages",
    "group_advantages",
    "kl_estimate",
    "length_desensitized_weights",
    "length_penalty",
    "linear_distillation_loss",
    "linear_dpo_loss",
    "linear_policy_loss",
    "linear_sft_loss",
    "linear_token_logprobs",
    "linear_token_stats",
    "linear_unpaired_preference_loss",
    "logits_policy_loss",
    "logprobs_sft_loss",
    "m2po_mask",
    "masked_moments",
    "masked_whiten",
    "merge_moments",
    "objective",
    "objectives",
    "off_policy_sequence_mask",
    "optimal_token_advantages",
    "pack",
    "pairwise_reward_loss",
    "policy_loss",
    "presets",
    "process_reward_loss",
    "process_sequences",
    "rank_list_loss",
    "rejection_mask",
    "reward_scores",
    "rho_correction",
    "rollout_gae",
    "rollout_metrics",
    "rollout_weights",
    "sequence_means",
    "sequence_sums",
    "sft_loss",
    "shift_targets",
    "solution_scores",
    "span_reward_loss",
    "spans_to_mask",
    "status",
    "step_advantages",
    "token_divergences",
    "token_logprobs",
    "token_stats",
    "token_weights",
    "top_entropy_mask",
    "truncation_penalty",
    "unpack",
    "unpaired_preference_loss",
    "use_backend",
    "value_loss",
    "vtrace",
    "wpo_weights",
]

if "RLKERNELS_PATCH" in _os.environ:
    # Last, because a trainer that is imported here may import this package again.
    _patch_from_environment()
