"""The functions of DeepSpeed-Chat under its names and argument order, each served by one public function of ours.

DeepSpeed-Chat reads the settings of a loss from its trainer. Here each is a keyword, with the number that the trainer
has by default.
"""

import torch
from torch import Tensor

from rlkernels import checks
from rlkernels.advantages.assemble import assemble_rewards
from rlkernels.advantages.gae import gae
from rlkernels.checks import tokens as checks_tokens
from rlkernels.logprobs import token_logprobs
from rlkernels.losses.policy import policy_loss
from rlkernels.losses.reward_head import end_scores
from rlkernels.losses.span_reward import span_reward_loss
from rlkernels.losses.value import value_loss
from rlkernels.packing import shift_targets
from rlkernels.sequences import sequence_sums
from rlkernels.types import Logits, Mask, Number, OfPairs, PerSequence, PerToken, Scalar, Targets, TokenIds

NO_LABEL = -(2**31)
"""The id that ``token_logprobs`` ignores, in place of -100, because DeepSpeed-Chat ignores none."""


def gather_log_probs(logits: Logits, labels: Targets) -> Tensor:
    r"""Computes ``log softmax(logits)`` at the labels; nothing is shifted.

    Args:
        logits: ``[..., V]``, any float dtype and any strides, such as ``logits[:, :-1]``.
        labels: ``[...]`` token ids; none is ignored, -100 raises as any id outside of the vocabulary does.

    Returns:
        Tensor ``[...]``, fp32 (fp64 for fp64 logits), where DeepSpeed-Chat returns, and rounds to, the dtype of the
        logits.

    Raises:
        TypeError, ValueError, IndexError: as ``token_logprobs``.

    Example:
        >>> gather_log_probs(torch.tensor([[[0.0, 1.0], [2.0, 2.0]]]), torch.tensor([[1, 0]]))
        tensor([[-0.3133, -0.6931]])

    DeepSpeedExamples 45b4b71, ``ppo_trainer.py``.
    """
    return token_logprobs(logits, labels, ignore_index=NO_LABEL)


def actor_loss_fn(
    logprobs: PerToken, old_logprobs: PerToken, advantages: PerToken, mask: Mask, *, cliprange: Number = 0.2
) -> Scalar:
    r"""Computes PPO's clipped loss, averaged over the live tokens of the batch.

    ``-(1/sum m) sum_t m_t min(rho_t A_t, clip(rho_t, 1 - c, 1 + c) A_t)``,  ``rho = exp(logprobs - old_logprobs)``.

    Args:
        logprobs, old_logprobs, advantages, mask: ``[B, L]`` each, the new log-probabilities first.
        cliprange: ``c``.

    Returns:
        Scalar, fp32 (fp64 for fp64), differentiable in ``logprobs``. No live token gives 0, where DeepSpeed-Chat
        divides 0 by 0.

    Raises:
        TypeError, ValueError: as ``policy_loss``.

    Example:
        >>> logprobs = torch.tensor([[-1.0, -1.0, -1.0]])
        >>> actor_loss_fn(logprobs, logprobs - 1.0, torch.tensor([[1.0, -1.0, 9.0]]), torch.tensor([[1, 1, 0]]))
        tensor(0.7591)

    DeepSpeedExamples 45b4b71, ``ppo_trainer.py``.
    """
    _required("actor_loss_fn", old_logprobs=old_logprobs, mask=mask)
    return policy_loss(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        objective="ppo_clip",
        clip_low=cliprange,
        clip_high=cliprange,
        aggregation="token-mean",
    )


def critic_loss_fn(
    values: PerToken, old_values: PerToken, returns: PerToken, mask: Mask, *, cliprange_value: Number = 0.2
) -> Scalar:
    r"""Computes the clipped loss of the value function, averaged over the live tokens of the batch.

    ``(1/(2 sum m)) sum_t m_t max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2)``.

    Args:
        values, old_values, returns, mask: ``[B, L]`` each.
        cliprange_value: ``c``.

    Returns:
        Scalar, fp32 (fp64 for fp64), differentiable in ``values``. No live token gives 0.

    Raises:
        TypeError, ValueError: as ``value_loss``.

    Example:
        >>> old, returns = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 9.0]])
        >>> critic_loss_fn(torch.tensor([[0.5, 0.0]]), old, returns, torch.tensor([[1, 0]]))
        tensor(0.3200)

    DeepSpeedExamples 45b4b71, ``ppo_trainer.py``.
    """
    _required("critic_loss_fn", old_values=old_values, mask=mask)
    return value_loss(values, old_values, returns, mask, clip_range=cliprange_value, aggregation="token-mean")


def get_advantages_and_returns(
    values: PerToken, rewards: PerToken, start: int, *, gamma: Number = 1.0, lam: Number = 0.95
) -> tuple[PerToken, PerToken]:
    r"""Computes GAE from the position ``start`` to the last column, without a mask, because the caller has zeroed what
    follows an answer.

    Args:
        values, rewards: ``[B, L]``.
        start: the first position, that of the prompt's last token.
        gamma, lam: discount and trace decay.

    Returns:
        ``(advantages, returns)``, ``[B, L - start]`` each, fp32 (fp64 for fp64), neither differentiable.

    Raises:
        TypeError, ValueError: as ``gae``; a ``start`` that is no position.

    Example:
        >>> get_advantages_and_returns(torch.tensor([[9.0, 0.5, 0.5]]), torch.tensor([[9.0, 0.0, 1.0]]), 1, lam=1.0)
        (tensor([[0.5000, 0.5000]]), tensor([[1., 1.]]))

    DeepSpeedExamples 45b4b71, ``ppo_trainer.py``.
    """
    caller = "get_advantages_and_returns"
    for name, x in (("values", values), ("rewards", rewards)):
        _matrix(caller, name, x)
    start = checks.integer(caller, "start", start)
    if not 0 <= start < max(rewards.shape[1], 1):
        raise ValueError(f"{caller}: start must be a position of [0, {rewards.shape[1]}), got {start}")
    return gae(rewards[:, start:], values[:, start:], gamma=gamma, lam=lam, masked="none")


def compute_rewards(
    prompts: TokenIds,
    log_probs: PerToken,
    ref_log_probs: PerToken,
    reward_score: PerSequence,
    action_mask: Mask,
    *,
    kl_ctl: Number = 0.1,
    clip_reward_value: Number = 5.0,
) -> PerToken:
    r"""Puts the clipped score of each answer behind its last token, and the KL to the reference on every token before
    that.

    ``r_t = -kl_ctl (log pi - log ref)_t + [t = e] clip(score, -c, c)``. An answer of ``n`` live tokens starts at
    ``prompts.shape[1] - 1`` and ends at ``e``, ``n`` positions later, or in the last column. It is the number of live
    tokens that counts, so that padding inside an answer moves ``e`` forward.

    Args:
        prompts: ``[B, P]``, of which the length is taken.
        log_probs, ref_log_probs: ``[B, L]``.
        reward_score: ``[B]``.
        action_mask: ``[B, L]``: the attention mask without its first column.
        kl_ctl, clip_reward_value: the factor of the KL, and ``c``.

    Returns:
        ``[B, L]``, fp32 (fp64 for fp64), not differentiable. Behind ``e`` it is 0, whatever the log-probabilities hold
        there; DeepSpeed-Chat leaves the KL of these positions to its caller, who zeroes it.

    Raises:
        TypeError: dtypes. ValueError: shapes differ; a negative ``kl_ctl`` or ``clip_reward_value``.

    Example:
        >>> log_probs, mask = torch.tensor([[-1.0, -2.0, -1.0, -1.0]]), torch.tensor([[1, 1, 1, 0]])
        >>> compute_rewards(torch.tensor([[7, 8]]), log_probs, log_probs - 1.0, torch.tensor([9.0]), mask)
        tensor([[-0.1000, -0.1000, -0.1000,  4.9000]])

    DeepSpeedExamples 45b4b71, ``ppo_trainer.py``.
    """
    caller = "compute_rewards"
    for name, x in (("prompts", prompts), ("log_probs", log_probs), ("action_mask", action_mask)):
        _matrix(caller, name, x)
    checks.mask(caller, action_mask, log_probs.shape, "action_mask")
    if not isinstance(kl_ctl, Tensor) and kl_ctl < 0:
        raise ValueError(f"{caller}: kl_ctl must not be negative, got {kl_ctl}")
    length, start = log_probs.shape[1], prompts.shape[1] - 1
    if not 0 <= start < max(length, 1):
        raise ValueError(f"{caller}: prompts has shape {tuple(prompts.shape)}, expected a length of [1, {length}]")
    # The position behind the answer counts as live, because it holds the score and its KL.
    end = start + (action_mask[:, start:] != 0).sum(1, keepdim=True)
    through = torch.arange(length, device=log_probs.device) <= end
    return assemble_rewards(
        reward_score,
        through,
        logprobs=log_probs,
        ref_logprobs=ref_log_probs,
        kl="k1",
        kl_coef=kl_ctl,
        score_clip=(-clip_reward_value, clip_reward_value),
        placement="last-action",
    )


def get_batch_logps(logits: Logits, input_ids: TokenIds, label_mask: Mask) -> PerSequence:
    r"""Sums the log-probabilities of the live tokens of each sequence, each scored by the logits before it.

    Args:
        logits: ``[B, L, V]``.
        input_ids, label_mask: ``[B, L]``; the trainer's mask leaves out padding and what a pair has in common.

    Returns:
        ``[B]``, fp32 (fp64 for fp64), differentiable. Logits of masked tokens are not read.

    Raises:
        TypeError, ValueError, IndexError: as ``shift_targets`` and ``token_logprobs``.

    Example:
        >>> get_batch_logps(torch.zeros(1, 3, 4), torch.tensor([[1, 2, 3]]), torch.tensor([[0, 0, 1]]))
        tensor([-1.3863])

    DeepSpeedExamples 45b4b71, ``step2_dpo_finetuning/main.py``.
    """
    _required("get_batch_logps", label_mask=label_mask)
    return sequence_sums(token_logprobs(logits, shift_targets(input_ids, mask=label_mask)))


def pairwise_divergence_loss(
    rewards: OfPairs,
    input_ids: OfPairs,
    pad_id: int,
    num_padding_at_beginning: int = 0,
    compute_fp32_loss: bool = False,
) -> dict[str, Tensor]:
    r"""Computes the loss of the reward model over the span in which the answers of a pair differ, and their end scores.

    One launch, and no host synchronisation, whatever the number of pairs.

    Args:
        rewards: ``[2 B, L]``, a score per token, the chosen answers first.
        input_ids: ``[2 B, L]``.
        pad_id: the id of padding, whose first one ends an answer.
        num_padding_at_beginning: how many of a row's padding ids stand at its beginning: 1 for OPT.
        compute_fp32_loss: the loss keeps fp32. Otherwise it is rounded, at the end, to the dtype of the rewards.

    Returns:
        ``loss``, and the end scores, ``[B]`` each and in the dtype of the rewards, under the names that DeepSpeed-Chat
        has for them: ``chosen_mean_scores``, ``rejected_mean_scores``. All are differentiable.

    Raises:
        TypeError, ValueError: as ``span_reward_loss``, such as on a CPU for a pair that differs at its first token.

    Example:
        >>> ids = torch.tensor([[5, 6, 7, 0], [5, 8, 0, 0]])
        >>> pairwise_divergence_loss(torch.tensor([[0.0, 1.0, 2.0, 9.0], [0.0, 1.0, -1.0, 9.0]]), ids, 0)["loss"]
        tensor(0.3709)

    DeepSpeedExamples 45b4b71, ``reward_model.py``.
    """
    compute_fp32_loss = checks.flag("pairwise_divergence_loss", "compute_fp32_loss", compute_fp32_loss)
    loss, *scores = span_reward_loss(rewards, input_ids, pad_id, num_padding_at_beginning=num_padding_at_beginning)
    chosen, rejected = (x.to(rewards.dtype) for x in scores)
    loss = loss if compute_fp32_loss else loss.to(rewards.dtype)
    return {"loss": loss, "chosen_mean_scores": chosen, "rejected_mean_scores": rejected}


def answer_end_scores(values: PerToken, input_ids: TokenIds, pad_id: int, prompt_length: int) -> PerSequence:
    r"""Selects the value of each answer's last token, the one before the first padding behind the prompt.

    Args:
        values, input_ids: ``[B, L]``.
        pad_id: the id of padding.
        prompt_length: tokens of the prompt, more than 1, as DeepSpeed-Chat demands.

    Returns:
        ``[B]``, in the dtype of the values, differentiable.

    Raises:
        TypeError, ValueError: as ``end_scores``; a ``prompt_length`` of 1 or less.

    Example:
        >>> answer_end_scores(torch.tensor([[0.1, 0.2, 0.3, 0.4]]), torch.tensor([[0, 7, 8, 0]]), 0, 2)
        tensor([0.3000])

    DeepSpeedExamples 45b4b71, ``forward_value`` of ``reward_model.py``.
    """
    caller = "answer_end_scores"
    if checks.integer(caller, "prompt_length", prompt_length) <= 1:
        raise ValueError(f"{caller}: prompt_length must be greater than 1, got {prompt_length}")
    checks.tensor(caller, "values", values)
    checks_tokens.ids(caller, "input_ids", input_ids, values.shape)
    scores, _ = end_scores(values, input_ids=input_ids, pad_id=pad_id, prompt_length=prompt_length)
    return scores.to(values.dtype)


def _required(caller: str, **tensors: Tensor) -> None:
    """Refuses None, which the loss below would take for a mask of all tokens or for a ratio of 1."""
    for name, x in tensors.items():
        checks.tensor(caller, name, x)


def _matrix(caller: str, name: str, x: Tensor) -> None:
    """Refuses what is not a tensor of two dimensions."""
    checks.tensor(caller, name, x)
    if x.dim() != 2:
        raise ValueError(f"{caller}: {name} has shape {tuple(x.shape)}, expected two dimensions")
