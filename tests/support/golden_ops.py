"""From the operations of the golden files to the public functions.

Names, defaults and layouts are translated; arithmetic is ours alone.

An adapter takes the input tensors and the parameters and pops each parameter that it honours: what is left over is not
offered.
"""

import golden_preferences
import golden_rewards
import golden_rollout
import golden_tokens
import torch
from golden_adapter import aggregation, expect

import rlkernels as rlk


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
    estimator = p.pop("estimator")
    expect(estimator in ("k1", "k2", "k3"), f"estimator {estimator}")
    gap, mask = (x["logp"] - x["ref_logp"]).detach(), x.get("mask", torch.ones_like(x["logp"]))
    _inactive(gap, p.pop("diff_clamp", None))
    bound = p.pop("value_clamp", None)
    values = []
    for k in range(gap.numel()):  # one token at a time: the loss is a sum, the file lists the terms
        weights = torch.zeros_like(gap)
        weights.view(-1)[k] = 1.0
        values.append(
            rlk.policy_loss(
                x["logp"],
                None,
                torch.zeros_like(gap),
                mask,
                objective="reinforce",
                weights=weights,
                ref_logprobs=x["ref_logp"],
                kl=estimator,
                kl_coef=1.0,
            )
        )
    value = torch.stack(values).view(gap.shape)
    _inactive(value.detach(), bound)
    return {"value": value}


def _inactive(x, bounds):
    """Other systems clamp; we do not. Where nothing reaches the bound the numbers are the same."""
    low, high = bounds or (None, None)
    expect(low is None or bool((x > low).all()), f"clamp at {low}")
    expect(high is None or bool((x < high).all()), f"clamp at {high}")


def vocab_divergence(x, p):
    expect(p.pop("kind") == "reverse_kl", "only KL(pi || ref)")
    targets = torch.zeros(x["logits"].shape[:-1], dtype=torch.int64)
    return {
        "value": rlk.token_stats(
            x["logits"], targets, ref_logits=x["ref_logits"], kl="exact", temperature=p.pop("temperature")
        ).kl
    }


def policy_loss(x, p):
    p.pop("trl_loss_type", None)  # a label
    objective, options = _objective(p)
    mask = x["mask"] if "tool_mask" not in x else x["mask"] * (x["tool_mask"] != 0)
    options["ratio_level"] = p.pop("ratio_level", "token")
    old = x.get("old_logp")
    if "old_logp_sum" in x:  # only the sum is given: it stands at each row's first token
        old = torch.zeros_like(x["logp"], requires_grad=False)
        old[:, 0] = x["old_logp_sum"]
    expect(old is not None or "rollout_logp" in x, "no behaviour policy")
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
        expect(not kl.get("is_weighted"), "importance-weighted KL")
        options |= {"kl": kl["estimator"], "kl_coef": kl["coef"], "ref_logprobs": x["ref_logp"]}
    bonus = 0.0
    if "entropy" in x:  # a token mean in TRL, whatever the loss is; ours has the weights of the loss
        bonus = p.pop("entropy_coef") * rlk.aggregate(x["entropy"], mask)
    mode, normalizers = aggregation(p) if "aggregation" in p else ("token-mean", {})
    if "is_weight" in x:
        weights = rlk.token_weights(mask, mode, dtype=x["logp"].dtype, **normalizers)
        options["weights"] = torch.where(mask != 0, weights * x["is_weight"], 0.0)
    else:
        options |= {"aggregation": mode, "normalizers": normalizers}
    expect(not p, f"parameters {sorted(p)}")
    loss, metrics = rlk.policy_loss(
        x["logp"], old, x["advantages"], mask, objective=objective, return_metrics=True, **options
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
    }
    if options["ratio_level"] != "token":  # TRL counts sequences there
        for name in ("clip_fraction_low", "clip_fraction_high", "clip_fraction_region"):
            names[name] = f"seq_{names[name]}"
    return {"loss": loss - bonus, **{theirs: metrics[ours] for theirs, ours in names.items() if ours in metrics}}


def _objective(p):
    """Objective and its parameters."""
    objective = {"gspo": "ppo_clip"}.get(p["objective"], p["objective"])
    p.pop("objective")
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
    policy_loss,
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
    golden_tokens.token_advantage,
    golden_tokens.whiten,
    golden_tokens.broadcast_advantage,
    golden_tokens.spans_to_mask,
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
