"""The cases of the fused head on an accelerator, where cuBLAS products are the floor."""

import argparse
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor

import rlkernels
from benchmarks.cases import linear
from benchmarks.cases.case import COMPILED, EAGER, Case
from benchmarks.cases.linear import ALL, Head, Make
from benchmarks.cases.names import HEADS as NAMES
from benchmarks.cases.names import PRODUCTS, of_head
from benchmarks.lineup import Lineup, compiled
from benchmarks.peers import PEERS
from benchmarks.problems.linear import Problem, full_logits

TOKENS, HIDDEN, VOCABULARIES = (4096, 8192, 32768), 4096, (151936, 128256)
LONG = 32768
"""Tokens from which memory is what is looked at: nothing that holds the logits of all of them runs there."""
LONG_BUDGET = 2**30
"""Bytes of logits there; by default a head takes as much as its fp32 gradient does."""
TORCH = "F.linear_cross_entropy"


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


def build(kind: str, p: Problem, lineup: Lineup, fused: Head, count: int, **options: object) -> Case:
    """Whoever holds the logits of all tokens, their fp32 copy and their gradient is left out where these fill the
    device. Matrix units take the gradient of the logits rounded once before, hence one and a half roundings.
    """
    tokens, hidden, vocab = p.shape
    moved = p.hidden.element_size() * hidden * (tokens + vocab)
    rules = {"passes": PRODUCTS.format(count), "reads": moved, "writes": moved, "roundings": 1.5}
    name = of_head(kind, p.shape)
    case = linear.build(name, p, lineup, fused, count=count, floor=PRODUCTS.format(count), **rules, **options)
    if tokens >= LONG:
        case.contenders = [c for c in case.contenders if c.name not in (EAGER, COMPILED, TORCH)]
    return case


def torch_head(p: Problem) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Torch's own fused log-probabilities, where this torch has them."""
    if not hasattr(F, "linear_cross_entropy"):
        return {}
    return {TORCH: lambda h, w: -F.linear_cross_entropy(h, w, p.targets, reduction="none")}


def policy(p: Problem, lineup: Lineup) -> Case:
    fused, loss = linear.ppo_loss(p, LONG_BUDGET if p.shape[0] >= LONG else None)
    others = {name: lambda h, w, f=f: loss(f(h, w)) for name, f in torch_head(p).items()}
    if "liger_chunked" in lineup.peers:
        others[PEERS["liger_chunked"].name] = linear.liger_policy(lineup.peers["liger_chunked"], p)
    return build("linear_policy_loss", p, lineup, fused, 3, loss=loss, others=others)


def statistics(p: Problem, lineup: Lineup) -> Case:
    return build("linear_token_stats", p, lineup, linear.token_stats(p), 4, entropy=True)


def logprobs(p: Problem, lineup: Lineup) -> Case:
    """Any upstream gradient. ``torch.compile`` of the full logits runs here alone."""

    def composed(h: Tensor, w: Tensor) -> Tensor:
        return full_logits(h, w, p.targets)

    def fused(h: Tensor, w: Tensor) -> Tensor:
        return rlkernels.linear_token_logprobs(h, w, p.targets)

    others = torch_head(p) | ({COMPILED: compiled(composed)} if lineup.compile_too else {})
    return build("linear_token_logprobs", p, lineup, fused, 4, others=others)


CASES: dict[str, Make] = dict(zip(NAMES, (policy, statistics, logprobs), strict=True))
