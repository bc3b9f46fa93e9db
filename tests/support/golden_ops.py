"""From the operations of the golden files to the public functions.

Names, defaults and layouts are translated; arithmetic is ours alone.

An adapter takes the input tensors and the parameters and pops each parameter that it honours: what is left over is not
offered.
"""

import golden_advantages
import golden_preferences
import golden_rewards
import golden_rollout
import golden_tokens
import torch
from golden_adapter import aggregation, expect

import rlkernels as rlk
from rlkernels.losses.row_options import ROW_KINDS


def token_logprob(x, p):
    logits, labels = x["logits"], x["labels"]
    if "row_mask" in x:
        labels = torch.where(x["row_mask"] != 0, labels, -100)
    if labels.dim() == logits.dim():  # K labels for each row: stride 0, no copy
        logits = logits.unsqueeze(-2).expand(*labels.shape, logits.shape[-1])
    stats = rlk.token_stats(
        logits,
        labels,
        temperature=p.pop("temperature"),
        vocab_mask=x.get("vocab_mask"),
        outputs=("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    )
    return _stats(stats)


def linear_token_logprob(x, p):
    stats = rlk.linear_token_stats(
        x["hidden"],
        x["weight"],
        x["labels"],
        bias=x.get("bias"),
        temperature=p.pop("temperature"),
        softcap=p.pop("softcap"),
        logit_scale=p.pop("logit_scale"),
        outputs=("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    )
    return _stats(stats)


def _stats(stats):
    return {
        "logp": stats.logprobs,
        "entropy": stats.entropy,
        "logsumexp": stats.logsumexp,
        "log_sum_sq_probs": stats.log_sum_sq_probs,
        "mean_logits": stats.mean_logits,
        "is_top1": stats.is_top1,
    }


def sequence_logprob(x, p):
    expect(p.pop("shift"), "unshifted labels")
    labels, ignored = x["labels"][:, 1:], p.pop("ignore_index")
    logp, live = rlk.token_logprobs(x["logits"][:, :-1], labels, ignore_index=ignored), labels != ignored
    return {"sum": rlk.sequence_sums(logp, live), "average": rlk.sequence_means(logp, live), "count": live.sum(-1)}


def kl_estimate(x, p):
    options = {name: p.pop(name) for name in ("diff_clamp", "value_clamp", "gradient") if name in p}
    return {"value": rlk.kl_estimate(x["logp"], x["ref_logp"], p.pop("estimator"), mask=x.get("mask"), **options)}


def _inactive(x, bounds):
    """Other systems clamp; we do not. Where nothing reaches the bound the numbers are the same."""
    low, high = bounds or (None, None)
    expect(low is None or bool((x > low).all()), f"clamp at {low}")
    expect(high is None or bool((x < high).all()), f"clamp at {high}")


def vocab_divergence(x, p):
    options = {name: p.pop(name) for name in ("beta",) if name in p}
    kind, temperature = p.pop("kind"), p.pop("temperature")
    value = rlk.token_divergences(x["logits"], x["ref_logits"], kind=kind, temperature=temperature, **options)
    if kind == "reverse_kl":  # offered twice, so that both give these numbers
        targets = torch.zeros(x["logits"].shape[:-1], dtype=torch.int64)
        stats = rlk.token_stats(x["logits"], targets, ref_logits=x["ref_logits"], kl="exact", temperature=temperature)
        value = 0.5 * (value + stats.kl)
    return {"value": value}


def distillation_loss(x, p):
    expect(p.pop("kind") == "forward_cross_entropy" and not p.pop("shift"), "cross-entropy of every position")
    mode, normalizers = aggregation(p)
    mask = x["labels"] != p.pop("ignore_index")
    options = {"aggregation": mode, "normalizers": normalizers}
    return {"loss": rlk.divergence_loss(x["logits"], x["teacher_logits"], mask, kind="cross_entropy", **options)}


def policy_loss(x, p):
    p.pop("trl_loss_type", None)  # a label
    objective, options = _objective(p)
    options |= {name: x[name] for name in ("rewards", "value_pool") if name in x}
    if objective == "a2po":
        options["ref_logprobs"] = x["ref_logp"]
    mask = x["mask"] if "tool_mask" not in x else x["mask"] * (x["tool_mask"] != 0)
    options["ratio_level"] = p.pop("ratio_level", "token")
    old = x.get("old_logp")
    if "old_logp_sum" in x:  # only the sum is given: it stands at each row's first token
        old = torch.zeros_like(x["logp"], requires_grad=False)
        old[:, 0] = x["old_logp_sum"]
    expect(old is not None or "rollout_logp" in x or objective == "a2po", "no behaviour policy")
    clamp = p.pop("log_ratio_clamp", None)
    if clamp and objective.startswith("dppo"):  # ours has no clamp beside ratio_max
        _inactive((x["logp"].detach() - old)[mask != 0], clamp)
    elif clamp:
        options["log_ratio_clamp"] = clamp
    for name in ("ratio_denominator", "log_ratio_sq_coef"):
        if name in p:
            options |= {name: p.pop(name), "rollout_logprobs": x["rollout_logp"]}
    if "kl" in p:
        kl = p.pop("kl")
        term = rlk.KLTerm(kl["estimator"], ratio_weighted=kl.get("is_weighted", False))
        options |= {"kl": term, "kl_coef": kl["coef"], "ref_logprobs": x["ref_logp"]}
    bonus = 0.0
    if "entropy" in x:  # a token mean in TRL, whatever the loss is; ours has the weights of the loss
        bonus = p.pop("entropy_coef") * rlk.aggregate(x["entropy"], mask)
    mode, normalizers = aggregation(p) if "aggregation" in p else ("token-mean", {})
    if "is_weight" in x:
        weights = rlk.token_weights(mask, mode, dtype=x["logp"].dtype, **normalizers)
        options["weights"] = torch.where(mask != 0, weights * x["is_weight"], 0.0)
    else:
        options |= {"aggregation": mode, "normalizers": normalizers}
    if "correction" in p:
        options |= {"correction": golden_rollout.correction(p.pop("correction")), "rollout_logprobs": x["rollout_logp"]}
    if "opsm_delta" in p:
        options["correction"] = rlk.Correction(mode=None, opsm_delta=p.pop("opsm_delta"))
    expect(not p, f"parameters {sorted(p)}")
    loss, metrics = rlk.policy_loss(
        x["logp"], old, x.get("advantages"), mask, objective=objective, return_metrics=True, **options
    )
    names = {
        "clip_fraction": "clip_fraction",
        "clip_fraction_surrogate": "clip_fraction",
        "clip_fraction_region": "clip_fraction",
        "clip_fraction_low": "clip_fraction_low",
        "clip_fraction_high": "clip_fraction_high",
        "clip_fraction_lower": "clip_fraction_dual",
        "mean_old_minus_new": "ppo_kl",
        "kl_mean": "kl",
        "filtered_fraction": "rollout_filtered",
    }
    if options["ratio_level"] != "token":  # TRL counts sequences there
        for name in ("clip_fraction_low", "clip_fraction_high", "clip_fraction_region"):
            names[name] = f"seq_{names[name]}"
    found = {theirs: metrics[ours] for theirs, ours in names.items() if ours in metrics}
    if "rollout_logprobs" in options and old is not None:
        found["mean_rollout_minus_old"] = rlk.rollout_metrics(old, x["rollout_logp"], mask)["rollout_kl"]
    return {"loss": loss - bonus, **found}


def policy_loss_from_logits(x, p):
    expect(p.pop("objective") == "ppo_kl_penalty", "the penalty of PPO's paper")
    mode, normalizers = aggregation(p)
    rows, targets, old_rows = x["logits"], x["labels"], x["old_logits"]
    old = rlk.token_logprobs(old_rows, targets)
    options = {"objective": "surrogate", "aggregation": mode, "normalizers": normalizers, "kl_coef": p.pop("kl_coef")}
    penalty = {"kl": "forward_kl", "ref_logits": old_rows}
    return {"loss": rlk.logits_policy_loss(rows, targets, old, x["advantages"], x["mask"], **options, **penalty)}


def _objective(p):
    """Objective and its parameters."""
    objective = {"gspo": "ppo_clip"}.get(p["objective"], p["objective"])
    p.pop("objective")
    if objective in ROW_KINDS:
        kind = ROW_KINDS[objective]
        return objective, {name: p.pop(name) for name in (*kind.numbers, *kind.tensors) if name in p}
    known = ("ppo_clip", "cispo", "sapo", "reinforce", "surrogate", "dppo_tv", "dppo_kl", "dro")
    expect(objective in known, f"objective {objective}")
    names = ("clip_low", "clip_high", "tau_pos", "tau_neg", "ratio_max", "delta_low", "delta_high")
    options = {name: p.pop(name) for name in names if name in p}
    if p.get("dual_clip") is not None:
        objective, options["dual_clip"] = "dual_clip", p.pop("dual_clip")
    if p.pop("ratio_gradient", False):
        objective += "_surrogate"
    if objective == "dro":
        options["beta"] = p.pop("dro_beta")
    conventions = {"absolute_max": "cispo_absolute", "one_plus_max_only": "cispo_max_only", "one_plus": "cispo"}
    objective = conventions.get(p.pop("clip_convention", None), objective)
    return objective, options


def ppo_step_per_sample(x, p):
    start = x["query_len"] - 1
    logp = rlk.token_logprobs(x["logits"][:, start:-1], x["input_ids"][:, start + 1 :])
    advantages, returns = rlk.gae(x["rewards"], x["old_values"], gamma=p.pop("gamma"), lam=p.pop("lam"), masked="none")
    whitened, clip = rlk.masked_whiten(advantages), p.pop("cliprange")
    loss, metrics = rlk.policy_loss(logp, x["old_logp"], whitened, clip_low=clip, clip_high=clip, return_metrics=True)
    value = rlk.value_loss(
        x["value_predictions"][:, start:-1], x["old_values"], returns, clip_range=p.pop("cliprange_value")
    )
    value = p.pop("vf_coef") * value
    return {
        "policy_loss": loss,
        "value_loss_times_coef": value,
        "value_loss": value,
        "whitened_advantages": whitened,
        "approx_kl_half_sq": metrics["approx_kl"],
    }


def ppo_step_masked(x, p):
    mode, normalizers = aggregation(p)
    clip, options = p.pop("clip"), {"aggregation": mode, "normalizers": normalizers}
    policy = rlk.policy_loss(
        x["logp"], x["old_logp"], x["advantages"], x["mask"], clip_low=clip, clip_high=clip, **options
    )
    value = rlk.value_loss(
        x["values"], x["old_values"], x["returns"], x["mask"], clip_range=p.pop("value_clip"), **options
    )
    return {"policy_loss": policy, "value_loss": value, "loss": policy + p.pop("vf_coef") * value}


def combined_loss(x, p):
    """One token whose terms have the listed values, each by its public function."""
    one = {name: torch.tensor([[float(value)]], dtype=torch.float64) for name, value in x.items()}
    policy = rlk.policy_loss(
        -one["policy_loss"],
        None,
        torch.ones(1, 1, dtype=torch.float64),
        objective="reinforce",
        entropy=one["entropy"],
        entropy_coef=p.pop("entropy_coef"),
    )
    value = rlk.value_loss((2 * one["value_loss"]).sqrt(), None, torch.zeros(1, 1, dtype=torch.float64))
    ptx = rlk.logprobs_sft_loss(-one["ptx_loss"])
    return {"loss": policy + p.pop("value_coef") * value + p.pop("ptx_coef") * ptx}


def value_loss(x, p):
    mode, normalizers = aggregation(p)
    loss, metrics = rlk.value_loss(
        x["values"],
        x["old_values"],
        x["returns"],
        x["mask"],
        clip_range=p.pop("clip"),
        aggregation=mode,
        normalizers=normalizers,
        return_metrics=True,
    )
    return {"loss": loss if p.pop("half") else 2.0 * loss, **metrics}


LOSSES = (
    token_logprob,
    linear_token_logprob,
    sequence_logprob,
    kl_estimate,
    vocab_divergence,
    distillation_loss,
    policy_loss,
    policy_loss_from_logits,
    ppo_step_per_sample,
    ppo_step_masked,
    combined_loss,
    value_loss,
    *golden_rewards.ADAPTERS,
    golden_preferences.preference_loss,
    golden_preferences.preference_loss_from_tokens,
    golden_preferences.unpaired_preference_loss,
    golden_preferences.sft_loss,
)
TOKENS = (
    golden_tokens.aggregate,
    golden_tokens.gae,
    golden_tokens.discounted_returns,
    golden_tokens.group_advantage,
    golden_tokens.whiten,
    golden_tokens.spans_to_mask,
    *golden_advantages.ADAPTERS,
    golden_rollout.rollout_weights,
    golden_rollout.rejection_mask,
    golden_rollout.off_policy_sequence_mask,
    golden_rollout.rho_correction,
)
ADAPTERS = {function.__name__: function for function in LOSSES + TOKENS} | dict.fromkeys(
    ("nll_from_logp", "weighted_nll"), golden_preferences.nll
)


def run(case, inputs):
    """The case's outputs, from public functions alone."""
    parameters = dict(case.parameters)
    outputs = ADAPTERS[case.op](inputs, parameters)
    expect(not parameters, f"parameters {sorted(parameters)}")
    return outputs
