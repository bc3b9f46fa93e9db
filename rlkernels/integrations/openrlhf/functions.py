"""The functions of ``openrlhf.models.utils`` and ``openrlhf.models.loss``, and the two estimators of its experience
maker.

Names, argument order and results are those of OpenRLHF 0.11.2. Two things differ. Results are fp32 (fp64 for fp64
inputs), where OpenRLHF keeps the dtype of bf16 inputs. Masked tokens touch nothing, whatever they hold, and a mean over
no token is 0, where OpenRLHF has NaN.
"""

from typing import Any

import torch
from torch import Tensor

from rlkernels import checks
from rlkernels.advantages.assemble import assemble_rewards
from rlkernels.advantages.gae import discounted_returns, gae
from rlkernels.advantages.whitening import masked_whiten
from rlkernels.aggregation import aggregate
from rlkernels.logprobs import token_logprobs, token_stats
from rlkernels.losses.kl_estimate import kl_estimate
from rlkernels.sequences import result_dtype, sequence_means
from rlkernels.types import Aggregation, Normalizers

KL_ESTIMATORS = ("k1", "k2", "k3")
KL_CLAMP = 10.0
KL_RATIO_CAP = 10.0


def log_probs_from_logits(logits: Tensor, labels: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Computes the log-probability of each label: ``z_y - log sum_v e^{z_v}``, ``z = logits / temperature``.

    OpenRLHF's function divides the caller's ``logits`` in place where ``temperature`` is not 1; this one leaves them as
    they are. Whoever reads the logits afterwards, for an entropy of the tempered policy, divides them first, as
    ``Actor.forward`` does.

    Args:
        logits: ``[..., V]``, any float dtype.
        labels: ``[...]``, int32 or int64. ``logits[t]`` scores ``labels[t]``.
        temperature: a positive number.

    Returns:
        ``[...]``: fp32, fp64 for fp64 logits. The sum runs in fp32 for bf16 logits, too.

    Raises:
        TypeError, ValueError, IndexError: as ``rlkernels.token_logprobs``.

    Example:
        >>> log_probs_from_logits(torch.tensor([[0.0, 2.0]]), torch.tensor([1]), temperature=2.0)
        tensor([-0.3133])

    OpenRLHF 0.11.2, ``openrlhf.models.utils``.
    """
    return token_logprobs(logits, labels, temperature=temperature)


def compute_entropy(logits: Tensor) -> Tensor:
    r"""Computes the entropy of each row's softmax: ``-sum_v p_v log p_v``.

    Args:
        logits: ``[..., V]``, any float dtype; a logit of -inf counts as 0, where OpenRLHF has NaN.

    Returns:
        ``[...]``: fp32, fp64 for fp64 logits; differentiable.

    Raises:
        TypeError, ValueError: as ``rlkernels.token_stats``.

    Example:
        >>> compute_entropy(torch.zeros(1, 4))
        tensor([1.3863])

    OpenRLHF 0.11.2, ``openrlhf.models.utils``.
    """
    checks.floating("compute_entropy", "logits", logits)
    # The entropy needs no target, and a target costs one number of a row that is read anyway.
    targets = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    entropy = token_stats(logits, targets).entropy
    assert entropy is not None
    return entropy


def compute_approx_kl(
    log_probs: Tensor,
    log_probs_base: Tensor,
    log_probs_old: Tensor | None = None,
    kl_estimator: str = "k1",
    unbiased_gradient: bool = False,
) -> Tensor:
    r"""Estimates ``KL(pi || base)`` per token, clamped to ``[-10, 10]``.

    With ``d = log pi - log base``: ``d``, ``d^2 / 2``, or ``e^-d - 1 + d`` of a ``d`` that is at least -10.

    Args:
        log_probs: under the policy, any shape; the only argument that gets a gradient.
        log_probs_base: same shape, under the reference.
        log_probs_old: same shape, under the behaviour policy, for ``unbiased_gradient`` alone; OpenRLHF, too, looks at
            it nowhere else.
        kl_estimator: ``"k1"``, ``"k2"`` or ``"k3"``.
        unbiased_gradient: the value stays, and the gradient is ``min(pi / old, 10) d``, or ``d`` without
            ``log_probs_old``.

    Returns:
        shaped like ``log_probs``: fp32 for every input, as OpenRLHF has it.

    Raises:
        ValueError: unknown ``kl_estimator``; shapes that differ. TypeError: not floating.

    Example:
        >>> compute_approx_kl(torch.tensor([-1.0, -30.0]), torch.tensor([-2.0, -1.0]), kl_estimator="k3")
        tensor([ 0.3679, 10.0000])

    OpenRLHF 0.11.2, ``openrlhf.models.utils``; Schulman 2020, "Approximating KL divergence".
    """
    caller = "compute_approx_kl"
    checks.choice(caller, "kl_estimator", kl_estimator, KL_ESTIMATORS)
    for name, x in (("log_probs", log_probs), ("log_probs_base", log_probs_base)):
        checks.floating(caller, name, x)
    # Without the bound of -10 on d that OpenRLHF has for k3, because the value is clamped there, with a slope of 0.
    options: dict[str, Any] = {"value_clamp": KL_CLAMP}
    if unbiased_gradient:
        options |= {"gradient": "k2", "ratio_weighted": True, "ratio_cap": KL_RATIO_CAP}
        options["old_logprobs"] = None if log_probs_old is None else log_probs_old.float()
    return kl_estimate(log_probs.float(), log_probs_base.float(), kl_estimator, **options)  # type: ignore[arg-type]


def compute_reward(
    r: Tensor,
    kl_coef: float,
    kl: Tensor,
    action_mask: Tensor | None = None,
    reward_clip_range: tuple[float, float] | None = None,
) -> Tensor:
    r"""Puts the score of each response onto its last action, and ``-kl_coef kl`` onto all actions.

    ``r_t = -kl_coef kl_t + [t = last action] clip(score)``.

    Args:
        r: ``[B]``, scores.
        kl_coef: a negative one counts as 0.
        kl: ``[B, L]``, the KL of each token.
        action_mask: ``[B, L]``. A row without an action has its score at its last token. A dead token's reward is 0,
            where OpenRLHF has ``-kl_coef kl`` of what stands there.
        reward_clip_range: smallest and largest score, or None.

    Returns:
        ``[B, L]``: fp32, fp64 for a ``kl`` of fp64; without gradient.

    Raises:
        TypeError: ``action_mask`` is None, which OpenRLHF's annotation allows and its code does not; ``r`` or ``kl``
            not a tensor. ValueError: shapes that differ.

    Example:
        >>> compute_reward(torch.tensor([20.0]), 0.5, torch.tensor([[0.2, 0.4]]), torch.ones(1, 2), (-10, 10))
        tensor([[-0.1000,  9.8000]])

    OpenRLHF 0.11.2, ``openrlhf.models.utils``.
    """
    caller = "compute_reward"
    if action_mask is None:
        raise TypeError(f"{caller}: action_mask must be a tensor [B, L], got None")
    checks.floating(caller, "kl", kl)
    checks.tensor(caller, "r", r)
    # The dtype is that of the KL, as OpenRLHF has it: scores of a group in fp64 make no advantages in fp64.
    r = r.to(result_dtype(kl))
    # The KL per token is k1 of itself against 0.
    return assemble_rewards(
        r,
        action_mask,
        logprobs=kl,
        ref_logprobs=torch.zeros_like(kl),
        kl="k1",
        kl_coef=kl_coef,
        score_clip=tuple(reward_clip_range) if reward_clip_range else None,  # type: ignore[arg-type]
        placement="last-action",
    )


def masked_mean(tensor: Tensor, mask: Tensor | None, dim: int | None = None) -> Tensor:
    r"""Computes the mean over the live elements, of all of them or along ``dim``.

    ``sum_t m_t x_t / sum_t m_t``; 0 where nothing is live, where OpenRLHF has NaN.

    Args:
        tensor: ``x``, any shape; bool and integers count as floats.
        mask: ``m``, same shape: bool, integers (not 0), or floats that are 0 and 1; None: everything is live.
        dim: None: one mean over all.

    Returns:
        ``tensor``'s shape without ``dim``, or a scalar: fp32, fp64 for fp64; differentiable.

    Raises:
        TypeError: ``dim`` is not an int. ValueError: shapes that differ, another float in ``mask`` (on a CPU).

    Example:
        >>> masked_mean(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[1, 1, 0]]), dim=-1)
        tensor([2.])

    OpenRLHF 0.11.2, ``openrlhf.models.utils``.
    """
    caller = "masked_mean"
    checks.tensor(caller, "tensor", tensor)
    values = tensor if tensor.is_floating_point() else tensor.float()
    if dim is None:
        return aggregate(values, mask)
    dim = checks.integer(caller, "dim", dim)
    return sequence_means(values.movedim(dim, -1), None if mask is None else mask.movedim(dim, -1))


def masked_normalize(tensor: Tensor, mask: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    r"""Gives the live elements along ``dim`` zero mean and unit variance; dead ones return 0.

    ``(x - mean) / sqrt(max(var, eps))``, ``var`` the population's.

    Args:
        tensor: ``x``, any float dtype and shape.
        mask: live elements, same shape.
        dim: the statistics run along it.
        eps: the smallest variance.

    Returns:
        shaped like ``tensor``: fp32, fp64 for fp64.

    Raises:
        TypeError, ValueError: as ``rlkernels.masked_whiten``.

    Example:
        >>> masked_normalize(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[1, 1, 0]]))
        tensor([[-1.,  1.,  0.]])

    OpenRLHF 0.11.2, ``openrlhf.models.utils``.
    """
    return masked_whiten(tensor, mask, dim=dim, unbiased=False, eps=eps, eps_mode="clamp")


def reduction(
    token_level_loss: bool, dp_size: float, batch_num_tokens: Any, global_batch_size: Any
) -> tuple[Aggregation, Normalizers]:
    """Returns OpenRLHF's arguments of a reduction as an aggregation and its normalisers.

    ``dp_size`` counts only beside a total of the whole batch.
    """
    if token_level_loss:
        if batch_num_tokens is None:
            return "token-mean", {}
        return "token-mean", {"batch_num_tokens": batch_num_tokens, "dp_size": dp_size}
    if global_batch_size is None:
        return "seq-mean-token-mean", {}
    return "seq-mean-token-mean", {"num_sequences": global_batch_size, "dp_size": dp_size}


def aggregate_loss(
    loss: Tensor,
    loss_mask: Tensor | None,
    token_level_loss: bool = True,
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
) -> Tensor:
    r"""Aggregates per-token losses to one number.

    Token level: ``sum l m / N dp_size``, ``N`` the given ``batch_num_tokens``, or the mean ``sum l m / sum m``.
    Otherwise the same of the means of the rows with a live token, and ``global_batch_size``. 0 without a live token.

    Args:
        loss: ``[B, L]``.
        loss_mask: same shape; None: everything is live.
        token_level_loss: mean over tokens, or over sequences of their means.
        dp_size: data-parallel ranks; it counts only beside the total that the level reads, as in OpenRLHF.
        batch_num_tokens, global_batch_size: the totals of the whole batch, each read at its own level alone.

    Returns:
        Scalar: fp32, fp64 for fp64; differentiable.

    Raises:
        TypeError, ValueError: as ``rlkernels.aggregate``.

    Example:
        >>> loss, mask = torch.tensor([[1.0, 3.0], [5.0, 9.0]]), torch.tensor([[1, 1], [1, 0]])
        >>> aggregate_loss(loss, mask), aggregate_loss(loss, mask, token_level_loss=False)
        (tensor(3.), tensor(3.5000))

    OpenRLHF 0.11.2, ``openrlhf.models.loss``.
    """
    mode, normalizers = reduction(token_level_loss, dp_size, batch_num_tokens, global_batch_size)
    return aggregate(loss, loss_mask, mode, **normalizers)


def get_advantages_and_returns(
    values: Tensor, rewards: Tensor, action_mask: Tensor | None, gamma: float, lambd: float
) -> tuple[Tensor, Tensor]:
    r"""Computes generalised advantage estimation over rows in which a dead token is a step of reward and value 0.

    ``A_t = r_t + gamma V_{t+1} - V_t + gamma lambd A_{t+1}``, ``R_t = A_t + V_t``.

    Args:
        values, rewards: ``[B, L]``.
        action_mask: same shape; None: everything is live. The numbers at dead tokens are OpenRLHF's, too.
        gamma, lambd: discount and trace decay.

    Returns:
        ``(advantages, returns)``, ``[B, L]`` each, without gradient.

    Raises:
        TypeError, ValueError: as ``rlkernels.gae``.

    Example:
        >>> get_advantages_and_returns(torch.tensor([[0.5, 0.5]]), torch.tensor([[0.0, 1.0]]), None, 1.0, 1.0)
        (tensor([[0.5000, 0.5000]]), tensor([[1., 1.]]))

    OpenRLHF 0.11.2, ``RemoteExperienceMaker``; Schulman et al. 2016, arXiv:1506.02438.
    """
    caller = "get_advantages_and_returns"
    values, rewards = (
        _live_or_zero(caller, "values", values, action_mask),
        _live_or_zero(caller, "rewards", rewards, action_mask),
    )
    return gae(rewards, values, gamma=gamma, lam=lambd, masked="none")


def get_cumulative_returns(rewards: Tensor, action_mask: Tensor | None, gamma: float) -> Tensor:
    r"""Computes the discounted sum of the rewards from each token to the end of its row: ``R_t = r_t + gamma R_{t+1}``.

    OpenRLHF annotates a pair here and returns this one tensor.

    Args:
        rewards: ``[B, L]``.
        action_mask: same shape; a dead token is a step without reward. None: everything is live.
        gamma: the discount.

    Returns:
        ``[B, L]``, without gradient.

    Raises:
        TypeError, ValueError: as ``rlkernels.discounted_returns``.

    Example:
        >>> get_cumulative_returns(torch.tensor([[0.0, 9.0, 1.0]]), torch.tensor([[1, 0, 1]]), 0.5)
        tensor([[0.2500, 0.5000, 1.0000]])

    OpenRLHF 0.11.2, ``RemoteExperienceMaker``.
    """
    rewards = _live_or_zero("get_cumulative_returns", "rewards", rewards, action_mask)
    return discounted_returns(rewards, gamma=gamma, masked="none")


def _live_or_zero(caller: str, name: str, x: Tensor, mask: Tensor | None) -> Tensor:
    """Returns ``x`` with 0 at dead tokens, selected and not multiplied, because NaN times 0 is NaN."""
    checks.tensor(caller, name, x)
    checks.mask(caller, mask, x.shape)
    return x if mask is None else torch.where(mask != 0, x, 0)
