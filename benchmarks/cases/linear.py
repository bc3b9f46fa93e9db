"""The cases of the fused head that a CPU and a GPU share: who computes what from hidden states and the head."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

import rlkernels
from benchmarks.cases.case import EAGER, Case, differentiated
from benchmarks.judge import Judge
from benchmarks.lineup import Lineup
from benchmarks.peers import PEERS
from benchmarks.problems import linear as problems
from benchmarks.problems.linear import Problem, full_logits, products, products_check
from benchmarks.problems.logits import CLIP_HIGH, CLIP_LOW, ppo, stats
from benchmarks.timing.contender import Contender

ALL = "linear"
Make = Callable[[Problem, Lineup], Case]
Head = Callable[[Tensor, Tensor], Tensor | tuple]
"""A function of ``(hidden, weight)``: a loss, log-probabilities, or these and the entropy."""


def gradient_bytes(shape: tuple[int, int, int]) -> int:
    """The two gradients of a head as they are summed, in fp32."""
    tokens, hidden, vocab = shape
    return 4 * hidden * (tokens + vocab)


def scores(peers: dict[str, Callable], y: Tensor, entropy: bool) -> dict[str, Head]:
    """Peer to log-probability and, with ``entropy``, entropy."""

    def trl(h: Tensor, w: Tensor) -> tuple:
        # In tiles of the size that TRL's trainers use.
        outputs = ("entropy",) if entropy else ()
        return peers["trl_chunked"](h, w, None, y, 1.0, 32768, None, 1.0, outputs)[:2]

    def liger(h: Tensor, w: Tensor) -> tuple:
        found = peers["liger_sm90"](h, w, y, 1.0, -100, 1, entropy)
        return (-found[0], found[1]) if entropy else (-found, None)

    def verl_chunked(h: Tensor, w: Tensor) -> tuple:
        return peers["verl_chunked"](chunk_size=512)(h, w, y, 1.0)

    def verl(h: Tensor, w: Tensor) -> tuple:
        return peers["verl_linear"](h, w, y, 1.0, "none")

    def cce(h: Tensor, w: Tensor) -> tuple:
        return -peers["cce"](h, w, y, reduction="none"), None

    known = {"trl_chunked": trl, "liger_sm90": liger, "verl_chunked": verl_chunked, "verl_linear": verl}
    if not entropy:
        known["cce"] = cce
    return {PEERS[key].name: f for key, f in known.items() if key in peers}


def liger_policy(loss: type, p: Problem) -> Head:
    """Liger's chunked GRPO with an advantage per token: a batch of sequences of one token, in one chunk, which is its
    fastest.
    """
    tokens, ones = p.shape[0], torch.ones_like(p.advantages)[:, None]
    clip = {"epsilon_low": CLIP_LOW, "epsilon_high": CLIP_HIGH}
    made = loss(beta=0.0, compiled=False, use_ref_model=False, chunk_size=tokens, loss_type="bnpo", **clip)

    def run(h: Tensor, w: Tensor) -> Tensor:
        old = p.old_logprobs[:, None]
        return made(h[:, None], w, p.targets[:, None], ones, p.advantages, old_per_token_logps=old)[0]

    return run


def remark(name: str) -> str:
    return next((peer.remark for peer in PEERS.values() if peer.name == name), "")


def build(
    name: str,
    p: Problem,
    lineup: Lineup,
    fused: Head,
    *,
    count: int,
    floor: str,
    loss: Callable[[Tensor], Tensor] | None = None,
    entropy: bool = False,
    others: dict[str, Head] | None = None,
    slack: float = 0.0,
    **rules: object,
) -> Case:
    """Forward and backward of a loss over log-probabilities, or of the statistics with the upstream gradients of ``p``.

    Args:
        fused: ours.
        count: products of ``2 T H V`` operations that nobody can avoid, timed beside the others as ``floor``.
        loss: of log-probabilities ``[T]``; torch with full logits and the peers compute it from theirs.
        entropy: the statistics are log-probability and entropy.
        others: what else is measured, by name.
        slack: what the loss loses to its fp32 sums.
        rules: what ``beside`` takes besides, and what else the case says.
    """
    y, known = p.targets, scores(lineup.peers, p.targets, entropy)
    if loss is not None:
        functions = {label: lambda h, w, f=f: loss(f(h, w)[0]) for label, f in known.items()} | (others or {})
        functions[EAGER] = lambda h, w: loss(full_logits(h, w, y))
        judge, upstream = problems.judge(p, loss, further=slack), None
    elif entropy:
        functions = known | (others or {})
        functions[EAGER] = lambda h, w: stats(h @ w.T, y)
        judge, upstream = problems.judge(p, dentropy=p.dentropy), (p.dlogp, p.dentropy)
    else:
        functions = {label: lambda h, w, f=f: f(h, w)[0] for label, f in known.items()} | (others or {})
        functions[EAGER] = lambda h, w: full_logits(h, w, y)
        judge, upstream = problems.judge(p), p.dlogp

    return beside(name, p, lineup, fused, functions, judge, count=count, floor=floor, upstream=upstream, **rules)


def beside(
    name: str,
    p: Problem,
    lineup: Lineup,
    fused: Head,
    functions: dict[str, Head],
    judge: Judge,
    *,
    count: int,
    floor: str,
    upstream: object = None,
    further: Iterable[Contender] = (),
    **rules: object,
) -> Case:
    """Forward and backward of ours, of ``functions`` by their names, and of the bare products.

    ``upstream``: the gradients that arrive at what a function returns; None for a loss.
    """

    def make(label: str, function: Head, **options: object) -> Contender:
        return Contender(label, differentiated(function, upstream), p.leaves, judge.everything, **options)

    bare = Contender(floor, products(p, count), check=products_check(p), remark="the floor of this run")
    mine = [make(label, function, ours=True) for label, function in lineup.fused(fused).items()]
    theirs = [make(label, function, remark=remark(label)) for label, function in functions.items()]
    tokens, hidden, vocab = p.shape
    flops = 2 * count * tokens * hidden * vocab
    return Case(name, [bare, *mine, *further, *theirs], judge.slack, p.shape, flops=flops, **rules)


def ppo_loss(
    p: Problem, budget: int | None = None, chunk: int | None = None
) -> tuple[Callable[..., Tensor], Callable[[Tensor], Tensor]]:
    """Our policy loss from hidden states, and the same from log-probabilities. ``budget``: of its logits, in bytes;
    ``chunk``: rows of a chunk.
    """
    columns = p.old_logprobs, p.advantages

    def fused(h: Tensor, w: Tensor, mask: Tensor | None = None) -> Tensor:
        return rlkernels.linear_policy_loss(
            h,
            w,
            p.targets,
            *columns,
            mask,
            clip_low=CLIP_LOW,
            clip_high=CLIP_HIGH,
            logits_budget=budget,
            chunk_tokens=chunk,
        )

    return fused, lambda logp: ppo(logp, *columns).mean()


def token_stats(p: Problem) -> Head:
    def fused(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        found = rlkernels.linear_token_stats(h, w, p.targets)
        return found.logprobs, found.entropy

    return fused
