"""The loss of a value function, plain or clipped."""

from typing import Literal, overload

import torch
from torch import Tensor

from rlkernels import checks
from rlkernels.backends.protocol import real_dtype
from rlkernels.checks import tokens as checks_tokens
from rlkernels.logits_layout import dense
from rlkernels.losses.policy_arguments import column, divided, missing_column, own_names
from rlkernels.losses.token_weights import (
    counted_tokens,
    full_mask,
    live_mask,
    losses_of_tokens,
    summed,
    token_weights_of,
)
from rlkernels.losses.weighted_sum import weighted_sum
from rlkernels.objectives import OBJECTIVES, Objective, registered
from rlkernels.packed_rows import is_one_row, on_one_row
from rlkernels.types import (
    Aggregation,
    Mask,
    Metrics,
    Normalizers,
    Number,
    ObjectiveLike,
    Offsets,
    PerToken,
    PolicyReduction,
    Scalar,
)

ARGUMENTS = {"old_value": "old_values", "returns": "returns"}
"""From a column of a value objective to the argument that fills it. Any other column is a keyword of its own name."""


@overload
def value_loss(
    values: PerToken,
    old_values: PerToken | None,
    returns: PerToken,
    mask: Mask | None = None,
    *,
    objective: ObjectiveLike | None = None,
    clip_range: Number | None = None,
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    cu_seqlens: Offsets | None = None,
    normalizers: Normalizers | None = None,
    reduction: PolicyReduction = "aggregation",
    return_metrics: Literal[False] = False,
    **params: Number | PerToken,
) -> Scalar: ...


@overload
def value_loss(
    values: PerToken,
    old_values: PerToken | None,
    returns: PerToken,
    mask: Mask | None = None,
    *,
    objective: ObjectiveLike | None = None,
    clip_range: Number | None = None,
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    cu_seqlens: Offsets | None = None,
    normalizers: Normalizers | None = None,
    reduction: PolicyReduction = "aggregation",
    return_metrics: Literal[True],
    **params: Number | PerToken,
) -> tuple[Scalar, Metrics]: ...


@overload
def value_loss(
    values: PerToken,
    old_values: PerToken | None,
    returns: PerToken,
    mask: Mask | None = None,
    *,
    objective: ObjectiveLike | None = None,
    clip_range: Number | None = None,
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    cu_seqlens: Offsets | None = None,
    normalizers: Normalizers | None = None,
    reduction: PolicyReduction = "aggregation",
    return_metrics: bool,
    **params: Number | PerToken,
) -> Scalar | tuple[Scalar, Metrics]: ...


def value_loss(
    values: PerToken,
    old_values: PerToken | None,
    returns: PerToken,
    mask: Mask | None = None,
    *,
    objective: ObjectiveLike | None = None,
    clip_range: Number | None = None,
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    cu_seqlens: Offsets | None = None,
    normalizers: Normalizers | None = None,
    reduction: PolicyReduction = "aggregation",
    return_metrics: bool = False,
    **params: Number | PerToken,
) -> Scalar | tuple[Scalar, Metrics]:
    r"""Computes the value-function loss: ``1/2 sum_t w_t (V_t - R_t)^2``.

    With ``clip_range = c`` it is the larger of that and the clipped error,
    ``1/2 sum_t w_t max((V_t - R_t)^2, (V_old_t + clip(V_t - V_old_t, -c, c) - R_t)^2)``.

    With an ``objective`` of your own it is ``sum_t w_t l(V_t, V_old_t, R_t)``.

    Args:
        values, old_values, returns: ``[B, L]`` or packed ``[T]``; ``old_values`` is not looked at without
            ``clip_range``, nor by an objective without the column ``old_value``. Only ``values`` get a gradient.
        objective: the name of a registered objective with first column ``value``, or its function. Its parameters and
            its columns besides ``old_value`` and ``returns`` are further keywords, as for ``policy_loss``.
        clip_range: ``c``, > 0; also a parameter ``clip_range`` of an objective.
        mask, aggregation, weights, cu_seqlens, normalizers, reduction: as for ``policy_loss``.

    Returns:
        Scalar, or one number per token, fp32 (fp64 for fp64 values); with ``return_metrics``, ``(loss,
        {"clip_fraction": ..., "error": ...})``: the live tokens that moved by more than ``c`` and whose clipped error
        is the larger one, and the mean squared error. With an ``objective`` of your own the error alone.

    Raises:
        ValueError: shapes that do not match, ``clip_range`` not positive or not looked at by the objective, an unknown
            objective, a column of it for which nothing was passed.
        TypeError: a parameter that the objective does not take, or one it needs.

    Example:
        >>> values, old_values, returns = torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2), torch.tensor([[0.0, 1.0]])
        >>> round(value_loss(values, old_values, returns, clip_range=0.5).item(), 4)
        1.25

    Schulman et al. 2017, arXiv:1707.06347, eq. 9; clipping and the half: OpenAI Baselines (ppo2).
    """
    if cu_seqlens is not None and is_one_row(values):
        return on_one_row(value_loss, locals(), "values")
    caller = "value_loss"
    checks.flags(caller, return_metrics=return_metrics)
    checks.floating(caller, "values", values)
    checks.no_forward_ad(caller, values)
    cu_seqlens = checks_tokens.rows(caller, "values", values, cu_seqlens, mask)
    entry, settings, further = _objective(caller, objective, clip_range, params, values)
    name, inputs = entry.function.__name__, {"old_value": old_values, "returns": returns, **further}
    columns = []
    for key in entry.columns[1:]:
        if key not in inputs:
            raise ValueError(missing_column(caller, entry, key, key))
        columns.append(column(caller, ARGUMENTS.get(key, key), inputs[key], values))
    live = live_mask(caller, values, mask)
    if not summed(caller, reduction):
        token_weights = losses_of_tokens(caller, live, aggregation, weights, normalizers)
    else:
        token_weights = token_weights_of(caller, values, live, aggregation, weights, cu_seqlens, normalizers)
    prediction = dense(values, real_dtype(values.dtype))
    loss = weighted_sum(name, prediction, columns, settings, token_weights)
    if not return_metrics:
        return loss
    live = counted_tokens(full_mask(values, live), weights)
    with torch.no_grad():
        count = live.sum().clamp(min=1)
        free = prediction - returns
        metrics = {"error": torch.where(live, free * free, 0.0).sum() / count}
        if name == "value_clip":
            gap, clip_range = prediction - columns[0], settings[0]
            # In the loss's own form, because old + clip(gap) rounds away from the value inside the clip.
            held = free + (gap.clamp(-clip_range, clip_range) - gap)
            clipped = live & (gap.abs() > clip_range) & (held * held > free * free)
            metrics["clip_fraction"] = clipped.sum().to(prediction.dtype) / count
    return loss, metrics


def _objective(
    caller: str,
    objective: ObjectiveLike | None,
    clip_range: Number | None,
    keywords: dict[str, Number | PerToken],
    like: Tensor,
) -> tuple[Objective, list[Number], dict[str, PerToken]]:
    """Returns the objective, its parameters in its order, and the columns of it that have no argument.

    Without an objective ``clip_range`` says which one of the library's it is.
    """
    if objective is None:
        if clip_range is None and not keywords:
            return OBJECTIVES["value_plain"], [], {}
        objective = "value_plain" if clip_range is None else "value_clip"
    entry = registered(objective)
    if entry is None or entry.columns[0] != "value":
        known = [name for name, other in OBJECTIVES.items() if other.columns[0] == "value"]
        checks.choice(caller, "objective", objective, known)
    name = entry.function.__name__
    own_names(caller, entry, "clip_range")
    params, further = divided(entry, keywords, ARGUMENTS)
    if clip_range is not None:
        if "clip_range" not in entry.params:
            raise ValueError(f"{caller}: objective {name!r} takes no clip_range; leave it out")
        params = {**params, "clip_range": clip_range}
    values = checks.params(caller, name, entry, params, like)
    if clip_range is not None:  # the argument of this function, whoever's objective takes it
        given = values[entry.params.index("clip_range")]
        if not isinstance(given, Tensor):
            checks.positive(caller, "clip_range", given)
    return entry, values, further
