"""The losses of pairs and of given tokens: reward model, DPO, SFT, of ``openrlhf.models.loss``.

``forward`` reads attributes that OpenRLHF's own classes have, and no others, so that ``patch`` can give it to instances
that a trainer has already made.
"""

from typing import Any

import torch
from torch import Tensor, nn

from rlkernels.integrations.openrlhf.functions import reduction
from rlkernels.losses.preference import dpo_loss
from rlkernels.losses.reward_model import pairwise_reward_loss
from rlkernels.losses.sft import logprobs_sft_loss, sft_loss

IGNORE_INDEX = -100


class PairWiseLoss(nn.Module):
    """The Bradley-Terry loss of a reward model: the mean of ``-log s(chosen - rejected - margin)``.

    Example:
        >>> PairWiseLoss()(torch.tensor([1.0]), torch.tensor([0.0]))
        tensor(0.3133)

    OpenRLHF 0.11.2; Ouyang et al. 2022, arXiv:2203.02155.
    """

    def forward(self, chosen_reward: Tensor, reject_reward: Tensor, margin: Tensor | None = None) -> Tensor:
        """Computes the loss.

        Args:
            chosen_reward, reject_reward: scores, ``[B]`` or any equal shape; both get a gradient.
            margin: same shape, how much better the chosen answer is.

        Returns:
            Scalar.

        Raises:
            ValueError: shapes that differ. TypeError: dtypes.
        """
        return pairwise_reward_loss(chosen_reward, reject_reward, margin=margin)


class LogExpLoss(nn.Module):
    """The same loss as ``log(1 + e^(rejected - chosen))``, which ignores the margin, as OpenRLHF's does.

    It is finite for every finite difference; OpenRLHF's is infinite from a difference of 89 on.

    Example:
        >>> LogExpLoss()(torch.tensor([0.0]), torch.tensor([100.0]))
        tensor(100.)

    OpenRLHF 0.11.2; Bai et al. 2022, arXiv:2204.05862.
    """

    def forward(self, chosen_reward: Tensor, reject_reward: Tensor, margin: Tensor | None = None) -> Tensor:
        """Computes the loss; arguments and result as for ``PairWiseLoss``, and ``margin`` is not looked at."""
        return pairwise_reward_loss(chosen_reward, reject_reward, kind="logexp")


class DPOLoss(nn.Module):
    r"""The loss of preference pairs, DPO with label smoothing or IPO, of sums of log-probabilities.

    With ``D = (chosen - rejected) - (reference chosen - reference rejected)``: ``-(1 - e) log s(beta D) - e log s(-beta
    D)``, or ``(D - 1 / (2 beta))^2``.

    Args:
        beta: strength of the tie to the reference.
        label_smoothing: ``e``, from 0 to 1. IPO has none and ignores it, as OpenRLHF's does.
        ipo: IPO in place of DPO.

    Example:
        >>> chosen, rejected, reference = torch.tensor([-10.0]), torch.tensor([-11.0]), torch.tensor([-11.0])
        >>> DPOLoss(1.0)(chosen, rejected, reference, reference)
        (tensor(0.3133), tensor([1.]), tensor([0.]))

    OpenRLHF 0.11.2; Rafailov et al. 2023, arXiv:2305.18290; Azar et al. 2023, arXiv:2310.12036.
    """

    def __init__(self, beta: float, label_smoothing: float = 0.0, ipo: bool = False) -> None:
        super().__init__()
        self.beta = beta
        self.label_smoothing = label_smoothing
        self.ipo = ipo

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
            ``(loss, chosen_rewards, rejected_rewards)``: a scalar, and ``beta (policy - reference)`` of each answer,
            ``[B]``, detached.

        Raises:
            ValueError: unequal numbers of pairs; ``label_smoothing`` out of range. TypeError: dtypes.
        """
        kind: dict[str, Any] = {"loss_type": "ipo"} if self.ipo else {"label_smoothing": self.label_smoothing}
        losses, metrics = dpo_loss(
            policy_chosen_logps,
            policy_rejected_logps,
            reference_chosen_logps,
            reference_rejected_logps,
            beta=self.beta,
            reduction="none",
            return_metrics=True,
            **kind,
        )
        return losses.mean(), metrics["reward_chosen"], metrics["reward_rejected"]


class SFTLoss(nn.Module):
    """The negative log-likelihood, from log-probabilities of the tokens.

    Args:
        token_level_loss: mean over tokens, or over sequences of their means.

    Example:
        >>> SFTLoss()(torch.tensor([[-1.0, -3.0, -9.0]]), torch.tensor([[1, 1, 0]]))
        tensor(2.)

    OpenRLHF 0.11.2.
    """

    def __init__(self, token_level_loss: bool = True) -> None:
        super().__init__()
        self.token_level_loss = token_level_loss

    def forward(
        self,
        per_token_logps: Tensor,
        loss_mask: Tensor,
        dp_size: int = 1,
        batch_num_tokens: float | Tensor | None = None,
        global_batch_size: float | Tensor | None = None,
    ) -> Tensor:
        """Computes the loss.

        Args:
            per_token_logps, loss_mask: ``[B, L]``; the first one gets the gradient.
            dp_size, batch_num_tokens, global_batch_size: as for ``aggregate_loss``.

        Returns:
            Scalar.

        Raises:
            ValueError: shapes that differ. TypeError: dtypes.
        """
        mode, normalizers = reduction(self.token_level_loss, dp_size, batch_num_tokens, global_batch_size)
        return logprobs_sft_loss(per_token_logps, loss_mask, aggregation=mode, normalizers=normalizers)


class GPTLMLoss(nn.Module):
    """The cross-entropy of the next token, from logits: row ``t`` scores label ``t + 1``, and label -100 counts
    nowhere.

    Without a label that counts the loss is 0, where OpenRLHF has NaN.

    Args:
        ring_attn_group: the ranks over which a sequence lies. Each has the logits of its part and the labels of the
            whole; the loss is the mean of theirs, as OpenRLHF has it.

    Example:
        >>> GPTLMLoss()(torch.zeros(1, 3, 4), torch.tensor([[0, 3, -100]]))
        tensor(1.3863)

    OpenRLHF 0.11.2.
    """

    def __init__(self, ring_attn_group: "torch.distributed.ProcessGroup | None" = None) -> None:
        super().__init__()
        self.IGNORE_INDEX = IGNORE_INDEX
        self.ring_attn_group = ring_attn_group
        if ring_attn_group:
            self.ring_attn_rank = torch.distributed.get_rank(ring_attn_group)
            self.ring_attn_world_size = torch.distributed.get_world_size(ring_attn_group)

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Computes the loss.

        Args:
            logits: ``[B, L, V]``; with a group those of this rank's part.
            labels: ``[B, L]`` token ids, of the whole sequence.

        Returns:
            Scalar.

        Raises:
            ValueError: shapes that differ. TypeError: dtypes. IndexError: on a CPU, a label outside of the vocabulary.
        """
        if self.ring_attn_group is None:
            return sft_loss(logits[..., :-1, :], labels[..., 1:], ignore_index=self.IGNORE_INDEX)
        part = labels.shape[-1] // self.ring_attn_world_size
        labels = labels.narrow(-1, self.ring_attn_rank * part, part)
        loss = sft_loss(logits[..., :-1, :], labels[..., 1:], ignore_index=self.IGNORE_INDEX)
        # In place and outside of autograd, so that each rank's gradient is that of its own part.
        mean = loss / self.ring_attn_world_size
        torch.distributed.all_reduce(mean, group=self.ring_attn_group)
        return mean
