"""The recurrence behind every return, with a decay of its own at each step, and the steps of a batch with holes.

``ops.gae`` is the kernel of one ``gamma`` and one ``lam``. Here stand the forms that it does not have: a lambda of each
sequence, episodes and turns that end, V-trace. Their cost is ``O(L log L)`` in torch, and no host reads the device.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from rlkernels.sequences import segment_ids
from rlkernels.tracing import replaced


def reverse_recurrence(x: Tensor, decay: Tensor) -> Tensor:
    """Computes ``A_t = x_t + decay_t A_{t+1}`` along the last dimension; float64.

    A decay of 0 ends a sequence: NaN behind it does not come through. The order of the sums depends on the distance to
    the token alone, so that padded and packed batches get the same bits.
    """
    step = 1
    while step < x.shape[-1]:  # doubling: after k rounds x holds the terms of 2**k steps
        here, ahead = decay[..., :-step], x[..., step:]
        x = torch.cat([x[..., :-step] + torch.where(here == 0, 0.0, here * ahead), x[..., -step:]], -1)
        decay = torch.cat([here * decay[..., step:], decay[..., -step:]], -1)
        step *= 2
    return x


def running_sums(x: Tensor, offsets: Tensor | None) -> Tensor:
    """Computes the sums from the start of each sequence, padded ``[B, L]`` or packed ``[N]``, to each token."""
    before = torch.ones_like(x)
    before[..., :1] = 0.0
    if offsets is not None and x.shape[-1]:
        before[1:] = (segment_ids(offsets, x.shape[-1]).diff() == 0).to(x.dtype)
    return reverse_recurrence(x.flip(-1), before.flip(-1)).flip(-1)


class Steps(NamedTuple):
    """The steps of each sequence, ``[B, L]`` or packed ``[N]``: live tokens, or all of them.

    ``index``: the position of the following step; ``follows``: whether the sequence has one.
    """

    live: Tensor
    index: Tensor
    follows: Tensor
    offsets: Tensor | None

    def ahead(self, x: Tensor, at_end: Tensor | float = 0.0) -> Tensor:
        """Returns ``x`` of the following step, or ``at_end`` behind the last one."""
        return torch.where(self.follows, x.gather(-1, self.index), at_end)

    def cut(self, ends: Tensor) -> "Steps":
        """Returns the steps of sequences that end at ``ends``, too."""
        return replaced(self, follows=self.follows & ~ends)

    def expand(self, x: Tensor) -> Tensor:
        """Returns ``x`` with one number for each sequence as one for each token."""
        return x[:, None] if self.offsets is None else x[segment_ids(self.offsets, self.live.shape[-1])]

    def scan(self, x: Tensor, decay: Tensor | float) -> Tensor:
        """Computes the recurrence over the steps of a float64 ``x``; other tokens carry the trace over, and get 0."""
        last = torch.ones_like(self.live)
        last[..., :-1] = False
        if self.offsets is not None and last.shape[-1]:
            last[..., :-1] = segment_ids(self.offsets, last.shape[-1]).diff() != 0
        # Made float64 first, because where makes a number of the default dtype from two numbers.
        decay = decay if isinstance(decay, Tensor) else x.new_full((), decay)
        decays = torch.where(self.follows, decay, 0.0)
        decays = torch.where(self.live, decays, (~last).to(decays.dtype))
        return torch.where(self.live, reverse_recurrence(torch.where(self.live, x, 0.0), decays), 0.0)


def steps_of(live: Tensor, offsets: Tensor | None) -> Steps:
    """Finds the steps of a bool mask; ``offsets``: as ``checks.tokens.segments`` returns them."""
    size = live.shape[-1]
    place = torch.where(live, torch.arange(size, device=live.device), size)
    nearest = place.flip(-1).cummin(-1).values.flip(-1) if size else place
    ahead = torch.cat([nearest[..., 1:], torch.full_like(nearest[..., :1], size)], -1)
    follows, index = ahead < size, ahead.clamp(max=max(size - 1, 0))
    if offsets is not None:
        ids = segment_ids(offsets, size)
        follows = follows & (ids[index] == ids)
    return Steps(live, index, follows, offsets)
