"""A loss that already holds its gradients."""

import torch

from rlkernels.backends import cpu_memory
from rlkernels.ops.register import DOUBLE_BACKWARD


class _Held(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, held, again, backend, *inputs):
        ctx.held, ctx.again, ctx.backend = held, again, backend
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
            None,
            *(
                None if d is None else _scaled(d, upstream, x, ctx.backend)
                for d, x in zip(held or ctx.again(), inputs, strict=True)
            ),
        )


def _scaled(gradient, upstream, like, backend):
    """Multiplies a gradient by the upstream one, with one rounding to the dtype of what it is the gradient of."""
    on_cpu, same = upstream.device.type == "cpu", gradient.dtype == like.dtype
    if not on_cpu and not same:
        return torch.mul(gradient, upstream, out=torch.empty_like(like))
    if not on_cpu or upstream.item() != 1.0:  # read on the CPU alone: elsewhere the host would wait
        gradient.mul_(upstream)
    if same:
        return gradient
    eager = backend == "eager"  # asks torch for memory, because it calls no native code
    memory = torch.empty(like.shape, dtype=like.dtype) if eager else cpu_memory.empty(like.shape, like.dtype)
    return memory.copy_(gradient)


def with_gradients(loss, gradients, again, backend, *inputs):
    """Returns ``loss``, differentiable in ``inputs``; their gradients (None: not wanted) are given away once, then
    ``again()`` makes them anew. ``backend``: asked for memory.
    """
    return _Held.apply(loss, gradients, again, backend, *inputs)
