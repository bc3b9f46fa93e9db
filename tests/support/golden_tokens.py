"""Adapters of the golden operations over weights, segments and advantages; see ``golden_ops``."""

import torch
from golden_adapter import Live, aggregation, expect

import rlkernels as rlk
from rlkernels.advantages.group import broadcast_advantages

CONVENTIONS = {"none": "none", "zero_mask": "zero", "skip_observation": "skip"}


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
    if convention == "bi_level":
        advantages, returns = _turns_then_tokens(rewards, values, gamma, lam, p.pop("turn_gamma"), p.pop("turn_ends"))
    else:
        advantages, returns = rlk.gae(
            rewards[:, start:],
            values[:, start:],
            mask,
            gamma=gamma,
            lam=lam,
            masked=CONVENTIONS[convention],
            bootstrap_values=x.get("bootstrap_value"),
        )
    return {"advantages": advantages, "returns": returns, "whitened_advantages": rlk.masked_whiten(advantages, mask)}


def _turns_then_tokens(rewards, values, gamma, lam, turn_gamma, turn_ends):
    """GAE over turn ends, whose return replaces the reward there; then GAE inside each turn: two calls of ours."""
    expect(turn_ends == "nonzero_reward" and len(rewards) == 1, "turn ends")
    ends = rewards != 0
    _, turn_returns = rlk.gae(rewards, values, ends, gamma=turn_gamma, lam=lam, masked="skip")
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), ends[0].nonzero()[:, 0] + 1])
    return [out[None] for out in rlk.gae(turn_returns[0], values[0], gamma=gamma, lam=lam, cu_seqlens=cu_seqlens)]


def discounted_returns(x, p):
    convention = p.pop("convention")
    expect(convention in CONVENTIONS, f"convention {convention}")
    returns = rlk.discounted_returns(x["rewards"], x["mask"], gamma=p.pop("gamma"), masked=CONVENTIONS[convention])
    return {"returns": returns, "whitened_advantages": rlk.masked_whiten(returns, x["mask"])}


ESTIMATORS = {
    "rloo": ("leave-one-out", None),
    "opo": ("length-mean", None),
    "batch_mean": ("batch-mean", None),
    "maxrl": ("mean", "mean"),
}


def group_advantage(x, p):
    estimator, scale = p.pop("estimator"), {"group": "std", "batch": "batch-std", "none": None}[p.pop("scale", "group")]
    expect(p.pop("singleton", "zero") == "zero", "a group of one")
    baseline, scale = ESTIMATORS.get(estimator, ("mean", scale))
    options = {name: p.pop(name) for name in ("eps", "unbiased") if name in p}
    options["lengths"] = x.get("lengths")
    return {"advantages": rlk.group_advantages(x["rewards"], x["group_id"], baseline=baseline, scale=scale, **options)}


def token_advantage(x, p):
    estimator, mask = p.pop("estimator"), x["mask"]
    expect(estimator in ("reinforce_pp_baseline", "remax", "gdpo"), f"estimator {estimator}")
    if estimator == "remax":
        returns = rlk.discounted_returns(x["token_rewards"], mask)
        return {
            "returns": Live(returns, mask),
            "advantages": Live(returns - rlk.broadcast_to_tokens(x["baseline"], mask), mask),
        }
    if estimator == "gdpo":
        expect(p.pop("final") == "masked_whiten", "final normalisation")
        weights, eps = p.pop("weights"), p.pop("eps")
        rows = sum(w * rlk.group_advantages(x["rewards"][:, k], x["group_id"], eps=eps) for k, w in enumerate(weights))
    else:
        rows = rlk.group_advantages(x["rewards"], x["group_id"], scale=None)
    return {"advantages": rlk.masked_whiten(rlk.broadcast_to_tokens(rows, mask), mask)}


def whiten(x, p):
    mask = x.get("mask")
    options = {name: p.pop(name) for name in ("unbiased", "eps", "eps_mode", "shift_mean", "dim") if name in p}
    y = rlk.masked_whiten(x["x"], mask, **options)
    # The sources transform dead positions too; ours are 0.
    return {"y": Live(y, torch.ones_like(y) if mask is None else mask), "y_valid": y if mask is None else y[mask != 0]}


def broadcast_advantage(x, p):
    return {"advantages": broadcast_advantages(x["row_advantage"], x["is_last_step"], x["trajectory_id"])}


def spans_to_mask(x, p):
    return {"mask": rlk.spans_to_mask(x["action_ranges"].long(), x["length"], shift=p.pop("shift"))}
