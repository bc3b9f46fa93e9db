"""Divergences of a student from a teacher over the whole vocabulary: knowledge distillation, and exact KL penalties."""

from typing import Literal, NamedTuple, get_args, overload

import torch
from torch import Tensor

from rlkernels import checks, ops
from rlkernels.backends.protocol import RowBatch
from rlkernels.checks import tokens as checks_tokens
from rlkernels.logits_layout import FlatLogits, flatten_logits, matrix
from rlkernels.losses.sft import mean_where_read
from rlkernels.losses.token_weights import live_tokens, loss_weights, losses_of_tokens, summed
from rlkernels.packed_rows import takes_one_row
from rlkernels.tracing import replaced
from rlkernels.types import (
    Aggregation,
    DivergenceKind,
    Logits,
    Mask,
    Metrics,
    Normalizers,
    Offsets,
    PerToken,
    PolicyReduction,
    Scalar,
    TeacherTopk,
    Temperature,
    VocabMask,
)

KINDS = get_args(DivergenceKind)
DEAD = -100


class Compared(NamedTuple):
    """Rows of a student that passed the checks, and their teacher.

    ``live``: bool, of the caller's shape. ``like``: a tensor of that shape and of the dtype of results.
    """

    flat: FlatLogits
    teacher: ops.Teacher
    live: Tensor
    like: Tensor


def token_divergences(
    logits: Logits,
    teacher_logits: Logits | None = None,
    mask: Mask | None = None,
    *,
    kind: DivergenceKind = "forward_kl",
    beta: float = 0.5,
    teacher_topk: TeacherTopk | None = None,
    temperature: Temperature = 1.0,
    vocab_mask: VocabMask | None = None,
) -> PerToken:
    r"""Computes the divergence of each token's distribution from a teacher's, over the whole vocabulary.

    With ``p = softmax(logits / T)`` and ``q = softmax(teacher_logits / T)``:

    - ``"forward_kl"``: ``KL(q || p) = sum_v q_v (log q_v - log p_v)``; Hinton et al. 2015, arXiv:1503.02531.
    - ``"reverse_kl"``: ``KL(p || q) = sum_v p_v (log p_v - log q_v)``.
    - ``"jsd"``: ``beta KL(q || m) + (1 - beta) KL(p || m)``, ``m = (1 - beta) p + beta q``; Agarwal et al. 2023,
      arXiv:2306.13649 (GKD).
    - ``"cross_entropy"``: ``-sum_v q_v log p_v``, the forward KL plus the teacher's entropy; ``KDLoss`` of OpenRLHF.

    Args:
        logits: ``[..., V]`` of the student; the only argument that gets a gradient.
        teacher_logits: ``[..., V']``, same dtype. Columns beyond the smaller of ``V`` and ``V'`` are padding of one
            vocabulary: they are left out of both distributions.
        mask: live tokens, shaped like the rows. A dead token's row is never read in either model; its divergence is 0.
        kind, beta: as above. ``beta`` belongs to ``"jsd"``. In TRL's numbering 0 is the forward KL, 1 the reverse KL,
            and a number between is the JSD; ``kind="jsd"`` takes all of them. The JSD of Jensen and Shannon is 0.5.
        teacher_topk: ``(ids, logprobs)``, ``[..., K]`` each, in place of ``teacher_logits``: the teacher's likeliest
            tokens under the temperature ``T``. All other tokens count as one outcome, with the mass that is left in
            each distribution: 1 less the sum over the ids, 1.2e-7 (2.2e-16 in fp64) at the least and no more exact
            than that. So where the student leaves less than 1e-6 to all other tokens, their gradient is some per cent
            off in fp32, and it fades below 1e-7. Entries of log-probability -inf are not used; their ids must be
            tokens, too.
        temperature: ``T``, of both models; a number, or one per row, as for ``token_logprobs``. The value is not
            multiplied by ``T**2``.
        vocab_mask: bool ``[V]`` or ``[..., V]``, True keeps a column, in both models; not with ``teacher_topk``.

    Returns:
        Tensor ``[...]``, fp32 (fp64 for fp64 logits), differentiable once. The forward reads each row of both models
        once, and so does the backward, which writes the gradient.

    Raises:
        TypeError, ValueError, RuntimeError: wrong type, dtype, shape or device; neither or both teachers; a teacher
            that requires a gradient.
        IndexError: on the CPU, an id of a live token outside ``[0, V)``.

    Example:
        >>> teacher = torch.tensor([[0.0, 0.0], [0.0, 2.0]])
        >>> token_divergences(torch.zeros(2, 2), teacher)
        tensor([0.0000, 0.3278])
    """
    of = compared("token_divergences", logits, teacher_logits, teacher_topk, mask, kind, beta, temperature, vocab_mask)
    return _values(of, logits).view(of.flat.shape)


@overload
def divergence_loss(
    logits: Logits,
    teacher_logits: Logits | None = None,
    mask: Mask | None = None,
    *,
    kind: DivergenceKind = "forward_kl",
    beta: float = 0.5,
    teacher_topk: TeacherTopk | None = None,
    temperature: Temperature = 1.0,
    vocab_mask: VocabMask | None = None,
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    cu_seqlens: Offsets | None = None,
    normalizers: Normalizers | None = None,
    reduction: PolicyReduction = "aggregation",
    return_metrics: Literal[False] = False,
) -> Scalar: ...


@overload
def divergence_loss(
    logits: Logits,
    teacher_logits: Logits | None = None,
    mask: Mask | None = None,
    *,
    kind: DivergenceKind = "forward_kl",
    beta: float = 0.5,
    teacher_topk: TeacherTopk | None = None,
    temperature: Temperature = 1.0,
    vocab_mask: VocabMask | None = None,
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    cu_seqlens: Offsets | None = None,
    normalizers: Normalizers | None = None,
    reduction: PolicyReduction = "aggregation",
    return_metrics: Literal[True],
) -> tuple[Scalar, Metrics]: ...


@overload
def divergence_loss(
    logits: Logits,
    teacher_logits: Logits | None = None,
    mask: Mask | None = None,
    *,
    kind: DivergenceKind = "forward_kl",
    beta: float = 0.5,
    teacher_topk: TeacherTopk | None = None,
    temperature: Temperature = 1.0,
    vocab_mask: VocabMask | None = None,
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    cu_seqlens: Offsets | None = None,
    normalizers: Normalizers | None = None,
    reduction: PolicyReduction = "aggregation",
    return_metrics: bool,
) -> Scalar | tuple[Scalar, Metrics]: ...


@takes_one_row(2, per_token=True)
def divergence_loss(
    logits: Logits,
    teacher_logits: Logits | None = None,
    mask: Mask | None = None,
    *,
    kind: DivergenceKind = "forward_kl",
    beta: float = 0.5,
    teacher_topk: TeacherTopk | None = None,
    temperature: Temperature = 1.0,
    vocab_mask: VocabMask | None = None,
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    cu_seqlens: Offsets | None = None,
    normalizers: Normalizers | None = None,
    reduction: PolicyReduction = "aggregation",
    return_metrics: bool = False,
) -> Scalar | tuple[Scalar, Metrics]:
    r"""Computes a distillation loss: the weighted sum of the divergences of tokens from a teacher's distributions.

    ``sum_t w_t D(p_t, q_t)``, ``w`` the aggregation's weights, ``D`` of ``token_divergences``. Value and gradient are
    made in one pass over the rows of both models.

    Args:
        logits, teacher_logits, kind, beta, teacher_topk, temperature, vocab_mask: as for ``token_divergences``;
            ``[B, L, V]``, or packed ``[T, V]``.
        mask: live tokens, ``[B, L]`` or ``[T]``. A dead token's row is never read. None alive: the loss is 0, its
            gradient too.
        aggregation, normalizers, weights, cu_seqlens, reduction: as for ``policy_loss``; ``"none"`` is
            ``token_divergences``.

    Returns:
        Scalar, or one number per token, fp32 (fp64 for fp64 logits); with ``return_metrics``, ``(loss, {"divergence":
        ...})``, the mean over the tokens whose weight is not 0.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as ``token_divergences``; unknown names, shapes that do not
            match, two sources of weights.

    Example:
        >>> teacher = torch.tensor([[[0.0, 0.0], [0.0, 2.0]]])
        >>> round(divergence_loss(torch.zeros(1, 2, 2), teacher, kind="jsd").item(), 4)
        0.0448
    """
    caller = "divergence_loss"
    checks.flags(caller, return_metrics=return_metrics)
    of = compared(caller, logits, teacher_logits, teacher_topk, mask, kind, beta, temperature, vocab_mask)
    if not of.flat.shape:
        raise ValueError(
            f"{caller}: logits has shape {tuple(logits.shape)}, expected [T, V] or [B, L, V]; unsqueeze the one row"
        )
    cu_seqlens = checks_tokens.rows(caller, "logits without its last dimension", of.like, cu_seqlens, mask)
    if not summed(caller, reduction):
        losses_of_tokens(caller, of.live, aggregation, weights, normalizers)
        loss = _values(of, logits).view(of.flat.shape)
        return (loss, divergence_metrics(loss, of.live.to(loss.dtype))) if return_metrics else loss
    weight = of.flat.per_row(loss_weights(caller, of.like, of.live, aggregation, weights, cu_seqlens, normalizers))
    with_grad = torch.is_grad_enabled() and logits.requires_grad and not torch.compiler.is_compiling()
    rows = of.flat.without(weight == 0).rows
    loss, values = ops.divergences(rows, of.teacher, weight, with_grad, ops.serving("divergence", logits))
    return (loss, divergence_metrics(values, weight)) if return_metrics else loss


def _values(of: Compared, logits: Logits) -> Tensor:
    """Computes the divergence of each row, ``[T]``, differentiable."""
    return ops.divergences(of.flat.rows, of.teacher, None, False, ops.serving("divergence", logits)).value


def divergence_metrics(values: Tensor, weight: Tensor) -> Metrics:
    """Computes the mean divergence of the tokens whose weight is not 0."""
    return {"divergence": mean_where_read(values, weight)}


def compared(
    caller: str,
    logits: Logits,
    teacher_logits: Logits | None,
    teacher_topk: TeacherTopk | None,
    mask: Mask | None,
    kind: DivergenceKind,
    beta: float,
    temperature: Temperature,
    vocab_mask: VocabMask | None,
) -> Compared:
    """Checks the arguments of a divergence and lays them out."""
    checks.logits(caller, logits)
    one_teacher(caller, "teacher_logits", teacher_logits, teacher_topk)
    ids = logprobs = None
    if teacher_topk is not None:
        if vocab_mask is not None:
            raise ValueError(
                f"{caller}: vocab_mask and teacher_topk exclude each other, because nobody knows the teacher's mass "
                "outside of the mask; pass teacher_logits"
            )
        shape, vocab = logits.shape[:-1], logits.shape[-1]
    else:
        checks.logits(caller, teacher_logits, "teacher_logits")
        if teacher_logits.shape[:-1] != logits.shape[:-1]:
            raise ValueError(
                f"{caller}: teacher_logits has shape {tuple(teacher_logits.shape)}, logits {tuple(logits.shape)}; "
                "expected the same shape, the vocabulary apart"
            )
        if teacher_logits.dtype != logits.dtype:
            raise TypeError(
                f"{caller}: teacher_logits has dtype {teacher_logits.dtype}, logits {logits.dtype}; cast one of them"
            )
        checks.no_gradient(caller, teacher_logits=teacher_logits)
        checks.one_device(caller, "logits", logits, teacher_logits=teacher_logits)
        vocab = min(logits.shape[-1], teacher_logits.shape[-1])
        if isinstance(vocab_mask, Tensor) and vocab_mask.shape[-1:] == logits.shape[-1:]:
            vocab_mask = vocab_mask[..., :vocab]
        logits, teacher_logits = logits[..., :vocab], teacher_logits[..., :vocab]
        shape = logits.shape[:-1]
    targets = torch.zeros(shape, dtype=torch.int64, device=logits.device)
    flat = flatten_logits(caller, logits, targets, temperature, DEAD, vocab_mask)
    like = targets.new_empty(shape, dtype=flat.real)
    live = live_tokens(caller, like, mask)
    if teacher_topk is not None:
        ids, logprobs = topk(caller, teacher_topk, live, vocab, like)
    teacher = ops.Teacher(ids, logprobs, *kind_and_beta(caller, kind, beta))
    flat = flat.without(~live)
    rows = RowBatch(*flat.rows[:5], None if teacher_logits is None else matrix(teacher_logits))
    return Compared(replaced(flat, rows=rows), teacher, live, like)


def one_teacher(caller: str, name: str, teacher: Tensor | None, teacher_topk: TeacherTopk | None) -> None:
    """Raises unless exactly one of the two forms of a teacher was passed; ``name``: that of the first form."""
    if (teacher is None) == (teacher_topk is None):
        raise ValueError(
            f"{caller}: got {'neither' if teacher is None else 'both'} {name} {'nor' if teacher is None else 'and'} "
            "teacher_topk; pass one of them"
        )


def kind_and_beta(caller: str, kind: DivergenceKind, beta: float) -> tuple[DivergenceKind, float]:
    """Checks a kind and the ``beta`` of a JSD, of which 0 and 1 are the forward and the reverse KL, as in TRL."""
    checks.choice(caller, "kind", kind, KINDS)
    beta = checks.real(caller, "beta", beta)
    if not 0.0 <= beta <= 1.0:
        raise ValueError(f"{caller}: beta must be in [0, 1], got {beta}")
    if kind != "jsd":
        if beta != 0.5:
            raise ValueError(f"{caller}: beta={beta} belongs to kind='jsd', got kind={kind!r}; leave it out")
        return kind, beta
    return ("forward_kl", 0.5) if beta == 0.0 else ("reverse_kl", 0.5) if beta == 1.0 else (kind, beta)


def topk(caller: str, teacher_topk: TeacherTopk, live: Tensor, vocab: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Checks a teacher's likeliest tokens and returns them as ``[T, K]`` each; entries of dead tokens are replaced.

    The host looks at ids where that is free.
    """
    if not isinstance(teacher_topk, (tuple, list)) or len(teacher_topk) != 2:
        raise TypeError(f"{caller}: teacher_topk must be (ids, logprobs), got {type(teacher_topk).__name__}")
    ids, logprobs = teacher_topk
    checks.tensor(caller, "ids of teacher_topk", ids)
    checks.readable(caller, "ids of teacher_topk", ids)
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{caller}: ids of teacher_topk must be int32 or int64, got {ids.dtype}")
    checks.floating(caller, "logprobs of teacher_topk", logprobs)
    if ids.dim() != live.dim() + 1 or ids.shape[:-1] != live.shape or ids.shape[-1] == 0:
        raise ValueError(
            f"{caller}: ids of teacher_topk has shape {tuple(ids.shape)}, expected {(*live.shape, 'K')} with K at "
            "least 1"
        )
    checks.shape(caller, "logprobs of teacher_topk", logprobs, ids.shape)
    checks.one_device(caller, "logits", like, **{"ids of teacher_topk": ids, "logprobs of teacher_topk": logprobs})
    checks.no_gradient(caller, **{"logprobs of teacher_topk": logprobs})
    dead = ~live.reshape(-1, 1)
    ids = ids.reshape(-1, ids.shape[-1]).long().masked_fill(dead, 0)
    logprobs = logprobs.reshape(ids.shape).to(like.dtype).masked_fill(dead, -torch.inf)
    if checks.host_reads(ids):
        _read_topk(caller, ids, logprobs, vocab)
    # One that is NaN would pass for an entry that is not used, so that it becomes one that no row can hide.
    logprobs = logprobs.masked_fill(logprobs.isnan(), torch.inf)
    return ids.contiguous(), logprobs.contiguous()


def _read_topk(caller: str, ids: Tensor, logprobs: Tensor, vocab: int) -> None:
    bad = (ids < 0) | (ids >= vocab)
    if bad.any():
        row = int(bad.any(-1).nonzero()[0, 0])
        raise IndexError(
            f"{caller}: id {int(ids[row][bad[row]][0])} of teacher_topk at row {row} is outside [0, {vocab})"
        )
    # An unused entry gets an id of its own, because its id may be that of another entry.
    used = torch.where(logprobs > -torch.inf, ids, -1 - torch.arange(ids.shape[1], device=ids.device)).sort(-1).values
    twice = (used[:, 1:] == used[:, :-1]).any(-1)
    if twice.any():
        raise ValueError(f"{caller}: ids of teacher_topk hold one id twice at row {int(twice.nonzero()[0, 0])}")
    wrong = ~(logprobs <= 0)
    if wrong.any():
        raise ValueError(
            f"{caller}: logprobs of teacher_topk hold {logprobs[wrong][0].item()}, expected log-probabilities, which "
            "are 0 at most"
        )
