"""A test of whether the fused head's time is linear in tokens and vocabulary here: ``time = a + b T V H``, fitted and
judged.

``python benchmarks/scaling/fit.py [--quick] [--dtype fp32|bf16] [--threads N] [--busy]``

``linear_policy_loss`` forward and backward over a grid of ``T`` and ``V``; points in turn, the fastest of all rounds
(what other processes take only adds). The largest point is left out of the fit and predicted by it. The bare products
are timed in the same turns, into memory that is there already: ``b`` in units of theirs says what everything around
them costs.
"""

import argparse
import itertools
import time
from typing import NamedTuple

import torch

import rlkernels as rlk
from rlkernels.cli import machine

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Fit(NamedTuple):
    """``time = a + b work``; the fit minimises relative errors.

    ``worst``: the largest of them, signed; ``r2``: of the times themselves.
    """

    a: float
    b: float
    r2: float
    worst: float


def fit(work, times):
    """Weighted least squares: a point of 1 ms counts as much as one of 1 s."""
    work, times = (torch.tensor(x, dtype=torch.float64) for x in (work, times))
    design = torch.stack([torch.ones_like(work), work / work.max()], 1)
    a, scaled = torch.linalg.lstsq(design / times[:, None], torch.ones_like(times)).solution.tolist()
    predicted = design @ torch.tensor([a, scaled], dtype=torch.float64)
    gap = times - predicted
    errors = gap / predicted
    r2 = 1 - (gap.square().sum() / (times - times.mean()).square().sum()).item()
    return Fit(a, scaled / work.max().item(), r2, errors[errors.abs().argmax()].item())


class Point:
    """One batch: the call that is timed, and its three products alone."""

    def __init__(self, tokens, vocab, width, dtype, memory):
        sizes = (tokens, vocab), (tokens, width), (vocab, width)
        self.logits, self.dhidden, self.dweight = (
            x[: rows * columns].view(rows, columns) for x, (rows, columns) in zip(memory, sizes, strict=True)
        )
        draw = torch.Generator().manual_seed(0)
        self.tokens, self.vocab, self.work = tokens, vocab, tokens * vocab * width
        self.hidden = torch.randn(tokens, width, generator=draw).to(dtype).requires_grad_()
        self.weight = (torch.randn(vocab, width, generator=draw) * width**-0.5).to(dtype).requires_grad_()
        self.targets = torch.randint(vocab, (tokens,), generator=draw)
        self.advantages = torch.randn(tokens, generator=draw)
        with torch.no_grad():
            self.old = rlk.linear_token_logprobs(self.hidden, self.weight, self.targets) + 0.1 * torch.randn(
                tokens, generator=draw
            )
        self.times, self.bare_times = [], []

    def ours(self):
        loss = rlk.linear_policy_loss(
            self.hidden, self.weight, self.targets, self.old, self.advantages, ref_logprobs=self.old, kl_coef=0.05
        )
        return torch.autograd.grad(loss, (self.hidden, self.weight))

    def bare(self):
        """The products of a dense head, with nothing between them, in torch's own way for the dtype."""
        hidden, weight = self.hidden.detach(), self.weight.detach()
        torch.mm(hidden, weight.t(), out=self.logits)
        torch.mm(self.logits, weight, out=self.dhidden)
        torch.mm(self.logits.t(), hidden, out=self.dweight)

    def run(self, clock):
        for function, times in ((self.ours, self.times), (self.bare, self.bare_times)):
            start = clock()
            function()
            times.append(clock() - start)


def measure(tokens, vocabularies, width, dtype, rounds, clock):
    """Points of the grid, each with its samples; the first round is a warm-up."""
    memory = [
        torch.zeros(max(tokens) * max(vocabularies), dtype=dtype),
        *(torch.zeros(n * width, dtype=dtype) for n in (max(tokens), max(vocabularies))),
    ]
    points = [Point(t, v, width, dtype, memory) for t, v in itertools.product(tokens, vocabularies)]
    for _ in range(rounds + 1):
        for point in points:
            point.run(clock)
    for point in points:
        del point.times[:1], point.bare_times[:1]
    return points


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes: seconds, and noisier")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--threads", type=int, help="torch's threads")
    parser.add_argument(
        "--busy",
        action="store_true",
        help="others share the machine: one thread, and its processor time instead of the clock on the wall",
    )
    options = parser.parse_args(arguments)
    if options.threads or options.busy:
        torch.set_num_threads(1 if options.busy else options.threads)
    tokens, vocabularies, width, rounds = (
        ((128, 256, 512), (2000, 4000, 8000), 64, 5)
        if options.quick
        else ((128, 256, 512, 1024), (8000, 16000, 32000, 64000), 256, 7)
    )
    print(
        f"{machine.processor()}, {machine.cores()} cores, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, {options.dtype}, H {width}"
    )
    *points, largest = measure(
        tokens,
        vocabularies,
        width,
        DTYPES[options.dtype],
        rounds,
        time.process_time if options.busy else time.perf_counter,
    )
    print(
        f"linear_policy_loss forward and backward, {'processor ' if options.busy else ''}ms (in units of the three "
        "bare products of that point)"
    )
    print("".join(f"{name:>18}" for name in ("T \\ V", *vocabularies)))
    everyone = iter([*points, largest])
    for t in tokens:
        row = [next(everyone) for _ in vocabularies]
        print(
            f"{t:>18}" + "".join((f"{min(p.times) * 1e3:>11.1f} ({min(p.times) / min(p.bare_times):.2f})") for p in row)
        )
    found = fit([p.work for p in points], [min(p.times) for p in points])
    bare = fit([p.work for p in points], [min(p.bare_times) for p in points])
    predicted, measured = found.a + found.b * largest.work, min(largest.times)
    print(
        f"fit: time = {found.a * 1e3:.3f} ms + {found.b * 1e12:.4f} ps x T V H, R^2 {found.r2:.4f}, largest "
        f"deviation {found.worst:+.1%}"
    )
    print(
        f"bare products: {bare.a * 1e3:.3f} ms + {bare.b * 1e12:.4f} ps x T V H ({6e-9 / bare.b:.0f} GFLOP/s), R^2 "
        f"{bare.r2:.4f}"
    )
    print(f"slope: {found.b / bare.b:.2f} of the bare products'")
    print(
        f"T {largest.tokens}, V {largest.vocab}, left out of the fit: predicted {predicted * 1e3:.1f} ms, measured "
        f"{measured * 1e3:.1f} ms, "
        f"ratio {measured / predicted:.3f}"
    )
    return found


if __name__ == "__main__":
    main()
