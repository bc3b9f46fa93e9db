"""Which golden cases the library can express, and why the others are not covered."""

import golden_adapter

CASES = golden_adapter.load()

# An operation, or the beginning of a case's id: why no public function of ours expresses it.
NOT_COVERED = {
    # operations
    "distillation_loss": "cross-entropy to a teacher: no divergence_stats yet",
    "policy_loss_from_logits": "exact KL(old || new) as a penalty: token_stats offers KL(pi || ref)",
    "process_advantage": "normalised step rewards",
    "gigpo_advantage": "step-level groups by anchor state",
    "assemble_rewards": "KL in the reward and score placement: the trainer's",
    "process_sequences": "token bookkeeping: the trainer's",
    "length_penalty": "a reward function: the trainer's",
    "kl_controller": "coefficients over time: no controllers yet",
    "entropy_controller": "coefficients over time: no controllers yet",
    # cases of operations that are covered otherwise
    "adv.verl.otb": "optimal token baseline",
    "returns.reset_on_mask": "SkyRL: a masked gap blocks the reward",
    "divergence.forward_kl": "no divergence_stats yet",
    "divergence.jsd": "no divergence_stats yet",
    "kl.verl.abs": "estimator |log-ratio|",
    "kl.verl.k3_straight_through": "value of k3 with the gradient of k2",
    "kl.k3.far.clamped": "a clamp that bites: ours has none",
    "sft.asft": "exact KL(ref || pi) over the vocabulary: token_stats offers KL(pi || ref)",
    "policy.openrlhf-0.11.tis": "corrections of the rollout mismatch",
    "policy.openrlhf-0.11.icepop": "corrections of the rollout mismatch",
    "policy.openrlhf-0.11.seq_mask_tis": "corrections of the rollout mismatch",
    "policy.trl.grpo.opsm0.2": "corrections of the rollout mismatch",
    "policy.trl.grpo.kl_is_weighted": "KL term weighted by the policy ratio",
    "policy.verl.gmpo": "no objective yet",
    "policy.trl.gmpo": "no objective yet",
    "policy.trl.vespo": "no objective yet",
    "policy.trl.a2po": "no objective yet",
    "policy.swift.fipo": "no objective yet",
    "policy.swift.real": "no objective yet",
    "policy.verl.clip_cov": "no objective yet",
}

# An output that covered cases list and no public function returns: by operation, or the beginning of a case's id.
OUTPUTS_NOT_OFFERED = {
    ("token_logprob", "max_logit"): "bookkeeping of the softmax",
    ("token_logprob", "argmax"): "is_top1 says whether the target is it",
    ("token_logprob", "flags"): "logp is -inf there",
    ("policy.verl.dppo_tv", "metrics.clip_fraction_lower"): "a constant 0: there is no dual clip",
    ("policy.verl.dppo_kl", "metrics.clip_fraction_lower"): "a constant 0: there is no dual clip",
    ("policy.verl.sapo", "metrics.clip_fraction"): "a constant 0: nothing is clipped",
    ("policy.verl.reinforce.is_weight", "metrics.mean_old_minus_new"): "logged beside an objective without old "
    "log-probabilities",
}


def not_offered(case, name):
    """The entries of OUTPUTS_NOT_OFFERED that name this output."""
    return [key for key in OUTPUTS_NOT_OFFERED if key[1] == name and (key[0] == case.op or case.id.startswith(key[0]))]


def reasons(case):
    """The entries of NOT_COVERED that name this case."""
    return [key for key in NOT_COVERED if key == case.op or case.id.startswith(key)]


COVERED = [case for case in CASES if not reasons(case)]
