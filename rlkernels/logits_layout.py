"""The way from public arguments of any leading shape to the layout of the ops.

Ops take logits ``[T, V]`` or ``[B, L, V]``, and everything else as ``[T]``.
"""

from typing import NamedTuple

import torch

from rlkernels import checks
from rlkernels.backends.eager import real_dtype
from rlkernels.checks import tokens as checks_tokens
from rlkernels.tracing import replaced


class Rows(NamedTuple):
    """The checked logits, and what belongs to each of their rows."""

    logits: torch.Tensor
    targets: torch.Tensor
    temperature: float | torch.Tensor
    ignore_index: int
    vocab_mask: torch.Tensor | None
    shape: torch.Size
    real: torch.dtype | None  # of per-row results

    def without(self, dead):
        """Returns the same rows, of which those that are ``dead`` (bool, any shape) are ignored.

        A dead row gets the target ``ignore_index`` and the temperature 1, so that nobody looks at what it held.
        """
        dead = dead.reshape(-1)
        return replaced(
            self, targets=or_ignored(dead, self.targets, self.ignore_index), temperature=or_one(dead, self.temperature)
        )

    def flat(self, x):
        """Flattens a per-row tensor to a contiguous ``[T]`` of the arithmetic's dtype; None stays None."""
        if x is None:
            return None
        x = dense(x.detach() if x.requires_grad else x, self.real)
        return x if x.dim() == 1 else x.view(-1)


def or_ignored(dead, targets, ignore_index):
    """Replaces the target of each dead token by ``ignore_index``, whatever id it is."""
    narrow = targets.dtype == torch.int32 and not -(2**31) <= ignore_index < 2**31
    return (targets.long() if narrow else targets).masked_fill(dead, ignore_index)  # takes 4 us less than torch.where


def or_one(dead, temperature):
    """Replaces the temperature of each dead token by 1; a number for all tokens stays as it is."""
    return (
        temperature.masked_fill(dead, 1.0)
        if isinstance(temperature, torch.Tensor) and temperature.dim()
        else temperature
    )


def dense(x, dtype):
    """Returns ``x`` contiguous and in ``dtype``.

    This is ``x`` itself where possible, because a conversion that does nothing costs 1 us, and its node in the backward
    costs more.
    """
    return (x if x.dtype == dtype else x.to(dtype)).contiguous()


def matrix(logits):
    """Brings logits to at most three dimensions and a unit last stride.

    Logits such as ``logits[:, :-1]`` pass without a copy.
    """
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        logits = logits.contiguous()
    if logits.dim() == 1:
        return logits[None]
    # Flatten, because a reshape to -1 cannot infer a size where there are no rows.
    return logits if logits.dim() <= 3 else logits.flatten(0, -3)


def rows(caller, logits, targets, temperature, ignore_index, vocab_mask, inplace_backward=False):
    """Checks the arguments that every function over logits shares, and brings them to the layout of the ops."""
    checks.logits(caller, logits)
    shape = logits.shape[:-1]
    checks.targets(caller, targets, shape)
    ignore_index = checks.integer(caller, "ignore_index", ignore_index)
    targets = checks_tokens.holding(caller, targets, ignore_index)
    temperature = checks.temperature(caller, temperature, shape)
    checks.vocab_mask(caller, vocab_mask, logits.shape)
    checks.one_device(caller, "logits", logits, targets=targets, temperature=temperature, vocab_mask=vocab_mask)
    checks.no_forward_ad(caller, logits)
    if inplace_backward:
        checks.inplace(caller, logits)
    per_row = isinstance(temperature, torch.Tensor)
    temperature = dense(temperature, real_dtype(logits.dtype)).view(-1) if per_row else float(temperature)
    if vocab_mask is not None and vocab_mask.dim() > 1:
        vocab_mask = vocab_mask.reshape(-1, vocab_mask.shape[-1])
    return Rows(
        matrix(logits),
        targets if targets.dim() == 1 else targets.reshape(-1),
        temperature,
        ignore_index,
        vocab_mask,
        shape,
        real_dtype(logits.dtype),
    )
