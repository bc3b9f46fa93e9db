"""Rows of tokens as one batch, padded or packed, with all that a policy loss takes beside the model's outputs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from rlkernels.advantages.group import broadcast_advantages
from rlkernels.checks import names, numbers
from rlkernels.packing import pack, shift_targets, unpack
from rlkernels.trajectories.model import TokenRow, is_scored
from rlkernels.types import BatchLayout, PaddingSide

LAYOUTS = get_args(BatchLayout)


@dataclass(frozen=True)
class TokenBatch:
    """A batch of rows, padded ``[B, L]`` or packed ``[T]``.

    Everything per token but ``input_ids`` and ``attention_mask`` is of the position that scores a token, so that
    ``logits[t]`` belongs to ``targets[t]``, ``mask[t]``, ``rollout_logprobs[t]`` and ``rewards[t]``.

    ``row_rewards`` holds the reward of a rollout in its last row and NaN, which counts nowhere, in its others. So
    ``group_advantages(batch.row_rewards, batch.group_ids)`` counts each rollout once, and
    ``batch.of_rollouts(advantages)`` hands the result to all rows.

    Example:
        >>> from rlkernels.trajectories import TokenRow, token_batch
        >>> row = TokenRow((5, 6, 7), (False, True, True), (math.nan, -0.5, -0.25), (0.0, 0.0, 1.0), ())
        >>> token_batch([row]).targets
        tensor([[   6,    7, -100]])
    """

    input_ids: Tensor  # int64
    targets: Tensor  # int64, the ignored id where no sampled token is scored
    mask: Tensor  # bool, True where a sampled token is scored
    rollout_logprobs: Tensor  # float32, NaN where none was recorded, 0 at dead tokens
    rewards: Tensor  # float32, those of messages
    attention_mask: Tensor  # bool, False for padding
    cu_seqlens: Tensor | None  # [R + 1], int32, of a packed batch
    position_ids: Tensor  # int64, from 0 in each row
    group_ids: Tensor  # [R], int64
    rollout_ids: Tensor  # [R], int64
    row_rewards: Tensor  # [R], float32
    is_last_row: Tensor  # [R], bool, True for the last row of each rollout

    def of_rollouts(self, row_values: Tensor) -> Tensor:
        """Gives all rows of a rollout the value of its last row."""
        return broadcast_advantages(row_values, self.is_last_row, self.rollout_ids)

    def to(self, device: torch.device | str) -> "TokenBatch":
        """Returns the batch on a device."""
        moved: dict[str, Any] = {k: x if x is None else x.to(device) for k, x in vars(self).items()}
        return TokenBatch(**moved)


def token_batch(
    rows: Sequence[TokenRow],
    *,
    layout: BatchLayout = "padded",
    padding: PaddingSide = "right",
    pad_to: int = 1,
    pad_id: int = 0,
    ignore_index: int = -100,
) -> TokenBatch:
    r"""Makes one batch of rows.

    Args:
        rows: in any order; those of a rollout need not be adjacent.
        layout: ``"padded"``, ``[B, L]``; ``"packed"``, ``[T]`` with ``cu_seqlens``, whose targets cross no boundary.
        padding: the side of the padding, of a padded batch alone.
        pad_to: ``L`` or ``T`` is the next multiple of it.
        pad_id: the id at padding.
        ignore_index: the target of a position that scores no sampled token.

    Returns:
        ``TokenBatch``, on the CPU.

    Raises:
        TypeError: ``rows`` holds something else than ``TokenRow``.
        ValueError: ``padding`` of a packed batch; rows of one rollout with other groups or other rewards.

    Example:
        >>> from rlkernels.trajectories import TokenRow
        >>> one = TokenRow((5, 6), (False, True), (math.nan, -0.5), (0.0, 0.0), ())
        >>> two = TokenRow((7, 8, 9), (True, False, True), (-0.1, math.nan, -0.2), (0.0, 0.0, 0.0), (), rollout_id=1)
        >>> batch = token_batch([one, two], layout="packed")
        >>> batch.targets, batch.cu_seqlens
        (tensor([   6, -100, -100,    9, -100]), tensor([0, 2, 5], dtype=torch.int32))
    """
    caller = "token_batch"
    rows = list(rows)
    for row in rows:
        if not isinstance(row, TokenRow):
            raise TypeError(f"{caller}: rows holds a {type(row).__name__}, expected TokenRow")
    names.choice(caller, "layout", layout, LAYOUTS)
    if layout == "packed" and padding != "right":
        raise ValueError(f"{caller}: padding is {padding!r}, but a packed batch has padding at its end alone")
    if (size := numbers.positive_integer(caller, "pad_to", pad_to)) is None:
        raise TypeError(f"{caller}: pad_to must be a positive int, got None")
    last = _last_rows(caller, rows)
    for index, row in enumerate(rows):
        if row.rewards and row.rewards[0]:
            raise ValueError(f"{caller}: row {index} has a reward at its first token, which no position scores")
    lengths = [len(row.token_ids) for row in rows]
    ends = torch.tensor([0, *lengths]).cumsum(0)
    flat = {
        "input_ids": torch.tensor([i for row in rows for i in row.token_ids], dtype=torch.int64),
        "mask": torch.tensor([s for row in rows for s in _shifted(row.sampled, False)], dtype=torch.bool),
        "rollout_logprobs": torch.tensor([x for row in rows for x in _scored_logprobs(row)], dtype=torch.float32),
        "rewards": torch.tensor([x for row in rows for x in _shifted(row.rewards, 0.0)], dtype=torch.float32),
        "position_ids": torch.tensor([t for n in lengths for t in range(n)], dtype=torch.int64),
        "attention_mask": torch.ones(sum(lengths), dtype=torch.bool),
    }
    sampled = torch.tensor([s for row in rows for s in row.sampled], dtype=torch.bool)
    flat["targets"] = shift_targets(flat["input_ids"], ends, mask=sampled, ignore_index=ignore_index)
    fill: dict[str, float] = {"input_ids": pad_id, "targets": ignore_index}
    cu_seqlens = None
    if layout == "padded":
        length = -(-max(lengths, default=0) // size) * size
        flat = unpack(flat, ends, length=length, padding=padding, fill=fill)
    else:
        packed = pack({k: x[None] for k, x in flat.items()}, flat["attention_mask"][None], pad_to=size, fill=fill)
        flat, cu_seqlens = packed.tensors, ends.to(torch.int32)
        if rows:  # because padding at the end belongs to the last row
            cu_seqlens[-1] = packed.cu_seqlens[-1]
    rewards = [row.reward if end and row.reward is not None else math.nan for row, end in zip(rows, last, strict=True)]
    return TokenBatch(
        **flat,
        cu_seqlens=cu_seqlens,
        group_ids=torch.tensor([row.group_id for row in rows], dtype=torch.int64),
        rollout_ids=torch.tensor([row.rollout_id for row in rows], dtype=torch.int64),
        row_rewards=torch.tensor(rewards, dtype=torch.float32),
        is_last_row=torch.tensor(last, dtype=torch.bool),
    )


def _shifted(values: Sequence[float], end: float) -> list[float]:
    """Returns the values of the tokens that each position scores."""
    return [*values[1:], end] if values else []


def _scored_logprobs(row: TokenRow) -> list[float]:
    return _shifted([x if sampled else 0.0 for x, sampled in zip(row.logprobs, row.sampled, strict=True)], 0.0)


def _last_rows(caller: str, rows: Sequence[TokenRow]) -> list[bool]:
    """Tells for each row whether it is the last of its rollout; refuses rollouts whose rows do not agree."""
    first: dict[int, TokenRow] = {}
    last: dict[int, int] = {}
    for index, row in enumerate(rows):
        other = first.setdefault(row.rollout_id, row)
        if other.group_id != row.group_id:
            raise ValueError(
                f"{caller}: row {index} has group_id {row.group_id}, expected {other.group_id}, that of its rollout "
                f"{row.rollout_id}"
            )
        if is_scored(other.reward) != is_scored(row.reward) or is_scored(row.reward) and other.reward != row.reward:
            raise ValueError(
                f"{caller}: row {index} has reward {row.reward}, expected {other.reward}, that of its rollout "
                f"{row.rollout_id}; put rewards of steps on messages"
            )
        last[row.rollout_id] = index
    return [last[row.rollout_id] == index for index, row in enumerate(rows)]
