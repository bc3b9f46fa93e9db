"""The cost of a call for the host: losses so small that nothing else is measured, beside the same loss as a few
operations of torch.

The clock is the processor time of the calling thread, the only one at work: what other programs do meanwhile hardly
changes it.
"""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import rlkernels
from benchmarks.problems.logits import CLIP_HIGH, CLIP_LOW, masked_ppo
from rlkernels.cli import tables

NAME = "host cost per call"
CALLS = 200
"""In one sample: a single call is shorter than the clock's own noise."""


@dataclass
class Pair:
    """The same number from us and from torch; ``leaves`` get gradients."""

    name: str
    ours: Callable[..., Tensor]
    torch: Callable[..., Tensor]
    leaves: list[Tensor]


def pairs() -> list[Pair]:
    draw = torch.Generator().manual_seed(0)
    logp, drift, advantage, chance = torch.randn(4, 64, 32, generator=draw)
    old, mask = logp + 0.2 * drift, chance < 1.0
    chosen, rejected = torch.randn(2, 32, generator=draw)
    logits, targets = torch.randn(4, 64, generator=draw), torch.randint(64, (4,), generator=draw)

    def policy(x: Tensor) -> Tensor:
        return masked_ppo(x, old, advantage, mask)

    def value(x: Tensor) -> Tensor:
        return torch.where(mask, 0.5 * (x - advantage) ** 2, 0.0).sum() / mask.sum()

    return [
        Pair(
            "policy_loss [64, 32]",
            lambda x: rlkernels.policy_loss(x, old, advantage, mask, clip_low=CLIP_LOW, clip_high=CLIP_HIGH),
            policy,
            [logp],
        ),
        Pair("value_loss [64, 32]", lambda x: rlkernels.value_loss(x, old, advantage, mask), value, [logp]),
        Pair(
            "pairwise_reward_loss [32]",
            rlkernels.pairwise_reward_loss,
            lambda c, r: -F.logsigmoid(c - r).mean(),
            [chosen, rejected],
        ),
        Pair(
            "token_logprobs [4, 64]",
            lambda x: rlkernels.token_logprobs(x, targets).sum(),
            lambda x: F.log_softmax(x, -1).gather(-1, targets[:, None]).sum(),
            [logits],
        ),
    ]


def error(pair: Pair) -> float:
    """The error of our loss and gradients against torch in float64, relative to the largest value of each."""

    def both(function: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
        loss = function(*leaves)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    got = both(pair.ours, [x.detach().requires_grad_() for x in pair.leaves])
    want = both(pair.torch, [x.detach().double().requires_grad_() for x in pair.leaves])
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(got, want, strict=True))


def microseconds(run: Callable[[], object]) -> float:
    """Per call, over one sample."""
    gc.collect()
    gc.disable()
    try:
        start = time.thread_time()
        for _ in range(CALLS):
            run()
        return 1e6 * (time.thread_time() - start) / CALLS
    finally:
        gc.enable()


def contenders_of(who: str, function: Callable[..., Tensor], leaves: list[Tensor]) -> dict[str, Callable[[], object]]:
    return {
        f"{who} forward": lambda: function(*leaves),
        f"{who} forward+backward": lambda: torch.autograd.grad(function(*leaves), leaves),
    }


def measure(rounds: int) -> list[dict]:
    """Microseconds per call: forward with its graph, and forward+backward, of ours and of torch, in turn."""
    threads = torch.get_num_threads()
    # The wait for a second thread, where another program has its core, is a thousand times the call.
    torch.set_num_threads(1)
    try:
        return [measured(pair, rounds) for pair in pairs()]
    finally:
        torch.set_num_threads(threads)


def measured(pair: Pair, rounds: int) -> dict:
    leaves = [x.detach().requires_grad_() for x in pair.leaves]
    contenders = {**contenders_of("rlkernels", pair.ours, leaves), **contenders_of("torch eager", pair.torch, leaves)}
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for k in range(rounds + 1):
        for name, run in contenders.items():
            once = microseconds(run)
            if k:  # the first round warms up
                samples[name].append(once)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    return {"name": pair.name, "error": error(pair), "samples_us": samples, "median_us": medians}


def inexact(found: Sequence[dict]) -> list[str]:
    """Each loss whose error is more than single precision explains."""
    wrong = (f for f in found if not f["error"] <= 1e-5)
    return [f"{NAME}, {f['name']}: error is {f['error']:.3g}, allowed is 1e-05" for f in wrong]


def show(found: Sequence[dict], plain: bool) -> None:
    rows = []
    for f in found:
        us = f["median_us"]
        ours, theirs = (
            [us[f"{who} {what}"] for what in ("forward", "forward+backward")] for who in ("rlkernels", "torch eager")
        )
        rows.append(
            [f["name"], *(f"{x:.1f}" for x in (*ours, *theirs)), f"{ours[1] / theirs[1]:.2f}", f"{f['error']:.1e}"]
        )
    header = ["us per call", "forward", "forward+backward", "torch forward", "torch forward+backward"]
    title = f"{NAME} (processor time of the calling thread, medians, {CALLS} calls per sample)"
    tables.show(title, [*header, "ours / torch", "error"], rows, plain=plain)
