"""Metrics that a trainer plots beside a policy loss: masked, detached, and without a host synchronisation."""

import torch
from torch import Tensor

from rlkernels import ops
from rlkernels.losses.kl_term import KLTerm
from rlkernels.losses.policy_ratio import Clamp
from rlkernels.losses.weighted_sum import parameters
from rlkernels.objectives import Objective
from rlkernels.sequences import means, spread, sums, token_counts
from rlkernels.types import KL, Metrics, Number, RatioLevel

OF_THE_RATIO = {"cispo": "clip_high", "cispo_max_only": "clip_high", "cispo_absolute": "ratio_max"}
"""The objectives that clip the ratio itself, and the parameter of their upper bound.

The others take the smaller of two surrogates, and the sign of the advantage decides which one is smaller.
"""
GATES = ("rollout_is", "dppo_tv", "dppo_tv_surrogate", "dppo_kl", "dppo_kl_surrogate", "tv_symmetric", "ref_kl")
"""The objectives that leave tokens out: their derivative is 0 there, although the advantage is not."""


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
    clamp: Clamp | None = None,
    counted: Tensor | None = None,
) -> Metrics:
    """Computes means over live tokens: ``ppo_kl``, ``approx_kl``, ``ratio``, clip fractions, ``kl``, ``entropy``.

    ``counted``: the tokens of the means, if they are fewer than the live ones, of which sequences have their ratios.

    ``ppo_kl`` is k1 of the old against the new policy, and ``approx_kl`` is their k2. Ratio and clip fractions belong
    to the ratio that the loss clips, which is the sequence's at a sequence level. ``ratio_min`` and ``ratio_max`` are
    its extremes, and 0 without a live token.

    ``clip_fraction_low``: ``rho < 1 - clip_low`` with ``A < 0``; ``clip_fraction_high``: ``rho > 1 + clip_high`` with
    ``A > 0``; ``clip_fraction``: their sum, the tokens whose clipped surrogate is the smaller one. CISPO clips a weight
    whatever the advantage is, so that the ratio alone counts there. ``clip_fraction_dual``: ``rho > dual_clip`` with
    ``A < 0``, beside the others. ``clip_fraction_cap``: ``rho > ratio_cap``. An objective with a gate has
    ``clip_fraction``: the tokens with an advantage that the gate leaves out. One that cuts the ratio at ``ratio_max``,
    too, has ``clip_fraction_cap``: the other tokens whose ratio is larger.

    At a sequence level ``seq_clip_fraction`` and its two parts are the same as shares of the sequences with a live
    token, whatever their lengths.
    """
    counted = live if counted is None else counted
    count = counted.sum().clamp(min=1)

    def mean(x: Tensor) -> Tensor:
        return torch.where(counted, x, 0.0).sum() / count

    known = dict(zip(entry.columns[1:], columns, strict=True))
    settings = dict(zip(entry.params, params, strict=True))
    name = entry.function.__name__
    metrics: Metrics = {}
    behaviour = known.get("old_logp", known.get("rollout_logp"))
    if behaviour is not None:
        gap = logprobs.detach() - behaviour
        drift = gap
        if ratio_level != "token":
            reduce = sums if ratio_level == "sequence_sum" else means
            drift = spread(reduce(gap, live, cu_seqlens), live, cu_seqlens)
        ratio = (drift if clamp is None else clamp.of(drift)).exp()
        metrics |= {"ppo_kl": mean(-gap), "approx_kl": mean(0.5 * gap * gap), "ratio": mean(ratio)}
        metrics |= _extremes(ratio, counted)
        for key, clipped in _clipped(name, settings, ratio, known.get("advantage")).items():
            metrics[key] = mean(clipped.to(gap.dtype))
            if ratio_level != "token" and not key.endswith(("dual", "cap")):
                shares = means(clipped.to(gap.dtype), counted, cu_seqlens)
                metrics[f"seq_{key}"] = shares.sum() / (token_counts(counted, cu_seqlens) > 0).sum().clamp(min=1)
        if name in GATES:
            # The gate sees the log-ratio behind its clamp.
            scored = logprobs.detach() if clamp is None else behaviour + clamp.of(gap)
            left_out = _left_out(name, scored, columns, params, known.get("advantage"))
            metrics["clip_fraction"] = mean(left_out)
            if "ratio_max" in settings:
                metrics["clip_fraction_cap"] = mean((1 - left_out) * (ratio > settings["ratio_max"]))
    if ref_logprobs is not None and not isinstance(kl, KLTerm):  # such a term tells its own mean
        gap = ref_logprobs - logprobs.detach()
        metrics["kl"] = mean({"k1": -gap, "k2": 0.5 * gap * gap, "k3": gap.expm1() - gap, "abs": gap.abs()}[kl])
    if entropy is not None:
        metrics["entropy"] = mean(entropy.detach().to(logprobs.dtype))  # a mean in bf16 has two digits
    return metrics


def _extremes(ratio: Tensor, live: Tensor) -> Metrics:
    """Returns the smallest and the largest ratio of the live tokens."""
    if not ratio.numel():
        return dict.fromkeys(("ratio_min", "ratio_max"), ratio.sum())
    low, high = torch.where(live, ratio, torch.inf).amin(), torch.where(live, ratio, 0.0).amax()
    return {"ratio_min": torch.where(live.any(), low, 0.0), "ratio_max": high}


def _clipped(name: str, settings: dict[str, Number], ratio: Tensor, advantage: Tensor | None) -> Metrics:
    """Returns, for each clip fraction by its name, the tokens that it counts."""
    found: Metrics = {}
    if name in OF_THE_RATIO:
        bound = OF_THE_RATIO[name]
        high = ratio > (settings[bound] if bound == "ratio_max" else 1 + settings[bound])
        low = ratio < 1 - settings["clip_low"] if "clip_low" in settings else torch.zeros_like(high)
        found = {"clip_fraction_low": low, "clip_fraction_high": high, "clip_fraction": low | high}
    elif {"clip_low", "clip_high"} <= set(settings) and name not in GATES and advantage is not None:
        low = (ratio < 1 - settings["clip_low"]) & (advantage < 0)
        high = (ratio > 1 + settings["clip_high"]) & (advantage > 0)
        found = {"clip_fraction_low": low, "clip_fraction_high": high, "clip_fraction": low | high}
    if "dual_clip" in settings and advantage is not None:
        found["clip_fraction_dual"] = (ratio > settings["dual_clip"]) & (advantage < 0)
    if "ratio_cap" in settings:
        found["clip_fraction_cap"] = ratio > settings["ratio_cap"]
    return found


def _left_out(name: str, logp: Tensor, columns: list[Tensor], params: list[Number], advantage: Tensor | None) -> Tensor:
    """Returns 1 at the tokens with an advantage and without a derivative, else 0."""
    logp = logp.contiguous()
    others = [x.to(logp.dtype).contiguous() for x in columns]
    serving = ops.serving("elementwise", logp)
    derivative = ops.elementwise(name, logp, others, parameters(params), None, serving)[2]
    still = derivative == 0
    return (still if advantage is None else still & (advantage != 0)).to(logp.dtype)
