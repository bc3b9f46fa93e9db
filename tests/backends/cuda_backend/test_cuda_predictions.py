"""The speed that the model predicts for the CUDA kernels, from the machine code that nvcc makes for sm_90a here."""

import ptxas
import pytest
from host_build import setup_cuda
from nvcc_build import COUNTED

from benchmarks.gpu_model import __main__ as command
from benchmarks.gpu_model import machine_code, predictions, rows, simulator
from benchmarks.gpu_model.machine import SLOW


@pytest.fixture(scope="module")
def compiled(nvcc_build):
    if ptxas.sass.tool() is None:
        pytest.skip("cuobjdump was found neither on PATH nor under CUDA_HOME nor in Triton's wheel")
    recorded = predictions.compilers(predictions.FILE.read_text())["cuda"]
    if setup_cuda.NVCC is None or ptxas.release(setup_cuda.NVCC) != recorded:
        pytest.skip(f"predictions are recorded for nvcc {recorded}")
    return machine_code.of_cuda(nvcc_build[1], f"sm_{COUNTED}")


def test_no_prediction_of_a_cuda_kernel_or_of_its_head_falls_below_its_floor_or_is_out_of_date(compiled, pytestconfig):
    """``python -m benchmarks.gpu_model --write`` records them anew; a fall wants a reason."""
    if simulator.CXX is None:
        pytest.skip("no C++ compiler: the simulator cannot be built")
    found = rows.predict_on(rows.cuda(compiled), pytestconfig.cache.mkdir("gpu_model"), SLOW)
    found = command.with_heads(found, "cuda")
    assert not predictions.changes(found, predictions.table())
    recorded = {key for key in predictions.table() if key[1] == "cuda"}
    assert {p.key for p in found} == recorded, "predictions.json holds kernels that are no more"
