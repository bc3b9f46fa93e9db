import host_build
import nvcc_build as nvcc
import pytest
import torch

import rlkernels
from rlkernels.backends import BACKENDS, cuda

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(scope="session")
def host_module(pytestconfig):
    if host_build.CXX is None:
        pytest.skip("no C++ compiler: the CUDA sources cannot be run on the CPU")
    return host_build.load(host_build.build(pytestconfig.cache.mkdir("cuda_host")))


@pytest.fixture(scope="session")
def nvcc_build(pytestconfig):
    """The report of ptxas, and the files with the machine code that is counted."""
    found = nvcc.build(pytestconfig.cache.mkdir("cuda_nvcc"))
    if found is None:
        pytest.skip("nvcc was found neither on PATH nor under CUDA_HOME: the CUDA kernels are not compiled here")
    return found


@pytest.fixture
def backend(host_module, monkeypatch):
    """``rlkernels.backends.cuda`` over the CPU build of its kernels."""
    module, set_order = host_module
    set_order("forward")
    module.choose()
    yield host_build.install(cuda, module, monkeypatch.setattr)
    module.choose()


@pytest.fixture
def public(backend, monkeypatch):
    """The public functions, with the CUDA backend behind them."""
    monkeypatch.setitem(BACKENDS, "eager", backend)
    with rlkernels.use_backend("eager"):
        yield rlkernels


@pytest.fixture(params=DTYPES)
def dtype(request):
    return DTYPES[request.param]
