"""Preference losses from hidden states and the lm_head: whole answers per chunk, the gradient made in the forward."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from rlkernels import checks, ops
from rlkernels.checks import tokens as checks_tokens
from rlkernels.linear import chunked_loss
from rlkernels.linear.head import Head, head
from rlkernels.linear.rank_agreement import agreed
from rlkernels.linear.sequence_chunks import units
from rlkernels.linear.token_stats import linear_token_logprobs
from rlkernels.logits_layout import or_ignored
from rlkernels.losses.policy_arguments import live_tokens
from rlkernels.losses.preference import dpo_loss, pair_losses, preference_options, references_there
from rlkernels.losses.unpaired_preference import (
    class_weights,
    sequence_losses,
    unpaired_options,
    unpaired_preference_loss,
)
from rlkernels.sequences import segment_ids, sums, token_counts
from rlkernels.tracing import replaced

HEAD = (
    "bias",
    "temperature",
    "softcap",
    "logit_scale",
    "ignore_index",
    "logits_dtype",
    "chunk_tokens",
    "logits_budget",
    "max_live_tokens",
    "valid_vocab",
    "process_group",
    "vocab_start",
)


@agreed
def linear_dpo_loss(
    hidden,
    weight,
    targets,
    mask=None,
    *,
    ref_chosen_logps=None,
    ref_rejected_logps=None,
    cu_seqlens=None,
    return_metrics=False,
    **options,
):
    r"""``dpo_loss``, of any of its types, from hidden states and the lm_head, without ``[T, V]`` logits: three
    products.

    The summed log-probabilities of each answer's live tokens go into ``dpo_loss``. Chunks hold whole pairs; a pair that
    outgrows a chunk is multiplied once more, but for its last part. ``"aot"`` and ``"aot_unpaired"`` sort the batch: to
    them it is one pair. Under ``torch.compile`` everything is multiplied once more.

    Args:
        hidden: ``[2B, L, H]``, the ``B`` chosen answers first, then the rejected ones in the same order; or packed
            ``[T, H]`` with ``cu_seqlens`` ``[2B + 1]``. weight: ``[V, H]``. Both, and ``bias``, get gradients where
            they require them.
        targets: ``[2B, L]`` or ``[T]``, shifted already. mask: the tokens of the answers; the others enter no product.
        ref_chosen_logps, ref_rejected_logps: sums under the reference, ``[B]``, as for ``dpo_loss``.
        options: the keywords of ``linear_token_logprobs``, and those of ``dpo_loss``; lengths are those of the live
            tokens unless given. With ``max_live_tokens`` the host reads no lengths: where the bound fits in one chunk
            three products, else four.

    Returns:
        Scalar, fp32 (fp64 for fp64 hidden states); with ``return_metrics``, ``(loss, dict)`` as ``dpo_loss``.

    Raises:
        TypeError, ValueError, IndexError: as ``linear_token_logprobs`` and ``dpo_loss``; an odd number of answers.

    Rafailov et al. 2023, arXiv:2305.18290; the others: see ``dpo_loss``.
    """
    where = "linear_dpo_loss"
    answers, options = _answers(where, hidden, weight, targets, mask, cu_seqlens, options, preference_options)
    if answers.count % 2:
        raise ValueError(
            f"{where}: hidden holds {answers.count} answers; they come in pairs: the chosen ones first, "
            "then the rejected ones"
        )
    pairs, lengths = answers.count // 2, answers.lengths()
    options = {"chosen_lengths": lengths[:pairs], "rejected_lengths": lengths[pairs:], **options}
    references = ref_chosen_logps, ref_rejected_logps
    checked = preference_options(where, torch.empty(pairs, dtype=torch.float64, device=hidden.device), **options)
    references_there(where, *references, checked)

    def whole(logps, return_metrics=return_metrics):
        return answers.narrow(
            dpo_loss(logps[:pairs], logps[pairs:], *references, return_metrics=return_metrics, **options)
        )

    if checked.pair_weights is not None:
        answers = answers.only(checked.pair_weights[answers.answer % max(pairs, 1)] != 0)
    if torch.compiler.is_compiling():
        return whole(answers.sums(answers.again(answers.live)))

    def score(sums, first, last):
        part = (None if x is None else x[first:last] for x in references)
        return pair_losses(where, sums[0::2], sums[1::2], *part, checked.part(first, last)).sum() / max(pairs, 1)

    references = _references(where, references, pairs)
    if checked.pair_weights is not None:
        checked = replaced(checked, pair_weights=checked.pair_weights.clone())
    # The pair's chosen answer, then its rejected one.
    place = answers.answer % max(pairs, 1) * 2 + answers.answer // max(pairs, 1)
    loss, logp = answers.scored(place, 2, score) if checked.separable() else answers.scored_whole(whole)
    return (loss, whole(answers.sums(logp))[1]) if return_metrics else loss


@agreed
def linear_unpaired_preference_loss(
    hidden, weight, targets, ref_logps, desirable, mask=None, *, cu_seqlens=None, return_metrics=False, **options
):
    r"""``unpaired_preference_loss`` (KTO, APO-zero, BCO) from hidden states and the lm_head, without ``[T, V]`` logits:
    three products.

    Args:
        hidden: ``[N, L, H]``, or packed ``[T, H]`` with ``cu_seqlens`` ``[N + 1]``; weight: ``[V, H]``; targets: ``[N,
            L]`` or ``[T]``, shifted already; mask: the tokens of the answers.
        ref_logps, desirable: ``[N]``, as for ``unpaired_preference_loss``.
        options: the keywords of ``linear_token_logprobs``, and those of ``unpaired_preference_loss``.
            ``"kto_paired_batch"`` looks at the whole batch, and with ``max_live_tokens`` the host reads no lengths:
            where that does not fit in one chunk, four products.

    Returns:
        Scalar, fp32 (fp64 for fp64 hidden states); with ``return_metrics``, ``(loss, dict)``.

    Raises:
        TypeError, ValueError, IndexError: as ``linear_token_logprobs`` and ``unpaired_preference_loss``.

    Ethayarajh et al. 2024, arXiv:2402.01306 (KTO); the others: see ``unpaired_preference_loss``.
    """
    where = "linear_unpaired_preference_loss"
    answers, options = _answers(where, hidden, weight, targets, mask, cu_seqlens, options, unpaired_options)
    count = answers.count
    checked = unpaired_options(where, torch.empty(count, dtype=torch.float64, device=hidden.device), **options)
    checks.floating(where, "ref_logps", ref_logps)
    checks.shape(where, "ref_logps", ref_logps, (count,))
    checks.no_gradient(where, ref_logps=ref_logps)
    checks.tensor(where, "desirable", desirable)
    checks.labels(where, "desirable", desirable, (count,))
    checks.one_device(where, "hidden", hidden, ref_logps=ref_logps, desirable=desirable)

    def whole(logps, return_metrics=return_metrics):
        return answers.narrow(
            unpaired_preference_loss(logps, ref_logps, desirable, return_metrics=return_metrics, **options)
        )

    weighs = class_weights(desirable, checked, answers.head.real) != 0
    if checked.separable() and not return_metrics:  # which are of both classes
        answers = answers.only(weighs[answers.answer])
    if torch.compiler.is_compiling():
        return whole(answers.sums(answers.again(answers.live)))

    # A second backward scores again what the caller may have written over since.
    ref_logps, desirable = ref_logps.clone(), desirable.clone()
    refs, good = torch.where(weighs, ref_logps, 0.0), desirable != 0
    if isinstance(checked.baseline, torch.Tensor):
        checked = replaced(checked, baseline=checked.baseline.clone())

    def score(sums, first, last):
        sums = torch.where(weighs[first:last], sums, 0.0)
        return sequence_losses(where, sums, refs[first:last], good[first:last], checked).sum() / max(count, 1)

    loss, logp = answers.scored(answers.answer, 1, score) if checked.separable() else answers.scored_whole(whole)
    return (loss, whole(answers.sums(logp))[1]) if return_metrics else loss


class _Answers(NamedTuple):
    """The head, and for each row whether it is live and which of ``count`` answers it belongs to."""

    head: Head
    live: torch.Tensor
    answer: torch.Tensor
    offsets: torch.Tensor  # the ends of the answers
    count: int
    again: Callable  # live rows -> log-probabilities, by four products

    def sums(self, logp):
        """Sums of each answer, ``[count]``; float64: a loss looks at small differences of large sums."""
        return sums(logp.double(), self.live, self.offsets)

    def narrow(self, found):
        """A loss, or a loss and its metrics, in the dtype that the head's losses have."""
        if isinstance(found, tuple):
            return self.narrow(found[0]), {name: self.narrow(x) for name, x in found[1].items()}
        return found.to(self.head.real)

    def only(self, kept):
        """Only the rows where ``kept`` holds; the others enter no product."""
        return replaced(self, live=self.live & kept)

    def lengths(self):
        return token_counts(self.live, self.offsets)

    def scored(self, place, per_unit, score):
        """Loss and log-probabilities.

        ``score(sums, first, last)``: the loss of units ``first`` to ``last`` from the sums of their answers.
        """
        plain = chunked_loss.checked(self.head, self.live)
        plan, backend = (
            units(self.live, place, self.count, per_unit, plain.bound),
            ops.serving("fused_policy", self.head.hidden),
        )

        def of_rows(rows, logp, entropy, first, last):
            every = torch.ones_like(logp, dtype=torch.bool, requires_grad=False) if rows.dead is None else ~rows.dead
            return score(sums(logp.double(), every, plan.cu_seqlens(first, last)), first, last)

        def compute(needs):
            return chunked_loss.per_unit(plain, plan, of_rows, needs, False, backend, lambda: 1.0 / max(self.count, 1))

        loss, logp, _ = chunked_loss.differentiable(self.head, compute)
        return loss, logp

    def scored_whole(self, whole):
        """The same of a loss that looks at all answers at once."""
        return self.scored(self.answer, max(self.count, 1), lambda sums, first, last: whole(sums, return_metrics=False))


def _answers(where, hidden, weight, targets, mask, cu_seqlens, options, loss_options):
    """The answers, and the options that ``loss_options`` takes."""
    for name in options:
        if name not in HEAD and name not in loss_options.__kwdefaults__:
            raise TypeError(
                f"{where}: got an unknown option {name!r}; it takes {', '.join((*HEAD, *loss_options.__kwdefaults__))}"
            )
    given = {name: options[name] for name in HEAD if name in options}
    h = head(where, hidden, weight, targets, **given)
    if hidden.dim() != (3 if cu_seqlens is None else 2):
        raise ValueError(
            f"{where}: hidden has shape {tuple(hidden.shape)}, expected [B, L, H], or [T, H] together with cu_seqlens"
        )
    targets = checks_tokens.holding(where, targets, h.ignore_index)
    live = live_tokens(where, targets.new_empty(targets.shape, dtype=h.real), mask) & (targets != h.ignore_index)
    rows = torch.arange(targets.numel(), device=targets.device)
    if cu_seqlens is None:
        count, answer = hidden.shape[0], rows // max(hidden.shape[1], 1)
        offsets = torch.arange(count + 1, device=targets.device) * hidden.shape[1]
    else:
        offsets = checks_tokens.segments(where, cu_seqlens, targets)
        count, answer = offsets.shape[0] - 1, segment_ids(offsets, targets.shape[0])

    def again(live):
        live = live.view(targets.shape)
        each = {**given, "temperature": h.temperature_without(~live, given.get("temperature", 1.0))}
        return linear_token_logprobs(hidden, weight, or_ignored(~live, targets, h.ignore_index), **each).reshape(-1)

    return _Answers(h, live.reshape(-1), answer, offsets, count, again), {
        name: x for name, x in options.items() if name not in HEAD
    }


def _references(where, references, pairs):
    """Checked; copies, because a second backward scores again what the caller may have written over since."""
    for name, x in zip(("ref_chosen_logps", "ref_rejected_logps"), references, strict=True):
        if x is not None:
            checks.floating(where, name, x)
            checks.shape(where, name, x, (pairs,))
            checks.no_gradient(where, **{name: x})
    return [None if x is None else x.clone() for x in references]
