"""Hidden states, weight and bias of a head in every layout, on this process's instruction set, against float64:
``python linear_operands.py``.
"""

import torch
from argument_layouts import LAYOUTS
from linear_problems import problem, rows

import rlkernels as rlk

OPERANDS = ("hidden", "weight", "bias")
FURTHER = {
    "transposed": lambda x: x.transpose(-2, -1).contiguous().transpose(-2, -1) if x.dim() > 1 else None,
    "a parameter": lambda x: torch.nn.Parameter(x.clone()),
    "a subclass of parameters": lambda x: Parameter(x.clone()),
}
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}


class Parameter(torch.nn.Parameter):
    """As trainers make them to carry an attribute."""


def laid_out(layout, x):
    """A leaf of that layout; None where there is none."""
    y = {**LAYOUTS, **FURTHER}[layout](x)
    return y if y is None or isinstance(y, torch.nn.Parameter) else y.requires_grad_()


def near(got, truth, other, tolerance, what):
    """In the Frobenius norm, in units of the truth or (where its terms cancel: all columns alike) of the ``other``
    operand's rows that it is summed from.
    """
    once = (truth.to(got.dtype).double() - truth).norm()
    error, size = (got.double() - truth).norm(), max(truth.norm(), other)
    assert got.shape == truth.shape and error <= tolerance * size + 1.05 * once, (
        f"{what}: error {error:.3g}, truth {truth.norm():.3g}, size {size:.3g}"
    )


def calls(d):
    def stats(h, w, b, **options):
        found = rlk.linear_token_stats(h, w, d["targets"], bias=b, **options)
        return (found.logprobs * d["advantages"] + found.entropy).sum()

    return {
        "stats": stats,
        "loss": lambda h, w, b, **options: rlk.linear_sft_loss(
            h, w, d["targets"], bias=b, aggregation="token-sum", **options
        ),
    }


def truth_of(name, d, operands):
    logp, entropy = rows(d, operands)
    return (logp * d["advantages"] + entropy).sum() if name == "stats" else -logp.sum()


def check(dtype, layout, which):
    d = problem(dtype, seed=2)
    operands = [laid_out(layout, d[name]) if name in which else d[name].clone().requires_grad_() for name in OPERANDS]
    if any(x is None for x in operands):
        return 0
    wide = [x.detach().resolve_neg().double().requires_grad_() for x in operands]
    for name, call in calls(d).items():
        truth = truth_of(name, d, wide)
        expected = torch.autograd.grad(truth, wide)
        for options in ({}, {"chunk_tokens": 5}):
            what = f"{name} of {dtype}, {'/'.join(which)} {layout}, {options}"
            loss = call(*operands, **options)
            assert (loss.double() - truth).abs() <= 10 * TOLERANCE[dtype] * max(1.0, truth.abs()), (
                f"{what}: {loss} against {truth}"
            )
            for part, got, true in zip(OPERANDS, torch.autograd.grad(loss, operands), expected, strict=True):
                other = {"hidden": wide[1].norm() / 10, "weight": wide[0].norm() / 10, "bias": 1.0}[part]
                near(
                    got,
                    true,
                    other,
                    10 * TOLERANCE[dtype] if dtype.itemsize > 2 else 1e-2,
                    f"{what}: gradient of {part}",
                )
    return 1


def main():
    tried = sum(
        check(dtype, layout, which)
        for dtype in TOLERANCE
        for layout in (*LAYOUTS, *FURTHER)
        for which in (*((name,) for name in OPERANDS), OPERANDS)
    )
    assert tried >= 100, tried
    print(tried)


if __name__ == "__main__":
    main()
