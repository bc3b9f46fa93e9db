"""A loss that already holds its gradients."""

import torch

from rlkernels.backends import cpu_memory
from rlkernels.ops.register import DOUBLE_BACKWARD


class _Held(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, held, again, *inputs):
        ctx.held, ctx.again = held, again
        # An input changed in between raises, instead of meeting the gradient of what it was.
        ctx.save_for_backward(*inputs)
        return loss.clone()

    @staticmethod
    def backward(ctx, upstream):
        if torch.is_grad_enabled():
            raise RuntimeError(DOUBLE_BACKWARD)
        inputs, held = ctx.saved_tensors, ctx.held
        ctx.held = None
        return (
            None,
            None,
            None,
            *(None if d is None else _scaled(d, upstream, x) for d, x in zip(held or ctx.again(), inputs, strict=True)),
        )


def _scaled(gradient, upstream, like):
    """One rounding, to the dtype of what it is the gradient of."""
    on_cpu, same = upstream.device.type == "cpu", gradient.dtype == like.dtype
    if not on_cpu and not same:
        return torch.mul(gradient, upstream, out=torch.empty_like(like))
    if not on_cpu or upstream.item() != 1.0:  # read on the CPU alone: elsewhere the host would wait
        gradient.mul_(upstream)
    return gradient if same else cpu_memory.empty(like.shape, like.dtype).copy_(gradient)


def with_gradients(loss, gradients, again, *inputs):
    """``loss``, differentiable in ``inputs``; their gradients (None: not wanted) are given away once, then ``again()``
    makes them anew.
    """
    return _Held.apply(loss, gradients, again, *inputs)
