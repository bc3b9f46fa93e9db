"""verl's aggregation, value loss, KL penalty and entropy loss under their names."""

from typing import Any, cast

from torch import Tensor

from rlkernels.aggregation import aggregate
from rlkernels.integrations.verl.logprobs import entropy_from_logits
from rlkernels.integrations.verl.options import normalizers
from rlkernels.losses.kl_estimate import kl_estimate
from rlkernels.losses.value import value_loss
from rlkernels.types import Normalizers, Number

KINDS: dict[str, dict[str, Any]] = {
    "kl": {"kind": "k1"},
    "k1": {"kind": "k1"},
    "abs": {"kind": "abs"},
    "mse": {"kind": "k2"},
    "k2": {"kind": "k2"},
    "low_var_kl": {"kind": "k3", "diff_clamp": 20.0, "value_clamp": 10.0},
    "k3": {"kind": "k3", "diff_clamp": 20.0, "value_clamp": 10.0},
}
"""verl's names of estimators as options of ``kl_estimate``, with verl's clamps."""


def agg_loss(
    loss_mat: Tensor,
    loss_mask: Tensor,
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: Number | None = None,
    global_batch_size: Number | None = None,
    loss_scale_factor: Number | None = None,
) -> Tensor:
    r"""Aggregates a loss per token: ``aggregate`` with verl's modes and totals of the whole batch.

    Args:
        loss_mat, loss_mask: ``[B, L]``. The mask is bool, integers, or floats that are 0 and 1.
        loss_agg_mode: ``"token-mean"``, ``"token-sum"``, ``"seq-mean-token-sum"``, ``"seq-mean-token-sum-norm"`` or
            ``"seq-mean-token-mean"``.
        dp_size: data-parallel ranks, over which gradients are averaged; the loss is multiplied by it.
        batch_num_tokens, global_batch_size: totals over micro-batches and ranks that take the place of the counts here.
            A mode that does not divide by one does not read it, as in verl.
        loss_scale_factor: the divisor of ``"seq-mean-token-sum-norm"``, ``L`` by default.

    Returns:
        a scalar: float32, float64 for float64. Without a live token 0, where verl's means are NaN.

    Raises:
        ValueError: an unknown mode; ``dp_size > 1`` without the total that the mode divides by; shapes differ.

    Example:
        >>> losses, mask = torch.tensor([[1.0, 3.0], [5.0, 9.0]]), torch.tensor([[1, 1], [1, 0]])
        >>> agg_loss(losses, mask, "token-mean", dp_size=2, batch_num_tokens=6)
        tensor(3.)

    verl 0.9, ``verl.trainer.ppo.core_algos``.
    """
    totals = normalizers("agg_loss", loss_agg_mode, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor)
    mode: Any = loss_agg_mode
    return aggregate(loss_mat, loss_mask, mode, **totals)


def compute_value_loss(
    vpreds: Tensor,
    returns: Tensor,
    values: Tensor,
    response_mask: Tensor,
    cliprange_value: Number,
    loss_agg_mode: str = "token-mean",
    dp_size: int = 1,
    batch_num_tokens: Number | None = None,
    global_batch_size: Number | None = None,
    loss_scale_factor: Number | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Computes the clipped value loss: ``value_loss(vpreds, values, returns, clip_range=cliprange_value)``.

    Args:
        vpreds, returns, values: ``[B, L]``; new values, returns, old values, in verl's order. ``vpreds`` alone get a
            gradient.
        response_mask, loss_agg_mode and what follows: as for ``agg_loss``.

    Returns:
        ``(loss, clipfrac)``: scalars, the second one detached.

    Raises:
        ValueError: as ``agg_loss``; ``cliprange_value`` not positive. TypeError: it is None.

    Example:
        >>> zeros = torch.zeros(1, 2)
        >>> compute_value_loss(torch.tensor([[1.0, 0.25]]), zeros, zeros, torch.ones(1, 2), 0.5)
        (tensor(0.2656), tensor(0.))

    verl 0.9, ``verl.trainer.ppo.core_algos``.
    """
    totals = normalizers(
        "compute_value_loss", loss_agg_mode, dp_size, batch_num_tokens, global_batch_size, loss_scale_factor
    )
    if cliprange_value is None:  # value_loss would not clip, and verl always does
        raise TypeError("compute_value_loss: cliprange_value must be a number, got None")
    mode: Any = loss_agg_mode
    loss, metrics = value_loss(
        vpreds,
        values,
        returns,
        response_mask,
        clip_range=cliprange_value,
        aggregation=mode,
        normalizers=cast(Normalizers, totals),
        return_metrics=True,
    )
    return loss, metrics["clip_fraction"]


def kl_penalty(logprob: Tensor, ref_logprob: Tensor, kl_penalty: str) -> Tensor:
    r"""Estimates the KL to a reference per token: ``kl_estimate`` with verl's names and clamps.

    Args:
        logprob, ref_logprob: ``[...]``; the first one alone gets a gradient.
        kl_penalty: ``"kl"`` or ``"k1"``, ``"abs"``, ``"mse"`` or ``"k2"``, ``"low_var_kl"`` or ``"k3"``. With a ``"+"``
            behind it the value is that of the estimator and the gradient that of k2.

    Returns:
        ``[...]``: float32, float64 for float64.

    Raises:
        NotImplementedError: another name, as in verl; ``"full"`` is one. TypeError: no string.

    Example:
        >>> kl_penalty(torch.tensor([-1.0, -30.0]), torch.tensor([-1.5, 0.0]), "low_var_kl")
        tensor([ 0.1065, 10.0000])

    Schulman 2020, "Approximating KL divergence"; the clamps are those of verl 0.9.
    """
    if not isinstance(kl_penalty, str):
        raise TypeError(f"kl_penalty: kl_penalty must be one of {', '.join(KINDS)}, got {kl_penalty!r}")
    kind = kl_penalty.removesuffix("+")
    if kind not in KINDS:
        raise NotImplementedError(f"kl_penalty: unknown {kl_penalty!r}, expected one of {', '.join(KINDS)}")
    straight = kl_penalty.endswith("+") and kind not in ("mse", "k2")
    return kl_estimate(logprob, ref_logprob, **KINDS[kind], gradient="k2" if straight else "pathwise")


def compute_entropy_loss(logits: Tensor, response_mask: Tensor, loss_agg_mode: str = "token-mean") -> Tensor:
    """Aggregates the entropies of rows of logits, ``[B, L, V]``, as ``agg_loss`` does without totals of the batch.

    Example:
        >>> round(compute_entropy_loss(torch.zeros(1, 2, 4), torch.ones(1, 2)).item(), 4)
        1.3863
    """
    return agg_loss(entropy_from_logits(logits), response_mask, loss_agg_mode)
