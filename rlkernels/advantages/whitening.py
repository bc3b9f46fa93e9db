"""Whitening: advantages of zero mean and unit variance."""

from typing import get_args

import torch
from torch import Tensor

from rlkernels import checks
from rlkernels.advantages.moments import (
    Moments,
    dimensions,
    given_moments,
    live_elements,
    local_moments,
    masked_moments,
    over_ranks,
)
from rlkernels.checks import tokens as checks_tokens
from rlkernels.sequences import result_dtype
from rlkernels.types import Dimensions, EpsMode, Mask, Number

EPS_MODES = get_args(EpsMode)


def masked_whiten(
    x: Tensor,
    mask: Mask | None = None,
    *,
    shift_mean: bool = True,
    unbiased: bool = True,
    eps: Number = 1e-8,
    eps_mode: EpsMode = "add",
    dim: Dimensions = None,
    moments: Moments | None = None,
    process_group: "torch.distributed.ProcessGroup | None" = None,
) -> Tensor:
    r"""Gives live elements zero mean and unit variance; dead ones return 0.

    ``y = (x - mean) / sqrt(var + eps)``, or ``/ sqrt(max(var, eps))`` with ``eps_mode="clamp"``;  ``var = sum (x -
    mean)^2 / (n - 1)``.

    Args:
        x: any float dtype and shape.
        mask: live elements, shaped like ``x``, any pattern; None: all.
        shift_mean: False adds the mean back: only the spread is normalised.
        unbiased: False divides by ``n`` instead of ``n - 1``.
        eps, eps_mode: what keeps a small variance from dividing by 0.
        dim: statistics along these dimensions; None: one mean and variance for all of ``x``.
        moments: those of the whole batch, where ``x`` is a part of it; constants for autograd.
        process_group: the ranks over which the batch lies, as for ``masked_moments``; its moments are constants, too.

    Returns:
        shaped like ``x``: float32, float64 for float64. Equal elements, or one, have no spread: 0 (the mean without
            ``shift_mean``).

    Raises:
        TypeError: ``x`` not floating, ``mask`` complex. ValueError: shapes differ; ``eps`` negative; unknown
            ``eps_mode``; ``moments`` beside ``process_group``.

    Example:
        >>> masked_whiten(torch.tensor([1.0, 3.0, float("nan")]), torch.tensor([1, 1, 0]), unbiased=False)
        tensor([-1.,  1.,  0.])

    Schulman et al. 2017 (reference code); unbiased as in TRL and verl, population and clamp as in OpenRLHF.
    """
    caller = "masked_whiten"
    unbiased = checks.flag(caller, "unbiased", unbiased)
    shift_mean = checks.flag(caller, "shift_mean", shift_mean)
    checks.floating(caller, "x", x)
    checks.mask(caller, mask, x.shape)
    checks.one_device(caller, "x", x, mask=mask)
    checks.choice(caller, "eps_mode", eps_mode, EPS_MODES)
    eps = checks_tokens.not_negative(caller, "eps", eps, x)
    live = live_elements(x, mask)
    dims = dimensions(caller, dim, x.dim())
    if moments is not None or process_group is not None:
        if moments is not None and process_group is not None:
            raise ValueError(f"{caller}: moments and process_group both give the statistics; pass one of them")
        if process_group is not None and dim is not None:
            raise ValueError(f"{caller}: process_group takes the moments of all elements; leave dim out")
        kept = [1 if axis in {d % x.dim() for d in dims} else size for axis, size in enumerate(x.shape)]
        if moments is None:
            moments = over_ranks(caller, masked_moments(x.detach(), mask), process_group)
        count, mean, squares = given_moments(caller, moments, () if dim is None else kept, x)
        gap = torch.where(live, x.double() - mean, 0.0)
    else:
        local = local_moments(x, live, dims)
        count, mean, squares, gap = local.count, local.base + local.centre, local.squares, local.gap
    variance = squares / (count - int(unbiased)).clamp(min=1)
    floor = variance + eps if eps_mode == "add" else variance.clamp(min=eps)
    scale = torch.where(variance == 0, 0.0, torch.where(variance == 0, 1.0, floor).rsqrt())
    whitened = gap * scale if shift_mean else gap * scale + mean
    return torch.where(live, whitened, 0.0).to(result_dtype(x))
