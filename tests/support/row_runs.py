"""Rows of logits run once for every statistic and a gradient, and two such runs compared."""

import torch
from reference import cotangents, same_bits

import rlkernels as rlk

SIXTEEN = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *SIXTEEN)
ALL = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def run(x, targets, *, g=None, **options):
    """Every statistic and the gradient of logprobs and entropy together."""
    x = x.detach().requires_grad_()
    stats = rlk.token_stats(x, targets, outputs=ALL, **options)
    g = cotangents(targets.shape, 2) if g is None else g
    (gradient,) = torch.autograd.grad((stats.logprobs, stats.entropy), x, g)
    return {**{k: v.detach() for k, v in stats._asdict().items() if v is not None}, "gradient": gradient}


def assert_same_bits(got, expected):
    for name, x in expected.items():
        assert same_bits(got[name], x), f"{name}: {got[name]} against {x}"


def assert_same(got, expected, backend):
    """Equal in every bit on the native backend; torch's own reductions follow strides, so eager is equal within
    rounding.
    """
    if backend != "eager":
        return assert_same_bits(got, expected)
    for name, x in expected.items():
        tolerance = 1e-5 if x.dtype == torch.float32 else 2e-2
        torch.testing.assert_close(
            got[name], x, atol=tolerance * 0.1, rtol=tolerance, equal_nan=True, msg=f"{name}: {got[name]} against {x}"
        )
