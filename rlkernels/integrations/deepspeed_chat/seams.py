"""The attributes of DeepSpeed-Chat that ``patch`` replaces, what must hold of them, and the calls that stay its own."""

import functools
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlkernels.integrations._patching import Host, Plan, Site, register
from rlkernels.integrations.deepspeed_chat import functions, reward_model

DEVICES = ("cpu", "cuda")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PPO, REWARD = "dschat.rlhf.ppo_trainer", "dschat.utils.model.reward_model"
SCRIPT = "step2_dpo_finetuning/main.py"
"""The end of the path of the script that trains with DPO; it is no module of a package."""

KNOWN: dict[str, tuple[str, ...]] = {
    "gather_log_probs": ("logits", "labels"),
    "compute_rewards": ("self", "prompts", "log_probs", "ref_log_probs", "reward_score", "action_mask"),
    "actor_loss_fn": ("self", "logprobs", "old_logprobs", "advantages", "mask"),
    "critic_loss_fn": ("self", "values", "old_values", "returns", "mask"),
    "get_advantages_and_returns": ("self", "values", "rewards", "start"),
    "forward": (
        "self",
        "input_ids",
        "past_key_values",
        "attention_mask",
        "position_ids",
        "head_mask",
        "inputs_embeds",
        "use_cache",
    ),
    "forward_value": (
        "self",
        "input_ids",
        "attention_mask",
        "past_key_values",
        "position_ids",
        "head_mask",
        "inputs_embeds",
        "return_value_only",
        "prompt_length",
        "use_cache",
    ),
    "get_batch_logps": ("logits", "input_ids", "label_mask"),
}
"""The parameters of each original."""

host = register(
    Host(
        "deepspeed_chat",
        "dschat",
        title="DeepSpeed-Chat",
        install="pip install -e applications/DeepSpeed-Chat of a checkout of DeepSpeedExamples",
    )
)


def constants(**tensors: Any) -> str | None:
    """Returns the reason why a call is not ours: one of ``tensors`` needs a gradient, which ours does not give it."""
    for name, x in tensors.items():
        if torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad:
            return f"{name} requires a gradient"
    return None


def alike(**tensors: Any) -> str | None:
    """Returns the reason why a call is not ours where ``tensors`` are not floats of one shape on our devices."""
    shape = None
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            return f"{name} is a {type(x).__name__}"
        if x.device.type not in DEVICES:
            return f"{name} is on the device {x.device.type}"
        if name not in ("mask", "action_mask") and x.dtype not in FLOATS:
            return f"{name} is {x.dtype}"
        if shape is not None and x.shape != shape:
            return f"{name} is broadcast"
        shape = x.shape
    return None


def _outside_of_rewards(
    trainer: Any, prompts: Any, log_probs: Any, ref_log_probs: Any, reward_score: Any, action_mask: Any
) -> str | None:
    for name in ("kl_ctl", "clip_reward_value"):
        setting = getattr(trainer, name)
        if isinstance(setting, Tensor) or setting < 0:
            return f"{name} is no number of at least 0"
    reason = alike(log_probs=log_probs, ref_log_probs=ref_log_probs, action_mask=action_mask)
    return reason or constants(log_probs=log_probs, ref_log_probs=ref_log_probs, reward_score=reward_score)


def _outside_of_actor(trainer: Any, logprobs: Any, old_logprobs: Any, advantages: Any, mask: Any) -> str | None:
    reason = alike(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    return reason or constants(old_logprobs=old_logprobs, advantages=advantages)


def _outside_of_critic(trainer: Any, values: Any, old_values: Any, returns: Any, mask: Any) -> str | None:
    reason = alike(values=values, old_values=old_values, returns=returns, mask=mask)
    return reason or constants(old_values=old_values, returns=returns)


def _outside_of_gae(trainer: Any, values: Any, rewards: Any, start: int) -> str | None:
    return alike(rewards=rewards, values=values) or constants(values=values)


def _outside_of_pairs(model: Any, input_ids: Any = None, *args: Any, **kwargs: Any) -> str | None:
    if not isinstance(input_ids, Tensor):
        return f"input_ids is a {type(input_ids).__name__}"
    if input_ids.device.type not in DEVICES:
        return f"input_ids is on the device {input_ids.device.type}"
    return "input_ids has an odd number of rows" if input_ids.shape[0] % 2 else None


def _outside_of_logits(logits: Any, *args: Any, **kwargs: Any) -> str | None:
    return alike(logits=logits)


def _compute_rewards(trainer: Any, *args: Any, **kwargs: Any) -> Any:
    return functions.compute_rewards(
        *args, **kwargs, kl_ctl=trainer.kl_ctl, clip_reward_value=trainer.clip_reward_value
    )


def _actor_loss_fn(trainer: Any, *args: Any, **kwargs: Any) -> Any:
    return functions.actor_loss_fn(*args, **kwargs, cliprange=trainer.cliprange)


def _critic_loss_fn(trainer: Any, *args: Any, **kwargs: Any) -> Any:
    return functions.critic_loss_fn(*args, **kwargs, cliprange_value=trainer.cliprange_value)


def _get_advantages_and_returns(trainer: Any, *args: Any, **kwargs: Any) -> Any:
    return functions.get_advantages_and_returns(*args, **kwargs, gamma=trainer.gamma, lam=trainer.lam)


METHODS: dict[str, tuple[Callable[..., Any], Callable[..., str | None]]] = {
    "compute_rewards": (_compute_rewards, _outside_of_rewards),
    "actor_loss_fn": (_actor_loss_fn, _outside_of_actor),
    "critic_loss_fn": (_critic_loss_fn, _outside_of_critic),
    "get_advantages_and_returns": (_get_advantages_and_returns, _outside_of_gae),
}
"""The methods of the trainer: ours, and the reason why a call is not ours."""


def _plan(owner: Any, name: str, home: str, ours: Any, outside: Any, everywhere: bool = False) -> Plan:
    """Checks one function and returns the plan of its replacement."""
    site = Site.of(owner, name)
    original = host.require_own(site, home, what="DeepSpeed-Chat's own")
    host.require_signature(site.label, original, (KNOWN[name],))
    return Plan(original, host.counted(name, original, ours, outside), (site,), everywhere)


def _plan_ppo() -> Sequence[Plan] | str:
    try:
        module = importlib.import_module(PPO)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "deepspeed":
            raise
        return f"{PPO} absent: it needs DeepSpeed ({error})"
    gather = functions.gather_log_probs
    plans = [_plan(module, "gather_log_probs", PPO, gather, _outside_of_logits, everywhere=True)]
    return plans + [_plan(module.DeepSpeedPPOTrainer, name, PPO, *entry) for name, entry in METHODS.items()]


def _plan_reward() -> Sequence[Plan]:
    kind = importlib.import_module(REWARD).RewardModel
    value = host.require_own(Site.of(kind, "forward_value"), REWARD, what="DeepSpeed-Chat's own")

    def forward(model: Any, *args: Any, **kwargs: Any) -> Any:
        return reward_model.forward(functools.partial(value, model), model, *args, **kwargs)

    def forward_value(model: Any, *args: Any, **kwargs: Any) -> Any:
        return reward_model.forward_value(functools.partial(value, model), model, *args, **kwargs)

    return [
        _plan(kind, "forward", REWARD, forward, _outside_of_pairs),
        _plan(kind, "forward_value", REWARD, forward_value, None),
    ]


def _plan_dpo() -> Plan | str:
    for name, module in sorted(sys.modules.items()):
        path = getattr(module, "__file__", None) or ""
        if path.replace("\\", "/").endswith(SCRIPT) and "get_batch_logps" in vars(module):
            ours = functions.get_batch_logps
            return _plan(module, "get_batch_logps", name, ours, _outside_of_logits)
    return f"{SCRIPT} absent: the script is not loaded, or has not defined get_batch_logps yet"


PLANNERS: dict[str, Callable[[], Plan | Sequence[Plan] | str]] = {
    "ppo": _plan_ppo,
    "reward": _plan_reward,
    "dpo": _plan_dpo,
}
