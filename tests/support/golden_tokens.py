"""Adapters of the golden operations over weights, segments and advantages; see ``golden_ops``."""

import torch
from golden_adapter import Live, aggregation, expect

import rlkernels as rlk

CONVENTIONS = {"none": "none", "zero_mask": "zero", "skip_observation": "skip", "reset_on_mask": "reset"}


def aggregate(x, p):
    mode, normalizers = aggregation(p, "mode")
    for theirs, ours in (("group_id", "group_ids"), ("rollout_id", "rollout_ids"), ("cu_seqlens", "cu_seqlens")):
        if theirs in x:
            normalizers[ours] = x[theirs]
    return {
        "value": rlk.aggregate(x["per_token"], x["mask"], mode, **normalizers),
        "weights": rlk.token_weights(x["mask"], mode, dtype=x["per_token"].dtype, **normalizers),
    }


def gae(x, p):
    convention, gamma, lam = p.pop("convention"), p.pop("gamma"), p.pop("lam")
    rewards, values, mask = x["rewards"], x["values"], x.get("mask")
    start = p.pop("start", 0)
    turns = {}
    if convention == "bi_level":
        expect(p.pop("turn_ends") == "nonzero_reward", "turn ends")
        turns = {"turn_ends": rewards != 0, "turn_gamma": p.pop("turn_gamma")}
        convention = "skip_observation"
    advantages, returns = rlk.gae(
        rewards[:, start:],
        values[:, start:],
        mask,
        gamma=gamma,
        lam=lam,
        masked=CONVENTIONS[convention],
        bootstrap_values=x.get("bootstrap_value"),
        **turns,
    )
    return {"advantages": advantages, "returns": returns, "whitened_advantages": rlk.masked_whiten(advantages, mask)}


def discounted_returns(x, p):
    convention = p.pop("convention")
    expect(convention in CONVENTIONS, f"convention {convention}")
    mask = x["mask"]
    returns = rlk.discounted_returns(x["rewards"], mask, gamma=p.pop("gamma"), masked=CONVENTIONS[convention])
    # SkyRL returns what stands at dead tokens, too.
    shown = Live(returns, mask) if convention == "reset_on_mask" else returns
    return {"returns": shown, "whitened_advantages": rlk.masked_whiten(returns, mask)}


ESTIMATORS = {
    "rloo": ("leave-one-out", None),
    "opo": ("length-mean", None),
    "batch_mean": ("batch-mean", None),
    "maxrl": ("mean", "mean"),
}


def group_advantage(x, p):
    estimator, scale = p.pop("estimator"), {"group": "std", "batch": "batch-std", "none": None}[p.pop("scale", "group")]
    baseline, scale = ESTIMATORS.get(estimator, ("mean", scale))
    options = {name: p.pop(name) for name in ("eps", "unbiased", "singleton") if name in p}
    options["lengths"] = x.get("lengths")
    return {"advantages": rlk.group_advantages(x["rewards"], x["group_id"], baseline=baseline, scale=scale, **options)}


def whiten(x, p):
    mask = x.get("mask")
    options = {name: p.pop(name) for name in ("unbiased", "eps", "eps_mode", "shift_mean", "dim") if name in p}
    y = rlk.masked_whiten(x["x"], mask, **options)
    # The sources transform dead positions too; ours are 0.
    return {"y": Live(y, torch.ones_like(y) if mask is None else mask), "y_valid": y if mask is None else y[mask != 0]}


def spans_to_mask(x, p):
    return {"mask": rlk.spans_to_mask(x["action_ranges"].long(), x["length"], shift=p.pop("shift"))}
