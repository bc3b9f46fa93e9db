"""Every layout of hidden states, weight and bias gives the numbers and gradients of float64, whatever
multiplies them.
"""

from pathlib import Path

import pytest
import subprocesses


@pytest.mark.fault(122)
@pytest.mark.parametrize("isa", ["amx", "avx512", "avx2", "baseline"])
def test_hidden_states_weight_and_bias_of_any_layout_and_sign_bit_give_right_numbers_and_gradients(isa):
    done = subprocesses.child(
        Path(__file__).with_name("linear_operands.py"), RLKERNELS_CPU_ISA=isa, OMP_NUM_THREADS="1", timeout=120
    )
    if "no more than this machine has" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr[-3000:]
