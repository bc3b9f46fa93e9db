"""What a dead token may hold, and every loss that takes a mask: shared by the backends' tests."""

import torch
from loss_batches import LEVELS
from reference import same_bits

import rlkernels as rlk

B, L, V, H = 4, 5, 11, 6
IDS = {"below": -200, "beyond": V + 100, "the lowest int32": -(2**31), "beyond int32": 2**40}
TEMPERATURES = (0.0, -1.0, float("nan"), float("inf"))


def problem(seed=0):
    draw = torch.Generator().manual_seed(seed)
    d = {
        "logits": torch.randn(B, L, V, generator=draw),
        "hidden": torch.randn(B, L, H, generator=draw),
        "head": torch.randn(V, H, generator=draw),
        "targets": torch.randint(0, V, (B, L), generator=draw),
        "temperature": 0.5 + torch.rand(B, L, generator=draw),
    }
    d["mask"] = torch.rand(B, L, generator=draw) < 0.6
    d["mask"][:, 0], d["mask"][1] = True, False  # one sequence is dead altogether
    for name in ("old", "ref"):
        d[name] = -2 - torch.rand(B, L, generator=draw)
    d["advantages"], d["weights"] = torch.randn(B, L, generator=draw), torch.rand(B, L, generator=draw)
    return d


def policy_options(level):
    return {"ratio_level": level, "kl_coef": 0.1, "entropy_coef": 0.2}


LOSSES = {
    "sft_loss": (["logits"], lambda d, m: rlk.sft_loss(d["logits"], d["targets"], temperature=d["temperature"], **m)),
    "linear_sft_loss": (
        ["hidden", "head"],
        lambda d, m: rlk.linear_sft_loss(d["hidden"], d["head"], d["targets"], temperature=d["temperature"], **m),
    ),
    **{
        f"logits_policy_loss {level}": (
            ["logits"],
            lambda d, m, level=level: rlk.logits_policy_loss(
                d["logits"],
                d["targets"],
                d["old"],
                d["advantages"],
                temperature=d["temperature"],
                ref_logprobs=d["ref"],
                **policy_options(level),
                **m,
            ),
        )
        for level in LEVELS
    },
    **{
        f"linear_policy_loss {level}": (
            ["hidden", "head"],
            lambda d, m, level=level: rlk.linear_policy_loss(
                d["hidden"],
                d["head"],
                d["targets"],
                d["old"],
                d["advantages"],
                temperature=d["temperature"],
                ref_logprobs=d["ref"],
                **policy_options(level),
                **m,
            ),
        )
        for level in LEVELS
    },
    "linear_dpo_loss": (
        ["hidden", "head"],
        lambda d, m: rlk.linear_dpo_loss(
            d["hidden"],
            d["head"],
            d["targets"],
            temperature=d["temperature"],
            ref_chosen_logps=d["ref"][:2, 0],
            ref_rejected_logps=d["ref"][2:, 0],
            **m,
        ),
    ),
    "linear_unpaired_preference_loss": (
        ["hidden", "head"],
        lambda d, m: rlk.linear_unpaired_preference_loss(
            d["hidden"],
            d["head"],
            d["targets"],
            d["ref"][:, 0],
            torch.tensor([1, 0, 1, 0]),
            temperature=d["temperature"],
            kl=0.1,
            **m,
        ),
    ),
}


def run(name, d, **mask):
    leaves, loss = LOSSES[name]
    inputs = {k: d[k].clone().requires_grad_() for k in leaves}
    found = loss({**d, **inputs}, mask)
    return [found.detach(), *torch.autograd.grad(found, list(inputs.values()))]


def check(name, ids=IDS, temperatures=TEMPERATURES, weights=False):
    """The bits of loss and gradient are those of any valid id and temperature; dead by the mask, or by
    a weight of 0.
    """
    d = problem()
    dead = ~d["mask"]
    given = {"weights": d["weights"].masked_fill(dead, 0.0)} if weights else {"mask": d["mask"]}
    clean = run(name, d, **given)
    assert all(x.isfinite().all() for x in clean) and any(x.any() for x in clean[1:])
    for what, id_ in ids.items():
        for dtype in (torch.int64, torch.int32) if -(2**31) <= id_ < 2**31 else (torch.int64,):
            got = run(name, {**d, "targets": d["targets"].to(dtype).masked_fill(dead, id_)}, **given)
            assert all(map(same_bits, got, clean)), f"{name}: a dead token's target {what} ({dtype}) moves the loss"
    for temperature in temperatures:
        got = run(name, {**d, "temperature": d["temperature"].masked_fill(dead, temperature)}, **given)
        assert all(map(same_bits, got, clean)), f"{name}: a dead token's temperature {temperature} moves the loss"
