"""Supervised fine-tuning from hidden states and the lm_head to the scalar, without ``[T, V]`` logits."""

from typing import Literal, get_args, overload

import torch

from rlkernels import checks, ops
from rlkernels.checks import tokens as checks_tokens
from rlkernels.linear.exact_kl import check_reference_head, kl_of_reference
from rlkernels.linear.head import HeadOptions, linear_head
from rlkernels.linear.rank_agreement import same_on_every_rank
from rlkernels.linear.token_loss import PolicyTerms, check_batch, token_loss
from rlkernels.linear.token_stats import head_logprobs, head_stats
from rlkernels.losses.policy_arguments import present
from rlkernels.losses.sft import asft_number, not_negative, sft_metrics, sft_weights, weighted_total, z_metric
from rlkernels.losses.token_weights import TokenWeights, live_tokens, summed
from rlkernels.losses.weighted_sum import weighted_sum
from rlkernels.packed_rows import takes_one_row
from rlkernels.types import (
    Aggregation,
    HeadBias,
    HeadWeight,
    HiddenStates,
    LinearSftKind,
    Mask,
    Metrics,
    Normalizers,
    Number,
    Offsets,
    PerToken,
    PerTokenOrSequence,
    PolicyReduction,
    Scalar,
    Targets,
    Temperature,
    VocabMask,
)

KINDS = get_args(LinearSftKind)


@overload
def linear_sft_loss(
    hidden: HiddenStates,
    weight: HeadWeight,
    targets: Targets,
    mask: Mask | None = None,
    *,
    bias: HeadBias | None = None,
    temperature: Temperature = 1.0,
    softcap: Number | None = None,
    logit_scale: Number = 1.0,
    ignore_index: int = -100,
    vocab_mask: VocabMask | None = None,
    logits_dtype: torch.dtype = torch.float32,
    chunk_tokens: int | None = None,
    logits_budget: int | None = None,
    max_live_tokens: int | None = None,
    valid_vocab: int | None = None,
    process_group: "torch.distributed.ProcessGroup | None" = None,
    vocab_start: int | None = None,
    kind: LinearSftKind = "nll",
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    sample_weights: PerTokenOrSequence | None = None,
    normalize_by_weight: bool = False,
    z_loss_coef: Number = 0.0,
    asft_alpha: Number | None = None,
    ref_hidden: HiddenStates | None = None,
    ref_weight: HeadWeight | None = None,
    ref_bias: HeadBias | None = None,
    cu_seqlens: Offsets | None = None,
    normalizers: Normalizers | None = None,
    reduction: PolicyReduction = "aggregation",
    return_metrics: Literal[False] = False,
) -> Scalar: ...


@overload
def linear_sft_loss(
    hidden: HiddenStates,
    weight: HeadWeight,
    targets: Targets,
    mask: Mask | None = None,
    *,
    bias: HeadBias | None = None,
    temperature: Temperature = 1.0,
    softcap: Number | None = None,
    logit_scale: Number = 1.0,
    ignore_index: int = -100,
    vocab_mask: VocabMask | None = None,
    logits_dtype: torch.dtype = torch.float32,
    chunk_tokens: int | None = None,
    logits_budget: int | None = None,
    max_live_tokens: int | None = None,
    valid_vocab: int | None = None,
    process_group: "torch.distributed.ProcessGroup | None" = None,
    vocab_start: int | None = None,
    kind: LinearSftKind = "nll",
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    sample_weights: PerTokenOrSequence | None = None,
    normalize_by_weight: bool = False,
    z_loss_coef: Number = 0.0,
    asft_alpha: Number | None = None,
    ref_hidden: HiddenStates | None = None,
    ref_weight: HeadWeight | None = None,
    ref_bias: HeadBias | None = None,
    cu_seqlens: Offsets | None = None,
    normalizers: Normalizers | None = None,
    reduction: PolicyReduction = "aggregation",
    return_metrics: Literal[True],
) -> tuple[Scalar, Metrics]: ...


@overload
def linear_sft_loss(
    hidden: HiddenStates,
    weight: HeadWeight,
    targets: Targets,
    mask: Mask | None = None,
    *,
    bias: HeadBias | None = None,
    temperature: Temperature = 1.0,
    softcap: Number | None = None,
    logit_scale: Number = 1.0,
    ignore_index: int = -100,
    vocab_mask: VocabMask | None = None,
    logits_dtype: torch.dtype = torch.float32,
    chunk_tokens: int | None = None,
    logits_budget: int | None = None,
    max_live_tokens: int | None = None,
    valid_vocab: int | None = None,
    process_group: "torch.distributed.ProcessGroup | None" = None,
    vocab_start: int | None = None,
    kind: LinearSftKind = "nll",
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    sample_weights: PerTokenOrSequence | None = None,
    normalize_by_weight: bool = False,
    z_loss_coef: Number = 0.0,
    asft_alpha: Number | None = None,
    ref_hidden: HiddenStates | None = None,
    ref_weight: HeadWeight | None = None,
    ref_bias: HeadBias | None = None,
    cu_seqlens: Offsets | None = None,
    normalizers: Normalizers | None = None,
    reduction: PolicyReduction = "aggregation",
    return_metrics: bool,
) -> Scalar | tuple[Scalar, Metrics]: ...


@takes_one_row(2, per_token=True)
@same_on_every_rank
def linear_sft_loss(
    hidden: HiddenStates,
    weight: HeadWeight,
    targets: Targets,
    mask: Mask | None = None,
    *,
    bias: HeadBias | None = None,
    temperature: Temperature = 1.0,
    softcap: Number | None = None,
    logit_scale: Number = 1.0,
    ignore_index: int = -100,
    vocab_mask: VocabMask | None = None,
    logits_dtype: torch.dtype = torch.float32,
    chunk_tokens: int | None = None,
    logits_budget: int | None = None,
    max_live_tokens: int | None = None,
    valid_vocab: int | None = None,
    process_group: "torch.distributed.ProcessGroup | None" = None,
    vocab_start: int | None = None,
    kind: LinearSftKind = "nll",
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    sample_weights: PerTokenOrSequence | None = None,
    normalize_by_weight: bool = False,
    z_loss_coef: Number = 0.0,
    asft_alpha: Number | None = None,
    ref_hidden: HiddenStates | None = None,
    ref_weight: HeadWeight | None = None,
    ref_bias: HeadBias | None = None,
    cu_seqlens: Offsets | None = None,
    normalizers: Normalizers | None = None,
    reduction: PolicyReduction = "aggregation",
    return_metrics: bool = False,
) -> Scalar | tuple[Scalar, Metrics]:
    r"""Computes ``sft_loss`` from hidden states and the lm_head, without ``[T, V]`` logits.

    ``sum_t w_t v_t l(log pi(y_t)) + z_loss_coef sum_t |w_t v_t| Z_t^2``, with the letters of ``sft_loss``, and
    ``log pi`` that of ``linear_token_logprobs``. Three matmuls, because the gradient is made in the forward.

    Args:
        hidden, weight, bias: as for ``linear_token_logprobs``; all three get gradients where they require them.
        targets, temperature, softcap, logit_scale, ignore_index, vocab_mask, logits_dtype, chunk_tokens, logits_budget,
            max_live_tokens, valid_vocab, process_group, vocab_start: as for ``linear_token_logprobs``. Targets are
            shifted already.
        mask, kind, aggregation, weights, sample_weights, normalize_by_weight, cu_seqlens, normalizers: as for
            ``logprobs_sft_loss``; a token of weight 0 enters no matmul.
        z_loss_coef, reduction: as for ``sft_loss``; each takes four matmuls.
        asft_alpha: as for ``sft_loss``. ref_hidden, ref_weight, ref_bias: of ``"asft"``, as for ``linear_policy_loss``;
            it takes three matmuls of the head and one of the reference's more.

    Returns:
        Scalar, or one number per token, fp32 (fp64 for fp64 hidden states); with ``return_metrics``, ``(loss, {"nll":
        ..., "probability": ...})``, and ``"z_loss"`` and ``"kl"`` as ``sft_loss`` has
        them.

    Raises:
        TypeError, ValueError, IndexError: as ``linear_token_logprobs`` and ``sft_loss``.

    Example:
        >>> round(linear_sft_loss(torch.ones(1, 2, 3), torch.zeros(4, 3), torch.tensor([[3, -100]])).item(), 4)
        1.3863
    """
    caller = "linear_sft_loss"
    checks.flags(caller, return_metrics=return_metrics)
    options: HeadOptions = {
        "bias": bias,
        "temperature": temperature,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "ignore_index": ignore_index,
        "vocab_mask": vocab_mask,
        "logits_dtype": logits_dtype,
        "chunk_tokens": chunk_tokens,
        "logits_budget": logits_budget,
        "max_live_tokens": max_live_tokens,
        "valid_vocab": valid_vocab,
        "process_group": process_group,
        "vocab_start": vocab_start,
    }
    head = linear_head(caller, hidden, weight, targets, options)
    check_batch(caller, hidden)
    checks.choice(caller, "kind", kind, KINDS)
    ignore_index = head.ignore_index
    targets = checks_tokens.holding(caller, targets, ignore_index)
    like = targets.new_empty(targets.shape, dtype=head.result_dtype())
    cu_seqlens = checks_tokens.rows(caller, "targets", targets, cu_seqlens, mask)
    live = live_tokens(caller, like, mask) & (targets != ignore_index)
    weights = head.per_row(
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
    z_loss_coef = checks.coefficient(not_negative, caller, "z_loss_coef", z_loss_coef, like)
    objective = "nll" if kind == "nll" else "dft"
    asft_alpha = asft_number(caller, kind, asft_alpha, "ref_hidden", ref_hidden, like)
    each = not summed(caller, reduction)
    of_reference = None
    if ref_hidden is not None:
        check_reference_head(caller, hidden, ref_hidden, ref_weight, ref_bias)
        reference, of_rows = (ref_hidden, ref_weight, ref_bias), weights.abs().view(like.shape)
        of_reference = kl_of_reference(hidden, weight, reference, options, "forward_kl", of_rows, asft_alpha, each)
    elif ref_weight is not None or ref_bias is not None:
        name = "ref_bias" if ref_weight is None else "ref_weight"
        raise ValueError(f"{caller}: {name} belongs to ref_hidden, got ref_hidden=None; pass both")
    if each or present(z_loss_coef):
        stats = head_stats(head.without(weights == 0), (), weights.shape)
        logp, squares, more = stats.logprobs, stats.logsumexp**2, {}
        loss = weighted_sum(objective, logp, [], (), TokenWeights(weights, each=each))
        if present(z_loss_coef):
            loss = (loss + weighted_total(weights.abs(), squares, each) * z_loss_coef).to(logp.dtype)
            more = z_metric(squares, weights) if return_metrics else more
        loss = loss.view(like.shape) if each else loss
    elif torch.compiler.is_compiling():
        logp, more = head_logprobs(head.without(~live.reshape(-1))), {}
        loss = weighted_sum(objective, logp, [], (), TokenWeights(weights))
    else:
        terms = PolicyTerms(objective, [], (), weights, None, None, None, None)
        serving = ops.serving("fused_policy", hidden, objective=objective)
        (loss, logp, _), more = token_loss(head, terms, False, serving), {}
    if of_reference is not None:
        loss = loss + of_reference[0]
        more = more | {"kl": of_reference[1]}
    return (loss, sft_metrics(logp, weights) | more) if return_metrics else loss
