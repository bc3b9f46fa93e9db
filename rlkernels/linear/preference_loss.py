"""Losses of pairs from hidden states and the lm_head: whole answers per chunk, the gradient made in the forward."""

import functools
from dataclasses import dataclass
from typing import Literal, overload

import torch

from rlkernels import checks
from rlkernels.linear.answers import AnswerLoss, answers_of
from rlkernels.linear.head import HeadOptions, linear_head
from rlkernels.linear.rank_agreement import same_on_every_rank
from rlkernels.losses.preference import (
    REDUCTIONS,
    dpo_loss,
    gold_losses,
    pair_losses,
    preference_options,
    references_there,
)
from rlkernels.losses.preference_options import PreferenceOptions
from rlkernels.packed_rows import takes_one_row
from rlkernels.tracing import replaced
from rlkernels.types import (
    FDivergence,
    HeadBias,
    HeadWeight,
    HiddenStates,
    LossTypes,
    LossWeights,
    Mask,
    Metrics,
    Number,
    Offsets,
    PerPair,
    Reduction,
    Scalar,
    Targets,
    Temperature,
    VocabMask,
)

WATCHED = ("entropy", "mean_logits", "is_top1")


@overload
def linear_dpo_loss(
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
    ref_chosen_logps: PerPair | None = None,
    ref_rejected_logps: PerPair | None = None,
    beta: Number | PerPair = 0.1,
    loss_type: LossTypes = "sigmoid",
    loss_weights: LossWeights | None = None,
    label_smoothing: Number = 0.0,
    reference_free: bool = False,
    f_divergence: FDivergence = "reverse_kl",
    alpha: Number | None = None,
    length_normalized: bool = False,
    simpo_gamma: Number | None = None,
    alphapo_alpha: Number = 0.0,
    discopop_tau: Number | None = None,
    cpo_alpha: Number | None = None,
    chosen_lengths: PerPair | None = None,
    rejected_lengths: PerPair | None = None,
    pair_weights: PerPair | None = None,
    dpop_lambda: Number | None = None,
    chosen_rewards: PerPair | None = None,
    rejected_rewards: PerPair | None = None,
    rpo_eta: Number | None = None,
    gold_logps: PerPair | None = None,
    gold_lengths: PerPair | None = None,
    tpo_alpha: Number | None = None,
    num_pairs: Number | None = None,
    num_chosen_tokens: Number | None = None,
    num_gold_tokens: Number | None = None,
    reduction: Reduction = "mean",
    ld_alpha: Number = 1.0,
    cu_seqlens: Offsets | None = None,
    return_metrics: Literal[False] = False,
    **params: Number,
) -> Scalar: ...


@overload
def linear_dpo_loss(
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
    ref_chosen_logps: PerPair | None = None,
    ref_rejected_logps: PerPair | None = None,
    beta: Number | PerPair = 0.1,
    loss_type: LossTypes = "sigmoid",
    loss_weights: LossWeights | None = None,
    label_smoothing: Number = 0.0,
    reference_free: bool = False,
    f_divergence: FDivergence = "reverse_kl",
    alpha: Number | None = None,
    length_normalized: bool = False,
    simpo_gamma: Number | None = None,
    alphapo_alpha: Number = 0.0,
    discopop_tau: Number | None = None,
    cpo_alpha: Number | None = None,
    chosen_lengths: PerPair | None = None,
    rejected_lengths: PerPair | None = None,
    pair_weights: PerPair | None = None,
    dpop_lambda: Number | None = None,
    chosen_rewards: PerPair | None = None,
    rejected_rewards: PerPair | None = None,
    rpo_eta: Number | None = None,
    gold_logps: PerPair | None = None,
    gold_lengths: PerPair | None = None,
    tpo_alpha: Number | None = None,
    num_pairs: Number | None = None,
    num_chosen_tokens: Number | None = None,
    num_gold_tokens: Number | None = None,
    reduction: Reduction = "mean",
    ld_alpha: Number = 1.0,
    cu_seqlens: Offsets | None = None,
    return_metrics: Literal[True],
    **params: Number,
) -> tuple[Scalar, Metrics]: ...


@overload
def linear_dpo_loss(
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
    ref_chosen_logps: PerPair | None = None,
    ref_rejected_logps: PerPair | None = None,
    beta: Number | PerPair = 0.1,
    loss_type: LossTypes = "sigmoid",
    loss_weights: LossWeights | None = None,
    label_smoothing: Number = 0.0,
    reference_free: bool = False,
    f_divergence: FDivergence = "reverse_kl",
    alpha: Number | None = None,
    length_normalized: bool = False,
    simpo_gamma: Number | None = None,
    alphapo_alpha: Number = 0.0,
    discopop_tau: Number | None = None,
    cpo_alpha: Number | None = None,
    chosen_lengths: PerPair | None = None,
    rejected_lengths: PerPair | None = None,
    pair_weights: PerPair | None = None,
    dpop_lambda: Number | None = None,
    chosen_rewards: PerPair | None = None,
    rejected_rewards: PerPair | None = None,
    rpo_eta: Number | None = None,
    gold_logps: PerPair | None = None,
    gold_lengths: PerPair | None = None,
    tpo_alpha: Number | None = None,
    num_pairs: Number | None = None,
    num_chosen_tokens: Number | None = None,
    num_gold_tokens: Number | None = None,
    reduction: Reduction = "mean",
    ld_alpha: Number = 1.0,
    cu_seqlens: Offsets | None = None,
    return_metrics: bool,
    **params: Number,
) -> Scalar | tuple[Scalar, Metrics]: ...


@takes_one_row(2)
@same_on_every_rank
def linear_dpo_loss(
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
    ref_chosen_logps: PerPair | None = None,
    ref_rejected_logps: PerPair | None = None,
    beta: Number | PerPair = 0.1,
    loss_type: LossTypes = "sigmoid",
    loss_weights: LossWeights | None = None,
    label_smoothing: Number = 0.0,
    reference_free: bool = False,
    f_divergence: FDivergence = "reverse_kl",
    alpha: Number | None = None,
    length_normalized: bool = False,
    simpo_gamma: Number | None = None,
    alphapo_alpha: Number = 0.0,
    discopop_tau: Number | None = None,
    cpo_alpha: Number | None = None,
    chosen_lengths: PerPair | None = None,
    rejected_lengths: PerPair | None = None,
    pair_weights: PerPair | None = None,
    dpop_lambda: Number | None = None,
    chosen_rewards: PerPair | None = None,
    rejected_rewards: PerPair | None = None,
    rpo_eta: Number | None = None,
    gold_logps: PerPair | None = None,
    gold_lengths: PerPair | None = None,
    tpo_alpha: Number | None = None,
    num_pairs: Number | None = None,
    num_chosen_tokens: Number | None = None,
    num_gold_tokens: Number | None = None,
    reduction: Reduction = "mean",
    ld_alpha: Number = 1.0,
    cu_seqlens: Offsets | None = None,
    return_metrics: bool = False,
    **params: Number,
) -> Scalar | tuple[Scalar, Metrics]:
    r"""Computes ``dpo_loss``, of any of its types, from hidden states and the lm_head, without ``[T, V]`` logits: three
    matmuls.

    The summed log-probabilities of each answer's live tokens, ``logp = sum_t log pi(y_t)``, go into ``dpo_loss``. There
    ``"sigmoid"`` is ``-(1-e) log s(b D) - e log s(-b D)``, with ``D`` the difference of ``logp - ref``.

    A chunk holds whole pairs; a pair that outgrows a chunk is multiplied once more, but for its last part. ``"aot"``
    and ``"aot_unpaired"`` sort the batch, so to them it is one pair. Under ``torch.compile`` everything is multiplied
    once more.

    Args:
        hidden: ``[2B, L, H]``, the ``B`` chosen answers first, then the rejected ones in the same order; or packed
            ``[T, H]`` with ``cu_seqlens`` ``[2B + 1]``. weight: ``[V, H]``. Both, and ``bias``, get gradients where
            they require them.
        targets: ``[2B, L]`` or ``[T]``, shifted already. mask: the tokens of the answers; the others enter no matmul.
        ref_chosen_logps, ref_rejected_logps: sums under the reference, ``[B]``, as for ``dpo_loss``.
        bias, temperature, softcap, logit_scale, ignore_index, vocab_mask, logits_dtype, chunk_tokens, logits_budget,
            valid_vocab, process_group, vocab_start: as for ``linear_token_logprobs``.
        max_live_tokens: a bound on the live tokens, with which the host reads no lengths. Where it fits in one chunk
            they take three matmuls, else four.
        beta, loss_type, loss_weights, label_smoothing, reference_free, f_divergence, alpha, length_normalized,
            simpo_gamma, alphapo_alpha, discopop_tau, cpo_alpha, pair_weights, dpop_lambda, chosen_rewards,
            rejected_rewards, rpo_eta, gold_logps, gold_lengths, tpo_alpha, num_pairs, num_chosen_tokens,
            num_gold_tokens, params: as for ``dpo_loss``. ``gold_logps`` get their gradient, too.
        reduction: as for ``dpo_loss``; ``"none"`` takes four matmuls, because each pair waits for its own upstream
            gradient.
        ld_alpha: the weight of a token beyond the length of the pair's shorter answer, as for
            ``length_desensitized_weights``; the reference sums have to be weighted by the caller.
        chosen_lengths, rejected_lengths: as for ``dpo_loss``; the numbers of live tokens unless given.

    Returns:
        Scalar, fp32 (fp64 for fp64 hidden states); with ``return_metrics``, ``(loss, dict)``, the
        metrics of ``dpo_loss``; ``chosen_logps`` and ``rejected_logps``, the sums of each answer, ``[B]``, detached;
        and over tokens ``logits_chosen`` and ``logits_rejected``, means of all logits of each side, ``entropy``, and
        ``token_accuracy``, the share of chosen tokens that are the likeliest.

    Raises:
        TypeError, ValueError, IndexError: as ``linear_token_logprobs`` and ``dpo_loss``; an odd number of answers.

    Example:
        >>> hidden, weight = torch.zeros(2, 3, 2), torch.ones(4, 2)
        >>> targets = torch.tensor([[1, 2, 3], [3, 0, -100]])
        >>> round(linear_dpo_loss(hidden, weight, targets, reference_free=True).item(), 4)
        0.7649

    Rafailov et al. 2023, arXiv:2305.18290; the others: see ``dpo_loss``.
    """
    caller = "linear_dpo_loss"
    checks.flags(caller, return_metrics=return_metrics)
    checks.no_forward_ad(caller, gold_logps)
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
    if answers.count % 2:
        raise ValueError(
            f"{caller}: hidden holds {answers.count} answers; they come in pairs: the chosen ones first, "
            "then the rejected ones"
        )
    pairs, lengths = answers.count // 2, answers.lengths()
    loss_options = {
        "beta": beta,
        "loss_type": loss_type,
        "loss_weights": loss_weights,
        "label_smoothing": label_smoothing,
        "reference_free": reference_free,
        "f_divergence": f_divergence,
        "alpha": alpha,
        "length_normalized": length_normalized,
        "simpo_gamma": simpo_gamma,
        "alphapo_alpha": alphapo_alpha,
        "discopop_tau": discopop_tau,
        "cpo_alpha": cpo_alpha,
        "chosen_lengths": lengths[:pairs] if chosen_lengths is None else chosen_lengths,
        "rejected_lengths": lengths[pairs:] if rejected_lengths is None else rejected_lengths,
        "pair_weights": pair_weights,
        "dpop_lambda": dpop_lambda,
        "chosen_rewards": chosen_rewards,
        "rejected_rewards": rejected_rewards,
        "rpo_eta": rpo_eta,
        "gold_logps": gold_logps,
        "gold_lengths": gold_lengths,
        "tpo_alpha": tpo_alpha,
        "num_pairs": num_pairs,
        "num_chosen_tokens": num_chosen_tokens,
        "num_gold_tokens": num_gold_tokens,
        **params,
    }
    references = ref_chosen_logps, ref_rejected_logps
    checks.choice(caller, "reduction", reduction, REDUCTIONS)
    if reduction != "mean" and num_pairs is not None:
        raise ValueError(f"{caller}: num_pairs divides a mean; reduction {reduction!r} takes none")
    ld_alpha = checks.interval(caller, "ld_alpha", ld_alpha, 0, 1)
    checked = preference_options(caller, torch.empty(pairs, dtype=torch.float64, device=hidden.device), **loss_options)
    references_there(caller, *references, checked)
    if checked.pair_weights is not None:
        answers = answers.where(checked.pair_weights[answers.answer % max(pairs, 1)] != 0)
    if ld_alpha != 1.0:
        answers = answers.weighing(_length_desensitized(answers, ld_alpha))
    if torch.compiler.is_compiling() or reduction == "none":
        logp, of_rows = answers.statistics(*(WATCHED if return_metrics else ()))
        logps = answers.sums(logp)
        loss = _dpo_of_batch(answers, references, loss_options, logps, return_metrics, reduction)
        return (loss[0], _with_tokens(answers, logps, of_rows, loss[1])) if return_metrics else loss
    if return_metrics:
        answers = answers.watching(*WATCHED)
    references = _copies_of_references(caller, references, pairs)
    gold = None if gold_logps is None else gold_losses(checked, gold_logps)
    if gold is not None:  # its gradient is autograd's, and the chunks know nothing of it
        loss_options |= {"gold_logps": None, "gold_lengths": None, "tpo_alpha": 0.0, "num_gold_tokens": None}
    of_batch = functools.partial(_dpo_of_batch, answers, references, loss_options, reduction=reduction)
    checked = _copied(checked)
    if reduction == "sum":
        checked = replaced(checked, num_pairs=1)
    if checked.separable():
        # The chosen answer of a pair, then its rejected one.
        place = answers.answer % max(pairs, 1) * 2 + answers.answer // max(pairs, 1)
        loss, logp = answers.chunked(place, 2, PairLoss, caller, references, checked)
    else:
        loss, logp = answers.in_one_chunk(of_batch)
    if gold is not None:
        loss = loss + answers.rounded(gold.sum() / checked.num_pairs)
    if not return_metrics:
        return loss
    logps = answers.sums(logp)
    return loss, _with_tokens(answers, logps, answers.watched, of_batch(logps, True)[1])


def _dpo_of_batch(answers, references, loss_options, logps, return_metrics=False, reduction="mean"):
    """Returns ``dpo_loss`` of the summed log-probabilities of all answers, in the dtype of a head's losses."""
    pairs = answers.count // 2
    return answers.rounded(
        dpo_loss(
            logps[:pairs],
            logps[pairs:],
            *references,
            return_metrics=return_metrics,
            reduction=reduction,
            **loss_options,
        )
    )


@torch.no_grad()
def _with_tokens(answers, logps, of_rows, metrics):
    """Adds the summed log-probabilities of each answer to the metrics, and what TRL plots of the tokens of answers."""
    pairs, live = answers.count // 2, answers.live
    first, last = (live & half for half in (answers.answer < pairs, answers.answer >= pairs))

    def mean(name, rows):
        # Rounded first, because where makes a number of the default dtype from a bool.
        x = answers.rounded(of_rows[name])
        return torch.where(rows, x, 0.0).sum() / rows.sum().clamp(min=1)

    chosen, rejected = answers.rounded(logps.detach()).split([pairs, pairs])
    return {
        **metrics,
        "chosen_logps": chosen,
        "rejected_logps": rejected,
        "logits_chosen": mean("mean_logits", first),
        "logits_rejected": mean("mean_logits", last),
        "entropy": mean("entropy", live),
        "token_accuracy": mean("is_top1", first),
    }


def _length_desensitized(answers, ld_alpha):
    """Returns the weight of each row, float64 ``[T]``: 1 up to the length of the pair's shorter answer, else alpha."""
    lengths, pairs = answers.lengths(), answers.count // 2
    shared = torch.minimum(lengths[:pairs], lengths[pairs:]).repeat(2)
    live = answers.live.double()
    place = live.cumsum(0) - (lengths.cumsum(0) - lengths)[answers.answer]
    one = torch.ones_like(live)
    return torch.where(place <= shared[answers.answer], one, one * ld_alpha)


def _copied(options):
    """Copies the tensors of a caller, because a second backward scores again what they may have written over since."""
    fields = {name: x.clone() for name, x in options._asdict().items() if isinstance(x, torch.Tensor)}
    return replaced(options, **fields) if fields else options


def _copies_of_references(caller, references, pairs):
    """Returns the references, checked and copied.

    Copies, because a second backward scores again what the caller may have written over since.
    """
    for name, x in zip(("ref_chosen_logps", "ref_rejected_logps"), references, strict=True):
        if x is not None:
            checks.floating(caller, name, x)
            checks.shape(caller, name, x, (pairs,))
            checks.no_gradient(caller, **{name: x})
    return [None if x is None else x.clone() for x in references]


@dataclass
class PairLoss(AnswerLoss):
    """The ChunkedLoss of pairs, each of which depends on no other pair."""

    caller: str
    references: list
    options: PreferenceOptions

    def loss_of_answers(self, logps, first, last):
        references = (None if x is None else x[first:last] for x in self.references)
        options = self.options.part(first, last)
        losses = pair_losses(self.caller, logps[0::2], logps[1::2], *references, options)
        return losses.sum() / options.num_pairs
