"""The way from public arguments of any leading shape to the layout of the ops.

Ops take logits ``[T, V]`` or ``[B, L, V]``, and everything else as ``[T]``.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rlkernels import checks
from rlkernels.backends.protocol import RowBatch, real_dtype
from rlkernels.checks import tokens as checks_tokens
from rlkernels.tracing import replaced
from rlkernels.types import Logits, Targets, Temperature, VocabMask


class FlatLogits(NamedTuple):
    """Logits and what belongs to each row of them, checked and laid out as an op takes it.

    ``shape``: that of the caller's targets. ``real``: the dtype of per-row results.
    """

    rows: RowBatch
    shape: torch.Size
    real: torch.dtype

    def without(self, dead: Tensor) -> "FlatLogits":
        """Returns the same rows, of which those that are ``dead`` (bool, any shape) are ignored.

        A dead row gets the target ``ignore_index`` and the temperature 1, so that nobody looks at what it held.
        """
        dead, rows = dead.reshape(-1), self.rows
        targets = or_ignored(dead, rows.targets, rows.ignore_index)
        return replaced(self, rows=replaced(rows, targets=targets, temperature=or_one(dead, rows.temperature)))

    def per_row(self, x: Tensor | None) -> Tensor | None:
        """Returns a per-row tensor as a contiguous ``[T]`` of the arithmetic's dtype; None stays None."""
        if x is None:
            return None
        x = dense(x.detach() if x.requires_grad else x, self.real)
        return x if x.dim() == 1 else x.view(-1)


def or_ignored(dead: Tensor, targets: Targets, ignore_index: int) -> Tensor:
    """Replaces the target of each dead token by ``ignore_index``, whatever id it is."""
    narrow = targets.dtype == torch.int32 and not -(2**31) <= ignore_index < 2**31
    return (targets.long() if narrow else targets).masked_fill(dead, ignore_index)  # takes 4 us less than torch.where


def or_one(dead: Tensor, temperature: Temperature) -> Temperature:
    """Replaces the temperature of each dead token by 1; a number for all tokens stays as it is."""
    return (
        temperature.masked_fill(dead, 1.0)
        if isinstance(temperature, torch.Tensor) and temperature.dim()
        else temperature
    )


def dense(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns ``x`` contiguous and in ``dtype``.

    This is ``x`` itself where possible, because a conversion that does nothing costs 1 us, and its node in the backward
    costs more.
    """
    return (x if x.dtype == dtype else x.to(dtype)).contiguous()


def matrix(logits: Logits) -> Tensor:
    """Brings logits to at most three dimensions and a unit last stride.

    Logits such as ``logits[:, :-1]`` pass without a copy.
    """
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        logits = logits.contiguous()
    if logits.dim() == 1:
        return logits[None]
    # Flatten, because a reshape to -1 cannot infer a size where there are no rows.
    return logits if logits.dim() <= 3 else logits.flatten(0, -3)


def flatten_logits(
    caller: str,
    logits: Logits,
    targets: Targets,
    temperature: Temperature,
    ignore_index: int,
    vocab_mask: VocabMask | None,
    inplace_backward: bool = False,
) -> FlatLogits:
    """Checks the arguments that every function over logits shares and lays them out."""
    checks.logits(caller, logits)
    shape = logits.shape[:-1]
    checks.targets(caller, targets, shape)
    ignore_index = checks.integer(caller, "ignore_index", ignore_index)
    targets = checks_tokens.holding(caller, targets, ignore_index)
    temperature = checks.temperature(caller, temperature, shape)
    checks.vocab_mask(caller, vocab_mask, logits.shape)
    checks.one_device(caller, "logits", logits, targets=targets, temperature=temperature, vocab_mask=vocab_mask)
    checks.no_forward_ad(caller, logits)
    checks.flags(caller, inplace_backward=inplace_backward)
    if inplace_backward:
        checks.inplace(caller, logits)
    per_row = isinstance(temperature, torch.Tensor)
    temperature = dense(temperature, real_dtype(logits.dtype)).view(-1) if per_row else float(temperature)
    if vocab_mask is not None and vocab_mask.dim() > 1:
        vocab_mask = vocab_mask.reshape(-1, vocab_mask.shape[-1])
    targets = targets if targets.dim() == 1 else targets.reshape(-1)
    rows = RowBatch(matrix(logits), targets, temperature, ignore_index, vocab_mask)
    return FlatLogits(rows, shape, real_dtype(logits.dtype))
