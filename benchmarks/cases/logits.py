"""The cases over logits that a CPU and a GPU share: what is computed, by whom, and how each answer is judged."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

import rlkernels
from benchmarks.cases.case import IN_PLACE, Case, differentiated, without_grad
from benchmarks.cases.names import FORWARD, LOGPROBS, POLICY, STATS
from benchmarks.judge import Judge
from benchmarks.lineup import Lineup, Score
from benchmarks.problems import logits as compositions
from benchmarks.problems.logits import CLIP_HIGH, CLIP_LOW, ENTROPY_COEF, KL_COEF, Problem
from benchmarks.timing.contender import Contender

Make = Callable[[Problem, Judge, Lineup], Case]


class Scratch:
    """A copy of the logits for those that write over them, restored before each run, outside the clock.

    Shared by the contenders of a case.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem, self.work = problem, None

    def memory(self) -> Tensor:
        if self.work is None:
            self.work = torch.empty_like(self.problem.logits)
        return self.work

    def inputs(self, buffer: int) -> tuple[Tensor, Tensor]:
        return self.memory().copy_(self.problem.copies[buffer]), self.problem.targets

    def leaves(self, buffer: int) -> tuple[Tensor]:
        # No leaf: the values of a leaf may not be given up, those of what a model computed may.
        return (self.memory().detach().copy_(self.problem.leaf(buffer)),)


def reading(problem: Problem, check: Callable) -> Callable[..., Contender]:
    """The maker of contenders that read the logits once: functions of ``(logits, targets)``, without a graph."""

    def make(name: str, function: Callable, **options: object) -> Contender:
        return Contender(name, without_grad(function), **{"prepare": problem.inputs, "check": check, **options})

    return make


def training(problem: Problem, check: Callable, upstream: Tensor | None = None) -> Callable[..., Contender]:
    """The maker of contenders forward and backward: functions of ``(logits, targets)`` and the further columns."""

    def make(name: str, function: Callable, columns: tuple = (), **options: object) -> Contender:
        run = differentiated(lambda leaf: function(leaf, problem.targets, *columns), upstream)
        return Contender(name, run, **{"prepare": problem.leaves, "check": check, **options})

    return make


def case(
    name: str, problem: Problem, judge: Judge, contenders: list[Contender], passes: str, reads: int, writes: int
) -> Case:
    """The case whose work reads and writes the logits so often at least."""
    moved = reads * problem.bytes, writes * problem.bytes
    return Case(name, contenders, judge.slack, problem.shape, passes, *moved, buffers=len(problem.copies))


def joined(*remarks: str) -> str:
    return "; ".join(filter(None, remarks))


def logprobs_of(score: Score) -> Callable[[Tensor, Tensor], Tensor]:
    return score.logprobs or (lambda logits, targets: score.stats(logits, targets)[0])


def stats(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    found = rlkernels.token_stats(logits, targets, outputs=("entropy",))
    return found.logprobs, found.entropy


def in_place(logits: Tensor, targets: Tensor) -> Tensor:
    return rlkernels.token_logprobs(logits, targets, inplace_backward=True)


def policy_loss(
    logits: Tensor, targets: Tensor, old: Tensor, ref: Tensor, advantages: Tensor, inplace: bool = False
) -> Tensor:
    return rlkernels.logits_policy_loss(
        logits,
        targets,
        old,
        advantages,
        objective="ppo_clip",
        clip_low=CLIP_LOW,
        clip_high=CLIP_HIGH,
        ref_logprobs=ref,
        kl="k3",
        kl_coef=KL_COEF,
        entropy_coef=ENTROPY_COEF,
        inplace_backward=inplace,
    )


def forward(problem: Problem, judge: Judge, lineup: Lineup) -> Case:
    make, scratch = reading(problem, judge.check("logp")), Scratch(problem)
    others = [
        make(s.name, logprobs_of(s), prepare=scratch.inputs if s.writes else problem.inputs, remark=s.remark)
        for s in lineup.scores
    ]
    everyone = lineup.contenders(make, rlkernels.token_logprobs, compositions.log_softmax_gather, others)
    return case(FORWARD, problem, judge, everyone, "1R", 1, 0)


def logprobs(problem: Problem, judge: Judge, lineup: Lineup) -> Case:
    make, scratch = training(problem, judge.check("logp", gradients=("dlogp",)), problem.dlogp), Scratch(problem)
    others = [
        make(label + IN_PLACE, function, prepare=scratch.leaves, ours=True)
        for label, function in lineup.fused(in_place).items()
    ]
    for s in lineup.scores:
        remark = joined("" if s.logprobs else "entropy too", s.remark)
        prepare = scratch.leaves if s.writes else problem.leaves
        others.append(make(s.name, logprobs_of(s), prepare=prepare, remark=remark))
    everyone = lineup.contenders(make, rlkernels.token_logprobs, compositions.log_softmax_gather, others)
    return case(LOGPROBS, problem, judge, everyone, "2R+1W", 2, 1)


def statistics(problem: Problem, judge: Judge, lineup: Lineup) -> Case:
    make, scratch, others = reading(problem, judge.check("logp", "entropy")), Scratch(problem), []
    for s in lineup.scores:
        prepare = scratch.inputs if s.writes else problem.inputs
        if s.stats:
            others.append(make(s.name, s.stats, prepare=prepare, remark=s.remark))
        else:
            remark = joined("log-probability only", s.remark)
            others.append(make(s.name, s.logprobs, prepare=prepare, remark=remark, check=judge.check("logp")))
    return case(STATS, problem, judge, lineup.contenders(make, stats, compositions.stats, others), "1R", 1, 0)


def policy(problem: Problem, judge: Judge, lineup: Lineup, others: Iterable[Contender] = ()) -> Case:
    train = training(problem, judge.check("loss", gradients=("dpolicy",)))

    def make(name: str, function: Callable, **options: object) -> Contender:
        return train(name, function, problem.columns, **options)

    everyone = lineup.contenders(make, policy_loss, compositions.policy, others)
    return case(POLICY, problem, judge, everyone, "1R+1W", 1, 1)
