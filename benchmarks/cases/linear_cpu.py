"""The cases of the fused head on a CPU."""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

import rlkernels
from benchmarks import peers as libraries
from benchmarks.cases import divergence, linear
from benchmarks.cases.case import EAGER, OURS, Case, differentiated
from benchmarks.cases.linear import Make
from benchmarks.judge import EPS
from benchmarks.lineup import Lineup
from benchmarks.peers import PEERS
from benchmarks.problems import linear as problems
from benchmarks.problems.linear import Problem
from benchmarks.problems.logits import masked_ppo
from benchmarks.timing.contender import Contender

HALF, TRL, LIGER = f"{OURS}, half of the tokens masked", PEERS["trl_chunked"].name, PEERS["liger_chunked"].name
BETA, ANSWER, CHUNK = 0.1, 128, 256
TORCH, TORCH_CHUNKED = "F.linear_cross_entropy", f"F.linear_cross_entropy, chunks of {CHUNK}"


def floor(count: int) -> str:
    return f"{count} bare products"


def build(kind: str, p: Problem, lineup: Lineup, fused: Callable, count: int, **options: object) -> Case:
    """Full logits in bf16 err by their rounding, so there torch's own error counts for nothing."""
    rules = {"kind": kind, "dtype": p.dtype, "products": count, "beside_torch": p.dtype == "fp32"}
    name = f"{kind} forward+backward, {p.dtype} {list(p.shape)}"
    return linear.build(name, p, lineup, fused, count=count, floor=floor(count), **rules, **options)


def policy(p: Problem, lineup: Lineup) -> Case:
    fused, loss = linear.ppo_loss(p)
    others = {LIGER: linear.liger_policy(lineup.peers["liger_chunked"], p)} if "liger_chunked" in lineup.peers else {}

    def half_loss(logp: Tensor) -> Tensor:
        return masked_ppo(logp, p.old_logprobs, p.advantages, p.half)

    judge, run = problems.judge(p, half_loss), differentiated(lambda h, w: fused(h, w, p.half))
    half = Contender(HALF, run, p.leaves, judge.everything, ours=True, slack=judge.slack)
    return build("linear_policy_loss", p, lineup, fused, 3, loss=loss, others=others, further=[half])


def statistics(p: Problem, lineup: Lineup) -> Case:
    return build("linear_token_stats", p, lineup, linear.token_stats(p), 4, entropy=True)


def dpo(p: Problem, lineup: Lineup) -> Case:
    """Answers of equal length; a reference that is near, so that no pair is decided."""
    length = min(ANSWER, p.shape[0] // 2)
    pairs = p.shape[0] // length // 2
    part = problems.first(p, 2 * pairs * length)

    def sums(logp: Tensor) -> tuple[Tensor, Tensor]:
        total = logp.view(2 * pairs, length).sum(1)
        return total[:pairs], total[pairs:]

    near = [s + 3.0 * p.dlogp[:pairs].double() * sign for s, sign in zip(sums(part.truth.logp), (1, -1), strict=True)]
    references = [s.float() for s in near]

    def loss(logp: Tensor) -> Tensor:
        chosen, rejected = sums(logp)
        return -F.logsigmoid(BETA * ((chosen - references[0]) - (rejected - references[1]))).mean()

    def fused(h: Tensor, w: Tensor) -> Tensor:
        return rlkernels.linear_dpo_loss(
            h.view(2 * pairs, length, -1),
            w,
            part.targets.view(2 * pairs, length),
            beta=BETA,
            ref_chosen_logps=references[0],
            ref_rejected_logps=references[1],
        )

    # A sum over an answer in fp32 is known to so much, whoever forms it.
    slack = BETA * 4 * EPS * max(s.abs().max().item() for s in near)
    return build("linear_dpo_loss", part, lineup, fused, 3, loss=loss, slack=slack)


def sft(p: Problem, lineup: Lineup) -> Case:
    others, (tokens, hidden, _) = {}, p.shape
    if hasattr(F, "linear_cross_entropy"):
        others[TORCH] = lambda h, w: F.linear_cross_entropy(h, w, p.targets)
    # For fewer tokens torch itself advises against chunks.
    if hasattr(torch.nn, "LinearCrossEntropyOptions") and tokens >= max(hidden, CHUNK):
        # Its own choice for [512, 512, 32000], 8 rows or so, took 9 times as long on a Zen 4.
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK)
        others[TORCH_CHUNKED] = lambda h, w: F.linear_cross_entropy(h, w, p.targets, options=options)

    def fused(h: Tensor, w: Tensor) -> Tensor:
        return rlkernels.linear_sft_loss(h, w, p.targets)

    lineup = replace(lineup, peers={})  # torch's own fused loss is the peer here
    return build("linear_sft_loss", p, lineup, fused, 3, loss=lambda logp: -logp.mean(), others=others)


def distillation(p: Problem, lineup: Lineup) -> Case:
    """The JSD with beta 1/2 from a teacher of the same size, a little softer, whose logits differ by 0.6.

    Not from one that agrees in nothing: the JSD is then at its bound of log 2, where the gradient is 1e-5 of its own
    terms and no fp32 can tell it.
    """
    noise = torch.randn(p.hidden.shape, generator=torch.Generator().manual_seed(1))
    teacher = (p.hidden.float() + 0.3 * noise).to(p.hidden.dtype), p.weight * 0.95
    wide = teacher[1].double()

    def theirs(rows: Tensor) -> Tensor:
        return teacher[0][rows].double() @ wide.T

    judge = problems.judge_of_logits(p, lambda z, rows: divergence.composed("jsd", z, theirs(rows)))
    functions = {EAGER: lambda h, w: divergence.composed("jsd", h @ w.T, teacher[0] @ teacher[1].T)}
    if "trl_divergence" in lineup.peers:
        function = lineup.peers["trl_divergence"]
        functions[PEERS["trl_divergence"].name] = lambda h, w: function(h, w, None, *teacher, None, 0.5)[0].mean()
    if "liger_jsd" in lineup.peers:
        loss = lineup.peers["liger_jsd"](weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=False)
        functions[PEERS["liger_jsd"].name] = lambda h, w: loss(h, w, *teacher, p.targets)

    def fused(h: Tensor, w: Tensor) -> Tensor:
        return rlkernels.linear_distillation_loss(h, w, *teacher, kind="jsd")

    kind, rules = "linear_distillation_loss", {"dtype": p.dtype, "products": 4, "beside_torch": p.dtype == "fp32"}
    if p.dtype == "bf16":
        # A divergence spreads the gradient of a row over its logits. A matmul of bf16 rounds them, and gives back what
        # this took from the 40 largest alone: 1.07 roundings in all with AVX512_BF16, and 1.4 at most.
        rules["roundings"] = 1.5
    name = f"{kind} (jsd) forward+backward, {p.dtype} {list(p.shape)}"
    return linear.beside(name, p, lineup, fused, functions, judge, count=4, floor=floor(4), kind=kind, **rules)


CASES: dict[str, Make] = {
    "linear_policy_loss": policy,
    "linear_token_stats": statistics,
    "linear_dpo_loss": dpo,
    "linear_sft_loss": sft,
    "linear_distillation_loss": distillation,
}


def peers() -> tuple[dict[str, Callable], list[str]]:
    """Fused heads of other libraries that run on a CPU, and one line for each that is not here."""
    found, remarks = {}, []
    for key in ("trl_chunked", "liger_chunked", "trl_divergence", "liger_jsd"):
        function, line = libraries.load(key)
        if function is None:
            remarks.append(line)
        else:
            found[key] = function
    return found, remarks
