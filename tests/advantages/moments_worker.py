"""One rank of a process group: its share of a batch is normalised as the whole batch is.

``python moments_worker.py RANK RANKS RENDEZVOUS REPORT`` writes the list of complaints as JSON.
"""

import datetime
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import rlkernels as rlk


def complaints(rank, ranks):
    g = torch.Generator().manual_seed(0)
    x, mask = 3.0 + torch.randn(6, 5, generator=g), torch.rand(6, 5, generator=g) < 0.7
    groups = torch.tensor([0, 0, 1, 1, 1, 1])
    cut = torch.tensor([2, 4]) if ranks == 2 else None  # rank 0 has fewer rows
    begin = int(cut[:rank].sum())
    mine = slice(begin, begin + int(cut[rank]))
    found = []

    def compare(what, got, want):
        if not torch.allclose(got.double(), want.double(), rtol=2e-6, atol=2e-6):
            found.append(f"{what}: {got} against {want}")

    for options in ({}, {"unbiased": False, "eps_mode": "clamp"}, {"shift_mean": False}):
        got = rlk.masked_whiten(x[mine], mask[mine], process_group=dist.group.WORLD, **options)
        compare(f"masked_whiten {options}", got, rlk.masked_whiten(x, mask, **options)[mine])
    moments = rlk.masked_moments(x[mine], mask[mine], process_group=dist.group.WORLD)
    for name, got, want in zip(moments._fields, moments, rlk.masked_moments(x, mask), strict=True):
        compare(f"moments.{name}", got, want)
    rewards = torch.where(mask[:, 0], x[:, 0], float("nan"))
    for baseline in ("mean", "batch-mean"):
        options = {"baseline": baseline, "scale": "batch-std"}
        got = rlk.group_advantages(rewards[mine], groups[mine], process_group=dist.group.WORLD, **options)
        compare(f"group_advantages {options}", got, rlk.group_advantages(rewards, groups, **options)[mine])
    drift, answers, good = x.flatten(), -torch.arange(4.0), torch.arange(4) < 2
    own = drift.view(6, 5)[mine].flatten()
    kl = {"kl_logps": own, "ref_kl_logps": torch.zeros_like(own), "kl_group": dist.group.WORLD}
    got = rlk.unpaired_preference_loss(answers, answers * 1.1, good, **kl)
    compare("kl of KTO", got, rlk.unpaired_preference_loss(answers, answers * 1.1, good, kl=drift.mean()))
    # A rank without a live element takes part.
    dead = mask & (torch.arange(6) >= begin if rank else torch.zeros(6, dtype=torch.bool))[:, None]
    got = rlk.masked_moments(x[mine], dead[mine], process_group=dist.group.WORLD)
    late = torch.arange(6)[:, None] >= int(cut[0])
    compare("moments of one rank", got.mean, rlk.masked_moments(x, mask & late).mean)
    return found


def main(rank, ranks, rendezvous, report):
    dist.init_process_group(
        "gloo",
        init_method=Path(rendezvous).as_uri(),
        rank=int(rank),
        world_size=int(ranks),
        timeout=datetime.timedelta(seconds=60),
    )
    Path(report).write_text(json.dumps(complaints(int(rank), int(ranks))))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
