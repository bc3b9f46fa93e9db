"""TRL's own names with TRL's signatures, each served by one public function of ours."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlkernels import checks
from rlkernels.linear.distillation_loss import linear_distillation_loss
from rlkernels.linear.token_stats import linear_token_stats
from rlkernels.logprobs import token_logprobs, token_stats
from rlkernels.types import Output

OUTPUTS: tuple[Output, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
MASKED = -(2**31)
"""The target of a masked row. No index of TRL means "ignore", so -100 raises as any id outside the vocabulary does."""


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """Computes the log-probabilities of ``index`` under ``softmax(logits / temperature)``.

    ``log p(y) = z_y - log sum_v exp(z_v)``, ``z = logits / temperature``.

    Args:
        logits: ``[..., V]``.
        index: ``[...]``, one id per row, or ``[..., K]``.
        row_mask: of the shape of ``index``; where it is 0 the row is not read and gives 0.

    Returns:
        Tensor of the shape of ``index``, fp32 (fp64 for fp64 logits). TRL's function rounds 16-bit logits to 16 bits.

    Raises:
        ValueError, TypeError: a temperature that is not positive; shapes or dtypes that do not fit.
        IndexError: on the CPU, an id outside of the vocabulary.

    Example:
        >>> selective_log_softmax(torch.tensor([[0.0, 1.0]]), torch.tensor([1]), temperature=0.5)
        tensor([-0.1269])
    """
    _positive("selective_log_softmax", temperature)
    targets = _masked("selective_log_softmax", index, row_mask)
    return token_logprobs(logits, targets, temperature=temperature, ignore_index=MASKED)


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """Computes the entropy of ``softmax(logits)`` in nats, ``-sum_v p_v log p_v``.

    A logit of -inf counts as a column that does not exist.

    Args:
        logits: ``[..., V]``.
        chunk_size: the rows that TRL's function works on at a time; ours needs no chunks, and its result is the same.

    Returns:
        Tensor ``[...]``, fp32 (fp64 for fp64 logits).

    Raises:
        ValueError, TypeError: as ``rlkernels.token_stats``.

    Example:
        >>> entropy_from_logits(torch.zeros(1, 4))
        tensor([1.3863])
    """
    checks.tensor("entropy_from_logits", "logits", logits)
    targets = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return _there(token_stats(logits, targets, outputs=("entropy",)).entropy)


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes both of the above in one pass over the logits, the entropy under the temperature, too.

    Args:
        logits, index, temperature, row_mask: as for ``selective_log_softmax``, with one id per row.
        entropy_requires_grad: whether the entropy carries a gradient.

    Returns:
        ``(logprobs, entropy)`` of the shape of ``index``, 0 where ``row_mask`` is 0.

    Raises:
        ValueError, TypeError, IndexError: as ``selective_log_softmax``.

    Example:
        >>> selective_log_softmax_and_entropy(torch.zeros(1, 4), torch.tensor([1]))
        (tensor([-1.3863]), tensor([1.3863]))
    """
    _positive("selective_log_softmax_and_entropy", temperature)
    targets = _masked("selective_log_softmax_and_entropy", index, row_mask)
    stats = token_stats(logits, targets, temperature=temperature, ignore_index=MASKED, outputs=("entropy",))
    entropy = _there(stats.entropy)
    return stats.logprobs, entropy if entropy_requires_grad else entropy.detach()


class FusedHeadOutput(NamedTuple):
    """The five outputs of ``ChunkedLogProbFunction.apply``, None for what was not asked."""

    logprobs: Tensor
    entropy: Tensor | None
    log_sum_sq_probs: Tensor | None
    mean_logits: Tensor | None
    is_top1: Tensor | None


class ChunkedLogProbFunction:
    """TRL's fused head under TRL's name: a namespace with ``apply``, whose result has a gradient."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: Sequence[str] = OUTPUTS,
        *,
        logits_dtype: torch.dtype | None = None,
    ) -> FusedHeadOutput:
        """Computes ``log softmax(softcap(scale (h W + b)) / T)`` of the targets, with TRL's four optional statistics.

        The head runs in the dtype of the hidden states, under autocast in the autocast dtype, as TRL's does.

        Args:
            hidden, weight, bias, targets: ``[N, H]``, ``[V, H]``, ``[V]`` or None, ``[N]``.
            chunk_size: TRL's tile along the vocabulary; our chunks run along the tokens, and the result depends on
                neither.
            logits_dtype: None keeps the fp32 sums of the matmul; ``torch.bfloat16`` rounds the logits as TRL does.

        Returns:
            ``(logprobs, entropy, log_sum_sq_probs, mean_logits, is_top1)``, None for what ``outputs`` does not name.
            Gradients flow through the first two.

        Raises:
            ValueError, TypeError, IndexError: as ``rlkernels.linear_token_stats``; a head without elements.

        Example:
            >>> hidden, weight = torch.ones(1, 2), torch.zeros(4, 2)
            >>> ChunkedLogProbFunction.apply(hidden, weight, None, torch.tensor([3]), 1.0, 32768).entropy
            tensor([1.3863])
        """
        gathered("weight", weight, hidden)
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            hidden = hidden.to(torch.get_autocast_dtype(device))
        # Outside autocast, because it would round the fp32 logits again.
        with torch.autocast(device, enabled=False):
            stats = linear_token_stats(
                hidden,
                weight.to(hidden.dtype),
                targets,
                bias=None if bias is None else bias.to(hidden.dtype),
                temperature=temperature,
                softcap=final_logit_softcapping,
                logit_scale=logit_scale,
                outputs=tuple(name for name in OUTPUTS if name in outputs),
                logits_dtype=logits_dtype or torch.float32,
            )
        # Statistics are detached, as TRL's are.
        found = (getattr(stats, name) if name in outputs else None for name in OUTPUTS)
        return FusedHeadOutput(stats.logprobs, *(x if x is None or x is stats.entropy else x.detach() for x in found))


class ChunkedDivergenceFunction:
    """TRL's distillation from two heads under TRL's name: a namespace with ``apply``, whose result has a gradient."""

    @staticmethod
    def apply(
        student_hidden: Tensor,
        student_weight: Tensor,
        student_bias: Tensor | None,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        teacher_bias: Tensor | None,
        beta: float,
        temperature: float = 1.0,
        student_logit_scale: float = 1.0,
        student_final_logit_softcapping: float | None = None,
        teacher_logit_scale: float = 1.0,
        teacher_final_logit_softcapping: float | None = None,
        *,
        logits_dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Computes the divergence of each token from the teacher, and the student's entropy without a gradient.

        ``beta`` 0: ``KL(q || p)``, the forward KL; 1: ``KL(p || q)``; between: the generalised JSD of
        ``rlkernels.token_divergences``; ``p`` the student's distribution and ``q`` the teacher's.

        Args:
            student_hidden, student_weight, student_bias: ``[N, H]``, ``[V, H]``, ``[V]`` or None.
            teacher_hidden, teacher_weight, teacher_bias: ``[N, H']``, ``[V, H']``, ``[V]`` or None, without gradient.
            logits_dtype: as for ``ChunkedLogProbFunction``, of both models.

        Returns:
            ``(divergence, entropy)``, ``[N]`` each, fp32. The first one is differentiable.

        Raises:
            ValueError, TypeError: as ``rlkernels.linear_distillation_loss``; a head without elements.

        Example:
            >>> student, teacher = torch.zeros(2, 3), torch.tensor([[0.0, 0.0], [2.0, 0.0]])
            >>> ChunkedDivergenceFunction.apply(torch.ones(1, 3), student, None, torch.ones(1, 2), teacher, None, 0.0)
            (tensor([0.3278]), tensor([0.6931]))
        """
        gathered("student_weight", student_weight, student_hidden)
        gathered("teacher_weight", teacher_weight, teacher_hidden)
        device = student_hidden.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            student_hidden, teacher_hidden = student_hidden.to(dtype), teacher_hidden.to(dtype)
        with torch.autocast(device, enabled=False):
            head = student_weight.to(student_hidden.dtype)
            bias = None if student_bias is None else student_bias.to(student_hidden.dtype)
            divergence = linear_distillation_loss(
                student_hidden,
                head,
                teacher_hidden.detach(),
                teacher_weight.detach().to(teacher_hidden.dtype),
                bias=bias,
                temperature=temperature,
                softcap=student_final_logit_softcapping,
                logit_scale=student_logit_scale,
                teacher_bias=None if teacher_bias is None else teacher_bias.detach().to(teacher_hidden.dtype),
                teacher_softcap=teacher_final_logit_softcapping,
                teacher_logit_scale=teacher_logit_scale,
                kind="jsd",  # TRL's numbering, in which 0 and 1 are the forward and the reverse KL
                beta=beta,
                logits_dtype=logits_dtype or torch.float32,
                reduction="none",
            )
            with torch.no_grad():
                entropy = linear_token_stats(
                    student_hidden,
                    head,
                    torch.zeros(student_hidden.shape[:-1], dtype=torch.int64, device=student_hidden.device),
                    bias=bias,
                    temperature=temperature,
                    softcap=student_final_logit_softcapping,
                    logit_scale=student_logit_scale,
                    outputs=("entropy",),
                    logits_dtype=logits_dtype or torch.float32,
                ).entropy
        return divergence, _there(entropy)


def gathered(name: str, weight: Tensor, hidden: Tensor) -> None:
    """Raises ValueError for a head that ZeRO-3 has sharded, which then has no elements."""
    if weight.numel() == 0 and hidden.shape[-1] != 0:
        expected = f"[V, {hidden.shape[-1]}]"
        raise ValueError(
            f"{name} must have shape {expected}, got {tuple(weight.shape)}: gather the sharded head before the call"
        )


def _there(x: Tensor | None) -> Tensor:
    assert x is not None
    return x


def _positive(caller: str, temperature: float) -> None:
    if not isinstance(temperature, Tensor) and temperature <= 0:
        raise ValueError(f"{caller}: temperature must be positive, got {temperature}")


def _masked(caller: str, index: Tensor, row_mask: Tensor | None) -> Tensor:
    if row_mask is None:
        return index
    if row_mask.shape != index.shape:
        raise ValueError(
            f"{caller}: row_mask must have the shape of index, {tuple(index.shape)}, got {tuple(row_mask.shape)}"
        )
    return index.masked_fill(row_mask == 0, MASKED)
