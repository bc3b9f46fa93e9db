"""One process of a group: problems, their shards, the dense truth in float64, and what the cases of ``parallel_cases``
are judged by.

``python vocab_parallel_worker.py RANK RANKS RENDEZVOUS REPORT`` runs every case and writes ``{case: [complaint, {name:
digest}]}`` as JSON: what a case returns must have the same bits on all ranks, and the test that reads the reports
compares the digests.
"""

import contextlib
import datetime
import hashlib
import json
import re
import sys
import traceback
from pathlib import Path
from typing import NamedTuple

import oracles
import torch
import torch.distributed as dist
from reference import assert_within_policy, statistics

OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
B, L, WIDTH = 3, 7, 32


class Me(NamedTuple):
    rank: int
    ranks: int
    group: object


class Shard(NamedTuple):
    """``weight``, ``bias``: leaves with the rows ``mine`` of the dense head and perhaps padding behind.

    ``options``: what the call is told.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    mine: slice
    options: dict


class Problem:
    """A head of 133 columns (2 and 4 do not divide it), tokens of every kind; numbers that the dtype holds exactly."""

    def __init__(self, dtype=torch.float32, vocab=133, seed=0, shape=(B, L)):
        draw = torch.Generator().manual_seed(seed)

        def normal(*sizes, scale=1.0):
            return (scale * torch.randn(*sizes, generator=draw, dtype=torch.float64)).to(dtype)

        self.dtype, self.vocab, self.shape = dtype, vocab, shape
        self.real = torch.float64 if dtype == torch.float64 else torch.float32
        self.hidden, self.weight, self.bias = normal(*shape, WIDTH), normal(vocab, WIDTH, scale=0.4), normal(vocab)
        self.targets = torch.randint(vocab, shape, generator=draw)
        self.mask = torch.rand(shape, generator=draw) < 0.7
        self.mask[..., 1] = True
        self.targets[1:2, 2] = -100
        self.temperature = (0.6 + torch.rand(shape, generator=draw, dtype=torch.float64)).to(self.real)
        self.settings = {"softcap": 5.0, "logit_scale": 1.5, "temperature": self.temperature}
        self.advantages, noise, far, *self.cotangents = (
            torch.randn(shape, generator=draw, dtype=torch.float64).to(self.real) for _ in range(5)
        )
        self.cotangents[0].view(-1)[1] = 0.0
        logp = self.truth()["logprobs"].detach()
        self.old, self.ref = (logp + 0.3 * noise).to(self.real), (logp + 0.3 * far).to(self.real)

    def leaves(self, dtype=torch.float64):
        return [x.to(dtype).clone().requires_grad_() for x in (self.hidden, self.weight, self.bias)]

    def logits(self, hidden, weight, bias):
        z = (hidden @ weight.t() + bias) * self.settings.get("logit_scale", 1.0)
        cap = self.settings.get("softcap")
        return z if cap is None else cap * torch.tanh(z / cap)

    def truth(self, leaves=None, dtype=torch.float64):
        leaves = self.leaves(dtype) if leaves is None else leaves
        return statistics(self.logits(*leaves), self.targets, self.settings.get("temperature", 1.0), dtype=dtype)

    def shard(self, me, layout):
        """``padded``: equal sizes, NaN behind the vocabulary.

        ``uneven``: every size is another, five rows of padding behind the last.
        """
        if layout == "uneven":
            ends = {1: [0, self.vocab], 2: [0, 40, self.vocab], 4: [0, 40, 41, 100, self.vocab]}[me.ranks]
            start, end, rows = (
                ends[me.rank],
                ends[me.rank + 1],
                ends[me.rank + 1] - ends[me.rank] + 5 * (me.rank == me.ranks - 1),
            )
            options = {"vocab_start": start, "valid_vocab": self.vocab}
        else:
            rows = -(-self.vocab // me.ranks) if layout == "padded" else layout
            start, end = min(self.vocab, me.rank * rows), min(self.vocab, (me.rank + 1) * rows)
            options = {} if rows * me.ranks == self.vocab else {"valid_vocab": self.vocab}
        weight, bias = (torch.full((rows, *x.shape[1:]), torch.nan, dtype=self.dtype) for x in (self.weight, self.bias))
        weight[: end - start], bias[: end - start] = self.weight[start:end], self.bias[start:end]
        return Shard(
            weight.requires_grad_(), bias.requires_grad_(), slice(start, end), {"process_group": me.group, **options}
        )

    def arguments(self, shard, hidden=None):
        """Hidden states, a leaf where none are given; and the keyword arguments of a ``linear_*`` function."""
        return self.hidden.clone().requires_grad_() if hidden is None else hidden, {
            "bias": shard.bias,
            **self.settings,
            **shard.options,
        }


def true_policy_loss(problem, stats, level="token", kl_coef=0.1, entropy_coef=0.02, count=None):
    """Token mean of ppo_clip, k3 and entropy bonus by the oracles, and that of the sizes.

    ``count``: what the sums are divided by.
    """
    live = problem.mask & (problem.targets != -100)
    count = live.sum() if count is None else count
    logp, old, ref, advantages = (x.double() for x in (stats["logprobs"], problem.old, problem.ref, problem.advantages))
    inside, before = logp, old
    if level != "token":

        def mean(x):
            return (torch.where(live, x, 0.0).sum(-1) / live.sum(-1))[:, None].expand(x.shape)

        inside, before = mean(logp), mean(old)
        if level == "sequence_token":
            inside, before = logp, (logp - mean(logp - old)).detach()
    loss = (
        oracles.ppo_clip(inside, before, advantages, 0.2, 0.2)
        + kl_coef * oracles.k3(logp, ref)
        - entropy_coef * stats["entropy"]
    )
    return torch.where(live, loss, 0.0).sum() / count, torch.where(live, loss.detach(), 0.0).abs().sum() / count


def assert_near(got, truth, what, factor=1.0, size=None, flat=False):
    """Frobenius error: of fp32 and fp64 a few units of ``size``, of 16 bits 1.05 times that of one cast of the truth
    beside it.

    ``flat``: the gradient of the logits is not that of a few columns. A CPU with AVX512_BF16 rounds it to bf16 and
    gives back what the 40 largest elements of a row lost, so that up to one rounding more remains, 0.16 %.
    """
    assert got.shape == truth.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    size = truth.norm() if size is None else size
    error = (got.double() - truth).norm()
    once = (truth.to(got.dtype).double() - truth).norm()
    if flat and got.dtype == torch.bfloat16:
        once = torch.hypot(once, 0.0016 * size)
    allowed = factor * {torch.float64: 1e-12, torch.float32: 2e-6}.get(got.dtype, 2e-6) * size + 1.05 * once
    assert error <= allowed, f"{what}: Frobenius error {error:.3g}, allowed {allowed:.3g} of {size:.3g}"


def assert_gradients(got, truth, shard, what, factor=1.0, flat=False):
    """Of hidden states, local weight and local bias; padding rows get exactly 0."""
    assert_near(got[0], truth[0], f"{what}: hidden", factor, flat=flat)
    count = shard.mine.stop - shard.mine.start
    for name, g, t in zip(("weight", "bias"), got[1:], truth[1:], strict=True):
        if g is not None:
            assert (g[count:] == 0).all(), f"{what}: {name} has a gradient in rows of padding"
            if count:
                # Of the whole: a shard may have none.
                assert_near(g[:count], t[shard.mine], f"{what}: {name}", factor, t.norm(), flat)


def assert_statistics(stats, problem, truth):
    base = problem.truth(dtype=problem.real)
    for name, expected in truth.items():
        got = getattr(stats, name)
        if name == "is_top1":
            assert torch.equal(got, expected), name
        elif problem.real == torch.float64:
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        else:
            assert got.dtype == torch.float32
            assert_within_policy(got, expected, base[name], name)


COLLECTIVES = [
    name
    for name in dist.distributed_c10d.__all__
    if re.match(
        "(all_gather|all_reduce|all_to_all|barrier|broadcast|gather|reduce|scatter|send|recv|isend|irecv|batch_isend)",
        name,
    )
]


@contextlib.contextmanager
def counted():
    """A list of ``(collective, numbers that this rank contributes, their dtype)``; every public collective of torch is
    looked at.
    """
    calls, originals = [], {name: getattr(dist, name) for name in COLLECTIVES}

    def wrap(name, original):
        def call(*arguments, **options):
            if not inside:
                mine = arguments[0] if name in ("all_reduce", "broadcast", "reduce", "send", "recv") else arguments[1]
                calls.append((name, mine.numel(), mine.dtype))
            inside.append(name)  # one collective may be written in terms of another
            try:
                return original(*arguments, **options)
            finally:
                inside.pop()

        return call

    inside = []
    try:
        for name, original in originals.items():
            setattr(dist, name, wrap(name, original))
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def digest(x):
    return hashlib.sha256(
        f"{x.dtype} {tuple(x.shape)}".encode() + x.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
    ).hexdigest()


def main(rank, ranks, rendezvous, report):
    import vocab_parallel_disagreement  # noqa: F401  (its cases)
    import vocab_parallel_errors  # noqa: F401  (its cases)
    import vocab_parallel_masks  # noqa: F401  (its cases)
    import vocab_parallel_refusals  # noqa: F401  (its cases)
    import vocab_parallel_topk  # noqa: F401  (its cases)
    from vocab_parallel_cases import CASES  # which is written in terms of this module

    torch.set_num_threads(1)
    results = dict.fromkeys(CASES, ("not run: an earlier case ended the process", {}))
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks, timeout=datetime.timedelta(seconds=30)
    )
    for name, case in CASES.items():
        results[name] = "this case ended the process: ranks out of step in a collective?", {}
        # Gloo ends a process whose collectives do not fit those of the others.
        Path(report).write_text(json.dumps(results))
        try:
            results[name] = None, {key: digest(x) for key, x in (case(Me(rank, ranks, dist.group.WORLD)) or {}).items()}
        except Exception:
            results[name] = traceback.format_exc(), {}
    Path(report).write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.modules["parallel_work"] = sys.modules["__main__"]
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
