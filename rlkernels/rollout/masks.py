"""Masks of the tokens whose engine and trainer, or whose old and new policy, are too far apart to train on."""

import math
from typing import Literal, get_args, overload

import torch
from torch import Tensor

from rlkernels import checks
from rlkernels.checks import tokens as checks_tokens
from rlkernels.packed_rows import takes_one_row
from rlkernels.rollout.log_ratios import LogRatios, all_live, clamped, log_ratios, needs_sequences, outside
from rlkernels.sequences import means, per_token, spread, sums
from rlkernels.tracing import without_gradient
from rlkernels.types import Mask, Metrics, Number, Offsets, PerToken, PerTokenOrSequence, RejectionRule, RejectionRules

RULES = get_args(RejectionRule)
FARTHEST = 20.0
"""The log-ratio that every rule clamps to, because ``exp`` of a larger one says no more."""


@overload
def rejection_mask(
    old_logprobs: PerToken,
    rollout_logprobs: PerToken,
    mask: Mask | None = None,
    *,
    rules: RejectionRules,
    nan_ratio: Number = 1.0,
    cu_seqlens: Offsets | None = None,
    return_metrics: Literal[False] = False,
) -> Tensor: ...


@overload
def rejection_mask(
    old_logprobs: PerToken,
    rollout_logprobs: PerToken,
    mask: Mask | None = None,
    *,
    rules: RejectionRules,
    nan_ratio: Number = 1.0,
    cu_seqlens: Offsets | None = None,
    return_metrics: Literal[True],
) -> tuple[Tensor, Metrics]: ...


@overload
def rejection_mask(
    old_logprobs: PerToken,
    rollout_logprobs: PerToken,
    mask: Mask | None = None,
    *,
    rules: RejectionRules,
    nan_ratio: Number = 1.0,
    cu_seqlens: Offsets | None = None,
    return_metrics: bool,
) -> Tensor | tuple[Tensor, Metrics]: ...


@takes_one_row(per_token=True)
@without_gradient
def rejection_mask(
    old_logprobs: PerToken,
    rollout_logprobs: PerToken,
    mask: Mask | None = None,
    *,
    rules: RejectionRules,
    nan_ratio: Number = 1.0,
    cu_seqlens: Offsets | None = None,
    return_metrics: bool = False,
) -> Tensor | tuple[Tensor, Metrics]:
    r"""Keeps the live tokens that pass every rule on how far trainer and rollout engine are apart.

    With ``q = clip(log pi_old - log pi_rollout, -20, 20)``: ``k1 = -q``, ``k2 = q^2 / 2``, ``k3 = e^q - 1 - q``. A rule
    compares one of them, of a token or as sum, mean or maximum of its sequence, with its bound. As the loss's mask the
    result changes the count that a mean divides by; as its ``correction`` it does not.

    Args:
        old_logprobs, rollout_logprobs, mask, nan_ratio, cu_seqlens: as for ``rollout_weights``.
        rules: the bound of each rule by its name: ``"token_k1"``, ``"seq_sum_k2"``, ``"seq_mean_k3"``,
            ``"seq_max_k2"``, ... An upper bound for k2 and k3. For k1 a pair of ratios, ``log low <= k1 <= log high``,
            where a single ``u`` stands for ``(1/u, u)``.

    Returns:
        bool, shaped like ``old_logprobs``: live and kept. With ``return_metrics``, ``(mask, dict)``:
        ``rejected_tokens``, the share of live tokens that are left out, and, where sequences are known,
        ``touched_sequences``, the share of them that lose a token.

    Raises:
        TypeError, ValueError: dtypes or shapes that do not match; an unknown rule; a bound that is not positive, or is
            a pair where a number is expected.

    Example:
        >>> old, rollout = torch.tensor([[-1.0, -0.5], [-0.2, -0.3]]), torch.tensor([[-1.1, -0.4], [-1.2, -0.3]])
        >>> rejection_mask(old, rollout, rules={"seq_mean_k3": 0.1})
        tensor([[ True,  True],
                [False, False]])

    verl 0.9, rollout correction.
    """
    caller = "rejection_mask"
    bounds = _bounds(caller, rules)
    of_sequences = next((f"rule {name!r}" for name in bounds if not name.startswith("token")), None)
    ratios = log_ratios(caller, old_logprobs, rollout_logprobs, mask, cu_seqlens, nan_ratio, of_sequences)
    gap = clamped(ratios.gap, -FARTHEST, FARTHEST)
    divergences = {"k1": -gap, "k2": 0.5 * gap * gap, "k3": gap.expm1() - gap}
    kept = ratios.live
    for name, (low, high) in bounds.items():
        level, estimator = name.rsplit("_", 1)
        kept = kept & ~outside(_at(ratios, level, divergences[estimator]), low, high)
    if not checks.flag(caller, "return_metrics", return_metrics):
        return kept
    found = {"rejected_tokens": ratios.mean((~kept).double())}
    if ratios.has_sequences():
        touched = sums((~kept).double(), ratios.live, ratios.offsets) > 0
        found["touched_sequences"] = touched.sum() / ratios.filled().sum().clamp(min=1)
    return kept, {name: x.to(ratios.dtype) for name, x in found.items()}


def _bounds(caller: str, rules: RejectionRules) -> dict[str, tuple[float | None, float]]:
    """Returns the lower and the upper bound of each rule, as the rule's own estimator takes them."""
    if not isinstance(rules, dict) or not rules:
        got = "an empty dict" if isinstance(rules, dict) else type(rules).__name__
        raise TypeError(f"{caller}: rules must be a dict of rules to bounds, such as {{'token_k1': 2.0}}, got {got}")
    checks.known_names(caller, "rules", tuple(rules), RULES)
    found: dict[str, tuple[float | None, float]] = {}
    for name, given in rules.items():
        what = f"rules[{name!r}]"
        if not name.endswith("k1"):
            found[name] = None, checks.positive(caller, what, given)
            continue
        if isinstance(given, (tuple, list)):
            if len(given) != 2:
                raise ValueError(f"{caller}: {what} must be a number or a pair, got {len(given)} numbers")
            low, high = (checks.positive(caller, what, x) for x in given)
        else:
            high = checks.positive(caller, what, given)
            low = 1.0 / high
        if low > high:
            raise ValueError(
                f"{caller}: {what} must be a pair (low, high) of ratios, or one ratio above 1; got {given}"
            )
        found[name] = math.log(low), math.log(high)
    return found


def _at(ratios: LogRatios, level: str, values: Tensor) -> Tensor:
    """Returns ``values`` as a rule reduces them, for every token."""
    if level == "seq_max":
        return spread(ratios.maxima(values), ratios.live, ratios.offsets)
    return ratios.at({"token": "token", "seq_sum": "sequence", "seq_mean": "sequence_mean"}[level], values)


@takes_one_row(per_token=True)
@without_gradient
def off_policy_sequence_mask(
    logprobs: PerToken,
    old_logprobs: PerToken,
    advantages: PerTokenOrSequence,
    mask: Mask | None = None,
    *,
    delta: Number,
    cu_seqlens: Offsets | None = None,
) -> Tensor:
    r"""Leaves out the tokens of negative advantage whose sequence the policy has moved away from (OPSM).

    A live token is kept where ``A_t >= 0`` or ``mean_t(log pi_old - log pi) <= delta``, the mean over its sequence. A
    difference that is NaN counts as 0. The mask belongs into the ``correction`` of a policy loss, which leaves the
    count of tokens as it is.

    Args:
        logprobs: ``[B, L]``, or packed ``[T]``; the policy's. They get no gradient here.
        old_logprobs: same shape; those of the rollout engine where it returned some.
        advantages: same shape, or one per sequence.
        mask: live tokens, same shape, any pattern.
        delta: the largest mean that is kept.
        cu_seqlens: offsets ``[S + 1]`` of a packed batch.

    Returns:
        bool, shaped like ``logprobs``: live and kept.

    Raises:
        TypeError, ValueError: dtypes or shapes that do not match; ``delta`` negative or not finite.

    Example:
        >>> now, old = torch.tensor([[-2.0, -1.0], [-2.0, -1.0]]), torch.tensor([[-1.0, -1.0], [-1.0, -1.0]])
        >>> off_policy_sequence_mask(now, old, torch.tensor([0.7, -0.7]), delta=0.2)
        tensor([[ True,  True],
                [False, False]])

    DeepSeek-V3.2, arXiv:2512.02556.
    """
    caller = "off_policy_sequence_mask"
    checks.floating(caller, "logprobs", logprobs)
    checks.no_forward_ad(caller, logprobs)
    for name, x in (("old_logprobs", old_logprobs), ("advantages", advantages)):
        checks.floating(caller, name, x)
        checks.no_gradient(caller, **{name: x})
    checks.shape(caller, "old_logprobs", old_logprobs, logprobs.shape)
    offsets = checks_tokens.rows(caller, "logprobs", logprobs, cu_seqlens, mask)
    needs_sequences(caller, "the mask", logprobs, offsets)
    checks.mask(caller, mask, logprobs.shape)
    advantages = per_token(caller, "advantages", advantages, logprobs, offsets)
    checks.shape(caller, "advantages", advantages, logprobs.shape)
    checks.one_device(caller, "logprobs", logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    delta = checks_tokens.not_negative(caller, "delta", delta, logprobs)
    live = all_live(logprobs) if mask is None else (mask != 0).contiguous()
    gap = old_logprobs.double() - logprobs.double()
    gap = torch.where(live & ~gap.isnan(), gap, 0.0)
    drift = spread(means(gap, live, offsets), live, offsets)
    return live & ((advantages >= 0) | (drift <= delta))


@torch.no_grad()
def m2po_mask(
    old_logprobs: PerToken,
    rollout_logprobs: PerToken,
    mask: Mask | None = None,
    *,
    threshold: Number,
    nan_ratio: Number = 1.0,
) -> Tensor:
    r"""Leaves out the tokens of the largest squared log-ratio until the mean square of the others is small (M2PO).

    With ``q = log pi_old - log pi_rollout``: drops tokens in falling order of ``q^2`` until ``mean q^2`` of the rest is
    below the threshold. One live token always stays. Of equal squares the earlier token goes first. The mean is that of
    the tokens of this call, so call it with the whole batch, before it is cut into micro-batches.

    Args:
        old_logprobs, rollout_logprobs, mask, nan_ratio: as for ``rollout_weights``; any shape.
        threshold: the bound of the mean square.

    Returns:
        bool, shaped like ``old_logprobs``: live and kept.

    Raises:
        TypeError, ValueError: dtypes or shapes that do not match; ``threshold`` negative or not finite.

    Example:
        >>> old, rollout = torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-1.1, -3.0, -0.9])
        >>> m2po_mask(old, rollout, threshold=0.04)
        tensor([ True, False,  True])

    M2PO, as in AReaL.
    """
    caller = "m2po_mask"
    ratios = log_ratios(caller, old_logprobs, rollout_logprobs, mask, None, nan_ratio)
    threshold = checks_tokens.not_negative(caller, "threshold", threshold, old_logprobs)
    live = ratios.live.reshape(-1)
    square = ratios.gap.reshape(-1).square()
    # Dead tokens come last. NaN of the trainer stays, so that the loss shows it.
    square = torch.where(live, torch.where(square.isnan(), 0.0, square), -1.0)
    ordered, order = torch.sort(square, descending=True, stable=True)
    place = torch.arange(square.shape[0], device=square.device)
    rest = ordered.clamp(min=0.0).flip(0).cumsum(0).flip(0)  # of this token and all behind it
    count = live.sum()
    # The mean of the rest falls from place to place, so that the places with a large one are the first ones.
    large = (rest / (count - place).clamp(min=1) >= threshold) & (place < count - 1)
    kept = torch.zeros_like(live).scatter(0, order, place >= large.sum())
    return (kept & live).view(ratios.live.shape)
