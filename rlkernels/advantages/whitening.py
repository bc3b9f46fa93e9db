"""Whitening: advantages of zero mean and unit variance."""

from typing import get_args

import torch
from torch import Tensor

from rlkernels import checks
from rlkernels.checks import tokens as checks_tokens
from rlkernels.sequences import result_dtype
from rlkernels.types import EpsMode, Mask, Number

EPS_MODES = get_args(EpsMode)


def _dimensions(caller: str, dim: int | tuple[int, ...] | list[int], count: int) -> tuple[int, ...]:
    """Returns ``dim``, one dimension or several, as a tuple; refuses what does not name dimensions of ``x``."""
    dims = tuple(checks.integer(caller, "dim", axis) for axis in (dim if isinstance(dim, (tuple, list)) else (dim,)))
    if any(not -count <= axis < count for axis in dims) or len({axis % count for axis in dims}) < len(dims):
        raise ValueError(
            f"{caller}: dim must name dimensions of x, each once, from {-count} to {count - 1}; got {dim!r}"
        )
    return dims


def masked_whiten(
    x: Tensor,
    mask: Mask | None = None,
    *,
    shift_mean: bool = True,
    unbiased: bool = True,
    eps: Number = 1e-8,
    eps_mode: EpsMode = "add",
    dim: int | tuple[int, ...] | list[int] | None = None,
) -> Tensor:
    r"""Zero mean and unit variance over live elements; dead ones return 0.

    ``y = (x - mean) / sqrt(var + eps)``, or ``/ sqrt(max(var, eps))`` with ``eps_mode="clamp"``;  ``var = sum (x -
    mean)^2 / (n - 1)``.

    Args:
        x: any float dtype and shape.
        mask: live elements, shaped like ``x``, any pattern; None: all.
        shift_mean: False adds the mean back: only the spread is normalised.
        unbiased: False divides by ``n`` instead of ``n - 1``.
        eps, eps_mode: what keeps a small variance from dividing by 0.
        dim: statistics along these dimensions; None: one mean and variance for all of ``x``.

    Returns:
        shaped like ``x``: float32, float64 for float64. Equal elements, or one, have no spread: 0 (the mean without
            ``shift_mean``).

    Raises:
        TypeError: ``x`` not floating, ``mask`` complex. ValueError: shapes differ; ``eps`` negative; unknown
            ``eps_mode``.

    Example:
        >>> masked_whiten(torch.tensor([1.0, 3.0, float("nan")]), torch.tensor([1, 1, 0]), unbiased=False)
        tensor([-1.,  1.,  0.])

    Schulman et al. 2017 (reference code); unbiased as in TRL and verl, population and clamp as in OpenRLHF.
    """
    caller = "masked_whiten"
    checks.floating(caller, "x", x)
    checks.mask(caller, mask, x.shape)
    checks.one_device(caller, "x", x, mask=mask)
    checks.choice(caller, "eps_mode", eps_mode, EPS_MODES)
    eps = checks_tokens.not_negative(caller, "eps", eps, x)
    live = (
        torch.ones_like(x, dtype=torch.bool, memory_format=torch.contiguous_format)
        if mask is None
        else (mask != 0).contiguous()
    )
    dim = tuple(range(x.dim())) if dim is None else _dimensions(caller, dim, x.dim())

    def mean(values: Tensor, fewer: int = 0) -> Tensor:
        # sum, not nansum, because the caller must see a NaN in a live element.
        return values.sum(dim, keepdim=True) / (live.sum(dim, keepdim=True) - fewer).clamp(min=1)

    # Measured from the smallest live element, because equal elements are then exactly 0. x - mean may leave 1e-17, and
    # a division by that spread makes 1 of it where eps is 0.
    wide = x.double().contiguous()  # torch adds in the order of memory
    base = torch.where(live, wide.detach(), torch.inf).amin(dim, keepdim=True) if x.numel() else wide.new_zeros(())
    offset = torch.where(live, wide - base, 0.0)
    centre = mean(offset)
    gap = torch.where(live, offset - centre, 0.0)
    variance = mean(gap * gap, fewer=1 if unbiased else 0)
    floor = variance + eps if eps_mode == "add" else variance.clamp(min=eps)
    scale = torch.where(variance == 0, 0.0, torch.where(variance == 0, 1.0, floor).rsqrt())
    whitened = gap * scale if shift_mean else gap * scale + (base + centre)
    return torch.where(live, whitened, 0.0).to(result_dtype(x))
