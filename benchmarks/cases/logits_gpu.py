"""The cases over logits on an accelerator."""

from collections.abc import Callable

import torch
from torch import Tensor

import rlkernels
from benchmarks import peers as libraries
from benchmarks.cases import logits
from benchmarks.cases.case import IN_PLACE, Case, without_grad
from benchmarks.cases.logits import Make
from benchmarks.cases.names import LOGPROBS, ONE_LAUNCH, POLICY, STATS, TWO, TWO_BOTH
from benchmarks.judge import Judge
from benchmarks.lineup import Lineup
from benchmarks.peers import PEERS
from benchmarks.problems import logits as problems
from benchmarks.problems.logits import CLIP_HIGH, CLIP_LOW, ENTROPY_COEF, KL_COEF, Problem
from benchmarks.timing.contender import Contender
from rlkernels import ops

SEQUENCES = 8
"""The rows of a batch are so many sequences of equal length: some peers take [B, L + 1, V] and one advantage per
sequence.
"""
CHECKED = 16


def problem_of(
    device: torch.device, tokens: int, vocab: int, dtype: str, cache: int, reference: bool = False
) -> Problem:
    """The problem of an accelerator: copies that exceed its cache, and one advantage per sequence."""
    return problems.make(
        device, tokens, vocab, dtype, cache=cache, reference=reference, sequences=SEQUENCES, checked=CHECKED
    )


def one_launch(problem: Problem, name: str) -> Callable[[tuple[Tensor]], tuple]:
    """The op below the loss: loss and gradient of a backend in one call, without autograd."""
    old, ref, advantages = problem.columns
    share = torch.full_like(old, 1.0 / old.numel())
    bonus, penalty, one = share * ENTROPY_COEF, share * KL_COEF, ops.number(1.0)
    columns, params = [old, advantages], ops.numbers((CLIP_LOW, CLIP_HIGH))
    serving = ops.serving("fused_policy", problem.logits) if name == "auto" else name

    def run(x: Tensor, y: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        rows = "ppo_clip", x, y, one, -100, None
        weights = columns, params, share, bonus, "k3", ref, penalty
        loss, grad = ops.fused_policy_op(*rows, *weights, True, False, serving)[:2]
        return loss, (grad,)

    return without_grad(run)


def policy(problem: Problem, judge: Judge, lineup: Lineup) -> Case:
    """The loss; in place; by the op that makes the gradient in the forward; by peers, some of which compute less."""
    check, scratch, peers = judge.check("loss", gradients=("dpolicy",)), logits.Scratch(problem), lineup.peers
    train, others = logits.training(problem, check), []

    def in_place(*arguments: Tensor) -> Tensor:
        return logits.policy_loss(*arguments, inplace=True)

    for label, function in lineup.fused(in_place).items():
        others.append(train(label + IN_PLACE, function, problem.columns, prepare=scratch.leaves, ours=True))
    for label, name in lineup.ours.items():
        others.append(Contender(label + ONE_LAUNCH, one_launch(problem, name), problem.inputs, check, ours=True))
    if "dgrpo" in judge.gradients and "liger_grpo" in peers:
        run = libraries.liger_policy(peers["liger_grpo"], problem, CLIP_LOW, CLIP_HIGH, KL_COEF)
        options = {"prepare": scratch.leaves, "check": judge.check(gradients=("dgrpo",))}
        others.append(train(PEERS["liger_grpo"].name, run, **options, remark=PEERS["liger_grpo"].remark))
    if "dgrpo" in judge.gradients and "fla_grpo" in peers:
        run = libraries.fla_policy(peers["fla_grpo"], problem, KL_COEF)
        unjudged = {"check": lambda outputs: {}, "remark": PEERS["fla_grpo"].remark}
        others.append(train(PEERS["fla_grpo"].name, run, **unjudged))
    if "trl" in peers:

        def composed(x: Tensor, y: Tensor, *columns: Tensor) -> Tensor:
            return problems.policy_terms(*peers["trl"](x, y), *columns).mean()

        others.append(train(PEERS["trl"].name + " and torch", composed, problem.columns))
    return logits.policy(problem, judge, lineup, others)


def two_models(problem: Problem, judge: Judge, lineup: Lineup, backward: bool = False) -> Case:
    """The statistics of a policy beside a reference: ``(logits, ref_logits, targets)`` to what is judged."""
    upstream, quantities = problems.two_upstream(problem), ("logp", "entropy", "ref_logp", "kl")

    def fused(x: Tensor, ref: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        found = rlkernels.token_stats(x, y, ref_logits=ref, kl="exact", outputs=("entropy",))
        return found.logprobs, found.entropy, found.ref_logprobs, found.kl

    def inputs(buffer: int) -> tuple[Tensor, Tensor, Tensor]:
        return problem.copies[buffer], problem.ref_copies[buffer], problem.targets

    def leaves(buffer: int) -> tuple[Tensor, Tensor, Tensor]:
        return problem.leaf(buffer), problem.ref_copies[buffer], problem.targets

    def make(name: str, function: Callable, **options: object) -> Contender:
        def both(state: tuple) -> tuple:
            found = function(*state)
            return found, torch.autograd.grad((found[0], found[1], found[3]), state[:1], upstream)

        if backward:
            return Contender(name, both, leaves, judge.check(*quantities, gradients=("dtwo",)), **options)
        return Contender(name, without_grad(function), inputs, judge.check(*quantities), **options)

    everyone = lineup.contenders(make, fused, problems.kl_composition)
    if backward:
        return logits.case(TWO_BOTH, problem, judge, everyone, "4R+1W", 4, 1)
    return logits.case(TWO, problem, judge, everyone, "2R", 2, 0)


def two_models_both(problem: Problem, judge: Judge, lineup: Lineup) -> Case:
    return two_models(problem, judge, lineup, backward=True)


CASES: dict[str, Make] = {
    STATS: logits.statistics,
    LOGPROBS: logits.logprobs,
    POLICY: policy,
    TWO: two_models,
    TWO_BOTH: two_models_both,
}
WITH_REFERENCE = (TWO, TWO_BOTH)
