"""One process of two, of which the second dies: ``python vocab_parallel_deaths.py RANK RENDEZVOUS WHEN``.

The first one prints what it hears, and when.
"""

import datetime
import os
import sys
import time

import torch
import torch.distributed as dist

import rlkernels as rlk


def main(rank, rendezvous, when):
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=10)
    )
    hidden, weight, targets = (
        torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).requires_grad_(),
        torch.ones(5, 4),
        torch.arange(6),
    )

    def score():
        return rlk.linear_token_logprobs(hidden, weight, targets, process_group=dist.group.WORLD).sum()

    found = None if when == "before the call" else score()
    if rank:
        os._exit(3)
    start = time.monotonic()
    try:
        score() if when != "before the backward" else found.backward()
    except RuntimeError as error:
        print(f"{time.monotonic() - start:.1f} s: {error}".splitlines()[0])
        sys.stdout.flush()
        os._exit(0)  # what is left of the group need not be taken down in order


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
