"""What a self-test does to results: an oracle that sees none of these is no oracle."""

import os
import signal

import torch


class _SteeperBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g * 1.01


def _each(change):
    """``change`` of every tensor of a result: alone, in a tuple, in a dict of metrics."""

    def changed(x):
        if isinstance(x, torch.Tensor):
            return change(x)
        if isinstance(x, dict):
            return {name: changed(part) for name, part in x.items()}
        if isinstance(x, tuple):
            parts = [changed(part) for part in x]
            return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
        return x

    return changed


CHANGES = {
    None: None,
    "values": _each(lambda x: x * 1.01 if x.is_floating_point() else ~x if x.dtype == torch.bool else x + 1),
    "crash": lambda x: os.kill(os.getpid(), signal.SIGSEGV),
    "company": _each(lambda x: x * 1.01 if x.is_floating_point() and x.numel() > 1 else x),
    "gradients": _each(lambda x: _SteeperBackward.apply(x) if x.is_floating_point() and x.requires_grad else x),
}
"""Values and gradients change by one percent, or to the opposite of what is true or false; of "company", values beside
others alone.
"""
