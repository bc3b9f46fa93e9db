"""What the bits of a row depend on here: ``python linear_bits.py`` prints, per dtype of head and logits, whether the
product is ours and what moved them.
"""

import json

import torch

import rlkernels as rlk
from rlkernels.backends import cpu_matmul

SIZES = (64, 257, 100), (40, 96, 3001), (23, 1024, 1500)
"""Tokens, features, columns.

With the first two of these MKL adds in another order on four threads; with the last in another chunk.
"""
DTYPES = (
    ("float32", "float32"),
    ("float32", "bfloat16"),
    ("bfloat16", "float32"),
    ("bfloat16", "bfloat16"),
    ("float16", "float32"),
    ("float16", "float16"),
    ("float64", "float64"),
)


def results(hidden, weight, bias, targets, **options):
    """Of each row: log-probability, entropy, and the gradients of its hidden states through the statistics and through
    a loss.
    """
    leaf = hidden.clone().requires_grad_()
    stats = rlk.linear_token_stats(leaf, weight, targets, bias=bias, softcap=30.0, **options)
    (one,) = torch.autograd.grad(stats.logprobs.sum() + stats.entropy.sum(), leaf)
    (two,) = torch.autograd.grad(
        rlk.linear_sft_loss(leaf, weight, targets, aggregation="token-sum", bias=bias, **options), leaf
    )
    return stats.logprobs.detach(), stats.entropy.detach(), one, two


def moved(ours, dtype, logits_dtype, tokens, features, columns):
    """What changes a bit: time; and where the product is ours, which nothing should: the threads, the chunk, or the
    rows that come along.
    """
    draw = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)
        for shape in ((tokens, features), (columns, features), (columns,))
    )
    targets, found = torch.randint(columns, (tokens,), generator=draw), set()

    def run(threads, rows=slice(None), **options):
        torch.set_num_threads(threads)
        return results(hidden[rows], weight, bias, targets[rows], logits_dtype=logits_dtype, **options)

    def compare(what, other, rows=slice(None)):
        if not all(torch.equal(x[rows], y) for x, y in zip(first, other, strict=True)):
            found.add(what)

    first = run(4)
    compare("time", run(4))
    for threads, chunk in ((1, None), (2, None), (1, 16), (4, 16), (2, 23)) if ours else ():
        compare("threads" if chunk is None else "chunk", run(threads, chunk_tokens=chunk))
    for rows in (slice(5, 6), slice(3, 20), slice(None, None, 3)) if ours else ():
        compare("rows", run(2, rows), rows)
    return sorted(found)


def main():
    wide, found = cpu_matmul.fp32_preferred(), {}
    for head, logits in DTYPES:
        ours = {("bfloat16", "float32"): wide or cpu_matmul.available(), ("bfloat16", "bfloat16"): False}.get(
            (head, logits), wide and head != "float64"
        )
        found[f"{head} {logits}"] = (
            ours,
            sorted(
                {what for size in SIZES for what in moved(ours, getattr(torch, head), getattr(torch, logits), *size)}
            ),
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
