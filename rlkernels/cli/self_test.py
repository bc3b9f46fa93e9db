"""The check of ``rlkernels doctor --check``: every backend present, against the formulas in float64 torch."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import rlkernels
from rlkernels.backends import DEVICES, absent, interpreted

ROWS, VOCAB, HIDDEN = 6, 517, 16
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""Largest error of a value or a gradient, over the largest entry; bf16 gradients are rounded once."""


@dataclass(frozen=True)
class Verdict:
    """The error of one function on one backend; ``failure`` is the message of what it raised instead."""

    device: str
    backend: str
    function: str
    dtype: str
    error: float
    bound: float
    failure: str = ""

    @property
    def passed(self) -> bool:
        return not self.failure and self.error <= self.bound

    def record(self) -> dict[str, object]:
        return {**asdict(self), "passed": self.passed}


@dataclass(frozen=True)
class Columns:
    """Numbers per row that are not differentiated: target, log-probability of before, advantage, teacher's logits."""

    targets: Tensor
    old: Tensor
    advantages: Tensor
    teacher: Tensor


Case = tuple[str, Callable[..., Tensor], Callable[..., Tensor], tuple[tuple[int, ...], ...]]


def logps(logits: Tensor, c: Columns) -> Tensor:
    return logits.log_softmax(-1).gather(-1, c.targets[:, None])[:, 0]


def ppo(logits: Tensor, c: Columns) -> Tensor:
    ratio = (logps(logits, c) - c.old).exp()
    return -torch.minimum(ratio * c.advantages, ratio.clamp(0.8, 1.2) * c.advantages).mean()


def entropy(logits: Tensor, c: Columns) -> Tensor:
    log_p = logits.log_softmax(-1)
    return (logps(logits, c) - (log_p.exp() * log_p).sum(-1)).sum()


def stats(logits: Tensor, c: Columns) -> Tensor:
    found = rlkernels.token_stats(logits, c.targets)
    return (found.logprobs + found.entropy).sum()


def forward_kl(logits: Tensor, c: Columns) -> Tensor:
    return F.kl_div(logits.log_softmax(-1), c.teacher.log_softmax(-1), reduction="batchmean", log_target=True)


def recursion(rewards: Tensor) -> Tensor:
    """GAE of values 0: the discounted sum of what follows."""
    total, found = rewards.new_zeros(()), []
    for x in reversed(rewards.unbind()):
        total = x + 0.9 * 0.8 * total
        found.append(total)
    return torch.stack(found[::-1])


LOGITS, HEAD = ((ROWS, VOCAB),), ((ROWS, HIDDEN), (VOCAB, HIDDEN))
CASES: tuple[Case, ...] = (
    (
        "token_logprobs",
        lambda x, c: rlkernels.token_logprobs(x, c.targets).sum(),
        lambda x, c: logps(x, c).sum(),
        LOGITS,
    ),
    ("token_stats", stats, entropy, LOGITS),
    ("logits_policy_loss", lambda x, c: rlkernels.logits_policy_loss(x, c.targets, c.old, c.advantages), ppo, LOGITS),
    ("policy_loss", lambda x, c: rlkernels.policy_loss(logps(x.float(), c), c.old, c.advantages), ppo, LOGITS),
    ("divergence_loss", lambda x, c: rlkernels.divergence_loss(x, c.teacher), forward_kl, LOGITS),
    (
        "linear_policy_loss",
        lambda h, w, c: rlkernels.linear_policy_loss(h, w, c.targets, c.old, c.advantages),
        lambda h, w, c: ppo(h @ w.T, c),
        HEAD,
    ),
    (
        "pairwise_reward_loss",
        lambda x, c: rlkernels.pairwise_reward_loss(x[:, 0], x[:, 1]),
        lambda x, c: -F.logsigmoid(x[:, 0] - x[:, 1]).mean(),
        LOGITS,
    ),
)


def check() -> list[Verdict]:
    """Returns a verdict per device, backend, function and dtype; about ten seconds at most."""
    found = []
    for device, names in DEVICES.items():
        if device == "meta" or (device != "cpu" and not getattr(torch, device).is_available()):
            continue
        for name in (*names, *(("triton",) if device == "cpu" and interpreted() else ())):
            if absent(name) is None:
                found += [verdict(device, name, case, dtype) for case in CASES for dtype in BOUNDS]
                found.append(_scan(device, name))
    return found


def verdict(device: str, backend: str, case: Case, dtype: torch.dtype) -> Verdict:
    """Calls one function forward and backward and compares it with its formula."""
    name, ours, truth, shapes = case
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=draw).to(device, dtype) for shape in shapes]
    teacher = torch.randn(ROWS, VOCAB, generator=draw).to(device, dtype)
    targets = torch.randint(VOCAB, (ROWS,), generator=draw).to(device)
    drift, advantages = torch.randn(2, ROWS, generator=draw).to(device)
    columns = Columns(targets, drift, advantages, teacher)
    # Near the policy, because a clipped token has no gradient that could be wrong.
    logits = (inputs[0] if len(inputs) == 1 else inputs[0] @ inputs[1].T).double()
    columns = replace(columns, old=(logps(logits, columns) + 0.15 * drift).float())
    bound = BOUNDS[dtype]
    try:
        with rlkernels.use_backend(backend):
            got = _differentiated(ours, inputs, columns)
    except Exception as error:  # whatever it is, the table says so and the other rows are checked
        return Verdict(device, backend, name, _name(dtype), float("nan"), bound, f"{type(error).__name__}: {error}")
    wide = Columns(columns.targets, columns.old.double(), columns.advantages.double(), columns.teacher.double())
    expected = _differentiated(truth, [x.double() for x in inputs], wide)
    error = max(_error(x, y) for x, y in zip(got, expected, strict=True))
    return Verdict(device, backend, name, _name(dtype), error, bound)


def _scan(device: str, backend: str) -> Verdict:
    rewards, bound = torch.linspace(-1, 1, 37, device=device), BOUNDS[torch.float32]
    try:
        with rlkernels.use_backend(backend):
            got, _ = rlkernels.gae(
                rewards,
                torch.zeros_like(rewards),
                None,
                gamma=0.9,
                lam=0.8,
                cu_seqlens=torch.tensor([0, 37], device=device),
            )
    except Exception as error:
        return Verdict(device, backend, "gae", "float32", float("nan"), bound, f"{type(error).__name__}: {error}")
    return Verdict(device, backend, "gae", "float32", _error(got, recursion(rewards.double())), bound)


def _differentiated(function: Callable[..., Tensor], inputs: list[Tensor], columns: Columns) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    loss = function(*leaves, columns)
    return (loss.detach(), *torch.autograd.grad(loss, leaves))


def _error(got: Tensor, expected: Tensor) -> float:
    scale = max(expected.abs().max().item(), 1e-3)
    return (got.double() - expected).abs().max().item() / scale


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
