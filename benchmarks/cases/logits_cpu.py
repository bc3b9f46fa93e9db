"""The cases over logits on a CPU."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cases import divergence, logits
from benchmarks.cases.case import Case
from benchmarks.cases.logits import FORWARD, LOGPROBS, POLICY, STATS, Make
from benchmarks.judge import Judge
from benchmarks.lineup import Lineup, Score
from benchmarks.problems.logits import ENTROPY_COEF, Problem
from benchmarks.timing.contender import Contender

PASS_FORWARD, PASS_BACKWARD = "token_stats forward", "token_stats backward"


def policy(problem: Problem, judge: Judge, lineup: Lineup) -> Case:
    """The loss, and beside it the two passes over the rows that it could be made of."""
    upstream = (problem.dlogp, -ENTROPY_COEF * torch.ones_like(problem.dlogp))

    def forward_pass(leaves: tuple[Tensor]) -> tuple[Tensor, Tensor]:
        return logits.stats(*leaves, problem.targets)

    def graph(buffer: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        leaves = problem.leaves(buffer)
        return *leaves, forward_pass(leaves)

    def backward_pass(made: tuple[Tensor, tuple[Tensor, Tensor]]) -> tuple[Tensor]:
        return torch.autograd.grad(made[1], made[0], upstream)

    check = judge.check("logp", "entropy")
    passes = [
        Contender(PASS_FORWARD, forward_pass, problem.leaves, check, moved=problem.bytes, ours=True),
        Contender(PASS_BACKWARD, backward_pass, graph, ours=True),
    ]
    return logits.policy(problem, judge, lineup, passes)


CASES: dict[str, Make] = {
    FORWARD: logits.forward,
    LOGPROBS: logits.logprobs,
    STATS: logits.statistics,
    POLICY: policy,
    **divergence.CASES,
}


def lineup(peers: dict[str, Callable], compile_too: bool) -> Lineup:
    scores = []
    if {"selective_log_softmax", "entropy_from_logits"} <= peers.keys():
        logprobs, entropy = peers["selective_log_softmax"], peers["entropy_from_logits"]
        scores.append(Score("TRL (torch path)", logprobs, lambda x, y: (logprobs(x, y), entropy(x))))
    return Lineup(scores=scores, compile_too=compile_too)


def peers() -> tuple[dict[str, Callable], list[str]]:
    """Functions of other libraries that run on this machine, and one line for each that does not."""
    found: dict[str, Callable] = {}
    remarks = []
    try:
        from trl.trainer.utils import entropy_from_logits, selective_log_softmax
    except ImportError as error:
        remarks.append(f"TRL: not measured: {error}")
    else:
        found.update(selective_log_softmax=selective_log_softmax, entropy_from_logits=entropy_from_logits)
    try:
        import liger_kernel  # noqa: F401
    except ImportError as error:
        remarks.append(f"Liger: not measured: {error}")
    else:
        remarks.append("Liger: not measured: from logits it has Triton kernels only, which need a GPU")
    return found, remarks
