"""OpenRLHF 0.11.2: its loss layer under its own names, and ``patch()``, which puts ours below its own trainers.

``patch`` replaces each function in every module that has imported it, ``forward`` of each class of losses, so that
instances and subclasses of it call ours, too, and the two estimators of the experience maker. OpenRLHF keeps its
trainers, its normalisers and its metrics. ``legacy`` has the names of 0.5.5. ``python -m rlkernels.launch`` patches the
workers of Ray, too.
"""

from collections.abc import Callable

from rlkernels.integrations._after_import import after_import, is_imported
from rlkernels.integrations._patching import PatchReport, PatchStatus
from rlkernels.integrations.openrlhf import legacy
from rlkernels.integrations.openrlhf.functions import (
    aggregate_loss,
    compute_approx_kl,
    compute_entropy,
    compute_reward,
    get_advantages_and_returns,
    get_cumulative_returns,
    log_probs_from_logits,
    masked_mean,
    masked_normalize,
)
from rlkernels.integrations.openrlhf.policy import PolicyLoss, ValueLoss
from rlkernels.integrations.openrlhf.seams import MAKER, PLANNERS, host, plan_methods
from rlkernels.integrations.openrlhf.supervised import DPOLoss, GPTLMLoss, LogExpLoss, PairWiseLoss, SFTLoss

__all__ = [
    "DPOLoss",
    "GPTLMLoss",
    "LogExpLoss",
    "PairWiseLoss",
    "PolicyLoss",
    "SFTLoss",
    "ValueLoss",
    "aggregate_loss",
    "compute_approx_kl",
    "compute_entropy",
    "compute_reward",
    "get_advantages_and_returns",
    "get_cumulative_returns",
    "legacy",
    "log_probs_from_logits",
    "masked_mean",
    "masked_normalize",
    "patch",
    "status",
    "unpatch",
]

_waiting: list[Callable[[], None]] = []
"""The way to give up waiting for the experience maker."""


def patch(strict: bool = True) -> PatchReport:
    """Puts our kernels into OpenRLHF's loss layer.

    Works before and after OpenRLHF's trainers are imported or constructed; twice is once. The experience maker imports
    Ray and vLLM, so that it is patched when something else has imported it.

    Args:
        strict: an input outside our domain raises. Otherwise it goes to OpenRLHF's own function and is counted with the
            reason. Another version than 0.11.2 is refused under ``strict``; otherwise a newer one is accepted if every
            signature is a known one.

    Returns:
        One line per attribute that was replaced, and one, with the reason, for what is not yet.

    Raises:
        ImportError: OpenRLHF, or something that it imports, is not installed.
        RuntimeError: this OpenRLHF's version or a signature is unknown, or another library has replaced the attribute.
            Nothing is replaced then.
    """
    with host.lock:
        planners, loaded = dict(PLANNERS), is_imported(MAKER)
        planners["returns"] = plan_methods if loaded else (lambda: f"{MAKER} is patched when it has been imported")
        report = host.patch(planners, strict)
        if not loaded and not _waiting:
            _waiting.append(after_import(MAKER, _patch_maker))
        return report


def _patch_maker() -> None:
    """Patches the experience maker, which has been imported now."""
    with host.lock:
        _waiting.clear()
        host.patch({"returns": plan_methods}, host.strict)


def unpatch() -> None:
    """Restores every attribute to the object that ``patch`` found there. Without a patch it does nothing.

    Raises:
        RuntimeError: another library has since replaced an attribute; undo its patch first. Nothing is restored then.
    """
    with host.lock:
        host.unpatch()
        while _waiting:
            _waiting.pop()()


def status() -> PatchStatus:
    """Returns the attributes that are replaced now, and the calls and delegations counted since; the counts outlive
    ``unpatch`` until the next ``patch``.
    """
    return host.status()
