"""``python -m benchmarks --case linear``: the fused head on a CPU beside its bare products, full logits and
other libraries.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.cases import linear_cpu
from benchmarks.cases.case import Case
from benchmarks.cases.linear import ALL
from benchmarks.cases.linear_cpu import CASES
from benchmarks.judge import wrong
from benchmarks.lineup import Lineup
from benchmarks.problems import linear as linear_problem
from benchmarks.report import linear as linear_report
from benchmarks.report.linear import HIDDEN, TOKENS, VOCABULARIES
from benchmarks.timing import cpu as cpu_timing
from rlkernels.backends import cpu, cpu_memory
from rlkernels.linear.chunking import budget_bytes

NAMES = (ALL, *CASES)
QUICK_TOKENS, QUICK_HIDDEN, QUICK_VOCABULARY = 64, 128, 8192
ROUNDS = 5


@dataclass
class Measured:
    """``budget``: bytes of logits that a chunk of ours may take in this run."""

    budget: int
    cases: list[Case] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def show(self, plain: bool) -> None:
        if self.cases:
            linear_report.show(self.cases, self.budget, plain)

    def record(self) -> dict[str, object]:
        return linear_report.record(self.cases, self.budget)


def plan(args: argparse.Namespace) -> list[tuple[tuple[int, int, int], str, list[str]]]:
    """``(shape, dtype, cases)``: all shapes where a case is named, one where none is.

    Of ``"linear"`` the cases without figures to reach stay at the fewest tokens.
    """
    named = [name for name in args.case or [] if name in NAMES]
    if args.case and not named:
        return []
    every = ALL in named or not args.case
    tokens = [args.tokens] if args.tokens else [QUICK_TOKENS] if args.quick else TOKENS if named else TOKENS[:1]
    vocabularies = (
        [args.vocab]
        if args.vocab
        else [QUICK_VOCABULARY]
        if args.quick
        else VOCABULARIES
        if named
        else VOCABULARIES[:1]
    )
    hidden = args.hidden or (QUICK_HIDDEN if args.quick else HIDDEN)
    found = []
    for dtype in [args.dtype] if args.dtype else ["fp32", "bf16"]:
        for t in tokens:
            names = [n for n in CASES if n in named or every and (n == "linear_policy_loss" or t == tokens[0])]
            found += [((t, hidden, v), dtype, names) for v in vocabularies]
    return found


Ready = Callable[[Case], list[str]]


def measure(args: argparse.Namespace, ready: Ready, tell: Callable[[str], None]) -> Measured:
    """Every case of the plan.

    ``ready`` checks and weighs the contenders of a case and returns a remark for each that it dropped.
    """
    measured, wanted = Measured(budget_bytes(None, "cpu")), plan(args)
    peers: dict[str, Callable] = {}
    if wanted and not args.no_peers:
        peers, missing = linear_cpu.peers()
        measured.remarks += missing
    if wanted and not args.case and not (args.quick or args.tokens or args.vocab):
        measured.remarks.append(
            f"the fused head was measured on one shape; on all of them: python -m benchmarks --device cpu --case {ALL}"
        )
    for shape, dtype, names in wanted:
        problem = linear_problem.make(torch.device("cpu"), *shape, dtype)
        for name in names:
            if name == "linear_dpo_loss" and shape[0] < 2:
                measured.remarks.append(f"{name}: not measured: a pair has two tokens at least")
                continue
            case = CASES[name](problem, Lineup(peers=peers))
            tell(f"  {case.name}: {', '.join(c.name for c in case.contenders)}")
            measured.remarks += ready(case)
            measured.faults += wrong(case)
            # The runs that checked and weighed have warmed up.
            cpu_timing.race(case.contenders, args.rounds or ROUNDS, warmup=0)
            measured.cases.append(forgotten(case))
        if cpu.available()[0]:
            cpu_memory.release_memory()
    return measured


def forgotten(case: Case) -> Case:
    """The figures without the tensors: eight problems at once would be more than a small machine has."""
    for c in case.contenders:
        c.run, c.prepare, c.check = _spent, _spent, _spent
    return case


def _spent(*_: object) -> None:
    raise RuntimeError("this contender was measured, and its tensors are gone; make the case again")


def only(names: Sequence[str] | None) -> bool:
    """Tells whether nothing else is asked for."""
    return bool(names) and all(name in NAMES for name in names)
