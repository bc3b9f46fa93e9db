"""DeepSpeed-Chat: its loss functions under its own names, ``RLKRewardModel``, and ``patch`` for its trainers.

The code of DeepSpeed-Chat is frozen, at commit 45b4b71 of DeepSpeedExamples. Served are:

* ``dschat.rlhf.ppo_trainer``: ``gather_log_probs``, and ``compute_rewards``, ``actor_loss_fn``, ``critic_loss_fn`` and
  ``get_advantages_and_returns`` of ``DeepSpeedPPOTrainer``;
* ``RewardModel``: ``forward`` and ``forward_value``, without a host synchronisation per pair or per answer;
* ``step2_dpo_finetuning/main.py``: ``get_batch_logps``.

The reductions run in fp32 or wider, whatever the dtype of the logits. So old and new log-probabilities of the same
weights agree with and without ``--compute_fp32_loss``, which DeepSpeed-Chat applies to the old ones alone.
"""

import importlib
from typing import Any

from rlkernels.integrations._patching import PatchReport, PatchStatus
from rlkernels.integrations.deepspeed_chat.functions import (
    actor_loss_fn,
    answer_end_scores,
    compute_rewards,
    critic_loss_fn,
    gather_log_probs,
    get_advantages_and_returns,
    get_batch_logps,
    pairwise_divergence_loss,
)
from rlkernels.integrations.deepspeed_chat.reward_model import subclass
from rlkernels.integrations.deepspeed_chat.seams import PLANNERS, REWARD, host

__all__ = [
    "RLKRewardModel",
    "actor_loss_fn",
    "answer_end_scores",
    "compute_rewards",
    "critic_loss_fn",
    "gather_log_probs",
    "get_advantages_and_returns",
    "get_batch_logps",
    "pairwise_divergence_loss",
    "patch",
    "status",
    "unpatch",
]


def patch(strict: bool = True) -> PatchReport:
    """Puts our functions into DeepSpeed-Chat's trainer and reward model, and into the script of DPO where it is loaded.

    Works before and after trainers and models are built; twice is once.

    Args:
        strict: a call outside our domain raises: another device or dtype, a broadcast argument, a gradient that ours
            does not give. Otherwise it is handed to the original and counted with the reason.

    Returns:
        One line per attribute that was replaced, and one, with the reason, per seam that is not there.

    Raises:
        ImportError: DeepSpeed-Chat is not importable as ``dschat``.
        RuntimeError: a signature is unknown, or another library has replaced a function. Nothing is replaced then.
    """
    return host.patch(PLANNERS, strict)


def unpatch() -> None:
    """Restores every attribute to the object that ``patch`` found there. Without a patch it does nothing.

    Raises:
        RuntimeError: another library has since replaced an attribute; undo its patch first. Nothing is restored then.
    """
    host.unpatch()


def status() -> PatchStatus:
    """Returns the attributes that are replaced now, and the calls and delegations counted since."""
    return host.status()


def __getattr__(name: str) -> Any:
    """Makes ``RLKRewardModel`` when it is asked for, because its base class is DeepSpeed-Chat's."""
    if name != "RLKRewardModel":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    host.version()  # raises an ImportError that says what to install
    return subclass(importlib.import_module(REWARD).RewardModel)
