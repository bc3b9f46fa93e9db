"""``python -m benchmarks --device cuda``: every case on the grid of shapes, each saved as it ends."""

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch

import rlkernels
from benchmarks import peers as libraries
from benchmarks import subject
from benchmarks.cases import columns_gpu, linear_gpu, logits_gpu
from benchmarks.cases.case import COMPILED, Case
from benchmarks.cases.logits_gpu import CASES, WITH_REFERENCE
from benchmarks.lineup import Lineup
from benchmarks.problems import linear as linear_problems
from benchmarks.problems import logits as logits_problems
from benchmarks.report import gpu as gpu_report
from benchmarks.report import plots
from benchmarks.report.target import save
from benchmarks.timing.device import Cuda
from benchmarks.timing.gpu import DeviceLost, Roofline, first_line, launches, race, ready, roofline

VOCABULARIES, ROWS = (151936, 128256, 32000, 262144), (8192, 2048)
QUICK_VOCABULARIES, QUICK_ROWS = (151936, 32000), (2048,)
HEADLINE = (8192, 151936)
"""The shape that is measured first, and the only one where the host's time is taken and, when all else has been
measured, torch.compile runs and launches are counted.
"""
COUNTING = 15.0
"""Seconds of the budget that torch.compile leaves for the count of launches."""
Drawn = Callable[[], Callable[[str, Lineup], Case]]
"""Draws a problem and returns what makes a case of that name over it."""

SMALL = ("policy_loss", "pairwise_reward_loss", "dpo_loss", "gae")
NAMES = (*CASES, *SMALL, linear_gpu.ALL, *linear_gpu.NAMES)


def shapes(args: argparse.Namespace) -> list[tuple[int, int]]:
    """``(tokens, vocab)``, the headline first: a run that is cut short has measured what matters."""
    vocabularies = [args.vocab] if args.vocab else QUICK_VOCABULARIES if args.quick else VOCABULARIES
    tokens = [args.tokens] if args.tokens else QUICK_ROWS if args.quick else ROWS
    return [(t, v) for t in tokens for v in vocabularies]


def small_cases(device: object, wanted: list[str], scale: int = 1) -> list[tuple[str, Callable[[Lineup], Case]]]:
    """Makers of the small cases; ``scale`` divides their sizes, for tests."""
    d, cache, columns = device.device, device.cache_bytes, (64, 2048 // scale)
    scans = [(rows // min(scale, 32), length // scale) for rows, length in columns_gpu.SCANS]
    makers: list[tuple[str, Callable[[Lineup], Case]]] = [
        ("policy_loss", lambda lineup: columns_gpu.policy_loss(d, lineup, columns)),
        ("pairwise_reward_loss", lambda lineup: columns_gpu.pairwise(d, lineup)),
        ("dpo_loss", lambda lineup: columns_gpu.dpo(d, lineup)),
        *(("gae", lambda lineup, scan=scan: columns_gpu.gae(d, lineup, scan, cache)) for scan in scans),
    ]
    return [(name, make) for name, make in makers if name in wanted]


class Run:
    """Device, roofline, peers and the growing JSON of one command."""

    def __init__(self, args: argparse.Namespace, device: object, started: float) -> None:
        self.args, self.device, self.started = args, device, started
        self.peers, self.remarks = ({}, []) if args.no_peers else libraries.available(args.flash_attn)
        self.remarks += [
            (f"backend {name}: absent: {reason}")
            for name, reason in rlkernels.available_backends()["absent"].items()
            if name != "cpu"
        ]
        self.seconds = args.seconds or (0.1 if args.quick else 1.0)
        self.flush = torch.empty(2 * device.cache_bytes, dtype=torch.uint8, device=device.device)
        self.roof: Roofline | None = None
        self.data: dict[str, object] = {}
        self.detailed: list[tuple[list[str], str, Drawn]] = []  # the batches to which the last passes return
        self.compiling: list[tuple[list[str], str, Drawn]] = []

    def begin(self, **options: int) -> None:
        self.roof = roofline(self.device, min(self.seconds, 0.5), **options)
        serves = rlkernels.available_backends()["serves"].get(self.device.device.type, {})
        self.data = {
            "command": subject.command(),
            "device": self.device.describe(),
            "machine": subject.describe(),
            "sources": gpu_report.sources(self.args.commit),
            "dtype": self.args.dtype,
            "seconds_per_entry": self.seconds,
            "roofline": asdict(self.roof),
            "serves": serves,
            "peers_and_backends": self.remarks,
            "cases": [],
            "not_measured": [],
            "goals": [],
            "complete": False,
        }
        self.save()

    def over(self, reserve: float = 0.0) -> bool:
        budget = self.args.budget
        return budget is not None and time.monotonic() - self.started > budget - reserve

    def save(self) -> None:
        self.data["goals"] = gpu_report.goals(self.data["cases"])
        if self.args.json:
            save(self.args.json, self.data)

    def measure(self, make: Callable[[], Case], what: str, count: bool) -> None:
        """One case, saved as it ends. A case that fails is a line, not the end of the run."""
        if self.over():
            self.data["not_measured"].append(f"{what}: the budget of {self.args.budget:g} s was spent")
            self.save()
            return
        start = time.monotonic()
        with self.survived(what):
            case = make()
            ready(self.device, case.contenders, count)
            race(self.device, case.contenders, case.buffers, self.seconds, self.flush)
            found = gpu_report.record(case, self.roof, self.device.state())
            self.data["cases"].append({**found, "took_s": time.monotonic() - start})
            gpu_report.show(found, self.args.plain)
        self.save()
        self.device.release()

    @contextlib.contextmanager
    def survived(self, what: str) -> Iterator[None]:
        """An error inside is a line of what was not measured. The loss of the device ends the run."""
        try:
            yield
        except DeviceLost as error:
            self.data["not_measured"].append(f"{what} and all that follows: {error}")
            self.save()
            raise
        except Exception as error:
            self.data["not_measured"].append(f"{what}: {first_line(error)}")
            tell(f"  {self.data['not_measured'][-1]}")

    def lineup(self, compile_too: bool = False) -> Lineup:
        return libraries.lineup(self.device.device.type, self.peers, compile_too)

    def logits_cases(self, tokens: int, vocab: int, wanted: list[str], headline: bool) -> None:
        """All cases over one batch of logits; the batch with a reference is made apart, being twice the size."""
        for with_reference in (False, True):
            names = [n for n in CASES if n in wanted and (n in WITH_REFERENCE) is with_reference]

            def drawn(with_reference: bool = with_reference) -> Callable[[str, Lineup], Case]:
                shape, cache = (tokens, vocab, self.args.dtype), self.device.cache_bytes
                problem = logits_gpu.problem_of(self.device.device, *shape, cache, with_reference)
                judge = logits_problems.judge(problem)
                return lambda name, lineup: CASES[name](problem, judge, lineup)

            if names:
                self.batch(names, f"[{tokens}, {vocab}]", drawn, headline, headline or self.args.compile_all)
                self.device.release()

    def linear_cases(self, shape: tuple[int, int, int], names: list[str], headline: bool) -> None:
        """The fused head on one shape; launches are counted and torch.compile runs on the first."""

        def drawn() -> Callable[[str, Lineup], Case]:
            problem = linear_problems.make(self.device.device, *shape, self.args.dtype)
            return lambda name, lineup: linear_gpu.CASES[name](problem, lineup)

        self.batch(names, str(list(shape)), drawn, headline, headline)

    def small_cases(self, wanted: list[str], small: int) -> None:
        for name, make in small_cases(self.device, wanted, small):
            self.batch([name], "", lambda make=make: lambda _, lineup: make(lineup), True, True)

    def batch(self, names: list[str], what: str, drawn: Drawn, count: bool, compile_too: bool) -> None:
        """Cases over one problem, which is freed behind them."""
        if self.over():
            spent = f"the budget of {self.args.budget:g} s was spent"
            self.data["not_measured"] += [f"{n} {what}".strip() + f": {spent}" for n in names]
            return
        try:
            case_of = drawn()
        except RuntimeError as error:  # too large for this device
            self.data["not_measured"] += [f"{n} {what}: {first_line(error)}" for n in names]
            return
        if count:
            self.detailed.append((names, what, drawn))
        if compile_too and not self.args.no_compile:
            self.compiling.append((names, what, drawn))
        self.device.release()
        for name in names:
            self.measure(lambda name=name: case_of(name, self.lineup()), f"{name} {what}".strip(), count)

    def last_passes(self) -> None:
        """torch.compile beside what was measured, then the launches. In that order, because compilation takes most of a
        budget and a profiler that was attached once slows whatever is timed behind it.
        """
        self.again(self.compiling, "torch.compile", COUNTING, self.compiled)
        self.again(self.detailed, "launches", 0.0, self.counted)

    def again(
        self,
        batches: list[tuple[list[str], str, Drawn]],
        doing: str,
        reserve: float,
        visit: Callable[[Case, dict], None],
    ) -> None:
        """Visits every case that was measured once more, its problem drawn anew."""
        for names, what, drawn in batches:
            if self.over(reserve):
                spent = f"the budget of {self.args.budget:g} s was spent"
                self.data["not_measured"] += [f"{n} {what}".strip() + f", {doing}: {spent}" for n in names]
                continue
            with self.survived(f"{', '.join(names)} {what}".strip() + f", {doing}"):
                case_of = drawn()
                for name in names:
                    case = case_of(name, self.lineup(doing == "torch.compile"))
                    record = next((c for c in self.data["cases"] if c["name"] == case.name), None)
                    if record is not None:
                        visit(case, record)
                case_of = case = None
            self.save()
            self.device.release()

    def compiled(self, case: Case, record: dict) -> None:
        """Times torch.compile by itself and puts it behind the others of the case."""
        case.contenders = [c for c in case.contenders if c.name == COMPILED]
        if case.contenders:
            ready(self.device, case.contenders, False)
            race(self.device, case.contenders, case.buffers, self.seconds, self.flush)
            found = gpu_report.record(case, self.roof, record.get("state"))
            record["entries"] += found["entries"]
            gpu_report.show(found, self.args.plain)

    def counted(self, case: Case, record: dict) -> None:
        """Counts the launches of those that were measured."""
        for contender in case.contenders:
            entry = next((e for e in record["entries"] if e["name"] == contender.name), None)
            if entry is not None and not entry["failed"]:
                entry["launches"] = launches(self.device, contender)

    @property
    def faults(self) -> list[str]:
        return [f for c in self.data["cases"] for f in c["faults"]]


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(args: argparse.Namespace, device: object | None = None, small: int = 1, **options: int) -> int:
    """Measures and prints; 1 if an answer of ours is wrong or one of ours failed, 2 without a device, 3 if the device
    was lost, else 0 whatever the speed.

    Args:
        device, small, options: a stand-in for the device, a divisor of the small cases' sizes and the roofline's sizes,
            for tests.
    """
    started = time.monotonic()
    args.dtype = args.dtype or "bf16"
    if device is None:
        if not torch.cuda.is_available():
            tell("benchmarks: --device cuda needs a CUDA device that torch can see; none is visible")
            return 2
        device = Cuda()
    state = Run(args, device, started)
    tell(f"benchmarks: {device.name}, {args.dtype}, {state.seconds:g} s per entry")
    print(subject.line())
    for line in state.remarks:
        print(f"note: {line}")
    state.begin(**options)
    roof = state.roof
    print(
        f"roofline of this run: read {roof.read / 1e9:.0f} GB/s ({roof.read_by}), copy {roof.copy / 1e9:.0f} GB/s, "
        "bf16 product "
        f"{roof.matmul / 1e12:.0f} TFLOP/s"
    )
    wanted = args.case or list(NAMES)
    grid = shapes(args)
    first = HEADLINE if HEADLINE in grid else grid[0]
    try:
        heads = linear_gpu.plan(args, wanted, small)
        state.logits_cases(*first, wanted, True)
        for shape, names in heads[:1]:  # before the small cases, because no figure is less certain
            state.linear_cases(shape, names, True)
        state.small_cases(wanted, small)
        for shape, names in heads[1:]:
            state.linear_cases(shape, names, False)
        for shape in grid:
            if shape != first:
                state.logits_cases(*shape, wanted, False)
        state.last_passes()
        state.data["complete"] = True
    except KeyboardInterrupt:
        tell("benchmarks: interrupted; the cases that ended are kept")
        state.save()
        return 130
    except DeviceLost as error:
        tell(f"benchmarks: {error}; the cases that ended are kept, --no-peers leaves other libraries out")
        return 3
    state.save()
    gpu_report.show_goals(state.data["goals"], args.plain)
    for line in state.data["not_measured"]:
        print(f"note: not measured: {line}")
    draw(args, state.data)
    commit = state.data["sources"]["commit"] or "unknown commit"
    print(f"\n{device.name}, torch {torch.__version__}, {commit}, seed 0: {state.data['command']}")
    return 1 if state.faults else 0


def draw(args: argparse.Namespace, data: dict) -> None:
    folder: Path | None = args.plot
    if folder is None:
        return
    try:
        for path in plots.draw(data, folder):
            tell(f"  wrote {path.name}")
    except ImportError as error:
        tell(f"benchmarks: no pictures: {error}; install matplotlib")
