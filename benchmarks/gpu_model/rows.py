"""The kernels over rows and the scan of advantages as cases of the simulator, and what their results mean.

A row is the passes of its hot loop, a part of a pass for its tail, and delays for what lies between.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu_model import launch_shapes, sass, simulator
from benchmarks.gpu_model.launch_shapes import Launch
from benchmarks.gpu_model.machine import FAST, SLOW, Machine, resident_blocks
from benchmarks.gpu_model.machine_code import Kernel
from benchmarks.gpu_model.predictions import Prediction
from benchmarks.gpu_model.simulator import Case, Phase, Step, part, scaled, steps

VOCABULARIES = 32000, 128256, 151936, 262144
HEAD_VOCABULARIES = 128256, 151936
TOKENS = 8192
SCAN = 8192, 2048
TRITON_TILE = 512 * 8
"""Columns of a tile: the lanes of ``launch_configs`` for a large vocabulary, of eight columns each."""


class Work(NamedTuple):
    """One kernel at one shape. ``unit``: bytes of a row that have to move, ``moved``: those that do.

    ``elements``: of one pass of a thread, for each loop in ``counted``. ``outstanding``: bytes that a thread has asked
    for before it uses the first of them.
    """

    name: tuple[str, str, str, tuple[int, ...]]
    kernel: Kernel
    launch: Launch
    phases: tuple[Phase, ...]
    unit: float
    moved: float
    counted: tuple[tuple[sass.Loop, float], ...]
    outstanding: int
    writes: bool
    goal: float | None = None
    instructions_goal: float | None = None

    @property
    def blocks(self) -> int:
        shared = self.launch.shared + self.kernel.shared
        return resident_blocks(self.kernel.registers, self.launch.threads, shared)


def passes(loop: tuple[Step, ...], columns: int, step: int, on_its_own: bool = False) -> list[Phase]:
    """The phases of a loop over columns. The tail is a part of a pass, or with ``on_its_own`` a whole one that moves
    fewer bytes, because it computes what it does not keep.
    """
    whole, rest = divmod(columns, step)
    found = [Phase(loop, whole)] if whole else []
    if rest:
        share = rest / step
        found.append(Phase(scaled(loop, share) if on_its_own else part(loop, share), 1))
    return found


def ending(phases: list[Phase], delay: int) -> list[Phase]:
    return [*phases[:-1], phases[-1]._replace(delay=delay)]


def statistics(kernel: Kernel, launch: Launch, columns: int, size: int, triton: bool, on: Machine) -> list[Phase]:
    """Statistics alone: ``size`` bytes per element, which is a pair where there is a reference."""
    loop = kernel.loops["statistics"]
    step = loop.loaded // size * launch.threads
    return ending(passes(steps(loop.path), columns, step, triton), on.reduction)


def gradient(kernel: Kernel, launch: Launch, columns: int, size: int, triton: bool, on: Machine) -> list[Phase]:
    """The gradient alone. A block of the CUDA kernel ends after a slice, and the next one starts."""
    loop = kernel.loops["gradient"]
    step, body = loop.loaded // size * launch.threads, steps(loop.path)
    if triton:
        return ending(passes(body, columns, step, True), on.end)
    slices = [min(launch_shapes.SLICE, columns - at) for at in range(0, columns, launch_shapes.SLICE)]
    each = [ending(passes(body, width, step), on.end + on.start) for width in slices]
    return ending([phase for phases in each for phase in phases], on.end)


def kept_row(kernel: Kernel, launch: Launch, columns: int, size: int, on: Machine) -> list[Phase]:
    """``fused_policy`` with the row in shared memory: two batches of copies run ahead of the statistics."""
    loop, back = kernel.loops["statistics"], kernel.loops["gradient"]
    team = launch.threads * launch.cluster
    body = steps(loop.path)
    step = loop.loaded // size * team
    whole, rest = divmod(columns, step)
    ahead = min(whole, 2)
    copies, tail = simulator.copies(body), rest / step
    bare = simulator.without_copies(body)
    found = [Phase(copies, ahead)] if ahead else []
    # The tail's copies start one or two passes early, too: they are whole groups of a few threads less.
    if whole > ahead:
        found.append(Phase(body, whole - ahead))
    if rest:
        found.append(Phase(scaled(copies, tail), 1))
    if ahead:
        found.append(Phase(bare, ahead))
    if rest:
        found.append(Phase(part(bare, tail), 1))
    found = ending(found, on.reduction + on.cluster * (launch.cluster > 1))
    return found + ending(passes(steps(back.path), columns, back.loaded // size * team), on.end)


def two_sweeps(kernel: Kernel, launch: Launch, columns: int, size: int, hits: float, on: Machine) -> list[Phase]:
    """``fused_policy`` of Triton: groups of tiles, single tiles, a masked tail; then back over the row, of which the
    level-2 cache serves a part.
    """
    loop, back = kernel.loops["statistics"], kernel.loops["gradient"]
    step, body = loop.loaded // size * launch.threads, steps(loop.path)
    found = [Phase(body, columns // step)] if columns >= step else []
    single, rest = divmod(columns % step, TRITON_TILE)
    found += [Phase(part(body, TRITON_TILE / step), single)] if single and step > TRITON_TILE else []
    found += [Phase(scaled(part(body, TRITON_TILE / step), rest / TRITON_TILE), 1)] if rest else []
    found = ending(found, on.reduction)
    second = passes(steps(back.path), columns, back.loaded // size * launch.threads, True)
    return found + ending([phase._replace(hits=hits) for phase in second], on.end)


def cache_hits(rows: int, columns: int, size: int, out: int, on: Machine) -> float:
    """The share of a second sweep, back over a row, that the level-2 cache serves while so many rows are in flight.

    A column at a distance d from the end is read again after all rows have moved 2 d columns each, half of them in a
    first sweep and half in a second one. It is there still if these bytes fit in the cache.
    """
    per_column = (size + size + out) / 2
    return min(1.0, on.cache / (2 * rows * per_column * columns))


def instructions(work: Work) -> tuple[float, dict[str, float]]:
    """Instructions per element of the hot loops, in all and by pipe."""
    pipes: Counter[str] = Counter()
    for loop, elements in work.counted:
        for instruction in loop.path:
            pipes[sass.pipe(instruction)] += 1 / elements
    return sum(pipes.values()), dict(sorted(pipes.items()))


def case_of(work: Work, on: Machine, rows: int) -> Case:
    roof = on.copies if work.writes else on.reads
    return Case(
        work.blocks,
        work.launch.threads // 32,
        rows,
        on.rate(roof),
        on.latency_clocks,
        on.cache_clocks,
        on.start,
        work.phases,
    )


def predict(build: Callable[[Machine], list[Work]], folder: Path) -> list[Prediction]:
    """The predictions of all work that ``build`` makes, with the share at both ends of clock and latency."""
    slow, fast = (predict_on(build, folder, on) for on in (SLOW, FAST))
    return [replace(p, share_at_best=q.share_of_roof) for p, q in zip(slow, fast, strict=True)]


def predict_on(build: Callable[[Machine], list[Work]], folder: Path, on: Machine) -> list[Prediction]:
    """The predictions for one machine."""
    works = build(on)
    # So many rows per block that the window of the count is some 200,000 clocks at least.
    counts = [
        max(6, min(60, round(2e5 * on.rate(on.reads) / (w.moved / w.launch.cluster) / w.blocks) + 2)) for w in works
    ]
    results = simulator.simulate([case_of(w, on, n) for w, n in zip(works, counts, strict=True)], folder)
    found = []
    for work, result in zip(works, results, strict=True):
        roof = on.rate(on.copies if work.writes else on.reads)
        busy = min(result.rate / roof, 1.0)
        share = busy * work.unit / work.moved
        count, pipes = instructions(work)
        found.append(
            Prediction(
                *work.name,
                instructions_per_element=round(count, 2),
                bytes_in_flight=work.outstanding * work.launch.threads * work.blocks,
                blocks_per_sm=work.blocks,
                warps_per_sm=work.blocks * work.launch.threads // 32,
                share_of_roof=round(share, 3),
                limiter=limiter(work, busy, result.issue),
                goal=work.goal,
                instructions_goal=work.instructions_goal,
                pipes={name: round(n, 2) for name, n in pipes.items()},
            )
        )
    return found


def limiter(work: Work, busy: float, issue: float) -> str:
    """What keeps the share where it is."""
    told = f"issue {issue:.0%}"
    if work.moved > 1.02 * work.unit:
        return f"traffic: {work.moved / work.unit:.2f} times the floor, {told}"
    if busy >= 0.97:
        return f"memory, {told}"
    return f"issue, {issue:.0%}" if issue >= 0.85 else f"latency and the ends of rows, {told}"


class Spec(NamedTuple):
    """A kernel over rows: bytes of a logit and of its gradient (0: there is none), how many tensors of logits it reads,
    and the vocabularies.
    """

    kernel: str
    logit: int = 2
    gradient: int = 0
    tensors: int = 1
    vocabularies: tuple[int, ...] = VOCABULARIES

    @property
    def size(self) -> int:
        """Bytes that are read per element, which is a pair where two tensors are read."""
        return self.logit * self.tensors

    @property
    def dtype(self) -> str:
        return "bf16" if self.logit == 2 else "fp32 to bf16" if self.gradient else "fp32"

    @property
    def of_head(self) -> bool:
        return self.logit == 4


SPECS = (
    Spec("token_stats"),
    Spec("two_models", tensors=2),
    Spec("token_stats_backward", gradient=2),
    Spec("fused_policy", gradient=2),
    # Of a fused head, whose logits are fp32.
    Spec("token_stats", 4, vocabularies=HEAD_VOCABULARIES),
    Spec("token_stats_backward", 4, 2, vocabularies=HEAD_VOCABULARIES),
    Spec("fused_policy", 4, 2, vocabularies=HEAD_VOCABULARIES),
)
SHAPES = [(spec, columns) for spec in SPECS for columns in spec.vocabularies]


def share_goal(spec: Spec, backend: str, columns: int) -> float | None:
    """The share of the roof to reach, or None where no goal is set."""
    if spec.of_head or spec.kernel == "token_stats_backward":
        return None
    if spec.kernel == "fused_policy":
        return 0.80 if backend == "triton" else 0.92 if columns >= 96000 else None
    return 0.90 if spec.kernel == "two_models" else {151936: 0.92, 32000: 0.85}.get(columns)


def instructions_goal(spec: Spec, backend: str) -> float | None:
    """The instructions per element to stay below, or None where no goal is set."""
    if spec.of_head or backend == "triton":
        return None
    return {"token_stats": 9.0, "two_models": 18.0, "fused_policy": 20.0}.get(spec.kernel)


def cuda(compiled: dict[str, Kernel]) -> Callable[[Machine], list[Work]]:
    """The CUDA kernels, by their short names."""

    def build(on: Machine) -> list[Work]:
        works = []
        for spec, columns in SHAPES:
            launch = cuda_launch(spec, columns)
            code = compiled[launch.kernel]
            if launch.keeps:
                phases = kept_row(code, launch, columns, spec.size, on)
            elif spec.gradient:
                phases = gradient(code, launch, columns, spec.size, False, on)
            else:
                phases = statistics(code, launch, columns, spec.size, False, on)
            works.append(work_of(spec, "cuda", columns, code, launch, phases))
        return [*works, scan("cuda", compiled["gae<fp32,256,8>"], launch_shapes.gae(), on)]

    return build


def cuda_launch(spec: Spec, columns: int) -> Launch:
    if spec.kernel == "fused_policy":
        return launch_shapes.fused_policy(columns, spec.logit, spec.gradient)
    if spec.gradient:
        return launch_shapes.token_stats_backward(spec.logit, spec.gradient)
    return launch_shapes.token_stats(spec.logit, spec.tensors == 2)


def triton(compiled: dict[str, Kernel]) -> Callable[[Machine], list[Work]]:
    """The Triton kernels, by the names that ``machine_code.compile_triton`` gives them."""

    def build(on: Machine) -> list[Work]:
        works = []
        for spec, columns in SHAPES:
            small = spec.kernel == "fused_policy" and columns <= 32768
            name = spec.kernel + (" head" if spec.of_head else " 32000" if small else "")
            code, launch = compiled[name], Launch(name, 512 if spec.kernel == "fused_policy" else 256)
            again = 0.0
            if spec.kernel == "fused_policy":
                rows = resident_blocks(code.registers, launch.threads, code.shared) * on.multiprocessors
                hits = cache_hits(rows, columns, spec.logit, spec.gradient, on)
                phases, again = two_sweeps(code, launch, columns, spec.size, hits, on), spec.size * (1 - hits)
            elif spec.gradient:
                phases = gradient(code, launch, columns, spec.size, True, on)
            else:
                phases = statistics(code, launch, columns, spec.size, True, on)
            works.append(work_of(spec, "triton", columns, code, launch, phases, again))
        return [*works, scan("triton", compiled["gae"], Launch("gae", 128), on)]

    return build


def work_of(
    spec: Spec, backend: str, columns: int, code: Kernel, launch: Launch, phases: list[Phase], again: float = 0.0
) -> Work:
    """``again``: bytes of an element that are read a second time."""
    counted = tuple((loop, loop.loaded / spec.size) for loop in code.loops.values())
    first = counted[0][0]
    copies = sum(i.opcode == "LDGSTS" for i in first.path)
    direct = sum(i.bits // 8 for i in first.path if i.opcode == "LDG")
    floor = spec.size + spec.gradient
    return Work(
        (spec.kernel, backend, spec.dtype, (TOKENS, columns)),
        code,
        launch,
        tuple(phases),
        unit=floor * columns,
        moved=(floor + again) * columns,
        counted=counted,
        outstanding=2 * 16 * copies or direct,  # two batches of copies travel at a time
        writes=bool(spec.gradient),
        goal=share_goal(spec, backend, columns),
        instructions_goal=instructions_goal(spec, backend),
    )


def scan(backend: str, code: Kernel, launch: Launch, on: Machine) -> Work:
    """``gae`` of fp32 sequences with a mask: two reads and two writes of four bytes, and a byte."""
    loop = code.loops["scan"]
    tokens = sum(i.opcode == "STG" for i in loop.path) // 2
    asked = sum(i.bits // 8 for i in loop.path if i.opcode == "LDG")
    sequences, length = SCAN
    # What is asked for twice, memory moves once.
    body = scaled(steps(loop.path), 9 * tokens / asked, simulator.LOAD)
    return Work(
        ("gae", backend, "fp32", SCAN),
        code,
        launch,
        tuple(ending(passes(body, length, tokens * launch.threads), on.end)),
        unit=17 * length,
        moved=17 * length,
        counted=((loop, float(tokens)),),
        outstanding=9 * tokens,
        writes=True,
        goal=0.60,
    )
