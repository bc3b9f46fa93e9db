"""The attributes and registries of verl that ``patch`` fills or replaces, and what must hold of each."""

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rlkernels.integrations._patching import ABSENT, Host, Plan, Site, register
from rlkernels.integrations.verl import logprobs, losses, rollout
from rlkernels.integrations.verl.advantages import ADVANTAGES
from rlkernels.integrations.verl.names import NAMED_ADVANTAGES, NAMED_LOSSES

SERIES = ("0.9",)
CORE = "verl.trainer.ppo.core_algos"
FUNCTIONAL = "verl.utils.torch_functional"
FUSED = "verl.utils.experimental.torch_functional"
KERNEL = "verl.utils.kernel.linear_cross_entropy"
CORRECTION = "verl.trainer.ppo.rollout_corr_helper"
DEVICES = ("cpu", "cuda")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Outside = Callable[..., str | None]

host = register(Host("verl", "verl", title="verl", series=SERIES, install='pip install "verl==0.9.*"'))


def _outside(*tensors: Any) -> str | None:
    """Returns why the kernels serve no call with these tensors, or None."""
    for x in tensors:
        if not isinstance(x, torch.Tensor):
            return f"{type(x).__name__} in the place of a tensor"
        if hasattr(x, "full_tensor"):
            return "a DTensor, call full_tensor() first"
        if x.is_nested:
            return "a nested tensor"
        if x.device.type not in DEVICES:
            return f"device {x.device.type}"
        if x.dtype not in FLOATS:
            return f"dtype {x.dtype}"
    return None


def _of_logits(logits: Any, *args: Any, **kwargs: Any) -> str | None:
    return _outside(logits)


def _of_head(hidden: Any, weight: Any, *args: Any, **kwargs: Any) -> str | None:
    reason = _outside(hidden, weight)
    if reason is None and weight.numel() == 0 and hidden.shape[-1]:
        raise ValueError(f"weight must have shape [V, {hidden.shape[-1]}], got {tuple(weight.shape)}: gather the head")
    return reason if reason is not None or hidden.dtype == weight.dtype else f"{hidden.dtype} times {weight.dtype}"


def _of_kernel(
    hidden: Any,
    weight: Any,
    labels: Any,
    temperature: Any = 1.0,
    reduction: str = "none",
    dist_process_group: Any = None,
) -> str | None:
    return _of_head(hidden, weight) or logprobs.outside_of_head(reduction, dist_process_group)


def _of_losses(loss_mat: Any, *args: Any, **kwargs: Any) -> str | None:
    return _outside(loss_mat)


def _of_values(vpreds: Any, *args: Any, **kwargs: Any) -> str | None:
    return _outside(vpreds)


def _of_kl(logprob: Any, ref_logprob: Any, kl_penalty: str) -> str | None:
    reason = _outside(logprob, ref_logprob)
    if reason is None and logprob.shape != ref_logprob.shape:
        return f"shapes {tuple(logprob.shape)} and {tuple(ref_logprob.shape)}"
    return "a gradient of the reference" if reason is None and ref_logprob.requires_grad else reason


def _of_baseline(
    token_level_rewards: Any,
    response_mask: Any,
    index: Any,
    old_log_probs: Any,
    sum_pi_squared: Any,
    rollout_is_weights: Any = None,
    handle_zero_tail: bool = True,
    **kwargs: Any,
) -> str | None:
    return None if handle_zero_tail else "handle_zero_tail=False"


def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def _function(home: str, name: str, ours: Callable[..., Any], outside: Outside | None, *others: Site) -> Plan:
    """Returns the plan of a function whose parameters are those of ours; ``others``: further places that hold it."""
    site = Site.of(importlib.import_module(home), name)
    original = host.require_own(site, home, what="verl's own")
    host.require_signature(site.label, original, [_parameters(ours)])
    return Plan(original, host.counted(name, original, ours, outside), (site, *others))


def _plan_names() -> list[Plan]:
    """Returns the plans of new keys of the registries; refuses a key that somebody else has taken."""
    core = importlib.import_module(CORE)
    plans = []
    for registry, entries in (("POLICY_LOSS_REGISTRY", NAMED_LOSSES), ("ADV_ESTIMATOR_REGISTRY", NAMED_ADVANTAGES)):
        for name, function in entries.items():
            site = Site.of(getattr(core, registry), name, f"{CORE}.{registry}[{name!r}]")
            if site.read() is not ABSENT:
                raise host.refusal(f"{site.label} is {site.read()!r} already")
            plans.append(Plan(ABSENT, host.counted(name, function, function), (site,)))
    return plans


def _plan_logits() -> list[Plan]:
    return [
        _function(FUNCTIONAL, function.__name__, function, _of_logits)
        for function in (
            logprobs.logprobs_from_logits,
            logprobs.entropy_from_logits,
            logprobs.entropy_from_logits_with_chunking,
            logprobs.calculate_sum_pi_squared_from_logits,
        )
    ]


def _plan_fused() -> list[Plan]:
    site = Site.of(importlib.import_module(FUSED), "FusedLinearForPPO")
    original = host.require_own(site, FUSED, what="verl's own")
    ours = logprobs.FusedLinearForPPO
    host.require_signature(site.label, original, [_parameters(ours)])
    host.require_signature(f"{site.label}.forward", original.forward, [_parameters(ours.forward)])
    kernel = importlib.import_module(KERNEL)
    function = Site.of(kernel, "linear_cross_entropy")
    home: Any = host.require_own(Site.of(kernel, "LinearCrossEntropy"), KERNEL, what="verl's own")
    held, forward = function.read(), home.forward
    if getattr(held, "__self__", None) is not home:
        raise RuntimeError(
            f"{host.title}: {function.label} is {held!r} and not verl's own: another library has patched it; undo that "
            "patch first, nothing was patched"
        )
    known = ("ctx", *_parameters(logprobs.linear_cross_entropy))
    host.require_signature(f"{KERNEL}.LinearCrossEntropy.forward", forward, [known])
    replacement = host.counted(function.key, held, logprobs.linear_cross_entropy, _of_kernel)
    return [Plan(original, _counted_module(original), (site,)), Plan(held, replacement, (function,))]


def _counted_module(original: type) -> type:
    """Returns our module with verl's own behind it, for calls outside our domain."""

    class FusedLinearForPPO(logprobs.FusedLinearForPPO):
        def forward(self, hidden_states: Any, vocab_weights: Any, input_ids: Any, temperature: Any = 1.0) -> Any:
            columns = hidden_states, vocab_weights, input_ids, temperature
            reason = _of_head(hidden_states, vocab_weights)
            if reason is not None:
                delegate = host.delegate("FusedLinearForPPO", original, reason)
                return delegate(self.chunk_size, self.impl_backend)(*columns)
            result = super().forward(*columns)
            host.served("FusedLinearForPPO")
            return result

    FusedLinearForPPO.__doc__, FusedLinearForPPO.__module__ = original.__doc__, original.__module__
    FusedLinearForPPO.__qualname__ = original.__qualname__
    return FusedLinearForPPO


def _plan_losses() -> list[Plan]:
    return [
        _function(CORE, "agg_loss", losses.agg_loss, _of_losses),
        _function(CORE, "compute_value_loss", losses.compute_value_loss, _of_values),
        _function(CORE, "kl_penalty", losses.kl_penalty, _of_kl),
        _function(CORE, "compute_entropy_loss", losses.compute_entropy_loss, _of_logits),
    ]


def _plan_advantages() -> list[Plan]:
    core = importlib.import_module(CORE)
    plans = []
    for name, function in ADVANTAGES.items():
        label = f"{CORE}.ADV_ESTIMATOR_REGISTRY[{name!r}]"
        key = Site.of(core.ADV_ESTIMATOR_REGISTRY, name, label)
        original = host.require_own(key, CORE, what="verl's own")
        outside = _of_baseline if name.endswith("optimal_token_baseline") else None
        plans.append(_function(CORE, original.__name__, function, outside, key))
    return plans


def _plan_rollout() -> Plan:
    ours = rollout.compute_rollout_correction_weights
    return _function(CORRECTION, ours.__name__, ours, lambda log_ratio, *args, **kwargs: _outside(log_ratio))


PLANNERS: dict[str, Callable[[], Plan | Sequence[Plan] | str]] = {
    "names": _plan_names,
    "logits": _plan_logits,
    "fused": _plan_fused,
    "losses": _plan_losses,
    "advantages": _plan_advantages,
    "rollout": _plan_rollout,
}
