"""Where a row of ``linear_*`` keeps its bits on a CPU, whatever comes with it: where the products are our own, as
README says.
"""

import json
from pathlib import Path

import pytest
import subprocesses


@pytest.mark.fault(133)
@pytest.mark.parametrize("isa", ["amx", "avx512", "avx2", "baseline"])
def test_a_row_of_a_linear_function_keeps_its_bits_where_the_products_are_our_own_and_elsewhere_from_run_to_run(isa):
    done = subprocesses.child(Path(__file__).with_name("linear_bits.py"), RLKERNELS_CPU_ISA=isa, timeout=120)
    if "no more than this machine has" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr[-3000:]
    for dtypes, (ours, moved) in json.loads(done.stdout).items():
        assert not moved, (
            f"{dtypes}: the bits of a row depend on {moved}, the product is {'our own' if ours else 'of a library'}"
        )
