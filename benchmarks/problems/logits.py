"""The measured problem: inputs, the torch compositions that trainers use, and the float64 truth on a few rows."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CLIP_LOW, CLIP_HIGH, KL_COEF, ENTROPY_COEF = 0.2, 0.28, 0.04, 0.01
CHECKED_ROWS = 8


@dataclass
class Problem:
    """Logits and per-token columns; ``leaf`` is the same memory as ``logits``, requiring a gradient."""

    logits: Tensor
    targets: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    advantages: Tensor
    dlogp: Tensor
    rows: Tensor

    @property
    def leaf(self) -> Tensor:
        return self.logits.detach().requires_grad_()

    def inputs(self, _: int = 0) -> tuple[Tensor, Tensor]:
        return self.logits, self.targets

    def leaves(self, _: int = 0) -> tuple[Tensor]:
        return (self.leaf,)

    @property
    def bytes(self) -> int:
        """One pass over the logits."""
        return self.logits.numel() * self.logits.element_size()


def make(tokens: int, vocab: int, dtype: str, seed: int = 0) -> Problem:
    """Logits of standard deviation 3; every second target is raised to a probability near 1, as a trained policy has
    them.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = torch.empty(tokens, vocab, dtype=DTYPES[dtype])
    for start in range(0, tokens, 64):  # in pieces: the fp32 draw of the whole would be twice the size of the problem
        piece = logits[start : start + 64]
        piece.copy_(torch.randn(piece.shape, generator=generator) * 3.0)
    targets = torch.randint(vocab, (tokens,), generator=generator)
    logits[torch.arange(0, tokens, 2), targets[::2]] = 20.0
    rows = torch.unique(torch.linspace(0, tokens - 1, min(CHECKED_ROWS, tokens)).long())
    logp = torch.cat([log_softmax_gather(*piece) for piece in zip(logits.split(64), targets.split(64), strict=True)])
    noise = torch.randn(4, tokens, generator=generator)
    return Problem(logits, targets, logp + 0.2 * noise[0], logp + 0.2 * noise[1], noise[2], noise[3], rows)


def log_softmax_gather(logits: Tensor, targets: Tensor) -> Tensor:
    """The log-probability of the target as trainers write it."""
    return F.log_softmax(logits.float(), dim=-1).gather(-1, targets[:, None])[:, 0]


def stats(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of the target and entropy of the row."""
    logps = F.log_softmax(logits.float(), dim=-1)
    return logps.gather(-1, targets[:, None])[:, 0], -(logps.exp() * logps).sum(-1)


def policy_terms(logp: Tensor, entropy: Tensor, old_logp: Tensor, ref_logp: Tensor, advantage: Tensor) -> Tensor:
    """PPO with two clip bounds, k3 against the reference and an entropy bonus, per token."""
    ratio = (logp - old_logp).exp()
    surrogate = -torch.minimum(ratio * advantage, ratio.clamp(1.0 - CLIP_LOW, 1.0 + CLIP_HIGH) * advantage)
    gap = ref_logp - logp
    return surrogate + KL_COEF * (gap.expm1() - gap) - ENTROPY_COEF * entropy


def policy(logits: Tensor, targets: Tensor, old_logp: Tensor, ref_logp: Tensor, advantage: Tensor) -> Tensor:
    """The whole loss from logits, mean over tokens."""
    return policy_terms(*stats(logits, targets), old_logp, ref_logp, advantage).mean()


@dataclass
class Truth:
    """float64 results: of the checked rows, and the loss over all rows."""

    logp: Tensor
    entropy: Tensor
    dlogits_logp: Tensor
    dlogits_policy: Tensor
    loss: Tensor


def _stats64(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logps = F.log_softmax(logits.double(), dim=-1)
    return logps.gather(-1, targets[:, None])[:, 0], -(logps.exp() * logps).sum(-1)


def truth(problem: Problem) -> Truth:
    """Everything that a contender is judged by, by torch in float64."""
    rows, tokens = problem.rows, problem.targets.numel()
    columns = [x.double() for x in (problem.old_logprobs, problem.ref_logprobs, problem.advantages)]
    x = problem.logits[rows].double().requires_grad_()
    logp, entropy = _stats64(x, problem.targets[rows])
    terms = policy_terms(logp, entropy, *(c[rows] for c in columns))
    (dlogits_logp,) = torch.autograd.grad(logp, x, problem.dlogp[rows].double(), retain_graph=True)
    (dlogits_policy,) = torch.autograd.grad(terms.sum() / tokens, x)
    loss = torch.zeros((), dtype=torch.float64)
    for index in torch.arange(tokens).split(64):
        loss += policy_terms(
            *_stats64(problem.logits[index], problem.targets[index]), *(c[index] for c in columns)
        ).sum()
    return Truth(logp.detach(), entropy.detach(), dlogits_logp, dlogits_policy, loss / tokens)
