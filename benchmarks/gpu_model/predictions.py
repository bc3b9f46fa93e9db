"""The predictions of the model, and their goals, as ``predictions.json`` holds them.

Nothing is computed here, so a machine that measures needs no compiler to put a prediction beside a figure:

    found = predictions.lookup("fused_policy", "cuda", "bf16", (8192, 151936))
    found.share_of_roof, found.goal

``python -m benchmarks.gpu_model --write`` makes the file anew.
"""

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType

FILE = Path(__file__).with_name("predictions.json")
LABEL = "model, not calibrated"
"""What stands beside every figure until a device has measured the model's constants."""
SLACK = 0.015
"""By so much a prediction may differ from the recorded one, whose share less the slack is its floor."""
LEAST_BYTES = 500e6
"""From so many bytes on the ends of a launch, which the model leaves out, are a small part of it."""

ROW_KERNELS = {
    "token_stats": "log-probability and entropy of a row, one read",
    "two_models": "the same with the exact KL to reference logits, two reads",
    "fused_policy": "objective and gradient in one launch, against one read and one write",
    "token_stats_backward": "gradient of the logits, one read and one write",
}
"""The kernels over rows of logits: what they do, and the roof that their share is of."""
COLUMN_KERNELS = {"gae": "advantages and returns, two reads and two writes"}
HEADS = {
    "linear_policy_loss": "forward and backward with the default budget, against three products",
    "linear_policy_loss 1 GiB": "the same with logits_budget=2**30",
    "linear_token_stats": "forward and backward with the default budget, against four products",
    "linear_token_stats 1 GiB": "the same with logits_budget=2**30",
}
"""The calls of the fused head. The backend of one is that of its kernel over rows."""


@dataclass(frozen=True)
class Prediction:
    """What the model says of one kernel at one shape: ``(rows, vocab)``, ``(sequences, length)``, and of the fused head
    ``(rows, hidden, vocab)``.

    ``share_of_roof``: of the memory's speed, or of the time of the head's products, with the slow clock and the long
    latency of ``machine.SLOW``; ``share_at_best`` with those of ``machine.FAST``. ``limiter``: what sets the first.
    ``goal``: the share to reach, and ``instructions_goal`` the number of instructions; None where none is set.
    ``dtype``: of the logits, and of their gradient where that is another one (``fp32 to bf16``). A head has no
    instructions, bytes in flight and warps of its own; it has a ``plan`` and ``extra_gib``, its memory beside operands
    and gradients.
    """

    kernel: str
    backend: str
    dtype: str
    shape: tuple[int, ...]
    instructions_per_element: float | None
    bytes_in_flight: int | None
    blocks_per_sm: int | None
    warps_per_sm: int | None
    share_of_roof: float
    limiter: str
    goal: float | None = None
    instructions_goal: float | None = None
    pipes: Mapping[str, float] = field(default_factory=dict)
    plan: str = ""
    extra_gib: float | None = None
    share_at_best: float | None = None

    @property
    def reached(self) -> bool:
        """Tells whether the model reaches every goal that is set."""
        share = self.goal is None or self.share_of_roof >= self.goal
        few = self.instructions_goal is None or (self.instructions_per_element or 0) <= self.instructions_goal
        return share and few

    @property
    def key(self) -> tuple[str, str, str, tuple[int, ...]]:
        return self.kernel, self.backend, self.dtype, self.shape


def read(text: str) -> list[Prediction]:
    """The predictions that ``written`` wrote."""
    return [Prediction(**{**entry, "shape": tuple(entry["shape"])}) for entry in json.loads(text)["predictions"]]


def written(found: list[Prediction], compilers: Mapping[str, str]) -> str:
    """JSON, a prediction per line; ``compilers``: the release that compiled each backend."""
    lines = ",\n".join(f"  {json.dumps(asdict(p))}" for p in found)
    head = f'"label": {json.dumps(LABEL)}, "compilers": {json.dumps(dict(compilers))}'
    return f'{{{head}, "predictions": [\n{lines}\n]}}\n'


def compilers(text: str) -> dict[str, str]:
    """The release that compiled each backend, as ``written`` was told."""
    return json.loads(text)["compilers"]


def changes(
    found: Iterable[Prediction], recorded: Mapping[tuple[str, str, str, tuple[int, ...]], Prediction]
) -> list[str]:
    """What differs from the recorded predictions by more than a recompilation explains, a line each."""
    lines = []
    for now in found:
        was, name = recorded.get(now.key), f"{now.kernel} {now.backend} {now.dtype} {now.shape}"
        if was is None:
            lines.append(f"{name}: not recorded")
            continue
        lost = now.share_of_roof - was.share_of_roof
        if abs(lost) > SLACK:
            what = "below its floor" if lost < 0 else "better than recorded"
            lines.append(
                f"{name}: {now.share_of_roof:.1%} of the roof where {was.share_of_roof:.1%} is recorded, {what}"
            )
        counts = now.instructions_per_element or 0.0, was.instructions_per_element or 0.0
        if abs(counts[0] - counts[1]) > SLACK * counts[1]:
            lines.append(f"{name}: {counts[0]} instructions per element where {counts[1]} are recorded")
        for what in ("bytes_in_flight", "blocks_per_sm", "plan", "extra_gib", "goal", "instructions_goal"):
            if getattr(now, what) != getattr(was, what):
                lines.append(f"{name}: {what} {getattr(now, what)} where {getattr(was, what)} is recorded")
    return lines


@functools.cache
def table() -> Mapping[tuple[str, str, str, tuple[int, ...]], Prediction]:
    """The predictions of the file by kernel, backend, dtype and shape."""
    return MappingProxyType({p.key: p for p in read(FILE.read_text())} if FILE.exists() else {})


def lookup(kernel: str, backend: str, dtype: str, shape: tuple[int, ...]) -> Prediction | None:
    """The prediction for a measured figure, or None where the model says nothing of it.

    The kernels over rows are predicted for a device that is full of rows, so any number of rows finds the prediction of
    its vocabulary, from ``LEAST_BYTES`` of logits on.
    """
    found = table().get((kernel, backend, dtype, shape))
    if found is None and kernel in ROW_KERNELS and len(shape) == 2:
        size = 4 if dtype.startswith("fp32") else 2
        same = (p for p in table().values() if p.key[:3] == (kernel, backend, dtype) and p.shape[1] == shape[1])
        if shape[0] * shape[1] * size >= LEAST_BYTES:
            found = next(same, None)
    return found
