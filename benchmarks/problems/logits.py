"""Losses over logits: inputs, the torch compositions that trainers use, and the float64 truth on a few rows.

The device is that of its tensors: the benchmarks of CPU and GPU share the problem.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.judge import Judge

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CLIP_LOW, CLIP_HIGH, KL_COEF, ENTROPY_COEF = 0.2, 0.28, 0.04, 0.01
PIECE = 64
"""Rows that are drawn, or judged in float64, at once: 64 of 262144 columns are 128 MiB in float64."""


@dataclass
class Problem:
    """Equal copies of one batch of logits, the per-token columns, and the rows that are checked.

    Attributes:
        ref_copies: logits of a reference model beside ``copies``, or none.
        sequences: of equal length, with one advantage each; 0: one advantage per token.
    """

    copies: list[Tensor]
    targets: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    advantages: Tensor
    dlogp: Tensor
    rows: Tensor
    ref_copies: list[Tensor]
    sequences: int = 0

    @property
    def logits(self) -> Tensor:
        return self.copies[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.logits.shape)

    @property
    def bytes(self) -> int:
        """One pass over the logits."""
        return self.logits.numel() * self.logits.element_size()

    @property
    def columns(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.old_logprobs, self.ref_logprobs, self.advantages

    def inputs(self, buffer: int = 0) -> tuple[Tensor, Tensor]:
        return self.copies[buffer], self.targets

    def leaf(self, buffer: int = 0) -> Tensor:
        """The memory of a copy, requiring a gradient."""
        return self.copies[buffer].detach().requires_grad_()

    def leaves(self, buffer: int = 0) -> tuple[Tensor]:
        return (self.leaf(buffer),)


def copies_needed(size: int, cache: int, most: int = 64) -> int:
    """Buffers of ``size`` bytes that make four caches in total."""
    return max(1, min(most, -(-4 * cache // max(size, 1))))


def make(
    device: torch.device,
    tokens: int,
    vocab: int,
    dtype: str,
    *,
    cache: int = 0,
    reference: bool = False,
    sequences: int = 0,
    checked: int = 8,
    seed: int = 0,
) -> Problem:
    """Logits of standard deviation 3; every second target is raised to a probability near 1, as a trained policy has
    them.

    Args:
        cache: bytes of the cache that the copies exceed four times; 0: one copy.
        reference: makes logits of a reference model that is near.
        checked: rows that are compared with float64.
    """
    draw = torch.Generator(device=device).manual_seed(seed)
    x = torch.empty(tokens, vocab, dtype=DTYPES[dtype], device=device)
    for piece in x.split(PIECE):  # the fp32 draw of the whole would be twice the size of the problem
        piece.copy_(torch.randn(piece.shape, generator=draw, device=device) * 3.0)
    targets = torch.randint(vocab, (tokens,), generator=draw, device=device)
    even = torch.arange(0, tokens, 2, device=device)
    x[even, targets[even]] = 20.0
    pieces = zip(x.split(PIECE), targets.split(PIECE), strict=True)
    logp = torch.cat([log_softmax_gather(*piece) for piece in pieces])
    noise = torch.randn(4, tokens, generator=draw, device=device)
    advantages = noise[2]
    if sequences:
        number = torch.arange(tokens, device=device) * sequences // tokens
        advantages = torch.randn(sequences, generator=draw, device=device)[number]
    count = copies_needed(x.numel() * x.element_size(), cache)
    references = []
    if reference:
        near = x.clone()
        for piece in near.split(PIECE):
            piece.add_(0.3 * torch.randn(piece.shape, generator=draw, device=device).to(piece.dtype))
        references = [near, *(near.clone() for _ in range(count - 1))]
    return Problem(
        [x, *(x.clone() for _ in range(count - 1))],
        targets,
        logp + 0.2 * noise[0],
        logp + 0.2 * noise[1],
        advantages,
        noise[3],
        torch.unique(torch.linspace(0, tokens - 1, min(checked, tokens)).long()).to(device),
        references,
        sequences,
    )


def log_softmax(logits: Tensor) -> Tensor:
    """In fp32, as trainers take it; in float64 where the logits are in it."""
    return F.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)


def log_softmax_gather(logits: Tensor, targets: Tensor) -> Tensor:
    """The log-probability of the target as trainers write it."""
    return log_softmax(logits).gather(-1, targets[:, None])[:, 0]


def stats(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of the target and entropy of the row."""
    logps = log_softmax(logits)
    return logps.gather(-1, targets[:, None])[:, 0], -(logps.exp() * logps).sum(-1)


def kl_composition(logits: Tensor, ref_logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probability, entropy, reference log-probability and exact KL of each row, as torch composes them."""
    log_p, log_q = log_softmax(logits), log_softmax(ref_logits)
    p, y = log_p.exp(), targets[:, None]
    return log_p.gather(1, y)[:, 0], -(p * log_p).sum(-1), log_q.gather(1, y)[:, 0], (p * (log_p - log_q)).sum(-1)


def ppo(logp: Tensor, old_logp: Tensor, advantage: Tensor) -> Tensor:
    """The clipped objective of each token, as trainers write it."""
    ratio = (logp - old_logp).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1.0 - CLIP_LOW, 1.0 + CLIP_HIGH) * advantage)


def masked_ppo(logp: Tensor, old_logp: Tensor, advantage: Tensor, mask: Tensor) -> Tensor:
    """Computes the mean of ``ppo`` over the tokens of a mask."""
    return torch.where(mask, ppo(logp, old_logp, advantage), 0.0).sum() / mask.sum()


def policy_terms(logp: Tensor, entropy: Tensor, old_logp: Tensor, ref_logp: Tensor, advantage: Tensor) -> Tensor:
    """PPO with two clip bounds, k3 against the reference and an entropy bonus, per token."""
    gap = ref_logp - logp
    return ppo(logp, old_logp, advantage) + KL_COEF * (gap.expm1() - gap) - ENTROPY_COEF * entropy


def policy(logits: Tensor, targets: Tensor, old_logp: Tensor, ref_logp: Tensor, advantage: Tensor) -> Tensor:
    """The whole loss from logits, mean over tokens."""
    return policy_terms(*stats(logits, targets), old_logp, ref_logp, advantage).mean()


def two_upstream(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients that arrive at log-probability, entropy and KL in the two-model case."""
    return problem.dlogp, -ENTROPY_COEF * torch.ones_like(problem.dlogp), 0.1 * torch.ones_like(problem.dlogp)


def judge(problem: Problem) -> Judge:
    """The judge by torch in float64 on the same device: of the checked rows, and of the loss over all rows.

    Its gradients: ``dlogp`` for the upstream gradient of the problem, ``dpolicy``, ``dtwo`` with a reference, and
    ``dgrpo`` for peers whose loss has no entropy term and leaves out the row that ends a sequence.
    """
    rows, tokens, y = problem.rows, problem.targets.numel(), problem.targets[problem.rows]
    columns = [c.double() for c in problem.columns]
    mine = [c[rows] for c in columns]
    x = problem.logits[rows].double().requires_grad_()
    logp, entropy = stats(x, y)

    def gradient(outputs: Tensor | tuple, upstream: object = None) -> Tensor:
        return torch.autograd.grad(outputs, x, upstream, retain_graph=True)[0]

    values = {
        "logp": logp.detach(),
        "entropy": entropy.detach(),
        "loss": torch.zeros((), dtype=x.dtype, device=x.device),
    }
    for index in torch.arange(tokens, device=x.device).split(PIECE):
        piece = stats(problem.logits[index].double(), problem.targets[index])
        values["loss"] += policy_terms(*piece, *(c[index] for c in columns)).sum() / tokens
    gradients = {
        "dlogp": (rows, gradient(logp, problem.dlogp[rows].double())),
        "dpolicy": (rows, gradient(policy_terms(logp, entropy, *mine).sum() / tokens)),
    }
    length = tokens // max(problem.sequences, 1)
    if problem.sequences and length > 1 and tokens % problem.sequences == 0:
        inside = (rows + 1) % length != 0
        plain = gradient(policy_terms(logp, torch.zeros_like(entropy), *mine).sum() / (tokens - problem.sequences))
        gradients["dgrpo"] = rows[inside], plain[inside]
    if problem.ref_copies:
        outputs = kl_composition(x, problem.ref_copies[0][rows].double(), y)
        values |= {"ref_logp": outputs[2].detach(), "kl": outputs[3].detach()}
        upstream = tuple(g[rows].double() for g in two_upstream(problem))
        gradients["dtwo"] = rows, gradient((outputs[0], outputs[1], outputs[3]), upstream)
    return Judge(values, gradients, rows)
