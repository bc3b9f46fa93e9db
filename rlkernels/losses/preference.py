"""Losses of preference pairs, from the log-probabilities of whole answers."""

from collections.abc import Iterable
from typing import Literal, get_args, overload

import torch
from torch import Tensor

from rlkernels import checks
from rlkernels.logits_layout import dense
from rlkernels.losses.policy_arguments import column
from rlkernels.losses.preference_options import PreferenceOptions, preference_options
from rlkernels.losses.preference_types import Pairs, Term
from rlkernels.losses.token_weights import TokenWeights
from rlkernels.losses.weighted_sum import each, weighted_sum
from rlkernels.tracing import product
from rlkernels.types import FDivergence, LossTypes, LossWeights, Mask, Metrics, Number, PerPair, Reduction, Scalar

REDUCTIONS = get_args(Reduction)


def pair_losses(
    caller: str,
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    options: PreferenceOptions,
) -> Tensor:
    """Computes the loss of each pair times its weight, ``[B]``.

    It is differentiable in ``chosen`` and ``rejected``, the sums of log-probabilities, ``[B]``. Where
    ``options.separable()``, a part of a batch with its ``options.part`` has the numbers that it has in the whole batch.
    """
    checks.pairs(caller, chosen, rejected, ("chosen_logps", "rejected_logps"))
    pairs, total = _pairs(caller, chosen, rejected, ref_chosen, ref_rejected, options), 0.0
    for coefficient, objective, x, params in pairs.terms():
        total = total + coefficient * pairs.scored(objective, x, *params)
    # type: ignore, because mypy cannot know that a mixture has a term.
    return total if options.pair_weights is None else total * options.pair_weights  # type: ignore[return-value]


def gold_losses(options: PreferenceOptions, gold: Tensor) -> Tensor | None:
    """Computes what losses of three answers add for the third one of each pair, times the pair's weight, ``[B]``.

    It is None where no loss of the mixture adds any.
    """
    if options.pairs_per_gold_token is None:
        return None
    weights = sum(w for kind, w in zip(options.kinds, options.loss_weights, strict=True) if kind.gold)
    losses = each("nll", dense(gold, options.pairs_per_gold_token.dtype), (), options.pair_weights)
    losses = losses * (weights * options.tpo_alpha * options.pairs_per_gold_token)
    return losses if options.pair_weights is None else losses * options.pair_weights


def common_dtype(*logps: Tensor | None) -> torch.dtype:
    """Returns the dtype of the arithmetic: float64 where one of the log-probabilities has it, else float32.

    A float64 one is never rounded, because that would lose the digits for which somebody made it float64.
    """
    return torch.float64 if torch.float64 in [getattr(x, "dtype", None) for x in logps] else torch.float32


def per_answer(caller: str, name: str, x: Tensor) -> None:
    """Refuses log-probabilities of tokens, because they would pass for those of as many answers."""
    if x.dim() > 1:
        raise ValueError(
            f"{caller}: {name} has shape {tuple(x.shape)}, expected [B]; sum over tokens first, as sequence_sums does"
        )


def references_there(
    caller: str, ref_chosen: Tensor | None, ref_rejected: Tensor | None, options: PreferenceOptions
) -> dict[str, Tensor | None]:
    """Returns the references by the name of their argument.

    Refuses one without the other, and none where a loss needs them.
    """
    references = {"ref_chosen_logps": ref_chosen, "ref_rejected_logps": ref_rejected}
    missing = [name for name, x in references.items() if x is None]
    if missing and options.needs_reference():
        raise ValueError(f"{caller}: {missing[0]} is missing; pass it, or reference_free=True")
    if len(missing) == 1:
        raise ValueError(f"{caller}: {missing[0]} is missing; pass both references, or none of them")
    return references


def _pairs(
    caller: str,
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    options: PreferenceOptions,
) -> Pairs:
    """Returns the pairs in the form in which they enter the loss; a reference is None where no loss looks at it."""
    real = common_dtype(chosen, rejected, ref_chosen, ref_rejected)
    for name, x in references_there(caller, ref_chosen, ref_rejected, options).items():
        if x is not None:
            column(caller, name, x, chosen, "chosen_logps")
    both = (None if x is None else dense(x, real) for x in (chosen, rejected, ref_chosen, ref_rejected))
    return Pairs(*both, options)  # type: ignore[call-arg]  # four of them


@overload
def dpo_loss(
    chosen_logps: PerPair,
    rejected_logps: PerPair,
    ref_chosen_logps: PerPair | None = None,
    ref_rejected_logps: PerPair | None = None,
    *,
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
    return_metrics: Literal[False] = False,
    **params: Number,
) -> Scalar: ...


@overload
def dpo_loss(
    chosen_logps: PerPair,
    rejected_logps: PerPair,
    ref_chosen_logps: PerPair | None = None,
    ref_rejected_logps: PerPair | None = None,
    *,
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
    return_metrics: Literal[True],
    **params: Number,
) -> tuple[Scalar, Metrics]: ...


@overload
def dpo_loss(
    chosen_logps: PerPair,
    rejected_logps: PerPair,
    ref_chosen_logps: PerPair | None = None,
    ref_rejected_logps: PerPair | None = None,
    *,
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
    return_metrics: bool,
    **params: Number,
) -> Scalar | tuple[Scalar, Metrics]: ...


def dpo_loss(
    chosen_logps: PerPair,
    rejected_logps: PerPair,
    ref_chosen_logps: PerPair | None = None,
    ref_rejected_logps: PerPair | None = None,
    *,
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
    return_metrics: bool = False,
    **params: Number,
) -> Scalar | tuple[Scalar, Metrics]:
    r"""Computes direct preference optimisation and its relatives, from the summed log-probabilities of pairs: one
    launch a term.

    ``mean_i w_i sum_k c_k l_k(pair_i)``. With ``rho = logp - ref``, ``S = f(rho)``, ``D = S_c - S_r``, ``b = beta``,
    ``e = label_smoothing``, ``n`` the lengths, ``s`` the logistic function:

    - ``"sigmoid"``: ``-(1-e) log s(b D) - e log s(-b D)``; Rafailov et al. 2023, arXiv:2305.18290 (DPO).
    - ``"sigmoid_norm"``: ``"sigmoid"`` of ``S_c/n_c - S_r/n_r``; Lambert et al. 2024, arXiv:2411.15124.
    - ``"robust"``: ``(-(1-e) log s(b D) + e log s(-b D)) / (1-2e)``; Chowdhury et al. 2024, arXiv:2403.00409.
    - ``"hinge"``: ``max(0, 1 - b D)``; Zhao et al. 2023, arXiv:2305.10425 (SLiC); arXiv:2309.06657 (RSO).
    - ``"ipo"``: ``(D - 1/(2b))^2``; Azar et al. 2023, arXiv:2310.12036.
    - ``"ipo_norm"``: ``"ipo"`` of ``S_c/n_c - S_r/n_r``; arXiv:2310.12036, averaged as in TRL.
    - ``"exo_pair"``: ``KL((s(b D), s(-b D)) || (1-e, e))``, ``e > 0``; Ji et al. 2024, arXiv:2402.00856.
    - ``"discopop"``: ``-log s(x) (1-u) + e^-x u``, ``x = b D``, ``u = s(x/tau)``; Lu et al. 2024, arXiv:2406.08414.
    - ``"nca_pair"``: ``-log s(b rho_c) - log s(-b rho_c)/2 - log s(-b rho_r)/2``; Chen et al. 2024, arXiv:2402.05369.
    - ``"bco_pair"``: ``-log s(b rho_c) - log s(-b rho_r)``; Jung et al. 2024, arXiv:2404.04656, without ``delta``.
    - ``"sppo_hard"``: ``(rho_c - 1/(2b))^2 + (rho_r + 1/(2b))^2``; Wu et al. 2024, arXiv:2405.00675.
    - ``"apo_zero"``: ``1 - s(b rho_c) + s(b rho_r)``; D'Oosterlinck et al. 2024, arXiv:2408.06266.
    - ``"apo_down"``: ``s(b rho_c) + 1 - s(b (rho_c - rho_r))``; arXiv:2408.06266.
    - ``"aot"``: ``"sigmoid"`` of sorted ``logp_c - logp_r`` less sorted ``ref_c - ref_r``; Melnyk et al. 2024,
      arXiv:2406.05882.
    - ``"aot_unpaired"``: ``"sigmoid"`` of sorted ``rho_c`` less sorted ``rho_r``; arXiv:2406.05882.
    - ``"dpop"``: ``"sigmoid"`` of ``rho_c - rho_r - dpop_lambda max(0, -rho_c)``; Pal et al. 2024, arXiv:2402.13228.
    - ``"rpo"``: ``KL((t, 1-t) || (s(b D), s(-b D)))``, ``t = s(rpo_eta (reward_c - reward_r))``; Adler et al. 2024,
      arXiv:2406.11704.
    - ``"sft"``: ``-log pi`` of the chosen answers, mean over all their tokens.

    Without a reference, of ``D = logp_c - logp_r``:

    - ``"cpo"``: ``"sigmoid"`` of ``D``, plus ``cpo_alpha`` times ``"sft"``; Xu et al. 2024, arXiv:2401.08417.
    - ``"cpo_hinge"``: ``"hinge"`` of ``D``, plus ``cpo_alpha`` times ``"sft"``; TRL.
    - ``"cpo_ipo"``: ``"ipo"`` of ``D``, plus ``cpo_alpha`` times ``"sft"``; TRL.
    - ``"simpo"``: ``"sigmoid"`` of ``logp_c/n_c - logp_r/n_r - simpo_gamma/b``, plus ``cpo_alpha`` times ``"sft"``;
      Meng et al. 2024, arXiv:2405.14734.
    - ``"orpo_odds_ratio"``: ``-b log s(log odds_c - log odds_r)``, ``odds = p/(1-p)``, ``log p = logp/n``; Hong et al.
      2024, arXiv:2403.07691.
    - ``"orpo"``: ``"orpo_odds_ratio"`` plus ``-logp_c/n_c``, a mean over pairs; arXiv:2403.07691. ``("orpo_odds_ratio",
      "sft")`` adds a mean over tokens instead.
    - ``"tpo"``: ``"sigmoid"`` of ``D``, plus ``tpo_alpha`` times ``-log pi`` of third answers, the gold ones, mean over
      all their tokens; Saeidi et al. 2024, arXiv:2405.16681.
    - ``"tpo_hinge"``: ``"hinge"`` of ``D``, plus the likelihood of the gold answers as in ``"tpo"``; TRL.
    - ``"tpo_ipo"``: ``"ipo"`` of ``D``, plus the likelihood of the gold answers as in ``"tpo"``; TRL.
    - ``"tpo_l"``: ``"simpo"`` with the likelihood of the gold answers in place of the chosen ones; arXiv:2405.16681.

    Args:
        chosen_logps, rejected_logps: sums of log-probabilities of the answers under the policy, ``[B]``; both get a
            gradient.
        ref_chosen_logps, ref_rejected_logps: the same under the reference. May be left out where the loss does not look
            at them; given there, they enter the metrics alone.
        beta: strength of the tie to the reference, or inverse temperature; a number, or one per pair, ``[B]``. At 0 a
            loss is a constant; one that divides by it wants more. It, and every other number here, may be a tensor of
            shape ``()``, as for ``policy_loss``.
        loss_type, loss_weights: a name, or a tuple of names with a weight ``c`` each (1). An objective of your own with
            the one column ``margin``, which is ``D``, is a loss type, too: its function, or its name.
        params: parameters of your own objectives, with the defaults of their signatures; ``beta`` and
            ``label_smoothing`` are the options.
        label_smoothing: ``e``, the assumed share of flipped labels, in ``[0, 1]``; not 0 or 1 with ``"exo_pair"``, not
            0.5 with ``"robust"``.
        reference_free: the reference counts as 0 in the loss, not in the metrics.
        f_divergence, alpha: ``f``: ``"reverse_kl"`` ``rho``; ``"forward_kl"`` ``1 - e^-rho``; ``"js_divergence"`` ``log
            2 + log s(rho)``; ``"alpha_divergence"`` ``(e^((alpha-1) rho) - 1)/(alpha-1)``, ``alpha`` 0.5 unless given.
            Exponents are capped at 80.
        length_normalized: ``S/n``, ``rho/n`` and ``logp/n`` instead of ``S``, ``rho`` and ``logp`` (TRL's IPO).
        simpo_gamma, discopop_tau, cpo_alpha: see above; 0.5, 0.05, and 1 (0 with ``"simpo"``) unless given.
        alphapo_alpha: ``a``, not 0: ``(1 - e^(-a logp))/a`` in place of ``logp`` in the losses without a reference.
        chosen_lengths, rejected_lengths: ``n``, tokens per answer, ``[B]``; looked at where something is averaged. The
            average of an answer of no tokens is its sum, 0; a pair with one has odds of 1, so that ORPO's term is ``b
            log 2`` and moves nothing.
        pair_weights: ``w``, ``[B]``, without gradient (``wpo_weights``); a pair of weight 0 is left out, whatever it
            holds.
        dpop_lambda, rpo_eta, tpo_alpha: see above; 50, 1 and 1 unless given.
        chosen_rewards, rejected_rewards: of ``"rpo"``, ``[B]``, without gradient.
        gold_logps, gold_lengths: of the third answers, ``[B]``; the sums get a gradient.
        num_pairs: pairs of the whole batch, by which a mean divides where only a part is here.
        num_chosen_tokens, num_gold_tokens: the tokens of its chosen and gold answers, where a likelihood is a mean over
            these.
        reduction: ``"mean"``; ``"sum"``: without the division; ``"none"``: the loss of each pair, ``[B]``.

    Returns:
        Scalar, fp32 (fp64 where any of the log-probabilities is). No pair gives 0. With ``return_metrics``, ``(loss,
        dict)`` with means over the pairs of a weight that is not 0: ``reward_chosen`` and ``reward_rejected``, the
        implicit rewards ``beta (logp - ref)`` (of averages per token where every loss is of those and none has a
        reference); ``reward_margin``, their difference; ``accuracy``, the share of larger chosen rewards;
        ``logps_chosen`` and ``logps_rejected``; and ``log_odds_ratio`` with ORPO. With ``reduction="none"`` all of it
        per pair, ``[B]``.

    Raises:
        ValueError: an option out of range, unknown, or not looked at by the loss; unequal numbers of pairs; a reference
            or lengths missing; log-probabilities of tokens, ``[B, L]``; on a CPU lengths below 0.
        TypeError: a parameter that no loss of the mixture takes, or one that an objective of your own needs.

    Example:
        >>> chosen, rejected = torch.tensor([-10.0, -12.0]), torch.tensor([-11.0, -11.0])
        >>> reference = torch.tensor([-11.0, -11.0])
        >>> round(dpo_loss(chosen, rejected, reference, reference, beta=1.0).item(), 4)
        0.8133

    Papers stand beside their losses; label smoothing: Mitchell 2023; AlphaPO: arXiv:2501.03884; f-divergences: Wang et
    al. 2023, arXiv:2309.16240; WPO: Zhou et al. 2024, arXiv:2406.11827.
    """
    caller = "dpo_loss"
    checks.flags(caller, return_metrics=return_metrics)
    checks.pairs(caller, chosen_logps, rejected_logps, ("chosen_logps", "rejected_logps"))
    per_answer(caller, "chosen_logps", chosen_logps)
    checks.no_forward_ad(caller, chosen_logps, rejected_logps)
    like = chosen_logps.detach().to(common_dtype(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps))
    options = preference_options(
        caller,
        like,
        beta=beta,
        loss_type=loss_type,
        loss_weights=loss_weights,
        label_smoothing=label_smoothing,
        reference_free=reference_free,
        f_divergence=f_divergence,
        alpha=alpha,
        length_normalized=length_normalized,
        simpo_gamma=simpo_gamma,
        alphapo_alpha=alphapo_alpha,
        discopop_tau=discopop_tau,
        cpo_alpha=cpo_alpha,
        chosen_lengths=chosen_lengths,
        rejected_lengths=rejected_lengths,
        pair_weights=pair_weights,
        dpop_lambda=dpop_lambda,
        chosen_rewards=chosen_rewards,
        rejected_rewards=rejected_rewards,
        rpo_eta=rpo_eta,
        gold_logps=gold_logps,
        gold_lengths=gold_lengths,
        tpo_alpha=tpo_alpha,
        num_pairs=num_pairs,
        num_chosen_tokens=num_chosen_tokens,
        num_gold_tokens=num_gold_tokens,
        **params,
    )
    checks.choice(caller, "reduction", reduction, REDUCTIONS)
    if reduction != "mean" and num_pairs is not None:
        raise ValueError(f"{caller}: num_pairs divides a mean; reduction {reduction!r} takes none")
    if reduction == "none" and not options.separable():
        raise ValueError(
            f"{caller}: a loss_type that sorts the batch has no loss per pair; reduction must not be 'none'"
        )
    if gold_logps is not None:
        checks.no_forward_ad(caller, gold_logps)
    pairs = _pairs(caller, chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, options)
    gold = None if gold_logps is None else gold_losses(options, gold_logps)
    if reduction == "none":
        loss = pair_losses(caller, chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, options)
        loss = loss if gold is None else loss + gold
    else:
        share = 1.0 if reduction == "sum" else 1.0 / options.num_pairs
        loss = weighted_terms(pairs.terms(), options.pair_weights, share)
        loss = loss if gold is None else loss + gold.sum() * share
    if not return_metrics:
        return loss
    return loss, _metrics(pairs, ref_chosen_logps, ref_rejected_logps, reduction == "none")


def weighted_terms(terms: Iterable[Term], weights: Tensor | None, share: Number) -> Tensor:
    """Sums ``share * weight * coefficient * objective`` over rows and terms; one launch per term."""
    total = None
    for coefficient, objective, x, params in terms:
        weight = weights
        if isinstance(coefficient, torch.Tensor) or isinstance(share, torch.Tensor):
            factor = coefficient * share
            weight, factor = (
                torch.zeros_like(x, requires_grad=False) + factor if weights is None else weights * factor,
                1.0,
            )
        else:
            factor = product(coefficient, share)
        loss = weighted_sum(objective, x, [], params, TokenWeights(weight, None, factor))
        total = loss if total is None else total + loss
    return total


def length_desensitized_weights(chosen_mask: Mask, rejected_mask: Mask, ld_alpha: Number) -> tuple[Tensor, Tensor]:
    r"""Weighs tokens so that DPO does not reward length.

    ``w_t = 1`` for the first ``min(n_c, n_r)`` live tokens of an answer, the length of the pair's shorter one, and
    ``w_t = ld_alpha`` beyond.

    Args:
        chosen_mask, rejected_mask: live tokens of the answers, ``[B, L]`` and ``[B, L']``, any pattern; live tokens
            alone are counted.
        ld_alpha: in ``[0, 1]``; 1 changes nothing.

    Returns:
        Two tensors shaped like the masks, fp32, 0 on dead tokens. ``sequence_sums(weights * logprobs, mask)`` goes into
        ``dpo_loss``, for the policy and the reference alike.

    Raises:
        ValueError: masks of unequal numbers of pairs, ``ld_alpha`` out of range.

    Example:
        >>> length_desensitized_weights(torch.ones(1, 3), torch.tensor([[0, 1, 1]]), 0.5)
        (tensor([[1.0000, 1.0000, 0.5000]]), tensor([[0., 1., 1.]]))

    Liu et al. 2024, arXiv:2409.06411.
    """
    caller, masks = "length_desensitized_weights", {"chosen_mask": chosen_mask, "rejected_mask": rejected_mask}
    ld_alpha = checks.interval(caller, "ld_alpha", ld_alpha, 0, 1)
    for name, x in masks.items():
        checks.tensor(caller, name, x)
        if x.dim() != 2:
            raise ValueError(f"{caller}: {name} has shape {tuple(x.shape)}, expected [B, L]: one row per answer")
        checks.mask(caller, x, (chosen_mask.shape[0], x.shape[-1]), name)
    checks.one_device(caller, "chosen_mask", chosen_mask, rejected_mask=rejected_mask)
    live = [x != 0 for x in masks.values()]
    shared = torch.minimum(*(x.sum(-1, keepdim=True) for x in live))
    zeros = [x.new_zeros(x.shape, dtype=torch.float32) for x in live]
    return tuple(  # type: ignore[return-value]  # two of them
        torch.where(x, torch.where(x.cumsum(-1) <= shared, zero + 1.0, zero + ld_alpha), zero)
        for x, zero in zip(live, zeros, strict=True)
    )


@torch.no_grad()
def _metrics(pairs: Pairs, ref_chosen: Tensor | None, ref_rejected: Tensor | None, per_pair: bool) -> Metrics:
    """Computes means over the pairs whose weight is not 0; or the numbers of each pair, 0 where its weight is."""
    options = pairs.options
    live = (
        torch.ones_like(pairs.policy[0], dtype=torch.bool)
        if options.pair_weights is None
        else options.pair_weights != 0
    )
    count = live.sum().clamp(min=1)

    def mean(x: Tensor) -> Tensor:
        x = torch.where(live, x.detach(), 0.0)
        return x if per_pair else x.sum() / count

    scores = pairs.policy
    if ref_chosen is not None:
        scores = pairs.policy[0] - ref_chosen, pairs.policy[1] - ref_rejected
    elif not any(kind.reference for kind in options.kinds) and all(kind.averages for kind in options.kinds):
        scores = pairs.policy_scores(True)
    chosen, rejected = (options.beta * x.detach() for x in scores)
    metrics = {
        "reward_chosen": mean(chosen),
        "reward_rejected": mean(rejected),
        "reward_margin": mean(chosen - rejected),
        "accuracy": mean((chosen > rejected).to(chosen.dtype)),
        "logps_chosen": mean(pairs.policy[0]),
        "logps_rejected": mean(pairs.policy[1]),
    }
    if any(name.startswith("orpo") for name in options.names):
        metrics["log_odds_ratio"] = mean(pairs.odds())
    return metrics
