"""verl's log-probabilities and entropies under their names, from logits and from hidden states."""

from typing import Any, cast

import torch
from torch import Tensor

from rlkernels import checks
from rlkernels.linear.token_stats import linear_token_stats
from rlkernels.logprobs import token_logprobs, token_stats

BACKENDS = ("torch", "liger")
"""The values of ``impl_backend`` that verl's own class takes; both are served alike."""


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    r"""Computes the log-probability of each label: ``token_logprobs`` under verl's name.

    Args:
        logits: ``[..., V]``. labels: ``[...]``.
        inplace_backward: the backward may write the gradient over the logits. As in verl it is a permission: on a CPU,
            and for leaves and views of leaves, nothing is overwritten.

    Returns:
        ``[...]``, fp32 (fp64 for fp64 logits), where verl's torch path returns the dtype of the logits.

    Raises:
        TypeError, ValueError, IndexError: as ``token_logprobs``.

    Example:
        >>> logprobs_from_logits(torch.tensor([[0.0, 1.0], [2.0, 2.0]]), torch.tensor([1, 0]))
        tensor([-0.3133, -0.6931])

    verl 0.9, ``verl.utils.torch_functional``.
    """
    checks.tensor("logprobs_from_logits", "logits", logits)
    return token_logprobs(logits, labels, inplace_backward=inplace_backward and _may_be_overwritten(logits))


def _may_be_overwritten(logits: Tensor) -> bool:
    """Tells whether the logits are a result of the graph on an accelerator, whose memory nobody else holds."""
    if not logits.requires_grad or logits.is_leaf or logits.device.type == "cpu":
        return False
    return logits._base is None or not logits._base.is_leaf


def entropy_from_logits(logits: Tensor) -> Tensor:
    r"""Computes the entropy of each row: ``token_stats(outputs=("entropy",))``, in one pass and without a softmax.

    Args:
        logits: ``[..., V]``.

    Returns:
        ``[...]``, fp32 (fp64 for fp64 logits), differentiable.

    Example:
        >>> entropy_from_logits(torch.zeros(2, 4))
        tensor([1.3863, 1.3863])

    verl 0.9, ``verl.utils.torch_functional``.
    """
    return cast(Tensor, token_stats(logits, _no_label("entropy_from_logits", logits), outputs=("entropy",)).entropy)


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """Computes ``entropy_from_logits``; ``chunk_size`` changes nothing, because no softmax is held in memory.

    Example:
        >>> entropy_from_logits_with_chunking(torch.zeros(2, 4), chunk_size=1)
        tensor([1.3863, 1.3863])
    """
    return entropy_from_logits(logits)


def calculate_sum_pi_squared_from_logits(logits: Tensor) -> Tensor:
    r"""Computes ``sum_v p_v^2`` of each row, which the optimal token baseline needs. A backward through it raises.

    Args:
        logits: ``[..., V]``.

    Returns:
        ``[...]``, fp32 (fp64 for fp64 logits).

    Example:
        >>> calculate_sum_pi_squared_from_logits(torch.zeros(1, 4))
        tensor([0.2500])

    verl 0.9, ``verl.utils.torch_functional``.
    """
    labels = _no_label("calculate_sum_pi_squared_from_logits", logits)
    stats = token_stats(logits, labels, outputs=("log_sum_sq_probs",))
    return cast(Tensor, stats.log_sum_sq_probs).exp()


def _no_label(caller: str, logits: Tensor) -> Tensor:
    """Returns labels for statistics that have none."""
    checks.tensor(caller, "logits", logits)
    return torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)


class FusedLinearForPPO(torch.nn.Module):
    """A module under the name of verl's own: log-probabilities and entropies without the logits of all tokens.

    Args:
        chunk_size: rows per chunk.
        impl_backend: ``"torch"`` or ``"liger"``, for verl's own check of it; the result is the same.

    Raises:
        ValueError: another backend.

    Example:
        >>> logprobs, entropy = FusedLinearForPPO()(torch.ones(1, 2), torch.zeros(4, 2), torch.tensor([3]))
        >>> logprobs, entropy
        (tensor([-1.3863]), tensor([1.3863]))
    """

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch"):
        super().__init__()
        if impl_backend not in BACKENDS:
            raise ValueError(
                f"FusedLinearForPPO: impl_backend must be one of {', '.join(BACKENDS)}, got {impl_backend!r}"
            )
        self.chunk_size, self.impl_backend = chunk_size, impl_backend

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: Any = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Computes ``(log_probs, entropy)`` of ``input_ids`` from ``[..., H]`` and ``[V, H]``.

        Both are fp32 (fp64 for fp64), and the logits are not rounded; verl rounds them, and its entropy, to the dtype
        of the hidden states. ``temperature`` may be a tensor of one per token or per sequence, too.
        """
        return _of_head(hidden_states, vocab_weights, input_ids, temperature, self.chunk_size)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: Any = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:
    r"""Computes ``(logprobs, entropy)`` of each label from hidden states and the head: ``linear_token_stats``.

    Args:
        hidden: ``[..., H]``. weight: ``[V, H]``. labels: ``[...]``.
        temperature: a number, or a tensor of one per token or per sequence.
        reduction: ``"none"``; verl calls it with no other.
        dist_process_group: None, or a group of one process. The gradient of the hidden states is a share of the whole
            in verl's kernels, which its caller adds up, and the whole in ours.

    Returns:
        two tensors ``[N]``, one number per label, fp32 (fp64 for fp64), differentiable.

    Raises:
        ValueError: another ``reduction``, a process group of several ranks.

    Example:
        >>> linear_cross_entropy(torch.ones(1, 1, 2), torch.zeros(4, 2), torch.tensor([[3]]))
        (tensor([-1.3863]), tensor([1.3863]))

    verl 0.9, ``verl.utils.kernel.linear_cross_entropy``.
    """
    reason = outside_of_head(reduction, dist_process_group)
    if reason is not None:
        raise ValueError(f"linear_cross_entropy: {reason}; call verl's own function there")
    logprobs, entropy = _of_head(hidden, weight, labels, temperature, None)
    return logprobs.reshape(-1), entropy.reshape(-1)


def outside_of_head(reduction: str, dist_process_group: Any) -> str | None:
    """Returns why ``linear_cross_entropy`` does not serve a call, or None."""
    if reduction.lower() != "none":
        return f"reduction {reduction!r}, expected 'none'"
    if dist_process_group is not None and torch.distributed.get_world_size(dist_process_group) > 1:
        return "a head over several ranks, whose gradient of the hidden states verl's caller adds up itself"
    return None


def _of_head(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: Any, chunk_tokens: int | None
) -> tuple[Tensor, Tensor]:
    stats = linear_token_stats(
        hidden, weight, labels.long(), temperature=temperature, chunk_tokens=chunk_tokens, outputs=("entropy",)
    )
    return stats.logprobs, cast(Tensor, stats.entropy)
