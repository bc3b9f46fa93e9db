"""The measured cases over logits: what is computed, by whom, which floor holds, and how each answer is judged."""

from collections.abc import Callable

import torch
from torch import Tensor

import rlkernels
from benchmarks import peers as peer_libraries
from benchmarks.cases.case import COMPILED, EAGER, IN_PLACE, Case, compiled, differentiated, on, ours, without_grad
from benchmarks.judge import Judge
from benchmarks.peers import PEERS
from benchmarks.problems import logits as logits_problem
from benchmarks.problems.logits import CLIP_HIGH, CLIP_LOW, ENTROPY_COEF, KL_COEF, Problem, kl_composition, two_upstream
from benchmarks.timing.contender import Contender
from rlkernels import ops

STATS = "token_stats (entropy) forward"
LOGP = "token_logprobs forward+backward"
POLICY = "logits_policy_loss forward+backward"
TWO = "two models: logprob, entropy, exact KL, forward"
TWO_BOTH = "two models: logprob, entropy, exact KL, forward+backward"

SEQUENCES = 8
"""The rows of a batch are so many sequences of equal length: some peers take [B, L + 1, V] and one advantage per
sequence.
"""
CHECKED = 16
ONE_LAUNCH = ", op with the gradient in the forward"


def make(device: torch.device, tokens: int, vocab: int, dtype: str, cache: int, reference: bool = False) -> Problem:
    return logits_problem.make(
        device, tokens, vocab, dtype, cache=cache, reference=reference, sequences=SEQUENCES, checked=CHECKED
    )


class Scratch:
    """A copy of the logits for those that write over them, restored before each run, outside the clock.

    Shared by the contenders of a case.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem, self.work = problem, None

    def __call__(self, buffer: int) -> tuple[Tensor]:
        if self.work is None:
            self.work = torch.empty_like(self.problem.logits)
        # No leaf: the values of a leaf may not be given up, those of what a model computed may.
        return (self.work.detach().copy_(self.problem.leaf(buffer)),)


def case(
    name: str, problem: Problem, judge: Judge, entries: list[Contender], passes: str, reads: int, writes: int
) -> Case:
    return Case(
        name,
        entries,
        judge.slack,
        problem.shape,
        passes,
        reads * problem.bytes,
        writes * problem.bytes,
        buffers=len(problem.copies),
    )


def statistics(problem: Problem, judge: Judge, peers: dict[str, Callable], compile_too: bool) -> Case:
    y = problem.targets

    both = judge.check("logp", "entropy")

    def our_stats(x: Tensor) -> tuple[Tensor, Tensor]:
        found = rlkernels.token_stats(x, y, outputs=("entropy",))
        return found.logprobs, found.entropy

    def entry(label: str, function: Callable, check: Callable = both, **rest: object) -> Contender:
        return Contender(label, without_grad(function), lambda buffer: (problem.copies[buffer],), check, **rest)

    entries = [entry(label, on(name, our_stats), ours=True) for label, name in ours(problem.logits.device.type).items()]
    if "trl" in peers:
        entries.append(entry(PEERS["trl"].name, lambda x: peers["trl"](x, y)))
    scratch = Scratch(problem)
    for label, (remark, function, writes) in peer_libraries.cross_entropies(peers).items():
        remark = "; ".join(filter(None, ("log-probability only", remark)))
        made = entry(label, lambda x, f=function: f(x, y), judge.check("logp"), remark=remark)
        if writes:
            made.prepare, made.run = scratch, without_grad(lambda leaf, f=function: f(leaf.detach(), y))
        entries.append(made)
    entries.append(entry(EAGER, lambda x: logits_problem.stats(x, y)))
    if compile_too:
        fast = compiled(logits_problem.stats)
        entries.append(entry(COMPILED, lambda x: fast(x, y)))
    return case(STATS, problem, judge, entries, "1R", 1, 0)


def logprobs(problem: Problem, judge: Judge, peers: dict[str, Callable], compile_too: bool) -> Case:
    y, g, scratch = problem.targets, problem.dlogp, Scratch(problem)

    check = judge.check("logp", gradients=("dlogp",))

    def entry(label: str, function: Callable, prepare: Callable = problem.leaves, **rest: object) -> Contender:
        return Contender(label, differentiated(lambda leaf: function(leaf, y), g), prepare, check, **rest)

    def in_place(logits: Tensor, targets: Tensor) -> Tensor:
        return rlkernels.token_logprobs(logits, targets, inplace_backward=True)

    entries = []
    for label, name in ours(problem.logits.device.type).items():
        entries.append(entry(label, on(name, rlkernels.token_logprobs), ours=True))
        entries.append(entry(label + IN_PLACE, on(name, in_place), scratch, ours=True))
    if "trl" in peers:
        entries.append(entry(PEERS["trl"].name, lambda x, t: peers["trl"](x, t)[0], remark="entropy too"))
    for label, (remark, function, writes) in peer_libraries.cross_entropies(peers).items():
        entries.append(entry(label, function, scratch if writes else problem.leaves, remark=remark))
    entries.append(entry(EAGER, logits_problem.log_softmax_gather))
    if compile_too:
        entries.append(entry(COMPILED, compiled(logits_problem.log_softmax_gather)))
    return case(LOGP, problem, judge, entries, "2R+1W", 2, 1)


def policy(problem: Problem, judge: Judge, peers: dict[str, Callable], compile_too: bool) -> Case:
    y, tokens, scratch = problem.targets, problem.targets.numel(), Scratch(problem)
    columns = problem.columns

    check = judge.check("loss", gradients=("dpolicy",))

    def our_loss(leaf: Tensor, inplace: bool = False) -> Tensor:
        return rlkernels.logits_policy_loss(
            leaf,
            y,
            columns[0],
            columns[2],
            objective="ppo_clip",
            clip_low=CLIP_LOW,
            clip_high=CLIP_HIGH,
            ref_logprobs=columns[1],
            kl="k3",
            kl_coef=KL_COEF,
            entropy_coef=ENTROPY_COEF,
            inplace_backward=inplace,
        )

    def entry(
        label: str, function: Callable, prepare: Callable = problem.leaves, judged: Callable = check, **rest: object
    ) -> Contender:
        return Contender(label, differentiated(function), prepare, judged, **rest)

    share = torch.full_like(problem.old_logprobs, 1.0 / tokens)
    bonus, penalty = share * ENTROPY_COEF, share * KL_COEF
    old_and_advantage, one, params = [columns[0], columns[2]], ops.number(1.0), ops.numbers((CLIP_LOW, CLIP_HIGH))

    def one_launch(name: str) -> Callable[[tuple[Tensor]], tuple]:
        serving = ops.serving("fused_policy", problem.logits) if name == "auto" else name

        def run(logits: Tensor) -> tuple[Tensor, tuple[Tensor]]:
            loss, grad = ops.fused_policy_op(
                "ppo_clip",
                logits,
                y,
                one,
                -100,
                None,
                old_and_advantage,
                params,
                share,
                bonus,
                "k3",
                columns[1],
                penalty,
                True,
                False,
                serving,
            )[:2]
            return loss, (grad,)

        return without_grad(run)

    entries = []
    for label, name in ours(problem.logits.device.type).items():
        entries.append(entry(label, on(name, our_loss), ours=True))
        entries.append(entry(label + IN_PLACE, on(name, lambda logits: our_loss(logits, True)), scratch, ours=True))
        entries.append(
            Contender(label + ONE_LAUNCH, one_launch(name), lambda buffer: (problem.copies[buffer],), check, ours=True)
        )
    if "dgrpo" in judge.gradients:
        if "liger_grpo" in peers:
            run = peer_libraries.liger_policy(peers["liger_grpo"], problem, CLIP_LOW, CLIP_HIGH, KL_COEF)
            judged, remark = judge.check(gradients=("dgrpo",)), PEERS["liger_grpo"].remark
            entries.append(entry(PEERS["liger_grpo"].name, run, scratch, judged, remark=remark))
        if "fla_grpo" in peers:
            run = peer_libraries.fla_policy(peers["fla_grpo"], problem, KL_COEF)
            entries.append(
                entry(PEERS["fla_grpo"].name, run, problem.leaves, lambda outputs: {}, remark=PEERS["fla_grpo"].remark)
            )
    if "trl" in peers:
        entries.append(
            entry(
                PEERS["trl"].name + " and torch",
                lambda leaf: logits_problem.policy_terms(*peers["trl"](leaf, y), *columns).mean(),
            )
        )
    entries.append(entry(EAGER, lambda leaf: logits_problem.policy(leaf, y, *columns)))
    if compile_too:
        fast = compiled(logits_problem.policy)
        entries.append(entry(COMPILED, lambda leaf: fast(leaf, y, *columns)))
    return case(POLICY, problem, judge, entries, "1R+1W", 1, 1)


def two_models(
    problem: Problem, judge: Judge, peers: dict[str, Callable], compile_too: bool, backward: bool = False
) -> Case:
    y, upstream = problem.targets, two_upstream(problem)

    rows = ("logp", "entropy", "ref_logp", "kl")

    def our_stats(x: Tensor, ref: Tensor) -> tuple:
        found = rlkernels.token_stats(x, y, ref_logits=ref, kl="exact", outputs=("entropy",))
        return found.logprobs, found.entropy, found.ref_logprobs, found.kl

    def entry(label: str, function: Callable, **rest: object) -> Contender:
        if not backward:
            inputs = list(zip(problem.copies, problem.ref_copies, strict=True))
            return Contender(label, without_grad(function), inputs.__getitem__, judge.check(*rows), **rest)

        def both(state: tuple) -> tuple:
            leaf, ref = state
            outputs = function(leaf, ref)
            return outputs, torch.autograd.grad((outputs[0], outputs[1], outputs[3]), (leaf,), upstream)

        return Contender(
            label,
            both,
            lambda buffer: (problem.leaf(buffer), problem.ref_copies[buffer]),
            judge.check(*rows, gradients=("dtwo",)),
            **rest,
        )

    entries = [entry(label, on(name, our_stats), ours=True) for label, name in ours(problem.logits.device.type).items()]
    entries.append(entry(EAGER, lambda x, ref: kl_composition(x, ref, y)))
    if compile_too:
        fast = compiled(kl_composition)
        entries.append(entry(COMPILED, lambda x, ref: fast(x, ref, y)))
    if backward:
        return case(TWO_BOTH, problem, judge, entries, "4R+1W", 4, 1)
    return case(TWO, problem, judge, entries, "2R", 2, 0)


def two_models_both(*arguments: object) -> Case:
    return two_models(*arguments, backward=True)


CASES: dict[str, Callable[[Problem, Judge, dict[str, Callable], bool], Case]] = {
    STATS: statistics,
    LOGP: logprobs,
    POLICY: policy,
    TWO: two_models,
    TWO_BOTH: two_models_both,
}
WITH_REFERENCE = (TWO, TWO_BOTH)
