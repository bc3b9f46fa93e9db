"""Which golden cases the library can express, and why the others are not covered."""

import golden_adapter

CASES = golden_adapter.load()

# An operation, or the beginning of a case's id: why no public function of ours expresses it.
NOT_COVERED: dict[str, str] = {}

# An output that covered cases list and no public function returns: by operation, or the beginning of a case's id.
OUTPUTS_NOT_OFFERED = {
    ("rewards.dschat", "ends"): "the end of a slice, one beyond the row where the row is full",
    ("token_logprob", "max_logit"): "bookkeeping of the softmax",
    ("token_logprob", "argmax"): "is_top1 says whether the target is it",
    ("token_logprob", "flags"): "logp is -inf there",
    ("policy.verl.dppo_tv", "metrics.clip_fraction_lower"): "a constant 0: there is no dual clip",
    ("policy.verl.dppo_kl", "metrics.clip_fraction_lower"): "a constant 0: there is no dual clip",
    ("policy.verl.gmpo", "metrics.clip_fraction_lower"): "the part of A < 0",
    ("policy.swift.fipo", "influence_weight"): "an intermediate, which loss and gradient hold",
    ("policy.trl.a2po", "v_star"): "an intermediate, which loss and gradient hold",
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
