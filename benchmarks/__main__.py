"""``python -m benchmarks``: our kernels beside torch and other libraries, in one run on equal threads, judged against
float64.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import rlkernels
from benchmarks import run_gpu, run_linear, subject
from benchmarks.cases import host_cost, linear_gpu, logits_cpu
from benchmarks.cases.case import Case
from benchmarks.judge import wrong
from benchmarks.problems import logits as logits_problem
from benchmarks.report import cpu as cpu_report
from benchmarks.report.target import save
from benchmarks.timing import cpu as cpu_timing
from rlkernels.cli import machine
from rlkernels.installing import how

QUICK = {"tokens": 128, "vocab": 32000, "rounds": 5}
FULL = {"tokens": 1024, "vocab": 128256, "rounds": 9}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 0 success, 1 a wrong answer, 2 usage or no device, 3 the device was
    lost, 130 interrupted.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Speed, memory and error of the kernels on this machine."
    )
    add_arguments(parser)
    return run(parser.parse_args(argv))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    rows, columns = " and ".join(map(str, run_gpu.ROWS)), ", ".join(map(str, run_gpu.VOCABULARIES))
    add("--device", choices=["cpu", "cuda"], default="cpu", help="the device to measure")
    sentence = "a small shape and few rounds: shows that it runs, gives no figures to quote"
    add("--quick", action="store_true", help=sentence)
    add("--tokens", type=positive, help=f"rows of logits (default {FULL['tokens']}; cuda: {rows})")
    add("--vocab", type=positive, help=f"columns of logits (default {FULL['vocab']}; cuda: {columns})")
    sentence = "dtype of the logits (default bf16) or of the fused head's operands (default fp32 and bf16; cuda: bf16)"
    add("--dtype", choices=sorted(logits_problem.DTYPES), help=sentence)
    defaults = f"(default {run_linear.HIDDEN}; cuda: {linear_gpu.HIDDEN})"
    add("--hidden", type=positive, help=f"features of the hidden states, for the fused head {defaults}")
    defaults = f"(default {FULL['rounds']}, for the fused head {run_linear.ROUNDS})"
    add("--rounds", type=positive, help=f"timed runs of each contender on the CPU {defaults}")
    names = sorted({*logits_cpu.CASES, host_cost.NAME, *run_linear.NAMES, *run_gpu.NAMES})
    sentence = f"measure only this case; may be repeated; {run_linear.ALL}: the fused head, on all of its shapes"
    add("--case", choices=names, action="append", help=sentence)
    add("--no-compile", action="store_true", help="leave torch.compile out")
    add("--no-peers", action="store_true", help="leave other libraries out")
    sentence = "further options of --device cuda; --json is rewritten as each case ends, --plot names a folder"
    cuda = parser.add_argument_group("cuda", sentence).add_argument
    sentence = "hot time of each contender and shape (default 1; for figures to publish 3)"
    cuda("--seconds", type=seconds, help=sentence)
    cuda("--budget", type=seconds, help="start no case after so many seconds; what was left out is listed")
    sentence = "measure torch.compile on every shape, not on the first alone: minutes more"
    cuda("--compile-all", action="store_true", help=sentence)
    sentence = "of the fused head one shape and the longest alone: a part of an hour's grid"
    cuda("--headline", action="store_true", help=sentence)
    sentence = "flash-attn's Triton cross entropy, loaded from this file"
    cuda("--flash-attn", type=Path, metavar="FILE", help=sentence)
    cuda("--commit", help="the commit to record where the checkout came without its history")
    add("--json", type=Path, metavar="FILE", help="write every sample, the machine and the sources' digests")
    add("--plot", type=Path, metavar="FILE", help="write a picture of the medians (needs matplotlib)")
    add("--plain", action="store_true", help="plain text even where rich is installed")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive and finite, got {value}")
    return value


def tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(args: argparse.Namespace) -> int:
    """Measures and prints; 1 if an answer of ours is outside the error policy, else 0 whatever the speed."""
    if args.plot:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            tell(f"benchmarks: --plot needs matplotlib; {how('bench')}")
            return 2
    known = [*logits_cpu.CASES, host_cost.NAME, *run_linear.NAMES] if args.device == "cpu" else run_gpu.NAMES
    unknown = [name for name in args.case or [] if name not in known]
    if unknown:
        tell(f"benchmarks: --device {args.device} has no case {unknown[0]!r}; it has: {', '.join(known)}")
        return 2
    if args.device == "cuda":
        return run_gpu.run(args)
    print(subject.line())
    size = {key: getattr(args, key) or (QUICK if args.quick else FULL)[key] for key in FULL}
    try:
        return measure_linear(args) if run_linear.only(args.case) else measure(args, **size)
    except KeyboardInterrupt:
        tell("benchmarks: interrupted")
        return 130


def conditions() -> list[str]:
    """Facts of this machine now that a reader of the times must know."""
    remarks = []
    reason = rlkernels.available_backends()["absent"].get("cpu")
    if reason:
        remarks.append(f"cpu backend: absent, eager serves and is what 'rlkernels' means below: {reason}")
    busy = os.getloadavg()[0] / machine.cores()
    if busy > 0.5:
        remarks.append(
            f"other work was running (load {busy:.1f} per core at the start): these times are not to be quoted"
        )
    return remarks


def measure(args: argparse.Namespace, tokens: int, vocab: int, rounds: int) -> int:
    remarks, dtype = conditions(), args.dtype or "bf16"
    problem = logits_problem.make(torch.device("cpu"), tokens, vocab, dtype)
    cache = machine.last_level_cache()
    if cache and problem.bytes < 4 * cache:
        remarks.append("the logits are smaller than four last-level caches: these are times with a warm cache")
    what = f"{dtype} logits [{tokens}, {vocab}], {problem.bytes / 2**20:.0f} MiB, {torch.get_num_threads()} threads"
    tell(f"benchmarks: {what}, {rounds} rounds")
    judge = logits_problem.judge(problem)
    peers: dict[str, Callable] = {}
    if not args.no_peers:
        peers, missing = logits_cpu.peers()
        remarks += missing
    reader = cpu_timing.reader(args.quick)
    lineup = logits_cpu.lineup(peers, not args.no_compile)
    cases = {}
    wanted = args.case or [*logits_cpu.CASES, host_cost.NAME]
    for name in (n for n in wanted if n in logits_cpu.CASES):
        case = logits_cpu.CASES[name](problem, judge, lineup)
        tell(f"  {name}: {', '.join(c.name for c in case.contenders)}")
        remarks += ready(case)
        cpu_timing.race([*case.contenders, reader], rounds, warmup=1)
        cases[name] = case
    if not cases:
        cpu_timing.race([reader], rounds, warmup=1)
    goals = cpu_report.targets(cases, problem.bytes)
    cpu_report.show(list(cases.values()), reader, goals, (tokens, vocab, dtype), args.plain)
    host = host_cost.measure(rounds) if host_cost.NAME in wanted else []
    if host:
        host_cost.show(host, args.plain)
    linear = run_linear.measure(args, ready, tell)
    linear.show(args.plain)
    faults = [fault for case in cases.values() for fault in wrong(case)] + host_cost.inexact(host) + linear.faults
    figures = {
        "shape": [tokens, vocab],
        "dtype": dtype,
        "rounds": rounds,
        "checked_rows": problem.rows.tolist(),
        **cpu_report.record(list(cases.values()), reader, goals),
        "host": host,
        "linear": linear.record(),
    }
    return conclude(args, remarks + linear.remarks, faults, [*cases.values(), *linear.cases], figures, what)


def measure_linear(args: argparse.Namespace) -> int:
    """The fused head alone: no logits are drawn."""
    remarks = conditions()
    what = f"fused head, {torch.get_num_threads()} threads"
    tell(f"benchmarks: {what}")
    linear = run_linear.measure(args, ready, tell)
    linear.show(args.plain)
    return conclude(args, remarks + linear.remarks, linear.faults, linear.cases, {"linear": linear.record()}, what)


def conclude(
    args: argparse.Namespace,
    remarks: list[str],
    faults: list[str],
    cases: Sequence[Case],
    figures: dict[str, object],
    what: str,
) -> int:
    """Tells what is wrong and where the figures are from, and writes the files; 1 if an answer is wrong."""
    for remark in remarks:
        print(f"note: {remark}")
    for fault in faults:
        print(f"WRONG: {fault}")
    where = subject.describe()
    commit = where["sources"]["commit"] or "unknown commit"
    command = subject.command()
    if where["sources"]["dirty"]:
        commit += ", dirty"
    print(
        f"\n{where['processor']}, {torch.get_num_threads()} threads, torch {torch.__version__}, {commit}, seed 0: "
        f"{command}"
    )
    if args.json:
        head = {
            "command": command,
            "machine": where,
            "threads": torch.get_num_threads(),
            "correct": not faults,
            "faults": faults,
            "remarks": remarks,
        }
        save(args.json, {**head, **figures})
    if args.plot and cases:
        cpu_report.plot(args.plot, cases, f"{what}, {where['processor']}")
    return 1 if faults else 0


def ready(case: Case) -> list[str]:
    """Compiles, checks and weighs every contender outside the clock; drops those that fail, with one line for each."""
    remarks = []
    for contender in list(case.contenders):
        try:
            cpu_timing.first_run(contender)
            cpu_timing.memory(contender)
        except Exception as error:  # a contender that fails is shown with its reason; ours may not fail
            if contender.ours:
                raise
            lines = str(error).strip().splitlines() or [type(error).__name__]
            case.contenders.remove(contender)
            remarks.append(f"{case.name}: {contender.name} not measured: {lines[0]}")
    return remarks


if __name__ == "__main__":
    sys.exit(main())
