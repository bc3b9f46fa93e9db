"""The measured problem of the fused head: hidden states, a head, and the float64 truth of every log-probability and of
sampled gradients.

The device is that of its tensors: the benchmarks of CPU and GPU share it.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from benchmarks.judge import EPS, Judge, relative
from benchmarks.problems.logits import DTYPES, ENTROPY_COEF, log_softmax_gather

CHECKED_ROWS, CHECKED_COLUMNS = 8, 32
PIECE = 2**24
"""Logits of a float64 piece: 128 MiB."""


@dataclass
class Problem:
    """``rows`` and ``columns``: where gradients of hidden states and of the head are checked; ``half``: every second
    token.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    dlogp: Tensor
    half: Tensor
    rows: Tensor
    columns: Tensor
    truth: "Truth"

    def leaves(self, buffer: int = 0) -> tuple[Tensor, Tensor]:
        return self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_()

    @property
    def shape(self) -> tuple[int, int, int]:
        return (*self.hidden.shape, self.weight.shape[0])

    @property
    def dtype(self) -> str:
        return next(name for name, dtype in DTYPES.items() if dtype == self.weight.dtype)

    @property
    def dentropy(self) -> Tensor:
        """The gradient that arrives at the entropy where there is one."""
        return torch.full_like(self.dlogp, -ENTROPY_COEF)


@dataclass
class Truth:
    """float64, of every token: logsumexp, log-probability of the target, entropy."""

    lse: Tensor
    logp: Tensor
    entropy: Tensor


def make(device: torch.device, tokens: int, hidden: int, vocab: int, dtype: str, seed: int = 0) -> Problem:
    """Logits of standard deviation 2; every second target has a probability near 1, as under a trained policy.

    The ratios lie between 0.9 and 1.1 and no advantage is 0: every token has a gradient, none is clipped, no product
    may be skipped.
    """
    draw = torch.Generator(device=device).manual_seed(seed)
    weight = torch.empty(vocab, hidden, dtype=DTYPES[dtype], device=device)
    for piece in weight.split(2**14):  # the fp32 draw of the whole would be twice the size of a 16-bit head
        piece.copy_(torch.randn(piece.shape, generator=draw, device=device) * (2.0 / hidden**0.5))
    targets = torch.randint(vocab, (tokens,), generator=draw, device=device)
    x = torch.randn(tokens, hidden, generator=draw, device=device)
    x[::2] += 4.0 * weight[targets[::2]].float()  # a row of the head has a squared norm of about 4
    x = x.to(DTYPES[dtype])
    drift, size = torch.rand(2, tokens, generator=draw, device=device)
    noise = torch.randn(2, tokens, generator=draw, device=device)
    found = truth(x, weight, targets)
    rows = torch.unique(torch.linspace(0, tokens - 1, min(CHECKED_ROWS, tokens)).long()).to(device)
    spread = torch.linspace(0, vocab - 1, min(CHECKED_COLUMNS, vocab)).long().to(device)
    columns = torch.unique(torch.cat([targets[rows], spread]))
    half = torch.arange(tokens, device=device) % 4 < 2  # pairs: both kinds of token in each half
    old_logprobs, advantages = (
        found.logp.float() + 0.2 * drift - 0.1,
        torch.where(noise[0] < 0, -1.0, 1.0) * (0.5 + size),
    )
    return Problem(x, weight, targets, old_logprobs, advantages, noise[1], half, rows, columns, found)


def first(p: Problem, tokens: int) -> Problem:
    """The problem of the first so many tokens."""
    if tokens == p.hidden.shape[0]:
        return p
    cut = {
        f.name: getattr(p, f.name)[:tokens] for f in fields(p) if f.name not in ("weight", "rows", "columns", "truth")
    }
    return replace(
        p, **cut, rows=p.rows[p.rows < tokens], truth=Truth(*(getattr(p.truth, f.name)[:tokens] for f in fields(Truth)))
    )


def _blocks(vocab: int, rows: int) -> list[slice]:
    width = max(1, PIECE // max(rows, 1))
    return [slice(start, min(start + width, vocab)) for start in range(0, vocab, width)]


def truth(hidden: Tensor, weight: Tensor, targets: Tensor) -> Truth:
    """By one sweep over blocks of the vocabulary, without the float64 logits."""
    wide, count = hidden.double(), hidden.shape[0]
    shift = wide.new_full((count,), -torch.inf)
    total, first, picked = (wide.new_zeros(count) for _ in range(3))
    for block in _blocks(weight.shape[0], count):
        x = wide @ weight[block].double().T
        top = torch.maximum(shift, x.amax(1))
        scale, e = (shift - top).exp(), (x - top[:, None]).exp_()
        total, first, shift = total * scale + e.sum(1), first * scale + e.mul_(x).sum(1), top
        inside = (targets >= block.start) & (targets < block.stop)
        picked = torch.where(
            inside, x.gather(1, (targets - block.start).clamp(0, x.shape[1] - 1)[:, None])[:, 0], picked
        )
    lse = shift + total.log()
    return Truth(lse, picked - lse, lse - first / total)


def gradients(p: Problem, dlogp: Tensor, dentropy: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """float64 gradients of ``hidden[rows]`` and of ``weight[columns]`` from those of log-probability and entropy,
    ``[T]``.
    """

    def dlogits(x: Tensor, ids: Tensor, index: object) -> Tensor:
        gap = x - p.truth.lse[index][:, None]
        d = dlogp.double()[index][:, None] * ((p.targets[index][:, None] == ids).double() - gap.exp())
        return (
            d
            if dentropy is None
            else d - dentropy.double()[index][:, None] * gap.exp() * (gap + p.truth.entropy[index][:, None])
        )

    wide, all_ids = p.hidden.double(), torch.arange(p.weight.shape[0], device=p.weight.device)
    some, dhidden = wide[p.rows], torch.zeros_like(wide[p.rows])
    for block in _blocks(p.weight.shape[0], len(p.rows)):
        columns = p.weight[block].double()
        dhidden += dlogits(some @ columns.T, all_ids[block], p.rows) @ columns
    return dhidden, dlogits(wide @ p.weight[p.columns].double().T, p.columns, slice(None)).T @ wide


def products(p: Problem, count: int = 3) -> Callable[[object], tuple[Tensor, Tensor]]:
    """Bytes that cannot be avoided: the logits (again where they are formed again) and the two gradients, in the
    operands' dtype, results new.
    """

    def run(_: object) -> tuple[Tensor, Tensor]:
        for _ in range(count - 2):
            d = p.hidden @ p.weight.T
        return d @ p.weight, d.T @ p.hidden

    return run


def products_check(p: Problem) -> Callable[[tuple[Tensor, Tensor]], dict[str, float]]:
    """Error of the first result of ``products`` on the checked rows: the floor does the work that it stands for."""
    some = p.hidden[p.rows].double()
    expected = torch.zeros_like(some)
    for block in _blocks(p.weight.shape[0], len(p.rows)):
        columns = p.weight[block].double()
        expected += some @ columns.T @ columns
    return lambda outputs: {"product": relative(outputs[0][p.rows], expected)}


def full_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of the target with the logits of all tokens at once, as trainers write it."""
    return log_softmax_gather(hidden @ weight.T, targets)


def judge(
    p: Problem, loss: Callable[[Tensor], Tensor] | None = None, dentropy: Tensor | None = None, further: float = 0.0
) -> Judge:
    """The judge of a loss, or of the statistics themselves with the problem's upstream gradients.

    Args:
        loss: takes log-probabilities ``[T]``.
        dentropy: the gradient that arrives at the entropy; None: the entropy is not asked for.
        further: how far the loss and the gradients may err for what the loss loses to its fp32 sums.
    """
    values, dlogp = {"logp": p.truth.logp}, p.dlogp
    if dentropy is not None:
        values["entropy"] = p.truth.entropy
    if loss is not None:
        leaf = p.truth.logp.clone().requires_grad_()
        expected = loss(leaf)
        (dlogp,) = torch.autograd.grad(expected, leaf)
        values = {"loss": expected.detach()}
    dhidden, dweight = gradients(p, dlogp, dentropy)
    return Judge(values, {"dhidden": (p.rows, dhidden), "dweight": (p.columns, dweight)}, further=further)


def judge_of_logits(p: Problem, loss: Callable[[Tensor, Tensor], Tensor]) -> Judge:
    """The judge of a mean over tokens of a function of their logits.

    Its gradient is a difference of log-probabilities, of which each is known to a few roundings of the largest logit.

    Args:
        loss: the mean over some rows, from their float64 logits and their indices.
    """
    weight, tokens, largest = p.weight.double(), p.hidden.shape[0], 0.0
    value, dhidden = weight.new_zeros(()), torch.zeros_like(p.hidden[p.rows], dtype=torch.float64)
    dweight = weight.new_zeros(len(p.columns), weight.shape[1])
    for rows in torch.arange(tokens, device=weight.device).split(max(1, PIECE // weight.shape[0])):
        hidden = p.hidden[rows].double()
        logits = (hidden @ weight.T).requires_grad_()
        largest = max(largest, logits.detach().abs().max().item())
        part = loss(logits, rows) * len(rows) / tokens
        (dlogits,) = torch.autograd.grad(part, logits)
        value += part.detach()
        dweight += dlogits[:, p.columns].T @ hidden
        checked = torch.isin(p.rows, rows)
        dhidden[checked] = dlogits[p.rows[checked] - rows[0]] @ weight
    return Judge(
        {"loss": value}, {"dhidden": (p.rows, dhidden), "dweight": (p.columns, dweight)}, further=4 * EPS * largest
    )
