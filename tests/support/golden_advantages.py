"""Adapters of the golden operations over advantages, rewards and coefficients; see ``golden_ops``."""

import torch
from golden_adapter import Live, expect

import rlkernels as rlk

PLACEMENTS = {
    "last_action": "last-action",
    "deepspeed_end": "deepspeed-end",
    "trl_ppo_1.12": "trl-end",
    "token_level": "token-level",
}
KINDS = {"fixed": "fixed", "adaptive": "adaptive", "ppo_paper": "ppo-paper"}


def process_advantage(x, p):
    """Lists of steps as rows of rewards at their ends."""
    ends = torch.zeros(len(x["step_end"]), x["num_tokens"], dtype=torch.bool)
    rewards = torch.zeros(ends.shape, dtype=torch.float64)
    for row, (at, values) in enumerate(zip(x["step_end"], x["step_reward"], strict=True)):
        ends[row, at], rewards[row, at] = True, torch.tensor(values, dtype=torch.float64)
    group = torch.zeros(len(ends), dtype=torch.int64)
    return {"advantages": rlk.step_advantages(rewards, ends, group, unbiased=p.pop("unbiased"), eps=p.pop("eps"))}


def gigpo_advantage(x, p):
    expect(p.pop("episode_stats") == "all_rows", "episode statistics")
    anchors = torch.tensor([sorted(set(x["anchor"])).index(name) for name in x["anchor"]])
    scale = {"mean_norm": None, "mean_std_norm": "std"}[p.pop("mode")]
    rows = rlk.gigpo_advantages(
        x["episode_reward"],
        x["step_reward"],
        x["group_id"],
        anchors,
        step_weight=p.pop("step_weight"),
        scale=scale,
        eps=p.pop("eps"),
    )
    return {"advantages": rlk.broadcast_to_tokens(rows, x["mask"])}


def optimal_token_baseline(x, p):
    expect(p.pop("zero_tail"), "a tail with a baseline")
    found = rlk.optimal_token_advantages(
        x["token_rewards"], x["old_logp"], x["sum_sq_probs"].log(), x["group_id"], x["mask"], eps=p.pop("eps")
    )
    return dict(zip(("advantages", "returns"), found, strict=True))


def assemble_rewards(x, p):
    placement, scores = PLACEMENTS[p.pop("placement")], x.get("score", x.get("token_scores"))
    if "attention_mask" in x:  # of tokens; that of the actions starts at the last token of the prompt
        mask = x["attention_mask"][:, 1:].clone()
        mask[:, : x["prompt_length"] - 1] = 0
    else:
        mask = x.get("mask", torch.ones_like(x["logp"]))
    rewards = rlk.assemble_rewards(
        scores,
        mask,
        logprobs=x["logp"],
        ref_logprobs=x["ref_logp"],
        kl=p.pop("kl_estimator"),
        kl_coef=p.pop("kl_coef"),
        score_clip=p.pop("score_clip", None),
        placement=placement,
    )
    return {"rewards": rewards, "rewards_after_end_zeroed": rewards}


def process_sequences(x, p):
    found = rlk.process_sequences(
        x["sequences"].long(), p.pop("prompt_length"), eos_id=p.pop("eos_id"), pad_id=p.pop("pad_id")
    )
    return found._asdict()


def length_penalty(x, p):
    return {
        "penalty": rlk.length_penalty(
            x["lengths"], max_length=p.pop("max_tokens"), buffer=p.pop("buffer"), factor=p.pop("factor")
        )
    }


def kl_controller(x, p):
    options = {name: p.pop(name) for name in ("target", "horizon") if name in p}
    controller, n = rlk.KLController(p.pop("init"), kind=KINDS[p.pop("kind")], **options), p.pop("n_steps", 1)
    found = []
    for kl in x["kl"]:
        controller.update(kl, n)
        found.append(controller.coef)
    return {"coef": torch.stack(found)}


def entropy_controller(x, p):
    controller = rlk.EntropyController(
        p.pop("init"), target=p.pop("target"), delta=p.pop("delta"), low=p.pop("min"), high=p.pop("max")
    )
    found = {"coef": [], "applied": []}
    for entropy in x["entropy"]:
        found["applied"].append(controller.applied)
        controller.update(entropy)
        found["coef"].append(controller.coef)
    return {name: torch.stack(values) for name, values in found.items()}


def broadcast_advantage(x, p):
    return {"advantages": rlk.broadcast_advantages(x["row_advantage"], x["is_last_step"], x["trajectory_id"])}


def remax(x, p):
    returns = rlk.discounted_returns(x["token_rewards"], x["mask"])
    advantages = returns - rlk.broadcast_to_tokens(x["baseline"], x["mask"])
    return {"returns": Live(returns, x["mask"]), "advantages": Live(advantages, x["mask"])}


def gdpo(x, p):
    expect(p.pop("final") == "masked_whiten", "final normalisation")
    rows = rlk.group_advantages(x["rewards"], x["group_id"], reward_weights=p.pop("weights"), eps=p.pop("eps"))
    return {"advantages": rlk.masked_whiten(rlk.broadcast_to_tokens(rows, x["mask"]), x["mask"])}


def reinforce_pp_baseline(x, p):
    rows = rlk.group_advantages(x["rewards"], x["group_id"], scale=None)
    return {"advantages": rlk.masked_whiten(rlk.broadcast_to_tokens(rows, x["mask"]), x["mask"])}


TOKEN_ESTIMATORS = {
    "remax": remax,
    "gdpo": gdpo,
    "reinforce_pp_baseline": reinforce_pp_baseline,
    "otb": optimal_token_baseline,
}


def token_advantage(x, p):
    return TOKEN_ESTIMATORS[p.pop("estimator")](x, p)


ADAPTERS = (
    assemble_rewards,
    broadcast_advantage,
    entropy_controller,
    gigpo_advantage,
    kl_controller,
    length_penalty,
    process_advantage,
    process_sequences,
    token_advantage,
)
