"""The live tokens of the largest entropies."""

import torch
from torch import Tensor

from rlkernels import checks
from rlkernels.sequences import result_dtype
from rlkernels.types import Mask, Number, PerToken


def top_entropy_mask(entropy: PerToken, mask: Mask | None = None, fraction: Number = 0.2) -> Tensor:
    r"""Selects the live tokens whose entropy is at least the ``1 - fraction`` quantile of all live ones.

    The quantile lies on the line between its two neighbours among the sorted entropies, as ``torch.quantile`` has it.
    It is that of the tokens of this call, so call it with the whole batch, before it is cut into micro-batches, and
    pass the part of each as the ``correction`` of its loss.

    Args:
        entropy: any shape and float dtype; not differentiated here.
        mask: live tokens, same shape, any pattern.
        fraction: the share of live tokens that stay, in (0, 1]; ties at the quantile stay, too.

    Returns:
        bool, shaped like ``entropy``: live and selected. A token whose entropy is NaN stays, so that the loss shows it.

    Raises:
        TypeError, ValueError: dtypes or shapes that do not match; ``fraction`` out of range.

    Example:
        >>> top_entropy_mask(torch.tensor([[0.1, 2.0, 0.5, 0.3, 9.0]]), torch.tensor([[1, 1, 1, 1, 0]]), 0.25)
        tensor([[False,  True, False, False, False]])

    Wang et al. 2025, arXiv:2506.01939 (80/20 rule); TRL ``top_entropy_quantile``.
    """
    caller = "top_entropy_mask"
    checks.floating(caller, "entropy", entropy)
    checks.no_forward_ad(caller, entropy)
    checks.mask(caller, mask, entropy.shape)
    checks.one_device(caller, "entropy", entropy, mask=mask)
    fraction = checked_fraction(caller, "fraction", fraction, entropy)
    return highest(entropy, torch.ones_like(entropy, dtype=torch.bool) if mask is None else mask != 0, fraction)


def checked_fraction(caller: str, name: str, x: Number, like: Tensor) -> Number:
    """Returns a share of tokens, refused unless it lies in (0, 1] where the host knows it."""
    x = checks.coefficient(checks.positive, caller, name, x, like)
    if not isinstance(x, torch.Tensor) and x > 1:
        raise ValueError(f"{caller}: {name} must be in (0, 1], got {x}")
    return x


@torch.no_grad()
def highest(entropy: Tensor, live: Tensor, fraction: Number) -> Tensor:
    """Computes ``top_entropy_mask`` of checked arguments; ``live``: bool."""
    entropy = entropy.detach().to(result_dtype(entropy))
    # NaN sorts last, so that dead tokens lie behind the live ones.
    ordered = torch.sort(torch.where(live, entropy, torch.nan).reshape(-1)).values
    if not ordered.shape[0]:
        return live
    # An integer within rounding is that integer, because 25 (1 - 0.4) is 15.0000006 in float32, and the token in place
    # 15 would drop out.
    place = (live.sum() - 1).clamp(min=0).double() * (1.0 - fraction)
    place = torch.where((place - place.round()).abs() < 1e-6, place.round(), place)
    below = place.floor()
    # Both in one tensor, because an index of shape () would be read by the host.
    low, high = ordered[torch.stack([below, place.ceil()]).long()].unbind()
    # Their difference times 0 would be NaN between equal infinities.
    quantile = torch.where(low == high, low, low + (high - low) * (place - below).to(low.dtype))
    return live & ~(entropy < quantile)
