"""Losses of answers that were judged one by one, from their log-probabilities: KTO, APO-zero, BCO."""

from typing import Literal, NamedTuple, get_args, overload

import torch
from torch import Tensor

from rlkernels import checks
from rlkernels.advantages.moments import masked_moments, over_ranks
from rlkernels.losses.policy_arguments import column
from rlkernels.losses.preference import REDUCTIONS, common_dtype, per_answer, weighted_terms
from rlkernels.losses.preference_options import from_zero
from rlkernels.losses.weighted_sum import each
from rlkernels.tracing import replaced
from rlkernels.types import Metrics, Number, PerAnswer, Reduction, Scalar, UnpairedLossType

LOSS_TYPES = get_args(UnpairedLossType)


class UnpairedOptions(NamedTuple):
    """The checked options of ``unpaired_preference_loss``.

    ``baseline``: the number that is subtracted from each log-ratio (kto) or reward (bco). ``lengths``: by which
    log-ratios are divided, at least 1, or None.
    """

    loss_type: str
    beta: Number
    desirable_weight: Number
    undesirable_weight: Number
    baseline: Number
    lengths: Tensor | None = None

    def part(self, first: int, last: int) -> "UnpairedOptions":
        """Returns the options of the answers ``[first, last)``."""
        return self if self.lengths is None else replaced(self, lengths=self.lengths[first:last])

    def separable(self) -> bool:
        """Tells whether the loss of each answer depends on that answer alone, so that a batch may be cut into parts."""
        return self.loss_type != "kto_paired_batch"


def unpaired_options(
    caller: str,
    like: Tensor,
    *,
    loss_type: UnpairedLossType = "kto",
    beta: Number = 0.1,
    desirable_weight: Number = 1.0,
    undesirable_weight: Number = 1.0,
    kl: Number | None = None,
    kl_logps: PerAnswer | None = None,
    ref_kl_logps: PerAnswer | None = None,
    delta: Number | None = None,
    length_normalized: bool = False,
    lengths: PerAnswer | None = None,
    kl_group: "torch.distributed.ProcessGroup | None" = None,
) -> UnpairedOptions:
    """Checks the options; ``like``: a tensor of the dtype and device of the losses."""
    checks.choice(caller, "loss_type", loss_type, LOSS_TYPES)
    checks.flags(caller, length_normalized=length_normalized)
    beta = checks.coefficient(from_zero, caller, "beta", beta, like)
    desirable_weight, undesirable_weight = (
        checks.coefficient(checks.finite, caller, name, x, like)
        for name, x in (("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight))
    )
    for name, x in {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}.items():
        if not isinstance(x, torch.Tensor) and x < 0:
            raise ValueError(
                f"{caller}: {name} must not be negative, got {x}; the labels say which way an answer moves"
            )
    takes = {"kto": ("kl", "kl_logps", "ref_kl_logps"), "bco": ("delta",)}.get(loss_type, ())
    if kl_group is not None and kl_logps is None:
        raise ValueError(f"{caller}: kl_group averages kl_logps over its ranks; it needs these")
    for name, x in {"kl": kl, "kl_logps": kl_logps, "ref_kl_logps": ref_kl_logps, "delta": delta}.items():
        if x is not None and name not in takes:
            raise ValueError(f"{caller}: loss_type {loss_type!r} takes no {name}; leave it out")
    baseline = 0.0
    if loss_type == "bco":
        baseline = _number(caller, "delta", delta, like)
    elif loss_type == "kto" and kl_logps is None and ref_kl_logps is None:
        baseline = _number(caller, "kl", kl, like)
    elif loss_type == "kto":
        baseline = _kl(caller, kl, kl_logps, ref_kl_logps, kl_group, like)
    lengths = _lengths(caller, length_normalized, lengths, like)
    return UnpairedOptions(loss_type, beta, desirable_weight, undesirable_weight, baseline, lengths)


def _lengths(caller: str, normalized: bool, lengths: PerAnswer | None, like: Tensor) -> Tensor | None:
    """Checks the lengths of the answers; returns them, at least 1, where log-ratios are divided by them."""
    if lengths is not None:
        checks.counts(caller, "lengths", lengths, like.shape)
        checks.no_gradient(caller, lengths=lengths)
        checks.one_device(caller, "logps", like, lengths=lengths)
    if not normalized:
        if lengths is not None:
            raise ValueError(f"{caller}: lengths are looked at with length_normalized=True alone; leave them out")
        return None
    if lengths is None:
        raise ValueError(f"{caller}: length_normalized needs lengths: the number of tokens of each answer")
    return lengths.to(like.dtype).clamp(min=1.0)


def _number(caller: str, name: str, x: Number | None, like: Tensor) -> Number:
    """Returns a float, or a tensor of one number, for which the host does not wait."""
    if x is None:
        what = "kl, or kl_logps and ref_kl_logps" if name == "kl" else name
        raise ValueError(f"{caller}: {name} is missing; pass {what}")
    if isinstance(x, torch.Tensor):
        column(caller, name, x, like.new_empty(()), "logps")
        low = checks.host_reads(x) and name == "kl" and x < 0
        number = x.to(like.dtype)
    else:
        number = checks.finite(caller, name, x)
        low = name == "kl" and number < 0
    if low:
        raise ValueError(f"{caller}: kl must be at least 0, got {float(x)}; clamp the estimate: kl.clamp(min=0)")
    return number


def _kl(
    caller: str,
    kl: Number | None,
    kl_logps: PerAnswer | None,
    ref_kl_logps: PerAnswer | None,
    group: "torch.distributed.ProcessGroup | None",
    like: Tensor,
) -> Tensor:
    """Estimates the KL by the mean log-ratio of answers to other prompts, at least 0."""
    if kl is not None or kl_logps is None or ref_kl_logps is None:
        raise ValueError(
            f"{caller}: kl_logps and ref_kl_logps go together, instead of kl; pass both of them, or kl alone"
        )
    checks.floating(caller, "kl_logps", kl_logps)
    checks.no_forward_ad(caller, kl_logps)
    per_answer(caller, "kl_logps", kl_logps)
    column(caller, "ref_kl_logps", ref_kl_logps, kl_logps, "kl_logps")
    checks.one_device(caller, "logps", like, kl_logps=kl_logps)
    drift = kl_logps.detach().to(like.dtype) - ref_kl_logps.to(like.dtype)
    if group is None:
        return (drift.sum() / max(drift.numel(), 1)).clamp(min=0.0)
    if not isinstance(group, torch.distributed.ProcessGroup):
        raise TypeError(f"{caller}: kl_group must be a torch.distributed.ProcessGroup, got {type(group).__name__}")
    return torch.as_tensor(over_ranks(caller, masked_moments(drift), group).mean).clamp(min=0.0).to(like.dtype)


def sequence_losses(
    caller: str, logps: PerAnswer, ref_logps: PerAnswer, desirable: PerAnswer, options: UnpairedOptions
) -> Tensor:
    """Computes the loss of each answer times the weight of its class, ``[N]``.

    It is differentiable in ``logps``, the sums of log-probabilities, ``[N]``.
    """
    margin, objective, params = _margins(caller, logps, ref_logps, desirable, options)
    weights = class_weights(desirable, options, margin.dtype)
    return each(objective, margin, params, weights) * weights  # 0 in a class of weight 0, whatever it holds


def class_weights(desirable: PerAnswer, options: UnpairedOptions, dtype: torch.dtype) -> Tensor:
    """Returns the weight of each answer's class, ``[N]``."""
    # zeros + a number, because torch.where of two numbers would be of torch's default dtype.
    zeros = desirable.new_zeros(desirable.shape, dtype=dtype)
    return torch.where(
        (desirable != 0).contiguous(), zeros + options.desirable_weight, zeros + options.undesirable_weight
    )


def _margins(
    caller: str, logps: PerAnswer, ref_logps: PerAnswer, desirable: PerAnswer, options: UnpairedOptions
) -> tuple[Tensor, str, tuple[Number, ...]]:
    """Returns one number per answer, which the loss wants large, the name of its objective, and the parameters."""
    checks.floating(caller, "logps", logps)
    column(caller, "ref_logps", ref_logps, logps, "logps")
    checks.tensor(caller, "desirable", desirable)
    checks.labels(caller, "desirable", desirable, logps.shape)
    checks.one_device(caller, "logps", logps, desirable=desirable)
    real, good = common_dtype(logps, ref_logps), desirable != 0
    log_ratio = logps.to(real) - ref_logps.to(real)
    if options.lengths is not None:
        log_ratio = log_ratio / options.lengths
    if options.loss_type == "bco":
        reward = options.beta * log_ratio - options.baseline
        return torch.where(good, reward, -reward), "pairwise", ()
    if options.loss_type == "kto_paired_batch":
        means = [
            (torch.where(one, log_ratio, 0.0).sum() / one.sum().clamp(min=1)).clamp(min=0.0) for one in (good, ~good)
        ]
        return torch.where(good, log_ratio - means[1], means[0] - log_ratio), "kto", (options.beta,)
    log_ratio = log_ratio - options.baseline
    return torch.where(good, log_ratio, -log_ratio), "kto", (options.beta,)


@overload
def unpaired_preference_loss(
    logps: PerAnswer,
    ref_logps: PerAnswer,
    desirable: PerAnswer,
    *,
    loss_type: UnpairedLossType = "kto",
    beta: Number = 0.1,
    desirable_weight: Number = 1.0,
    undesirable_weight: Number = 1.0,
    kl: Number | None = None,
    kl_logps: PerAnswer | None = None,
    ref_kl_logps: PerAnswer | None = None,
    delta: Number | None = None,
    length_normalized: bool = False,
    lengths: PerAnswer | None = None,
    kl_group: "torch.distributed.ProcessGroup | None" = None,
    reduction: Reduction = "mean",
    return_metrics: Literal[False] = False,
) -> Scalar: ...


@overload
def unpaired_preference_loss(
    logps: PerAnswer,
    ref_logps: PerAnswer,
    desirable: PerAnswer,
    *,
    loss_type: UnpairedLossType = "kto",
    beta: Number = 0.1,
    desirable_weight: Number = 1.0,
    undesirable_weight: Number = 1.0,
    kl: Number | None = None,
    kl_logps: PerAnswer | None = None,
    ref_kl_logps: PerAnswer | None = None,
    delta: Number | None = None,
    length_normalized: bool = False,
    lengths: PerAnswer | None = None,
    kl_group: "torch.distributed.ProcessGroup | None" = None,
    reduction: Reduction = "mean",
    return_metrics: Literal[True],
) -> tuple[Scalar, Metrics]: ...


@overload
def unpaired_preference_loss(
    logps: PerAnswer,
    ref_logps: PerAnswer,
    desirable: PerAnswer,
    *,
    loss_type: UnpairedLossType = "kto",
    beta: Number = 0.1,
    desirable_weight: Number = 1.0,
    undesirable_weight: Number = 1.0,
    kl: Number | None = None,
    kl_logps: PerAnswer | None = None,
    ref_kl_logps: PerAnswer | None = None,
    delta: Number | None = None,
    length_normalized: bool = False,
    lengths: PerAnswer | None = None,
    kl_group: "torch.distributed.ProcessGroup | None" = None,
    reduction: Reduction = "mean",
    return_metrics: bool,
) -> Scalar | tuple[Scalar, Metrics]: ...


def unpaired_preference_loss(
    logps: PerAnswer,
    ref_logps: PerAnswer,
    desirable: PerAnswer,
    *,
    loss_type: UnpairedLossType = "kto",
    beta: Number = 0.1,
    desirable_weight: Number = 1.0,
    undesirable_weight: Number = 1.0,
    kl: Number | None = None,
    kl_logps: PerAnswer | None = None,
    ref_kl_logps: PerAnswer | None = None,
    delta: Number | None = None,
    length_normalized: bool = False,
    lengths: PerAnswer | None = None,
    kl_group: "torch.distributed.ProcessGroup | None" = None,
    reduction: Reduction = "mean",
    return_metrics: bool = False,
) -> Scalar | tuple[Scalar, Metrics]:
    r"""Losses of answers that are desirable or not, without pairs: value and derivative in one launch.

    The mean over all answers of ``w l``. With ``rho = logp - ref``, ``b = beta``, ``s`` the logistic function:

    - ``"kto"``: desirable ``1 - s(b (rho - kl))``, undesirable ``1 - s(b (kl - rho))``; Ethayarajh et al. 2024,
      arXiv:2402.01306.
    - ``"apo_zero_unpaired"``: the same without ``kl``: ``1 - s(b rho)`` and ``s(b rho)``; D'Oosterlinck et al. 2024,
      arXiv:2408.06266.
    - ``"kto_paired_batch"``: the same, where ``kl`` of each class is the mean ``rho`` of the other one, at least 0,
      with its gradient; TRL's ``kto_pair``.
    - ``"bco"``: ``-log s(b rho - delta)`` and ``-log s(delta - b rho)``; Jung et al. 2024, arXiv:2404.04656.

    Args:
        logps: sums of log-probabilities of the answers under the policy, ``[N]``; the only argument that gets a
            gradient.
        ref_logps: the same under the reference.
        desirable: which answers are, ``[N]``, bool, or 1 and 0 in any dtype. A batch of one class will do.
        beta: strength of the tie to the reference, at least 0.
        desirable_weight, undesirable_weight: ``w`` of each class, at least 0.
        kl: for ``"kto"``: how far the policy has drifted, at least 0, a number or a tensor of shape ``()`` (averaged
            over ranks, say).
        kl_logps, ref_kl_logps: instead of ``kl``: ``[M]``, log-probabilities of answers to other prompts; ``kl`` is
            then the mean of their difference, at least 0. None of them gives 0.
        delta: for ``"bco"``: the running mean of all rewards, a number or a tensor of shape ``()``.
        length_normalized, lengths: ``rho / n`` instead of ``rho``, ``n`` the lengths, tokens per answer, ``[N]``;
            ``kl_logps`` are averages then, too.
        kl_group: the ranks over whose ``kl_logps`` the mean runs; each may have another number of them.
        reduction: ``"mean"``; ``"sum"``: without the division; ``"none"``: ``w l`` of each answer, ``[N]``.

    Returns:
        Scalar, or one number per answer, fp32 (fp64 where any of the log-probabilities is). No answer gives 0. With
        ``return_metrics``, ``(loss, dict)`` with means over each class, 0 where it has no answer: ``reward_desirable``
        and ``reward_undesirable``, of ``beta rho``; ``reward_margin``, their difference; ``logps_desirable`` and
        ``logps_undesirable``; and ``kl`` with ``"kto"``.

    Raises:
        ValueError: an option out of range, unknown, or not looked at by the loss; shapes that differ; ``kl`` or
            ``delta`` missing; on a CPU ``kl`` below 0, or labels that are not 0 and 1.

    Example:
        >>> logprobs, reference = torch.tensor([-10.0, -12.0]), torch.tensor([-11.0, -11.0])
        >>> loss = unpaired_preference_loss(logprobs, reference, torch.tensor([True, False]), beta=1.0, kl=0.0)
        >>> round(loss.item(), 4)
        0.2689
    """
    caller = "unpaired_preference_loss"
    checks.flags(caller, return_metrics=return_metrics)
    checks.floating(caller, "logps", logps)
    checks.no_forward_ad(caller, logps)
    per_answer(caller, "logps", logps)
    like = logps.detach().to(common_dtype(logps, ref_logps))
    options = unpaired_options(
        caller,
        like,
        loss_type=loss_type,
        beta=beta,
        desirable_weight=desirable_weight,
        undesirable_weight=undesirable_weight,
        kl=kl,
        kl_logps=kl_logps,
        ref_kl_logps=ref_kl_logps,
        delta=delta,
        length_normalized=length_normalized,
        lengths=lengths,
        kl_group=kl_group,
    )
    checks.choice(caller, "reduction", reduction, REDUCTIONS)
    if reduction == "none":
        loss = sequence_losses(caller, logps, ref_logps, desirable, options)
    else:
        margin, objective, params = _margins(caller, logps, ref_logps, desirable, options)
        share = 1.0 if reduction == "sum" else 1.0 / max(like.numel(), 1)
        terms = [(1.0, objective, margin, params)]
        loss = weighted_terms(terms, class_weights(desirable, options, like.dtype), share)
    if not return_metrics:
        return loss
    with torch.no_grad():
        rewards, good = like - ref_logps, desirable != 0
        rewards = options.beta * (rewards if options.lengths is None else rewards / options.lengths)
        metrics = {
            f"{what}_{name}": torch.where(one, x, 0.0).sum() / one.sum().clamp(min=1)
            for what, x in (("reward", rewards), ("logps", like))
            for name, one in (("desirable", good), ("undesirable", ~good))
        }
        metrics["reward_margin"] = metrics["reward_desirable"] - metrics["reward_undesirable"]
        if loss_type == "kto":
            kl = options.baseline
            # Filled on the device, because the host would wait for a copy.
            metrics["kl"] = kl.to(like.dtype) if isinstance(kl, torch.Tensor) else like.new_full((), kl)
        return loss, metrics
