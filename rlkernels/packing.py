"""Padded batches as packed ones and back, and the targets that positions score.

A padded batch is ``[B, L]`` with an attention mask, on whichever side its padding lies. A packed batch is ``[T]`` with
offsets. Padding behind the last token of a packed batch is a part of its last sequence, so that the offsets cover every
token and there are as many sequences as rows.
"""

from collections.abc import Mapping
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from rlkernels import checks
from rlkernels.checks import names, numbers
from rlkernels.checks import tokens as checks_tokens
from rlkernels.sequences import segment_ids
from rlkernels.types import Fill, Mask, Offsets, PaddingSide, PerTokenTensors, TokenIds

PADDING_SIDES = get_args(PaddingSide)


class Packed(NamedTuple):
    """A packed batch.

    Example:
        >>> packed = pack({"ids": torch.tensor([[0, 5, 6], [7, 8, 9]])}, torch.tensor([[0, 1, 1], [1, 1, 1]]))
        >>> packed.tensors["ids"], packed.cu_seqlens
        (tensor([5, 6, 7, 8, 9]), tensor([0, 2, 5], dtype=torch.int32))
    """

    tensors: dict[str, Tensor]  # [T, ...] by the names that ``pack`` was given
    cu_seqlens: Tensor  # [B + 1], int32
    attention_mask: Tensor  # [T], bool: False for the padding at the end


def pack(
    tensors: PerTokenTensors,
    attention_mask: Mask,
    *,
    pad_to: int = 1,
    num_tokens: int | None = None,
    fill: Fill | None = None,
) -> Packed:
    r"""Packs the tokens of a padded batch, row by row, without its padding; differentiable.

    Args:
        tensors: per token, ``[B, L, ...]``, by name, such as ids, targets and masks.
        attention_mask: the tokens that are no padding, ``[B, L]``; any side, any pattern.
        pad_to: ``T`` is the next multiple of it.
        num_tokens: a bound on the tokens, which takes the place of their number, so that the host reads nothing.
        fill: the number at the padding behind the last token, by name; else 0. Give -100 for targets.

    Returns:
        ``Packed``: the tensors as ``[T, ...]`` with ``cu_seqlens`` ``[B + 1]``. Padding at the end belongs to the last
            sequence and is False in its ``attention_mask``.

    Raises:
        TypeError: ``tensors`` is no dict of tensors; ``attention_mask`` of a wrong dtype; a ``fill`` that the dtype of
            its tensor does not have.
        ValueError: shapes differ; ``fill`` names no tensor; on a CPU more tokens than ``num_tokens`` (on an accelerator
            a device-side assertion fails instead); padding without a sequence.

    Example:
        >>> packed = pack({"x": torch.tensor([[0.0, 1.0], [2.0, 3.0]])}, torch.tensor([[0, 1], [1, 1]]), pad_to=4)
        >>> packed.tensors["x"], packed.cu_seqlens
        (tensor([1., 2., 3., 0.]), tensor([0, 1, 4], dtype=torch.int32))
    """
    caller = "pack"
    live = _attention(caller, attention_mask)
    fills = _named(caller, tensors, fill, attention_mask, live.shape)
    pad_to, num_tokens = (
        numbers.positive_integer(caller, name, x) for name, x in (("pad_to", pad_to), ("num_tokens", num_tokens))
    )
    if pad_to is None:
        raise TypeError(f"{caller}: pad_to must be a positive int, got None")
    lengths = live.sum(-1)
    count = lengths.sum()
    total = int(count) if num_tokens is None else num_tokens
    if num_tokens is not None:
        if checks.host_reads(count):
            if int(count) > num_tokens:
                raise ValueError(f"{caller}: num_tokens is {num_tokens}, but there are {int(count)} tokens; raise it")
        else:
            torch._assert_async(count <= num_tokens, "rlkernels: pack: more tokens than num_tokens")
    total = -(-total // pad_to) * pad_to
    if total and not live.shape[0]:
        raise ValueError(f"{caller}: attention_mask has no row, so num_tokens must be None, got {num_tokens}")
    # Sorted, because the number of tokens would otherwise be a shape that only the host can know.
    order = torch.argsort((~live).flatten().to(torch.uint8), stable=True)
    place = torch.arange(total, device=live.device)
    here = place < count
    index = order[place.clamp(max=live.numel() - 1)] if live.numel() else torch.zeros_like(place)
    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    if total:
        ends = torch.cat([ends[:-1], ends.new_full((1,), total)])
    out = {}
    for name, x in tensors.items():
        out[name] = _taken(x.flatten(0, 1), index, here, fills[name])
    return Packed(out, ends.to(torch.int32), here)


def unpack(
    tensors: PerTokenTensors,
    cu_seqlens: Offsets,
    attention_mask: Mask | None = None,
    *,
    length: int | None = None,
    padding: PaddingSide = "right",
    fill: Fill | None = None,
) -> dict[str, Tensor]:
    r"""Lays packed sequences out as rows of a padded batch, differentiable; undoes ``pack``.

    Args:
        tensors: per token, ``[T, ...]``, by name.
        attention_mask: ``[B, L]``, that which was packed: each token returns to its place.
        length: ``L`` without ``attention_mask``; else that of the longest sequence, which the host reads.
        padding: the side of the padding without ``attention_mask``.
        fill: the number at the padding, by name; else 0.

    Returns:
        the tensors as ``[B, L, ...]``.

    Raises:
        TypeError: ``tensors`` is no dict of tensors; a ``fill`` that the dtype of its tensor does not have.
        ValueError: shapes differ; ``cu_seqlens`` does not cover the tokens; ``fill`` names no tensor; ``length`` or
            another ``padding`` than "right" beside ``attention_mask``. On a CPU: sequences are longer than ``length``,
            or are not those of ``attention_mask``.

    Example:
        >>> unpack({"x": torch.tensor([1.0, 2.0, 3.0])}, torch.tensor([0, 1, 3]), padding="left")
        {'x': tensor([[0., 1.],
                [2., 3.]])}
    """
    caller = "unpack"
    names.choice(caller, "padding", padding, PADDING_SIDES)
    first = next(iter(_dictionary(caller, tensors).values()), None)
    if first is None:
        raise ValueError(f"{caller}: tensors is empty, expected at least one tensor")
    name = next(iter(tensors))
    checks.tensor(caller, f"tensors[{name!r}]", first)
    if first.dim() < 1:
        raise ValueError(f"{caller}: tensors[{name!r}] has shape (), expected [T, ...]")
    fills = _named(caller, tensors, fill, first, first.shape[:1], f"tensors[{name!r}]")
    offsets = checks_tokens.segments(caller, cu_seqlens, first)
    lengths = offsets.diff()
    if attention_mask is not None:
        if length is not None or padding != "right":
            given = "length" if length is not None else "padding"
            raise ValueError(f"{caller}: {given} and attention_mask both say where tokens go; pass one of them")
        here = _attention(caller, attention_mask)
        checks.one_device(caller, f"tensors[{name!r}]", first, attention_mask=here)
        if here.shape[0] != lengths.shape[0]:
            raise ValueError(
                f"{caller}: attention_mask has {here.shape[0]} rows, expected one per sequence, {lengths.shape[0]}"
            )
        within = here.cumsum(-1) - 1
        _same_lengths(caller, here.sum(-1), lengths)
    else:
        length = numbers.integer(caller, "length", _longest(lengths) if length is None else length)
        if length < 0:
            raise ValueError(f"{caller}: length must not be negative, got {length}")
        if checks.host_reads(lengths) and _longest(lengths) > length:
            raise ValueError(f"{caller}: length is {length}, but a sequence has {_longest(lengths)} tokens; raise it")
        column = torch.arange(length, device=first.device)
        within = column if padding == "right" else column - (length - lengths[:, None])
        within = within.expand(lengths.shape[0], length)
        here = (within >= 0) & (within < lengths[:, None])
    # Clamped, because a place of padding has an index, too.
    index = (offsets[:-1, None] + within).clamp(0, max(first.shape[0] - 1, 0))
    out = {}
    for name, x in tensors.items():
        out[name] = _taken(x, index, here, fills[name])
    return out


def shift_targets(
    input_ids: TokenIds,
    cu_seqlens: Offsets | None = None,
    *,
    attention_mask: Mask | None = None,
    mask: Mask | None = None,
    ignore_index: int = -100,
) -> TokenIds:
    r"""Targets of a causal model: position ``t`` scores the token ``t + 1`` of its sequence.

    No target crosses the end of a sequence: the last position of each gets ``ignore_index``.

    Args:
        input_ids: ``[B, L]``, or packed ``[T]`` or ``[1, T]`` with ``cu_seqlens``; int32 or int64.
        attention_mask: the tokens that are no padding, same shape. Padding neither scores nor is scored.
        mask: the tokens that are trained, same shape and before the shift, such as those that a policy sampled.
        ignore_index: the target of a position that scores nothing.

    Returns:
        shaped like ``input_ids``; int64, or the dtype of ``input_ids`` where that holds ``ignore_index``.

    Raises:
        TypeError: ``input_ids`` neither int32 nor int64; a mask of a wrong dtype.
        ValueError: shapes differ, or ``cu_seqlens`` does not cover the tokens.

    Example:
        >>> shift_targets(torch.tensor([5, 6, 7, 8, 9]), torch.tensor([0, 2, 5]))
        tensor([   6, -100,    8,    9, -100])
    """
    caller = "shift_targets"
    checks.tensor(caller, "input_ids", input_ids)
    if input_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{caller}: input_ids must be int32 or int64, got {input_ids.dtype}")
    shape = input_ids.shape
    for name, x in (("attention_mask", attention_mask), ("mask", mask)):
        checks.mask(caller, x, shape, name)
        checks.one_device(caller, "input_ids", input_ids, **{name: x})
    ignore_index = numbers.integer(caller, "ignore_index", ignore_index)
    ids = checks_tokens.holding(caller, input_ids, ignore_index)
    if cu_seqlens is not None and input_ids.dim() == 2 and shape[0] == 1:
        ids, attention_mask, mask = (None if x is None else x[0] for x in (ids, attention_mask, mask))
    checks_tokens.layout(caller, "input_ids", ids, cu_seqlens)
    scored = torch.ones_like(ids, dtype=torch.bool, memory_format=torch.contiguous_format)[..., 1:]
    if cu_seqlens is not None:
        offsets = checks_tokens.segments(caller, cu_seqlens, ids)
        segment = segment_ids(offsets, ids.shape[0])
        scored = segment[1:] == segment[:-1]
    if attention_mask is not None:
        there = attention_mask != 0
        scored = scored & there[..., 1:] & there[..., :-1]
    if mask is not None:
        scored = scored & (mask != 0)[..., 1:]
    last = ids.new_full((*ids.shape[:-1], min(ids.shape[-1], 1)), ignore_index)
    return torch.cat([torch.where(scored, ids[..., 1:], ignore_index), last], -1).reshape(shape)


def _taken(tokens: Tensor, index: Tensor, here: Tensor, fill: float) -> Tensor:
    """Takes the tokens at ``index`` where ``here`` holds, and ``fill`` elsewhere."""
    padding = tokens.new_full((), fill)
    if not tokens.shape[0]:  # one more, because an index into nothing raises
        tokens = torch.cat([tokens, padding.expand(1, *tokens.shape[1:])])
    return torch.where(here.reshape(here.shape + (1,) * (tokens.dim() - 1)), tokens[index], padding)


def _longest(lengths: Tensor) -> int:
    return int(lengths.max()) if lengths.numel() else 0


def _attention(caller: str, attention_mask: Tensor) -> Tensor:
    """Returns a checked attention mask as bool ``[B, L]``."""
    checks.tensor(caller, "attention_mask", attention_mask)
    checks.mask(caller, attention_mask, attention_mask.shape, "attention_mask")
    if attention_mask.dim() != 2:
        raise ValueError(f"{caller}: attention_mask has shape {tuple(attention_mask.shape)}, expected [B, L]")
    return attention_mask != 0


def _same_lengths(caller: str, found: Tensor, lengths: Tensor) -> None:
    """Refuses rows of other lengths than the sequences, of which the last one may hold padding, on a CPU."""
    if not checks.host_reads(lengths) or not lengths.numel():
        return
    wrong = (found != lengths).nonzero()[:, 0].tolist()
    if wrong and (wrong != [lengths.numel() - 1] or found[-1] > lengths[-1]):
        row = wrong[0]
        raise ValueError(
            f"{caller}: attention_mask has {int(found[row])} tokens in row {row}, expected those of the sequence, "
            f"{int(lengths[row])}"
        )


def _dictionary(caller: str, tensors: PerTokenTensors) -> Mapping[str, Tensor]:
    if not isinstance(tensors, Mapping):
        raise TypeError(f"{caller}: tensors must be a dict of tensors by name, got {type(tensors).__name__}")
    return tensors


def _named(
    caller: str,
    tensors: PerTokenTensors,
    fill: Fill | None,
    like: Tensor,
    leading: torch.Size,
    like_name: str = "attention_mask",
) -> dict[str, float]:
    """Checks tensors of the same leading shape, and returns the number that fills each."""
    _dictionary(caller, tensors)
    given: Mapping[str, float] = {} if fill is None else fill
    if not isinstance(given, Mapping):
        raise TypeError(f"{caller}: fill must be a dict of numbers by name, got {type(fill).__name__}")
    unknown = [name for name in given if name not in tensors]
    if unknown:
        raise ValueError(f"{caller}: fill names {unknown[0]!r}, expected names of tensors: {', '.join(tensors)}")
    fills: dict[str, float] = {}
    for name, x in tensors.items():
        argument = f"tensors[{name!r}]"
        checks.tensor(caller, argument, x)
        if x.dtype not in (*checks.FLOATS, *checks.WHOLE):
            raise TypeError(
                f"{caller}: {argument} has dtype {x.dtype}; supported: {checks.FLOAT_NAMES}, bool, {checks.WHOLE_NAMES}"
            )
        if x.shape[: len(leading)] != leading:
            raise ValueError(
                f"{caller}: {argument} has shape {tuple(x.shape)}, expected [{', '.join(map(str, leading))}, ...]"
            )
        checks.one_device(caller, like_name, like, **{argument: x})
        number = given.get(name, 0)
        if x.dtype.is_floating_point:
            fills[name] = numbers.real(caller, f"fill[{name!r}]", number)
            continue
        fills[name] = numbers.integer(caller, f"fill[{name!r}]", number)
        low, high = (0, 1) if x.dtype == torch.bool else (torch.iinfo(x.dtype).min, torch.iinfo(x.dtype).max)
        if not low <= fills[name] <= high:
            raise TypeError(f"{caller}: fill[{name!r}] is {number}, which {x.dtype} does not have")
    return fills
