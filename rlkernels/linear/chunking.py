"""The selection of the rows that enter a matmul: which rows, in which order, and how many at a time."""

import functools
import itertools
import os
from dataclasses import dataclass

import torch

from rlkernels import checks

CPU_BUDGET, BUDGET = 256 * 2**20, 2**30
"""Default bytes of logits; elsewhere as many as the sum of the weight's gradient if that is more.

On a CPU more only means more fresh pages to clear. Elsewhere the sum is read and written less often.
"""
ROWS = 16
"""A matmul has a multiple of this many rows.

With fewer or odd ones MKL adds in another order (seen at 1, 2, 3, 5, 7 and 31 rows): a row's log-probability would
depend on how many rows came with it.
"""


def budget_bytes(budget, device, sum_bytes=0):
    """Returns the caller's ``budget``, else ``RLKERNELS_LOGITS_BUDGET``, else the default of the device type.

    ``sum_bytes``: those of the fp32 sum of the weight's gradient, 0 where there is none.

    Raises:
        ValueError: the environment variable is no positive number.
    """
    if budget is not None:
        return budget
    text = os.environ.get("RLKERNELS_LOGITS_BUDGET")
    if text is not None and not (text.isdecimal() and int(text) > 0):
        raise ValueError(
            f"RLKERNELS_LOGITS_BUDGET must be a positive number of bytes, got {text!r}; correct it, or unset it"
        )
    if text is not None:
        return int(text)
    return max(BUDGET, sum_bytes) if on_accelerator(device) else CPU_BUDGET


def rows_within(budget, bytes_per_row):
    """Returns the rows of a chunk that a budget holds: a multiple of ROWS, ROWS at least."""
    return max(ROWS, budget // bytes_per_row // ROWS * ROWS)


def filled_up(rows):
    """Returns the next multiple of ROWS."""
    return -(-rows // ROWS) * ROWS


def on_accelerator(kind):
    """Tells whether a device of this type multiplies in tiles and waves, for which chunks are planned."""
    return kind != "cpu"


@functools.cache
def multiprocessors(device):
    """Returns the number of multiprocessors of a device of CUDA or ROCm; 1 of any other one: its waves are unknown."""
    # A fake tensor may be of a device that is not here.
    known = device.type == "cuda" and torch.cuda.is_available()
    return torch.cuda.get_device_properties(device).multi_processor_count if known else 1


@dataclass(eq=False)
class RowSelection:
    """Positions ``[m]`` of the rows that are worked on, in order.

    ``padding``: bool ``[m]``, True for padding rows. These only fill a bound (``max_live_tokens``); they are worked on,
    because the host does not know how many they are, and count for nothing. None: there are none.

    A dataclass, because it has a length: Dynamo makes a named tuple by ``_make``, which would take this length for the
    number of its fields.
    """

    index: torch.Tensor
    padding: torch.Tensor | None = None

    def __len__(self):
        return self.index.shape[0]

    def part(self, start, end):
        """Returns the rows ``[start, end)`` of the selection."""
        return RowSelection(self.index[start:end], None if self.padding is None else self.padding[start:end])

    def cut(self, sizes):
        """Returns the selection in parts of these ``sizes``."""
        ends = list(itertools.accumulate(sizes, initial=0))
        return [self.part(start, end) for start, end in itertools.pairwise(ends)]

    def at(self, positions):
        """Returns the rows at these ``positions`` of the selection."""
        return RowSelection(self.index[positions], None if self.padding is None else self.padding[positions])

    def select(self, x):
        """Returns the numbers of these rows out of a ``[T]``; a number for all rows, or None, stays as it is."""
        return x if x is None or x.dim() == 0 or x.shape[0] == 0 else x[self.index]

    def live(self, like):
        """Returns a bool tensor shaped like ``like``: False for padding rows."""
        if self.padding is None:
            return torch.ones_like(like, dtype=torch.bool, requires_grad=False)
        return ~self.padding

    def row_arguments(self, targets, temperature, ignore_index):
        """Returns ``targets, temperature, ignore_index`` of these rows, as a backend takes them."""
        selected = targets[self.index]
        selected = selected if self.padding is None else selected.masked_fill(self.padding, ignore_index)
        if not temperature.dim():
            return selected, temperature.item(), ignore_index
        per_row = self.select(temperature)
        return selected, per_row if self.padding is None else per_row.masked_fill(self.padding, 1.0), ignore_index

    def hidden(self, hidden):
        """Returns the hidden states ``[m', H]`` of these rows, ``m'`` the next multiple of ROWS.

        Padding rows and the rows behind the last one are 0, because 0 times a NaN that stands there would be NaN.
        """
        count = len(self)
        rows = hidden.new_empty(filled_up(count), hidden.shape[1])
        torch.index_select(hidden, 0, self.index, out=rows[:count])
        rows[count:].zero_()
        if self.padding is None:
            return rows
        nothing = torch.cat([self.padding, self.padding.new_zeros(rows.shape[0] - count)])
        return rows.masked_fill_(nothing[:, None], 0.0)


def live_rows(live, bound=None):
    """Selects the rows where ``live`` holds. The host reads their number, once, unless a ``bound`` for it is given.

    Raises:
        ValueError: more live rows than the bound; on an accelerator a device-side assertion fails instead.
    """
    _refuse_wrapper(live)
    if bound is None:
        return RowSelection(live.nonzero()[:, 0])
    return bounded_rows(live, bound, torch.argsort(~live, stable=True))


def _refuse_wrapper(live):
    """Raises TypeError for a subclass of Tensor that keeps its data in other tensors."""
    if hasattr(live, "__tensor_flatten__"):
        raise checks.named(
            TypeError(f"a mask, weights or advantages are a {type(live).__name__}, {checks.KEPT_ELSEWHERE}")
        )


def bounded_rows(live, bound, order):
    """Selects the first ``bound`` rows of ``order``, which begins with the live ones; raises as ``live_rows``."""
    enough = live.sum() <= bound
    if live.device.type == "cpu":
        if not enough:
            raise checks.named(
                ValueError(
                    f"max_live_tokens={bound}, but {int(live.sum())} tokens are live; raise the bound, or pass None to "
                    "have them counted"
                )
            )
    else:
        torch._assert_async(enough, "rlkernels: more live tokens than max_live_tokens")
    index = order[:bound]
    return RowSelection(index, ~live[index])


def rows_by_gradient(live, zero_gradient):
    """Selects the live rows in two parts: those that may have a gradient, and zero-gradient rows. One host read."""
    trained = live & ~zero_gradient
    _refuse_wrapper(trained)
    first, last = torch.stack([trained.sum(), live.sum()]).tolist()
    index = torch.argsort(torch.where(trained, 0, torch.where(live, 1, 2)), stable=True)
    return RowSelection(index[:first]), RowSelection(index[first:last])
