"""One GRPO step of a model under FSDP2, with the fused head: no process ever holds logits ``[T, V]``.

    torchrun --nproc_per_node 2 examples/fsdp2_policy.py

The head is a parameter like any other: FSDP2 keeps 1/n of it on each rank, and ``linear_policy_loss`` wants all of it.
Two ways:

``forward``      the loss is taken inside the root module's ``forward``. There FSDP2 has gathered the root's parameters,
and its hooks sum the
                 gradient and free the gathered copy. (A head that is a unit of its own: ``head.unshard()`` before,
                 ``head.reshard()`` after.)
``full_tensor``  the loss is taken outside, on ``weight.full_tensor(grad_placements=[Partial()])``. ``Partial`` says
that every rank's gradient is
                 a part of the sum; without it torch takes the ranks' gradients for copies of one another and keeps a
                 slice of each.

Every rank has other sequences, so the loss is normalised by the number of tokens of *all* ranks, and gradients are
summed, not averaged. Both ways are taken, with a head of its own and with one that is the embedding, and every step is
checked against the same batch on one process, with plain torch logits. Runs on a CPU with gloo, or with NCCL.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial

import rlkernels as rlk

VOCAB, WIDTH, LENGTH, ANSWERS = 151, 64, 24, 4


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.mix, self.norm = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x):
        q, k, v = self.attention(self.norm(x)).chunk(3, -1)
        return x + self.mix(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))


class Model(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.embedding, self.block, self.head = nn.Embedding(VOCAB, WIDTH), Block(), nn.Linear(WIDTH, VOCAB, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids, loss=None):
        hidden = self.block(self.embedding(ids))
        return hidden if loss is None else loss(hidden, self.head.weight)


def build(tied, device):
    torch.manual_seed(0)
    return Model(tied).to(device)


def sequences(ranks, device):
    """One prompt per rank with four answers: ids, the mask of the answers' tokens (shifted, like the targets),
    group-relative advantages.
    """
    draw = torch.Generator().manual_seed(1)
    count = ranks * ANSWERS
    ids = torch.randint(VOCAB, (count, LENGTH + 1), generator=draw)
    mask = (torch.arange(LENGTH) >= 8) & (
        torch.arange(LENGTH) < torch.randint(12, LENGTH + 1, (count, 1), generator=draw)
    )
    advantages = rlk.group_advantages(torch.rand(count, generator=draw), torch.arange(count) // ANSWERS)
    drift = 0.2 * torch.randn(count, LENGTH, generator=draw)  # of the policy since it sampled, so that ratios are not 1
    return [x.to(device) for x in (ids, mask, advantages, drift)]


def dense_step(model, batch):
    """The same step on one process, logits and all, in plain torch."""
    ids, mask, advantages, drift = batch
    logp = model.head(model(ids[:, :-1])).log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    ratio = (logp - (logp.detach() + drift)).exp()
    held = ratio.clamp(0.8, 1.2)
    loss = -torch.min(ratio * advantages[:, None], held * advantages[:, None])[mask].sum() / mask.sum()
    loss.backward()
    return loss.detach()


def sharded_step(model, batch, total, gather):
    ids, mask, advantages, drift = batch
    targets = ids[:, 1:]  # shifted here: the library never shifts
    weight_of = {}

    def loss_of(hidden, weight):
        weight_of["kind"] = type(weight).__name__
        with torch.no_grad():
            old = rlk.linear_token_logprobs(hidden, weight, targets) + drift
        return rlk.linear_policy_loss(
            hidden, weight, targets, old, advantages, mask, normalizers={"batch_num_tokens": total}
        )

    if gather == "forward":
        loss = model(ids[:, :-1], loss_of)
    else:
        hidden = model(ids[:, :-1])
        loss = loss_of(hidden, model.head.weight.full_tensor(grad_placements=[Partial()]))
    assert weight_of["kind"] != "DTensor"
    loss.backward()
    assert isinstance(model.head.weight.grad, DTensor), "the gradient did not reach the sharded parameter"
    return loss.detach()


def compare(tied, gather, batch, device):
    """One step of the sharded and of the dense model; returns the loss."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    plain, model = build(tied, device), build(tied, device)
    mesh = dist.init_device_mesh(device.type, (ranks,))
    for module in (model.block, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
        module.set_gradient_divide_factor(1.0)  # the sum over ranks: the loss is normalised already
        module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    mine = [x[rank * ANSWERS : (rank + 1) * ANSWERS] for x in batch]
    total = mine[1].sum()
    dist.all_reduce(total)  # tokens of all ranks: one number per step
    loss = sharded_step(model, mine, total, gather)
    dist.all_reduce(loss)
    torch.testing.assert_close(loss, dense_step(plain, batch), rtol=1e-5, atol=1e-6)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain)]
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(
            p.grad.full_tensor(),
            q.grad,
            rtol=1e-4,
            atol=1e-6,
            msg=lambda text, name=name: f"gradient of {name}: {text}",
        )
    for optimizer in optimizers:
        optimizer.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), q, rtol=1e-5, atol=1e-6)
    return loss.item()


def main():
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    batch = sequences(dist.get_world_size(), device)
    for tied in (False, True):
        for gather in ("forward", "full_tensor"):
            loss = compare(tied, gather, batch, device)
            if dist.get_rank() == 0:
                print(
                    f"head {'tied' if tied else 'of its own'}, gathered by {gather}: loss {loss:.6f}; loss, "
                    "gradients and step are those of one process"
                )
    dist.barrier()  # nobody leaves while another rank still waits for it
    dist.destroy_process_group()
    if device.type == "cpu":
        # FSDP2 keeps the group alive after it was destroyed, and with it gloo's threads. One that lets go of a
        # collective's tensor needs the interpreter, and aborts the process when Python has ended before: "terminate
        # called without an active exception", 1 run in 4 on two busy cores, still 1 in 24 behind the barrier alone. So
        # the process ends here,
        # without taking the interpreter down
        # under them.
        sys.stdout.flush()
        os._exit(0)


if __name__ == "__main__":
    main()
