"""Instructions per element in the hot loops of the row kernels, counted in the machine code of an NVIDIA GPU.

    python benchmarks/gpu_model/sass.py CUBIN... [--json]

A file is what ``cuobjdump -sass`` reads: a cubin, an object, a module. The program is looked for on PATH, below
``CUDA_HOME`` and in Triton's wheel, also in one that ``make test-triton`` has put into ``.triton``. A count is exact.
What it says of speed is a model until a device has measured it.

An innermost loop that loads the row 16 bytes at a time, from memory or from shared memory, is hot. It is a loop of the
gradient where it stores 16 bytes at a time, else one of the statistics. Of several loops of a kind the one that takes
most elements per pass counts. Of the paths through it the shortest of those that move most bytes and take most
exponentials: an aligned row without a mask takes that one.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

CONTROL = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/\s*$")
LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
USAGE = re.compile(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
KINDS = ("statistics", "gradient")
PIPES = {
    "fma": r"FADD|FMUL|FFMA|HADD2|HMUL2|HFMA2|IMAD",
    "mufu": r"MUFU",
    "conversion": r"F2FP|F2F|I2F|F2I|I2FP",
    "memory": r"LDG|STG|LDS|STS|LDGSTS|LDC|SHFL|ATOM\w*|RED|LD|ST|LDL|STL",
    "control": r"BRA|EXIT|BSSY|BSYNC|NOP|WARPSYNC|CALL|RET|BAR|DEPBAR|LDGDEPBAR|MEMBAR|UBLKCP",
    "uniform": r"U[A-Z]\w*|R2UR|S2UR",
}
"""The pipes by their opcodes, in the order in which an opcode is looked for; all others are of the ALU."""


class Instruction(NamedTuple):
    """One instruction: ``name`` with its modifiers (``LDG.E.128``), ``target`` of a branch, and ``control``, the second
    word of its code, in which the compiler has written what it waits for.
    """

    address: int
    predicate: str
    name: str
    operands: str
    target: int | None
    control: int = 0

    @property
    def opcode(self) -> str:
        return self.name.split(".")[0]

    @property
    def bits(self) -> int:
        """Bits that a thread loads or stores."""
        found = re.search(r"\.(?:[US]?(8|16)|(64|128))(?:\.|$)", self.name)
        return int(found[1] or found[2]) if found else 32

    @property
    def falls_through(self) -> bool:
        """Tells whether the next one may follow."""
        if self.opcode in ("EXIT", "RET", "BRX"):
            return bool(self.predicate)
        # `BRA P0, 0x..` and `BRA.DIV UR4, 0x..` have a condition among their operands.
        return self.opcode != "BRA" or bool(self.predicate) or "," in self.operands


@dataclass
class Block:
    """Instructions that run one after another."""

    instructions: list[Instruction]
    successors: list[int] = field(default_factory=list)

    def moved(self, *opcodes: str) -> int:
        """Bytes that these instructions of a thread move, 16 at a time."""
        return 16 * sum(i.opcode in opcodes and "128" in i.name.split(".") for i in self.instructions)

    def loaded(self) -> int:
        return self.moved("LDG", "LDS")

    def moved_of_any_width(self) -> int:
        """Bytes that the instructions of a thread move between memory and registers."""
        return sum(i.bits // 8 for i in self.instructions if i.opcode in ("LDG", "STG"))


class Way(NamedTuple):
    """A path from a block to the header of its loop. The first three compare two of them."""

    moved: int
    exponentials: int
    minus_length: int
    blocks: list[int]


class Loop(NamedTuple):
    """The hot path through a loop: ``loaded`` bytes per thread and pass, ``code_bytes`` of all paths."""

    kind: str
    loaded: int
    path: list[Instruction]
    code_bytes: int


def tool() -> str | None:
    """Path of ``cuobjdump``, or None."""
    folders = [os.environ.get("PATH", ""), f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"]
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin:
        folders.append(str(Path(spec.origin).parent / "backends/nvidia/bin"))
    beside = Path(__file__).parents[2] / ".triton"
    folders += sorted(map(str, beside.glob("*/triton/backends/nvidia/bin")), reverse=True)
    return shutil.which("cuobjdump", path=os.pathsep.join(folders))


def asked(program: str, option: str, file: Path, arch: str | None) -> str:
    words = [program, option, *(["-arch", arch] if arch and file.suffix != ".cubin" else []), str(file)]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def parse(text: str) -> dict[str, list[Instruction]]:
    """``{mangled name: instructions}`` of what ``cuobjdump -sass`` prints."""
    found: dict[str, list[Instruction]] = {}
    code: list[Instruction] | None = None
    for line in text.splitlines():
        if line.lstrip().startswith("Function : "):
            code = found.setdefault(line.split()[2], [])
        elif code is not None and (m := LINE.match(line)):
            target = re.search(r"(0x[0-9a-f]+)$", m[4]) if m[3].split(".")[0] == "BRA" else None
            code.append(Instruction(int(m[1], 16), m[2] or "", m[3], m[4], int(target[1], 16) if target else None))
        elif code and (m := CONTROL.match(line)):
            code[-1] = code[-1]._replace(control=int(m[1], 16))
    return found


def blocks(code: list[Instruction]) -> list[Block]:
    """The basic blocks in the order of their addresses."""
    at = {i.address: n for n, i in enumerate(code)}
    starts = {0} | {at[i.target] for i in code if i.target in at}
    starts |= {n + 1 for n, i in enumerate(code[:-1]) if i.target is not None or not i.falls_through}
    bounds = [*sorted(starts), len(code)]
    number = {start: k for k, start in enumerate(bounds)}
    made = [Block(code[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
    for k, block in enumerate(made):
        last = block.instructions[-1]
        if last.falls_through and k + 1 < len(made):
            block.successors.append(k + 1)
        if last.target in at:
            block.successors.append(number[at[last.target]])
    return made


def dominators(graph: list[Block]) -> list[set[int]]:
    """For each block those that every path to it passes; empty for one that no path reaches."""
    before: list[list[int]] = [[] for _ in graph]
    for k, block in enumerate(graph):
        for s in block.successors:
            before[s].append(k)
    order, seen, stack = [], {0}, [(0, iter(graph[0].successors))]
    while stack:  # depth first, numbered as each is left
        k, rest = stack[-1]
        follower = next((s for s in rest if s not in seen), None)
        if follower is None:
            order.append(k)
            stack.pop()
        else:
            seen.add(follower)
            stack.append((follower, iter(graph[follower].successors)))
    found: list[set[int]] = [set() for _ in graph]
    found[0], changed = {0}, True
    while changed:
        changed = False
        for k in reversed(order):
            known = [found[p] for p in before[k] if found[p]]
            now = {k} | (set.intersection(*known) if known and k else set())
            changed |= now != found[k]
            found[k] = now
    return found


def innermost(graph: list[Block]) -> list[tuple[int, set[int]]]:
    """``(header, blocks)`` of every loop that holds no other."""
    above, before = dominators(graph), [[] for _ in graph]  # type: tuple[list[set[int]], list[list[int]]]
    for k, block in enumerate(graph):
        for s in block.successors if above[k] else ():  # what no path reaches is in no loop
            before[s].append(k)
    bodies: dict[int, set[int]] = {}
    for k, block in enumerate(graph):
        for header in (s for s in block.successors if s in above[k]):
            body, waiting = bodies.setdefault(header, {header}), [k]
            while waiting:
                if (b := waiting.pop()) not in body:
                    body.add(b)
                    waiting += before[b]
    return [(h, body) for h, body in bodies.items() if not any(o != h and o in body for o in bodies)]


def moved_wide(block: Block) -> int:
    return block.moved("LDG", "LDS", "LDGSTS", "STG")


def hot_path(graph: list[Block], header: int, body: set[int], moved: Callable[[Block], int] = moved_wide) -> list[int]:
    """The shortest of those paths from the header back to it that move most and take most exponentials."""
    best: dict[int, Way] = {}

    def visit(k: int) -> Way:
        if k not in best:
            ends = [Way(0, 0, 0, [])] if header in graph[k].successors else []
            onward = ends + [visit(s) for s in graph[k].successors if s in body and s != header]
            onward = onward or [Way(-(10**9), 0, 0, [])]  # no way back to the header
            rest = max(onward, key=lambda way: way[:3])
            best[k] = Way(
                rest.moved + moved(graph[k]),
                rest.exponentials + sum(i.name == "MUFU.EX2" for i in graph[k].instructions),
                rest.minus_length - len(graph[k].instructions),
                [k, *rest.blocks],
            )
        return best[k]

    return visit(header).blocks


def hot_loops(code: list[Instruction]) -> dict[str, Loop]:
    """The loop of each kind that takes most per pass; among equals the one with fewest instructions."""
    graph, found = blocks(code), {}  # type: tuple[list[Block], dict[str, Loop]]
    for header, body in innermost(graph):
        path = hot_path(graph, header, body)
        loaded = sum(graph[k].loaded() for k in path)
        if loaded == 0:
            continue
        kind = KINDS[any(graph[k].moved("STG") for k in path)]
        instructions = [i for k in path for i in graph[k].instructions]
        loop = Loop(kind, loaded, instructions, 16 * sum(len(graph[k].instructions) for k in body))
        if kind not in found or (loaded, -len(instructions)) > (found[kind].loaded, -len(found[kind].path)):
            found[kind] = loop
    return found


def scan_loop(code: list[Instruction]) -> Loop:
    """The loop of a scan, whose accesses are narrow: of the innermost ones that which moves most of memory."""
    graph, found = blocks(code), []
    for header, body in innermost(graph):
        path = hot_path(graph, header, body, Block.moved_of_any_width)
        moved = sum(graph[k].moved_of_any_width() for k in path)
        instructions = [i for k in path for i in graph[k].instructions]
        found.append(Loop("scan", moved, instructions, 16 * sum(len(graph[k].instructions) for k in body)))
    return max(found, key=lambda loop: loop.loaded)


def pipe(instruction: Instruction) -> str:
    for name, opcodes in PIPES.items():
        if re.fullmatch(opcodes, instruction.opcode):
            return name
    return "alu"


def short(mangled: str) -> str:
    """``token_stats<bf16,1,512>`` of the mangled name, without its parameter list."""
    start = re.match(r"_ZN3rlk\d+", mangled)
    text = mangled[start.end() if start else 0 :].partition("EEvNS")[0]
    text = re.sub(r"NS_\d+(\w+?)E(?=Li)", r"\1,", text)  # an objective
    kernel, _, arguments = text.partition("I")
    # One type argument, or two: those of the logits and of their gradient. S1_ says that the second one is the first.
    arguments = re.sub(r"^(13__nv_bfloat16|6__half)S1_", r"\1\1", arguments)
    arguments = re.sub(r"^[fd]+(?=L|\d)", lambda m: "".join({"f": "fp32,", "d": "fp64,"}[x] for x in m[0]), arguments)
    arguments = arguments.replace("13__nv_bfloat16", "bf16,").replace("6__half", "fp16,")
    arguments = re.sub(r"(?<=E)([fd])(?=L)", lambda m: {"f": "fp32,", "d": "fp64,"}[m[1]], arguments)
    arguments = re.sub(r"L[ijb](\d+)E?", r"\1,", arguments).strip(",")
    return f"{kernel}<{arguments}>"


def element_bytes(kernel: str) -> int:
    """Bytes of one element: a logit, or with a reference a pair of them."""
    name, arguments = kernel[:-1].split("<")
    first, *rest = arguments.split(",")
    pairs = (name == "token_stats" and int(rest[0]) & 4) or (name == "token_stats_backward" and rest[1] == "1")
    return SIZES[first] * (2 if pairs else 1)


def count(code: list[Instruction], kernel: str) -> dict[str, dict]:
    """Counts of each hot loop the instructions per element, in all and by pipe, elements per pass, and the bytes of its
    code.
    """
    told = {}
    for kind, loop in hot_loops(code).items():
        elements = loop.loaded // element_bytes(kernel)
        pipes = Counter(pipe(i) for i in loop.path)
        told[kind] = {
            "per_element": round(len(loop.path) / elements, 2),
            "elements": elements,
            "loop_bytes": loop.code_bytes,
            "pipes": {name: round(n / elements, 2) for name, n in sorted(pipes.items())},
        }
    return told


def read(files: list[Path], program: str, arch: str | None = None) -> dict[str, dict]:
    """``{kernel: {registers, spills, statistics, gradient}}`` of the kernels over rows in these files."""
    found = {}
    for file in files:
        usage = {m[1]: m for m in USAGE.finditer(asked(program, "-res-usage", file, arch))}
        for mangled, code in parse(asked(program, "-sass", file, arch)).items():
            kernel = short(mangled)
            if kernel.startswith(("token_stats", "fused_policy")):
                used = usage[mangled]
                told = {"registers": int(used[2]), "spills": int(used[3]) + int(used[4])}
                found[kernel] = told | count(code, kernel)
    return dict(sorted(found.items()))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, help="cubins, objects or modules")
    parser.add_argument("--arch", help="of a file with code for several, such as sm_90a")
    parser.add_argument("--json", action="store_true", help="print JSON, one kernel per line")
    args = parser.parse_args(argv)
    program = tool()
    if program is None:
        parser.error("cuobjdump was found neither on PATH nor under CUDA_HOME nor in Triton's wheel")
    found = read(args.files, program, args.arch)
    if args.json:
        print("{\n" + ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in found.items()) + "\n}")
        return 0
    print("Counted in machine code, not measured: instructions per element in all and by pipe, bytes of the loop")
    print(f"{'kernel':40}{'regs':>5}{'spills':>7}")
    for kernel, told in found.items():
        for n, kind in enumerate(k for k in KINDS if k in told):
            loop = told[kind]
            lead = f"{kernel:40}{told['registers']:5}{told['spills']:7}" if n == 0 else " " * 52
            pipes = " ".join(f"{name} {value:g}" for name, value in loop["pipes"].items())
            print(f"{lead}  {kind:11}{loop['per_element']:6.2f}  {pipes}; {loop['loop_bytes']}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
