"""A multiprocessor clock by clock: ``sm.cpp``, compiled when it is first asked, and what it is told of machine code."""

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu_model.sass import Instruction

SOURCE = Path(__file__).with_name("sm.cpp")
CXX = shutil.which(os.getenv("CXX", "c++"))

FMA, HEAVY = 0, 1
# Opcodes by pipe: number in sm.cpp, clocks of one scheduler per warp, clocks until a result is there that the compiler
# does not count. Looked for in this order; all others are of the ALU. 16 lanes per clock are two clocks.
PIPES = (
    (r"FADD|FMUL|FFMA|HADD2|HMUL2|HFMA2|HMNMX2", FMA, 2, 12),
    (r"IMAD", HEAVY, 2, 12),
    (r"MUFU", 3, 8, 22),
    (r"F2FP|I2FP", 4, 2, 20),
    (r"F2F|I2F|F2I", 4, 8, 20),
    (r"LDS", 5, 4, 30),
    (r"SHFL", 5, 4, 24),
    (r"LDG|STG|STS|LDGSTS|LDSM|STSM|ATOM\w*|RED|LDC|LD|ST|LDL|STL", 5, 4, 12),
    (r"BRA|EXIT|BSSY|BSYNC|NOP|WARPSYNC|CALL|RET|BAR|DEPBAR|LDGDEPBAR|MEMBAR|ERRBAR|CCTL", 6, 1, 12),
    (r"D(ADD|MUL|FMA|SETP)", 7, 2, 40),
    (r"S2R|CS2R|B2R|REDUX|VOTE|POPC|FLO", 8, 4, 24),
    (r"U[A-Z]\w*|R2UR|S2UR", 9, 2, 12),
    (r"\w+", 2, 2, 12),
)
PLAIN, LOAD, STORE, COPY, COMMIT, WAIT_GROUPS, BARRIER = range(7)
KINDS = {"LDG": LOAD, "STG": STORE, "LDGSTS": COPY, "LDGDEPBAR": COMMIT, "BAR": BARRIER}
MOVES = {LOAD, STORE, COPY}


class Step(NamedTuple):
    """One instruction as the simulator takes it. ``bytes``: what a warp moves to or from memory."""

    pipe: int
    cycles: int
    latency: int
    stall: int
    writes: int
    reads: int
    waits: int
    kind: int
    operand: int
    bytes: float


class Phase(NamedTuple):
    """``times`` passes of every warp through the steps; then all of a block meet, and ``delay`` clocks pass.

    ``hits``: the share of loads that the level-2 cache serves.
    """

    steps: tuple[Step, ...]
    times: int
    delay: int = 0
    hits: float = 0.0


class Case(NamedTuple):
    """Blocks of warps on one multiprocessor, each of which serves ``rows`` units, one after another."""

    blocks: int
    warps: int
    rows: int
    rate: float
    latency: int
    hit: int
    start: int
    phases: tuple[Phase, ...]


class Result(NamedTuple):
    """Bytes per clock that memory moves for one multiprocessor, and the share of clocks with an issue."""

    rate: float
    issue: float


def step(instruction: Instruction) -> Step:
    """The instruction with what the compiler has written into its control word."""
    number, cycles, latency = next(p[1:] for p in PIPES if re.fullmatch(p[0], instruction.opcode))
    kind = KINDS.get(instruction.opcode, PLAIN)
    groups = re.search(r"SB0, (0x[0-9a-f]+)", instruction.operands) if instruction.opcode == "DEPBAR" else None
    if groups:
        kind = WAIT_GROUPS
    bits = 128 if kind == COPY else instruction.bits
    word = instruction.control
    return Step(
        number,
        cycles,
        latency,
        stall=word >> 41 & 15,
        writes=word >> 46 & 7,
        reads=word >> 49 & 7,
        waits=word >> 52 & 63,
        kind=kind,
        operand=int(groups[1], 16) if groups else 0,
        bytes=32 * bits // 8 if kind in MOVES else 0,
    )


def steps(path: Sequence[Instruction]) -> tuple[Step, ...]:
    return tuple(map(step, path))


def copies(loop: Sequence[Step]) -> tuple[Step, ...]:
    """The copies to shared memory of a pass, and the end of their group."""
    return tuple(s._replace(waits=0) for s in loop if s.kind in (COPY, COMMIT))


def without_copies(loop: Sequence[Step]) -> tuple[Step, ...]:
    return tuple(s for s in loop if s.kind != COPY)


def part(loop: Sequence[Step], share: float) -> tuple[Step, ...]:
    """This share of a pass: of loads and stores the first ones, of all else every so many.

    What an instruction that is left out waits for, the next one waits for.
    """
    counts = {kind: sum(s.kind == kind for s in loop) for kind in MOVES}
    kept = {kind: max(1, -int(-share * n // 1)) for kind, n in counts.items()}
    found: list[Step] = []
    seen = dict.fromkeys(MOVES, 0)
    due, waits = 0.0, 0
    for s in loop:
        waits |= s.waits
        if s.kind in MOVES:
            seen[s.kind] += 1
            take = seen[s.kind] <= kept[s.kind]
            s = s._replace(bytes=s.bytes * share * counts[s.kind] / kept[s.kind])
        elif s.kind == PLAIN:
            due += share
            take = due >= 1
            due -= take
        else:
            take = True
        if take:
            found.append(s._replace(waits=waits))
            waits = 0
    return tuple(found)


def scaled(loop: Sequence[Step], share: float, *kinds: int) -> tuple[Step, ...]:
    """The same instructions, of which those of these kinds (by default all) move a share of their bytes."""
    return tuple(s._replace(bytes=s.bytes * share) if s.kind in (kinds or MOVES) else s for s in loop)


def program(folder: Path) -> Path:
    """Path of the compiled simulator under ``folder``.

    Raises:
        RuntimeError: there is no C++ compiler, or it refused.
    """
    if CXX is None:
        raise RuntimeError("the simulator needs a C++ compiler: none is on PATH, and CXX names none")
    target = folder / f"sm-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]}"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part_of = target.with_suffix(f".{os.getpid()}")
        done = subprocess.run(
            [CXX, "-O2", "-std=c++17", "-o", str(part_of), str(SOURCE)], capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"the simulator does not compile:\n{done.stderr[-2000:]}")
        part_of.replace(target)  # whole or not there, because other processes look for it
    return target


def text(case: Case) -> str:
    loops = list(dict.fromkeys(phase.steps for phase in case.phases))
    head = (*case[:7], len(loops))
    lines = [" ".join(map(str, head))]
    for loop in loops:
        lines += [str(len(loop)), *(" ".join(map(str, s)) for s in loop)]
    lines.append(str(len(case.phases)))
    lines += [f"{loops.index(p.steps)} {p.times} {p.delay} {p.hits}" for p in case.phases]
    return "\n".join(lines)


def simulate(cases: Sequence[Case], folder: Path) -> list[Result]:
    """Runs the cases, one after another in one process."""
    done = subprocess.run(
        [str(program(folder))], input="\n".join(map(text, cases)), capture_output=True, text=True, check=True
    )
    return [Result(*map(float, line.split())) for line in done.stdout.splitlines()]
