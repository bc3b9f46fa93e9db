"""One rank of two: ``GPTLMLoss`` over a ring, beside OpenRLHF's own, and ``KTOLoss``, beside its formula.

``python openrlhf_worker.py RANK RANKS RENDEZVOUS REPORT`` writes the list of complaints as JSON.
"""

import datetime
import json
import sys
from pathlib import Path

import openrlhf_host
import torch
import torch.distributed as dist

from rlkernels.integrations import openrlhf
from rlkernels.integrations.openrlhf import legacy


def complaints(rank, ranks):
    found = []

    def compare(what, got, expected):
        if not (got.double() - expected.double()).abs().max() <= 1e-6:
            found.append(f"rank {rank}: {what} is {got.tolist()}, expected {expected.tolist()}")

    torch.manual_seed(0)
    stock, ring = openrlhf_host.stock(), dist.group.WORLD
    labels, whole = torch.randint(11, (2, 8)), torch.randn(2, 8, 11)
    for ignored in (0, 3, 4, 8):  # with 4 the first rank has no label, with 8 none has one
        masked = labels.clone()
        masked[:, :ignored] = -100
        outcome = []
        for loss in (stock.GPTLMLoss(ring), openrlhf.GPTLMLoss(ring)):
            logits = whole[:, 4 * rank : 4 * rank + 4].clone().requires_grad_()
            value = loss(logits, masked)
            value.backward()
            outcome.append((value.detach(), logits.grad))
        compare(f"the loss of a ring, {ignored} ignored", outcome[1][0], outcome[0][0])
        compare(f"the gradient of a ring, {ignored} ignored", outcome[1][1], outcome[0][1])

    prompts, chosen = torch.randn(ranks, 3), torch.randn(2, requires_grad=True)
    loss, _, _, kl = legacy.KTOLoss(0.5, 1.0, 1.0, ranks, "cpu")(
        chosen, torch.zeros(0), 2.0 + prompts[rank], torch.zeros(2), torch.zeros(0), torch.zeros(3)
    )
    mean = (2.0 + prompts).double().mean()
    compare("KL of KTO", kl, mean)
    compare("KTO", loss.detach(), (1 - torch.sigmoid(0.5 * (chosen.detach().double() - mean))).mean())
    return found


def main(rank, ranks, rendezvous, report):
    dist.init_process_group(
        "gloo",
        init_method=Path(rendezvous).as_uri(),
        rank=int(rank),
        world_size=int(ranks),
        timeout=datetime.timedelta(seconds=120),
    )
    Path(report).write_text(json.dumps(complaints(int(rank), int(ranks))))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
