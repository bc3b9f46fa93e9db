"""The cases that move few bytes: losses over log-probabilities and pairs, and the scan of GAE."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import rlkernels
from benchmarks.cases.case import COMPILED, EAGER, Case, differentiated, without_grad
from benchmarks.judge import EPS, Judge, relative
from benchmarks.lineup import Lineup
from benchmarks.peers import PEERS
from benchmarks.problems.logits import CLIP_HIGH, CLIP_LOW, copies_needed, masked_ppo
from benchmarks.timing.contender import Contender

PAIRS = 4096
BETA, GAMMA, LAM = 0.1, 0.99, 0.95
SCANS = ((64, 4096), (8192, 2048))


def draws(device: torch.device, count: int, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator(device=device).manual_seed(seed)
    return torch.randn(count, *shape, generator=generator, device=device)


def scalar_case(
    name: str, lineup: Lineup, fused: Callable, composed: Callable, inputs: list[Tensor], moved: tuple[int, int]
) -> Case:
    """A loss over small columns, forward and backward: ``inputs`` get gradients; both functions take them in order."""
    loss, gradients = differentiated(composed)([x.double().requires_grad_() for x in inputs])
    judge = Judge({"loss": loss.detach()})

    def check(outputs: tuple) -> dict[str, float]:
        gradient = max(map(relative, outputs[1], gradients))
        return {"loss": judge.value("loss", outputs[0]), "gradient": gradient, "rounding": EPS}

    def leaves(buffer: int) -> list[Tensor]:
        return [x.detach().requires_grad_() for x in inputs]

    def make(label: str, function: Callable, **options: object) -> Contender:
        return Contender(label, differentiated(function), leaves, check, graph=label != COMPILED, **options)

    everyone = lineup.contenders(make, fused, composed)
    return Case(f"{name} forward+backward", everyone, judge.slack, tuple(inputs[0].shape), "columns", *moved)


def policy_loss(device: torch.device, lineup: Lineup, shape: tuple[int, int] = (64, 2048)) -> Case:
    logp, drift, advantage, chance = draws(device, 4, *shape)
    logp = -logp.abs()
    old, mask = logp + 0.2 * drift, chance < 1.0

    def composed(x: Tensor) -> Tensor:
        return masked_ppo(x, old, advantage, mask)

    def fused(x: Tensor) -> Tensor:
        return rlkernels.policy_loss(x, old, advantage, mask, clip_low=CLIP_LOW, clip_high=CLIP_HIGH)

    moved = 13 * logp.numel(), 4 * logp.numel()
    return scalar_case(f"policy_loss {list(shape)}", lineup, fused, composed, [logp], moved)


def pairwise(device: torch.device, lineup: Lineup, pairs: int = PAIRS) -> Case:
    chosen, rejected = 3.0 * draws(device, 2, pairs)

    def composed(c: Tensor, r: Tensor) -> Tensor:
        return -F.logsigmoid(c - r).mean()

    name, fused, moved = f"pairwise_reward_loss [{pairs}]", rlkernels.pairwise_reward_loss, (8 * pairs, 8 * pairs)
    return scalar_case(name, lineup, fused, composed, [chosen, rejected], moved)


def dpo(device: torch.device, lineup: Lineup, pairs: int = PAIRS) -> Case:
    chosen, rejected, ref_chosen, ref_rejected = 20.0 * draws(device, 4, pairs) - 100.0

    def fused(c: Tensor, r: Tensor) -> Tensor:
        return rlkernels.dpo_loss(c, r, ref_chosen, ref_rejected, beta=BETA)

    def composed(c: Tensor, r: Tensor) -> Tensor:
        return -F.logsigmoid(BETA * ((c - ref_chosen) - (r - ref_rejected))).mean()

    return scalar_case(f"dpo_loss [{pairs}]", lineup, fused, composed, [chosen, rejected], (16 * pairs, 8 * pairs))


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


def gae(device: torch.device, lineup: Lineup, shape: tuple[int, int], cache: int) -> Case:
    rewards, values, chance = draws(device, 3, *shape)
    mask = chance < 1.3
    advantage, returns = gae_loop(rewards.double(), values.double(), mask)
    judge = Judge({"advantage": advantage, "return": returns})
    count = copies_needed(17 * rewards.numel(), cache)
    sets = [(rewards, values, mask), *((rewards.clone(), values.clone(), mask.clone()) for _ in range(count - 1))]

    def make(label: str, function: Callable, **options: object) -> Contender:
        run = without_grad(function)
        return Contender(label, run, sets.__getitem__, **{"check": judge.check("advantage", "return"), **options})

    def fused(r: Tensor, v: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        return rlkernels.gae(r, v, m, gamma=GAMMA, lam=LAM)

    everyone = [make(label, function, ours=True, graph=True) for label, function in lineup.fused(fused).items()]
    if "rl_triton" in lineup.peers:
        ends, peer = torch.zeros_like(rewards), PEERS["rl_triton"]

        def unmasked(r: Tensor, v: Tensor, m: Tensor) -> object:
            return lineup.peers["rl_triton"](r, v, ends, gamma=GAMMA, lambda_=LAM)

        everyone.append(make(peer.name, unmasked, check=lambda outputs: {}, remark=peer.remark))
    everyone.append(make(EAGER, gae_loop, remark="the trainers' loop"))
    moved = 9 * rewards.numel(), 8 * rewards.numel()
    return Case(f"gae {list(shape)}", everyone, judge.slack, shape, "2R+2W fp32, mask", *moved, buffers=count)
