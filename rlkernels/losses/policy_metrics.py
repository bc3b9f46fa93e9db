"""Metrics that a trainer plots beside a policy loss: masked, detached, and without a host synchronisation."""

import torch
from torch import Tensor

from rlkernels.losses.kl_term import KLTerm
from rlkernels.objectives import Objective
from rlkernels.sequences import means, spread, sums
from rlkernels.types import KL, Metrics, Number, RatioLevel

OF_THE_RATIO = ("cispo",)
"""The objectives that clip the ratio itself.

The others take the smaller of two surrogates, and the sign of the advantage decides which one is smaller.
"""


@torch.no_grad()
def policy_metrics(
    logprobs: Tensor,
    columns: list[Tensor],
    live: Tensor,
    ref_logprobs: Tensor | None,
    kl: KL | KLTerm,
    entropy: Tensor | None,
    entry: Objective,
    params: list[Number],
    ratio_level: RatioLevel = "token",
    cu_seqlens: Tensor | None = None,
) -> Metrics:
    """Computes means over live tokens: ``ppo_kl``, ``approx_kl``, ``ratio``, clip fractions, ``kl``, ``entropy``.

    ``ppo_kl`` is k1 of the old against the new policy, and ``approx_kl`` is their k2. Ratio and clip fractions belong
    to the ratio that the loss clips, which is the sequence's at a sequence level.

    ``clip_fraction_low``: ``rho < 1 - clip_low`` with ``A < 0``; ``clip_fraction_high``: ``rho > 1 + clip_high`` with
    ``A > 0``; ``clip_fraction``: their sum, the tokens whose clipped surrogate is the smaller one. CISPO clips a weight
    whatever the advantage is, so that the ratio alone counts there. ``clip_fraction_dual``: ``rho > dual_clip`` with
    ``A < 0``, beside the others.
    """
    count = live.sum().clamp(min=1)

    def mean(x: Tensor) -> Tensor:
        return torch.where(live, x, 0.0).sum() / count

    known = dict(zip(entry.columns[1:], columns, strict=True))
    settings = dict(zip(entry.params, params, strict=True))
    metrics: Metrics = {}
    if "old_logp" in known:
        gap = logprobs.detach() - known["old_logp"]
        drift = gap
        if ratio_level != "token":
            reduce = sums if ratio_level == "sequence_sum" else means
            drift = spread(reduce(gap, live, cu_seqlens), live, cu_seqlens)
        ratio = drift.exp()
        metrics |= {"ppo_kl": mean(-gap), "approx_kl": mean(0.5 * gap * gap), "ratio": mean(ratio)}
        if "clip_low" in settings:
            advantage = known["advantage"]
            low, high = ratio < 1 - settings["clip_low"], ratio > 1 + settings["clip_high"]
            if entry.function.__name__ not in OF_THE_RATIO:
                low, high = low & (advantage < 0), high & (advantage > 0)
            metrics |= {"clip_fraction_low": mean(low.to(gap.dtype)), "clip_fraction_high": mean(high.to(gap.dtype))}
            metrics["clip_fraction"] = metrics["clip_fraction_low"] + metrics["clip_fraction_high"]
        if "dual_clip" in settings:
            metrics["clip_fraction_dual"] = mean(
                ((ratio > settings["dual_clip"]) & (known["advantage"] < 0)).to(gap.dtype)
            )
    if ref_logprobs is not None and not isinstance(kl, KLTerm):  # such a term tells its own mean
        gap = ref_logprobs - logprobs.detach()
        metrics["kl"] = mean({"k1": -gap, "k2": 0.5 * gap * gap, "k3": gap.expm1() - gap, "abs": gap.abs()}[kl])
    if entropy is not None:
        metrics["entropy"] = mean(entropy.detach().to(logprobs.dtype))  # a mean in bf16 has two digits
    return metrics
