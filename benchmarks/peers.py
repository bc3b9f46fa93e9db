"""Other libraries' kernels: where they are, which parameters our calls rely on, and one line for each that is not here.

A peer is looked up by its module and its parameters are compared with those that we pass: a release that renames one is
reported, not guessed at.
"""

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.lineup import Lineup, Score, backends_of
from benchmarks.problems.logits import Problem
from benchmarks.timing.gpu import first_line
from rlkernels.cli import machine


@dataclass(frozen=True)
class Peer:
    """A function of another library.

    Attributes:
        takes: the parameters that a call of ours passes by name, or by position in this order.
        package: its distribution, for the version.
        remark: what it does otherwise than asked; printed beside its time.
    """

    name: str
    package: str
    module: str
    attribute: str
    takes: str
    remark: str = ""

    @property
    def parameters(self) -> list[str]:
        return self.takes.split()


PEERS = {
    "trl": Peer(
        "TRL kernel", "trl", "trl.kernels.logprob_entropy", "selective_log_softmax_and_entropy", "logits index"
    ),
    "liger_grpo": Peer(
        "Liger GRPO",
        "liger-kernel",
        "liger_kernel.transformers.grpo_loss",
        "triton_grpo_loss",
        "logits old_logp ref_logp completion_ids advantages completion_mask temperature beta eps_low eps_high inplace "
        "loss_type reduce",
        "no entropy bonus; the last row of each sequence is left out",
    ),
    "liger_ce": Peer(
        "Liger CE",
        "liger-kernel",
        "liger_kernel.transformers.functional",
        "liger_cross_entropy",
        "input target reduction",
        "writes the gradient over its input in the forward",
    ),
    "flash": Peer(
        "flash-attn CE", "flash-attn", "flash_attn.ops.triton.cross_entropy", "cross_entropy_loss", "logits labels"
    ),
    "quack": Peer("QuACK CE", "quack-kernels", "quack.cross_entropy", "cross_entropy", "x target reduction"),
    "fla_ce": Peer("fla CE", "fla-core", "fla.modules.fused_cross_entropy.ops", "cross_entropy_loss", "logits target"),
    "fla_grpo": Peer(
        "fla GRPO",
        "fla-core",
        "fla.modules.grpo",
        "fused_grpo_loss",
        "logits ref_logp input_ids advantages beta completion_mask",
        "on-policy only: no ratio, no clip; the last row of each sequence is left out",
    ),
    "verl": Peer(
        "verl", "verl", "verl.utils.torch_functional", "logprobs_from_logits", "logits labels inplace_backward"
    ),
    "verl_linear": Peer(
        "verl linear",
        "verl",
        "verl.utils.kernel.linear_cross_entropy",
        "LinearCrossEntropy",
        "hidden weight labels temperature reduction",
        "entropy too",
    ),
    "trl_chunked": Peer(
        "TRL chunked",
        "trl",
        "trl.kernels",
        "ChunkedLogProbFunction",
        "hidden weight bias targets temperature chunk_size final_logit_softcapping logit_scale outputs",
    ),
    "liger_chunked": Peer(
        "Liger chunked GRPO",
        "liger-kernel",
        "liger_kernel.chunked_loss",
        "LigerFusedLinearGRPOLoss",
        "_input lin_weight selected_token_ids attention_mask advantages old_per_token_logps",
    ),
    "trl_divergence": Peer(
        "TRL chunked divergence",
        "trl",
        "trl.kernels.chunked_divergence",
        "ChunkedDivergenceFunction",
        "student_hidden student_weight student_bias teacher_hidden teacher_weight teacher_bias beta",
        "the student's entropy too",
    ),
    "liger_jsd": Peer(
        "Liger chunked JSD",
        "liger-kernel",
        "liger_kernel.chunked_loss",
        "LigerFusedLinearJSDLoss",
        "student_input student_weight teacher_input teacher_weight true_labels",
    ),
    "liger_sm90": Peer(
        "Liger scaled CE",
        "liger-kernel",
        "liger_kernel.ops",
        "LigerFusedLinearScaledCrossEntropyFunction",
        "_input weight target temperature ignore_index m_tiles_per_cluster return_entropy",
        "its fused kernel on compute capability 9.0 alone, chunks of torch elsewhere",
    ),
    "verl_chunked": Peer(
        "verl FusedLinearForPPO",
        "verl",
        "verl.utils.experimental.torch_functional",
        "FusedLinearForPPO",
        "hidden_states vocab_weights input_ids temperature",
        "entropy too",
    ),
    "cce": Peer(
        "cut-cross-entropy",
        "cut-cross-entropy",
        "cut_cross_entropy",
        "linear_cross_entropy",
        "e c targets reduction",
        "drops small gradients",
    ),
    "rl_triton": Peer(
        "rl-triton",
        "rl-triton",
        "rl_triton",
        "compute_gae",
        "rewards values terminateds gamma lambda_",
        "no token mask: other numbers",
    ),
}


def parameters_of(found: object) -> list[str]:
    """Parameter names of a function; of the ``forward`` of a module or an ``autograd.Function``, without ``self`` or
    the context; else of ``apply``.
    """
    if inspect.isclass(found) and hasattr(found, "forward"):
        return list(inspect.signature(found.forward).parameters)[1:]
    return list(inspect.signature(getattr(found, "apply", found)).parameters)


def by_path(path: Path) -> ModuleType:
    """A module from one file, where a package's own build takes hours (flash-attn's Triton cross entropy needs torch
    and triton alone).
    """
    spec = importlib.util.spec_from_file_location(f"peer_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(key: str, path: Path | None = None) -> tuple[Callable | None, str]:
    """The peer's function (of a module its class, for the caller to construct), or None, and one line: its version, or
    why it is not measured.
    """
    peer = PEERS[key]
    try:
        module = by_path(path) if path else importlib.import_module(peer.module)
        found = getattr(module, peer.attribute)
        known = parameters_of(found)
    except Exception as error:  # absent, or broken at import: never a reason to measure nothing
        return None, f"{peer.name}: not measured: {first_line(error)}"
    missing = [p for p in peer.parameters if p not in known]
    if missing:
        return None, (
            f"{peer.name}: not measured: {peer.attribute} takes no {', '.join(missing)}; it takes {', '.join(known)}"
        )
    module_class = inspect.isclass(found) and issubclass(found, torch.nn.Module)
    return found if module_class else getattr(found, "apply", found), (
        f"{peer.name}: {peer.package} {machine.version(peer.package) or 'of unknown version'}"
    )


def available(flash_attn: Path | None = None) -> tuple[dict[str, Callable], list[str]]:
    """All peers that can be called here, and one line for each peer."""
    found, lines = {}, []
    for key in PEERS:
        function, line = load(key, flash_attn if key == "flash" else None)
        lines.append(line)
        if function is not None:
            found[key] = function
    return found, lines


def lineup(device_type: str, peers: dict[str, Callable], compile_too: bool) -> Lineup:
    """All backends of an accelerator beside these functions of other libraries."""
    return Lineup(backends_of(device_type), peers, scores(peers), compile_too)


def scores(peers: dict[str, Callable]) -> list[Score]:
    """The log-probabilities of the targets that these libraries compute from logits."""

    def negative(key: str, **options: object) -> Callable[[Tensor, Tensor], Tensor]:
        def run(x: Tensor, y: Tensor) -> Tensor:
            outputs = peers[key](x, y, **options)
            return -(outputs[0] if isinstance(outputs, tuple) else outputs)

        return run

    rowwise = {"reduction": "none"}
    found = {"trl": Score(PEERS["trl"].name, stats=peers["trl"])} if "trl" in peers else {}
    for key, options in {"liger_ce": rowwise, "flash": {}, "quack": rowwise, "fla_ce": {}}.items():
        if key in peers:
            name, remark = PEERS[key].name, PEERS[key].remark
            found[key] = Score(name, negative(key, **options), writes=key == "liger_ce", remark=remark)
    if "verl" in peers:
        found["verl"] = Score(PEERS["verl"].name, lambda x, y: peers["verl"](x, y, inplace_backward=False))
    return list(found.values())


def sequences(x: Tensor, count: int) -> Tensor:
    """``[T, ...]`` as ``[count, T / count, ...]``."""
    return x.view(count, -1, *x.shape[1:])


def liger_policy(
    function: Callable, problem: Problem, clip_low: float, clip_high: float, kl_coef: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """Liger's GRPO loss on the rows of ours: ``[B, L + 1, V]``, token mean, everything alive."""
    count = problem.sequences
    ids, old, ref = (
        sequences(c, count)[:, :-1].contiguous() for c in (problem.targets, problem.old_logprobs, problem.ref_logprobs)
    )
    advantages = sequences(problem.advantages, count)[:, 0].contiguous()
    mask = torch.ones_like(ids)

    def run(leaf: Tensor, targets: Tensor) -> Tensor:
        loss, _ = function(
            sequences(leaf, count),
            old,
            ref,
            ids,
            advantages,
            mask,
            temperature=1.0,
            beta=kl_coef,
            eps_low=clip_low,
            eps_high=clip_high,
            inplace=True,
            loss_type="dapo",
            reduce=True,
        )
        return loss

    return run


def fla_policy(function: Callable, problem: Problem, kl_coef: float) -> Callable[[Tensor, Tensor], Tensor]:
    """fla's GRPO loss on the rows of ours, as Liger's."""
    count = problem.sequences
    ids, ref = (sequences(c, count)[:, :-1].contiguous() for c in (problem.targets, problem.ref_logprobs))
    advantages, mask = sequences(problem.advantages, count)[:, 0].contiguous(), torch.ones_like(ids)

    def run(leaf: Tensor, targets: Tensor) -> Tensor:
        logits = sequences(leaf, count)
        return function(logits, ref, ids, advantages, beta=kl_coef, completion_mask=mask).mean()

    return run
