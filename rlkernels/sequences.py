"""Sequences and groups: sums, means, and their broadcast back to tokens.

A loss at the sequence level is an objective on these sums or means.

A batch of sequences is padded, ``[B, L]``, or packed, ``[N]`` with ``cu_seqlens`` (``[S + 1]``: a 0, then the end of
each sequence). A packed batch may lie as one row, ``[1, N]``. Its offsets may end before its tokens where a mask is 0
behind the end; these tokens are padding. A token is live where the mask is not 0; ``torch.where`` leaves out the
others. Sums run in float64 and are rounded once, so that a row's result does not depend on the padding behind it, and
sums over 8192 float32 tokens keep all their digits. No shape here depends on data, so the host never waits for a
device.

On a CPU, offsets that do not cover the tokens raise; in a program of ``torch.compile`` they raise when it runs. On an
accelerator offsets are not read (unless ``RLKERNELS_CHECK=1``): wrong ones give wrong numbers, but address no memory
outside of the tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlkernels import checks
from rlkernels.checks import tokens as checks_tokens
from rlkernels.packed_rows import takes_one_row
from rlkernels.types import Mask, Offsets, PerSequence, PerToken, Spans


def result_dtype(*tensors: Tensor) -> torch.dtype:
    """Returns the dtype of the arithmetic: float64 where one of the tensors has it, else float32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def segment_ids(offsets: Tensor, tokens: int) -> Tensor:
    """Returns, for each of ``tokens`` packed tokens, the index of its sequence.

    ``offsets``: as ``checks.tokens.segments`` returns them.
    """
    ends = offsets[1:]
    ids = torch.searchsorted(ends, torch.arange(tokens, device=ends.device), right=True)
    # Clamped, because on a device nothing has checked that the last end covers every token.
    return ids.clamp(max=max(ends.shape[0] - 1, 0))


def segment_reduce(values: Tensor, offsets: Tensor, how: str = "sum", initial: float = 0.0) -> Tensor:
    """Reduces each segment in a fixed order, without atomics.

    NaN stays in its segment, whereas a difference of prefix sums would spread it. ``offsets`` must come from
    ``checks.tokens.segments``, because torch has only an unsafe way for offsets: it reads and
    writes wherever they point.
    """
    return torch.segment_reduce(values.contiguous(), how, offsets=offsets, axis=0, unsafe=True, initial=initial)


def token_counts(live: Tensor, offsets: Tensor | None = None) -> Tensor:
    """Counts the live tokens of each sequence, in float64: exact up to ``2**53``."""
    return live.sum(-1).double() if offsets is None else segment_reduce(live.double(), offsets)


def sums(values: Tensor, live: Tensor, offsets: Tensor | None) -> Tensor:
    """Computes ``sequence_sums`` of checked arguments; ``live``: bool."""
    return _sums(live, values, offsets).to(result_dtype(values))


def means(values: Tensor, live: Tensor, offsets: Tensor | None) -> Tensor:
    """Computes ``sequence_means`` of checked arguments; ``live``: bool."""
    return (_sums(live, values, offsets) / token_counts(live, offsets).clamp(min=1.0)).to(result_dtype(values))


def spread(values: Tensor, live: Tensor, offsets: Tensor | None) -> Tensor:
    """Computes ``broadcast_to_tokens`` of checked arguments; ``live``: bool."""
    wide = values.double()
    # Indexing, not gather, because the backward of indexing sorts, and that of gather adds by atomics.
    wide = wide.unsqueeze(-1).expand(live.shape) if offsets is None else wide[segment_ids(offsets, live.shape[0])]
    return torch.where(live, wide, 0.0).to(result_dtype(values))


def per_token(caller: str, name: str, x: Tensor, like: Tensor, offsets: Tensor | None) -> Tensor:
    """Expands ``x`` from one number per sequence to one per token.

    One per sequence is ``[S, 1]`` or ``[S]`` of a packed batch, ``[B, 1]`` or ``[B]`` of a padded one. An ``x`` of any
    other shape comes back as it is, and the caller's own check refuses it.
    """
    if offsets is None:
        # Reshaped by hand, because plain broadcasting would align [B] with L, and make (B, B) of (B,) against (B, 1).
        per_row = like.dim() == 2 and x.shape in (like.shape[:1], (like.shape[0], 1))
        return x.reshape(-1, 1).expand(like.shape) if per_row else x
    tokens, count = like.shape[0], offsets.shape[0] - 1
    if x.shape == (count, 1):
        x = x[:, 0]
    elif x.shape != (count,):
        return x
    elif count == tokens:
        if count > 1 and not _one_token_each(offsets):
            raise ValueError(
                f"{caller}: {name} has shape ({count},) in a batch of {tokens} tokens and {count} "
                "sequences: one per token or one per sequence? "
                "Pass [S, 1] for one per sequence; for one per token leave the empty sequences out of "
                "cu_seqlens"
            )
        return x
    checks.one_device(caller, "cu_seqlens", offsets, **{name: x})
    return x[segment_ids(offsets, tokens)]


def _one_token_each(offsets: Tensor) -> bool:
    """Tells whether the host knows that every sequence is one token long."""
    return checks.host_reads(offsets) and bool((offsets.diff() == 1).all())


def _checked(
    caller: str, values: Tensor, mask: Mask | None, cu_seqlens: Offsets | None
) -> tuple[Tensor, Tensor | None]:
    """Checks the arguments of the public functions; returns the mask as bool, and the offsets."""
    checks.floating(caller, "values", values)
    offsets = checks_tokens.rows(caller, "values", values, cu_seqlens, mask)
    if offsets is not None:  # because torch.segment_reduce has no forward-mode formula
        checks.no_forward_ad(caller, values)
    checks.mask(caller, mask, values.shape)
    checks.one_device(caller, "values", values, mask=mask)
    return torch.ones_like(
        values, dtype=torch.bool, memory_format=torch.contiguous_format
    ) if mask is None else mask != 0, offsets


def _sums(live: Tensor, values: Tensor, offsets: Tensor | None) -> Tensor:
    # Contiguous, because torch adds in the order of memory.
    live_values = torch.where(live, values, 0.0).double().contiguous()
    return live_values.sum(-1) if offsets is None else segment_reduce(live_values, offsets)


@takes_one_row()
def sequence_sums(values: PerToken, mask: Mask | None = None, cu_seqlens: Offsets | None = None) -> PerSequence:
    r"""Sums of each sequence over its live tokens, differentiable.

    ``s_i = sum_t m_it x_it``.

    Args:
        values: ``x``, ``[..., L]``, or packed ``[N]`` with ``cu_seqlens``; any float dtype.
        mask: live tokens, any pattern. What a dead token holds reaches neither the sum nor the gradient.

    Returns:
        ``[...]``, or ``[S]`` when packed: float32, float64 for float64. An empty sequence sums to 0.

    Raises:
        TypeError: ``values`` or ``mask`` of a wrong dtype.
        ValueError: shapes differ, or ``cu_seqlens`` does not cover the tokens.

    Example:
        >>> mask = torch.tensor([[1, 1, 0], [1, 0, 1]])
        >>> sequence_sums(torch.tensor([[1.0, 2.0, 4.0], [8.0, float("nan"), 0.5]]), mask)
        tensor([3.0000, 8.5000])
    """
    return sums(values, *_checked("sequence_sums", values, mask, cu_seqlens))


@takes_one_row()
def sequence_means(values: PerToken, mask: Mask | None = None, cu_seqlens: Offsets | None = None) -> PerSequence:
    r"""Means of each sequence over its live tokens, differentiable.

    ``s_i = (1/n_i) sum_t m_it x_it``,  ``n_i = sum_t m_it``. The mean of ``logprobs - old_logprobs`` is the log of
    GSPO's ratio.

    Args:
        values: ``x``, ``[..., L]``, or packed ``[N]`` with ``cu_seqlens``; any float dtype.
        mask: live tokens, any pattern. What a dead token holds reaches neither the mean nor the gradient.

    Returns:
        ``[...]``, or ``[S]`` when packed: float32, float64 for float64. The mean of an empty sequence is 0.

    Raises:
        TypeError: ``values`` or ``mask`` of a wrong dtype.
        ValueError: shapes differ, or ``cu_seqlens`` does not cover the tokens.

    Example:
        >>> sequence_means(torch.tensor([1.0, 3.0, 7.0]), cu_seqlens=torch.tensor([0, 2, 2, 3]))
        tensor([2., 0., 7.])

    Zheng et al. 2025, arXiv:2507.18071, eq. 7.
    """
    return means(values, *_checked("sequence_means", values, mask, cu_seqlens))


@takes_one_row(main="mask", per_token=True)
def broadcast_to_tokens(values: PerSequence, mask: Mask, cu_seqlens: Offsets | None = None) -> PerToken:
    r"""Gives every live token the value of its sequence, differentiable; dead tokens get 0.

    Args:
        values: one per sequence: ``[...]`` for a mask ``[..., L]``, ``[S]`` for a packed mask ``[N]``; any float dtype.

    Returns:
        shaped like ``mask``: float32, float64 for float64.

    Raises:
        TypeError: ``values`` or ``mask`` of a wrong dtype.
        ValueError: not one value per sequence, or ``cu_seqlens`` does not cover the tokens.

    Example:
        >>> broadcast_to_tokens(torch.tensor([3.0, -1.0]), torch.tensor([1, 1, 0, 1]), torch.tensor([0, 3, 4]))
        tensor([ 3.,  3.,  0., -1.])
    """
    caller = "broadcast_to_tokens"
    checks.floating(caller, "values", values)
    checks.tensor(caller, "mask", mask)
    checks.mask(caller, mask, mask.shape)
    offsets = checks_tokens.rows(caller, "mask", mask, cu_seqlens, mask)
    checks.one_device(caller, "values", values, mask=mask)
    checks.shape(caller, "values", values, mask.shape[:-1] if offsets is None else (offsets.shape[0] - 1,))
    return spread(values, mask != 0, offsets)


def spans_to_mask(spans: Spans, length: int, *, shift: bool = True) -> Tensor:
    r"""Returns the mask of the positions that the policy sampled, from the token spans ``[start, end)`` recorded while
    it sampled.

    Args:
        spans: ``[..., K, 2]``, integers; a nested list will do. ``start == end`` is no span: pad with it.
            What lies outside of the row is cut off.
        length: tokens per row.
        shift: the mask is over the ``length - 1`` scored positions: position ``t`` scores token ``t + 1``, and none
            scores the first.

    Returns:
        bool, ``[..., length - 1]`` with ``shift``, else ``[..., length]``.

    Raises:
        ValueError: ``spans`` is not made of pairs; ``length`` negative, or 0 with ``shift``.
        TypeError: ``spans`` is no tensor or nested list of integers; ``length`` no integer.

    Example:
        >>> spans_to_mask([[2, 4]], 5)
        tensor([False,  True,  True, False])
    """
    caller = "spans_to_mask"
    checks.flags(caller, shift=shift)
    spans = _integers(caller, spans)
    if spans.numel() == 0 and spans.dim() < 2:
        spans = spans.reshape(0, 2)
    if spans.dim() < 2 or spans.shape[-1] != 2:
        raise ValueError(
            f"{caller}: spans has shape {tuple(spans.shape)}, expected [..., K, 2]: pairs of start and end"
        )
    length = checks.integer(caller, "length", length)
    if length < (1 if shift else 0):
        raise ValueError(
            f"{caller}: length must be at least {1 if shift else 0}, got {length}; it counts the tokens of a row"
        )
    if length > 2**31:
        raise ValueError(f"{caller}: length must be at most 2**31, got {length}; it counts the tokens of a row")
    token = torch.arange(1 if shift else 0, length, device=spans.device)
    return ((token >= spans[..., :1]) & (token < spans[..., 1:])).any(-2)


def _integers(caller: str, spans: Spans) -> Tensor:
    if not isinstance(spans, torch.Tensor):
        try:
            spans = torch.tensor(spans)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"{caller}: spans must be a tensor or a nested list of integers, got {type(spans).__name__}: {error}"
            ) from error
        spans = spans if spans.numel() else spans.long()  # an empty list is of floats
    checks.tensor(caller, "spans", spans)
    if spans.dtype.is_floating_point or spans.dtype.is_complex or spans.dtype == torch.bool:
        raise TypeError(f"{caller}: spans must hold integers, got {spans.dtype}")
    return spans.long()


def last_live_index(mask: Mask | None, shape: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Returns the column of the last live token of each row of a mask ``[B, L]``.

    It is ``L - 1`` for a row without a live token, and for every row where there is no mask.
    """
    rows, length = shape
    if mask is None:
        return torch.full((rows,), length - 1, device=device)
    column = torch.arange(1, length + 1, device=mask.device)
    last = torch.where(mask != 0, column, 0).amax(-1)
    return torch.where(last == 0, length, last) - 1


class Groups(NamedTuple):
    """The elements of a batch, sorted into groups.

    There are as many groups as elements, and the unused ones are empty, so that no shape depends on the ids.
    """

    order: torch.Tensor  # [N] elements, group by group
    index: torch.Tensor  # type: ignore[assignment]  # [N] group of each element; tuples have a method of that name
    cu_seqlens: torch.Tensor  # [N + 1] ends of the groups within ``order``

    def reduce(self, values: Tensor, how: str = "sum", initial: float = 0.0) -> Tensor:
        """Reduces ``values`` ``[N]`` to one number per group, ``[N]``."""
        return segment_reduce(values[self.order], self.cu_seqlens, how, initial)

    def reduce_each(self, values: Tensor, how: str = "sum", initial: float = 0.0) -> Tensor:
        """Reduces ``values`` ``[N]`` per group and hands the result to every element of the group, ``[N]``."""
        return self.reduce(values, how, initial)[self.index]


def groups_of(ids: Tensor) -> Groups:
    """Sorts the elements into groups of equal ``ids`` ``[N]``, which may stand in any order."""
    ordered, order = torch.sort(ids, stable=True)
    index = torch.cumsum(torch.diff(ordered, prepend=ordered[:1]) != 0, 0)
    ends = torch.searchsorted(index, torch.arange(ids.shape[0] + 1, device=ids.device))
    return Groups(order, torch.zeros_like(index).scatter(0, order, index), ends)
