"""The measured cases of the fused head on a CPU: who computes what from hidden states and the head."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import rlkernels
from benchmarks import peers as peer_libraries
from benchmarks.cases.case import EAGER, OURS, Case, differentiated
from benchmarks.judge import EPS, Judge
from benchmarks.peers import PEERS
from benchmarks.problems import linear as linear_problem
from benchmarks.problems.linear import Problem, full_logits, ppo, products, products_check
from benchmarks.problems.linear import judge as judge_of
from benchmarks.problems.logits import CLIP_HIGH, CLIP_LOW
from benchmarks.timing.contender import Contender

HALF, TRL, LIGER = f"{OURS}, half of the tokens masked", PEERS["trl_chunked"].name, PEERS["liger_chunked"].name
BETA, ANSWER, CHUNK = 0.1, 128, 256
TORCH, TORCH_CHUNKED = "F.linear_cross_entropy", f"F.linear_cross_entropy, chunks of {CHUNK}"


def floor(count: int) -> str:
    return f"{count} bare products"


def gradient_bytes(shape: tuple[int, int, int]) -> int:
    """The two gradients of a head as they are summed, in fp32."""
    tokens, hidden, vocab = shape
    return 4 * hidden * (tokens + vocab)


def build(
    kind: str, p: Problem, dtype: str, count: int, judge: Judge, entries: dict[str, Callable], upstream: object = None
) -> Case:
    """``entries``: functions of ``(hidden, weight)``; every product that they cannot avoid is timed beside them."""
    tokens, hidden, vocab = p.shape
    contenders = [Contender(floor(count), products(p, count), check=products_check(p))]
    contenders += [
        Contender(name, differentiated(f, upstream), p.leaves, judge.everything, ours=name == OURS)
        for name, f in entries.items()
    ]
    return Case(
        f"{kind} forward+backward, {dtype} {list(p.shape)}",
        contenders,
        judge.slack,
        p.shape,
        flops=2 * count * tokens * hidden * vocab,
        beside_torch=dtype == "fp32",
        kind=kind,
        dtype=dtype,
        products=count,
    )


def trl_logprobs(
    chunked: Callable, targets: Tensor, outputs: tuple[str, ...] = ()
) -> Callable[[Tensor, Tensor], tuple]:
    """Log-probability and what else is asked for, in tiles of the size that TRL's trainers use."""
    return lambda h, w: chunked(h, w, None, targets, 1.0, 32768, None, 1.0, outputs)


def liger_policy(loss: type, p: Problem) -> Callable[[Tensor, Tensor], Tensor]:
    """Liger's chunked GRPO with an advantage per token: a batch of sequences of one token, in one chunk, which is its
    fastest.
    """
    tokens = p.shape[0]
    ones = torch.ones(tokens, 1, device=p.hidden.device)
    made = loss(
        beta=0.0,
        compiled=False,
        use_ref_model=False,
        chunk_size=tokens,
        epsilon_low=CLIP_LOW,
        epsilon_high=CLIP_HIGH,
        loss_type="bnpo",
    )

    def run(h: Tensor, w: Tensor) -> Tensor:
        return made(h[:, None], w, p.targets[:, None], ones, p.advantages, old_per_token_logps=p.old_logprobs[:, None])[
            0
        ]

    return run


def policy(p: Problem, dtype: str, peers: dict[str, Callable]) -> Case:
    columns = p.old_logprobs, p.advantages

    def ours(h: Tensor, w: Tensor, mask: Tensor | None = None) -> Tensor:
        return rlkernels.linear_policy_loss(h, w, p.targets, *columns, mask, clip_low=CLIP_LOW, clip_high=CLIP_HIGH)

    def torch_loss(logprobs: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda h, w: ppo(logprobs(h, w), *columns).mean()

    entries = {OURS: ours, EAGER: torch_loss(lambda h, w: full_logits(h, w, p.targets))}
    if "trl_chunked" in peers:
        score = trl_logprobs(peers["trl_chunked"], p.targets)
        entries[TRL] = torch_loss(lambda h, w: score(h, w)[0])
    if "liger_chunked" in peers:
        entries[LIGER] = liger_policy(peers["liger_chunked"], p)
    case = build("linear_policy_loss", p, dtype, 3, judge_of(p, lambda logp: ppo(logp, *columns).mean()), entries)
    judge = judge_of(p, lambda logp: torch.where(p.half, ppo(logp, *columns), 0.0).sum() / p.half.sum())
    run = differentiated(lambda h, w: ours(h, w, p.half))
    case.contenders.insert(2, Contender(HALF, run, p.leaves, judge.everything, ours=True, slack=judge.slack))
    return case


def statistics(p: Problem, dtype: str, peers: dict[str, Callable]) -> Case:
    def ours(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        found = rlkernels.linear_token_stats(h, w, p.targets)
        return found.logprobs, found.entropy

    def eager(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        logps = torch.log_softmax((h @ w.T).float(), -1)
        return logps.gather(1, p.targets[:, None])[:, 0], -(logps.exp() * logps).sum(-1)

    entries = {OURS: ours, EAGER: eager}
    if "trl_chunked" in peers:
        score = trl_logprobs(peers["trl_chunked"], p.targets, ("entropy",))
        entries[TRL] = lambda h, w: score(h, w)[:2]
    return build("linear_token_stats", p, dtype, 4, judge_of(p, dentropy=p.dentropy), entries, (p.dlogp, p.dentropy))


def dpo(p: Problem, dtype: str, peers: dict[str, Callable]) -> Case:
    """Answers of equal length; a reference that is near, so that no pair is decided."""
    length = min(ANSWER, p.shape[0] // 2)
    pairs = p.shape[0] // length // 2
    part = linear_problem.first(p, 2 * pairs * length)

    def sums(logp: Tensor) -> tuple[Tensor, Tensor]:
        total = logp.view(2 * pairs, length).sum(1)
        return total[:pairs], total[pairs:]

    near = [s + 3.0 * p.dlogp[:pairs].double() * sign for s, sign in zip(sums(part.truth.logp), (1, -1), strict=True)]
    references = [s.float() for s in near]

    def loss(logp: Tensor) -> Tensor:
        chosen, rejected = sums(logp)
        return -F.logsigmoid(BETA * ((chosen - references[0]) - (rejected - references[1]))).mean()

    def ours(h: Tensor, w: Tensor) -> Tensor:
        return rlkernels.linear_dpo_loss(
            h.view(2 * pairs, length, -1),
            w,
            part.targets.view(2 * pairs, length),
            beta=BETA,
            ref_chosen_logps=references[0],
            ref_rejected_logps=references[1],
        )

    entries = {OURS: ours, EAGER: lambda h, w: loss(full_logits(h, w, part.targets))}
    if "trl_chunked" in peers:
        score = trl_logprobs(peers["trl_chunked"], part.targets)
        entries[TRL] = lambda h, w: loss(score(h, w)[0])
    # A sum over an answer in fp32 is known to so much, whoever forms it.
    slack = BETA * 4 * EPS * max(s.abs().max().item() for s in near)
    return build("linear_dpo_loss", part, dtype, 3, judge_of(part, loss, further=slack), entries)


def sft(p: Problem, dtype: str, peers: dict[str, Callable]) -> Case:
    entries, (tokens, hidden, _) = {OURS: lambda h, w: rlkernels.linear_sft_loss(h, w, p.targets)}, p.shape
    if hasattr(F, "linear_cross_entropy"):
        entries[TORCH] = lambda h, w: F.linear_cross_entropy(h, w, p.targets)
    # For fewer tokens torch itself advises against chunks.
    if hasattr(torch.nn, "LinearCrossEntropyOptions") and tokens >= max(hidden, CHUNK):
        # Its own choice for [512, 512, 32000], 8 rows or so, took 9 times as long on a Zen 4.
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK)
        entries[TORCH_CHUNKED] = lambda h, w: F.linear_cross_entropy(h, w, p.targets, options=options)
    entries[EAGER] = lambda h, w: -full_logits(h, w, p.targets).mean()
    return build("linear_sft_loss", p, dtype, 3, judge_of(p, lambda logp: -logp.mean()), entries)


CASES: dict[str, Callable[[Problem, str, dict[str, Callable]], Case]] = {
    "linear_policy_loss": policy,
    "linear_token_stats": statistics,
    "linear_dpo_loss": dpo,
    "linear_sft_loss": sft,
}


def peers() -> tuple[dict[str, Callable], list[str]]:
    """Fused heads of other libraries that run on a CPU, and one line for each that is not here."""
    found, remarks = {}, []
    for key in ("trl_chunked", "liger_chunked"):
        function, line = peer_libraries.load(key)
        if function is None:
            remarks.append(line)
        else:
            found[key] = function
    return found, remarks
