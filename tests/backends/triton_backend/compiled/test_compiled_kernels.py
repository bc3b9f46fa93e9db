"""Resources of every compiled variant: no spills, no stack, wide loads, registers and shared memory as in the golden
table.
"""

import json
from pathlib import Path

import cases
import pytest
from measured import measure, minor_version, record, threads

GOLDEN = Path(__file__).resolve().parents[1] / f"golden/{minor_version()}.json"
TABLE = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else None
REWRITE = "python tests/backends/triton_backend/tools/rewrite_golden.py"
CASES = {case.name: case for case in cases.every_case()}
ROW_KERNELS = ("token_stats", "token_stats_backward", "fused_policy")
UNALIGNED = ("one column", "odd vocabulary")
SPILLS = {
    ("3.5", "weighted_loss", "weighted loss", "sm_90"): (8, 4),
    ("3.5", "weighted_loss", "weighted robust", "sm_90"): (8, 2),
}
"""Bytes of stack and spilled registers of the two variants that the compiler of Triton 3.5 does not keep in registers;
docs/versions.md says so.
"""


@pytest.mark.fault(56, 57, 98, 99, 100)
@pytest.mark.parametrize("name, target", [(case.name, target) for case in CASES.values() for target in case.targets])
def test_every_kernel_compiles_without_spills_and_within_the_limits(name, target):
    for kernel, row in measure(CASES[name].call, target).items():
        spills = SPILLS.get((minor_version(), kernel, name, target), (0, 0))
        assert not row.error and (row.stack, row.spills) == spills, row
        assert 0 < row.registers <= 512 and row.shared <= row.shared_limit, row
        if kernel in ROW_KERNELS and not name.endswith(UNALIGNED):
            assert row.load_bits >= 64, row
            assert not name.startswith(("gradient", "policy ppo")) or row.store_bits >= 64, row
        if TABLE is not None:
            registers, shared = TABLE.get(f"{name} | {kernel} | {target}", (None, None))
            assert registers is not None, f"no entry in {GOLDEN.name}; run: {REWRITE}"
            assert row.registers <= 1.1 * registers and row.shared <= shared, (
                f"{row} against {registers} registers, {shared} bytes; if meant, run: {REWRITE}"
            )
    assert all(threads(launch) <= 1024 for launch in record(CASES[name].call, target))


@pytest.mark.fault(57)
def test_golden_table_of_this_triton_exists_and_has_no_stale_entries():
    if TABLE is None:
        pytest.skip(f"no golden table for Triton {minor_version()}; after reading the numbers run: {REWRITE}")
    launched = {
        (f"{case.name} | {launch.kernel} | {target}")
        for case in CASES.values()
        for target in case.targets
        for launch in record(case.call, target)
    }
    assert set(TABLE) == launched
