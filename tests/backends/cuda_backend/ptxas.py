"""What ptxas reports of every kernel. As a program: prints the table that ``registers.json`` holds.

python tests/backends/cuda_backend/ptxas.py rlkernels/_cuda.ptxas.txt > tests/backends/cuda_backend/registers.json
"""

import json
import re
import subprocess
import sys
from typing import NamedTuple

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<arch>\w+)'.*?(?P<stack>\d+) bytes stack frame, "
    r"(?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


class Usage(NamedTuple):
    registers: int
    stack: int
    spills: int


def short(mangled):
    """``token_stats<__nv_bfloat16, 1, 512>`` of the mangled name, without its parameter list."""
    name = re.match(r"_ZN3rlk\d+", mangled).end()
    text = mangled[name:].partition("EEvNS")[0]
    text = re.sub(r"NS_\d+(\w+?)E(?=Li)", r"\1,", text)  # an objective
    kernel, _, arguments = text.partition("I")
    # One type argument, or two: those of the logits and of their gradient. S1_ says that the second one is the first.
    arguments = re.sub(r"^(13__nv_bfloat16|6__half)S1_", r"\1\1", arguments)
    arguments = re.sub(r"^[fd]+(?=L|\d)", lambda m: "".join({"f": "fp32,", "d": "fp64,"}[x] for x in m[0]), arguments)
    arguments = arguments.replace("13__nv_bfloat16", "bf16,").replace("6__half", "fp16,")
    arguments = re.sub(r"(?<=E)([fd])(?=L)", lambda m: {"f": "fp32,", "d": "fp64,"}[m[1]], arguments)
    arguments = re.sub(r"L[ijb](\d+)E?", r"\1,", arguments).strip(",")
    return f"{kernel}<{arguments}>"


def parse(report):
    """``{(kernel, arch): Usage}``."""
    return {
        (short(m["name"]), m["arch"]): Usage(int(m["registers"]), int(m["stack"]), int(m["stores"]) + int(m["loads"]))
        for m in ENTRY.finditer(report)
    }


def release(nvcc):
    """Such as ``13.0``: another release allocates other registers."""
    return re.search(
        r"release ([\d.]+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    )[1]


if __name__ == "__main__":
    table = {}
    with open(sys.argv[1]) as file:
        for (kernel, arch), usage in sorted(parse(file.read()).items()):
            table.setdefault(kernel, {})[arch] = usage.registers
    lines = ",\n".join(f"  {json.dumps(kernel)}: {json.dumps(row)}" for kernel, row in table.items())
    print(f'{{"nvcc": "{release("nvcc")}", "registers": {{\n{lines}\n}}}}')
