"""Process reward models: the loss of labels at the ends of steps, and a solution's score from those of its steps."""

from typing import Any, Literal, get_args, overload

import torch
from torch import Tensor

from rlkernels import checks, ops
from rlkernels.backends.protocol import real_dtype
from rlkernels.checks import tokens as checks_tokens
from rlkernels.logits_layout import dense, flatten_logits
from rlkernels.logprobs import shaped
from rlkernels.losses.token_weights import (
    TokenWeights,
    counted_tokens,
    full_mask,
    live_mask,
    loss_weights,
    losses_of_tokens,
    summed,
    token_weights_of,
)
from rlkernels.losses.weighted_sum import weighted_sum
from rlkernels.packed_rows import takes_one_row
from rlkernels.sequences import result_dtype, segment_reduce, token_counts
from rlkernels.types import (
    Aggregation,
    Logits,
    Mask,
    Metrics,
    Normalizers,
    Offsets,
    PerSequence,
    PerToken,
    PolicyReduction,
    Scalar,
    StepLabels,
    StepReduction,
    TokenIds,
    VocabIds,
)

STEP_REDUCTIONS = get_args(StepReduction)
UNKNOWN, IGNORED = -1, -100
"""The column of a label that is no reward token, which every backend refuses, and that of an ignored label."""


@overload
def process_reward_loss(
    logits: Logits,
    labels: StepLabels,
    input_ids: TokenIds | None = None,
    placeholder_id: int | None = None,
    *,
    mask: Mask | None = None,
    reward_token_ids: VocabIds | None = None,
    ignore_index: int = -100,
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    cu_seqlens: Offsets | None = None,
    normalizers: Normalizers | None = None,
    reduction: PolicyReduction = "aggregation",
    return_metrics: Literal[False] = False,
) -> Scalar: ...


@overload
def process_reward_loss(
    logits: Logits,
    labels: StepLabels,
    input_ids: TokenIds | None = None,
    placeholder_id: int | None = None,
    *,
    mask: Mask | None = None,
    reward_token_ids: VocabIds | None = None,
    ignore_index: int = -100,
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    cu_seqlens: Offsets | None = None,
    normalizers: Normalizers | None = None,
    reduction: PolicyReduction = "aggregation",
    return_metrics: Literal[True],
) -> tuple[Scalar, Metrics]: ...


@overload
def process_reward_loss(
    logits: Logits,
    labels: StepLabels,
    input_ids: TokenIds | None = None,
    placeholder_id: int | None = None,
    *,
    mask: Mask | None = None,
    reward_token_ids: VocabIds | None = None,
    ignore_index: int = -100,
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    cu_seqlens: Offsets | None = None,
    normalizers: Normalizers | None = None,
    reduction: PolicyReduction = "aggregation",
    return_metrics: bool,
) -> Scalar | tuple[Scalar, Metrics]: ...


@takes_one_row(2, per_token=True)
def process_reward_loss(
    logits: Logits,
    labels: StepLabels,
    input_ids: TokenIds | None = None,
    placeholder_id: int | None = None,
    *,
    mask: Mask | None = None,
    reward_token_ids: VocabIds | None = None,
    ignore_index: int = -100,
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    cu_seqlens: Offsets | None = None,
    normalizers: Normalizers | None = None,
    reduction: PolicyReduction = "aggregation",
    return_metrics: bool = False,
) -> Scalar | tuple[Scalar, Metrics]:
    r"""Computes the cross-entropy of a process reward model at the ends of steps; only the rows of logits that score
    are read.

    Hard labels: ``-log pi(y_t)`` over the whole vocabulary, or over the columns of ``reward_token_ids``. Soft labels:
    ``-p_t log pi(a) - (1 - p_t) log pi(b)`` over two columns, ``a`` the first reward token. The loss is their weighted
    sum, by default the mean over the live steps.

    Args:
        logits: ``[B, L, V]``, or packed ``[T, V]``; the row **at** a step's end scores it: nothing is shifted here.
        labels: ``[B, L]`` or ``[T]``. Integers are token ids ``y``. Floats are soft labels ``p``, the chance from 0 to
            1 that the step is good.
        input_ids, placeholder_id: token ids, shaped like ``labels``, and the one that ends a step. Without them every
            live label scores.
        mask: live tokens, shaped like ``labels``. A dead token's row and label are not read.
        reward_token_ids: the ids of the vocabulary columns that compete, all different; a list, or integers ``[K]``.
            Soft labels need two of them. None: all columns compete.
        ignore_index: a token with this label is dead, be the labels hard or soft.
        aggregation, weights, cu_seqlens, normalizers, reduction: as for ``policy_loss``; with ``"none"`` 0 where no
            step ends.

    Returns:
        Scalar, or one number per token, fp32 (fp64 for fp64 logits); no live step gives 0. With ``return_metrics``,
        ``(loss, {"accuracy": ...})``, the share of the steps whose largest column is the label's; of a soft label that
        is the first column from 0.5 on. A placeholder whose label is ignored counts as a miss, as in OpenRLHF.

    Raises:
        ValueError: shapes that do not match; ``input_ids`` without ``placeholder_id``; soft labels without two reward
            tokens; reward tokens that repeat or lie outside of the vocabulary. On a CPU also a live label that is no
            reward token, or no number from 0 to 1.
        IndexError: on a CPU, a live label outside of the vocabulary.
        TypeError: wrong dtypes.

    Example:
        >>> logits, ids = torch.tensor([[[0.0, 2.0, 1.0], [0.5, 0.0, 0.0]]]), torch.tensor([[9, 5]])
        >>> process_reward_loss(logits, torch.tensor([[1, -100]]), ids, 9, reward_token_ids=(1, 2))
        tensor(0.3133)
        >>> process_reward_loss(logits, torch.tensor([[0.25, -100.0]]), ids, 9, reward_token_ids=(1, 2))
        tensor(1.0633)

    Lightman et al. 2023, arXiv:2305.20050 (hard labels); Wang et al. 2023, arXiv:2312.08935 (soft ones).
    """
    caller = "process_reward_loss"
    checks.flags(caller, return_metrics=return_metrics)
    checks.logits(caller, logits)
    shape = logits.shape[:-1]
    if not shape:
        raise ValueError(
            f"{caller}: logits has shape {tuple(logits.shape)}, expected [T, V] or [B, L, V]; unsqueeze the one row"
        )
    soft = _is_soft(caller, labels, shape)
    ignore_index = checks.integer(caller, "ignore_index", ignore_index)
    columns = None if reward_token_ids is None else _columns(caller, logits, reward_token_ids)
    if soft and (columns is None or columns.shape[0] != 2):
        raise ValueError(
            f"{caller}: labels has dtype {labels.dtype}: soft labels need two reward_token_ids, the good one first; "
            f"got {'None' if columns is None else columns.shape[0]}"
        )
    checks.no_forward_ad(caller, logits)
    like = labels.new_empty(shape, dtype=real_dtype(logits.dtype))
    cu_seqlens = checks_tokens.rows(caller, "labels", labels, cu_seqlens, mask)
    steps = full_mask(like, live_mask(caller, like, mask)) & _scoring(caller, labels, input_ids, placeholder_id)
    live = steps & ((labels.double() if soft else labels.long()) != ignore_index)
    steps = live if input_ids is None else steps
    checks.one_device(caller, "logits", logits, labels=labels)
    given = aggregation, weights, cu_seqlens, normalizers
    each = None
    if not summed(caller, reduction):
        each = losses_of_tokens(caller, live, aggregation, weights, normalizers)
    if soft:
        pair = logits.index_select(-1, columns)
        return _soft_loss(caller, pair, labels, live, given, each is not None, steps if return_metrics else None)
    targets = labels.long()
    if columns is not None:
        logits, targets, ignore_index = (
            logits.index_select(-1, columns),
            _column_of(caller, targets, columns, live),
            IGNORED,
        )
    flat = flatten_logits(caller, logits, torch.where(live, targets, ignore_index), 1.0, ignore_index, None)
    wanted = ops.FLAGS["is_top1"] if return_metrics else 0
    stats = ops.token_stats(flat.rows, wanted, False, ops.serving("token_stats", logits))
    token_weights = token_weights_of(caller, like, live, *given) if each is None else each
    loss = weighted_sum("nll", shaped(stats.logp, shape), [], (), token_weights)
    if not return_metrics:
        return loss
    steps = counted_tokens(steps, weights)
    return loss, _accuracy(stats.is_top1.view(shape) & live & steps, steps, loss.dtype)


def _is_soft(caller: str, labels: Tensor, shape: torch.Size) -> bool:
    """Checks the labels and tells whether they are soft."""
    checks.tensor(caller, "labels", labels)
    if labels.dtype not in (*checks.FLOATS, torch.int32, torch.int64):
        raise TypeError(
            f"{caller}: labels has dtype {labels.dtype}; hard labels are int32 or int64, soft ones {checks.FLOAT_NAMES}"
        )
    checks.shape(caller, "labels", labels, shape)
    checks.no_gradient(caller, labels=labels)
    return labels.dtype.is_floating_point


def _columns(caller: str, logits: Logits, reward_token_ids: VocabIds) -> Tensor:
    """Returns the reward tokens as int64 on the device of the logits."""
    name, vocab = "reward_token_ids", logits.shape[-1]
    if isinstance(reward_token_ids, (list, tuple)):
        reward_token_ids = torch.tensor(
            [checks.integer(caller, name, x) for x in reward_token_ids], dtype=torch.int64, device="cpu"
        )
    else:
        checks.tensor(caller, name, reward_token_ids)
        checks_tokens.ids(caller, name, reward_token_ids, (reward_token_ids.numel(),))
        checks.readable(caller, name, reward_token_ids)
    if reward_token_ids.numel() == 0:
        raise ValueError(f"{caller}: {name} is empty; name the columns that compete, or pass None for all")
    if checks.host_reads(reward_token_ids):
        ids = reward_token_ids.tolist()
        if len(set(ids)) < len(ids) or not all(0 <= x < vocab for x in ids):
            raise ValueError(f"{caller}: {name} must be different ids in [0, {vocab}), got {ids}")
    return reward_token_ids.to(logits.device, torch.int64).clamp(0, vocab - 1)


def _scoring(caller: str, labels: Tensor, input_ids: TokenIds | None, placeholder_id: int | None) -> Tensor:
    """Returns the mask of the tokens that end a step: those with the placeholder's id, or all."""
    if (input_ids is None) != (placeholder_id is None):
        given, other = ("placeholder_id", "input_ids") if input_ids is None else ("input_ids", "placeholder_id")
        raise ValueError(f"{caller}: {given} needs {other}: both together say where steps end")
    if input_ids is None:
        return torch.ones_like(labels, dtype=torch.bool, memory_format=torch.contiguous_format)
    checks_tokens.ids(caller, "input_ids", input_ids, labels.shape)
    checks.one_device(caller, "labels", labels, input_ids=input_ids)
    return input_ids.long() == checks.integer(caller, "placeholder_id", placeholder_id)


def _column_of(caller: str, labels: Tensor, columns: Tensor, live: Tensor) -> Tensor:
    """Returns the place of each label among the reward tokens; a live one that has none is refused."""
    same = labels.unsqueeze(-1) == columns
    found = same.any(-1)
    lost = live & ~found
    if checks.host_reads(lost) and lost.any():
        raise ValueError(
            f"{caller}: labels holds {labels[lost][0].item()}, expected one of reward_token_ids, {columns.tolist()}"
        )
    return torch.where(found, same.to(torch.uint8).argmax(-1), UNKNOWN)


def _soft_loss(
    caller: str, logits: Tensor, labels: Tensor, live: Tensor, given: tuple[Any, ...], apart: bool, steps: Tensor | None
) -> Scalar | tuple[Scalar, Metrics]:
    """Computes the loss of soft labels: of two columns it is the pairwise loss, both ways round.

    ``apart``: nothing is summed. ``steps``: those that the accuracy counts where they have a weight; None: no metrics.
    """
    real = real_dtype(logits.dtype)
    good, bad = (dense(x, real) for x in logits.unbind(-1))
    share = torch.where(live, labels.to(real), 0.0)
    wrong = ~((share >= 0) & (share <= 1))
    if checks.host_reads(wrong) and wrong.any():
        raise ValueError(f"{caller}: labels holds {share[wrong][0].item()}, expected soft labels from 0 to 1")
    weights = live.to(real) if apart else loss_weights(caller, share, live, *given)
    serving = ops.serving("weighted_loss", good)
    terms = [
        weighted_sum("pairwise", first - minus, [], (), TokenWeights(weight, each=True))
        if apart
        else ops.weighted_loss("pairwise", first, minus, None, [], (), weight.contiguous(), None, 1.0, serving)[0]
        for first, minus, weight in (
            (good, bad, weights * share),
            (bad, good, torch.where(live, weights * (1.0 - share), 0.0)),
        )
    ]
    loss = terms[0] + terms[1]
    if steps is None:
        return loss
    steps = counted_tokens(steps, given[1])
    return loss, _accuracy(live & steps & ((good.detach() >= bad.detach()) == (share >= 0.5)), steps, real)


def _accuracy(right: Tensor, steps: Tensor, dtype: torch.dtype) -> Metrics:
    return {"accuracy": right.sum().to(dtype) / steps.sum().clamp(min=1)}


@takes_one_row()
def solution_scores(
    step_scores: PerToken, mask: Mask | None = None, *, kind: StepReduction = "min", cu_seqlens: Offsets | None = None
) -> PerSequence:
    r"""Reduces the scores of a solution's steps to the score of the solution.

    ``"min"``: ``min_t s_t``; ``"product"``: ``prod_t s_t``, the chance that every step is good.

    Args:
        step_scores: ``s``, one per step: ``[..., L]``, or packed ``[N]`` with ``cu_seqlens``; any float dtype.
        mask: live steps, any pattern. What a dead step holds is not looked at.

    Returns:
        ``[...]``, or ``[S]`` when packed: float32, float64 for float64; not differentiable. A solution without a step
        scores 1.

    Raises:
        TypeError: ``step_scores`` or ``mask`` of a wrong dtype.
        ValueError: shapes differ, ``cu_seqlens`` does not cover the steps, or an unknown ``kind``.

    Example:
        >>> solution_scores(torch.tensor([0.9, 0.2, 0.7, 0.5]), cu_seqlens=torch.tensor([0, 3, 3, 4]))
        tensor([0.2000, 1.0000, 0.5000])
        >>> solution_scores(torch.tensor([[0.9, 0.5, 0.1]]), torch.tensor([[1, 1, 0]]), kind="product")
        tensor([0.4500])

    Lightman et al. 2023, arXiv:2305.20050 (product); Wang et al. 2023, arXiv:2312.08935 (minimum).
    """
    caller = "solution_scores"
    checks.floating(caller, "step_scores", step_scores)
    checks.choice(caller, "kind", kind, STEP_REDUCTIONS)
    offsets = checks_tokens.rows(caller, "step_scores", step_scores, cu_seqlens, mask)
    checks.mask(caller, mask, step_scores.shape)
    checks.one_device(caller, "step_scores", step_scores, mask=mask)
    checks.no_forward_ad(caller, step_scores)
    live = torch.ones_like(step_scores, dtype=torch.bool) if mask is None else mask != 0
    # No step is 1 in a product, and no number is larger than infinity in a minimum.
    none = 1.0 if kind == "product" else torch.inf
    scores = torch.where(live, step_scores.detach().double(), none)
    if offsets is not None:
        found = segment_reduce(scores, offsets, "prod" if kind == "product" else kind, none)
    elif kind == "product":
        found = scores.prod(-1)
    else:
        # One more column, because there is no minimum over none.
        found = torch.cat([scores, scores.new_full((*scores.shape[:-1], 1), none)], -1).amin(-1)
    return torch.where(token_counts(live, offsets) == 0, 1.0, found).to(result_dtype(step_scores))
