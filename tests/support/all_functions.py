"""An objective that calls the functions which no built-in one calls, and what it is in float64."""

import torch

from rlkernels.objectives import abs, maximum, minimum, sqrt, tanh, where


def bent(logp, advantage, low=-0.5):
    """``tanh(x) + sqrt(|x|) + max(x, a) + min(x, low)`` with its derivative by the convention of the language."""
    size = abs(logp)
    root = sqrt(size)
    bend = tanh(logp)
    value = bend + root + maximum(logp, advantage) + minimum(logp, low)
    sign = where(logp < 0.0, -1.0, where(logp > 0.0, 1.0, 0.0 * logp))
    slope = 1.0 - bend * bend + 0.5 * sign / root
    return value, slope + where(logp > advantage, 1.0, 0.0 * advantage) + where(logp < low, 1.0, 0.0)


def truth(x, a, low=-0.5):
    """The value and the derivative, by torch's own functions."""
    x, a = x.double().requires_grad_(), a.double()
    value = x.tanh() + x.abs().sqrt() + torch.maximum(x, a) + torch.minimum(x, torch.tensor(low).double())
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


def columns(dtype, n=257):
    """Both signs, from 1e-30 to 40; no ties and no zeros, which ``special`` has."""
    draw = torch.Generator().manual_seed(5)
    x = torch.cat([torch.logspace(-30, 1.6, n // 2), -torch.logspace(-30, 1.6, n - n // 2)]).to(dtype)
    return x, torch.randn(n, generator=draw, dtype=dtype)


def special(dtype):
    """``(columns, value)`` where an operand is NaN, infinite, or equal to the other one."""
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([nan, 1.0, inf, -inf, 2.0, 0.0, -0.5], dtype=dtype)
    a = torch.tensor([1.0, nan, 1.0, 1.0, 2.0, -inf, 0.0], dtype=dtype)
    wide = x.double()
    value = wide.tanh() + wide.abs().sqrt() + torch.maximum(wide, a.double()) + wide.clamp(max=-0.5)
    return (x, a), value
