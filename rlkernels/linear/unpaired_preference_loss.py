"""Losses of single answers from hidden states and the lm_head: whole answers per chunk, gradients in the forward."""

import functools
from dataclasses import dataclass
from typing import Literal, overload

import torch

from rlkernels import checks
from rlkernels.linear.answers import AnswerLoss, answers_of
from rlkernels.linear.head import HeadOptions, linear_head
from rlkernels.linear.rank_agreement import same_on_every_rank
from rlkernels.losses.preference import REDUCTIONS
from rlkernels.losses.unpaired_preference import (
    UnpairedOptions,
    class_weights,
    sequence_losses,
    unpaired_options,
    unpaired_preference_loss,
)
from rlkernels.packed_rows import takes_one_row
from rlkernels.tracing import replaced
from rlkernels.types import (
    HeadBias,
    HeadWeight,
    HiddenStates,
    Mask,
    Metrics,
    Number,
    Offsets,
    PerAnswer,
    Reduction,
    Scalar,
    Targets,
    Temperature,
    UnpairedLossType,
    VocabMask,
)


@overload
def linear_unpaired_preference_loss(
    hidden: HiddenStates,
    weight: HeadWeight,
    targets: Targets,
    ref_logps: PerAnswer,
    desirable: PerAnswer,
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
    loss_type: UnpairedLossType = "kto",
    beta: Number = 0.1,
    desirable_weight: Number = 1.0,
    undesirable_weight: Number = 1.0,
    kl: Number | None = None,
    kl_logps: PerAnswer | None = None,
    ref_kl_logps: PerAnswer | None = None,
    delta: Number | None = None,
    length_normalized: bool = False,
    lengths: PerAnswer | None = None,
    kl_group: "torch.distributed.ProcessGroup | None" = None,
    cu_seqlens: Offsets | None = None,
    reduction: Reduction = "mean",
    return_metrics: Literal[False] = False,
) -> Scalar: ...


@overload
def linear_unpaired_preference_loss(
    hidden: HiddenStates,
    weight: HeadWeight,
    targets: Targets,
    ref_logps: PerAnswer,
    desirable: PerAnswer,
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
    loss_type: UnpairedLossType = "kto",
    beta: Number = 0.1,
    desirable_weight: Number = 1.0,
    undesirable_weight: Number = 1.0,
    kl: Number | None = None,
    kl_logps: PerAnswer | None = None,
    ref_kl_logps: PerAnswer | None = None,
    delta: Number | None = None,
    length_normalized: bool = False,
    lengths: PerAnswer | None = None,
    kl_group: "torch.distributed.ProcessGroup | None" = None,
    cu_seqlens: Offsets | None = None,
    reduction: Reduction = "mean",
    return_metrics: Literal[True],
) -> tuple[Scalar, Metrics]: ...


@overload
def linear_unpaired_preference_loss(
    hidden: HiddenStates,
    weight: HeadWeight,
    targets: Targets,
    ref_logps: PerAnswer,
    desirable: PerAnswer,
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
    loss_type: UnpairedLossType = "kto",
    beta: Number = 0.1,
    desirable_weight: Number = 1.0,
    undesirable_weight: Number = 1.0,
    kl: Number | None = None,
    kl_logps: PerAnswer | None = None,
    ref_kl_logps: PerAnswer | None = None,
    delta: Number | None = None,
    length_normalized: bool = False,
    lengths: PerAnswer | None = None,
    kl_group: "torch.distributed.ProcessGroup | None" = None,
    cu_seqlens: Offsets | None = None,
    reduction: Reduction = "mean",
    return_metrics: bool,
) -> Scalar | tuple[Scalar, Metrics]: ...


@takes_one_row(2)
@same_on_every_rank
def linear_unpaired_preference_loss(
    hidden: HiddenStates,
    weight: HeadWeight,
    targets: Targets,
    ref_logps: PerAnswer,
    desirable: PerAnswer,
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
    loss_type: UnpairedLossType = "kto",
    beta: Number = 0.1,
    desirable_weight: Number = 1.0,
    undesirable_weight: Number = 1.0,
    kl: Number | None = None,
    kl_logps: PerAnswer | None = None,
    ref_kl_logps: PerAnswer | None = None,
    delta: Number | None = None,
    length_normalized: bool = False,
    lengths: PerAnswer | None = None,
    kl_group: "torch.distributed.ProcessGroup | None" = None,
    cu_seqlens: Offsets | None = None,
    reduction: Reduction = "mean",
    return_metrics: bool = False,
) -> Scalar | tuple[Scalar, Metrics]:
    r"""Computes ``unpaired_preference_loss`` (KTO, APO-zero, BCO) from hidden states and the lm_head, without
    ``[T, V]`` logits: three matmuls.

    The summed log-probabilities of each answer's live tokens, ``logp = sum_t log pi(y_t)``, go into it. There ``"kto"``
    is ``1 - s(b (rho - kl))`` of a desirable answer and ``1 - s(b (kl - rho))`` of another, ``rho = logp - ref``.
    ``"kto_paired_batch"`` looks at the whole batch: where that does not fit in one chunk, it takes four matmuls.

    Args:
        hidden: ``[N, L, H]``, or packed ``[T, H]`` with ``cu_seqlens`` ``[N + 1]``. weight: ``[V, H]``.
        targets: ``[N, L]`` or ``[T]``, shifted already. mask: the tokens of the answers.
        ref_logps, desirable: ``[N]``, as for ``unpaired_preference_loss``.
        bias, temperature, softcap, logit_scale, ignore_index, vocab_mask, logits_dtype, chunk_tokens, logits_budget,
            valid_vocab, process_group, vocab_start: as for ``linear_token_logprobs``.
        max_live_tokens: a bound on the live tokens, with which the host reads no lengths. Where it fits in one chunk
            they take three matmuls, else four.
        loss_type, beta, desirable_weight, undesirable_weight, kl, kl_logps, ref_kl_logps, delta, length_normalized,
            kl_group: as for ``unpaired_preference_loss``.
        lengths: as there; the numbers of live tokens unless given.
        reduction: as there; ``"none"`` takes four matmuls, because each answer waits for its own upstream gradient.

    Returns:
        Scalar, or one number per answer, fp32 (fp64 for fp64 hidden states); with ``return_metrics``, ``(loss, dict)``,
        the metrics of ``unpaired_preference_loss``.

    Raises:
        TypeError, ValueError, IndexError: as ``linear_token_logprobs`` and ``unpaired_preference_loss``.

    Example:
        >>> hidden, weight = torch.zeros(2, 3, 2), torch.ones(4, 2)
        >>> targets = torch.tensor([[1, 2, 3], [3, 0, -100]])
        >>> reference, desirable = torch.tensor([-4.0, -3.0]), torch.tensor([True, False])
        >>> loss = linear_unpaired_preference_loss(hidden, weight, targets, reference, desirable, kl=0.0)
        >>> round(loss.item(), 4)
        0.5048

    Ethayarajh et al. 2024, arXiv:2402.01306 (KTO); the others: see ``unpaired_preference_loss``.
    """
    caller = "linear_unpaired_preference_loss"
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
    answers = answers_of(head, hidden, targets, mask, cu_seqlens)
    count = answers.count
    loss_options = {
        "loss_type": loss_type,
        "beta": beta,
        "desirable_weight": desirable_weight,
        "undesirable_weight": undesirable_weight,
        "kl": kl,
        "kl_logps": kl_logps,
        "ref_kl_logps": ref_kl_logps,
        "delta": delta,
        "length_normalized": length_normalized,
        "lengths": answers.lengths() if length_normalized is True and lengths is None else lengths,
        "kl_group": kl_group,
    }
    checked = unpaired_options(caller, torch.empty(count, dtype=torch.float64, device=hidden.device), **loss_options)
    checks.floating(caller, "ref_logps", ref_logps)
    checks.shape(caller, "ref_logps", ref_logps, (count,))
    checks.no_gradient(caller, ref_logps=ref_logps)
    checks.tensor(caller, "desirable", desirable)
    checks.labels(caller, "desirable", desirable, (count,))
    checks.one_device(caller, "hidden", hidden, ref_logps=ref_logps, desirable=desirable)
    weighs = class_weights(desirable, checked, head.result_dtype()) != 0
    if checked.separable() and not return_metrics:  # the metrics are means over the answers of both classes
        answers = answers.where(weighs[answers.answer])
    checks.choice(caller, "reduction", reduction, REDUCTIONS)
    if torch.compiler.is_compiling() or reduction == "none":
        logps = answers.sums(answers.logprobs())
        return _unpaired_of_batch(answers, ref_logps, desirable, loss_options, logps, return_metrics, reduction)
    # Copies, because a second backward scores again what the caller may have written over since.
    ref_logps, desirable = ref_logps.clone(), desirable.clone()
    of_batch = functools.partial(_unpaired_of_batch, answers, ref_logps, desirable, loss_options, reduction=reduction)
    if isinstance(checked.baseline, torch.Tensor):
        checked = replaced(checked, baseline=checked.baseline.clone())
    if checked.loss_type == "kto" and kl_group is not None:  # once for all, because ranks meet for it
        loss_options |= {"kl": checked.baseline, "kl_logps": None, "ref_kl_logps": None, "kl_group": None}
    if checked.separable():
        references = torch.where(weighs, ref_logps, 0.0)
        loss, logp = answers.chunked(
            answers.answer, 1, UnpairedLoss, caller, references, desirable != 0, weighs, checked, reduction == "sum"
        )
    else:
        loss, logp = answers.in_one_chunk(of_batch)
    return (loss, of_batch(answers.sums(logp), True)[1]) if return_metrics else loss


def _unpaired_of_batch(answers, ref_logps, desirable, loss_options, logps, return_metrics=False, reduction="mean"):
    """Returns ``unpaired_preference_loss`` of the log-probabilities of all answers, in the dtype of a head's losses."""
    return answers.rounded(
        unpaired_preference_loss(
            logps, ref_logps, desirable, reduction=reduction, return_metrics=return_metrics, **loss_options
        )
    )


@dataclass
class UnpairedLoss(AnswerLoss):
    """The ChunkedLoss of answers without pairs, each of which depends on no other answer.

    ``references``: 0 in a class of weight 0. ``weighs``: whether the class of an answer has another weight than 0.
    """

    caller: str
    references: torch.Tensor
    desirable: torch.Tensor
    weighs: torch.Tensor
    options: UnpairedOptions
    summed: bool  # not a mean

    def loss_of_answers(self, logps, first, last):
        here = slice(first, last)
        logps = torch.where(self.weighs[here], logps, 0.0)
        options = self.options.part(first, last)
        losses = sequence_losses(self.caller, logps, self.references[here], self.desirable[here], options)
        return losses.sum() / (1 if self.summed else max(self.count, 1))
