"""The cases that move few bytes: losses over log-probabilities and pairs, and the scan of GAE."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import rlkernels
from benchmarks.cases.case import COMPILED, EAGER, Case, compiled, differentiated, on, ours, without_grad
from benchmarks.judge import EPS, Judge, relative
from benchmarks.peers import PEERS
from benchmarks.problems.logits import CLIP_HIGH, CLIP_LOW, copies_needed
from benchmarks.timing.contender import Contender

PAIRS = 4096
BETA, GAMMA, LAM = 0.1, 0.99, 0.95
SCANS = ((64, 4096), (8192, 2048))


def draws(device: torch.device, count: int, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator(device=device).manual_seed(seed)
    return torch.randn(count, *shape, generator=generator, device=device)


def scalar_case(
    name: str,
    ours_loss: Callable,
    torch_loss: Callable,
    inputs: list[Tensor],
    compile_too: bool,
    moved: tuple[int, int],
) -> Case:
    """A loss over small columns, forward and backward: ``inputs`` get gradients; both functions take them in order."""
    wide_loss, wide_grads = differentiated(torch_loss)([x.double().requires_grad_() for x in inputs])

    judge = Judge({"loss": wide_loss.detach()})

    def check(outputs: tuple) -> dict[str, float]:
        gradient = max(map(relative, outputs[1], wide_grads))
        return {"loss": judge.value("loss", outputs[0]), "gradient": gradient, "rounding": EPS}

    def entry(label: str, function: Callable, **rest: object) -> Contender:
        return Contender(
            label, differentiated(function), lambda _: [x.detach().requires_grad_() for x in inputs], check, **rest
        )

    entries = [
        entry(label, on(backend, ours_loss), ours=True, graph=True)
        for label, backend in ours(inputs[0].device.type).items()
    ]
    entries.append(entry(EAGER, torch_loss, graph=True))
    if compile_too:
        entries.append(entry(COMPILED, compiled(torch_loss)))
    return Case(name, entries, judge.slack, tuple(inputs[0].shape), "columns", *moved)


def policy_loss(device: torch.device, compile_too: bool, shape: tuple[int, int] = (64, 2048)) -> Case:
    logp, drift, advantage, chance = draws(device, 4, *shape)
    logp = -logp.abs()
    old, mask = logp + 0.2 * drift, chance < 1.0

    def composed(x: Tensor) -> Tensor:
        ratio = (x - old.to(x.dtype)).exp()
        gain = torch.minimum(ratio * advantage, ratio.clamp(1.0 - CLIP_LOW, 1.0 + CLIP_HIGH) * advantage)
        return -torch.where(mask, gain, 0.0).sum() / mask.sum()

    def fused(x: Tensor) -> Tensor:
        return rlkernels.policy_loss(x, old, advantage, mask, clip_low=CLIP_LOW, clip_high=CLIP_HIGH)

    return scalar_case(
        f"policy_loss {list(shape)} forward+backward",
        fused,
        composed,
        [logp],
        compile_too,
        (13 * logp.numel(), 4 * logp.numel()),
    )


def pairwise(device: torch.device, compile_too: bool, pairs: int = PAIRS) -> Case:
    chosen, rejected = 3.0 * draws(device, 2, pairs)

    def composed(c: Tensor, r: Tensor) -> Tensor:
        return -F.logsigmoid(c - r).mean()

    return scalar_case(
        f"pairwise_reward_loss [{pairs}] forward+backward",
        rlkernels.pairwise_reward_loss,
        composed,
        [chosen, rejected],
        compile_too,
        (8 * pairs, 8 * pairs),
    )


def dpo(device: torch.device, compile_too: bool, pairs: int = PAIRS) -> Case:
    chosen, rejected, ref_chosen, ref_rejected = 20.0 * draws(device, 4, pairs) - 100.0

    def fused(c: Tensor, r: Tensor) -> Tensor:
        return rlkernels.dpo_loss(c, r, ref_chosen, ref_rejected, beta=BETA)

    def composed(c: Tensor, r: Tensor) -> Tensor:
        return -F.logsigmoid(BETA * ((c - ref_chosen) - (r - ref_rejected))).mean()

    return scalar_case(
        f"dpo_loss [{pairs}] forward+backward",
        fused,
        composed,
        [chosen, rejected],
        compile_too,
        (16 * pairs, 8 * pairs),
    )


def gae_loop(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = GAMMA, lam: float = LAM
) -> tuple[Tensor, Tensor]:
    """GAE as trainers write it: one step of Python per token, masked tokens skipped."""
    following, trace, backwards = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0]), []
    for t in reversed(range(rewards.shape[1])):
        step = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * trace
        following = torch.where(mask[:, t], values[:, t], following)
        trace = torch.where(mask[:, t], step, trace)
        backwards.append(trace)
    advantages = torch.stack(backwards[::-1], 1)
    return torch.where(mask, advantages, 0.0), torch.where(mask, advantages + values, 0.0)


def gae_name(shape: tuple[int, int]) -> str:
    return f"gae {list(shape)}"


def gae(device: torch.device, shape: tuple[int, int], peers: dict[str, Callable], cache: int) -> Case:
    rewards, values, chance = draws(device, 3, *shape)
    mask = chance < 1.3
    expected = gae_loop(rewards.double(), values.double(), mask)
    count = copies_needed(17 * rewards.numel(), cache)
    sets = [(rewards, values, mask), *((rewards.clone(), values.clone(), mask.clone()) for _ in range(count - 1))]

    judge = Judge({"advantage": expected[0], "return": expected[1]})

    check = judge.check("advantage", "return")

    def entry(label: str, function: Callable, judged: Callable = check, **rest: object) -> Contender:
        return Contender(label, without_grad(function), lambda buffer: sets[buffer % count], judged, **rest)

    def fused(r: Tensor, v: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        return rlkernels.gae(r, v, m, gamma=GAMMA, lam=LAM)

    entries = [entry(label, on(backend, fused), ours=True, graph=True) for label, backend in ours(device.type).items()]
    if "rl_triton" in peers:
        ends = torch.zeros_like(rewards)
        entries.append(
            entry(
                PEERS["rl_triton"].name,
                lambda r, v, m: peers["rl_triton"](r, v, ends, gamma=GAMMA, lambda_=LAM),
                lambda outputs: {},
                remark=PEERS["rl_triton"].remark,
            )
        )
    entries.append(entry(EAGER, gae_loop, remark="the trainers' loop"))
    moved = 9 * rewards.numel(), 8 * rewards.numel()
    return Case(gae_name(shape), entries, judge.slack, shape, "2R+2W fp32, mask", *moved, buffers=count)
