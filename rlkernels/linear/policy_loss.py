"""Losses from hidden states and the lm_head to the scalar, without ``[T, V]`` logits: three products, the gradient made
in the forward.
"""

import torch

from rlkernels import checks, ops
from rlkernels.checks import tokens as checks_tokens
from rlkernels.linear import chunked_loss
from rlkernels.linear.chunked_loss import Terms
from rlkernels.linear.chunking import live_rows
from rlkernels.linear.head import head
from rlkernels.linear.rank_agreement import agreed
from rlkernels.linear.sequence_chunks import blocks, units
from rlkernels.linear.token_stats import linear_token_logprobs, linear_token_stats
from rlkernels.logits_layout import or_ignored
from rlkernels.losses.policy import policy_loss, ratio_term
from rlkernels.losses.policy import run as weighted_sum
from rlkernels.losses.policy_arguments import (
    ROW,
    Share,
    check_terms,
    live_tokens,
    of_sums,
    resolve,
    state,
    term_weights,
)
from rlkernels.losses.policy_metrics import policy_metrics
from rlkernels.losses.sft import KINDS as SFT_KINDS
from rlkernels.losses.sft import logprobs_sft_loss, sft_metrics, sft_weights
from rlkernels.losses.weighted_sum import parameters
from rlkernels.sequences import segment_ids, sums


@agreed
def linear_policy_loss(
    hidden,
    weight,
    targets,
    old_logprobs,
    advantages,
    mask=None,
    *,
    bias=None,
    temperature=1.0,
    softcap=None,
    logit_scale=1.0,
    ignore_index=-100,
    logits_dtype=torch.float32,
    chunk_tokens=None,
    logits_budget=None,
    max_live_tokens=None,
    valid_vocab=None,
    process_group=None,
    vocab_start=None,
    objective="ppo_clip",
    aggregation="token-mean",
    weights=None,
    ref_logprobs=None,
    kl="k3",
    kl_coef=0.0,
    entropy_coef=0.0,
    cu_seqlens=None,
    ratio_level="token",
    normalizers=None,
    return_metrics=False,
    **params,
):
    r"""``policy_loss`` from hidden states and the lm_head: the logits of a chunk become their own gradient, and three
    products do it all.

    Tokens whose weights are all 0 enter no product. Tokens without advantage, KL and entropy term skip the two products
    of the gradient where the objective's source shows that it cannot move there; on the CPU so do all tokens whose
    gradient turns out to be 0 (clipped ones). Sequence-level ratios take whole sequences per chunk; a sequence that
    outgrows a chunk is multiplied once more, but for its last part. Under ``torch.compile`` the loss is ``policy_loss``
    of ``linear_token_stats``: four products.

    Args:
        hidden, weight, bias: as for ``linear_token_logprobs``; all three get gradients where they require them, scaled
            by the upstream gradient in the backward.
        targets, temperature, softcap, logit_scale, ignore_index, logits_dtype, chunk_tokens, logits_budget,
        max_live_tokens, valid_vocab,
            process_group, vocab_start: as for ``linear_token_logprobs``. ``max_live_tokens`` bounds the tokens with a
            weight; with sequence-level ratios the live tokens, and where the bound does not fit in one chunk they take
            four products.
        the rest: as for ``logits_policy_loss``; ``old_logprobs`` and ``ref_logprobs`` under the same temperature.

    Returns:
        Scalar, fp32 (fp64 for fp64 hidden states); with ``return_metrics``, ``(loss, dict)``.

    Raises:
        TypeError, ValueError, IndexError: as ``linear_token_logprobs`` and ``policy_loss``.
    """
    where = "linear_policy_loss"
    h = head(
        where,
        hidden,
        weight,
        targets,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        ignore_index=ignore_index,
        logits_dtype=logits_dtype,
        chunk_tokens=chunk_tokens,
        logits_budget=logits_budget,
        max_live_tokens=max_live_tokens,
        valid_vocab=valid_vocab,
        process_group=process_group,
        vocab_start=vocab_start,
    )
    _not_one_row(where, hidden)
    entry, values = resolve(where, objective, params, hidden)
    targets = checks_tokens.holding(where, targets, ignore_index)
    like = targets.new_empty(targets.shape, dtype=h.real)
    cu_seqlens = checks_tokens.rows(where, "targets", targets, cu_seqlens)
    columns = state(where, entry, like, old_logprobs, advantages, cu_seqlens, ratio_level)
    penalty, bonus = check_terms(where, like, ref_logprobs, kl, kl_coef, ROW, entropy_coef)
    ignore_index = h.ignore_index
    live = live_tokens(where, like, mask) & (targets != ignore_index)
    if torch.compiler.is_compiling():
        stats = linear_token_stats(
            hidden,
            weight,
            or_ignored(~live, targets, ignore_index),
            bias=bias,
            temperature=h.temperature_without(~live, temperature),
            softcap=softcap,
            logit_scale=logit_scale,
            ignore_index=ignore_index,
            logits_dtype=logits_dtype,
            chunk_tokens=chunk_tokens,
            logits_budget=logits_budget,
            max_live_tokens=max_live_tokens,
            valid_vocab=valid_vocab,
            process_group=process_group,
            vocab_start=vocab_start,
        )
        return policy_loss(
            stats.logprobs,
            old_logprobs,
            advantages,
            live,
            objective=objective,
            aggregation=aggregation,
            weights=weights,
            ref_logprobs=ref_logprobs,
            kl=kl,
            kl_coef=kl_coef,
            entropy=stats.entropy,
            entropy_coef=entropy_coef,
            cu_seqlens=cu_seqlens,
            ratio_level=ratio_level,
            normalizers=normalizers,
            return_metrics=return_metrics,
            **params,
        )
    if ratio_level == "sequence_sum":
        aggregation = of_sums(aggregation, weights)
    weights = term_weights(where, like, live, aggregation, weights, cu_seqlens, normalizers)
    bonus, penalty = (None if c is None else h.flat(weights * c) for c in (bonus, penalty))
    terms = Terms(
        objective,
        [h.flat(c) for c in columns],
        parameters(values),
        h.flat(weights),
        bonus,
        None if penalty is None else kl,
        None if penalty is None else h.flat(ref_logprobs),
        penalty,
    )
    backend = ops.serving("fused_policy", hidden)
    with_entropy = return_metrics or bonus is not None
    if ratio_level != "token":
        compute = _by_sequence(where, h, terms, like.shape, live, cu_seqlens, ratio_level, with_entropy, backend)
    else:
        # The others are not read: no metrics of them.
        compute, live = _by_token(h, terms, with_entropy, backend), live & terms.live().view(h.shape)
    loss, logp, entropy = chunked_loss.differentiable(h, compute)
    if not return_metrics:
        return loss
    shape = h.shape
    return loss, policy_metrics(
        logp.view(shape), columns, live, ref_logprobs, kl, entropy.view(shape), entry, values, ratio_level, cu_seqlens
    )


@agreed
def linear_sft_loss(
    hidden,
    weight,
    targets,
    mask=None,
    *,
    bias=None,
    temperature=1.0,
    softcap=None,
    logit_scale=1.0,
    ignore_index=-100,
    logits_dtype=torch.float32,
    chunk_tokens=None,
    logits_budget=None,
    max_live_tokens=None,
    valid_vocab=None,
    process_group=None,
    vocab_start=None,
    kind="nll",
    aggregation="token-mean",
    weights=None,
    sample_weights=None,
    cu_seqlens=None,
    normalizers=None,
    return_metrics=False,
):
    r"""``sft_loss`` from hidden states and the lm_head, without ``[T, V]`` logits: three products, the gradient made in
    the forward.

    Args:
        hidden, weight, bias: as for ``linear_token_logprobs``; all three get gradients where they require them.
        targets, temperature, softcap, logit_scale, ignore_index, logits_dtype, chunk_tokens, logits_budget,
        max_live_tokens, valid_vocab,
            process_group, vocab_start: as for ``linear_token_logprobs``. Targets are shifted already.
        mask, kind, aggregation, weights, sample_weights, cu_seqlens, normalizers: as for ``sft_loss``; a token of
            weight 0 enters no product.

    Returns:
        Scalar, fp32 (fp64 for fp64 hidden states); with ``return_metrics``, ``(loss, {"nll": ..., "probability":
        ...})``.

    Raises:
        TypeError, ValueError, IndexError: as ``linear_token_logprobs`` and ``sft_loss``.
    """
    where = "linear_sft_loss"
    options = {
        "bias": bias,
        "temperature": temperature,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "ignore_index": ignore_index,
        "logits_dtype": logits_dtype,
        "chunk_tokens": chunk_tokens,
        "logits_budget": logits_budget,
        "max_live_tokens": max_live_tokens,
        "valid_vocab": valid_vocab,
        "process_group": process_group,
        "vocab_start": vocab_start,
    }
    h = head(where, hidden, weight, targets, **options)
    _not_one_row(where, hidden)
    checks.choice(where, "kind", kind, SFT_KINDS)
    ignore_index = h.ignore_index
    targets = checks_tokens.holding(where, targets, ignore_index)
    like = targets.new_empty(targets.shape, dtype=h.real)
    cu_seqlens = checks_tokens.rows(where, "targets", targets, cu_seqlens)
    live = live_tokens(where, like, mask) & (targets != ignore_index)
    if torch.compiler.is_compiling():
        options["temperature"] = h.temperature_without(~live, temperature)
        logp = linear_token_logprobs(hidden, weight, or_ignored(~live, targets, ignore_index), **options)
        return logprobs_sft_loss(
            logp,
            live,
            kind=kind,
            aggregation=aggregation,
            weights=weights,
            sample_weights=sample_weights,
            cu_seqlens=cu_seqlens,
            normalizers=normalizers,
            return_metrics=return_metrics,
        )
    weights = sft_weights(where, like, live, aggregation, weights, sample_weights, cu_seqlens, normalizers)
    terms = Terms(kind, [], (), h.flat(weights), None, None, None, None)
    loss, logp, _ = chunked_loss.differentiable(h, _by_token(h, terms, False, ops.serving("fused_policy", hidden)))
    return (loss, sft_metrics(logp, terms.weight)) if return_metrics else loss


def _not_one_row(where, hidden):
    if hidden.dim() < 2:
        raise ValueError(
            f"{where}: hidden has shape {tuple(hidden.shape)}, expected [T, H] or [B, L, H]; unsqueeze the one row"
        )


def _by_token(h, terms, with_entropy, backend):
    h = chunked_loss.checked(h, terms.live() & (h.targets != h.ignore_index))
    if h.shard is None:
        return lambda needs: chunked_loss.per_token(h, terms, needs, backend)

    def score(rows, logp, entropy, first, last):
        part = terms.at(rows.index)
        return weighted_sum(part.objective, logp, part.columns, part.params, Share(part.weight)) + _extras(
            part, logp, entropy
        )

    def compute(needs):
        plan = blocks(live_rows(h.targets != h.ignore_index, h.bound), h.chunk)
        return chunked_loss.per_unit(h, plan, score, needs, with_entropy, backend, terms.largest)

    return compute


def _extras(terms, logp, entropy):
    """The KL and the entropy term."""
    total = logp.new_zeros(())
    if terms.kl is not None:
        total = total + weighted_sum(terms.kl, logp, [terms.ref_logp], (), Share(terms.kl_weight))
    if terms.entropy_weight is not None:
        total = total + weighted_sum("nll", entropy, [], (), Share(terms.entropy_weight))
    return total


def _by_sequence(where, h, terms, shape, live, cu_seqlens, level, with_entropy, backend):
    if cu_seqlens is None and len(shape) != 2:
        raise ValueError(
            f"{where}: ratio_level {level!r} needs hidden [B, L, H], or packed [T, H] with cu_seqlens; "
            f"got targets of shape {tuple(shape)}"
        )
    live = live.reshape(-1)
    count = shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    position = torch.arange(live.shape[0], device=live.device)
    unit = position // max(shape[-1], 1) if cu_seqlens is None else segment_ids(cu_seqlens, live.shape[0])
    h = chunked_loss.checked(h, live)
    plan = units(live, unit, count, bound=h.bound, still=terms.still())

    def score(rows, logp, entropy, first, last):
        cu = plan.cu_seqlens(first, last)
        part = terms.at(rows.index)
        every = torch.ones_like(logp, dtype=torch.bool, requires_grad=False) if rows.dead is None else ~rows.dead
        loss = ratio_term(
            where, terms.objective, logp, part.columns, terms.params, Share(part.weight), every, cu, level
        )
        return loss + _extras(part, logp, entropy)

    def largest():
        if level != "sequence_sum" or not count:
            return terms.largest()
        # Of a sum every token has the slope of the whole.
        return sums(terms.weight.view(shape), live.view(shape), cu_seqlens).abs().amax()

    return lambda needs: chunked_loss.per_unit(h, plan, score, needs, with_entropy, backend, largest)
