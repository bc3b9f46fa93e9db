"""From public arguments of any leading shape to the layout of the ops: logits ``[T, V]`` or ``[B, L, V]``, everything
else ``[T]``.
"""

from typing import NamedTuple

import torch

from rlkernels import checks
from rlkernels.backends.protocol import RowBatch, real_dtype
from rlkernels.checks import tokens as checks_tokens
from rlkernels.tracing import replaced


class FlatLogits(NamedTuple):
    """Logits and what belongs to each row of them, checked and laid out as an op takes it.

    ``shape``: that of the caller's targets. ``real``: the dtype of per-row results.
    """

    rows: RowBatch
    shape: torch.Size
    real: torch.dtype

    def without(self, dead):
        """The same with rows that are ``dead`` (bool, of any shape) ignored; nobody looks at the target and the
        temperature that they hold.
        """
        dead, rows = dead.reshape(-1), self.rows
        targets = or_ignored(dead, rows.targets, rows.ignore_index)
        return replaced(self, rows=replaced(rows, targets=targets, temperature=or_one(dead, rows.temperature)))

    def per_row(self, x):
        """A per-row tensor as a contiguous ``[T]`` of the arithmetic's dtype; None stays None."""
        if x is None:
            return None
        x = dense(x.detach() if x.requires_grad else x, self.real)
        return x if x.dim() == 1 else x.view(-1)


def or_ignored(dead, targets, ignore_index):
    """Targets, and ``ignore_index`` at dead tokens: whatever id stands there."""
    narrow = targets.dtype == torch.int32 and not -(2**31) <= ignore_index < 2**31
    return (targets.long() if narrow else targets).masked_fill(dead, ignore_index)  # 4 us less than where


def or_one(dead, temperature):
    """A temperature per row, and 1 at dead tokens: whatever stands there. A number stays one."""
    return (
        temperature.masked_fill(dead, 1.0)
        if isinstance(temperature, torch.Tensor) and temperature.dim()
        else temperature
    )


def dense(x, dtype):
    """Contiguous, in ``dtype``; ``x`` itself where it is that already: a conversion that does nothing costs 1 us, and
    its node in the backward more.
    """
    return (x if x.dtype == dtype else x.to(dtype)).contiguous()


def matrix(logits):
    """At most three dimensions and a unit last stride.

    ``logits[:, :-1]`` passes as it is; only other layouts are copied.
    """
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        logits = logits.contiguous()
    if logits.dim() == 1:
        return logits[None]
    # A reshape to -1 cannot tell how many, where there are no rows.
    return logits if logits.dim() <= 3 else logits.flatten(0, -3)


def flatten_logits(where, logits, targets, temperature, ignore_index, vocab_mask, inplace_backward=False):
    """Checks the arguments that every function over logits shares and lays them out."""
    checks.logits(where, logits)
    shape = logits.shape[:-1]
    checks.targets(where, targets, shape)
    ignore_index = checks.integer(where, "ignore_index", ignore_index)
    targets = checks_tokens.holding(where, targets, ignore_index)
    temperature = checks.temperature(where, temperature, shape)
    checks.vocab_mask(where, vocab_mask, logits.shape)
    checks.one_device(where, "logits", logits, targets=targets, temperature=temperature, vocab_mask=vocab_mask)
    checks.no_forward_ad(where, logits)
    if inplace_backward:
        checks.inplace(where, logits)
    per_row = isinstance(temperature, torch.Tensor)
    temperature = dense(temperature, real_dtype(logits.dtype)).view(-1) if per_row else float(temperature)
    if vocab_mask is not None and vocab_mask.dim() > 1:
        vocab_mask = vocab_mask.reshape(-1, vocab_mask.shape[-1])
    targets = targets if targets.dim() == 1 else targets.reshape(-1)
    rows = RowBatch(matrix(logits), targets, temperature, ignore_index, vocab_mask)
    return FlatLogits(rows, shape, real_dtype(logits.dtype))
