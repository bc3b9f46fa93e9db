"""Adapters of the golden operations over preferences and likelihoods; see ``golden_ops``."""

import torch
from golden_adapter import aggregation, expect

import rlkernels as rlk

OPTIONS = (
    "beta",
    "label_smoothing",
    "reference_free",
    "f_divergence",
    "alpha",
    "length_normalized",
    "simpo_gamma",
    "alphapo_alpha",
    "discopop_tau",
    "loss_weights",
)
AVERAGES = ("simpo", "orpo", "orpo_odds_ratio")


def _options(p):
    kind = p.pop("loss_type")
    options = {name: p.pop(name) for name in OPTIONS if name in p}
    return {**options, "loss_type": kind if isinstance(kind, str) else tuple(kind)}


def preference_loss(x, p):
    options = _options(p)
    if options["loss_type"] in AVERAGES:  # the inputs are averages already
        options["chosen_lengths"] = options["rejected_lengths"] = torch.ones_like(
            x["policy_chosen"], requires_grad=False
        )
    elif options["loss_type"].startswith("cpo"):
        options["cpo_alpha"] = 0.0  # the trainer adds the likelihood, outside of the function that was run
    arguments = [x.get(name) for name in ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")]
    loss, metrics = rlk.dpo_loss(*arguments, **options, return_metrics=True)

    each, of_pairs = rlk.dpo_loss(*arguments, **options, reduction="none", return_metrics=True)
    outputs = {"loss": loss, "accuracy": metrics["accuracy"], "margin": metrics["reward_margin"]}
    if "log_odds_ratio" in metrics:
        outputs["log_odds"] = metrics["log_odds_ratio"]
    outputs |= {
        "per_pair": each,
        "chosen_rewards": of_pairs["reward_chosen"],
        "rejected_rewards": of_pairs["reward_rejected"],
    }
    return outputs


def preference_loss_from_tokens(x, p):
    live, logp, ref = x["completion_mask"][:, 1:], x["per_token_logp"], x["ref_per_token_logp"]
    pairs, options = logp.shape[0] // 2, _options(p)
    if p.pop("wpo_weighting", False):
        options["pair_weights"] = rlk.wpo_weights(logp, live, log_sum_sq_probs=x["log_sum_sq_probs"])
    weights = torch.ones_like(logp, requires_grad=False)
    if "ld_alpha" in p:
        weights = torch.cat(rlk.length_desensitized_weights(live[:pairs], live[pairs:], p.pop("ld_alpha")))
    policy, reference, lengths = (
        rlk.sequence_sums(v, live) for v in (weights * logp, weights * ref, torch.ones_like(ref))
    )
    loss, metrics = rlk.dpo_loss(
        policy[:pairs],
        policy[pairs:],
        reference[:pairs],
        reference[pairs:],
        **options,
        return_metrics=True,
        chosen_lengths=lengths[:pairs],
        rejected_lengths=lengths[pairs:],
    )
    return {
        "loss": loss,
        "reward_chosen": metrics["reward_chosen"],
        "reward_rejected": metrics["reward_rejected"],
        "reward_margins": metrics["reward_margin"],
        "reward_accuracies": metrics["accuracy"],
    }


def unpaired_preference_loss(x, p):
    if "per_token_logp" in x:
        logps, refs = (
            rlk.sequence_sums(x[name], x["completion_mask"][:, 1:]) for name in ("per_token_logp", "ref_per_token_logp")
        )
        desirable = x["desirable"]
    else:
        logps, refs = (torch.cat([x[f"{name}_chosen"], x[f"{name}_rejected"]]) for name in ("policy", "ref"))
        desirable = torch.arange(len(logps)) < len(x["policy_chosen"])
    options = {
        name: p.pop(name)
        for name in ("loss_type", "beta", "desirable_weight", "undesirable_weight", "delta")
        if name in p
    }
    if "kl_logp" in x:
        options |= {"kl_logps": x["kl_logp"], "ref_kl_logps": x["ref_kl_logp"]}
    loss, metrics = rlk.unpaired_preference_loss(logps, refs, desirable, **options, return_metrics=True)
    outputs = {"loss": loss, **metrics}
    if options["loss_type"] == "bco":
        outputs["per_row"] = torch.stack(
            [
                rlk.unpaired_preference_loss(logps[i : i + 1], refs[i : i + 1], desirable[i : i + 1], **options)
                for i in range(len(logps))
            ]
        )
    return outputs


def nll(x, p):
    mode, normalizers = aggregation(p)
    return {
        "loss": rlk.logprobs_sft_loss(
            x["logp"],
            x["mask"],
            sample_weights=x.get("weight"),
            normalize_by_weight=p.pop("normalize_by_weight", False),
            aggregation=mode,
            normalizers=normalizers,
        )
    }


def sft_loss(x, p):
    kind = p.pop("kind")
    expect(kind in ("nll", "dft", "asft") and p.pop("shift"), f"kind {kind}")
    mode, normalizers = aggregation(p)
    options = {"aggregation": mode, "normalizers": normalizers}
    logits, labels, ignored = x["logits"][:, :-1], x["labels"][:, 1:], p.pop("ignore_index")
    if kind == "asft":
        options |= {"asft_alpha": p.pop("asft_alpha"), "ref_logits": x["ref_logits"][:, :-1]}
    return {"loss": rlk.sft_loss(logits, labels, kind=kind, ignore_index=ignored, **options)}
