"""Writes golden/<Triton minor version>.json: registers, shared memory and 32-bit overflow sites of every kernel
variant.

    python tests/backends/triton_backend/tools/rewrite_golden.py
"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
TESTS = HERE.parents[2]
sys.path[:0] = [str(HERE), str(TESTS / "support"), str(TESTS.parent)]

from cases import every_case  # noqa: E402
from measured import measure, minor_version  # noqa: E402

GOLDEN = HERE.parent / "golden"


def main():
    table = {}
    for case in every_case():
        for target in case.targets:
            for kernel, row in measure(case.call, target).items():
                table[f"{case.name} | {kernel} | {target}"] = [row.registers, row.shared]
                print(
                    case.name,
                    kernel,
                    target,
                    row.registers,
                    row.shared,
                    row.stack,
                    row.spills,
                    row.load_bits,
                    flush=True,
                )
    GOLDEN.mkdir(exist_ok=True)
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(table.items()))
    (GOLDEN / f"{minor_version()}.json").write_text("{\n" + lines + "\n}\n")


if __name__ == "__main__":
    main()
