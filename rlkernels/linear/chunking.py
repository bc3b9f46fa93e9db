"""Rows that enter a product: which, in which order, and how many at a time."""

import os
from dataclasses import dataclass

import torch

from rlkernels import checks

BUDGET = {"cpu": 256 * 2**20}
"""Default bytes of logits per device type; elsewhere 1 GiB. On a CPU more only means more fresh pages to clear."""
ROWS = 16
"""A product has a multiple of this many rows.

With fewer or odd ones MKL adds in another order (seen at 1, 2, 3, 5, 7 and 31 rows): a row's log-probability would
depend on how many rows came with it.
"""


def budget_bytes(budget, device):
    """The caller's, else ``RLKERNELS_LOGITS_BUDGET``, else the device's."""
    if budget is not None:
        return budget
    given = os.environ.get("RLKERNELS_LOGITS_BUDGET")
    if given is not None and not (given.isdecimal() and int(given) > 0):
        raise ValueError(
            f"RLKERNELS_LOGITS_BUDGET must be a positive number of bytes, got {given!r}; correct it, or unset it"
        )
    return BUDGET.get(device, 2**30) if given is None else int(given)


def rows_within(budget, bytes_per_row):
    return max(ROWS, budget // bytes_per_row // ROWS * ROWS)


def filled_up(rows):
    """The next multiple of ROWS."""
    return -(-rows // ROWS) * ROWS


@dataclass(eq=False)
class Rows:
    """Positions of the rows that are worked on, in order. ``dead``: those among them that only fill a bound."""

    index: torch.Tensor
    dead: torch.Tensor | None = None

    def __len__(self):
        return self.index.shape[0]

    def part(self, start, end):
        return Rows(self.index[start:end], None if self.dead is None else self.dead[start:end])

    def of(self, x):
        """One number per row out of a ``[T]``; what is one for all, or absent, stays as it is."""
        return x if x is None or x.dim() == 0 or x.shape[0] == 0 else x[self.index]

    def arguments(self, targets, temperature, ignore_index):
        """``targets, temperature, ignore_index`` of these rows, as a backend takes them."""
        found = targets[self.index]
        found = found if self.dead is None else found.masked_fill(self.dead, ignore_index)
        if not temperature.dim():
            return found, temperature.item(), ignore_index
        of_each = self.of(temperature)
        return found, of_each if self.dead is None else of_each.masked_fill(self.dead, 1.0), ignore_index

    def hidden(self, hidden):
        """``[m, H]``, ``m`` a multiple of ROWS; the rows that fill up are 0, and so are dead ones: 0 times a NaN there
        would be NaN.
        """
        count = len(self)
        found = hidden.new_empty(filled_up(count), hidden.shape[1])
        torch.index_select(hidden, 0, self.index, out=found[:count])
        found[count:].zero_()
        return found if self.dead is None else found.masked_fill_(_filled(self.dead, found.shape[0])[:, None], 0.0)


def _filled(dead, size):
    return torch.cat([dead, dead.new_zeros(size - dead.shape[0])])


def live_rows(live, bound=None):
    """Rows where ``live`` holds. Their number is read by the host, once, unless a ``bound`` for it is given.

    Raises:
        ValueError: more live rows than the bound; on an accelerator a device-side assertion fails instead.
    """
    _are_there(live)
    return Rows(live.nonzero()[:, 0]) if bound is None else bounded_rows(live, bound, torch.argsort(~live, stable=True))


def _are_there(live):
    if hasattr(live, "__tensor_flatten__"):
        raise checks.named(
            TypeError(f"a mask, weights or advantages are a {type(live).__name__}, {checks.KEPT_ELSEWHERE}")
        )


def bounded_rows(live, bound, order):
    """The first ``bound`` rows of ``order``, which begins with the live ones; raises as ``live_rows``."""
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
    return Rows(index, ~live[index])


def moving_and_still_rows(live, still):
    """Live rows in two parts: those that may have a gradient, and those where ``still`` holds, which have none.

    One host read.
    """
    moving = live & ~still
    _are_there(moving)
    first, last = torch.stack([moving.sum(), live.sum()]).tolist()
    index = torch.argsort(torch.where(moving, 0, torch.where(live, 1, 2)), stable=True)
    return Rows(index[:first]), Rows(index[first:last])
