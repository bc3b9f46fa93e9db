"""The speed that the model predicts for the Triton kernels, from the machine code that Triton makes for sm_90 here."""

import pytest
from measured import minor_version

from benchmarks.gpu_model import __main__ as command
from benchmarks.gpu_model import machine_code, predictions, rows, simulator
from benchmarks.gpu_model.machine import SLOW


def test_no_prediction_of_a_triton_kernel_or_of_its_head_falls_below_its_floor_or_is_out_of_date(
    tmp_path, pytestconfig
):
    """``python -m benchmarks.gpu_model --write`` records them anew; a fall wants a reason."""
    recorded = predictions.compilers(predictions.FILE.read_text())["triton"]
    if minor_version() != recorded:
        pytest.skip(f"predictions are recorded for Triton {recorded}")
    if simulator.CXX is None:
        pytest.skip("no C++ compiler: the simulator cannot be built")
    build = rows.triton(machine_code.compile_triton(tmp_path))
    found = command.with_heads(rows.predict_on(build, pytestconfig.cache.mkdir("gpu_model"), SLOW), "triton")
    assert not predictions.changes(found, predictions.table())
    recorded = {key for key in predictions.table() if key[1] == "triton"}
    assert {p.key for p in found} == recorded, "predictions.json holds kernels that are no more"
