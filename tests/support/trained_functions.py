"""Functions of one trained input on a small problem, and problems of the fused head."""

import torch
from reference import draw_rows

import rlkernels as rlk

T, V, H = 6, 37, 16


def problem(seed=0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(seed)
    x, targets, _ = draw_rows((T,), V, dtype, seed)
    d = {name: torch.randn(T, generator=draw) for name in ("a", "b", "c", "e")}
    d |= {
        "hidden": torch.randn(T, H, generator=draw),
        "weight": torch.randn(V, H, generator=draw),
        "bias": torch.randn(V, generator=draw),
    }
    return {**d, "x": x, "targets": targets, "ref": x.flip(-1).contiguous()}


# Name to (the input that is trained, the function from it and the problem to its output).
FUNCTIONS = {
    "token_logprobs": ("x", lambda x, d: rlk.token_logprobs(x, d["targets"], temperature=0.7)),
    "entropy": ("x", lambda x, d: rlk.token_stats(x, d["targets"]).entropy),
    "exact kl": ("x", lambda x, d: rlk.token_stats(x, d["targets"], ref_logits=d["ref"], kl="exact").kl),
    "k3": ("x", lambda x, d: rlk.token_stats(x, d["targets"], ref_logits=d["x"] + 0.1 * d["ref"], kl="k3").kl),
    "logits_policy_loss": (
        "x",
        lambda x, d: rlk.logits_policy_loss(
            x, d["targets"], rlk.token_logprobs(d["x"], d["targets"]) + 0.1 * d["b"], d["c"], entropy_coef=0.1
        ),
    ),
    "policy_loss": (
        "a",
        lambda a, d: rlk.policy_loss(a, d["a"] + 0.1 * d["b"], d["c"], ref_logprobs=d["e"], kl="k2", kl_coef=0.1),
    ),
    "value_loss": ("a", lambda a, d: rlk.value_loss(a, d["b"], d["c"], clip_range=0.2)),
    "pairwise_reward_loss": ("a", lambda a, d: rlk.pairwise_reward_loss(a, d["b"], center_coef=0.1)),
    "dpo_loss": ("a", lambda a, d: rlk.dpo_loss(a, d["b"], d["c"], d["e"])),
    "linear_token_logprobs": (
        "weight",
        lambda w, d: rlk.linear_token_logprobs(d["hidden"], w, d["targets"], bias=d["bias"], chunk_tokens=4),
    ),
    "linear entropy": (
        "hidden",
        lambda h, d: rlk.linear_token_stats(h, d["weight"], d["targets"], softcap=5.0).entropy,
    ),
    "linear_policy_loss": (
        "hidden",
        lambda h, d: rlk.linear_policy_loss(
            h,
            d["weight"],
            d["targets"],
            rlk.linear_token_logprobs(d["hidden"], d["weight"], d["targets"]) + 0.1 * d["b"],
            d["c"],
            entropy_coef=0.1,
            chunk_tokens=4,
        ),
    ),
    "linear_policy_loss of sequences": (
        "weight",
        lambda w, d: rlk.linear_policy_loss(
            d["hidden"],
            w,
            d["targets"],
            rlk.linear_token_logprobs(d["hidden"], d["weight"], d["targets"]) + 0.1 * d["b"],
            d["c"],
            ratio_level="sequence",
            cu_seqlens=torch.tensor([0, 4, 6]),
            chunk_tokens=4,
        ),
    ),
    "linear_sft_loss": (
        "bias",
        lambda b, d: rlk.linear_sft_loss(d["hidden"], d["weight"], d["targets"], bias=b, softcap=5.0),
    ),
    "linear_dpo_loss": (
        "weight",
        lambda w, d: rlk.linear_dpo_loss(
            d["hidden"],
            w,
            d["targets"],
            cu_seqlens=torch.tensor([0, 2, 4, 5, 6]),
            beta=0.05,
            reference_free=True,
            chunk_tokens=1,
        ),
    ),
    "linear_unpaired_preference_loss": (
        "hidden",
        lambda h, d: rlk.linear_unpaired_preference_loss(
            h,
            d["weight"],
            d["targets"],
            4 * d["e"][:3],
            d["a"][:3] > 0,
            cu_seqlens=torch.tensor([0, 2, 4, 6]),
            kl=0.1,
            beta=0.05,
        ),
    ),
    "reward_scores": ("hidden", lambda h, d: rlk.reward_scores(h[None], d["weight"][:1])),
    "aggregate": ("a", lambda a, d: rlk.aggregate(a[None], d["b"][None] > 0)),
}


def output_of(name, d):
    trained, function = FUNCTIONS[name]
    leaf = d[trained].clone().requires_grad_()
    return function(leaf, d), leaf


def head_problem(rows, hidden, vocab, dtype, seed=0):
    draw = torch.Generator().manual_seed(seed)
    h, w = (
        torch.randn(rows, hidden, generator=draw).to(dtype),
        (torch.randn(vocab, hidden, generator=draw) * 3 / hidden**0.5).to(dtype),
    )
    return h, w, torch.randint(vocab, (rows,), generator=draw), torch.randn(rows, generator=draw)
