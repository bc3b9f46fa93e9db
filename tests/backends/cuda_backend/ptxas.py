"""What ptxas reports of every kernel. As a program: prints the table that ``registers.json`` holds, from the report of
a build, or that of ``instructions.json``, from the code for sm_90a.

python tests/backends/cuda_backend/ptxas.py rlkernels/_cuda.ptxas.txt > tests/backends/cuda_backend/registers.json
python tests/backends/cuda_backend/ptxas.py rlkernels/_cuda.*.so > tests/backends/cuda_backend/instructions.json
"""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

# By its path, because this runs as a program too.
_spec = importlib.util.spec_from_file_location("sass", Path(__file__).parents[3] / "benchmarks/gpu_model/sass.py")
sass = importlib.util.module_from_spec(_spec)
sys.modules["sass"] = sass  # where its classes look for their annotations
_spec.loader.exec_module(sass)

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


def parse(report):
    """``{(kernel, arch): Usage}``."""
    return {
        (sass.short(m["name"]), m["arch"]): Usage(
            int(m["registers"]), int(m["stack"]), int(m["stores"]) + int(m["loads"])
        )
        for m in ENTRY.finditer(report)
    }


def release(nvcc):
    """Such as ``13.0``: another release allocates other registers."""
    return re.search(
        r"release ([\d.]+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    )[1]


def counted(files, program, arch="sm_90a"):
    """Instructions per element of the kernels over rows. fp16 is left out, because its code is that of bf16 but for the
    conversions.
    """
    found = sass.read([Path(file) for file in files], program, arch)
    return {kernel: told for kernel, told in found.items() if "fp16" not in kernel}


def printed(head, name, table):
    lines = ",\n".join(f"  {json.dumps(kernel)}: {json.dumps(row)}" for kernel, row in table.items())
    print(f'{{"nvcc": "{head}", "{name}": {{\n{lines}\n}}}}')


if __name__ == "__main__":
    if sys.argv[1].endswith(".txt"):
        table = {}
        with open(sys.argv[1]) as file:
            for (kernel, arch), usage in sorted(parse(file.read()).items()):
                table.setdefault(kernel, {})[arch] = usage.registers
        printed(release("nvcc"), "registers", table)
    else:
        printed(release("nvcc"), "kernels", counted(sys.argv[1:], sass.tool()))
