"""The loss of a value function, plain or clipped."""

from typing import Literal, overload

import torch

from rlkernels import checks
from rlkernels.backends.protocol import real_dtype
from rlkernels.checks import tokens as checks_tokens
from rlkernels.logits_layout import dense
from rlkernels.losses.policy_arguments import column
from rlkernels.losses.token_weights import full_mask, live_mask, token_weights_of
from rlkernels.losses.weighted_sum import weighted_sum
from rlkernels.packed_rows import takes_one_row
from rlkernels.types import Aggregation, Mask, Metrics, Normalizers, Number, Offsets, PerToken, Scalar


@overload
def value_loss(
    values: PerToken,
    old_values: PerToken | None,
    returns: PerToken,
    mask: Mask | None = None,
    *,
    clip_range: Number | None = None,
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    cu_seqlens: Offsets | None = None,
    normalizers: Normalizers | None = None,
    return_metrics: Literal[False] = False,
) -> Scalar: ...


@overload
def value_loss(
    values: PerToken,
    old_values: PerToken | None,
    returns: PerToken,
    mask: Mask | None = None,
    *,
    clip_range: Number | None = None,
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    cu_seqlens: Offsets | None = None,
    normalizers: Normalizers | None = None,
    return_metrics: Literal[True],
) -> tuple[Scalar, Metrics]: ...


@overload
def value_loss(
    values: PerToken,
    old_values: PerToken | None,
    returns: PerToken,
    mask: Mask | None = None,
    *,
    clip_range: Number | None = None,
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    cu_seqlens: Offsets | None = None,
    normalizers: Normalizers | None = None,
    return_metrics: bool,
) -> Scalar | tuple[Scalar, Metrics]: ...


@takes_one_row()
def value_loss(
    values: PerToken,
    old_values: PerToken | None,
    returns: PerToken,
    mask: Mask | None = None,
    *,
    clip_range: Number | None = None,
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    cu_seqlens: Offsets | None = None,
    normalizers: Normalizers | None = None,
    return_metrics: bool = False,
) -> Scalar | tuple[Scalar, Metrics]:
    r"""Value-function loss: ``1/2 sum_t w_t (V_t - R_t)^2``.

    With ``clip_range = c`` it is the larger of that and the clipped error,
    ``1/2 sum_t w_t max((V_t - R_t)^2, (V_old_t + clip(V_t - V_old_t, -c, c) - R_t)^2)``.

    Args:
        values, old_values, returns: ``[B, L]`` or packed ``[T]``; ``old_values`` is not looked at without
            ``clip_range``. Only ``values`` get a gradient.
        mask, aggregation, weights, cu_seqlens, normalizers: as for ``policy_loss``.

    Returns:
        Scalar, fp32 (fp64 for fp64 values); with ``return_metrics``, ``(loss, {"clip_fraction": ..., "error": ...})``:
        the live tokens that moved by more than ``c`` and whose clipped error is the larger one, and the mean squared
        error.

    Raises:
        ValueError: shapes that do not match, ``clip_range`` not positive.

    Example:
        >>> values, old_values, returns = torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2), torch.tensor([[0.0, 1.0]])
        >>> round(value_loss(values, old_values, returns, clip_range=0.5).item(), 4)
        1.25

    Schulman et al. 2017, arXiv:1707.06347, eq. 9; clipping and the half: OpenAI Baselines (ppo2).
    """
    caller = "value_loss"
    checks.floating(caller, "values", values)
    checks.no_forward_ad(caller, values)
    cu_seqlens = checks_tokens.rows(caller, "values", values, cu_seqlens, mask)
    inputs = {"returns": returns} if clip_range is None else {"old_values": old_values, "returns": returns}
    for name, x in inputs.items():
        column(caller, name, x, values)
    if clip_range is not None:
        clip_range = checks.coefficient(checks.positive, caller, "clip_range", clip_range, values)
    live = live_mask(caller, values, mask)
    token_weights = token_weights_of(caller, values, live, aggregation, weights, cu_seqlens, normalizers)
    prediction = dense(values, real_dtype(values.dtype))
    objective, parameters = ("value_plain", ()) if clip_range is None else ("value_clip", (clip_range,))
    loss = weighted_sum(objective, prediction, list(inputs.values()), parameters, token_weights)
    if not return_metrics:
        return loss
    live = full_mask(values, live)
    with torch.no_grad():
        count = live.sum().clamp(min=1)
        free = prediction - returns
        metrics = {"error": torch.where(live, free * free, 0.0).sum() / count}
        if clip_range is not None:
            gap = prediction - old_values
            # In the loss's own form, because old + clip(gap) rounds away from the value inside the clip.
            held = free + (gap.clamp(-clip_range, clip_range) - gap)
            clipped = live & (gap.abs() > clip_range) & (held * held > free * free)
            metrics["clip_fraction"] = clipped.sum().to(prediction.dtype) / count
    return loss, metrics
