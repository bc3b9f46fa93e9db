"""The attributes of TRL that ``patch`` replaces: where each lies in which version, and what must hold of it."""

import ast
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path

from rlkernels.integrations._patching import ABSENT, Host, Namespace, Plan, Site, register
from rlkernels.integrations.trl import functions, replacements

SERIES = ("1.12", "1.13", "1.14", "1.15", "1.16")

HEAD: tuple[str, ...] = ("hidden", "weight", "bias", "targets", "temperature", "chunk_size")
HEAD += ("final_logit_softcapping", "logit_scale", "outputs")
HEADS = {
    HEAD: replacements.FusedHead,
    ("last_hidden", *HEAD[1:-1]): replacements.FusedHeadOf14,
    ("last_hidden", "weight", *HEAD[3:-1]): replacements.FusedHeadOf12,
}
DIVERGENCE = (
    "student_hidden",
    "student_weight",
    "student_bias",
    "teacher_hidden",
    "teacher_weight",
    "teacher_bias",
    "beta",
    "temperature",
    "student_logit_scale",
    "student_final_logit_softcapping",
    "teacher_logit_scale",
    "teacher_final_logit_softcapping",
)
LOGITS = {
    "selective_log_softmax": (("logits", "index", "temperature", "row_mask"), ("logits", "index")),
    "entropy_from_logits": (("logits", "chunk_size"),),
    "selective_log_softmax_and_entropy": (("logits", "index", "entropy_requires_grad", "temperature", "row_mask"),),
}
"""The public functions over logits, each with the parameters it has or had; the last one came with TRL 1.14."""
FUSED_LOGITS = (("logits", "index", "temperature", "row_mask"),)
COMPUTE_LOSS = (("self", "model", "inputs", "return_outputs", "num_items_in_batch"),)

host = register(Host("trl", "trl", title="TRL", series=SERIES, install='pip install "trl>=1.12"'))


def _plan_fused() -> Plan:
    utils = importlib.import_module("trl.trainer.utils")
    site = Site.of(utils, "_ChunkedLogProbFunction")
    original = site.read()
    if original is ABSENT:
        raise host.refusal(f"{site.label} does not exist")
    if original is None:
        # TRL 1.15 without Triton leaves the seam empty and cannot train. Its source still says what it would call.
        _require_source("trl.kernels.chunked_logprob", "ChunkedLogProbFunction", ("ctx", *HEAD))
        return Plan(None, replacements.FusedHead("fused_head", None, host), (site,))
    host.require_own(site, "trl.kernels.chunked_logprob", "trl.trainer.utils", what="TRL's own")
    known = [("ctx", *names) for names in HEADS]
    found = host.require_signature(f"{site.key}.forward", original.forward, known)
    return Plan(original, HEADS[found[1:]]("fused_head", original, host), (site,))


def _plan_distillation() -> Plan | str:
    name = "trl.kernels.chunked_divergence"
    try:
        module = importlib.import_module(name)
        # Bound there by name from 1.16 on.
        importlib.import_module("trl.trainer.distillation_trainer")
    except ImportError as error:
        return f"{name}.ChunkedDivergenceFunction absent: {error}"
    site = Site.of(module, "ChunkedDivergenceFunction")
    original = host.require_own(site, name, what="TRL's own")
    host.require_signature(f"{site.key}.forward", original.forward, [("ctx", *DIVERGENCE)])
    return Plan(original, replacements.Divergence("divergence", original, host), (site,))


def _plan_logits() -> list[Plan]:
    utils = importlib.import_module("trl.trainer.utils")
    plans = []
    for name, known in LOGITS.items():
        site = Site.of(utils, name)
        if site.read() is ABSENT and name == "selective_log_softmax_and_entropy":
            continue
        original = host.require_own(site, "trl.trainer.utils", what="TRL's own")
        host.require_signature(name, original, known)
        keeps = (replacements.logits_outside, replacements.by_contract(host))
        plans.append(Plan(original, host.counted(name, original, getattr(functions, name), *keeps), (site,)))
    return plans


def _plan_fused_logits() -> Plan | str:
    utils = importlib.import_module("trl.trainer.utils")
    site = Site.of(utils, "_fused_logprob_entropy")
    original = site.read()
    if original is ABSENT or original is None:
        return f"{site.label} absent: TRL has it from 1.14 on, and only with Triton"
    host.require_own(site, "trl.kernels.logprob_entropy", what="TRL's own")
    host.require_signature(site.key, original, FUSED_LOGITS)
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


def _require_source(module: str, name: str, known: Sequence[str]) -> None:
    """Refuses unless ``forward`` of a class has the parameters ``known`` in the source of a module that cannot be
    imported here.
    """
    package, *below = module.split(".")
    # By its path and not by importlib, which would import the package around it.
    path = Path(importlib.import_module(package).__path__[0], *below).with_suffix(".py")
    if not path.is_file():
        raise host.refusal(f"{module} does not exist")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef) and node.name == name:
            found = [
                tuple(a.arg for a in f.args.args)
                for f in node.body
                if isinstance(f, ast.FunctionDef) and f.name == "forward"
            ]
            if found == [tuple(known)]:
                return
            raise host.refusal(f"{name}.forward takes {found}, known is {tuple(known)}")
    raise host.refusal(f"{module} has no class {name}")


PLANNERS: dict[str, dict[str, Callable[[], Plan | Sequence[Plan] | str]]] = {
    "fused": {"fused": _plan_fused, "distillation": _plan_distillation},
    "logits": {"logits": _plan_logits, "fused logits": _plan_fused_logits},
    "pairs": {"pairs": _plan_pairs},
}
"""The seams of each level."""
