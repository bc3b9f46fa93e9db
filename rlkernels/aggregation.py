"""Aggregations as weight vectors: every reduction in use is ``sum_t weight_t * loss_t``.

The weights follow from the mask and the normalisers. The library owns no normaliser: totals over micro-batches and
ranks are arguments, Python numbers or tensors of shape ``()``.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlkernels import checks
from rlkernels.checks import tokens as checks_tokens
from rlkernels.packed_rows import takes_one_row
from rlkernels.sequences import Groups, groups_of, result_dtype, segment_ids, sums, token_counts
from rlkernels.types import Aggregation, Mask, Number, Offsets, PerSequence, PerToken, Scalar


class _Rows(NamedTuple):
    """The counts that a mode may divide by. ``tokens``: live tokens per row, flat, float64."""

    tokens: torch.Tensor
    count_empty: bool
    length: int | None
    batch_num_tokens: float | torch.Tensor | None = None
    num_sequences: float | torch.Tensor | None = None
    horizon: float | torch.Tensor | None = None
    group_ids: torch.Tensor | None = None
    rollout_ids: torch.Tensor | None = None
    group_tokens: torch.Tensor | None = None
    group_rows: torch.Tensor | None = None

    def all_tokens(self) -> Number:
        return self.tokens.sum() if self.batch_num_tokens is None else self.batch_num_tokens

    def all_rows(self) -> Number:
        return self.tokens.shape[0] if self.num_sequences is None else self.num_sequences

    def counted(self, tokens: Tensor) -> Number:
        """Returns the divisor of a mean over rows or groups, of which entry ``i`` holds ``tokens[i]`` live tokens.

        This is ``num_sequences`` where the caller passed it, else the number of entries with a live token.
        """
        if self.num_sequences is not None:
            return self.num_sequences
        return (tokens > 0).sum().double()

    def rows(self) -> Number:
        return self.all_rows() if self.count_empty else self.counted(self.tokens)


def _inverse(x: Number) -> Number:
    """Returns ``1 / x``, or 0 where ``x`` is 0, because a mean over nothing must not weigh NaN."""
    if isinstance(x, torch.Tensor):
        return torch.where(x > 0, 1.0 / x.double(), 0.0)
    return 1.0 / x if x > 0 else 0.0


def _token_mean(rows: _Rows) -> Number:
    return _inverse(rows.all_tokens())


def _token_sum(rows: _Rows) -> Number:
    return 1.0


def _row_mean_of_token_means(rows: _Rows) -> Number:
    return _inverse(rows.tokens) * _inverse(rows.rows())


def _row_mean_of_token_sums(rows: _Rows) -> Number:
    return _inverse(rows.rows())


def _row_mean_of_token_sums_over_horizon(rows: _Rows) -> Number:
    horizon = rows.length if rows.horizon is None else rows.horizon
    return _inverse(rows.rows()) * _inverse(horizon)


def _fixed_horizon(rows: _Rows) -> Number:
    return _inverse(rows.all_rows()) * _inverse(rows.horizon)


def _groups(rows: _Rows, ids: Tensor) -> tuple[Groups, Tensor, Number]:
    """Returns the groups of equal ``ids``, the live tokens of each row's group, and the divisor of a mean of groups."""
    groups = groups_of(ids.reshape(-1))
    tokens = groups.reduce(rows.tokens)
    present = groups.reduce(torch.ones_like(rows.tokens)) if rows.count_empty else tokens
    of_row = tokens[groups.index] if rows.group_tokens is None else rows.group_tokens.reshape(-1).double()
    return groups, of_row, rows.counted(present)


def _prompt_mean(rows: _Rows) -> Number:
    _, tokens, number = _groups(rows, rows.group_ids)
    return _inverse(tokens) * _inverse(number)


def _rollout_mean(rows: _Rows) -> Number:
    _, tokens, _ = _groups(rows, rows.rollout_ids)
    return _inverse(tokens) * _inverse(rows.all_rows())


def _group_mean(rows: _Rows) -> Number:
    groups, _, number = _groups(rows, rows.group_ids)
    counts = torch.ones_like(rows.tokens) if rows.count_empty else (rows.tokens > 0).double()
    of_row = groups.reduce_each(counts) if rows.group_rows is None else rows.group_rows.reshape(-1)
    return _inverse(rows.tokens) * _inverse(of_row) * _inverse(number)


class _Mode(NamedTuple):
    weight: Any  # a function of _Rows
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    needs_rows: bool = True  # False: also defined on [N] without cu_seqlens, where every element is a row of its own


_MODES = {
    "token-mean": _Mode(_token_mean, optional=("batch_num_tokens",), needs_rows=False),
    "seq-mean-token-mean": _Mode(_row_mean_of_token_means, optional=("num_sequences",)),
    "seq-mean-token-sum": _Mode(_row_mean_of_token_sums, optional=("num_sequences",)),
    "seq-mean-token-sum-norm": _Mode(_row_mean_of_token_sums_over_horizon, optional=("num_sequences", "horizon")),
    "token-sum": _Mode(_token_sum, needs_rows=False),
    "fixed-horizon": _Mode(_fixed_horizon, required=("horizon",), optional=("num_sequences",)),
    "global-token-mean": _Mode(_token_mean, required=("batch_num_tokens",), needs_rows=False),
    "prompt-mean": _Mode(_prompt_mean, required=("group_ids",), optional=("num_sequences", "group_tokens")),
    "rollout-mean": _Mode(_rollout_mean, required=("rollout_ids",), optional=("num_sequences", "group_tokens")),
    "seq-mean": _Mode(_row_mean_of_token_means, optional=("num_sequences",), needs_rows=False),
    "group-mean": _Mode(
        _group_mean, required=("group_ids",), optional=("num_sequences", "group_rows"), needs_rows=False
    ),
}


def takes(mode: Aggregation, name: str) -> bool:
    """Tells whether an aggregation reads a normaliser; an unknown mode is refused elsewhere."""
    every = ("count_empty_rows", "dp_size", "scale")
    return mode not in _MODES or name in (*every, *_MODES[mode].required, *_MODES[mode].optional)


PER_ROW = ("group_ids", "rollout_ids", "group_tokens", "group_rows")
AGGREGATIONS = tuple(_MODES)


def weights_for(
    caller: str,
    mask: Tensor,
    mode: Aggregation,
    *,
    cu_seqlens: Tensor | None = None,
    times: Tensor | None = None,
    count_empty_rows: bool = False,
    dp_size: Number = 1,
    scale: Number = 1.0,
    dtype: torch.dtype = torch.float32,
    **normalizers: Number | None,
) -> Tensor:
    """Computes ``token_weights`` for the public function ``caller``, whose name stands in front of every error.

    ``cu_seqlens``: offsets that ``checks.tokens.rows`` has checked, or None. ``times``: what ``aggregate`` takes as
    ``weights``, 0 at dead tokens, or None.
    """
    # The argument of the losses has another name than that of the two functions here.
    checks.choice(caller, "mode" if caller in ("token_weights", "aggregate") else "aggregation", mode, AGGREGATIONS)
    count_empty_rows = checks.flag(caller, "count_empty_rows", count_empty_rows)
    if not isinstance(dtype, torch.dtype) or dtype not in checks.FLOATS:
        raise TypeError(f"{caller}: dtype must be one of {checks.FLOAT_NAMES}, got {dtype!r}")
    weight, required, optional, needs_rows = _MODES[mode]
    if needs_rows and cu_seqlens is None and mask.dim() == 1:
        raise ValueError(
            f"{caller}: aggregation {mode!r} needs cu_seqlens, or a mask [B, L]; got a mask of shape "
            f"{tuple(mask.shape)}"
        )
    if mode == "seq-mean-token-sum-norm" and cu_seqlens is not None:
        required, optional = ("horizon",), ("num_sequences",)  # a packed batch has no L in its place
    arguments = {name: x for name, x in normalizers.items() if x is not None}
    checks_tokens.normalizers(caller, mode, arguments, required, optional)
    own_rows = cu_seqlens is None and mask.dim() == 1
    live = mask != 0
    if times is None:
        tokens = live.double() if own_rows else token_counts(live, cu_seqlens)
    else:
        tokens = times if own_rows else sums(times, live, cu_seqlens)
    for name, x in arguments.items():
        if name in PER_ROW:
            checks_tokens.ids(caller, name, x, tokens.shape)
            checks.one_device(caller, "mask", mask, **{name: x})
        else:
            arguments[name] = checks_tokens.total(caller, name, x, mask)
    factors = [
        checks_tokens.not_negative(caller, name, x, mask) for name, x in (("dp_size", dp_size), ("scale", scale))
    ]
    # In float64, because a float32 factor would round the weight.
    dp_size, scale = (x.double() if isinstance(x, torch.Tensor) else x for x in factors)

    # zeros + x, because the where below makes float32 of a Python number, and a filled tensor compiles anew for each
    # value.
    rows = _Rows(tokens.reshape(-1), count_empty_rows, mask.shape[-1], **arguments)
    weight = mask.new_zeros((), dtype=torch.float64) + weight(rows) * dp_size * scale
    if not weight.dim():
        weight = checks_tokens.tied(weight, cu_seqlens)
    elif cu_seqlens is not None:
        weight = weight[segment_ids(cu_seqlens, mask.shape[0])]
    else:
        weight = weight.reshape(mask.shape if own_rows else (*tokens.shape, 1))
    weight = weight if times is None else weight * times
    return torch.where(live, weight, 0.0).to(dtype)


def token_mean(caller: str, live: Tensor, dtype: torch.dtype) -> Tensor:
    """Computes the weights of a mean over the bool ``live``, without normalisers and offsets.

    The result is that of ``weights_for``, in 12 us instead of 40.
    """
    checks_tokens.rows(caller, "mask", live, None)
    # Without a live token the reciprocal is infinite, but then the where below selects 0 everywhere.
    return torch.where(live, live.sum(dtype=torch.float64).reciprocal().to(dtype), 0.0)


@takes_one_row(per_token=True)
def token_weights(
    mask: Mask,
    mode: Aggregation = "token-mean",
    *,
    cu_seqlens: Offsets | None = None,
    batch_num_tokens: Number | None = None,
    num_sequences: Number | None = None,
    horizon: Number | None = None,
    group_ids: PerSequence | None = None,
    rollout_ids: PerSequence | None = None,
    group_tokens: PerSequence | None = None,
    group_rows: PerSequence | None = None,
    count_empty_rows: bool = False,
    dp_size: Number = 1,
    scale: Number = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    r"""Returns the weights ``w`` that make an aggregation of per-token losses ``l`` the sum ``sum_t w_t l_t``; 0 on
    dead tokens.

    The weights of micro-batches and ranks, each made with the totals of the whole batch, are those of the batch,
    whichever way it is cut between its rows. With ``n_i`` live tokens in row ``i``, ``R`` rows, ``R+`` of them with a
    live token, ``P`` prompt groups, a live token weighs:

    * ``"token-mean"``: ``1 / sum_i n_i``; ``"global-token-mean"`` the same with ``batch_num_tokens`` demanded;
      ``"token-sum"``: 1
    * ``"seq-mean-token-mean"``: ``1 / (R+ n_i)``; ``"seq-mean-token-sum"``: ``1 / R+``;
      ``"seq-mean-token-sum-norm"``: ``1 / (R+ horizon)``
    * ``"fixed-horizon"``: ``1 / (R horizon)``
    * ``"prompt-mean"``: ``1 / (P x tokens of the prompt group)``; ``"rollout-mean"``: ``1 / (R x tokens of the
      rollout)``
    * ``"seq-mean"``, ``"group-mean"``: for losses of whole rows, ``1 / R+`` and ``1 / (P x rows of the group)`` on
      ``[R]``; on tokens, that spread over the row's ``n_i``

    Args:
        mask: live tokens, any pattern: bool, integers (not 0), or floats that are 0 and 1; ``[..., L]``, packed ``[N]``
            with ``cu_seqlens``, or ``[R]`` rows where the mode allows it.
        batch_num_tokens, num_sequences: replace ``sum_i n_i``, and ``R+``, ``R`` or ``P``, by totals over micro-batches
            and ranks; 0 gives weights 0. Numbers, or tensors of shape ``()`` of a dtype that holds every count: 16 bits
            do not.
        horizon: tokens that every row is divided by; where it may be left out it is ``L``.
        group_ids, rollout_ids: one integer per row, in any order.
        group_tokens, group_rows: one integer per row: the live tokens of its whole prompt group or rollout, the rows of
            its group with a live token, where other micro-batches hold some of them.
        count_empty_rows: rows without a live token count as rows of loss 0, so ``R`` stands for ``R+``.
        dp_size: data-parallel ranks; gradients are averaged over them, so each rank's share is multiplied by it.
        scale: a further factor, such as ``1 / gradient_accumulation_steps``.

    Returns:
        shaped like ``mask``, in ``dtype``. No live token: zeros.

    Raises:
        ValueError: unknown ``mode``; a normaliser that it needs is missing, or one that it does not use is given;
            shapes do not match.
        TypeError: ``mask`` complex, ids not integer, ``cu_seqlens`` not int32 or int64, ``dtype`` not floating.

    Example:
        >>> token_weights(torch.tensor([[1, 1, 0], [1, 0, 0]]), "seq-mean-token-mean")
        tensor([[0.2500, 0.2500, 0.0000],
                [0.5000, 0.0000, 0.0000]])

    DAPO, arXiv:2503.14476 (token-mean); Dr. GRPO, arXiv:2503.20783 (fixed-horizon); ScaleRL, arXiv:2510.13786
    (prompt-mean).
    """
    caller = "token_weights"
    checks.tensor(caller, "mask", mask)
    checks.mask(caller, mask, mask.shape)
    cu_seqlens = checks_tokens.rows(caller, "mask", mask, cu_seqlens, mask)
    return weights_for(
        caller,
        mask,
        mode,
        cu_seqlens=cu_seqlens,
        batch_num_tokens=batch_num_tokens,
        num_sequences=num_sequences,
        horizon=horizon,
        group_ids=group_ids,
        rollout_ids=rollout_ids,
        group_tokens=group_tokens,
        group_rows=group_rows,
        count_empty_rows=count_empty_rows,
        dp_size=dp_size,
        scale=scale,
        dtype=dtype,
    )


@takes_one_row()
def aggregate(
    values: PerToken,
    mask: Mask | None = None,
    mode: Aggregation = "token-mean",
    *,
    weights: PerToken | None = None,
    cu_seqlens: Offsets | None = None,
    batch_num_tokens: Number | None = None,
    num_sequences: Number | None = None,
    horizon: Number | None = None,
    group_ids: PerSequence | None = None,
    rollout_ids: PerSequence | None = None,
    group_tokens: PerSequence | None = None,
    group_rows: PerSequence | None = None,
    count_empty_rows: bool = False,
    dp_size: Number = 1,
    scale: Number = 1.0,
    dtype: torch.dtype = torch.float64,
) -> Scalar:
    r"""Aggregates per-token losses to one number, differentiable in ``values``.

    ``sum_t w_t l_t``, ``w`` as ``token_weights`` gives it; a dead token touches neither value nor gradient, whatever it
    holds.

    Args:
        values: ``l``, shaped like ``mask``; any float dtype.
        weights: factors ``u`` of live tokens, same shape, finite and not negative: a mask that weighs. A token then
            counts ``u_t`` times wherever the mode counts it, so that ``"token-mean"`` is ``sum_t u_t l_t / sum_t u_t``.
            Totals and counts among the other arguments are those of ``u``, too.
        the rest: as for ``token_weights``; ``dtype`` is that of the weights.

    Returns:
        a scalar: float32, float64 for float64. No live token: 0 with zero gradients.

    Raises:
        ValueError, TypeError: as ``token_weights``, and when the shapes of ``values`` and ``mask`` differ.

    Example:
        >>> aggregate(torch.tensor([[1.0, 3.0, float("nan")]]), torch.tensor([[1, 1, 0]]))
        tensor(2.)
    """
    checks.floating("aggregate", "values", values)
    checks.mask("aggregate", mask, values.shape)
    checks.one_device("aggregate", "values", values, mask=mask)
    mask = (
        torch.ones_like(values, dtype=torch.bool, memory_format=torch.contiguous_format)
        if mask is None
        else mask.contiguous()
    )
    cu_seqlens = checks_tokens.rows("aggregate", "mask", mask, cu_seqlens, mask)
    times = None if weights is None else _times("aggregate", weights, mask)
    weights = weights_for(
        "aggregate",
        mask,
        mode,
        cu_seqlens=cu_seqlens,
        times=times,
        batch_num_tokens=batch_num_tokens,
        num_sequences=num_sequences,
        horizon=horizon,
        group_ids=group_ids,
        rollout_ids=rollout_ids,
        group_tokens=group_tokens,
        group_rows=group_rows,
        count_empty_rows=count_empty_rows,
        dp_size=dp_size,
        scale=scale,
        dtype=dtype,
    )
    # Contiguous, because torch adds in the order of memory.
    live_values = torch.where(mask != 0, values, 0.0).double().contiguous()
    return (weights * live_values).sum().to(result_dtype(values))


def _times(caller: str, weights: Tensor, mask: Tensor) -> Tensor:
    """Returns the caller's weights in float64, 0 at dead tokens; refuses bad ones where the host reads them."""
    checks.floating(caller, "weights", weights)
    checks.shape(caller, "weights", weights, mask.shape)
    checks.no_gradient(caller, weights=weights)
    checks.one_device(caller, "mask", mask, weights=weights)
    times = torch.where(mask != 0, weights.double(), 0.0).contiguous()
    good = (times >= 0) & (times < torch.inf)
    if checks.host_reads(good) and not good.all():
        raise ValueError(f"{caller}: weights holds {times[~good][0].item()}, expected finite numbers from 0 on")
    return times
