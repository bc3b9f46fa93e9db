"""Calls of verl's functions, each from a seed: for verl's own, for ours, and for the record of the former."""

import math
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
TOTALS: tuple[dict[str, Any], ...] = (
    {},
    {"dp_size": 4, "batch_num_tokens": 311, "global_batch_size": 13, "loss_scale_factor": 29},
    {"dp_size": 1, "batch_num_tokens": 77, "global_batch_size": 9, "loss_scale_factor": None},
)
LOSSES = (
    "vanilla",
    "dppo_tv",
    "dppo_kl",
    "gspo",
    "sapo",
    "gpg",
    "clip_cov",
    "kl_cov",
    "geo_mean",
    "dro",
    "cispo",
    "reinforce",
    "bypass_mode",
)
KINDS = ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3")


@dataclass
class Case:
    """A call: the function under verl's name, its arguments in float64, which of them get a gradient.

    ``settings``: of the actor's configuration, where the function takes one. ``mask``: the tokens whose results count;
    at the others verl leaves numbers that nobody reads.
    """

    name: str
    args: dict[str, Any]
    wrt: tuple[str, ...] = ()
    settings: dict[str, Any] | None = None
    mask: torch.Tensor | None = None
    skipped_metrics: tuple[str, ...] = field(default=())


def randn(draw, *shape):
    """Numbers that fp32 holds, in float64."""
    return torch.randn(*shape, generator=draw, dtype=torch.float64).float().double()


def mask_with_holes(draw, rows, tokens, empty):
    mask = torch.rand(rows, tokens, generator=draw) < 0.7
    mask[:, 0] = True
    if empty:
        mask[rows // 2] = False
    return mask


def policy_case(name: str, seed: int, rows: int = 4, tokens: int = 9) -> Case:
    """All aggregations, totals, spreads of the ratio, widths of the clip, rollout weights and kinds of masks."""
    draw = torch.Generator().manual_seed(seed)
    spread = (0.02, 0.3, 1.5, 12.0)[seed % 4]
    logp = (-4 * torch.rand(rows, tokens, generator=draw, dtype=torch.float64) - 0.01).float().double()
    old = (logp + spread * randn(draw, rows, tokens)).clamp(max=-1e-3).float().double()
    if seed % 4 == 3:  # beyond the clamps on both sides
        old[0, :3], logp[1, :3] = -30.0, -30.0
    advantages = randn(draw, rows, tokens)
    advantages[0] = advantages[0, :1]
    advantages[-1, 0] = 0.0
    mask = mask_with_holes(draw, rows, tokens, seed % 5 == 4)
    weights = None if seed % 3 else 2 * torch.rand(rows, tokens, generator=draw, dtype=torch.float64).float().double()
    own = {"loss_mode": name}
    if name == "dro":
        own["dro_beta"] = 0.3
    if name == "clip_cov":  # every candidate is drawn, so that chance has no part
        own |= {"clip_cov_ratio": 1.0, "clip_cov_lb": -0.5, "clip_cov_ub": (5.0, 1.0)[seed % 2]}
    if name == "kl_cov":
        own |= {"kl_cov_ratio": (0.2, 2e-4)[seed % 2], "ppo_kl_coef": 0.7}
    if name == "bypass_mode":
        own["rollout_correction"] = {
            "loss_type": ("ppo_clip", "reinforce")[seed % 2],
            "rollout_is": (None, "token", "sequence")[seed % 3],
            "rollout_is_threshold": (2.0, "1e-12_9.0")[seed % 4 // 2],
            "rollout_is_batch_normalize": seed % 7 == 0,
            "rollout_rs": (None, "token_k1", "seq_mean_k3")[seed // 2 % 3],
            "rollout_rs_threshold": (None, "0.2_4.0", 0.5)[seed // 2 % 3],
        }
    settings = {
        "clip_ratio": 0.15,
        "clip_ratio_low": (0.2, None)[seed // 2 % 2],
        "clip_ratio_high": (0.28, None)[seed // 3 % 2],
        "clip_ratio_c": (3.0, 1.5, 20.0)[seed % 3],
        "tau_pos": 1.0,
        "tau_neg": 1.05,
        "global_batch_info": TOTALS[seed % 3],
        "policy_loss": own,
    }
    first = "rollout_log_prob" if name == "reinforce" else "old_log_prob"
    args = {
        first: old,
        "log_prob": logp,
        "advantages": advantages,
        "response_mask": mask if seed % 2 else mask.long(),
        "loss_agg_mode": MODES[seed % 5],
        "rollout_is_weights": weights,
    }
    return Case(f"compute_policy_loss_{name}", args, ("log_prob",), settings)


def agg_case(seed: int) -> Case:
    draw = torch.Generator().manual_seed(seed)
    mask = mask_with_holes(draw, 6, 7, seed % 2)
    args = {"loss_mat": randn(draw, 6, 7), "loss_mask": mask, "loss_agg_mode": MODES[seed % 5]}
    return Case("agg_loss", {**args, **TOTALS[seed // 5 % 3]}, ("loss_mat",))


def value_case(seed: int) -> Case:
    draw = torch.Generator().manual_seed(seed)
    args = {name: randn(draw, 6, 7) for name in ("vpreds", "returns", "values")}
    args |= {"response_mask": mask_with_holes(draw, 6, 7, seed % 2), "cliprange_value": (0.3, 0.5, 9.0)[seed % 3]}
    return Case("compute_value_loss", {**args, "loss_agg_mode": MODES[seed % 5], **TOTALS[seed // 5 % 3]}, ("vpreds",))


def kl_case(kind: str, seed: int) -> Case:
    draw = torch.Generator().manual_seed(seed)
    logp = -randn(draw, 3, 5).abs()
    ref = logp + (0.3, 9.0)[seed % 2] * randn(draw, 3, 5)
    return Case("kl_penalty", {"logprob": logp, "ref_logprob": ref, "kl_penalty": kind}, ("logprob",))


def prompts(draw, rows, groups, alone):
    index = [f"prompt-{i % groups}" for i in torch.randperm(rows, generator=draw).tolist()]
    return ["alone", *index[1:]] if alone else index


def group_case(name: str, seed: int) -> Case:
    draw = torch.Generator().manual_seed(seed)
    rows, tokens, alone = 10, 6, seed % 2 == 1 and name != "grpo_passk"
    mask = mask_with_holes(draw, rows, tokens, False)
    rewards = randn(draw, rows, tokens) * mask
    if seed % 3 == 2:
        rewards[2:5] = 0.0
    index = prompts(draw, rows, 2, alone)
    args: dict[str, Any] = {"token_level_rewards": rewards, "response_mask": mask.double(), "index": index}
    if name in ("grpo", "grpo_vectorized", "gdpo"):
        args["norm_adv_by_std_in_grpo"] = seed % 4 < 2
    if name == "gpg":
        args["f_norm"] = 2.0
    if name == "grpo_passk":
        args["config"] = {"norm_adv_by_std_in_grpo": seed % 2 == 0}
    if name == "gdpo" and seed % 2:
        args["config"] = {"gdpo_reward_keys": ["a", "b"], "gdpo_reward_weights": (None, [1.0, 0.25])[seed // 2 % 2]}
        args["non_tensor_batch"] = {key: randn(draw, rows).tolist() for key in ("a", "b")}
        attention = torch.ones(rows, tokens + 2, dtype=torch.long)
        args["batch"] = {"prompts": torch.zeros(rows, 2), "attention_mask": attention}
    return Case(f"compute_{name}_outcome_advantage", args, mask=mask)


def token_case(name: str, seed: int) -> Case:
    """GAE, REINFORCE++ and ReMax on masks with holes."""
    draw = torch.Generator().manual_seed(seed)
    mask = mask_with_holes(draw, 4, 13, seed % 4 == 3)
    gamma = (1.0, 0.99, 0.7)[seed % 3]
    args: dict[str, Any] = {"token_level_rewards": randn(draw, 4, 13), "response_mask": mask.double()}
    if name == "gae":
        args |= {"values": randn(draw, 4, 13), "gamma": gamma, "lam": (1.0, 0.95, 0.3, 0.0)[seed % 4]}
        return Case("compute_gae_advantage_return", args, mask=mask)
    if name == "remax":
        args["reward_baselines"] = randn(draw, 4)
    else:
        args["config"] = {"gamma": gamma}
    return Case(f"compute_{name}_outcome_advantage", args, mask=mask)


def baseline_case(name: str, seed: int) -> Case:
    """The optimal token baseline: without holes where it compares columns, with them where it compares live tokens."""
    draw = torch.Generator().manual_seed(seed)
    rows, tokens = 7, 8
    lengths = torch.randint(1, tokens + 1, (rows,), generator=draw)
    mask = torch.arange(tokens) < lengths[:, None]
    if name.startswith("multi_turn"):
        mask = mask & (torch.rand(rows, tokens, generator=draw) < 0.7)
    rewards = randn(draw, rows, tokens) * mask
    logp = -randn(draw, rows, tokens).abs() - 0.1
    squares = logp.exp() ** 2 + 0.1 * torch.rand(rows, tokens, generator=draw, dtype=torch.float64)
    weights = None if seed % 2 else 2 * torch.rand(rows, tokens, generator=draw, dtype=torch.float64)
    args = {"token_level_rewards": rewards, "response_mask": mask.double(), "index": prompts(draw, rows, 3, seed % 3)}
    args |= {"old_log_probs": logp, "sum_pi_squared": squares, "rollout_is_weights": weights}
    return Case(f"compute_{name}_advantage", args, mask=mask)


def rollout_case(seed: int) -> Case:
    draw = torch.Generator().manual_seed(seed)
    mask = mask_with_holes(draw, 5, 7, seed % 4 == 3)
    gap = (0.3, 2.0, 15.0)[seed % 3] * randn(draw, 5, 7)
    gap[:2] = gap[:2] / 500  # some weights stay inside of every bound: verl divides by zero where all are 0
    args: dict[str, Any] = {"log_ratio": gap, "response_mask": mask.long()}
    args |= {"rollout_is": ("token", "sequence")[seed % 2], "rollout_is_batch_normalize": seed // 2 % 2 == 1}
    args["rollout_is_threshold"] = (2.0, "0.5_3.0", "1.5", 4)[seed // 4 % 4]
    return Case("compute_rollout_correction_weights", args)


def logits_case(name: str, seed: int) -> Case:
    draw = torch.Generator().manual_seed(seed)
    args: dict[str, Any] = {"logits": 4 * randn(draw, 4, 23)}
    if name == "logprobs_from_logits":
        args["labels"] = torch.randint(23, (4,), generator=draw)
    return Case(name, args, () if name.startswith("calculate") else ("logits",))


GROUPS = (
    "grpo",
    "grpo_vectorized",
    "grpo_passk",
    "gdpo",
    "gpg",
    "opo",
    "rloo",
    "rloo_vectorized",
    "reinforce_plus_plus_baseline",
)
LOGITS = (
    "logprobs_from_logits",
    "entropy_from_logits",
    "entropy_from_logits_with_chunking",
    "calculate_sum_pi_squared_from_logits",
)


def cases(seeds: int) -> dict[str, Case]:
    """Returns every kind of call with seeds from 0 on, by its name."""
    found: dict[str, Case] = {}
    for seed in range(seeds):
        for name in LOSSES:
            found[f"{name}-{seed}"] = policy_case(name, seed)
        found[f"agg_loss-{seed}"], found[f"value_loss-{seed}"] = agg_case(seed), value_case(seed)
        for kind in KINDS:
            found[f"kl-{kind}-{seed}"], found[f"kl-{kind}+-{seed}"] = kl_case(kind, seed), kl_case(kind + "+", seed)
        for name in GROUPS:
            found[f"group-{name}-{seed}"] = group_case(name, seed)
        for name in ("gae", "reinforce_plus_plus", "remax"):
            found[f"token-{name}-{seed}"] = token_case(name, seed)
        for name in ("optimal_token_baseline", "multi_turn_optimal_token_baseline"):
            found[f"{name}-{seed}"] = baseline_case(name, seed)
        found[f"rollout-{seed}"] = rollout_case(seed)
        for name in LOGITS:
            found[f"{name}-{seed}"] = logits_case(name, seed)
    return found


class Config(SimpleNamespace):
    """A configuration with attributes and ``get``, as verl's are."""

    def get(self, name, default=None):
        return getattr(self, name, default)


def config_of(case: Case):
    """Returns the configuration of an actor without verl."""
    own = {"clip_cov_ratio": None, "dro_beta": None, **case.settings["policy_loss"]}
    return Config(**{**case.settings, "policy_loss": Config(**own)})


def call(function, case: Case, dtype=torch.float64, config=None):
    """Runs a function and returns its results: tensors in a list, metrics, and the gradients of their sum."""

    def prepared(name, x):
        if not isinstance(x, torch.Tensor):
            return Config(**x) if name == "config" else x
        x = x.to(dtype) if x.is_floating_point() else x.clone()
        return x.clone().requires_grad_(name in case.wrt)

    args = {name: prepared(name, x) for name, x in case.args.items()}
    if case.settings is not None:
        args["config"] = config_of(case) if config is None else config
    found = function(**args)
    found = found if isinstance(found, tuple) else (found,)
    metrics = {key: float(x) for x in found if isinstance(x, dict) for key, x in x.items()}
    tensors = [x for x in found if isinstance(x, torch.Tensor)]
    if case.wrt:
        differentiable = [x for x in tensors if x.requires_grad]
        sum(x.double().sum() for x in differentiable).backward()
    if case.mask is not None:
        tensors = [torch.where(case.mask, x.detach(), 0.0) for x in tensors]
    return {
        "results": [x.detach().double() for x in tensors],
        "metrics": metrics,
        "gradients": [args[name].grad.double() for name in case.wrt],
    }


def differences(got, want, tolerance):
    """Returns what differs by more than ``tolerance``, relative to the largest number of a tensor."""
    found = []
    for part in ("results", "gradients"):
        assert len(got[part]) == len(want[part])
        for i, (a, b) in enumerate(zip(got[part], want[part], strict=True)):
            b = torch.as_tensor(b, dtype=torch.float64)
            assert a.shape == b.shape, (part, i, a.shape, b.shape)
            gap = (a - b).abs().max().item() / max(b.abs().max().item(), 1e-3) if b.numel() else 0.0
            if not gap <= tolerance:
                found.append(f"{part}[{i}]: {gap:.1e}")
    if got["metrics"].keys() != want["metrics"].keys():
        found.append(f"metrics {sorted(got['metrics'].keys() ^ want['metrics'].keys())}")
    for key, x in want["metrics"].items():
        y = got["metrics"].get(key, math.nan)
        if not abs(y - x) <= max(tolerance, 1e-6) * max(1.0, abs(x)):
            found.append(f"{key}: {y} for {x}")
    return found
