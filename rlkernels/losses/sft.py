"""Supervised fine-tuning: the weighted likelihood of target tokens, from their log-probabilities or from logits."""

from typing import Literal, get_args, overload

import torch
from torch import Tensor

from rlkernels import checks, ops
from rlkernels.backends.protocol import PolicyInputs, real_dtype
from rlkernels.checks import tokens as checks_tokens
from rlkernels.logits_layout import dense, flatten_logits
from rlkernels.losses.policy_arguments import column
from rlkernels.losses.token_weights import live_tokens, loss_weights
from rlkernels.sequences import per_token
from rlkernels.types import (
    Aggregation,
    Logits,
    Mask,
    Metrics,
    Normalizers,
    Offsets,
    PerToken,
    PerTokenOrSequence,
    Scalar,
    SftKind,
    Targets,
    Temperature,
    VocabMask,
)

KINDS = get_args(SftKind)


@overload
def logprobs_sft_loss(
    logprobs: PerToken,
    mask: Mask | None = None,
    *,
    kind: SftKind = "nll",
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    sample_weights: PerTokenOrSequence | None = None,
    cu_seqlens: Offsets | None = None,
    normalizers: Normalizers | None = None,
    return_metrics: Literal[False] = False,
) -> Scalar: ...


@overload
def logprobs_sft_loss(
    logprobs: PerToken,
    mask: Mask | None = None,
    *,
    kind: SftKind = "nll",
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    sample_weights: PerTokenOrSequence | None = None,
    cu_seqlens: Offsets | None = None,
    normalizers: Normalizers | None = None,
    return_metrics: Literal[True],
) -> tuple[Scalar, Metrics]: ...


@overload
def logprobs_sft_loss(
    logprobs: PerToken,
    mask: Mask | None = None,
    *,
    kind: SftKind = "nll",
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    sample_weights: PerTokenOrSequence | None = None,
    cu_seqlens: Offsets | None = None,
    normalizers: Normalizers | None = None,
    return_metrics: bool,
) -> Scalar | tuple[Scalar, Metrics]: ...


def logprobs_sft_loss(
    logprobs: PerToken,
    mask: Mask | None = None,
    *,
    kind: SftKind = "nll",
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    sample_weights: PerTokenOrSequence | None = None,
    cu_seqlens: Offsets | None = None,
    normalizers: Normalizers | None = None,
    return_metrics: bool = False,
) -> Scalar | tuple[Scalar, Metrics]:
    r"""``sft_loss`` from the log-probabilities of the targets: value and derivative in one launch.

    ``sum_t w_t v_t l(logp_t)``, ``l = -logp`` (``"nll"``) or ``-sg[exp(logp)] logp`` (``"dft"``).

    Args:
        logprobs: ``[B, L]``, or packed ``[T]``; the only argument that gets a gradient.
        mask: live tokens, same shape, as for ``policy_loss``; a dead token touches neither loss nor gradient, whatever
            it holds.
        kind, sample_weights: as for ``sft_loss``.
        aggregation, normalizers, weights, cu_seqlens: as for ``policy_loss``.

    Returns:
        Scalar, fp32 (fp64 for fp64 inputs); with ``return_metrics``, ``(loss, {"nll": ..., "probability": ...})``,
        means over the tokens whose weight is not 0.

    Raises:
        ValueError: shapes that do not match, unknown names, two sources of weights.

    Example:
        >>> round(logprobs_sft_loss(torch.tensor([[-1.0, -3.0]]), torch.tensor([[True, True]])).item(), 4)
        2.0
    """
    caller = "logprobs_sft_loss"
    checks.floating(caller, "logprobs", logprobs)
    checks.no_forward_ad(caller, logprobs)
    checks.choice(caller, "kind", kind, KINDS)
    cu_seqlens = checks_tokens.rows(caller, "logprobs", logprobs, cu_seqlens)
    live = live_tokens(caller, logprobs, mask)
    weights = sft_weights(caller, logprobs, live, aggregation, weights, sample_weights, cu_seqlens, normalizers)
    logp = dense(logprobs, real_dtype(logprobs.dtype))
    loss, _ = ops.weighted_loss(
        kind, logp, None, None, [], (), dense(weights, logp.dtype), None, 1.0, ops.serving("weighted_loss", logp)
    )
    return (loss, sft_metrics(logp, weights)) if return_metrics else loss


@overload
def sft_loss(
    logits: Logits,
    targets: Targets,
    mask: Mask | None = None,
    *,
    kind: SftKind = "nll",
    temperature: Temperature = 1.0,
    ignore_index: int = -100,
    vocab_mask: VocabMask | None = None,
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    sample_weights: PerTokenOrSequence | None = None,
    cu_seqlens: Offsets | None = None,
    normalizers: Normalizers | None = None,
    inplace_backward: bool = False,
    return_metrics: Literal[False] = False,
) -> Scalar: ...


@overload
def sft_loss(
    logits: Logits,
    targets: Targets,
    mask: Mask | None = None,
    *,
    kind: SftKind = "nll",
    temperature: Temperature = 1.0,
    ignore_index: int = -100,
    vocab_mask: VocabMask | None = None,
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    sample_weights: PerTokenOrSequence | None = None,
    cu_seqlens: Offsets | None = None,
    normalizers: Normalizers | None = None,
    inplace_backward: bool = False,
    return_metrics: Literal[True],
) -> tuple[Scalar, Metrics]: ...


@overload
def sft_loss(
    logits: Logits,
    targets: Targets,
    mask: Mask | None = None,
    *,
    kind: SftKind = "nll",
    temperature: Temperature = 1.0,
    ignore_index: int = -100,
    vocab_mask: VocabMask | None = None,
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    sample_weights: PerTokenOrSequence | None = None,
    cu_seqlens: Offsets | None = None,
    normalizers: Normalizers | None = None,
    inplace_backward: bool = False,
    return_metrics: bool,
) -> Scalar | tuple[Scalar, Metrics]: ...


def sft_loss(
    logits: Logits,
    targets: Targets,
    mask: Mask | None = None,
    *,
    kind: SftKind = "nll",
    temperature: Temperature = 1.0,
    ignore_index: int = -100,
    vocab_mask: VocabMask | None = None,
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    sample_weights: PerTokenOrSequence | None = None,
    cu_seqlens: Offsets | None = None,
    normalizers: Normalizers | None = None,
    inplace_backward: bool = False,
    return_metrics: bool = False,
) -> Scalar | tuple[Scalar, Metrics]:
    r"""Likelihood of target tokens, from logits: loss and gradient of the logits in one pass over each row.

    ``sum_t w_t v_t l(log pi(y_t))``, ``w`` the aggregation's weights, ``v`` the ``sample_weights``. Row ``t`` of the
    logits scores ``targets[t]``: nothing is shifted here; pass ``logits[:, :-1]`` (no copy) and ``labels[:, 1:]``.

    Args:
        logits, targets, temperature, ignore_index, vocab_mask: as for ``token_logprobs``; a target that is ignored is a
            dead token.
        mask: live tokens, shaped like ``targets``. A dead token's row is never read, nor its target and temperature.
            None alive: the loss is 0, its gradient too.
        kind: ``"nll"``: ``l = -log pi``; ``"dft"``: ``-sg[pi] log pi``, which follows a token the less, the less likely
            it is. (ASFT is this and ``alpha`` times ``divergence_loss`` to the reference's logits. EAFT needs an
            entropy over the 20 largest logits, which no backend has.)
        aggregation, normalizers, weights, cu_seqlens: as for ``policy_loss``; ``weights`` stand in for an aggregation.
        sample_weights: ``v``, shaped like ``targets`` or one per sequence (as ``advantages`` of ``policy_loss``), of
            any sign, without gradient. The aggregation goes on counting all live tokens; where ``v`` is 0 the gradient
            is exactly 0. A reward as ``v`` is rejection-sampling fine-tuning (0 or 1) or REINFORCE.
        inplace_backward: the backward writes the gradient over ``logits``.

    Returns:
        Scalar, fp32 (fp64 for fp64 logits); with ``return_metrics``, ``(loss, {"nll": ..., "probability": ...,
        "entropy": ...})``, means over the tokens whose weight is not 0.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as ``token_logprobs``; unknown names, shapes that do not match,
            two sources of weights.

    Example:
        >>> round(sft_loss(torch.zeros(1, 2, 4), torch.tensor([[3, -100]])).item(), 4)
        1.3863

    Wu et al. 2025, arXiv:2508.05629 (DFT); Yuan et al. 2023, arXiv:2308.01825 (RFT).
    """
    caller = "sft_loss"
    flat = flatten_logits(caller, logits, targets, temperature, ignore_index, vocab_mask, inplace_backward)
    ignore_index = flat.rows.ignore_index
    if not flat.shape:
        raise ValueError(
            f"{caller}: logits has shape {tuple(logits.shape)}, expected [T, V] or [B, L, V]; unsqueeze the one row"
        )
    checks.choice(caller, "kind", kind, KINDS)
    targets = checks_tokens.holding(caller, targets, ignore_index)
    like = targets.new_empty(targets.shape, dtype=flat.real)
    cu_seqlens = checks_tokens.rows(caller, "targets", targets, cu_seqlens)
    live = live_tokens(caller, like, mask) & (targets != ignore_index)
    everywhere = (
        mask is None
        and weights is None
        and sample_weights is None
        and not isinstance(flat.rows.temperature, torch.Tensor)
    )
    weights = flat.per_row(
        sft_weights(caller, like, live, aggregation, weights, sample_weights, cu_seqlens, normalizers)
    )
    flat = flat if everywhere else flat.without(weights == 0)
    with_grad = (
        torch.is_grad_enabled() and logits.requires_grad and not inplace_backward and not torch.compiler.is_compiling()
    )
    policy = PolicyInputs(kind, [], (), weights)
    of_rows = ops.fused_policy(flat.rows, policy, with_grad, inplace_backward, ops.serving("fused_policy", logits))
    if not return_metrics:
        return of_rows.loss
    return of_rows.loss, {**sft_metrics(of_rows.logp, weights), "entropy": mean_where_read(of_rows.entropy, weights)}


def sft_weights(
    caller: str,
    like: Tensor,
    live: Tensor,
    aggregation: Aggregation,
    weights: PerToken | None,
    sample_weights: PerTokenOrSequence | None,
    cu_seqlens: Tensor | None,
    normalizers: Normalizers | None,
) -> Tensor:
    """Returns the weight of each token: that of the aggregation times that of its sample."""
    weights = loss_weights(caller, like, live, aggregation, weights, cu_seqlens, normalizers)
    if sample_weights is None:
        return weights
    checks.floating(caller, "sample_weights", sample_weights)
    x = column(caller, "sample_weights", per_token(caller, "sample_weights", sample_weights, like, cu_seqlens), like)
    return torch.where(live, weights * x.to(weights.dtype), 0.0)


@torch.no_grad()
def sft_metrics(logp: Tensor, weights: Tensor) -> Metrics:
    """Computes the mean NLL and the mean probability of the tokens whose weight is not 0."""
    return {"nll": mean_where_read(-logp, weights), "probability": mean_where_read(logp.exp(), weights)}


def mean_where_read(x: Tensor, weights: Tensor) -> Tensor:
    """Computes the mean over the tokens that were read, which are those whose weight is not 0."""
    read = weights != 0
    return torch.where(read, x.detach(), 0.0).sum() / read.sum().clamp(min=1)
