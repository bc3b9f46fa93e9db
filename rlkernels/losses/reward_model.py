"""Reward models: the pairwise loss, and the head that reads one hidden state per sequence."""

import torch
from torch import Tensor

from rlkernels import checks, ops
from rlkernels.backends.protocol import real_dtype
from rlkernels.checks import tokens as checks_tokens
from rlkernels.logits_layout import dense
from rlkernels.losses.policy_arguments import present
from rlkernels.sequences import last_live_index
from rlkernels.types import (
    HiddenStates,
    Mask,
    Number,
    Offsets,
    PerPair,
    PerSequence,
    RewardHeadBias,
    RewardHeadWeight,
    Scalar,
)


def pairwise_reward_loss(
    chosen: PerPair, rejected: PerPair, *, margin: PerPair | None = None, center_coef: Number = 0.0
) -> Scalar:
    r"""Bradley-Terry loss of a reward model.

    One launch each way for fp32 scores without centring.

    ``mean_i softplus(-(c_i - q_i - g_i)) + center_coef mean_i (c_i + q_i)^2``; finite for every finite difference
    (-1e4 gives 1e4, +1e4 gives 0). No pair gives 0.

    Args:
        chosen, rejected: scores ``c``, ``q``, one per pair, any equal shape and float dtype.
        margin: ``g``, how much better the chosen answer is; same shape, differentiable where it requires a gradient.
        center_coef: weight of the term that keeps the scores around 0.

    Returns:
        Scalar, fp32 (fp64 for fp64 scores).

    Raises:
        ValueError: unequal numbers of pairs.

    Example:
        >>> chosen = torch.tensor([1.0, 0.0], requires_grad=True)
        >>> loss = pairwise_reward_loss(chosen, torch.tensor([0.0, 0.0]))
        >>> loss.backward()
        >>> round(loss.item(), 4), chosen.grad
        (0.5032, tensor([-0.1345, -0.2500]))

    Ouyang et al. 2022, arXiv:2203.02155, eq. 1; margin: Touvron et al. 2023, arXiv:2307.09288; centring: Eisenstein et
    al. 2023, arXiv:2312.09244.
    """
    caller = "pairwise_reward_loss"
    checks.pairs(caller, chosen, rejected)
    center_coef = checks.coefficient(checks.finite, caller, "center_coef", center_coef, chosen)
    if margin is not None:
        checks.floating(caller, "margin", margin)
        checks.shape(caller, "margin", margin, chosen.shape)
        checks.one_device(caller, "chosen", chosen, margin=margin)
    checks.no_forward_ad(caller, chosen, rejected, margin)
    real = torch.float64 if torch.float64 in (chosen.dtype, rejected.dtype) else torch.float32
    chosen, rejected, margin = (
        dense(chosen, real),
        dense(rejected, real),
        None if margin is None else dense(margin, real),
    )
    loss, _ = ops.weighted_loss(
        "pairwise",
        chosen,
        rejected,
        margin,
        [],
        (),
        None,
        None,
        1.0 / max(chosen.numel(), 1),
        ops.serving("weighted_loss", chosen),
    )
    if not present(center_coef):
        return loss
    total = chosen + rejected
    return loss + ((total * total).sum() / max(total.numel(), 1) * center_coef).to(real)


def reward_scores(
    hidden: HiddenStates,
    weight: RewardHeadWeight,
    *,
    attention_mask: Mask | None = None,
    cu_seqlens: Offsets | None = None,
    bias: RewardHeadBias | None = None,
) -> PerSequence:
    r"""Score of each sequence from the hidden state of its last token: ``h_end . w (+ b)``; reads ``B`` rows, not ``B
    L``.

    Args:
        hidden: ``[B, L, H]``, or packed ``[T, H]`` with ``cu_seqlens``.
        weight: ``[1, H]``, the head's matrix.
        attention_mask: ``[B, L]``; the end is the last 1 (left or right padding, holes); a row of zeros, or no mask,
            ends at ``L - 1``. Not beside ``cu_seqlens``.
        cu_seqlens: ``[B + 1]`` offsets of a packed batch; the end of sequence ``i`` is ``cu_seqlens[i + 1] - 1``. An
            empty sequence has none: on a CPU it is an error, on an accelerator, where values are not read, its score is
            0 and has no gradient.
        bias: ``[1]``. Hidden states, weight and bias have one dtype, or autocast is on.

    Returns:
        Tensor ``[B]``, fp32 (fp64 for fp64 hidden states), differentiable in ``hidden``, ``weight`` and ``bias``.

    Raises:
        ValueError: shapes do not fit; ``cu_seqlens`` does not cover the tokens, or makes a sequence empty; sequences of
            no token.
        TypeError: dtypes do not fit.

    Example:
        >>> hidden = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]]])
        >>> reward_scores(hidden, torch.tensor([[1.0, 0.5]]), attention_mask=torch.tensor([[1, 1, 0]]))
        tensor([5.])
    """
    caller = "reward_scores"
    checks.floating(caller, "hidden", hidden)
    checks.floating(caller, "weight", weight)
    expected = 2 if cu_seqlens is not None else 3
    if hidden.dim() != expected:
        raise ValueError(
            f"{caller}: hidden has shape {tuple(hidden.shape)}, expected "
            f"{'[T, H] with cu_seqlens' if expected == 2 else '[B, L, H]'}"
        )
    checks.shape(caller, "weight", weight, (1, hidden.shape[-1]))
    if bias is not None:
        checks.floating(caller, "bias", bias)
        checks.shape(caller, "bias", bias, (1,))
    checks.one_device(caller, "hidden", hidden, weight=weight, bias=bias, attention_mask=attention_mask)
    checks_tokens.one_dtype(caller, "hidden", hidden, weight=weight, bias=bias)
    empty = None
    if cu_seqlens is None:
        checks.mask(caller, attention_mask, hidden.shape[:2], "attention_mask")
        if hidden.shape[0] and not hidden.shape[1]:
            raise ValueError(
                f"{caller}: hidden has shape {tuple(hidden.shape)}: sequences without a token have no last one to score"
            )
        rows = hidden[
            torch.arange(hidden.shape[0], device=hidden.device),
            last_live_index(attention_mask, hidden.shape[:2], hidden.device),
        ]
    else:
        if attention_mask is not None:
            raise ValueError(
                f"{caller}: attention_mask is for padded hidden states [B, L, H], cu_seqlens for packed "
                "ones [T, H]; pass one of them"
            )
        rows, empty = _packed_ends(caller, hidden, cu_seqlens)
    real = real_dtype(hidden.dtype)
    scores = (rows.to(real) * weight.to(real)).sum(-1)
    scores = scores if bias is None else scores + bias.to(real)
    return scores if empty is None else torch.where(empty, 0.0, scores)


def _packed_ends(caller: str, hidden: Tensor, cu_seqlens: Offsets) -> tuple[Tensor, Tensor | None]:
    """Returns the row of each sequence's last token, and a mask of the empty sequences, whose rows are 0.

    The mask is None where values are read, because an empty sequence has raised there.
    """
    offsets = checks_tokens.segments(caller, cu_seqlens, hidden, filled=True)
    ends = offsets[1:]
    if checks_tokens.values_are_read(cu_seqlens):
        return hidden[ends - 1], None
    empty = ends <= offsets[:-1]
    rows = (
        hidden[(ends - 1).clamp(min=0)]
        if hidden.shape[0]
        else hidden.new_zeros(ends.shape[0], hidden.shape[1]) + hidden.sum()
    )
    return torch.where(empty[:, None], 0.0, rows), empty
