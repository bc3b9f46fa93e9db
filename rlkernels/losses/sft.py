"""Supervised fine-tuning: the weighted likelihood of target tokens, from their log-probabilities or from logits."""

from typing import Literal, get_args, overload

import torch
from torch import Tensor

from rlkernels import checks, ops
from rlkernels.backends.protocol import PolicyInputs, RowBatch, real_dtype
from rlkernels.checks import tokens as checks_tokens
from rlkernels.logits_layout import FlatLogits, dense, flatten_logits, matrix
from rlkernels.logprobs import collect
from rlkernels.losses.policy_arguments import column, present
from rlkernels.losses.token_weights import TokenWeights, live_tokens, loss_weights, losses_of_tokens, summed
from rlkernels.losses.weighted_sum import weighted_sum
from rlkernels.packed_rows import takes_one_row
from rlkernels.sequences import per_token
from rlkernels.types import (
    Aggregation,
    Logits,
    LogitsSftKind,
    Mask,
    Metrics,
    Normalizers,
    Number,
    Offsets,
    Output,
    PerToken,
    PerTokenOrSequence,
    PolicyReduction,
    Scalar,
    SftKind,
    Targets,
    Temperature,
    VocabMask,
)

KINDS, LOGITS_KINDS = get_args(SftKind), get_args(LogitsSftKind)


@overload
def logprobs_sft_loss(
    logprobs: PerToken,
    mask: Mask | None = None,
    *,
    kind: SftKind = "nll",
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    sample_weights: PerTokenOrSequence | None = None,
    normalize_by_weight: bool = False,
    cu_seqlens: Offsets | None = None,
    normalizers: Normalizers | None = None,
    reduction: PolicyReduction = "aggregation",
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
    normalize_by_weight: bool = False,
    cu_seqlens: Offsets | None = None,
    normalizers: Normalizers | None = None,
    reduction: PolicyReduction = "aggregation",
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
    normalize_by_weight: bool = False,
    cu_seqlens: Offsets | None = None,
    normalizers: Normalizers | None = None,
    reduction: PolicyReduction = "aggregation",
    return_metrics: bool,
) -> Scalar | tuple[Scalar, Metrics]: ...


@takes_one_row(per_token=True)
def logprobs_sft_loss(
    logprobs: PerToken,
    mask: Mask | None = None,
    *,
    kind: SftKind = "nll",
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    sample_weights: PerTokenOrSequence | None = None,
    normalize_by_weight: bool = False,
    cu_seqlens: Offsets | None = None,
    normalizers: Normalizers | None = None,
    reduction: PolicyReduction = "aggregation",
    return_metrics: bool = False,
) -> Scalar | tuple[Scalar, Metrics]:
    r"""Computes ``sft_loss`` from the log-probabilities of the targets: value and derivative in one launch.

    ``sum_t w_t v_t l(logp_t)``, ``l = -logp`` (``"nll"``) or ``-sg[exp(logp)] logp`` (``"dft"``).

    Args:
        logprobs: ``[B, L]``, or packed ``[T]``; the only argument that gets a gradient.
        mask: live tokens, same shape, as for ``policy_loss``; a dead token touches neither loss nor gradient, whatever
            it holds.
        kind: ``"nll"`` or ``"dft"``, as for ``sft_loss``. sample_weights, normalize_by_weight: as there.
        aggregation, normalizers, weights, cu_seqlens: as for ``policy_loss``. reduction: as for ``sft_loss``.

    Returns:
        Scalar, or one number per token, fp32 (fp64 for fp64 inputs); with ``return_metrics``, ``(loss, {"nll": ...,
        "probability": ...})``, means over the tokens whose weight is not 0.

    Raises:
        ValueError: shapes that do not match, unknown names, two sources of weights.

    Example:
        >>> round(logprobs_sft_loss(torch.tensor([[-1.0, -3.0]]), torch.tensor([[True, True]])).item(), 4)
        2.0
    """
    caller = "logprobs_sft_loss"
    checks.flags(caller, return_metrics=return_metrics)
    checks.floating(caller, "logprobs", logprobs)
    checks.no_forward_ad(caller, logprobs)
    checks.choice(caller, "kind", kind, KINDS)
    cu_seqlens = checks_tokens.rows(caller, "logprobs", logprobs, cu_seqlens, mask)
    live = live_tokens(caller, logprobs, mask)
    weights = sft_weights(
        caller,
        logprobs,
        live,
        aggregation,
        weights,
        sample_weights,
        normalize_by_weight,
        cu_seqlens,
        normalizers,
        reduction,
    )
    logp = dense(logprobs, real_dtype(logprobs.dtype))
    if not summed(caller, reduction):
        loss = weighted_sum(kind, logp, [], (), TokenWeights(weights, each=True))
    else:
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
    kind: LogitsSftKind = "nll",
    eaft_alpha: Number | None = None,
    asft_alpha: Number | None = None,
    ref_logits: Logits | None = None,
    z_loss_coef: Number = 0.0,
    label_smoothing: Number = 0.0,
    temperature: Temperature = 1.0,
    ignore_index: int = -100,
    vocab_mask: VocabMask | None = None,
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    sample_weights: PerTokenOrSequence | None = None,
    normalize_by_weight: bool = False,
    cu_seqlens: Offsets | None = None,
    normalizers: Normalizers | None = None,
    reduction: PolicyReduction = "aggregation",
    inplace_backward: bool = False,
    return_metrics: Literal[False] = False,
) -> Scalar: ...


@overload
def sft_loss(
    logits: Logits,
    targets: Targets,
    mask: Mask | None = None,
    *,
    kind: LogitsSftKind = "nll",
    eaft_alpha: Number | None = None,
    asft_alpha: Number | None = None,
    ref_logits: Logits | None = None,
    z_loss_coef: Number = 0.0,
    label_smoothing: Number = 0.0,
    temperature: Temperature = 1.0,
    ignore_index: int = -100,
    vocab_mask: VocabMask | None = None,
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    sample_weights: PerTokenOrSequence | None = None,
    normalize_by_weight: bool = False,
    cu_seqlens: Offsets | None = None,
    normalizers: Normalizers | None = None,
    reduction: PolicyReduction = "aggregation",
    inplace_backward: bool = False,
    return_metrics: Literal[True],
) -> tuple[Scalar, Metrics]: ...


@overload
def sft_loss(
    logits: Logits,
    targets: Targets,
    mask: Mask | None = None,
    *,
    kind: LogitsSftKind = "nll",
    eaft_alpha: Number | None = None,
    asft_alpha: Number | None = None,
    ref_logits: Logits | None = None,
    z_loss_coef: Number = 0.0,
    label_smoothing: Number = 0.0,
    temperature: Temperature = 1.0,
    ignore_index: int = -100,
    vocab_mask: VocabMask | None = None,
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    sample_weights: PerTokenOrSequence | None = None,
    normalize_by_weight: bool = False,
    cu_seqlens: Offsets | None = None,
    normalizers: Normalizers | None = None,
    reduction: PolicyReduction = "aggregation",
    inplace_backward: bool = False,
    return_metrics: bool,
) -> Scalar | tuple[Scalar, Metrics]: ...


@takes_one_row(2, per_token=True)
def sft_loss(
    logits: Logits,
    targets: Targets,
    mask: Mask | None = None,
    *,
    kind: LogitsSftKind = "nll",
    eaft_alpha: Number | None = None,
    asft_alpha: Number | None = None,
    ref_logits: Logits | None = None,
    z_loss_coef: Number = 0.0,
    label_smoothing: Number = 0.0,
    temperature: Temperature = 1.0,
    ignore_index: int = -100,
    vocab_mask: VocabMask | None = None,
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    sample_weights: PerTokenOrSequence | None = None,
    normalize_by_weight: bool = False,
    cu_seqlens: Offsets | None = None,
    normalizers: Normalizers | None = None,
    reduction: PolicyReduction = "aggregation",
    inplace_backward: bool = False,
    return_metrics: bool = False,
) -> Scalar | tuple[Scalar, Metrics]:
    r"""Computes the likelihood of target tokens, from logits: loss and gradient of the logits in one pass over each
    row.

    ``sum_t w_t v_t l(log pi(y_t)) + z_loss_coef sum_t |w_t v_t| Z_t^2``, ``w`` the aggregation's weights, ``v`` the
    ``sample_weights``, ``Z`` the logsumexp of a row. Row ``t`` of the logits scores ``targets[t]``: nothing is shifted
    here; pass ``logits[:, :-1]`` (no copy) and ``labels[:, 1:]``.

    Args:
        logits, targets, temperature, ignore_index, vocab_mask: as for ``token_logprobs``; a target that is ignored is a
            dead token.
        mask: live tokens, shaped like ``targets``. A dead token's row is never read, nor its target and temperature.
            None alive: the loss is 0, its gradient too.
        kind: ``"nll"``: ``l = -log pi``; ``"dft"``: ``-sg[pi] log pi``, which follows a token the less, the less likely
            it is; ``"eaft"``: ``-sg[(H_20 / 3)^eaft_alpha] log pi``, ``H_20`` the entropy over the row's 20 largest
            logits alone, so that a token of which the model is sure moves little; ``"asft"``: ``"dft"``, and
            ``asft_alpha sum_t |w_t v_t| KL(ref_t || pi_t)`` over the vocabulary, which holds the model to a reference.
        eaft_alpha: for ``"eaft"``, at least 0; 1 unless given.
        asft_alpha, ref_logits: for ``"asft"``: at least 0, 0.1 unless given; and the reference's logits, shaped like
            ``logits``, same dtype, no gradient, under the same temperature and mask.
        z_loss_coef: at least 0. It, and a ``label_smoothing``, take a second pass over the rows for the gradient.
        label_smoothing: ``e`` in ``[0, 1]``, for ``"nll"``: ``l = -(1-e) log pi(y) - e/V sum_v log pi(v)``, over the
            mask's support.
        aggregation, normalizers, weights, cu_seqlens: as for ``policy_loss``; ``weights`` stand in for an aggregation.
        sample_weights: ``v``, shaped like ``targets`` or one per sequence (as ``advantages`` of ``policy_loss``), of
            any sign, without gradient. The aggregation goes on counting all live tokens; where ``v`` is 0 the gradient
            is exactly 0. A reward as ``v`` is rejection-sampling fine-tuning (0 or 1) or REINFORCE.
        normalize_by_weight: a mean over the ``v`` of all tokens instead: the loss times ``sum_t w_t / sum_t w_t v_t``,
            0 where that sum is 0. It takes no ``normalizers``, because the sums are those of the tokens at hand.
        reduction: ``"none"``: the loss of each token times its ``v``, shaped like ``targets``, 0 at dead tokens; it
            takes no aggregation, weights, normalisers and no ``normalize_by_weight``, and reads
            each row once more for the gradient.
        inplace_backward: the backward writes the gradient over ``logits``.

    Returns:
        Scalar, or one number per token, fp32 (fp64 for fp64 logits); with ``return_metrics``, ``(loss, {"nll": ...,
        "probability": ..., "entropy": ...})``, means over the tokens whose weight is not 0; with ``z_loss_coef`` also
        ``"z_loss"``, the mean of ``Z^2``, and of ``"asft"`` ``"kl"``.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as ``token_logprobs``; unknown names, shapes that do not match,
            two sources of weights; a number or logits that the kind does not look at, or lacks; a number out of range;
            ``inplace_backward`` with ``"asft"``, where two gradients meet in the logits.

    Example:
        >>> round(sft_loss(torch.zeros(1, 2, 4), torch.tensor([[3, -100]])).item(), 4)
        1.3863
        >>> reference = torch.tensor([[[0.0, 0.0], [0.0, 2.0]]])
        >>> loss = sft_loss(torch.zeros(1, 2, 2), torch.tensor([[1, 1]]), kind="asft", ref_logits=reference)
        >>> round(loss.item(), 4)  # -0.5 log 0.5, and 0.1 times a mean KL of 0.1639
        0.363

    Wu et al. 2025, arXiv:2508.05629 (DFT); Yuan et al. 2023, arXiv:2308.01825 (RFT); LLaMA-Factory (ASFT, EAFT);
    Chowdhery et al. 2022, arXiv:2204.02311, section 5 (z-loss); Szegedy et al. 2015, arXiv:1512.00567 (label
    smoothing).
    """
    caller = "sft_loss"
    checks.flags(caller, return_metrics=return_metrics)
    flat = flatten_logits(caller, logits, targets, temperature, ignore_index, vocab_mask, inplace_backward)
    ignore_index = flat.rows.ignore_index
    if not flat.shape:
        raise ValueError(
            f"{caller}: logits has shape {tuple(logits.shape)}, expected [T, V] or [B, L, V]; unsqueeze the one row"
        )
    checks.choice(caller, "kind", kind, LOGITS_KINDS)
    targets = checks_tokens.holding(caller, targets, ignore_index)
    like = targets.new_empty(targets.shape, dtype=flat.real)
    cu_seqlens = checks_tokens.rows(caller, "targets", targets, cu_seqlens, mask)
    live = live_tokens(caller, like, mask) & (targets != ignore_index)
    everywhere = (
        mask is None
        and weights is None
        and sample_weights is None
        and not isinstance(flat.rows.temperature, torch.Tensor)
    )
    eaft_alpha, z_loss_coef, label_smoothing = _numbers(caller, kind, eaft_alpha, z_loss_coef, label_smoothing, like)
    asft_alpha = asft_number(caller, kind, asft_alpha, "ref_logits", ref_logits, like)
    if ref_logits is not None:
        checks.reference(caller, ref_logits, logits, None)
        checks.one_device(caller, "logits", logits, ref_logits=ref_logits)
        if inplace_backward:
            raise ValueError(f"{caller}: kind 'asft' has two gradients of the logits; leave inplace_backward out")
    weights = flat.per_row(
        sft_weights(
            caller,
            like,
            live,
            aggregation,
            weights,
            sample_weights,
            normalize_by_weight,
            cu_seqlens,
            normalizers,
            reduction,
        )
    )
    flat = flat if everywhere else flat.without(weights == 0)
    of_rows = weights.abs()  # also of the metrics, because the factor of EAFT is 0 where the model is sure
    if kind == "eaft":
        weights = torch.where(weights != 0, weights * (_top_entropies(flat) / 3.0) ** eaft_alpha, 0.0)
    objective = "dft" if kind in ("dft", "asft") else "nll"
    each = not summed(caller, reduction)
    if each or present(z_loss_coef) or present(label_smoothing):
        weights_of = TokenWeights(weights, each=each)
        loss, metrics = _of_statistics(
            logits, flat, objective, weights_of, of_rows, z_loss_coef, label_smoothing, inplace_backward, return_metrics
        )
    else:
        with_grad = (
            torch.is_grad_enabled()
            and logits.requires_grad
            and not inplace_backward
            and not torch.compiler.is_compiling()
        )
        policy = PolicyInputs(objective, [], (), weights)
        serving = ops.serving("fused_policy", logits, objective=objective)
        rows = ops.fused_policy(flat.rows, policy, with_grad, inplace_backward, serving)
        loss, metrics = rows.loss, {}
        if return_metrics:
            metrics = {**sft_metrics(rows.logp, of_rows), "entropy": mean_where_read(rows.entropy, of_rows)}
    if ref_logits is not None:
        of_kl, values = _kl_of_reference(logits, ref_logits, flat, of_rows, each)
        loss = loss + of_kl * asft_alpha
        if return_metrics:
            metrics["kl"] = mean_where_read(values, of_rows)
    return (loss, metrics) if return_metrics else loss


def _kl_of_reference(
    logits: Logits, ref_logits: Logits, flat: FlatLogits, weights: Tensor, each: bool
) -> tuple[Tensor, Tensor]:
    """Computes ``sum_t w_t KL(ref_t || pi_t)``, or its terms, and the KL of each row, ``[T]``."""
    rows, serving = RowBatch(*flat.rows[:5], matrix(ref_logits)), ops.serving("divergence", logits)
    teacher = ops.Teacher(None, None, "forward_kl", 0.5)
    if each:
        values = ops.divergences(rows, teacher, None, False, serving).value
        return weighted_total(weights, values, True).view(flat.shape), values
    with_grad = torch.is_grad_enabled() and logits.requires_grad and not torch.compiler.is_compiling()
    found = ops.divergences(rows, teacher, weights, with_grad, serving)
    return found.loss, found.value


def asft_number(
    caller: str, kind: str, alpha: Number | None, name: str, reference: Tensor | None, like: Tensor
) -> Number:
    """Checks the number and the presence of the reference that ASFT has; ``name``: that of its argument."""
    if kind != "asft":
        for argument, x in (("asft_alpha", alpha), (name, reference)):
            if x is not None:
                raise ValueError(f"{caller}: {argument} goes with kind 'asft', got {kind!r}; leave it out")
        return 0.0
    if reference is None:
        raise ValueError(f"{caller}: kind 'asft' needs {name}, those of the reference")
    return checks.coefficient(not_negative, caller, "asft_alpha", 0.1 if alpha is None else alpha, like)


def not_negative(caller: str, name: str, x: Number) -> float:
    """Returns a finite number from 0 on."""
    number: float = checks.finite(caller, name, x)
    if number < 0:
        raise ValueError(f"{caller}: {name} must not be negative, got {number}")
    return number


def _numbers(
    caller: str, kind: str, eaft_alpha: Number | None, z_loss_coef: Number, label_smoothing: Number, like: Tensor
) -> tuple[Number, Number, Number]:
    """Checks the numbers of a loss from logits; refuses one that its kind does not look at."""
    if eaft_alpha is not None and kind != "eaft":
        raise ValueError(f"{caller}: eaft_alpha goes with kind 'eaft', got {kind!r}; leave it out")
    number = checks.coefficient
    alpha = number(not_negative, caller, "eaft_alpha", 1.0 if eaft_alpha is None else eaft_alpha, like)
    z_loss_coef = number(not_negative, caller, "z_loss_coef", z_loss_coef, like)
    label_smoothing = number(checks.interval, caller, "label_smoothing", label_smoothing, like, 0, 1)
    if present(label_smoothing) and kind != "nll":
        raise ValueError(f"{caller}: label_smoothing goes with kind 'nll', got {kind!r}; leave it out")
    return alpha, z_loss_coef, label_smoothing


@torch.no_grad()
def _top_entropies(flat: FlatLogits) -> Tensor:
    """Returns the entropy of each row's 20 largest logits, renormalised, ``[T]``; a few rows at a time."""
    logits, targets, temperature, ignore_index, vocab_mask, _ = flat.rows
    vocab = logits.shape[-1]
    divisors = (
        temperature if isinstance(temperature, torch.Tensor) else targets.new_full((), temperature, dtype=flat.real)
    )
    divisors = divisors.to(flat.real).expand(targets.shape)
    entropies, first = [], 0
    for part in logits if logits.dim() == 3 else [logits]:
        for rows in part.split(max(1, 2**22 // max(vocab, 1))):
            last = first + rows.shape[0]
            if vocab_mask is not None:
                kept = vocab_mask if vocab_mask.dim() == 1 else vocab_mask[first:last]
                rows = torch.where(kept, rows, -torch.inf)
            top = rows.topk(min(20, vocab), dim=-1).values.to(flat.real) / divisors[first:last, None]
            logp = torch.log_softmax(top, -1)
            entropies.append(-torch.where(logp > -torch.inf, logp.exp() * logp, 0.0).sum(-1))
            first = last
    return torch.cat(entropies) if entropies else divisors


def _of_statistics(
    logits: Logits,
    flat: FlatLogits,
    objective: str,
    weights: TokenWeights,
    of_rows: Tensor,
    z_loss_coef: Number,
    label_smoothing: Number,
    inplace_backward: bool,
    return_metrics: bool,
) -> tuple[Tensor, Metrics]:
    """Computes a loss that looks at more of a row than the log-probability of its target.

    ``weights``: of the likelihood. ``of_rows``: of the z-loss and the metrics, never negative.
    """
    outputs: list[Output] = (["mean_logits"] if present(label_smoothing) else []) + (
        ["entropy"] if return_metrics else []
    )
    wanted = sum(ops.FLAGS[name] for name in outputs)
    found = ops.token_stats(flat.rows, wanted, inplace_backward, ops.serving("token_stats", logits))
    each = weights.each
    stats = collect(found, of_rows.shape, flat.rows.temperature, outputs, False, None)
    loss, squares = weighted_sum(objective, stats.logprobs, [], (), weights), stats.logsumexp**2
    if stats.mean_logits is not None:
        # The mean of -log pi over the vocabulary.
        spread = weighted_total(weights.values, stats.logsumexp - stats.mean_logits, each)
        loss = loss * (1.0 - label_smoothing) + spread * label_smoothing
    if present(z_loss_coef):
        loss = loss + weighted_total(of_rows, squares, each) * z_loss_coef
    loss = loss.to(flat.real)
    loss = loss.view(flat.shape) if each else loss
    if not return_metrics:
        return loss, {}
    metrics = {**sft_metrics(stats.logprobs, of_rows), "entropy": mean_where_read(stats.entropy, of_rows)}
    return loss, metrics | z_metric(squares, of_rows) if present(z_loss_coef) else metrics


def weighted_total(weights: Tensor, x: Tensor, each: bool) -> Tensor:
    """Computes ``sum_t w_t x_t``, or its terms; a token of weight 0 is left out, whatever it holds."""
    terms = torch.where(weights != 0, x, 0.0) * weights
    return terms if each else terms.sum(dtype=torch.float64).to(x.dtype)


def sft_weights(
    caller: str,
    like: Tensor,
    live: Tensor,
    aggregation: Aggregation,
    weights: PerToken | None,
    sample_weights: PerTokenOrSequence | None,
    normalize_by_weight: bool,
    cu_seqlens: Tensor | None,
    normalizers: Normalizers | None,
    reduction: PolicyReduction,
) -> Tensor:
    """Returns the weight of each token: that of the aggregation, 1 where nothing is summed, times its sample's."""
    checks.flags(caller, normalize_by_weight=normalize_by_weight)
    if not summed(caller, reduction):
        losses_of_tokens(caller, live, aggregation, weights, normalizers)
        if normalize_by_weight:
            raise ValueError(f"{caller}: reduction='none' has no mean; leave out normalize_by_weight")
        weights = live.to(real_dtype(like.dtype))
    else:
        weights = loss_weights(caller, like, live, aggregation, weights, cu_seqlens, normalizers)
    if normalize_by_weight and (sample_weights is None or normalizers):
        raise ValueError(
            f"{caller}: normalize_by_weight divides by the sum of sample_weights at hand; it needs these, and no "
            "normalizers"
        )
    if sample_weights is None:
        return weights
    checks.floating(caller, "sample_weights", sample_weights)
    x = column(caller, "sample_weights", per_token(caller, "sample_weights", sample_weights, like, cu_seqlens), like)
    weighted = torch.where(live, weights * x.to(weights.dtype), 0.0)
    if not normalize_by_weight:
        return weighted
    count, total = (w.sum(dtype=torch.float64) for w in (weights, weighted))
    return torch.where(total == 0, 0.0, weighted * (count / total).to(weighted.dtype))


@torch.no_grad()
def sft_metrics(logp: Tensor, weights: Tensor) -> Metrics:
    """Computes the mean NLL and the mean probability of the tokens whose weight is not 0."""
    return {"nll": mean_where_read(-logp, weights), "probability": mean_where_read(logp.exp(), weights)}


def z_metric(squares: Tensor, weights: Tensor) -> Metrics:
    """Returns the mean of the squared logsumexp over the tokens that were read."""
    return {"z_loss": mean_where_read(squares, weights)}


def mean_where_read(x: Tensor, weights: Tensor) -> Tensor:
    """Computes the mean over the tokens that were read, which are those whose weight is not 0."""
    read = weights != 0
    return torch.where(read, x.detach(), 0.0).sum() / read.sum().clamp(min=1)
