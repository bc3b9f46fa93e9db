"""TRL: ``patch()`` puts our kernels under TRL's own trainers, ``unpatch()`` restores the very objects.

TRL keeps its objectives, masks, metrics and normalisers; what is replaced is the arithmetic below them:

======== ========================================================= ====================================================
level    attributes                                                serves
======== ========================================================= ====================================================
fused    ``trl.trainer.utils._ChunkedLogProbFunction``             GRPO, RLOO, DPO, KTO, SFT from 1.15 on
fused    ``trl.kernels.chunked_divergence``:                       DistillationTrainer, from 1.15 on
         ``ChunkedDivergenceFunction``
logits   ``selective_log_softmax``, ``entropy_from_logits``,       every trainer up to 1.14; the experimental ones
         ``selective_log_softmax_and_entropy``, under every name
logits   ``trl.trainer.utils._fused_logprob_entropy``              what calls these functions on a GPU with Triton
pairs    ``nn`` of ``trl.trainer.reward_trainer``                  RewardTrainer: ``logsigmoid`` of the reward margins
======== ========================================================= ====================================================

The attributes are private, so each is replaced only when its signature is a known one. Trainers that were imported
before the patch hold some of them by name; every such name is found and replaced, too.

TRL's own names are public functions here: ``selective_log_softmax``, ``entropy_from_logits``,
``selective_log_softmax_and_entropy``, ``ChunkedLogProbFunction``, ``ChunkedDivergenceFunction``, ``add_fused_lm_head``.
"""

from typing import get_args

import torch

from rlkernels.integrations._patching import PatchReport, PatchStatus
from rlkernels.integrations.trl.functions import (
    ChunkedDivergenceFunction,
    ChunkedLogProbFunction,
    entropy_from_logits,
    selective_log_softmax,
    selective_log_softmax_and_entropy,
)
from rlkernels.integrations.trl.fused_lm_head import add_fused_lm_head
from rlkernels.integrations.trl.seams import PLANNERS, host
from rlkernels.types import TrlLevel

__all__ = [
    "ChunkedDivergenceFunction",
    "ChunkedLogProbFunction",
    "add_fused_lm_head",
    "entropy_from_logits",
    "patch",
    "selective_log_softmax",
    "selective_log_softmax_and_entropy",
    "status",
    "unpatch",
]

LEVELS = tuple(name for name in get_args(TrlLevel) if name != "all")
LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def patch(level: TrlLevel = "all", strict: bool = True, logits_dtype: torch.dtype | None = None) -> PatchReport:
    """Puts our kernels into TRL's seams.

    Works before and after TRL's trainers are imported or constructed; twice is once. A second call's ``strict`` and
    ``logits_dtype`` hold for all seams.

    Args:
        level: ``"fused"``, ``"logits"``, ``"pairs"``, or ``"all"``.
        strict: an input outside our domain raises. Otherwise it is handed to TRL's own function and counted with the
            reason. A TRL newer than those tried is refused under ``strict``; otherwise it is accepted if every
            signature is a known one.
        logits_dtype: the dtype in which logits enter the softmax. None keeps the fp32 sums of a head's matmul, and
            leaves 16-bit logits on a CPU to TRL's own function at level ``"logits"``, because TRL's tests demand its
            bits there. ``torch.float32`` serves these as well. ``torch.bfloat16`` or ``torch.float16`` round the logits
            of a head, as TRL does.

    Returns:
        One line per attribute that was replaced, and one, with the reason, per seam that this TRL does not have.

    Raises:
        ValueError: ``level`` or ``logits_dtype`` is not one of the above.
        ImportError: TRL is not installed.
        RuntimeError: this TRL's version or a signature is unknown, or another library has replaced the attribute.
            Nothing is replaced then.
    """
    if level not in (*LEVELS, "all"):
        raise ValueError(f"level must be one of {(*LEVELS, 'all')}, got {level!r}")
    if logits_dtype is not None and logits_dtype not in LOGITS_DTYPES:
        raise ValueError(f"logits_dtype must be None or one of {LOGITS_DTYPES}, got {logits_dtype!r}")
    planners = {}
    for name in LEVELS if level == "all" else (level,):
        planners.update(PLANNERS[name])
    return host.patch(planners, strict, {"logits_dtype": logits_dtype})


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
