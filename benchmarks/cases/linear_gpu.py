"""The fused head on an accelerator: beside its bare products, which is the floor, and other libraries' fused heads."""

import argparse
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import rlkernels
from benchmarks.cases.case import COMPILED, EAGER, Case, compiled, differentiated, on, ours
from benchmarks.cases.linear_cpu import liger_policy, trl_logprobs
from benchmarks.judge import Judge
from benchmarks.peers import PEERS
from benchmarks.problems.linear import Problem, full_logits, ppo, products, products_check
from benchmarks.problems.linear import judge as judge_of
from benchmarks.problems.logits import CLIP_HIGH, CLIP_LOW
from benchmarks.timing.contender import Contender

ALL = "linear"
NAMES = ("linear_policy_loss", "linear_token_stats", "linear_token_logprobs")
TOKENS, HIDDEN, VOCABULARIES = (4096, 8192, 32768), 4096, (151936, 128256)
LONG = 32768
"""Tokens from which memory is what is looked at: nothing that holds the logits of all of them runs there."""
PRODUCTS = "{} cuBLAS products"


def plan(
    args: argparse.Namespace, wanted: Sequence[str], scale: int = 1
) -> list[tuple[tuple[int, int, int], list[str]]]:
    """``((tokens, hidden, vocab), cases)``, the shape where everything is measured and counted first; empty where no
    such case is wanted.

    Behind it the grid, log-probabilities alone left to the first shape unless they are named; for the headline the
    longest batch, for its memory.
    """
    every = ALL in wanted
    names = [n for n in NAMES if every or n in wanted]
    rows = (
        [args.tokens] if args.tokens else [TOKENS[0]] if args.quick else [TOKENS[0], LONG] if args.headline else TOKENS
    )
    columns = [args.vocab] if args.vocab else VOCABULARIES[:1] if args.quick or args.headline else VOCABULARIES
    grid = [(t, args.hidden or HIDDEN // scale, v) for t in rows for v in columns]
    later = [n for n in names if not every or n in (NAMES[:1] if args.headline else NAMES[:2])]
    return [(shape, some) for position, shape in enumerate(grid) if (some := later if position else names)]


def head_logprobs(peers: dict[str, Callable], y: Tensor, entropy: bool) -> dict[str, Callable[[Tensor, Tensor], tuple]]:
    """Peer to log-probability and, with ``entropy``, entropy, as differentiable functions of ``(hidden, weight)``."""

    def trl(h: Tensor, w: Tensor) -> tuple:
        return trl_logprobs(peers["trl_chunked"], y, ("entropy",) if entropy else ())(h, w)[:2]

    def liger(h: Tensor, w: Tensor) -> tuple:
        found = peers["liger_sm90"](h, w, y, 1.0, -100, 1, entropy)
        return (-found[0], found[1]) if entropy else (-found, None)

    def verl_chunked(h: Tensor, w: Tensor) -> tuple:
        return peers["verl_chunked"](chunk_size=512)(h, w, y, 1.0)

    def cce(h: Tensor, w: Tensor) -> tuple:
        return -peers["cce"](h, w, y, reduction="none"), None

    def torch_cross_entropy(h: Tensor, w: Tensor) -> tuple:
        return -F.linear_cross_entropy(h, w, y, reduction="none"), None

    def verl(h: Tensor, w: Tensor) -> tuple:
        return peers["verl_linear"](h, w, y, 1.0, "none")

    known = {"trl_chunked": trl, "liger_sm90": liger, "verl_chunked": verl_chunked, "verl_linear": verl}
    if not entropy:
        known["cce"] = cce
    found = {PEERS[key].name: f for key, f in known.items() if key in peers}
    if not entropy and hasattr(F, "linear_cross_entropy"):
        found["F.linear_cross_entropy"] = torch_cross_entropy
    return found


def remark(name: str) -> str:
    return next((peer.remark for peer in PEERS.values() if peer.name == name), "")


def eager_stats(h: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    logps = torch.log_softmax((h @ w.T).float(), -1)
    return logps.gather(1, y[:, None])[:, 0], -(logps.exp() * logps).sum(-1)


def build(
    kind: str,
    p: Problem,
    judge: Judge,
    count: int,
    fused: Callable,
    others: dict[str, Callable],
    upstream: object = None,
) -> Case:
    """``fused`` and ``others``: functions of ``(hidden, weight)``, forward and backward through
    ``torch.autograd.grad``.
    """

    def entry(label: str, function: Callable, **rest: object) -> Contender:
        return Contender(label, differentiated(function, upstream), p.leaves, judge.everything, **rest)

    entries = [
        Contender(PRODUCTS.format(count), products(p, count), check=products_check(p), remark="the floor of this run")
    ]
    entries += [entry(label, on(backend, fused), ours=True) for label, backend in ours(p.hidden.device.type).items()]
    entries += [entry(label, function, remark=remark(label)) for label, function in others.items()]
    tokens, hidden, vocab = p.shape
    moved = p.hidden.element_size() * hidden * (tokens + vocab)
    return Case(
        f"{kind} {list(p.shape)} forward+backward",
        entries,
        judge.slack,
        p.shape,
        PRODUCTS.format(count),
        moved,
        moved,
        2 * count * tokens * hidden * vocab,
        # Matrix units take the gradient of the logits rounded once before.
        roundings=1.5,
    )


def without_full_logits(p: Problem, others: dict[str, Callable]) -> dict[str, Callable]:
    """At a length where the logits of all tokens, their fp32 copy and their gradient fill the device, they are left
    out.
    """
    return {
        name: f
        for name, f in others.items()
        if p.shape[0] < LONG or name not in (EAGER, COMPILED, "F.linear_cross_entropy")
    }


def policy(p: Problem, peers: dict[str, Callable], compile_too: bool) -> Case:
    columns = p.old_logprobs, p.advantages

    def loss(logp: Tensor) -> Tensor:
        return ppo(logp, *columns).mean()

    def fused(h: Tensor, w: Tensor) -> Tensor:
        return rlkernels.linear_policy_loss(h, w, p.targets, *columns, clip_low=CLIP_LOW, clip_high=CLIP_HIGH)

    others = {name: lambda h, w, f=f: loss(f(h, w)[0]) for name, f in head_logprobs(peers, p.targets, False).items()}
    if "liger_chunked" in peers:
        others[PEERS["liger_chunked"].name] = liger_policy(peers["liger_chunked"], p)
    others[EAGER] = lambda h, w: loss(full_logits(h, w, p.targets))
    return build("linear_policy_loss", p, judge_of(p, loss), 3, fused, without_full_logits(p, others))


def statistics(p: Problem, peers: dict[str, Callable], compile_too: bool) -> Case:
    def fused(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        found = rlkernels.linear_token_stats(h, w, p.targets)
        return found.logprobs, found.entropy

    others = {**head_logprobs(peers, p.targets, True), EAGER: lambda h, w: eager_stats(h, w, p.targets)}
    return build(
        "linear_token_stats",
        p,
        judge_of(p, dentropy=p.dentropy),
        4,
        fused,
        without_full_logits(p, others),
        (p.dlogp, p.dentropy),
    )


def logprobs(p: Problem, peers: dict[str, Callable], compile_too: bool) -> Case:
    """Any upstream gradient. ``torch.compile`` of the full logits runs here alone."""

    def torch_head(h: Tensor, w: Tensor) -> Tensor:
        return full_logits(h, w, p.targets)

    others = {name: lambda h, w, f=f: f(h, w)[0] for name, f in head_logprobs(peers, p.targets, False).items()}
    others[EAGER] = torch_head
    if compile_too:
        others[COMPILED] = compiled(torch_head)

    def fused(h: Tensor, w: Tensor) -> Tensor:
        return rlkernels.linear_token_logprobs(h, w, p.targets)

    return build("linear_token_logprobs", p, judge_of(p), 4, fused, without_full_logits(p, others), p.dlogp)


CASES: dict[str, Callable[[Problem, dict[str, Callable], bool], Case]] = dict(
    zip(NAMES, (policy, statistics, logprobs), strict=True)
)
