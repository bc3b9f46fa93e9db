"""TRL 1.15 and 1.16: ``patch()`` puts our kernels under TRL's own trainers, ``unpatch()`` restores the very objects.

TRL keeps its objectives, masks, metrics and normalisers; what is replaced is the arithmetic below them:

======== ===============================================
========================================================================== level    attribute
serves ======== ===============================================
========================================================================== fused
``trl.trainer.utils._ChunkedLogProbFunction``   GRPO, RLOO, DPO, KTO, SFT: hidden states and head to log-probabilities
logits   ``trl.trainer.utils._fused_logprob_entropy``    ``selective_log_softmax`` and its siblings, on a GPU with
Triton pairs    ``nn`` of ``trl.trainer.reward_trainer``        RewardTrainer: ``logsigmoid`` of the reward margins
======== ===============================================
==========================================================================

The attributes are private, so each is replaced only when its signature is a known one.
"""

import importlib
import threading
from collections.abc import Callable
from typing import Any, get_args

from rlkernels.integrations import _patching, _trl_functions
from rlkernels.integrations._patching import PatchReport, PatchStatus, Plan
from rlkernels.types import TrlLevel

LEVELS = tuple(name for name in get_args(TrlLevel) if name != "all")
SERIES = ("1.15", "1.16")

HEAD = (
    (
        "hidden",
        "weight",
        "bias",
        "targets",
        "temperature",
        "chunk_size",
        "final_logit_softcapping",
        "logit_scale",
        "outputs",
    ),
)
HEAD_USER = (("model", "temperature", "cast_lm_head_to_fp32", "outputs"),)
LOGITS = (("logits", "index", "temperature", "row_mask"),)
COMPUTE_LOSS = (("self", "model", "inputs", "return_outputs", "num_items_in_batch"),)

_ledger = _patching.Ledger()
_plans: dict[str, Plan] = {}
_lock = threading.RLock()


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
    with _lock:
        host = _host(strict)
        plans: dict[str, Plan] = {}
        skipped: list[str] = []
        for name in LEVELS if level == "all" else (level,):
            known = _plans.get(name)
            if known is not None:
                _require_ours(host, known)
            planned = _PLANNERS[name](host) if known is None else known
            if isinstance(planned, str):
                skipped.append(planned)
            else:
                plans[name] = planned
        # Every check has passed: from here on nothing can refuse, so a refusal never leaves half of the seams replaced.
        if not _plans:
            _ledger.clear()
        _ledger.strict = strict
        lines = []
        for name, plan in plans.items():
            for module, attribute in plan.sites:
                setattr(module, attribute, plan.replacement)
            _plans[name] = plan
            lines += [f"{_patching.describe(site)} -> rlkernels ({name})" for site in plan.sites]
        return PatchReport(host, tuple(lines), tuple(skipped))


def unpatch() -> None:
    """Restores every attribute to the object that ``patch`` found there. Without a patch it does nothing.

    Raises:
        RuntimeError: another library has since replaced an attribute; undo its patch first. Nothing is restored then.
    """
    with _lock:
        for plan in _plans.values():
            _require_ours("rlkernels", plan)
        for plan in _plans.values():
            # Found again by identity: a module imported while the patch was on has bound our object under a name of its
            # own.
            for module, attribute in {
                **dict.fromkeys(plan.sites),
                **dict.fromkeys(_patching.holders("trl", plan.replacement)),
            }:
                setattr(module, attribute, plan.replacement.original)
        _plans.clear()


def status() -> PatchStatus:
    """Returns the attributes that are replaced now, and the calls and delegations counted since; the counts outlive
    ``unpatch`` until the next ``patch``.
    """
    with _lock:
        held = [
            _patching.describe(site)
            for plan in _plans.values()
            for site in plan.sites
            if _held(site) is plan.replacement
        ]
        return PatchStatus(tuple(held), dict(_ledger.calls), dict(_ledger.delegations))


def _held(site):
    return getattr(site[0], site[1], None)


def _host(strict: bool) -> str:
    try:
        version = importlib.import_module("trl").__version__
    except ImportError as error:
        raise ImportError(f'rlkernels.integrations.trl needs TRL ({error}); pip install "trl>=1.15"') from error
    series = ".".join(version.split(".")[:2])
    numbers = tuple(int(part) if part.isdigit() else 0 for part in series.split("."))
    if series not in SERIES and (strict or numbers < (1, 15)):
        newer = "; patch(strict=False) accepts a newer one whose signatures are known" if numbers > (1, 16) else ""
        raise RuntimeError(
            f"TRL {version}: known are {', '.join(s + '.x' for s in SERIES)}; nothing was patched{newer}"
        )
    return f"TRL {version}"


def _require_ours(host: str, plan: Plan) -> None:
    for site in plan.sites:
        if _held(site) is not plan.replacement:
            found = f"{_patching.describe(site)} was replaced by {_held(site)!r} after our patch"
            raise RuntimeError(f"{host}: {found}; undo that one first, nothing was changed")


def _require_own(host: str, site, home: str, what: str) -> None:
    """Raises unless what stands at ``site`` was defined in, or is, the module ``home``."""
    found = _held(site)
    if home not in (getattr(found, "__module__", None), getattr(found, "__name__", None)):
        message = f"{_patching.describe(site)} is {found!r} and not {what}: another library has patched it"
        raise RuntimeError(f"{host}: {message}; undo that patch first, nothing was patched")


def _plan_fused(host: str) -> Plan:
    utils = importlib.import_module("trl.trainer.utils")
    site = (utils, "_ChunkedLogProbFunction")
    if not hasattr(utils, site[1]):
        raise RuntimeError(f"{host}: {_patching.describe(site)} does not exist; nothing was patched")
    original = _held(site)
    if original is None:
        # Only the signature of the seam's one user is left to check, because TRL 1.15 without Triton leaves the seam
        # empty and cannot train.
        _patching.require_signature(host, "add_fused_lm_head", utils.add_fused_lm_head, HEAD_USER)
        sites: tuple[tuple[Any, str], ...] = (site,)
    else:
        _require_own(host, site, "trl.kernels.chunked_logprob", "TRL's own")
        _patching.require_signature(
            host, f"{site[1]}.forward", original.forward, tuple(("ctx", *known) for known in HEAD)
        )
        sites = _patching.holders("trl", original)
    return Plan(_trl_functions.FusedHead("fused_head", original, _ledger), sites)


def _plan_logits(host: str) -> Plan | str:
    utils = importlib.import_module("trl.trainer.utils")
    site = (utils, "_fused_logprob_entropy")
    original = _held(site)
    if original is None:
        return f"{_patching.describe(site)} absent: TRL has it only with Triton; selective_log_softmax stays TRL's own"
    _require_own(host, site, "trl.kernels.logprob_entropy", "TRL's own")
    _patching.require_signature(host, site[1], original, LOGITS)
    return Plan(_trl_functions.LogprobEntropy("logprob_entropy", original, _ledger), _patching.holders("trl", original))


def _plan_pairs(host: str) -> Plan:
    module = importlib.import_module("trl.trainer.reward_trainer")
    site, compute_loss = (module, "nn"), module.RewardTrainer.compute_loss
    _patching.require_signature(host, "RewardTrainer.compute_loss", compute_loss, COMPUTE_LOSS)
    code = getattr(compute_loss, "__code__", None)
    if (
        code is None
        or compute_loss.__globals__ is not vars(module)
        or not {"nn", "functional", "logsigmoid"} <= set(code.co_names)
    ):
        raise RuntimeError(
            f"{host}: RewardTrainer.compute_loss does not call nn.functional.logsigmoid of its module; "
            "nothing was patched"
        )
    original = _held(site)
    _require_own(host, site, "torch.nn", "torch.nn")
    pairs = _trl_functions.LogSigmoid("reward_pairs", original.functional.logsigmoid, _ledger)
    functional = _patching.Namespace("functional", original.functional, _ledger, logsigmoid=pairs)
    return Plan(_patching.Namespace("nn", original, _ledger, functional=functional), (site,))


_PLANNERS: dict[str, Callable[[str], Plan | str]] = {"fused": _plan_fused, "logits": _plan_logits, "pairs": _plan_pairs}
