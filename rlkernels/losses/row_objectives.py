"""Policy objectives whose loss of a token depends on its sequence, its group or the batch.

Each one is an objective of the language on reduced inputs, or on inputs and weights with a detached factor. What a
trainer calls an objective of sequences adds no formula of a gradient here.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlkernels.advantages.gae import discounted_returns
from rlkernels.losses.row_options import RowChoice
from rlkernels.losses.token_weights import TokenWeights
from rlkernels.losses.weighted_sum import Params, weighted_sum
from rlkernels.rollout.log_ratios import clamped
from rlkernels.sequences import groups_of, means, spread, sums
from rlkernels.types import Number

UNCLIPPED = (math.inf, math.inf)
"""The bounds with which PPO's objective is ``-rho A``."""
FARTHEST, NEAREST = 20.0, math.log(1e-8)
"""The limits of VESPO's log-ratios, as in TRL."""
SAFE = (0.8, 1.0)
"""The factors of FIPO for bad tokens whose ratio is beyond the threshold, as in ms-swift."""


class RowInputs(NamedTuple):
    """The inputs of such an objective in float64, so that a small difference of large numbers keeps its digits.

    ``weights``: of tokens, 0 at dead ones. ``groups``: ids of sequences. ``engine``: weights of the rollout mismatch
    that the objective takes into its own ratio. The last three are None where an objective has none.
    """

    logp: Tensor
    columns: list[Tensor]  # old log-probabilities and advantages
    weights: Tensor
    live: Tensor
    cu_seqlens: Tensor | None
    options: dict[str, Any]
    groups: Tensor | None
    reference: Tensor | None
    engine: Tensor | None
    each: bool = False  # nothing is summed over tokens, sequences or groups

    def gap(self) -> Tensor:
        """Returns the log-ratio, differentiable, 0 at dead tokens."""
        return torch.where(self.live, self.logp - self.columns[0], 0.0)

    def advantage(self) -> Tensor:
        """Returns the advantages, 0 at dead tokens."""
        return torch.where(self.live, self.columns[1], 0.0)

    def sums(self, x: Tensor) -> Tensor:
        """Sums each sequence over its live tokens."""
        return sums(x, self.live, self.cu_seqlens)

    def means(self, x: Tensor) -> Tensor:
        """Averages each sequence over its live tokens."""
        return means(x, self.live, self.cu_seqlens)

    def spread(self, x: Tensor) -> Tensor:
        """Gives each live token the number of its sequence."""
        return spread(x, self.live, self.cu_seqlens)

    def clipped_sum(self, advantage: Tensor, weights: Tensor, bounds: Params) -> Tensor:
        """Computes the weighted sum of PPO's objective."""
        return weighted_sum("ppo_clip", self.logp, [self.columns[0], advantage], bounds, self.of_tokens(weights))

    def of_tokens(self, weights: Tensor) -> TokenWeights:
        """Returns the weights of one loss per token."""
        return TokenWeights(weights, each=self.each)

    def of_sequences(self) -> TokenWeights:
        """Returns the weights of one loss per sequence: what its tokens weigh together.

        Where nothing is summed that is the mean factor of its tokens, and 0 for a sequence without one.
        """
        return TokenWeights((self.means if self.each else self.sums)(self.weights), each=self.each)

    def covariance(self) -> Tensor:
        """Computes ``(A - mean A) (log pi - mean log pi)`` of each live token, detached; dead ones get -inf."""
        count = self.live.sum().clamp(min=1)

        def centred(x: Tensor) -> Tensor:
            return x - torch.where(self.live, x, 0.0).sum() / count

        covariance = centred(self.advantage()) * centred(torch.where(self.live, self.logp.detach(), 0.0))
        return torch.where(self.live, covariance, -torch.inf)

    def largest(self, keys: Tensor, ratio: Number) -> Tensor:
        """Tells which elements are among the ``max(1, floor(ratio n))`` largest, ``n`` live tokens; -inf is none."""
        count = torch.clamp(torch.floor(self.live.sum().double() * ratio), min=1.0)
        order = torch.sort(keys.reshape(-1), descending=True, stable=True).indices
        place = torch.arange(order.shape[0], device=keys.device)
        chosen = torch.zeros_like(order, dtype=torch.bool).scatter(0, order, place < count)
        return chosen.view(keys.shape) & (keys > -torch.inf)


def _gmpo(x: RowInputs) -> Tensor:
    r"""GMPO: one loss per sequence, ``-A exp(mean_t e_t)``, the geometric mean of clipped ratios.

    ``e = min(d, clip(d))`` where ``A > 0``, ``max(d, clip(d))`` where ``A < 0``, else 0, with the bounds of a
    log-ratio. ``A`` of the token decides; that of the loss is its mean. 2025, arXiv:2507.20673; TRL, verl.
    """
    gap, low, high = x.gap(), x.options["clip_low"], x.options["clip_high"]
    of_token = x.advantage()
    advantage = x.means(of_token)
    # Where the bound bites the gradient is 0, because where hands none to the side that it leaves out.
    held = torch.where(of_token < 0, clamped(gap, -low, None), 0.0)
    held = torch.where(of_token > 0, clamped(gap, None, high), held)
    columns = [torch.zeros_like(advantage), advantage]
    return weighted_sum("ppo_clip", x.means(held), columns, UNCLIPPED, x.of_sequences())


def _vespo(x: RowInputs) -> Tensor:
    r"""VESPO: ``-phi A log pi``, ``phi = exp(lambda + k w - lambda e^w)``, ``w`` the log-ratio of the sequence.

    ``w`` is the sum of clipped log-ratios, and of those of trainer and engine where a correction is given. 2026,
    arXiv:2602.10693; TRL.
    """
    advantage, options = x.advantage(), x.options
    log_weight = x.sums(clamped(x.gap().detach(), -FARTHEST, FARTHEST))
    if x.engine is not None:
        log_weight = log_weight + x.sums(clamped(x.engine.double().log(), NEAREST, FARTHEST))
    log_weight = x.spread(clamped(log_weight, NEAREST, FARTHEST))
    power, scale = (
        torch.where(
            advantage >= 0, _filled(options[f"{name}_pos"], advantage), _filled(options[f"{name}_neg"], advantage)
        )
        for name in ("k", "lambda")
    )
    factor = (scale + power * log_weight - scale * log_weight.exp()).exp()
    return weighted_sum("reinforce", x.logp, [factor * advantage], (), x.of_tokens(x.weights))


def _filled(number: Number, like: Tensor) -> Tensor:
    """Returns a number as a tensor of the dtype of ``like``."""
    return like.new_zeros(()) + number


def influence(x: RowInputs) -> Tensor:
    """Computes FIPO's factor of each token: its influence on the log-ratios behind it, detached."""
    options, gap, advantage = x.options, x.gap().detach(), x.advantage()
    ratio, cap = gap.exp(), options["ratio_cap"]
    summands = gap if cap is None else torch.where(ratio > cap, 0.0, gap)
    # A step for every position: a dead token between live ones moves them apart, as in ms-swift.
    future = discounted_returns(
        summands, x.live, gamma=2.0 ** (-1.0 / options["half_life"]), masked="zero", cu_seqlens=x.cu_seqlens
    )
    reach = options["influence_clip"]
    factor = clamped(future.exp(), 1.0 if options["influence_high_only"] else 1.0 - reach, 1.0 + reach)
    risky = (advantage < 0) & (ratio > options["safety_threshold"])
    return torch.where(risky, clamped(factor, *SAFE), factor)


def _fipo(x: RowInputs) -> Tensor:
    r"""FIPO: PPO's clipped loss times ``f_t = exp(sum_{s>=t} g^{s-t} d_s)``, ``g = 2^{-1/half_life}``, clipped.

    A factor is positive, so that the advantage takes it. 2026, arXiv:2603.19835; ms-swift.
    """
    return x.clipped_sum(x.advantage() * influence(x), x.weights, (x.options["clip_low"], x.options["clip_high"]))


def _real(x: RowInputs) -> Tensor:
    r"""REAL: per group ``log(1 + sum_{A<=0} e^s) + log(1 + sum_{A>0} e^{-s})``, ``s = mean_t d / tau``.

    A group of one sign has no loss, and a mean counts it. With ``reduction="none"`` each sequence has the loss of its
    group. 2026, arXiv:2602.05630; ms-swift.
    """
    score, advantage = x.means(x.gap()) / x.options["tau"], x.means(x.advantage())
    filled, group = x.sums(x.live.double()) > 0, groups_of(x.groups)
    total: Tensor | float = 0.0
    both: Tensor | bool = True
    for chosen, exponent in ((filled & (advantage <= 0), score), (filled & (advantage > 0), -score)):
        # The largest exponent, and 0 for the 1, is taken out, so that no exponential overflows.
        top = group.reduce(torch.where(chosen, exponent.detach(), 0.0), "max")
        rest = torch.where(chosen, (exponent - top[group.index]).exp(), 0.0)
        total = total + top + (torch.exp(-top) + group.reduce(rest)).log()
        both = (group.reduce(chosen.double()) > 0) & both
    total = torch.where(both, total, 0.0)
    return x.means(x.weights) * total[group.index] if x.each else (group.reduce(x.sums(x.weights)) * total).sum()


def _kl_cov(x: RowInputs) -> Tensor:
    r"""KL-Cov: ``-rho A``, and ``kl_cov_coef |d|`` more on the tokens of the largest covariance.

    They are the ``max(1, floor(kl_cov_ratio n))`` live tokens with the largest ``(A - mean A)(log pi - mean log pi)``.
    Cui et al. 2025, arXiv:2505.22617; verl.
    """
    gap, chosen = x.gap(), x.largest(x.covariance(), x.options["kl_cov_ratio"])
    loss = x.clipped_sum(x.advantage(), x.weights, UNCLIPPED)
    # |d| is d times its own sign, by the objective that is minus its column times an advantage.
    factor = torch.where(chosen, x.weights, 0.0) * x.options["kl_cov_coef"]
    return loss + weighted_sum("reinforce", gap, [-gap.detach().sign()], (), x.of_tokens(factor))


def drawn_tokens(x: RowInputs) -> Tensor:
    """Draws the tokens without loss of Clip-Cov; bool."""
    options, advantage = x.options, x.advantage()
    covariance, ratio = x.covariance(), x.gap().detach().exp()
    held = clamped(ratio, 1.0 - options["clip_low"], 1.0 + options["clip_high"])
    candidates = (covariance > options["clip_cov_low"]) & (covariance < options["clip_cov_high"])
    candidates = candidates & ~(held * advantage < ratio * advantage)
    lots = torch.rand(ratio.shape, generator=options["generator"], device=ratio.device, dtype=ratio.dtype)
    return x.largest(torch.where(candidates, lots, -torch.inf), options["clip_cov_ratio"])


def _clip_cov(x: RowInputs) -> Tensor:
    r"""Clip-Cov: PPO's clipped loss, and none on some tokens of a covariance in ``(clip_cov_low, clip_cov_high)``.

    Up to ``max(1, floor(clip_cov_ratio n))`` of those that PPO does not clip are drawn. Cui et al. 2025,
    arXiv:2505.22617; verl.
    """
    options, advantage = x.options, x.advantage()
    chosen = options["clip_cov_tokens"]
    chosen = drawn_tokens(x) if chosen is None else chosen
    return x.clipped_sum(advantage, torch.where(chosen, 0.0, x.weights), (options["clip_low"], options["clip_high"]))


def _a2po(x: RowInputs) -> Tensor:
    r"""A*-PO: one loss per sequence, ``(beta2 sum_t (log pi - log ref) - (R - V*))^2``.

    ``V* = beta1 log mean exp(value_pool / beta1)``. Regression to the optimal advantage; TRL, experimental.
    """
    options = x.options
    pool, beta = options["value_pool"].double(), options["beta1"]
    value = beta * ((pool / beta).logsumexp(-1) - math.log(pool.shape[-1]))
    gap = x.sums(torch.where(x.live, x.logp - x.reference, 0.0)) * options["beta2"]
    # The objective of a value holds a half.
    return weighted_sum("value_plain", gap, [options["rewards"].double() - value], (), x.of_sequences().scaled(2.0))


LOSSES: dict[str, Callable[[RowInputs], Tensor]] = {
    "gmpo": _gmpo,
    "vespo": _vespo,
    "fipo": _fipo,
    "real": _real,
    "kl_cov": _kl_cov,
    "clip_cov": _clip_cov,
    "a2po": _a2po,
}
"""Name to the weighted sum of an objective, or its terms; the names of ``ROW_KINDS``."""


def row_term(
    choice: RowChoice,
    logp: Tensor,
    columns: list[Tensor],
    weights: TokenWeights,
    live: Tensor,
    cu_seqlens: Tensor | None,
    ref_logprobs: Tensor | None,
    engine: Tensor | None = None,
) -> Tensor:
    """Computes the weighted sum of an objective of the table; ``engine``: weights that its own ratio takes."""
    inputs = RowInputs(
        logp.double(),
        [c.double() for c in columns],
        weights.dense(live, torch.float64),
        live,
        cu_seqlens,
        choice.options,
        choice.groups,
        None if ref_logprobs is None else ref_logprobs.double(),
        engine,
        weights.each,
    )
    return LOSSES[choice.name](inputs).to(logp.dtype)
