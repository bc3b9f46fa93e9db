"""The losses of actor and critic: ``PolicyLoss`` and ``ValueLoss`` of ``openrlhf.models.loss``.

``forward`` reads attributes that OpenRLHF's own classes have, and no others, so that ``patch`` can give it to instances
that a trainer has already made.
"""

from typing import Any

from torch import Tensor, nn

from rlkernels import checks
from rlkernels.aggregation import aggregate
from rlkernels.integrations.openrlhf.functions import reduction
from rlkernels.losses.kl_estimate import kl_estimate
from rlkernels.losses.policy import policy_loss
from rlkernels.losses.value import value_loss
from rlkernels.rollout.weights import rollout_weights
from rlkernels.types import Aggregation, Normalizers

LOG_RATIO_CLAMP = 20.0
LOSS_TYPES = ("ppo", "gspo")
LEVELS = ("off", "token", "seq")
MODES = ("mask", "clip")
GATES = {"ratio": "ratio", "binary_kl": "kl", "tv": "tv"}
"""OpenRLHF's statistics of a gate, and our names of them."""

PolicyResult = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


class PolicyLoss(nn.Module):
    r"""The policy loss of PPO and GSPO with the correction of the rollout mismatch.

    ``-min(rho A, clip(rho, 1 - clip_eps_low, 1 + clip_eps_high) A)`` per token. PPO: ``rho = exp(clip(log pi - log old,
    -20, 20))``. GSPO: the exponential of the sequence's mean log-ratio, which is not clamped. With a correction PPO's
    loss of a token is multiplied by a weight of trainer over rollout engine, and GSPO's ratio has the engine in place
    of the old policy.

    Args:
        clip_eps_low, clip_eps_high: the clip.
        dual_clip: above 1: a negative advantage costs at most ``-dual_clip A``. None: no such bound.
        token_level_loss: mean over tokens, or over sequences of their means; GSPO always takes the latter.
        policy_loss_type: ``"ppo"`` or ``"gspo"``. Another one raises here, and in OpenRLHF at the first call.
        is_correction_level: ``"off"``, ``"token"``, or ``"seq"``, whose gate looks at means of sequences.
        is_correction_mode: ``"mask"``: a token outside of the threshold weighs 0, another one ``old / rollout``;
            ``"clip"``: that ratio, brought into the threshold.
        is_correction_gating: what the gate looks at: ``"ratio"``, ``"binary_kl"`` or ``"tv"``.
        is_correction_threshold: ``(low, high)``; of the divergences ``high`` alone counts.

    Raises:
        ValueError: an unknown name; ``dual_clip`` of at most 1; ``"clip"`` with another level or gate than those of
            single ratios; a lower bound of a divergence.

    Example:
        >>> import torch
        >>> logprobs, old = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.0, -2.5]])
        >>> PolicyLoss()(logprobs, old, torch.ones(1, 2), torch.ones(1, 2))
        (tensor(-1.1000), tensor(0.5000), tensor(-0.2500), None, None)

    OpenRLHF 0.11.2; Schulman et al. 2017, arXiv:1707.06347; Zheng et al. 2025, arXiv:2507.18071.
    """

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        is_correction_level: str = "off",
        is_correction_mode: str = "mask",
        is_correction_gating: str = "ratio",
        is_correction_threshold: tuple[float, float] | list[float] = (0.5, 5.0),
    ) -> None:
        super().__init__()
        caller = "PolicyLoss"
        checks.choice(caller, "policy_loss_type", policy_loss_type, LOSS_TYPES)
        checks.choice(caller, "is_correction_level", is_correction_level, LEVELS)
        checks.choice(caller, "is_correction_mode", is_correction_mode, MODES)
        checks.choice(caller, "is_correction_gating", is_correction_gating, tuple(GATES))
        if dual_clip is not None and not dual_clip > 1.0:
            raise ValueError(f"{caller}: dual_clip must be above 1, or None; got {dual_clip}")
        if is_correction_mode == "clip" and (is_correction_level == "seq" or is_correction_gating != "ratio"):
            raise ValueError(
                f"{caller}: is_correction_mode 'clip' needs is_correction_level 'token' and is_correction_gating "
                f"'ratio', got {is_correction_level!r} and {is_correction_gating!r}"
            )
        if is_correction_level != "off" and is_correction_gating != "ratio" and is_correction_threshold[0] > 0:
            raise ValueError(
                f"{caller}: is_correction_gating {is_correction_gating!r} takes an upper bound only; "
                f"is_correction_threshold must start with 0, got {tuple(is_correction_threshold)}"
            )
        self.clip_eps_low = clip_eps_low
        self.clip_eps_high = clip_eps_high
        self.dual_clip = dual_clip
        self.token_level_loss = token_level_loss and policy_loss_type != "gspo"
        self.policy_loss_type = policy_loss_type
        self.is_correction_level = is_correction_level
        self.is_correction_mode = is_correction_mode
        self.is_correction_gating = is_correction_gating
        self.is_correction_threshold = is_correction_threshold

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | Tensor | None = None,
        global_batch_size: float | Tensor | None = None,
    ) -> PolicyResult:
        """Computes the loss and what a trainer plots.

        Args:
            log_probs, old_log_probs, advantages: ``[B, L]``; the first one gets the gradient.
            action_mask: ``[B, L]``; None: every token is live.
            rollout_log_probs: ``[B, L]``, of the engine; needed with a correction, not looked at without one.
            dp_size, batch_num_tokens, global_batch_size: as for ``aggregate_loss``.

        Returns:
            ``(loss, clip_ratio, ppo_kl, vllm_kl, is_filter_ratio)``: the share of tokens whose clipped surrogate is the
            smaller one; the mean of ``log old - log pi``; and, with PPO's correction, else None, the mean of ``log
            rollout - log old``, and the share of filtered tokens, at the level ``"seq"`` of filtered sequences among
            those with a live token.

        Raises:
            ValueError: shapes that differ; a correction without ``rollout_log_probs``. TypeError: dtypes.
        """
        checks.choice("PolicyLoss", "policy_loss_type", self.policy_loss_type, LOSS_TYPES)
        reduced = reduction(self.token_level_loss, dp_size, batch_num_tokens, global_batch_size)
        tensors = log_probs, old_log_probs, advantages, action_mask, rollout_log_probs
        return evaluated(self, *tensors, *reduced, log_ratio_clamp=LOG_RATIO_CLAMP)


def evaluated(
    loss: Any,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    action_mask: Tensor | None,
    rollout_log_probs: Tensor | None,
    mode: Aggregation,
    normalizers: Normalizers,
    log_ratio_clamp: float | None,
) -> PolicyResult:
    """Returns what ``forward`` of ``PolicyLoss`` does.

    Args:
        loss: an object with the attributes of ``PolicyLoss``.
        log_probs, old_log_probs, advantages, action_mask, rollout_log_probs: as for ``forward``.
        mode, normalizers: the reduction.
        log_ratio_clamp: the bound of PPO's log-ratio.
    """
    corrected = loss.is_correction_level != "off"
    if corrected and rollout_log_probs is None:
        raise ValueError(
            f"PolicyLoss: is_correction_level {loss.is_correction_level!r} needs rollout_log_probs, got None"
        )
    options: dict[str, Any] = {"clip_low": loss.clip_eps_low, "clip_high": loss.clip_eps_high}
    if loss.dual_clip is not None:
        options |= {"objective": "dual_clip", "dual_clip": loss.dual_clip}
    vllm_kl = filtered = None
    if loss.policy_loss_type == "gspo":
        options["ratio_level"] = "sequence"
        if corrected:
            options |= {"ratio_denominator": "rollout", "rollout_logprobs": rollout_log_probs}
    else:
        options["log_ratio_clamp"] = log_ratio_clamp
        if corrected:
            assert rollout_log_probs is not None
            options["correction"], filtered = _correction(loss, old_log_probs, rollout_log_probs, action_mask)
            vllm_kl = _mean_gap(rollout_log_probs, old_log_probs, action_mask)
    value, metrics = policy_loss(
        log_probs,
        old_log_probs,
        advantages,
        action_mask,
        aggregation=mode,
        normalizers=normalizers,
        return_metrics=True,
        **options,
    )
    # The ratio of a corrected GSPO is that to the engine, and OpenRLHF plots the old policy beside it.
    ppo_kl = metrics["ppo_kl"]
    if "ratio_denominator" in options:
        ppo_kl = _mean_gap(old_log_probs, log_probs, action_mask)
    return value, metrics["clip_fraction"], ppo_kl, vllm_kl, filtered


def _mean_gap(first: Tensor, second: Tensor, mask: Tensor | None) -> Tensor:
    """Returns the mean of ``first - second`` over live tokens, detached."""
    return aggregate(kl_estimate(first.detach(), second.detach(), "k1", mask=mask), mask)


def _correction(
    loss: Any, old_log_probs: Tensor, rollout_log_probs: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns the weight of each token and the share of what the gate filters."""
    low, high = loss.is_correction_threshold
    gate, of_sequences = GATES[loss.is_correction_gating], loss.is_correction_level == "seq"
    options: dict[str, Any] = {"mode": loss.is_correction_mode, "high": high}
    if gate == "ratio":
        options["low"] = low
    if loss.is_correction_mode == "mask":
        # A token that the engine could not score is left out, as OpenRLHF's comparison with NaN does.
        options |= {"gate": gate, "gate_level": "sequence_mean" if of_sequences else "token", "nan_ratio": 0.0}
    weights, metrics = rollout_weights(
        old_log_probs.detach(), rollout_log_probs.detach(), mask, return_metrics=True, **options
    )
    if not of_sequences:
        return weights, metrics["rollout_filtered"]
    return weights, aggregate((weights == 0).to(weights.dtype), mask, "seq-mean-token-mean")


class ValueLoss(nn.Module):
    r"""The loss of a value function, with its half: ``1/2 (V - R)^2``, or the larger of that and the clipped error.

    Args:
        clip_eps: how far the value may move from the old one, above 0; None: no clip.
        token_level_loss: mean over tokens, or over sequences of their means.

    Example:
        >>> import torch
        >>> values, old, returns = torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2), torch.tensor([[0.0, 1.0]])
        >>> ValueLoss(0.5)(values, old, returns, torch.ones(1, 2))
        tensor(1.2500)

    OpenRLHF 0.11.2.
    """

    def __init__(self, clip_eps: float | None = None, token_level_loss: bool = True) -> None:
        super().__init__()
        self.clip_eps = clip_eps
        self.token_level_loss = token_level_loss

    def forward(
        self,
        values: Tensor,
        old_values: Tensor,
        returns: Tensor,
        action_mask: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | Tensor | None = None,
        global_batch_size: float | Tensor | None = None,
    ) -> Tensor:
        """Computes the loss.

        Args:
            values, old_values, returns: ``[B, L]``; the first one gets the gradient.
            action_mask: ``[B, L]``; None: every token is live.
            dp_size, batch_num_tokens, global_batch_size: as for ``aggregate_loss``.

        Returns:
            Scalar.

        Raises:
            ValueError: shapes that differ, ``clip_eps`` not positive. TypeError: dtypes.
        """
        mode, normalizers = reduction(self.token_level_loss, dp_size, batch_num_tokens, global_batch_size)
        return value_loss(
            values,
            old_values,
            returns,
            action_mask,
            clip_range=self.clip_eps,
            aggregation=mode,
            normalizers=normalizers,
        )
