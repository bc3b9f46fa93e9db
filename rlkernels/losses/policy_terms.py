"""The terms of a policy loss over log-probabilities: the objective, KL, square of the log-ratio, entropy bonus."""

from typing import Any

from torch import Tensor

from rlkernels.losses.kl_penalty import KLPenalty, tokens_of_sequences
from rlkernels.losses.policy_factors import PolicyFactors
from rlkernels.losses.policy_ratio import SQUARE, RatioOptions, ratio_term, with_current
from rlkernels.losses.row_objectives import row_term
from rlkernels.losses.row_options import RowChoice
from rlkernels.losses.token_weights import TokenWeights, full_mask, losses_of_sequences
from rlkernels.losses.weighted_sum import Params, scaled_sum
from rlkernels.objectives import Objective
from rlkernels.sequences import means
from rlkernels.types import Metrics, Number, PerToken, RatioLevel


def policy_terms(
    caller: str,
    entry: Objective,
    logp: Tensor,
    entropy: Tensor | None,
    columns: list[Any],
    params: Params,
    weights: TokenWeights,
    sequences: tuple[Tensor | None, Tensor | None, RatioLevel],
    ratio: RatioOptions,
    rollout_logprobs: PerToken | None,
    choice: RowChoice | None,
    factors: PolicyFactors | None,
    ref_logprobs: PerToken | None,
    penalty: KLPenalty | None,
    coefficients: tuple[Number | None, Number | None],
) -> tuple[Tensor, list[Tensor], Metrics]:
    """Computes the sum of the terms of a policy loss of checked arguments.

    ``sequences``: live tokens, offsets and ratio level. ``coefficients``: of the KL and the entropy term, or None.

    Returns:
        the loss, the columns of its ratio, and the metrics of its factors. A loss that is not summed has a number for
        each token, or for each sequence where the objective has one; the other terms enter that as means over tokens.
    """
    live, cu_seqlens, level = sequences
    kl_coef, entropy_coef = coefficients
    policy = bonus = weights
    engine: Tensor | None = None
    metrics: Metrics = {}
    if ratio.old is None:
        columns = with_current(columns, logp)
    if factors is not None:
        every = full_mask(logp, live)
        columns = factors.columns(caller, columns, every, cu_seqlens)
        policy, bonus, engine, metrics = factors.weights(weights, logp, entropy, columns, every, cu_seqlens)
    if choice is None:
        loss = ratio_term(caller, entry, logp, columns, params, policy, live, cu_seqlens, level, ratio.clamp)
    else:
        loss = row_term(choice, logp, columns, policy, full_mask(logp, live), cu_seqlens, ref_logprobs, engine)
    if ratio.square is None and kl_coef is None and entropy_coef is None:
        return loss, columns, metrics
    of_sequences = losses_of_sequences(weights, level, "token" if choice is None else choice.kind.unit)
    if of_sequences and penalty is not None:
        tokens_of_sequences(caller, penalty, live)
    others: list[Tensor] = []
    if ratio.square is not None:
        others.append(scaled_sum(ratio.square, SQUARE, logp, [rollout_logprobs], weights))
    if kl_coef is not None:
        others.append(penalty.loss(logp, kl_coef))
    if entropy_coef is not None:
        # By the objective "nll", which is minus its column, because it takes one launch and plain torch takes six.
        others.append(scaled_sum(entropy_coef, "nll", entropy, [], bonus))
    for term in others:
        loss = loss + (means(term, full_mask(logp, live), cu_seqlens) if of_sequences else term)
    return loss, columns, metrics
