"""Compile a Triton kernel for many GPUs on a machine without one, and read what the compilers made of it.

    rows = compile_matrix(kernel, {"X": "*bf16", "Y": "*fp32", "V": "i32", "stride": "i64:16"}, {"BLOCK": 4096},
    num_warps=8) print(table(rows)); check(rows)                       # check() raises on errors, spills, too much
    shared memory

    python triton_aot.py kernels.py::row_lse --arg X=*bf16 --arg V=i32 --const BLOCK=4096 --num-warps 8 --target sm_90 \
        --target gfx942 --json golden.json                # exit status 1 if a row fails;  --self-test proves the tool

Works with Triton 3.6 to 3.9 (older and newer usually too): only triton.compile, ASTSource, GPUTarget and the tools that
come inside the wheel (cuobjdump, nvdisasm) are used; `python -m triton.tools.compile` needs a GPU driver, this does
not. Argument types: "*bf16" pointer (16-byte aligned unless written "*bf16:1"), "i32", "i64", "fp32", "i32:16" =
multiple of 16. Fields per target: registers, stack (bytes; register spills are counted HERE, the LOCAL column stays 0),
spills (LDL/STL instructions in the SASS, or AMD's vgpr+sgpr spill count), shared (bytes) and its limit on that chip
(Triton checks the limit only at launch), blocks per SM (NVIDIA), width in bits of the commonest global load and store
(128 is the aim; 16 shows that alignment or mask defeat vector loads), seconds.  overflow_sites() counts the 32-bit
index operations that a debug build would guard: a static lint for int32 overflow.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time

NVIDIA = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
AMD = ("gfx90a", "gfx942", "gfx950", "gfx1100")
TARGETS = NVIDIA + AMD
#            dynamic shared per block, shared per SM, warps per SM, blocks per SM
_LIMITS = {
    "sm_80": (166912, 167936, 64, 32),
    "sm_86": (101376, 102400, 48, 16),
    "sm_89": (101376, 102400, 48, 24),
    "sm_90": (232448, 233472, 64, 32),
    "sm_100": (232448, 233472, 64, 32),
    "sm_120": (101376, 102400, 48, 24),
}
_LDS = {"gfx950": 163840}


@dataclasses.dataclass
class Row:
    kernel: str
    target: str
    registers: int = 0
    stack: int = 0
    spills: int = 0
    shared: int = 0
    shared_limit: int = 0
    blocks_per_sm: int = 0
    load_bits: int = 0
    store_bits: int = 0
    seconds: float = 0.0
    error: str = ""


def _jit(fn):
    from triton.runtime.jit import JITFunction

    while not isinstance(fn, JITFunction):
        if not hasattr(fn, "fn"):
            raise TypeError("no compilable kernel: is TRITON_INTERPRET set, or is this no @triton.jit function?")
        fn = fn.fn
    return fn


def _source(fn, args, constants):
    from triton.compiler import ASTSource

    signature, attrs = {}, {}
    for i, name in enumerate(fn.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name not in args:
            raise ValueError(f"argument {name!r} of {fn.__name__} has no type")
        kind, _, align = args[name].partition(":")
        signature[name] = kind
        if (align or ("16" if kind.startswith("*") else "")) == "16":
            attrs[(i,)] = [["tt.divisibility", 16]]
    unknown = (set(args) | set(constants)) - set(fn.arg_names)
    if unknown:
        raise ValueError(f"{fn.__name__} has no argument {sorted(unknown)}")
    return ASTSource(fn, signature, {(fn.arg_names.index(k),): v for k, v in constants.items()}, attrs)


def _target(name):
    from triton.backends.compiler import GPUTarget

    if name.startswith("sm_"):
        return GPUTarget("cuda", int(name[3:].rstrip("af")), 32)
    return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)


def _tool(name, *args):
    import triton

    path = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", name)
    out = subprocess.run([path, *args], capture_output=True, text=True)
    return out.stdout + out.stderr


def _common(bits):
    """Width of the most frequent access; of equally frequent ones the widest."""
    return max(set(bits), key=lambda b: (bits.count(b), b), default=0)


def _ptx_bits(ptx, kind):
    plain = re.findall(rf"\b{kind}\.(?:weak\.|volatile\.|relaxed\.\w+\.)?global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)", ptx)
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global\S*\s*\[[^\]]*\],\s*\[[^\]]*\],\s*(0x[0-9a-f]+|\d+)", ptx)
    return [int(n or 1) * int(b) for n, b in plain] + [8 * int(c, 0) for c in copies if kind == "ld"]


def _amd_bits(asm, kind):
    names = {
        "dword": 32,
        "dwordx2": 64,
        "dwordx3": 96,
        "dwordx4": 128,
        "ushort": 16,
        "sshort": 16,
        "short": 16,
        "ubyte": 8,
        "byte": 8,
    }
    found = re.findall(rf"\b(?:global|buffer|flat)_{kind}_([a-z0-9_]+)", asm)
    return [names[f] if f in names else int((re.findall(r"\d+", f) or [0])[-1]) for f in found]


def _read_nvidia(row, k, warps):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(k.asm["cubin"])
        f.flush()
        usage, sass = _tool("cuobjdump", "-res-usage", f.name), _tool("nvdisasm", "-c", f.name)
    found = re.search(r"REG:(\d+)\s+STACK:(\d+)", usage)
    if not found:
        raise RuntimeError("cuobjdump gave no resource usage: " + usage[:200])
    row.registers, row.stack = int(found[1]), int(found[2])
    row.spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    row.load_bits, row.store_bits = _common(_ptx_bits(k.asm["ptx"], "ld")), _common(_ptx_bits(k.asm["ptx"], "st"))
    if row.target in _LIMITS:
        per_block, per_sm, max_warps, max_blocks = _LIMITS[row.target]
        row.shared_limit = per_block
        regs = 256 * math.ceil(max(row.registers, 1) * 32 / 256) * warps
        row.blocks_per_sm = min(max_blocks, max_warps // warps, 65536 // regs, per_sm // (row.shared + 1024))


def _read_amd(row, k):
    asm = k.asm["amdgcn"]
    field = lambda name: max((int(v) for v in re.findall(rf"\.{name}:\s+(\d+)", asm)), default=0)  # noqa: E731
    row.registers, row.stack = field("vgpr_count"), field("private_segment_fixed_size")
    row.spills = field("vgpr_spill_count") + field("sgpr_spill_count")
    row.shared_limit = _LDS.get(row.target, 65536)
    row.load_bits, row.store_bits = _common(_amd_bits(asm, "load")), _common(_amd_bits(asm, "store"))


def compile_matrix(fn, args, constants, targets=TARGETS, num_warps=4, num_stages=None, **options):
    """One Row per target.  `options` go to Triton (enable_fp_fusion, maxnreg, ...); an error fills Row.error."""
    import triton

    fn, rows = _jit(fn), []
    options = {"num_warps": num_warps, **({"num_stages": num_stages} if num_stages else {}), **options}
    for name in targets:
        row, start = Row(fn.__name__, name), time.perf_counter()
        try:
            k = triton.compile(_source(fn, args, constants), target=_target(name), options=dict(options))
            row.shared = k.metadata.shared
            _read_nvidia(row, k, num_warps) if name.startswith("sm_") else _read_amd(row, k)
        except (TypeError, ValueError):
            raise
        except Exception as e:  # noqa: BLE001 - a compiler failure is a result
            row.error = f"{type(e).__name__}: {' '.join(str(e).split())[-160:]}"
        row.seconds = round(time.perf_counter() - start, 2)
        rows.append(row)
    return rows


def overflow_sites(fn, args, constants, num_warps=4, target="sm_90"):
    """Number of 32-bit additions and multiplications that may wrap (0 is the aim; allow-list the rest by count)."""
    import triton

    fn = _jit(fn)
    k = triton.compile(
        _source(fn, args, constants), target=_target(target), options={"num_warps": num_warps, "debug": True}
    )
    return k.asm["ttir"].count("overflow detected")


def check(rows, max_registers=255, max_spills=0, max_stack=0):
    bad = []
    for r in rows:
        if r.error:
            bad.append(f"{r.kernel} {r.target}: {r.error}")
        elif r.spills > max_spills or r.stack > max_stack:
            bad.append(f"{r.kernel} {r.target}: {r.spills} spills, {r.stack} bytes of stack")
        elif r.shared > r.shared_limit > 0:
            bad.append(f"{r.kernel} {r.target}: {r.shared} bytes of shared memory, the chip has {r.shared_limit}")
        elif r.target.startswith("sm_") and r.registers > max_registers:
            bad.append(f"{r.kernel} {r.target}: {r.registers} registers")
    if bad:
        raise AssertionError("\n".join(bad))


def compare(rows, golden, slack=0.10):
    """Rows whose registers, stack, spills or shared memory grew against a stored list of dicts (the
    JSON of the CLI).
    """
    old = {(g["kernel"], g["target"]): g for g in golden}
    grew = []
    for r in rows:
        g = old.get((r.kernel, r.target))
        for field in ("registers", "stack", "spills", "shared") if g else ():
            if getattr(r, field) > g[field] * (1 + (slack if field == "registers" else 0)):
                grew.append(f"{r.kernel} {r.target}: {field} {g[field]} -> {getattr(r, field)}")
    return grew


def table(rows):
    head = ["kernel", "target", "regs", "stack", "spills", "shared", "limit", "blocks/SM", "ld", "st", "s", ""]
    lines = [head] + [[str(v) for v in dataclasses.astuple(r)] for r in rows]
    width = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, width, strict=True)).rstrip() for line in lines)


def _value(text):
    return {"True": True, "False": False, "None": None}.get(
        text,
        int(text)
        if re.fullmatch(r"-?\d+", text)
        else float(text)
        if re.fullmatch(r"-?[\d.]+(e-?\d+)?", text)
        else text,
    )


def self_test():
    """Right numbers for a clean kernel, and a planted spill and a planted overflow are seen."""
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import triton_interpreter_kernels as k

    good = compile_matrix(
        k.copy, {"X": "*fp32", "Y": "*bf16"}, {"B": 1024}, targets=("sm_80", "sm_90", "sm_100", "gfx942")
    )
    print(table(good))
    check(good)
    assert all(r.load_bits == 128 and r.registers > 0 for r in good), "a contiguous copy loads 128 bits at a time"
    bad = compile_matrix(k.whole_row, {"X": "*fp32", "Y": "*fp32"}, {"B": 16384}, targets=("sm_90",), num_warps=1)
    print(table(bad))
    assert bad[0].spills > 0 and bad[0].stack > 0, "512 live values per thread must spill"
    wrong = compile_matrix(k.copy, {"X": "*fp32", "Y": "*bf16"}, {"B": 1000}, targets=("sm_90",))
    assert "power of 2" in wrong[0].error
    for rows in (bad, wrong):
        try:
            check(rows)
        except AssertionError as e:
            print("refused:", str(e)[:120])
        else:
            raise SystemExit("check() let a bad row pass")
    assert (
        overflow_sites(k.overflow, {"Y": "*i64", "S": "i32"}, {}) > 0
        and overflow_sites(k.copy, {"X": "*fp32", "Y": "*bf16"}, {"B": 64}) == 0
    )
    print("all good")


def main(argv=None):
    if (argv or sys.argv[1:]) == ["--self-test"]:
        return self_test()
    p = argparse.ArgumentParser(description="compile a Triton kernel ahead of time and print its resources")
    p.add_argument("kernel", help="file.py::function")
    p.add_argument("--arg", action="append", default=[], metavar="NAME=TYPE")
    p.add_argument("--const", action="append", default=[], metavar="NAME=VALUE")
    p.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="Triton option, e.g. enable_fp_fusion=False"
    )
    p.add_argument("--target", action="append", default=[])
    p.add_argument("--num-warps", type=int, default=4)
    p.add_argument("--num-stages", type=int)
    p.add_argument("--max-registers", type=int, default=255)
    p.add_argument("--max-spills", type=int, default=0)
    p.add_argument("--max-stack", type=int, default=0)
    p.add_argument("--json")
    a = p.parse_args(argv)
    path, _, name = a.kernel.partition("::")
    spec = importlib.util.spec_from_file_location("aot_" + os.path.basename(path)[:-3], path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    spec.loader.exec_module(module)
    fn, args = getattr(module, name), dict(x.split("=", 1) for x in a.arg)
    constants, options = ({k: _value(v) for k, v in (x.split("=", 1) for x in pairs)} for pairs in (a.const, a.option))
    rows = compile_matrix(fn, args, constants, a.target or TARGETS, a.num_warps, a.num_stages, **options)
    print(table(rows))
    print("32-bit overflow sites:", overflow_sites(fn, args, constants, a.num_warps))
    if a.json:
        with open(a.json, "w") as f:
            json.dump([dataclasses.asdict(r) for r in rows], f, indent=1)
    try:
        check(rows, a.max_registers, a.max_spills, a.max_stack)
    except AssertionError as e:
        print(e, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
