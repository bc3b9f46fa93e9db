"""The factors of single tokens in a policy loss: corrections of the rollout mismatch, and the largest entropies."""

from typing import NamedTuple

import torch
from torch import Tensor

from rlkernels.losses.row_options import RowChoice
from rlkernels.losses.token_weights import TokenWeights
from rlkernels.losses.top_entropy import checked_fraction, highest
from rlkernels.objectives import Objective
from rlkernels.rollout.correction import (
    Correction,
    CorrectionLike,
    checked_correction,
    correction_weights,
    in_ratio,
    kept_sequences,
    rollout_denominator,
)
from rlkernels.types import Metrics, Number, PerToken, RatioLevel


class Factored(NamedTuple):
    """The weights of the terms of a loss under its factors."""

    policy: TokenWeights
    bonus: TokenWeights
    engine: Tensor | None  # the weights that the objective itself takes
    metrics: Metrics


class PolicyFactors(NamedTuple):
    """The factors of a policy loss, as checked options."""

    correction: Correction | Tensor | None
    top_entropy_fraction: Number | None
    old_logprobs: PerToken | None
    rollout_logprobs: PerToken | None
    ratio_level: RatioLevel
    advantage: int  # the place of that column after ``logp``, -1 where there is none
    behaviour: int  # the place of the column of the behaviour policy, -1 where there is none
    of_ratio: bool  # whether the objective takes the weights of the correction into its own ratio

    def of_policy(self) -> bool:
        """Tells whether a factor depends on the policy, so that its log-probabilities must come first."""
        masked = isinstance(self.correction, Correction) and self.correction.opsm_delta is not None
        return masked or self.top_entropy_fraction is not None

    def columns(self, caller: str, columns: list[Tensor], live: Tensor, cu_seqlens: Tensor | None) -> list[Tensor]:
        """Returns the columns of the objective, the engine's log-probabilities where they are the denominator."""
        if not in_ratio(self.correction, self.ratio_level):
            return columns
        columns = list(columns)
        old, engine = columns[self.behaviour], self.rollout_logprobs
        columns[self.behaviour] = rollout_denominator(caller, self.correction, old, engine, live, cu_seqlens)
        return columns

    def fixed(self, live: Tensor, cu_seqlens: Tensor | None, real: torch.dtype) -> tuple[Tensor | None, Metrics]:
        """Returns the factor that does not depend on the policy, or None, and its metrics."""
        if in_ratio(self.correction, self.ratio_level):
            return None, {}
        return correction_weights(self.correction, self.old_logprobs, self.rollout_logprobs, live, cu_seqlens, real)

    def weights(
        self,
        weights: TokenWeights,
        logp: Tensor,
        entropy: Tensor | None,
        columns: list[Tensor],
        live: Tensor,
        cu_seqlens: Tensor | None,
    ) -> Factored:
        """Returns the weights of the policy term and of the entropy bonus; those of the KL term stay as they are."""
        policy = bonus = weights
        factor, metrics = self.fixed(live, cu_seqlens, logp.dtype)
        if isinstance(self.correction, Correction) and self.correction.opsm_delta is not None:
            sampled = self.old_logprobs if self.rollout_logprobs is None else self.rollout_logprobs
            kept = kept_sequences(self.correction, logp, sampled, columns[self.advantage], live, cu_seqlens)
            policy = policy.times(kept.to(logp.dtype))
        if self.top_entropy_fraction is not None:
            top = highest(entropy, live, self.top_entropy_fraction).to(logp.dtype)
            policy, bonus = policy.times(top), bonus.times(top)
        if factor is not None and not self.of_ratio:
            policy = policy.times(factor)
        return Factored(policy, bonus, factor if self.of_ratio else None, metrics)


def policy_factors(
    caller: str,
    correction: CorrectionLike | None,
    top_entropy_fraction: Number | None,
    like: Tensor,
    old_logprobs: PerToken | None,
    rollout_logprobs: PerToken | None,
    ratio_level: RatioLevel,
    entry: Objective,
    choice: RowChoice | None,
) -> PolicyFactors | None:
    """Checks the options of a policy loss that are factors of its tokens; returns None where there is none."""
    if correction is None and top_entropy_fraction is None:
        return None
    of_ratio = choice is not None and choice.name == "vespo"
    checked = checked_correction(caller, correction, like, old_logprobs, rollout_logprobs, ratio_level, of_ratio)
    if top_entropy_fraction is not None:
        top_entropy_fraction = checked_fraction(caller, "top_entropy_fraction", top_entropy_fraction, like)
    advantage = entry.columns.index("advantage") - 1 if "advantage" in entry.columns else -1
    if advantage < 0 and isinstance(checked, Correction) and checked.opsm_delta is not None:
        raise ValueError(f"{caller}: opsm_delta needs an objective of advantages")
    behaviour = next((entry.columns.index(x) - 1 for x in ("old_logp", "rollout_logp") if x in entry.columns), -1)
    if behaviour < 0 and in_ratio(checked, ratio_level):
        raise ValueError(
            f"{caller}: correction with ratio_level {ratio_level!r} needs an objective with the column 'old_logp'; "
            f"{entry.function.__name__!r} has {', '.join(entry.columns)}"
        )
    return PolicyFactors(
        checked, top_entropy_fraction, old_logprobs, rollout_logprobs, ratio_level, advantage, behaviour, of_ratio
    )
