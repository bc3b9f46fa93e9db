"""The weight of each token in a loss: its mask and its aggregation as one tensor."""

from typing import NamedTuple, get_args

import torch
from torch import Tensor

from rlkernels import checks
from rlkernels.aggregation import token_mean, weights_for
from rlkernels.backends.protocol import real_dtype
from rlkernels.checks import tokens as checks_tokens
from rlkernels.losses.policy_arguments import column
from rlkernels.tracing import product, replaced
from rlkernels.types import Aggregation, Mask, Normalizers, Number, PerToken, PolicyReduction, RatioLevel

REDUCTIONS = get_args(PolicyReduction)


class TokenWeights(NamedTuple):
    """The weight of each token in a loss: ``values * scale / count``.

    ``values``: a float tensor, a bool mask (1 or 0), or None for 1 everywhere. ``count``: a tensor, or None for 1.
    ``each``: nothing is summed; ``values`` say which tokens have a loss, and there is no count.
    """

    values: Tensor | None
    count: Tensor | None = None
    scale: Number = 1.0
    each: bool = False

    def scaled(self, factor: Number) -> "TokenWeights":
        """Returns the same weights times a number."""
        return replaced(self, scale=product(self.scale, factor))

    def dense(self, live: Tensor, real: torch.dtype) -> Tensor:
        """Returns the weights as one tensor of the dtype ``real``, 0 where a token is not ``live``."""
        weight = torch.ones_like(live, dtype=real) if self.values is None else self.values.to(real)
        if self.count is not None:
            weight = weight / self.count.clamp(min=1)
        return torch.where(live, weight * self.scale, 0.0)

    def times(self, factor: Tensor) -> "TokenWeights":
        """Returns the same weights times a factor of each token, which is 0 at dead tokens."""
        if self.values is None:
            return replaced(self, values=factor)
        values = factor if self.values.dtype == torch.bool else self.values * factor
        return replaced(self, values=torch.where(self.values != 0, values, 0.0))


def live_tokens(caller: str, like: Tensor, mask: Mask | None) -> Tensor:
    """Checks a mask and returns it as bool, shaped like ``like``; without one every token is live."""
    return full_mask(like, live_mask(caller, like, mask))


def full_mask(like: Tensor, live: Tensor | None) -> Tensor:
    """Returns the mask ``live`` of ``live_mask``, or a mask of all tokens where that is None."""
    return (
        torch.ones_like(like, dtype=torch.bool, requires_grad=False, memory_format=torch.contiguous_format)
        if live is None
        else live
    )


def live_mask(caller: str, like: Tensor, mask: Mask | None) -> Tensor | None:
    """Checks a mask and returns it as bool; None without a mask, where every token is live."""
    if checks.fits(mask, like, torch.bool):
        return mask.contiguous()
    checks.mask(caller, mask, like.shape)
    checks.one_device(caller, "logprobs", like, mask=mask)
    # Contiguous, because torch's sums follow strides, and a metric would have other last bits.
    return mask if mask is None else mask.contiguous() if mask.dtype == torch.bool else (mask != 0).contiguous()


def summed(caller: str, reduction: PolicyReduction) -> bool:
    """Checks a reduction and tells whether the loss is a sum of its elements."""
    if type(reduction) is str and reduction == "aggregation":
        return True
    checks.choice(caller, "reduction", reduction, REDUCTIONS)
    return False


def _is_plain(aggregation: Aggregation, weights: PerToken | None, normalizers: Normalizers | None) -> bool:
    """Tells whether neither weights nor an aggregation nor normalisers were asked for.

    What is of another type was, so that its own check finds it.
    """
    return (
        weights is None
        and type(aggregation) is str
        and aggregation == "token-mean"
        and (normalizers is None or type(normalizers) is dict and not normalizers)
    )


def _is_token_mean(
    aggregation: Aggregation, weights: PerToken | None, cu_seqlens: Tensor | None, normalizers: Normalizers | None
) -> bool:
    """Tells whether the weights are those of a plain mean over the live tokens."""
    return cu_seqlens is None and _is_plain(aggregation, weights, normalizers)


def aggregation_of_sequences(aggregation: Aggregation, weights: PerToken | None) -> Aggregation:
    """Returns the aggregation of one loss per sequence: ``"token-mean"`` becomes the mean over sequences."""
    return "seq-mean" if _is_plain(aggregation, weights, None) else aggregation


def losses_of_tokens(
    caller: str,
    live: Tensor | None,
    aggregation: Aggregation,
    weights: PerToken | None,
    normalizers: Normalizers | None,
) -> TokenWeights:
    """Returns the TokenWeights of a loss that is not summed; refuses what would weigh its tokens."""
    if not _is_plain(aggregation, weights, checks_tokens.keywords(caller, normalizers)):
        raise ValueError(f"{caller}: reduction='none' weighs no token; leave out aggregation, weights and normalizers")
    return TokenWeights(live, each=True)


def counted_tokens(live: Tensor, weights: Tensor | None) -> Tensor:
    """Returns the tokens of the metrics: live ones, but for those of weight 0, whose rows need not be read.

    ``weights``: those of a loss, before factors. A factor of 0, such as a correction's, takes no token out, because
    trainers average over the mask of the loss. A mask as weights takes out what is dead anyway.
    """
    return live if weights is None or weights.dtype == torch.bool else live & (weights != 0)


def losses_of_sequences(weights: TokenWeights, ratio_level: RatioLevel, unit: str) -> bool:
    """Tells whether a loss that is not summed has one number per sequence; ``unit``: that of its objective."""
    return weights.each and (ratio_level == "sequence_sum" or unit != "token")


def aggregation_of_units(
    caller: str,
    unit: str,
    groups: Tensor | None,
    aggregation: Aggregation,
    weights: PerToken | None,
    normalizers: Normalizers | None,
) -> tuple[Aggregation, Normalizers | None]:
    """Returns aggregation and normalisers of one loss per ``unit``: a token, a sequence, or a group of ``groups``.

    ``"token-mean"`` becomes the mean over units.
    """
    if unit == "sequence":
        return aggregation_of_sequences(aggregation, weights), normalizers
    if unit != "group" or weights is not None:
        return aggregation, normalizers
    aggregation = "group-mean" if aggregation == "token-mean" else aggregation
    if aggregation not in ("group-mean", "prompt-mean"):
        return aggregation, normalizers
    given = checks_tokens.keywords(caller, normalizers)
    if "group_ids" in given:
        raise ValueError(f"{caller}: the objective already has the groups; normalizers takes no group_ids here")
    return aggregation, {**given, "group_ids": groups}


def loss_weights(
    caller: str,
    like: Tensor,
    live: Tensor,
    aggregation: Aggregation,
    weights: PerToken | None,
    cu_seqlens: Tensor | None,
    normalizers: Normalizers | None,
) -> Tensor:
    """Returns the weight of each token, 0 for a dead one.

    All terms of a loss (objective, KL, entropy) have the same weights, because each must be the same whether a batch
    comes whole or in micro-batches. ``cu_seqlens``: offsets that ``checks.tokens.rows`` has checked, or None.
    """
    checks.one_device(caller, "logprobs", like, weights=weights)
    real = real_dtype(like.dtype)
    if weights is not None:
        if not _is_plain(aggregation, None, checks_tokens.keywords(caller, normalizers)):
            raise ValueError(
                f"{caller}: weights and aggregation={aggregation!r} both decide the weights; pass one of them"
            )
        column(caller, "weights", weights, like)
        return checks_tokens.tied(torch.where(live, weights.to(real), 0.0), cu_seqlens)
    if _is_token_mean(aggregation, weights, cu_seqlens, normalizers):
        return token_mean(caller, live, real)
    weights = weights_for(
        caller, live, aggregation, cu_seqlens=cu_seqlens, dtype=real, **checks_tokens.keywords(caller, normalizers)
    )
    checks.no_forward_ad(caller, weights)  # because a normaliser may carry a tangent
    return weights


def token_weights_of(
    caller: str,
    like: Tensor,
    live: Tensor | None,
    aggregation: Aggregation,
    weights: PerToken | None,
    cu_seqlens: Tensor | None,
    normalizers: Normalizers | None,
) -> TokenWeights:
    """Returns the weights of a loss as ``TokenWeights``; ``live``: the mask of ``some_tokens``, or None.

    Those of a plain mean are the mask and its count, because the launch of the loss can divide by the count.
    """
    if _is_token_mean(aggregation, weights, cu_seqlens, normalizers):
        checks_tokens.rows(caller, "mask", like, None)
        return TokenWeights(None, None, 1.0 / max(like.numel(), 1)) if live is None else TokenWeights(live, live.sum())
    return TokenWeights(
        loss_weights(caller, like, full_mask(like, live), aggregation, weights, cu_seqlens, normalizers)
    )
