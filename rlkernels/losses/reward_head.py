"""Reward and value heads: the scores of hidden states, and the token whose score is that of its sequence."""

from typing import get_args

import torch
from torch import Tensor

from rlkernels import checks
from rlkernels.backends.protocol import real_dtype
from rlkernels.checks import tokens as checks_tokens
from rlkernels.logits_layout import dense
from rlkernels.sequences import last_live_index
from rlkernels.types import (
    HiddenStates,
    Mask,
    Offsets,
    PerSequence,
    PerToken,
    RewardHeadBias,
    RewardHeadWeight,
    RewardScores,
    ScorePositions,
    TokenIds,
)

POSITIONS = get_args(ScorePositions)


def reward_scores(
    hidden: HiddenStates,
    weight: RewardHeadWeight,
    *,
    attention_mask: Mask | None = None,
    cu_seqlens: Offsets | None = None,
    bias: RewardHeadBias | None = None,
    positions: ScorePositions = "end",
) -> RewardScores:
    r"""Scores sequences, or tokens, by ``h . w (+ b)``: ``"end"`` reads the ``B`` rows of the last tokens, not ``B L``.

    Args:
        hidden: ``[B, L, H]``, or packed ``[T, H]`` with ``cu_seqlens``. With ``"all"`` any ``[..., H]``.
        weight: ``[1, H]``, the head's matrix; ``[k, H]`` for ``k`` labels.
        attention_mask: ``[B, L]``; the end is the last 1 (left or right padding, holes); a row of zeros, or no mask,
            ends at ``L - 1``. Not beside ``cu_seqlens``. With ``"all"``, ``[...]``: a dead token's row is not looked
            at, its score is 0.
        cu_seqlens: ``[B + 1]`` offsets of a packed batch; the end of sequence ``i`` is ``cu_seqlens[i + 1] - 1``. An
            empty sequence has none: on a CPU it is an error, on an accelerator, where values are not read, its score is
            0 and has no gradient. Not with ``"all"``.
        bias: ``[1]``, or ``[k]``. Hidden states, weight and bias have one dtype, or autocast is on.
        positions: ``"end"`` scores the last token of each sequence, ``"all"`` every token, as a value head does.

    Returns:
        Tensor ``[B]``, or ``[...]`` with ``"all"``; with more than one label ``[B, k]``, or ``[..., k]``; fp32 (fp64
        for fp64 hidden states), differentiable in ``hidden``, ``weight`` and ``bias``.

    Raises:
        ValueError: shapes do not fit; ``cu_seqlens`` does not cover the tokens, or makes a sequence empty; sequences of
            no token.
        TypeError: dtypes do not fit.

    Example:
        >>> hidden, head = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [5.0, 5.0]]]), torch.tensor([[1.0, -1.0]])
        >>> reward_scores(hidden, head, attention_mask=torch.tensor([[1, 1, 0]]))
        tensor([-2.])
        >>> reward_scores(hidden, head, positions="all")
        tensor([[ 1., -2.,  0.]])
    """
    caller = "reward_scores"
    checks.choice(caller, "positions", positions, POSITIONS)
    checks.floating(caller, "hidden", hidden)
    checks.floating(caller, "weight", weight)
    _head_shapes(caller, hidden, weight, bias, positions, cu_seqlens)
    checks.one_device(caller, "hidden", hidden, weight=weight, bias=bias, attention_mask=attention_mask)
    checks_tokens.one_dtype(caller, "hidden", hidden, weight=weight, bias=bias)
    if positions == "all":
        return _scores_of_tokens(caller, hidden, weight, bias, attention_mask)
    ends, empty = _ends(caller, "hidden", hidden, attention_mask, cu_seqlens)
    scores = _scores(_rows_at(hidden, ends, cu_seqlens is not None, empty), weight, bias)
    return scores if empty is None else torch.where(empty if scores.dim() == 1 else empty[:, None], 0.0, scores)


def _head_shapes(
    caller: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: ScorePositions,
    cu_seqlens: Offsets | None,
) -> None:
    """Refuses hidden states, a head and a bias whose shapes do not fit."""
    if positions == "all":
        if cu_seqlens is not None:
            raise ValueError(f'{caller}: cu_seqlens says where sequences end, and positions="all" scores every token')
        if hidden.dim() < 2:
            raise ValueError(f"{caller}: hidden has shape {tuple(hidden.shape)}, expected [..., H]: rows of tokens")
    else:
        expected = 2 if cu_seqlens is not None else 3
        if hidden.dim() != expected:
            raise ValueError(
                f"{caller}: hidden has shape {tuple(hidden.shape)}, expected "
                f"{'[T, H] with cu_seqlens' if expected == 2 else '[B, L, H]'}"
            )
    labels = weight.shape[0] if weight.dim() == 2 else 1
    checks.shape(caller, "weight", weight, (max(labels, 1), hidden.shape[-1]))
    if bias is not None:
        checks.floating(caller, "bias", bias)
        checks.shape(caller, "bias", bias, (labels,))


def _scores(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Computes the scores of rows ``[..., H]``: ``[...]``, or ``[..., k]`` with more than one label.

    By a sum per label, because the sums of a matmul depend on how many rows it has.
    """
    real = real_dtype(rows.dtype)
    rows, weight = rows.to(real), weight.to(real)
    if weight.shape[0] == 1:
        scores = (rows * weight).sum(-1)
    else:
        scores = torch.stack([(rows * of_label).sum(-1) for of_label in weight.unbind(0)], -1)
    return scores if bias is None else scores + bias.to(real)


def _scores_of_tokens(
    caller: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, attention_mask: Mask | None
) -> Tensor:
    """Computes the score of every live token."""
    checks.mask(caller, attention_mask, hidden.shape[:-1], "attention_mask")
    if attention_mask is None:
        return _scores(hidden, weight, bias)
    live = attention_mask != 0
    if not checks.host_reads(live):
        scores = _scores(torch.where(live.unsqueeze(-1), hidden, 0.0), weight, bias)
        return torch.where(live if scores.dim() == live.dim() else live.unsqueeze(-1), scores, 0.0)
    scores = _scores(hidden[live], weight, bias)  # where the host may read the mask, dead rows are not even copied
    return scores.new_zeros((*live.shape, *scores.shape[1:])).index_put((live,), scores)


def end_scores(
    values: PerToken,
    attention_mask: Mask | None = None,
    *,
    input_ids: TokenIds | None = None,
    pad_id: int | None = None,
    prompt_length: int = 1,
    cu_seqlens: Offsets | None = None,
) -> tuple[PerSequence, PerSequence]:
    r"""Selects the score of each sequence's last token from the scores of all its tokens.

    Args:
        values: a score per token, ``[B, L]``, or packed ``[T]`` with ``cu_seqlens``; any float dtype.
        attention_mask: ``[B, L]``; the end is the last 1, as for ``reward_scores``.
        input_ids, pad_id: token ids ``[B, L]``, and that of padding: the end is the token before the first padding at
            or after ``prompt_length``, or the last column (DeepSpeed-Chat). Not beside ``attention_mask``.
        prompt_length: tokens of the prompt, at least 1; padding within them ends nothing.
        cu_seqlens: offsets of a packed batch, as for ``reward_scores``.

    Returns:
        ``(scores, ends)``, ``[B]`` each: the scores, fp32 (fp64 for fp64 values), differentiable in ``values``, and the
        positions of the last tokens in ``values``.

    Raises:
        ValueError: shapes do not fit, two sources of the ends, ``input_ids`` without ``pad_id``, sequences of no token.
        TypeError: dtypes do not fit.

    Example:
        >>> end_scores(torch.tensor([[0.1, 0.2, 0.3, 0.4]]), input_ids=torch.tensor([[0, 7, 8, 0]]), pad_id=0)
        (tensor([0.3000]), tensor([2]))
    """
    caller = "end_scores"
    checks.floating(caller, "values", values)
    checks_tokens.layout(caller, "values", values, cu_seqlens)
    checks.one_device(caller, "values", values, attention_mask=attention_mask, input_ids=input_ids)
    prompt_length = checks.integer(caller, "prompt_length", prompt_length)
    if (input_ids is None) != (pad_id is None):
        given, other = ("pad_id", "input_ids") if input_ids is None else ("input_ids", "pad_id")
        raise ValueError(f"{caller}: {given} needs {other}: both together say where sequences end")
    sources = [
        name
        for name, x in (("attention_mask", attention_mask), ("input_ids", input_ids), ("cu_seqlens", cu_seqlens))
        if x is not None
    ]
    if len(sources) > 1:
        raise ValueError(f"{caller}: {' and '.join(sources)} each say where sequences end; pass one of them")
    if prompt_length < 1:
        raise ValueError(f"{caller}: prompt_length must be at least 1, got {prompt_length}")
    if input_ids is None and prompt_length != 1:
        raise ValueError(f"{caller}: prompt_length goes with input_ids and pad_id, got {prompt_length}; leave it out")
    if input_ids is None:
        ends, empty = _ends(caller, "values", values, attention_mask, cu_seqlens)
    else:
        checks_tokens.ids(caller, "input_ids", input_ids, values.shape)
        _some_token(caller, "values", values)
        pad, position = checks.integer(caller, "pad_id", pad_id), torch.arange(values.shape[1], device=values.device)
        # A count of the positions before it, because the host reads nothing.
        stop = ((input_ids.long() == pad) & (position >= prompt_length)).cumsum(-1) > 0
        ends, empty = (~stop).sum(-1) - 1, None
    scores = _rows_at(dense(values, real_dtype(values.dtype)), ends, cu_seqlens is not None, empty)
    return (scores if empty is None else torch.where(empty, 0.0, scores)), ends


def _some_token(caller: str, name: str, x: Tensor) -> None:
    """Refuses padded sequences of length 0."""
    if x.shape[0] and not x.shape[1]:
        raise ValueError(
            f"{caller}: {name} has shape {tuple(x.shape)}: sequences without a token have no last one to score"
        )


def _ends(
    caller: str, name: str, x: Tensor, attention_mask: Mask | None, cu_seqlens: Offsets | None
) -> tuple[Tensor, Tensor | None]:
    """Returns the position of each sequence's last token, and a mask of the empty sequences, whose position is 0.

    The mask is None where no sequence can be empty, or where an empty one has raised.
    """
    if cu_seqlens is None:
        checks.mask(caller, attention_mask, x.shape[:2], "attention_mask")
        _some_token(caller, name, x)
        return last_live_index(attention_mask, x.shape[:2], x.device), None
    if attention_mask is not None:
        raise ValueError(
            f"{caller}: attention_mask is for padded hidden states [B, L, H], cu_seqlens for packed "
            "ones [T, H]; pass one of them"
        )
    offsets = checks_tokens.segments(caller, cu_seqlens, x, filled=True)
    ends = offsets[1:]
    if checks_tokens.values_are_read(cu_seqlens):
        return ends - 1, None
    return (ends - 1).clamp(min=0), ends <= offsets[:-1]


def _rows_at(x: Tensor, ends: Tensor, packed: bool, empty: Tensor | None) -> Tensor:
    """Returns what ``x`` holds at the ends; 0 for an empty sequence."""
    if not packed:
        return x[torch.arange(x.shape[0], device=x.device), ends]
    if empty is None:
        return x[ends]
    rows = x[ends] if x.shape[0] else x.new_zeros(ends.shape[0], *x.shape[1:]) + x.sum()
    return torch.where(empty if rows.dim() == 1 else empty[:, None], 0.0, rows)
