"""An objective over columns: the weighted sum that is a loss, and the value of each element.

Parameters are numbers, or tensors of shape ``()`` that the host does not read. With such a tensor the objective runs in
plain torch, in a few launches more, because kernels take numbers alone.
"""

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from rlkernels import ops
from rlkernels.logits_layout import dense
from rlkernels.losses.token_weights import TokenWeights
from rlkernels.types import Number

Params: TypeAlias = Sequence[Number] | Tensor
"""The parameters of an objective, in its order; one tensor holds all of them."""


def parameters(values: Params) -> tuple[Number, ...] | Tensor:
    """Returns parameters as a tuple of numbers, or as one float64 tensor where one of them is a tensor.

    That tensor is on the device of the parameters that are not on the CPU. A tensor of all parameters stays as it is.
    """
    if isinstance(values, torch.Tensor):
        return values
    for x in values:
        if isinstance(x, torch.Tensor):
            break
    else:
        return tuple(values)
    devices = [x.device for x in values if isinstance(x, torch.Tensor)]
    # Not next(), because the Dynamo of torch 2.8 cannot trace it.
    device = [*[d for d in devices if d.type != "cpu"], devices[0]][0]
    # zeros + x, because a filled tensor would be a new compilation for each number.
    return torch.stack(
        [
            x.to(device, torch.float64)
            if isinstance(x, torch.Tensor)
            else torch.zeros((), dtype=torch.float64, device=device) + x
            for x in values
        ]
    )


def weighted_sum(objective: str, first: Tensor, others: list[Tensor], params: Params, weights: TokenWeights) -> Tensor:
    """Computes ``sum_i w_i l(first_i, others_i)``, differentiable in ``first``; the terms where ``weights.each``."""
    others = [dense(x.detach() if x.requires_grad else x, first.dtype) for x in others]
    if weights.each:
        return _terms(objective, first.contiguous(), others, params, weights)
    values = weights.values
    if values is not None:
        values = values.contiguous() if values.dtype == torch.bool else dense(values.detach(), first.dtype)
    first = first.contiguous()
    serving = ops.serving("weighted_loss", first)
    return ops.weighted_loss(
        objective, first, None, None, others, parameters(params), values, weights.count, weights.scale, serving
    )[0]


def _terms(objective: str, first: Tensor, others: list[Tensor], params: Params, weights: TokenWeights) -> Tensor:
    """Computes ``scale l(first_i, others_i)``, and 0 without a gradient where ``weights.values`` is 0."""
    live = None if weights.values is None else weights.values.to(first.dtype).contiguous()
    value = ops.elementwise(objective, first, others, parameters(params), live, ops.serving("elementwise", first))[1]
    return value if type(weights.scale) is float and weights.scale == 1.0 else value * weights.scale


def scaled_sum(
    coefficient: Number, objective: str, first: Tensor, others: list[Tensor], weights: TokenWeights
) -> Tensor:
    """Computes ``coefficient`` times the weighted sum of an objective without parameters.

    A number becomes a factor of the weights. A tensor multiplies the sum.
    """
    if not isinstance(coefficient, torch.Tensor):
        return weighted_sum(objective, first, others, (), weights.scaled(coefficient))
    # A copy, because a scheduler may write the next coefficient before the backward.
    return weighted_sum(objective, first, others, (), weights) * coefficient.to(first.dtype, copy=True)


def each(objective: str, x: Tensor, params: Params, weight: Tensor | None) -> Tensor:
    """Computes ``l(x_i)``, differentiable; the value is 0 and has no gradient where ``weight`` is 0."""
    x = x.contiguous()
    return ops.elementwise(objective, x, [], parameters(params), weight, ops.serving("elementwise", x))[1]
