"""The attributes of TRL that ``patch`` replaces: where each lies in which version, and what must hold of it."""

import importlib
from collections.abc import Callable

from rlkernels.integrations._patching import ABSENT, Host, Namespace, Plan, Site, register
from rlkernels.integrations.trl import replacements

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

host = register(Host("trl", "trl", title="TRL", series=SERIES, install='pip install "trl>=1.15"'))


def _plan_fused() -> Plan:
    utils = importlib.import_module("trl.trainer.utils")
    site = Site.of(utils, "_ChunkedLogProbFunction")
    original = site.read()
    if original is ABSENT:
        raise host.refusal(f"{site.label} does not exist")
    if original is None:
        # Only the signature of the seam's one user is left to check, because TRL 1.15 without Triton leaves the seam
        # empty and cannot train.
        host.require_signature("add_fused_lm_head", utils.add_fused_lm_head, HEAD_USER)
    else:
        host.require_own(site, "trl.kernels.chunked_logprob", what="TRL's own")
        host.require_signature(f"{site.key}.forward", original.forward, [("ctx", *known) for known in HEAD])
    return Plan(original, replacements.FusedHead("fused_head", original, host), (site,))


def _plan_logits() -> Plan | str:
    utils = importlib.import_module("trl.trainer.utils")
    site = Site.of(utils, "_fused_logprob_entropy")
    original = site.read()
    if original is ABSENT or original is None:
        return f"{site.label} absent: TRL has it only with Triton; selective_log_softmax stays TRL's own"
    host.require_own(site, "trl.kernels.logprob_entropy", what="TRL's own")
    host.require_signature(site.key, original, LOGITS)
    return Plan(original, replacements.LogprobEntropy("logprob_entropy", original, host), (site,))


def _plan_pairs() -> Plan:
    module = importlib.import_module("trl.trainer.reward_trainer")
    site, compute_loss = Site.of(module, "nn"), module.RewardTrainer.compute_loss
    host.require_signature("RewardTrainer.compute_loss", compute_loss, COMPUTE_LOSS)
    code = getattr(compute_loss, "__code__", None)
    if (
        code is None
        or compute_loss.__globals__ is not vars(module)
        or not {"nn", "functional", "logsigmoid"} <= set(code.co_names)
    ):
        raise host.refusal("RewardTrainer.compute_loss does not call nn.functional.logsigmoid of its module")
    original = host.require_own(site, "torch.nn", what="torch.nn")
    pairs = replacements.LogSigmoid("reward_pairs", original.functional.logsigmoid, host)
    functional = Namespace("functional", original.functional, host, logsigmoid=pairs)
    # This module alone: other modules of TRL hold torch.nn for other ends.
    return Plan(original, Namespace("nn", original, host, functional=functional), (site,), everywhere=False)


PLANNERS: dict[str, Callable[[], Plan | str]] = {"fused": _plan_fused, "logits": _plan_logits, "pairs": _plan_pairs}
