"""TRL: ``patch()`` puts our kernels under TRL's own trainers, ``unpatch()`` restores the very objects.

TRL keeps its objectives, masks, metrics and normalisers; what is replaced is the arithmetic below them:

* ``"fused"``: ``trl.trainer.utils._ChunkedLogProbFunction``, from hidden states and head to log-probabilities. It
  serves GRPO, RLOO, DPO, KTO and SFT.
* ``"logits"``: ``trl.trainer.utils._fused_logprob_entropy``, below ``selective_log_softmax`` and its siblings on a GPU
  with Triton.
* ``"pairs"``: ``nn`` of ``trl.trainer.reward_trainer``, whose ``logsigmoid`` of the reward margins RewardTrainer takes.

The attributes are private, so each is replaced only when its signature is a known one.
"""

from typing import get_args

from rlkernels.integrations._patching import PatchReport, PatchStatus
from rlkernels.integrations.trl.seams import PLANNERS, host
from rlkernels.types import TrlLevel

LEVELS = tuple(name for name in get_args(TrlLevel) if name != "all")


def patch(level: TrlLevel = "all", strict: bool = True) -> PatchReport:
    """Puts our kernels into TRL's seams.

    Works before and after TRL's trainers are imported or constructed; twice is once.

    Args:
        level: ``"fused"``, ``"logits"``, ``"pairs"``, or ``"all"``.
        strict: an input outside our domain raises. Otherwise it is handed to TRL's own function and counted with the
            reason. A TRL newer than those tried is refused under ``strict``; otherwise it is accepted if every
            signature is a known one.

    Returns:
        One line per attribute that was replaced, and one, with the reason, per seam that this TRL does not have.

    Raises:
        ValueError: ``level`` is not one of the above.
        ImportError: TRL is not installed.
        RuntimeError: this TRL's version or a signature is unknown, or another library has replaced the attribute.
            Nothing is replaced then.
    """
    if level not in (*LEVELS, "all"):
        raise ValueError(f"level must be one of {(*LEVELS, 'all')}, got {level!r}")
    return host.patch({name: PLANNERS[name] for name in (LEVELS if level == "all" else (level,))}, strict)


def unpatch() -> None:
    """Restores every attribute to the object that ``patch`` found there. Without a patch it does nothing.

    Raises:
        RuntimeError: another library has since replaced an attribute; undo its patch first. Nothing is restored then.
    """
    host.unpatch()


def status() -> PatchStatus:
    """Returns the attributes that are replaced now, and the calls and delegations counted since; the counts outlive
    ``unpatch`` until the next ``patch``.
    """
    return host.status()
