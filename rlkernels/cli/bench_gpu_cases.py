"""The measured cases over logits: what is computed, by whom, which floor holds, and how each answer is judged."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import rlkernels
from rlkernels import ops
from rlkernels.backends import DEVICES, absent
from rlkernels.cli import bench_gpu_peers, bench_problem
from rlkernels.cli.bench_gpu_device import backend
from rlkernels.cli.bench_gpu_peers import PEERS
from rlkernels.cli.bench_gpu_problem import SEQUENCES, Judge, Problem, kl_composition, two_upstream
from rlkernels.cli.bench_gpu_timing import Entry, Roofline
from rlkernels.cli.bench_problem import CLIP_HIGH, CLIP_LOW, ENTROPY_COEF, KL_COEF

STATS = "token_stats (entropy) forward"
LOGP = "token_logprobs forward+backward"
POLICY = "logits_policy_loss forward+backward"
TWO = "two models: logprob, entropy, exact KL, forward"
TWO_BOTH = "two models: logprob, entropy, exact KL, forward+backward"

EAGER, COMPILED = "torch eager", "torch.compile"
IN_PLACE, ONE_LAUNCH = ", in place", ", op with the gradient in the forward"


@dataclass
class Case:
    """``reads`` and ``writes``: bytes that the work must move at least, ``flops``: products and sums in it; ``passes``:
    the same in words.
    """

    name: str
    entries: list[Entry]
    passes: str
    reads: int
    writes: int
    slack: dict[str, float] = field(default_factory=dict)
    buffers: int = 1
    shape: tuple[int, ...] = ()
    flops: int = 0

    def named(self, name: str) -> Entry | None:
        return next((e for e in self.entries if e.name == name and not e.failed), None)

    def floor(self, roof: Roofline) -> float:
        """Seconds that this work takes at least on the device whose roofline was measured."""
        return max(roof.floor(self.reads, self.writes), self.flops / roof.matmul)


def ours(device_type: str) -> dict[str, str]:
    """Label to the backend that is forced; ``auto`` forces none and is what a caller gets."""
    present = [name for name in DEVICES[device_type] if name != "eager" and absent(name) is None]
    return {"rlkernels auto": "auto", **{f"rlkernels {name}": name for name in present}}


def compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False, fullgraph=True)


def on(name: str, function: Callable) -> Callable:
    """``function`` with backend ``name`` serving. The backward keeps the backend of its forward."""
    if name == "auto":
        return function

    def run(*arguments: object) -> object:
        with backend(name):
            return function(*arguments)

    return run


def differentiated(function: Callable[[Tensor], object], upstream: object = None) -> Callable[[Tensor], tuple]:
    """Forward and backward through ``torch.autograd.grad``: no copy into ``.grad`` is timed or counted."""

    def run(leaf: Tensor) -> tuple:
        outputs = function(leaf)
        (grad,) = torch.autograd.grad(outputs, leaf, upstream)
        return outputs, grad

    return run


def without_grad(function: Callable[[int], object]) -> Callable[[int], object]:
    def run(state: object) -> object:
        with torch.no_grad():
            return function(state)

    return run


class Scratch:
    """A copy of the logits for those that write over them, restored before each run, outside the clock.

    Shared by the entries of a case.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem, self.work = problem, None

    def __call__(self, buffer: int) -> Tensor:
        if self.work is None:
            self.work = torch.empty_like(self.problem.logits)
        # No leaf: the values of a leaf may not be given up, those of what a model computed may.
        return self.work.detach().copy_(self.problem.leaf(buffer))


def row_slack(judge: Judge) -> dict[str, float]:
    """``4 eps32 max(1, |R|)`` of each row quantity, ``2e-6 max(1, |R|)`` of the loss."""
    four, found = 4 * torch.finfo(torch.float32).eps, {"loss": 2e-6 * max(1.0, abs(judge.truth.loss.item()))}
    for name in ("logp", "entropy", "ref_logp", "kl"):
        value = getattr(judge.truth, name)
        if value is not None:
            found[name] = four * max(1.0, value.abs().max().item())
    return found


def case(name: str, problem: Problem, judge: Judge, entries: list[Entry], passes: str, reads: int, writes: int) -> Case:
    size = problem.bytes
    return Case(
        name, entries, passes, reads * size, writes * size, row_slack(judge), len(problem.copies), problem.shape
    )


def statistics(problem: Problem, judge: Judge, peers: dict[str, Callable], compile_too: bool) -> Case:
    y = problem.targets

    def both(outputs: tuple) -> dict[str, float]:
        return judge.row(logp=outputs[0], entropy=outputs[1])

    def our_stats(x: Tensor) -> tuple[Tensor, Tensor]:
        found = rlkernels.token_stats(x, y, outputs=("entropy",))
        return found.logprobs, found.entropy

    def entry(label: str, function: Callable, check: Callable = both, **rest: object) -> Entry:
        return Entry(
            label, without_grad(lambda buffer: function(problem.copies[buffer])), lambda buffer: buffer, check, **rest
        )

    entries = [entry(label, on(name, our_stats), ours=True) for label, name in ours(problem.logits.device.type).items()]
    if "trl" in peers:
        entries.append(entry(PEERS["trl"].name, lambda x: peers["trl"](x, y)))
    scratch = Scratch(problem)
    for label, (remark, function, writes) in bench_gpu_peers.cross_entropies(peers).items():
        remark = "; ".join(filter(None, ("log-probability only", remark)))
        made = entry(label, lambda x, f=function: f(x, y), lambda logp: judge.row(logp=logp), remark=remark)
        if writes:
            made.prepare, made.run = scratch, without_grad(lambda leaf, f=function: f(leaf.detach(), y))
        entries.append(made)
    entries.append(entry(EAGER, lambda x: bench_problem.stats(x, y)))
    if compile_too:
        fast = compiled(bench_problem.stats)
        entries.append(entry(COMPILED, lambda x: fast(x, y)))
    return case(STATS, problem, judge, entries, "1R", 1, 0)


def logprobs(problem: Problem, judge: Judge, peers: dict[str, Callable], compile_too: bool) -> Case:
    y, g, scratch = problem.targets, problem.dlogp, Scratch(problem)

    def check(outputs: tuple) -> dict[str, float]:
        return {**judge.row(logp=outputs[0]), **judge.gradient(outputs[1], "dlogp")}

    def entry(label: str, function: Callable, prepare: Callable = problem.leaf, **rest: object) -> Entry:
        return Entry(label, differentiated(lambda leaf: function(leaf, y), g), prepare, check, **rest)

    def in_place(logits: Tensor, targets: Tensor) -> Tensor:
        return rlkernels.token_logprobs(logits, targets, inplace_backward=True)

    entries = []
    for label, name in ours(problem.logits.device.type).items():
        entries.append(entry(label, on(name, rlkernels.token_logprobs), ours=True))
        entries.append(entry(label + IN_PLACE, on(name, in_place), scratch, ours=True))
    if "trl" in peers:
        entries.append(entry(PEERS["trl"].name, lambda x, t: peers["trl"](x, t)[0], remark="entropy too"))
    for label, (remark, function, writes) in bench_gpu_peers.cross_entropies(peers).items():
        entries.append(entry(label, function, scratch if writes else problem.leaf, remark=remark))
    entries.append(entry(EAGER, bench_problem.log_softmax_gather))
    if compile_too:
        entries.append(entry(COMPILED, compiled(bench_problem.log_softmax_gather)))
    return case(LOGP, problem, judge, entries, "2R+1W", 2, 1)


def policy(problem: Problem, judge: Judge, peers: dict[str, Callable], compile_too: bool) -> Case:
    y, tokens, scratch = problem.targets, problem.targets.numel(), Scratch(problem)
    columns = (problem.old_logprobs, problem.ref_logprobs, problem.advantages)

    def check(outputs: tuple) -> dict[str, float]:
        return {**judge.loss(outputs[0]), **judge.gradient(outputs[1], "dpolicy")}

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
        label: str, function: Callable, prepare: Callable = problem.leaf, judged: Callable = check, **rest: object
    ) -> Entry:
        return Entry(label, differentiated(function), prepare, judged, **rest)

    share = torch.full_like(problem.old_logprobs, 1.0 / tokens)
    bonus, penalty = share * ENTROPY_COEF, share * KL_COEF
    old_and_advantage, one, params = [columns[0], columns[2]], ops.number(1.0), ops.numbers((CLIP_LOW, CLIP_HIGH))

    def one_launch(name: str) -> Callable[[int], tuple]:
        serving = ops.serving("fused_policy", problem.logits) if name == "auto" else name
        return without_grad(
            lambda buffer: ops.fused_policy_op(
                "ppo_clip",
                problem.copies[buffer],
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
        )

    entries = []
    for label, name in ours(problem.logits.device.type).items():
        entries.append(entry(label, on(name, our_loss), ours=True))
        entries.append(entry(label + IN_PLACE, on(name, lambda logits: our_loss(logits, True)), scratch, ours=True))
        entries.append(Entry(label + ONE_LAUNCH, one_launch(name), lambda buffer: buffer, check, ours=True))
    # The gradient of a mean over fewer rows, without the entropy term; rows that end a sequence are not in it.
    length = tokens // SEQUENCES
    inside = (judge.rows + 1) % max(length, 1) != 0
    scale = length / (length - 1) if length > 1 else 1.0

    def without_entropy(outputs: tuple) -> dict[str, float]:
        return judge.gradient(outputs[1], "dpolicy_without_entropy", inside, scale)

    if length > 1 and tokens % SEQUENCES == 0:
        if "liger_grpo" in peers:
            run = bench_gpu_peers.liger_policy(peers["liger_grpo"], problem, CLIP_LOW, CLIP_HIGH, KL_COEF, SEQUENCES)
            entries.append(
                entry(PEERS["liger_grpo"].name, run, scratch, without_entropy, remark=PEERS["liger_grpo"].remark)
            )
        if "fla_grpo" in peers:
            run = bench_gpu_peers.fla_policy(peers["fla_grpo"], problem, KL_COEF, SEQUENCES)
            entries.append(
                entry(PEERS["fla_grpo"].name, run, problem.leaf, lambda outputs: {}, remark=PEERS["fla_grpo"].remark)
            )
    if "trl" in peers:
        entries.append(
            entry(
                PEERS["trl"].name + " and torch",
                lambda leaf: bench_problem.policy_terms(*peers["trl"](leaf, y), *columns).mean(),
            )
        )
    entries.append(entry(EAGER, lambda leaf: bench_problem.policy(leaf, y, *columns)))
    if compile_too:
        fast = compiled(bench_problem.policy)
        entries.append(entry(COMPILED, lambda leaf: fast(leaf, y, *columns)))
    return case(POLICY, problem, judge, entries, "1R+1W", 1, 1)


def two_models(
    problem: Problem, judge: Judge, peers: dict[str, Callable], compile_too: bool, backward: bool = False
) -> Case:
    y, upstream = problem.targets, two_upstream(problem)

    def rows(outputs: tuple) -> dict[str, float]:
        return judge.row(logp=outputs[0], entropy=outputs[1], ref_logp=outputs[2], kl=outputs[3])

    def our_stats(x: Tensor, ref: Tensor) -> tuple:
        found = rlkernels.token_stats(x, y, ref_logits=ref, kl="exact", outputs=("entropy",))
        return found.logprobs, found.entropy, found.ref_logprobs, found.kl

    def entry(label: str, function: Callable, **rest: object) -> Entry:
        if not backward:
            run = without_grad(lambda buffer: function(problem.copies[buffer], problem.ref_copies[buffer]))
            return Entry(label, run, lambda buffer: buffer, rows, **rest)

        def both(state: tuple) -> tuple:
            leaf, ref = state
            outputs = function(leaf, ref)
            return outputs, torch.autograd.grad((outputs[0], outputs[1], outputs[3]), leaf, upstream)[0]

        return Entry(
            label,
            both,
            lambda buffer: (problem.leaf(buffer), problem.ref_copies[buffer]),
            lambda o: {**rows(o[0]), **judge.gradient(o[1], "dtwo")},
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
