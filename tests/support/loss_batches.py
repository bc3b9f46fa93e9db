"""Batches of tokens for the losses, every objective with its parameters, and the true losses from the oracles."""

import oracles
import torch

PARAMS = {
    "ppo_clip": {"clip_low": 0.2, "clip_high": 0.28},
    "dual_clip": {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 2.0},
    "cispo": {"clip_low": 1.0, "clip_high": 0.5},
    "sapo": {"tau_pos": 1.0, "tau_neg": 1.05},
    "reinforce": {},
    "surrogate": {},
    "ppo_clip_cap": {"ratio_cap": 1.1, "clip_low": 0.2, "clip_high": 0.28},
    "cispo_max_only": {"clip_high": 0.5},
    "cispo_absolute": {"ratio_max": 0.9},
    "dro": {"beta": 0.5},
    "dppo_tv": {"delta_low": 0.03, "delta_high": 0.02, "ratio_max": 1.5},
    "dppo_tv_surrogate": {"delta_low": 0.03, "delta_high": 0.02},
    "dppo_kl": {"delta_low": 0.03, "delta_high": 0.02, "ratio_max": 1.5},
    "dppo_kl_surrogate": {"delta_low": 0.03, "delta_high": 0.02},
}
OF_ROLLOUT = {"rollout_is": {"clip_low": 0.5, "clip_high": 0.5}, "tv_symmetric": {"delta": 0.05}}
LEVELS = ("token", "sequence", "sequence_token", "sequence_sum")
AGGREGATED = [
    (level, a) for level in LEVELS for a in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "token-sum")
]
B, L = 3, 6


def objective_columns(n, dtype, draw):
    """Every column that an objective may name: log-probs near each other, so that both sides of every clip are met."""
    columns = {"logp": -3 * torch.rand(n, generator=draw, dtype=dtype)}
    for other in ("old_logp", "ref_logp"):
        columns[other] = columns["logp"] + 0.5 * torch.randn(n, generator=draw, dtype=dtype)
    for other in ("advantage", "value", "returns", "margin", "log_ratio"):
        columns[other] = torch.randn(n, generator=draw, dtype=dtype)
    # Away from 0, where the log-odds of the oracle itself lose their digits.
    columns["mean_logp"] = columns["logp"] - 0.01
    columns["old_value"] = columns["value"] + 0.5 * torch.randn(n, generator=draw, dtype=dtype)
    columns["rollout_logp"] = columns["old_logp"] + 0.1 * torch.randn(n, generator=draw, dtype=dtype)
    return columns


def batch(seed=0, shape=(B, L)):
    """Log-probabilities as float32, a mask with holes; ratios from 0.3 to 3, so that every branch of every clip is
    taken.
    """
    draw = torch.Generator().manual_seed(seed)
    logp = -3 * torch.rand(shape, generator=draw) - 0.1
    d = {
        "logp": logp,
        "old": logp + 0.5 * torch.randn(shape, generator=draw),
        "ref": logp + 0.5 * torch.randn(shape, generator=draw),
        "advantages": torch.randn(shape, generator=draw),
        "entropy": 2 * torch.rand(shape, generator=draw),
        "mask": torch.rand(shape, generator=draw) < 0.7,
    }
    d["mask"][..., 1] = True
    return d


def truth_of(name, logp, old, advantages):
    arguments = (logp, advantages) if name == "reinforce" else (logp, old, advantages)
    return getattr(oracles, name)(*arguments, **PARAMS[name])


def true_loss(name, d, logp, entropy, kl, kl_coef, entropy_coef):
    """Token mean in float64, in autograd, from the oracles."""
    mask = d["mask"]
    loss = truth_of(name, logp[mask], d["old"].double()[mask], d["advantages"].double()[mask])
    loss = loss + kl_coef * getattr(oracles, kl)(logp[mask], d["ref"].double()[mask])
    return (loss - entropy_coef * entropy[mask]).mean()
