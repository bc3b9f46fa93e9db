"""The seams of OpenRLHF 0.11.2 that ``patch`` replaces, and the signatures that they must have before."""

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch

from rlkernels.integrations._patching import Host, Plan, Site, home_of, register
from rlkernels.integrations.openrlhf import functions, policy, supervised

SERIES = ("0.11.2",)
host = register(Host("openrlhf", "openrlhf", title="OpenRLHF", series=SERIES, install="pip install openrlhf==0.11.2"))

UTILS, LOSS = "openrlhf.models.utils", "openrlhf.models.loss"
MAKER = "openrlhf.trainer.ppo_utils.experience_maker"
WRAPPERS = ("torch._dynamo.eval_frame", "torch.utils._contextlib")
"""The modules of the wrappers that ``torch.compile`` and ``torch.no_grad`` make, which OpenRLHF puts around its own."""

TOTALS = ("dp_size", "batch_num_tokens", "global_batch_size")
FUNCTIONS = {
    "log_probs_from_logits": (UTILS, ("logits", "labels", "temperature")),
    "compute_entropy": (UTILS, ("logits",)),
    "compute_approx_kl": (UTILS, ("log_probs", "log_probs_base", "log_probs_old", "kl_estimator", "unbiased_gradient")),
    "compute_reward": (UTILS, ("r", "kl_coef", "kl", "action_mask", "reward_clip_range")),
    "masked_mean": (UTILS, ("tensor", "mask", "dim")),
    "masked_normalize": (UTILS, ("tensor", "mask", "dim", "eps")),
    "aggregate_loss": (LOSS, ("loss", "loss_mask", "token_level_loss", *TOTALS)),
}
"""The functions, which trainers import by name: the module that defines each, and its parameters."""

CLASSES: dict[str, tuple[Any, tuple[str, ...] | None, tuple[str, ...]]] = {
    "PolicyLoss": (
        policy.PolicyLoss,
        (
            "clip_eps_low",
            "clip_eps_high",
            "dual_clip",
            "token_level_loss",
            "policy_loss_type",
            "is_correction_level",
            "is_correction_mode",
            "is_correction_gating",
            "is_correction_threshold",
        ),
        ("log_probs", "old_log_probs", "advantages", "action_mask", "rollout_log_probs", *TOTALS),
    ),
    "ValueLoss": (
        policy.ValueLoss,
        ("clip_eps", "token_level_loss"),
        ("values", "old_values", "returns", "action_mask", *TOTALS),
    ),
    "PairWiseLoss": (supervised.PairWiseLoss, None, ("chosen_reward", "reject_reward", "margin")),
    "LogExpLoss": (supervised.LogExpLoss, None, ("chosen_reward", "reject_reward", "margin")),
    "DPOLoss": (
        supervised.DPOLoss,
        ("beta", "label_smoothing", "ipo"),
        ("policy_chosen_logps", "policy_rejected_logps", "reference_chosen_logps", "reference_rejected_logps"),
    ),
    "SFTLoss": (supervised.SFTLoss, ("token_level_loss",), ("per_token_logps", "loss_mask", *TOTALS)),
    "GPTLMLoss": (supervised.GPTLMLoss, ("ring_attn_group",), ("logits", "labels")),
}
"""The classes: ours, the parameters of ``__init__`` (None where it is that of ``nn.Module``), those of ``forward``."""

METHODS = {
    "get_advantages_and_returns": ("values", "rewards", "action_mask", "gamma", "lambd"),
    "get_cumulative_returns": ("rewards", "action_mask", "gamma"),
}
"""The methods of ``RemoteExperienceMaker``, and their parameters behind ``self``."""


def home(name: str) -> Any:
    """Imports a module of OpenRLHF and returns it.

    Raises:
        ImportError: something that it imports is missing; the message says what to install.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            f"rlkernels.integrations.openrlhf needs {name}, whose import failed ({error}); install what OpenRLHF "
            f"requires: {host.install}"
        ) from error


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
    """Yields the tensors among the arguments of a call."""
    return (x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor))


def _elsewhere(*args: Any, **kwargs: Any) -> str | None:
    """Returns why a call cannot be ours whatever its function is: a dtype or a device that we do not serve."""
    for x in _tensors(args, kwargs):
        if x.is_complex():
            return f"a tensor of {x.dtype}"
    return None


def _of_masked_mean(tensor: Any, mask: Any, dim: Any = None) -> str | None:
    if dim is not None and (isinstance(dim, bool) or not isinstance(dim, int)):
        return "dim is not an int"
    if isinstance(mask, torch.Tensor) and mask.shape != tensor.shape:
        return "mask and tensor of different shapes"
    return _elsewhere(tensor, mask)


def _of_same_shape(what: str, *names: str, constant: tuple[str, ...] = ()) -> Callable[..., str | None]:
    """Returns a check that refuses arguments ``names`` of different shapes, which OpenRLHF would broadcast, and a
    gradient of the arguments ``constant``.
    """

    def outside(*args: Any, **kwargs: Any) -> str | None:
        known = dict(zip(_parameters(what), args, strict=False)) | kwargs
        shapes = {tuple(known[n].shape) for n in names if isinstance(known.get(n), torch.Tensor)}
        if len(shapes) > 1:
            return f"{', '.join(names)} of different shapes"
        learned = [n for n in constant if isinstance(known.get(n), torch.Tensor) and known[n].requires_grad]
        return f"{learned[0]} requires a gradient" if learned else _elsewhere(*args, **kwargs)

    return outside


def _parameters(name: str) -> tuple[str, ...]:
    if name in FUNCTIONS:
        return FUNCTIONS[name][1]
    return ("self", *(CLASSES[name][2] if name in CLASSES else METHODS[name]))


OUTSIDE: dict[str, Callable[..., str | None]] = {
    "masked_mean": _of_masked_mean,
    "masked_normalize": _of_same_shape("masked_normalize", "tensor", "mask"),
    "compute_approx_kl": _of_same_shape(
        "compute_approx_kl", "log_probs", "log_probs_base", "log_probs_old", constant=("log_probs_base",)
    ),
    "aggregate_loss": _of_same_shape("aggregate_loss", "loss", "loss_mask"),
    "PolicyLoss": _of_same_shape(
        "PolicyLoss",
        "log_probs",
        "old_log_probs",
        "advantages",
        "action_mask",
        constant=("old_log_probs", "advantages"),
    ),
    "ValueLoss": _of_same_shape("ValueLoss", "values", "returns", "action_mask", constant=("old_values", "returns")),
    "PairWiseLoss": _of_same_shape("PairWiseLoss", "chosen_reward", "reject_reward", "margin"),
    "SFTLoss": _of_same_shape("SFTLoss", "per_token_logps", "loss_mask"),
}
"""The calls that go to OpenRLHF's own function, or raise under ``strict``."""


def _own(site: Site, module: str) -> Any:
    """Returns what stands at a site, a function of ``module`` within torch's own wrappers or without one."""
    found = host.require_own(site, module, *WRAPPERS)
    inner = inspect.unwrap(found)
    if home_of(inner) != module:
        raise host.refusal(f"{site.label} wraps {inner!r}, which is not OpenRLHF's own")
    return found


def _plan_function(name: str) -> Plan:
    module, known = FUNCTIONS[name]
    site = Site.of(home(module), name)
    original = _own(site, module)
    host.require_signature(name, original, (known,))
    ours = getattr(functions, name)
    return Plan(original, host.counted(name, original, ours, OUTSIDE.get(name, _elsewhere)), (site,))


def _plan_class(name: str) -> Plan:
    ours, of_init, of_forward = CLASSES[name]
    owner = host.require_own(Site.of(home(LOSS), name), LOSS)
    if of_init is not None:
        host.require_signature(f"{name}.__init__", owner.__init__, (("self", *of_init),))
    elif "__init__" in vars(owner):
        raise host.refusal(f"{name}.__init__ exists, known is none")
    # ``forward`` and not the class, because a trainer that holds an instance or a subclass calls ours then, too.
    site = Site.of(owner, "forward")
    original = host.require_own(site, LOSS)
    host.require_signature(f"{name}.forward", original, (("self", *of_forward),))
    replacement = host.counted(name, original, ours.forward, OUTSIDE.get(name, _elsewhere))
    return Plan(original, replacement, (site,), everywhere=False)


def plan_methods() -> list[Plan] | str:
    """Plans the estimators of the experience maker."""
    owner = host.require_own(Site.of(home(MAKER), "RemoteExperienceMaker"), MAKER)
    plans = []
    for name, known in METHODS.items():
        site = Site.of(owner, name)
        original = _own(site, MAKER)
        host.require_signature(f"RemoteExperienceMaker.{name}", original, (("self", *known),))
        replacement = host.counted(name, original, _as_method(getattr(functions, name)), _elsewhere)
        plans.append(Plan(original, replacement, (site,), everywhere=False))
    return plans


def _as_method(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function as a method that does not look at its instance."""

    @functools.wraps(function)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return method


PLANNERS: dict[str, Callable[[], Any]] = {
    **{name: functools.partial(_plan_function, name) for name in FUNCTIONS},
    **{name: functools.partial(_plan_class, name) for name in CLASSES},
}
"""The seams below ``openrlhf.models``."""
