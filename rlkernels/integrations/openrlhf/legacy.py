"""The names of OpenRLHF 0.5.5 that later versions dropped or changed, for forks of it.

``PRMLoss``, ``KTOLoss``, ``VanillaKTOLoss`` and ``KDLoss`` are also those of 0.9.5, whose policy loss is
``PolicyLoss09``. The names of the package that are not here have the same arguments in 0.5.5. ``patch`` touches no such
version.
"""

import torch
from torch import Tensor, nn

from rlkernels import checks
from rlkernels.advantages.assemble import assemble_rewards
from rlkernels.integrations.openrlhf import policy
from rlkernels.integrations.openrlhf.functions import reduction
from rlkernels.losses.divergence import divergence_loss
from rlkernels.losses.kl_estimate import kl_estimate
from rlkernels.losses.policy import policy_loss
from rlkernels.losses.process_reward import process_reward_loss
from rlkernels.losses.unpaired_preference import unpaired_preference_loss
from rlkernels.losses.value import value_loss

IGNORE_INDEX = -100

__all__ = [
    "KDLoss",
    "KTOLoss",
    "PRMLoss",
    "PolicyLoss",
    "PolicyLoss09",
    "ValueLoss",
    "VanillaKTOLoss",
    "compute_approx_kl",
    "compute_reward",
]


def compute_approx_kl(
    log_probs: Tensor, log_probs_base: Tensor, action_mask: Tensor | None = None, use_kl_estimator_k3: bool = False
) -> Tensor:
    r"""Estimates ``KL(pi || base)`` per token by k1 or k3, without clamps; 0 at dead tokens.

    Args:
        log_probs, log_probs_base: same shape; the first one gets the gradient.
        action_mask: live tokens, same shape; None: all.
        use_kl_estimator_k3: k3 in place of k1.

    Returns:
        shaped like ``log_probs``, fp32.

    Raises:
        TypeError, ValueError: as ``rlkernels.kl_estimate``.

    Example:
        >>> compute_approx_kl(torch.tensor([-1.0, -5.0]), torch.tensor([-2.0, -1.0]), torch.tensor([1, 0]))
        tensor([1., 0.])

    OpenRLHF 0.5.5, ``openrlhf.models.utils``.
    """
    kind = "k3" if use_kl_estimator_k3 else "k1"
    return kl_estimate(log_probs.float(), log_probs_base.float(), kind, mask=action_mask)  # type: ignore[arg-type]


def compute_reward(
    r: Tensor,
    kl_coef: float,
    kl: Tensor | list[Tensor],
    action_mask: Tensor | None = None,
    num_actions: list[int] | None = None,
    reward_clip_range: tuple[float, float] | None = None,
) -> Tensor | list[Tensor]:
    r"""Puts the score of each response onto its last action, and ``-kl_coef kl`` onto all actions.

    Args:
        r: ``[B]``, scores.
        kl_coef: a negative one counts as 0.
        kl: ``[B, L]`` with ``action_mask``, or a list of ``B`` tensors ``[L_i]`` with ``num_actions``.
        action_mask: ``[B, L]``.
        num_actions: the actions of each tensor of ``kl``; what stands behind them gets 0.
        reward_clip_range: smallest and largest score, or None.

    Returns:
        ``[B, L]``, or a list of ``B`` tensors; without gradient.

    Raises:
        TypeError: neither ``action_mask`` nor ``num_actions``. ValueError: shapes that differ.

    Example:
        >>> compute_reward(torch.tensor([1.0, 2.0]), 0.5, [torch.tensor([0.2, 0.4]), torch.tensor([0.6])], None, [2, 1])
        [tensor([-0.1000,  0.8000]), tensor([1.7000])]

    OpenRLHF 0.5.5, ``openrlhf.models.utils``.
    """
    clip = (reward_clip_range[0], reward_clip_range[1]) if reward_clip_range else None
    if action_mask is not None and isinstance(kl, Tensor):
        return assemble_rewards(
            r, action_mask, logprobs=kl, ref_logprobs=torch.zeros_like(kl), kl_coef=kl_coef, score_clip=clip
        )
    if num_actions is None or isinstance(kl, Tensor):
        raise TypeError(
            "compute_reward: kl must be a tensor [B, L] with action_mask, or a list of tensors with num_actions; got "
            f"{type(kl).__name__}, action_mask {type(action_mask).__name__}, num_actions {type(num_actions).__name__}"
        )
    if not len(r) == len(kl) == len(num_actions):
        raise ValueError(
            f"compute_reward: r, kl and num_actions must have one entry per response, got {len(r)}, {len(kl)} and "
            f"{len(num_actions)}"
        )
    return [
        assemble_rewards(
            score[None],
            (torch.arange(segment.shape[0], device=segment.device) < count)[None],
            logprobs=segment[None],
            ref_logprobs=torch.zeros_like(segment)[None],
            kl_coef=kl_coef,
            score_clip=clip,
        )[0]
        for score, segment, count in zip(r, kl, num_actions, strict=True)
    ]


class PolicyLoss(nn.Module):
    """PPO's clipped policy loss, a mean over sequences of their means.

    A sequence without a live token counts nowhere, where OpenRLHF has NaN.

    Args:
        clip_eps: the clip on both sides of 1.

    Example:
        >>> logprobs, old = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.0, -2.5]])
        >>> PolicyLoss()(logprobs, old, torch.ones(1, 2), torch.ones(1, 2))
        tensor(-1.1000)

    OpenRLHF 0.5.5.
    """

    def __init__(self, clip_eps: float = 0.2) -> None:
        super().__init__()
        self.clip_eps = clip_eps

    def forward(
        self, log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, action_mask: Tensor | None = None
    ) -> Tensor:
        """Computes the loss.

        Args:
            log_probs, old_log_probs, advantages: ``[B, L]``; the first one gets the gradient.
            action_mask: ``[B, L]``; None: every token is live.

        Returns:
            Scalar.

        Raises:
            ValueError: shapes that differ. TypeError: dtypes.
        """
        return policy_loss(
            log_probs,
            old_log_probs,
            advantages,
            action_mask,
            aggregation="seq-mean-token-mean",
            clip_low=self.clip_eps,
            clip_high=self.clip_eps,
        )


CORRECTIONS = {"tis": ("token", "clip"), "icepop": ("token", "mask"), "seq-mask-tis": ("seq", "mask")}
"""The level and the mode that 0.11.2 has for each type of correction of 0.9.5."""


class PolicyLoss09(nn.Module):
    """The policy loss of OpenRLHF 0.9.5: that of 0.11.2 without the clamp of log-ratios, with a result of four.

    ``ppo_kl`` is the mean of ``log old - log pi``. With a correction OpenRLHF 0.9.5 returns another number by that
    name: ``vllm_kl`` for PPO, and the mean of ``log rollout - log pi`` for GSPO.

    Args:
        clip_eps_low, clip_eps_high, dual_clip, token_level_loss, policy_loss_type: as for ``PolicyLoss`` of 0.11.2.
        enable_vllm_is_correction: corrects the mismatch of rollout engine and trainer.
        vllm_is_truncated_threshold: ``(low, high)``, needed with a correction.
        vllm_is_correction_type: ``"tis"``: the weight is brought into the threshold; ``"icepop"``: a token outside of
            it weighs 0; ``"seq-mask-tis"``: a sequence whose mean lies outside of it weighs 0.

    Raises:
        ValueError: an unknown name; ``dual_clip`` of at most 1; a correction without a threshold.

    Example:
        >>> logprobs, old = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.0, -2.5]])
        >>> PolicyLoss09()(logprobs, old, torch.ones(1, 2), torch.ones(1, 2))
        (tensor(-1.1000), tensor(0.5000), tensor(-0.2500), None)

    OpenRLHF 0.9.5.
    """

    def __init__(
        self,
        clip_eps_low: float = 0.2,
        clip_eps_high: float = 0.2,
        dual_clip: float | None = None,
        token_level_loss: bool = True,
        policy_loss_type: str = "ppo",
        enable_vllm_is_correction: bool = False,
        vllm_is_truncated_threshold: tuple[float, float] | list[float] | None = None,
        vllm_is_correction_type: str = "tis",
    ) -> None:
        super().__init__()
        caller = "PolicyLoss09"
        checks.choice(caller, "vllm_is_correction_type", vllm_is_correction_type, tuple(CORRECTIONS))
        if enable_vllm_is_correction and vllm_is_truncated_threshold is None:
            raise ValueError(f"{caller}: enable_vllm_is_correction needs vllm_is_truncated_threshold, got None")
        level, mode = CORRECTIONS[vllm_is_correction_type]
        self.loss = policy.PolicyLoss(
            clip_eps_low,
            clip_eps_high,
            dual_clip,
            token_level_loss,
            policy_loss_type,
            level if enable_vllm_is_correction else "off",
            mode if enable_vllm_is_correction else "mask",
            is_correction_threshold=vllm_is_truncated_threshold or (0.0, 1.0),
        )

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Computes the loss and what a trainer plots: ``(loss, clip_ratio, ppo_kl, vllm_kl)``.

        Arguments and errors are those of ``PolicyLoss`` of 0.11.2.
        """
        mode, normalizers = reduction(self.loss.token_level_loss, 1, None, None)
        tensors = log_probs, old_log_probs, advantages, action_mask, rollout_log_probs
        return policy.evaluated(self.loss, *tensors, mode, normalizers, log_ratio_clamp=None)[:4]


class ValueLoss(nn.Module):
    """The loss of a value function, with its half, a mean over sequences of their means.

    Args:
        clip_eps: how far the value may move from the old one, above 0; None: no clip.

    Example:
        >>> ValueLoss()(torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]), torch.ones(1, 2))
        tensor(1.2500)

    OpenRLHF 0.5.5.
    """

    def __init__(self, clip_eps: float | None = None) -> None:
        super().__init__()
        self.clip_eps = clip_eps

    def forward(self, values: Tensor, old_values: Tensor, returns: Tensor, action_mask: Tensor | None = None) -> Tensor:
        """Computes the loss; the arguments of ``ValueLoss`` of 0.11.2 without the normalisers."""
        return value_loss(
            values, old_values, returns, action_mask, clip_range=self.clip_eps, aggregation="seq-mean-token-mean"
        )


def _rewards(beta: float, policy: Tensor, reference: Tensor) -> Tensor:
    """Returns the implicit rewards ``beta (policy - reference)``, detached."""
    return beta * (policy - reference).detach()


class VanillaKTOLoss(nn.Module):
    """The KTO loss of batches with as many chosen as rejected answers.

    The baseline of each class is the mean log-ratio of the other one, at least 0, with its gradient.

    Args:
        beta: strength of the tie to the reference.

    Example:
        >>> chosen, rejected, reference = torch.tensor([-10.0]), torch.tensor([-11.0]), torch.tensor([-11.0])
        >>> VanillaKTOLoss(1.0)(chosen, rejected, reference, reference)
        (tensor(0.2689), tensor([1.]), tensor([0.]))

    OpenRLHF 0.5.5; Ethayarajh et al. 2024, arXiv:2402.01306.
    """

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.beta = beta

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Computes the loss and the implicit rewards.

        Args:
            policy_chosen_logps, policy_rejected_logps: sums of log-probabilities, ``[B]``; both get a gradient.
            reference_chosen_logps, reference_rejected_logps: the same under the reference.

        Returns:
            ``(loss, chosen_rewards, rejected_rewards)``.

        Raises:
            ValueError: shapes that differ. TypeError: dtypes.
        """
        loss = unpaired_preference_loss(
            torch.cat([policy_chosen_logps, policy_rejected_logps]),
            torch.cat([reference_chosen_logps, reference_rejected_logps]),
            _labels(policy_chosen_logps, policy_rejected_logps),
            loss_type="kto_paired_batch",
            beta=self.beta,
        )
        return (
            loss,
            _rewards(self.beta, policy_chosen_logps, reference_chosen_logps),
            _rewards(self.beta, policy_rejected_logps, reference_rejected_logps),
        )


def _labels(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Returns True for each chosen answer and False for each rejected one."""
    labels = torch.ones(chosen.shape[0] + rejected.shape[0], dtype=torch.bool, device=chosen.device)
    labels[chosen.shape[0] :] = False
    return labels


class KTOLoss(nn.Module):
    """The KTO loss of answers that are desirable or not, in any numbers.

    The baseline is the mean log-ratio of answers to other prompts, over all ranks, at least 0, without gradient. Where
    the ranks hold different numbers of these, every answer weighs the same here; in OpenRLHF every rank does.

    Args:
        beta: strength of the tie to the reference.
        desirable_weight, undesirable_weight: of each class.
        world_size: the ranks of the default process group; 1 needs no group.
        device: kept as an attribute; the arithmetic runs where the log-probabilities are.

    Example:
        >>> chosen, rejected, reference = torch.tensor([-10.0]), torch.tensor([-11.0]), torch.tensor([-11.0])
        >>> loss = KTOLoss(1.0, 1.0, 1.0, 1, "cpu")
        >>> loss(chosen, rejected, reference, reference, reference, reference)[0]
        tensor(0.3845)

    OpenRLHF 0.5.5; Ethayarajh et al. 2024, arXiv:2402.01306.
    """

    def __init__(
        self,
        beta: float,
        desirable_weight: float,
        undesirable_weight: float,
        world_size: int,
        device: "torch.device | str | None",
    ) -> None:
        super().__init__()
        self.beta = beta
        self.desirable_weight = desirable_weight
        self.undesirable_weight = undesirable_weight
        self.world_size = world_size
        self.device = device

    def forward(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        policy_KL_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
        reference_KL_logps: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Computes the loss, the implicit rewards and the baseline.

        Args:
            policy_chosen_logps, policy_rejected_logps: sums of log-probabilities, ``[C]`` and ``[R]``, either of which
                may be empty; both get a gradient.
            policy_KL_logps: those of answers to other prompts, ``[M]``.
            reference_chosen_logps, reference_rejected_logps, reference_KL_logps: the same under the reference.

        Returns:
            ``(loss, chosen_rewards, rejected_rewards, KL)``.

        Raises:
            ValueError: shapes that differ; a weight below 0. TypeError: dtypes. RuntimeError: a ``world_size`` above 1
                that is not that of an initialised default process group.
        """
        group = None
        if self.world_size > 1:
            ready = torch.distributed.is_available() and torch.distributed.is_initialized()
            found = torch.distributed.get_world_size() if ready else None
            if found != self.world_size:
                raise RuntimeError(
                    f"KTOLoss: world_size is {self.world_size}, and the default process group has "
                    f"{'not been initialised' if found is None else f'{found} ranks'}"
                )
            group = torch.distributed.group.WORLD
        loss, metrics = unpaired_preference_loss(
            torch.cat([policy_chosen_logps, policy_rejected_logps]),
            torch.cat([reference_chosen_logps, reference_rejected_logps]),
            _labels(policy_chosen_logps, policy_rejected_logps),
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
            kl_logps=policy_KL_logps.detach(),
            ref_kl_logps=reference_KL_logps.detach(),
            kl_group=group,
            return_metrics=True,
        )
        return (
            loss,
            _rewards(self.beta, policy_chosen_logps, reference_chosen_logps),
            _rewards(self.beta, policy_rejected_logps, reference_rejected_logps),
            metrics["kl"],
        )


class KDLoss(nn.Module):
    """The cross-entropy to a teacher, ``-sum_v q_v log p_v``, a mean over the tokens whose label is not -100.

    Nothing is shifted. Without such a token the loss is 0, where OpenRLHF has NaN.

    Example:
        >>> KDLoss()(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4), torch.tensor([[1, -100]]))
        tensor(1.3863)

    OpenRLHF 0.5.5 to 0.9.5.
    """

    def __init__(self) -> None:
        super().__init__()
        self.IGNORE_INDEX = IGNORE_INDEX

    def forward(self, logits: Tensor, teacher_logits: Tensor, label: Tensor) -> Tensor:
        """Computes the loss.

        Args:
            logits, teacher_logits: ``[B, L, V]``; the first one gets the gradient.
            label: ``[B, L]``, of which only -100 is looked at.

        Returns:
            Scalar, fp32 (fp64 for fp64 logits).

        Raises:
            ValueError: shapes that differ. TypeError: dtypes.
        """
        return divergence_loss(logits, teacher_logits, label != self.IGNORE_INDEX, kind="cross_entropy")


class PRMLoss(nn.Module):
    """The loss of a process reward model at the ends of steps, with hard or soft labels.

    A soft label of -100 counts nowhere; OpenRLHF trains on it as on a probability.

    Args:
        placeholder_token_id: the token that ends a step.
        reward_token_ids: the vocabulary columns that compete; soft labels need two of them. None: all columns.

    Example:
        >>> logits, inputs = torch.tensor([[[0.0, 2.0, 1.0], [0.5, 0.0, 0.0]]]), torch.tensor([[9, 5]])
        >>> PRMLoss(9, [1, 2])(inputs, logits, torch.tensor([[1, -100]]), return_acc=True)
        (tensor(0.3133), tensor(1.))

    OpenRLHF 0.5.5 to 0.9.5; Lightman et al. 2023, arXiv:2305.20050; Wang et al. 2023, arXiv:2312.08935.
    """

    def __init__(self, placeholder_token_id: int, reward_token_ids: list[int] | None = None) -> None:
        super().__init__()
        self.IGNORE_INDEX = IGNORE_INDEX
        self.placeholder_token_id = placeholder_token_id
        self.reward_token_ids = reward_token_ids

    def forward(
        self, inputs: Tensor, logits: Tensor, labels: Tensor, *, return_acc: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Computes the loss, and the share of steps whose largest column is the label's.

        Args:
            inputs: ``[B, L]`` token ids.
            logits: ``[B, L, V]``; the row at a step's end scores it.
            labels: ``[B, L]``: token ids, or floats, the chance that the step is good.
            return_acc: also return the accuracy.

        Returns:
            Scalar, or ``(loss, accuracy)``.

        Raises:
            ValueError: shapes that differ; soft labels without two reward tokens. TypeError: dtypes.
        """
        loss, metrics = process_reward_loss(
            logits,
            labels,
            inputs,
            self.placeholder_token_id,
            reward_token_ids=self.reward_token_ids,
            ignore_index=self.IGNORE_INDEX,
            return_metrics=True,
        )
        return (loss, metrics["accuracy"]) if return_acc else loss
