"""Calls of the functions of advantages beyond one scan and one group; see ``public_calls``."""

import torch


def data(shape, draw):
    """What these calls need beside the data of the others; ``shape``: that of a padded batch."""
    rows, length = shape
    return {
        "squares": -torch.rand(shape, generator=draw),
        "ends": torch.rand(shape, generator=draw) < 0.4,
        "states": torch.tensor([3, 3, 5, 3, 3, 3]),
        "scores": torch.randn(rows, generator=draw),
        "several": torch.randn(6, 2, generator=draw),
        "shares": torch.tensor([1.0, 0.5]),
        "lambdas": torch.rand(rows, generator=draw),
        "at_end": torch.randn(length, generator=draw),
    }


def calls(rlk):
    """Returns the calls by their names; ``rlk``: the library, as ``public_calls`` sees it."""
    return {
        "gae of turns": lambda d: rlk.gae(
            d["rewards"].view(-1),
            d["values"].view(-1),
            d["mask"].view(-1),
            lam=d["lambdas"],
            turn_ends=d["ends"].view(-1),
            turn_gamma=0.9,
            turn_lam=d["scores"].sigmoid(),
            cu_seqlens=d["cu"],
            bootstrap_values=d["scores"],
        ),
        "discounted_returns with resets": lambda d: rlk.discounted_returns(
            d["rewards"], d["mask"], gamma=0.9, masked="reset"
        ),
        "vtrace": lambda d: rlk.vtrace(
            d["rewards"],
            d["values"],
            d["logprobs"],
            d["old"],
            d["mask"],
            gamma=0.9,
            lam=0.9,
            advantage_rho_max=2.0,
            terminated=d["ends"],
            bootstrap_values=d["scores"],
        ),
        "vtrace of a packed batch": lambda d: rlk.vtrace(
            *(d[name].view(-1) for name in ("rewards", "values", "logprobs", "old")), cu_seqlens=d["cu"]
        ),
        "rollout_gae": lambda d: rlk.rollout_gae(
            d["rewards"],
            d["values"],
            time_dim=1,
            dones=d["ends"] | d["mask"],
            terminated=d["ends"],
            truncated=d["mask"],
            next_values=d["old_values"],
        ),
        "rollout_gae of starts": lambda d: rlk.rollout_gae(
            d["rewards"],
            d["values"],
            d["at_end"],
            time_dim=0,
            dones=d["ends"],
            dones_at="start",
            last_dones=d["ends"][0],
        ),
        "group_advantages of several rewards": lambda d: rlk.group_advantages(
            d["several"], d["groups"], reward_weights=d["shares"], singleton="scaled"
        ),
        "broadcast_advantages": lambda d: rlk.broadcast_advantages(d["pair_a"], d["states"] == 5, d["groups"]),
        "step_advantages": lambda d: rlk.step_advantages(d["rewards"], d["ends"], d["rows"], d["mask"]),
        "step_advantages of a packed batch": lambda d: rlk.step_advantages(
            d["rewards"].view(-1), d["ends"].view(-1), d["rows"], scale=None, cu_seqlens=d["cu"]
        ),
        "gigpo_advantages": lambda d: rlk.gigpo_advantages(
            d["pair_a"],
            d["pair_b"],
            d["groups"],
            d["states"],
            step_weight=d["number"],
            scale="std",
            trajectory_ids=d["lengths"],
        ),
        "optimal_token_advantages": lambda d: rlk.optimal_token_advantages(
            d["rewards"], d["squares"], d["squares"], d["rows"], d["mask"], weights=d["token_weights"]
        ),
        "optimal_token_advantages of a packed batch": lambda d: rlk.optimal_token_advantages(
            *(d[name].view(-1) for name in ("rewards", "squares", "squares")),
            d["rows"],
            d["mask"].view(-1),
            alignment="live",
            cu_seqlens=d["cu"],
        ),
        "assemble_rewards": lambda d: rlk.assemble_rewards(
            d["scores"],
            d["mask"],
            logprobs=d["logprobs"],
            ref_logprobs=d["ref"],
            kl="k3",
            kl_coef=d["number"],
            score_clip=(-0.5, 0.5),
            placement="deepspeed-end",
        ),
        "assemble_rewards of a packed batch": lambda d: rlk.assemble_rewards(
            d["scores"], d["mask"].view(-1), cu_seqlens=d["cu"]
        ),
        "extended_mask": lambda d: rlk.extended_mask(d["ends"]),
        "extended_mask of a packed batch": lambda d: rlk.extended_mask(d["ends"].view(-1), d["cu"]),
        "process_sequences": lambda d: rlk.process_sequences(d["ids"], 2, eos_id=9, pad_id=0),
        "length_penalty": lambda d: rlk.length_penalty(d["lengths"], max_length=5, buffer=3),
        "truncation_penalty": lambda d: rlk.truncation_penalty(d["pair_a"], d["groups"] == 4, 0.5),
        "dynamic_sampling_mask": lambda d: rlk.dynamic_sampling_mask(d["pair_a"], d["groups"], low=-0.5, high=0.5),
    }
