"""The measured cases: what is computed, by whom, and how each answer is judged."""

from collections.abc import Callable

import torch
from torch import Tensor

import rlkernels
from benchmarks.cases.case import COMPILED, EAGER, IN_PLACE, OURS, Case, compiled, differentiated, without_grad
from benchmarks.judge import Judge
from benchmarks.problems import logits as logits_problem
from benchmarks.problems.logits import CLIP_HIGH, CLIP_LOW, ENTROPY_COEF, KL_COEF, Problem
from benchmarks.timing.contender import Contender

FORWARD = "token_logprobs forward"
BOTH = "token_logprobs forward+backward"
STATS = "token_stats (entropy) forward"
POLICY = "logits_policy_loss forward+backward"

OUR_IN_PLACE, TRL = OURS + IN_PLACE, "TRL (torch path)"
PASS_FORWARD, PASS_BACKWARD = "token_stats forward", "token_stats backward"


def reading(name: str, problem: Problem, judge: Judge, entries: dict[str, Callable], check: Callable) -> Case:
    """A case of functions of ``(logits, targets)`` without a gradient: they read the logits once."""
    return Case(
        name,
        [Contender(n, without_grad(f), problem.inputs, check, ours=n == OURS) for n, f in entries.items()],
        judge.slack,
        reads=problem.bytes,
    )


def forward(problem: Problem, judge: Judge, peers: dict[str, Callable]) -> Case:
    eager = logits_problem.log_softmax_gather
    entries = {OURS: rlkernels.token_logprobs, EAGER: eager, COMPILED: compiled(eager)}
    if "selective_log_softmax" in peers:
        entries[TRL] = peers["selective_log_softmax"]
    return reading(FORWARD, problem, judge, entries, judge.check("logp"))


def both(problem: Problem, judge: Judge, peers: dict[str, Callable]) -> Case:
    y, g = problem.targets, problem.dlogp
    work = problem.logits.clone()

    def restored(_: int) -> tuple[Tensor]:
        # No leaf: the values of a leaf may not be given up, those of what a model computed may.
        return (work.detach().copy_(problem.leaf()),)

    def in_place(logits: Tensor, targets: Tensor) -> Tensor:
        return rlkernels.token_logprobs(logits, targets, inplace_backward=True)

    def contender(name: str, function: Callable, prepare: Callable[[int], tuple[Tensor]] = problem.leaves) -> Contender:
        run = differentiated(lambda leaf: function(leaf, y), g)
        return Contender(
            name, run, prepare, judge.check("logp", gradients=("dlogp",)), ours=name in (OURS, OUR_IN_PLACE)
        )

    entries = [
        contender(OURS, rlkernels.token_logprobs),
        contender(OUR_IN_PLACE, in_place, restored),
        contender(EAGER, logits_problem.log_softmax_gather),
        contender(COMPILED, compiled(logits_problem.log_softmax_gather)),
    ]
    if "selective_log_softmax" in peers:
        entries.append(contender(TRL, peers["selective_log_softmax"]))
    return Case(BOTH, entries, judge.slack, reads=2 * problem.bytes, writes=problem.bytes)


def our_stats(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    found = rlkernels.token_stats(logits, targets, outputs=("entropy",))
    return found.logprobs, found.entropy


def statistics(problem: Problem, judge: Judge, peers: dict[str, Callable]) -> Case:
    entries = {OURS: our_stats, EAGER: logits_problem.stats, COMPILED: compiled(logits_problem.stats)}
    if {"selective_log_softmax", "entropy_from_logits"} <= peers.keys():
        entries[TRL] = lambda x, y: (peers["selective_log_softmax"](x, y), peers["entropy_from_logits"](x))
    return reading(STATS, problem, judge, entries, judge.check("logp", "entropy"))


def policy(problem: Problem, judge: Judge, peers: dict[str, Callable]) -> Case:
    y, columns = problem.targets, problem.columns

    def ours(leaf: Tensor) -> Tensor:
        return rlkernels.logits_policy_loss(
            leaf,
            y,
            problem.old_logprobs,
            problem.advantages,
            objective="ppo_clip",
            clip_low=CLIP_LOW,
            clip_high=CLIP_HIGH,
            ref_logprobs=problem.ref_logprobs,
            kl="k3",
            kl_coef=KL_COEF,
            entropy_coef=ENTROPY_COEF,
        )

    def torch_loss(function: Callable) -> Callable[[Tensor], Tensor]:
        return lambda leaf: function(leaf, y, *columns)

    upstream = (problem.dlogp, -ENTROPY_COEF * torch.ones_like(problem.dlogp))

    def graph(_: int) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        leaf = problem.leaf()
        return leaf, our_stats(leaf, y)

    def contender(name: str, function: Callable[[Tensor], Tensor]) -> Contender:
        return Contender(
            name,
            differentiated(function),
            problem.leaves,
            judge.check("loss", gradients=("dpolicy",)),
            ours=name == OURS,
        )

    return Case(
        POLICY,
        [
            contender(OURS, ours),
            Contender(
                PASS_FORWARD,
                lambda leaves: our_stats(*leaves, y),
                problem.leaves,
                judge.check("logp", "entropy"),
                problem.bytes,
                ours=True,
            ),
            Contender(PASS_BACKWARD, lambda s: torch.autograd.grad(s[1], s[0], upstream), graph, ours=True),
            contender(EAGER, torch_loss(logits_problem.policy)),
            contender(COMPILED, torch_loss(compiled(logits_problem.policy))),
        ],
        judge.slack,
        reads=problem.bytes,
        writes=problem.bytes,
    )


CASES: dict[str, Callable[[Problem, Judge, dict[str, Callable]], Case]] = {
    FORWARD: forward,
    BOTH: both,
    STATS: statistics,
    POLICY: policy,
}


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
