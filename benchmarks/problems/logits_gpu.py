"""Problems that are measured on an accelerator: buffers that rotate past the cache, and the float64 truth on sampled
rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.problems import logits as logits_problem
from benchmarks.problems.logits import ENTROPY_COEF

SEQUENCES = 8
"""The rows of a batch are so many sequences of equal length: some peers take [B, L + 1, V] and one advantage per
sequence.
"""
CHECKED = 16
PIECE = 128
"""Rows of a float64 piece: 128 of 262144 columns are 256 MiB."""


@dataclass
class Problem:
    """Equal copies of one batch of logits, the per-token columns, and the rows that are checked."""

    copies: list[Tensor]
    targets: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    advantages: Tensor
    dlogp: Tensor
    rows: Tensor
    ref_copies: list[Tensor]

    @property
    def logits(self) -> Tensor:
        return self.copies[0]

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.logits.shape)

    @property
    def bytes(self) -> int:
        """One pass over the logits."""
        return self.logits.numel() * self.logits.element_size()

    def leaf(self, buffer: int) -> Tensor:
        return self.copies[buffer % len(self.copies)].detach().requires_grad_()

    def leaves(self, buffer: int) -> tuple[Tensor]:
        return (self.leaf(buffer),)


def copies_needed(size: int, cache: int, most: int = 64) -> int:
    """Buffers of ``size`` bytes that make four caches in total."""
    return max(1, min(most, -(-4 * cache // max(size, 1))))


def draw(tokens: int, vocab: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Tensor:
    """Logits of standard deviation 3, in pieces: the fp32 draw of the whole would be twice the size of the problem."""
    x = torch.empty(tokens, vocab, dtype=dtype, device=device)
    for piece in x.split(PIECE):
        piece.copy_(torch.randn(piece.shape, generator=generator, device=device) * 3.0)
    return x


def make(
    device: torch.device, tokens: int, vocab: int, dtype: str, cache: int, reference: bool = False, seed: int = 0
) -> Problem:
    """Every second target is raised to a probability near 1, as a trained policy has them; the advantage is one per
    sequence.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    x = draw(tokens, vocab, logits_problem.DTYPES[dtype], device, generator)
    targets = torch.randint(vocab, (tokens,), generator=generator, device=device)
    even = torch.arange(0, tokens, 2, device=device)
    x[even, targets[even]] = 20.0
    noise = torch.randn(4, tokens, generator=generator, device=device)
    per_sequence = torch.randn(SEQUENCES, generator=generator, device=device)
    sequence = torch.arange(tokens, device=device) * SEQUENCES // tokens
    rows = torch.unique(torch.linspace(0, tokens - 1, min(CHECKED, tokens)).long()).to(device)
    logp = torch.cat(
        [logits_problem.log_softmax_gather(a, b) for a, b in zip(x.split(PIECE), targets.split(PIECE), strict=True)]
    )
    count = copies_needed(x.numel() * x.element_size(), cache)
    references = []
    if reference:
        near = x.clone()
        for piece in near.split(PIECE):
            piece.add_(0.3 * torch.randn(piece.shape, generator=generator, device=device).to(piece.dtype))
        references = [near, *(near.clone() for _ in range(count - 1))]
    return Problem(
        [x, *(x.clone() for _ in range(count - 1))],
        targets,
        logp + 0.2 * noise[0],
        logp + 0.2 * noise[1],
        per_sequence[sequence],
        noise[2],
        rows,
        references,
    )


@dataclass
class Truth:
    """float64 results of the checked rows; the loss is over all rows."""

    logp: Tensor
    entropy: Tensor
    dlogp: Tensor
    dpolicy: Tensor
    dpolicy_without_entropy: Tensor
    loss: Tensor
    ref_logp: Tensor | None = None
    kl: Tensor | None = None
    dtwo: Tensor | None = None


def kl_composition(logits: Tensor, ref_logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probability, entropy, reference log-probability and exact KL of each row, as torch composes them."""
    double = logits.dtype == torch.float64
    log_p, log_q = (torch.log_softmax(x if double else x.float(), -1) for x in (logits, ref_logits))
    p, y = log_p.exp(), targets[:, None]
    return log_p.gather(1, y)[:, 0], -(p * log_p).sum(-1), log_q.gather(1, y)[:, 0], (p * (log_p - log_q)).sum(-1)


def two_upstream(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients that arrive at log-probability, entropy and KL in the two-model case."""
    return problem.dlogp, -ENTROPY_COEF * torch.ones_like(problem.dlogp), 0.1 * torch.ones_like(problem.dlogp)


def truth(problem: Problem) -> Truth:
    """Everything that an entry is judged by, by torch in float64 on the same device."""
    rows, tokens = problem.rows, problem.targets.numel()
    columns = [c.double() for c in (problem.old_logprobs, problem.ref_logprobs, problem.advantages)]
    y, mine = problem.targets[rows], [c[rows] for c in columns]
    x = problem.logits[rows].double().requires_grad_()
    logp, entropy = stats64(x, y)
    terms = logits_problem.policy_terms(logp, entropy, *mine)
    plain = logits_problem.policy_terms(logp, torch.zeros_like(entropy), *mine)

    def gradient(outputs: Tensor | tuple, upstream: object = None) -> Tensor:
        return torch.autograd.grad(outputs, x, upstream, retain_graph=True)[0]

    found = Truth(
        logp.detach(),
        entropy.detach(),
        gradient(logp, problem.dlogp[rows].double()),
        gradient(terms.sum() / tokens),
        gradient(plain.sum() / tokens),
        torch.zeros((), dtype=torch.float64, device=x.device),
    )
    for index in torch.arange(tokens, device=x.device).split(PIECE):
        piece = stats64(problem.logits[index], problem.targets[index])
        found.loss += logits_problem.policy_terms(*piece, *(c[index] for c in columns)).sum() / tokens
    if problem.ref_copies:
        outputs = kl_composition(x, problem.ref_copies[0][rows].double(), y)
        found.ref_logp, found.kl = outputs[2].detach(), outputs[3].detach()
        upstream = tuple(g[rows].double() for g in two_upstream(problem))
        found.dtwo = gradient((outputs[0], outputs[1], outputs[3]), upstream)
    return found


def stats64(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logps = torch.log_softmax(logits.double(), -1)
    return logps.gather(1, targets[:, None])[:, 0], -(logps.exp() * logps).sum(-1)


class Judge:
    """Errors against float64 on the checked rows: the largest of a row quantity, Frobenius relative of a gradient."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.truth, self.rows = problem, truth(problem), problem.rows

    def row(self, **quantities: Tensor) -> dict[str, float]:
        """``logp=``, ``entropy=``, ``ref_logp=``, ``kl=``: what an entry returned for all rows."""
        return {
            name: (x.detach()[self.rows].double() - getattr(self.truth, name)).abs().max().item()
            for name, x in quantities.items()
        }

    def gradient(self, grad: Tensor, which: str, rows: Tensor | None = None, scale: float = 1.0) -> dict[str, float]:
        """The error of ``dlogits`` against the truth named ``which``; ``rows`` selects among the checked ones, for
        peers that leave some out.
        """
        expected = getattr(self.truth, which) * scale
        index = self.rows
        if rows is not None:
            index, expected = index[rows], expected[rows]
        got, rounded = grad[index].double(), expected.to(grad.dtype).double()
        size = expected.norm()
        return {
            "gradient": ((got - expected).norm() / size).item(),
            "rounding": ((rounded - expected).norm() / size).item(),
        }

    def loss(self, loss: Tensor) -> dict[str, float]:
        return {"loss": (loss.detach().double() - self.truth.loss).abs().item()}
