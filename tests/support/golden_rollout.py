"""Adapters of the golden operations over the rollout mismatch; see ``golden_ops``."""

import torch
from golden_adapter import Live

import rlkernels as rlk


def _policies(x):
    """Both log-probabilities; where a case gives their difference alone, the engine's are 0."""
    if "log_ratio" in x:
        return x["log_ratio"], torch.zeros_like(x["log_ratio"])
    return x["old_logp"], x["rollout_logp"]


def rollout_weights(x, p):
    options = {
        name: p.pop(name) for name in ("level", "mode", "low", "high", "batch_normalize", "nan_ratio") if name in p
    }
    weights, metrics = rlk.rollout_weights(*_policies(x), x["mask"], **options, return_metrics=True)
    # TRL weighs dead tokens by 1 (they meet a mask later), and gives a sequence's weight once.
    found = {"rollout_is_mean": metrics["rollout_weight"], "rollout_is_eff_sample_size": metrics["rollout_weight_ess"]}
    of_rows = options["level"] == "sequence" and "log_ratio" not in x
    return {"weight": weights.amax(-1, keepdim=True) if of_rows else Live(weights, x["mask"]), **found}


def correction(p):
    """The correction of a policy loss. OpenRLHF's level "seq" bounds the mean of a sequence and weighs tokens."""
    of_sequences = {"level": "token", "gate_level": "sequence_mean"}
    return rlk.Correction(**{**p, **(of_sequences if p["level"] == "seq" else {})})


def rejection_mask(x, p):
    rules = {}
    for rule, text in zip(p.pop("rules"), p.pop("thresholds"), strict=True):
        numbers = tuple(float(number) for number in text.split("_"))
        rules[rule] = numbers if len(numbers) > 1 else numbers[0]
    kept, metrics = rlk.rejection_mask(*_policies(x), x["mask"], rules=rules, return_metrics=True)
    names = {"masked_fraction": "rejected_tokens", "sequences_touched_fraction": "touched_sequences"}
    return {"mask": kept, **{theirs: metrics[ours] for theirs, ours in names.items()}}


def off_policy_sequence_mask(x, p):
    kept = rlk.off_policy_sequence_mask(x["logp"], x["old_logp"], x["advantages"], x["mask"], delta=p.pop("delta"))
    return {"keep": (kept | (x["mask"] == 0)).all(-1)}


def rho_correction(x, p):
    bounds = {
        f"{kind}_{side}": p.pop(f"rho_{kind}_{theirs}_bound") or None  # 0 is off
        for kind in ("mask", "clamp")
        for side, theirs in (("low", "lower"), ("high", "upper"))
    }
    level = "sequence_mean" if p.pop("rho_mask_sequence_level") else "token"
    of_divergence = {"gate": "tv", "advantages": x["advantages"]} if p.pop("rho_mask_tv_divergence") else {}
    old, rollout = _policies(x)
    return {"weight": rlk.rho_correction(old, rollout, x["mask"], level=level, **of_divergence, **bounds)}
