"""The CUDA backend as a module: what it refuses, how it fails without a compiler or a driver, and where it launches."""

import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch
from flat_backend import Flat

from rlkernels.backends import cuda

X, Y = torch.randn(2, 7), torch.tensor([1, 2])
ROW = X[:, 0]


def stats(x=X, ref=None):
    return Flat(cuda).token_stats(x, Y, 1.0, -100, None, ref, 0)


CALLS = {
    "token_stats": stats,
    "token_stats_backward": lambda: Flat(cuda).token_stats_backward(
        ROW, None, None, X, Y, 1.0, -100, None, None, ROW, ROW, ROW, None, None, None, None
    ),
    "fused_policy": lambda: Flat(cuda).fused_policy(
        "reinforce", X, Y, 1.0, -100, None, [ROW], [], ROW, None, None, None, None, True, None
    ),
    "elementwise": lambda: cuda.elementwise("reinforce", [ROW, ROW], [], None),
    "gae": lambda: cuda.gae(X, X, None, None, 0.9, 0.9, "none"),
}


@pytest.mark.fault(58)
@pytest.mark.parametrize("name", CALLS)
def test_without_the_compiled_module_every_op_says_how_to_get_it(monkeypatch, name):
    monkeypatch.setattr(cuda, "_cuda", None)
    assert cuda.available() == (False, cuda.ABSENT)
    with pytest.raises(RuntimeError, match="backend 'cuda' is unavailable: .*(nvcc|RLKERNELS_CUDA=1)"):
        CALLS[name]()


def test_where_torch_sees_no_device_the_backend_says_so(monkeypatch):
    monkeypatch.setattr(cuda, "_cuda", object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cuda.available() == (False, cuda.NO_DEVICE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cuda.available() == (True, "")


@pytest.mark.fault(28)
@pytest.mark.parametrize(
    "call, message",
    (
        (lambda: stats(X.double()), "logits of dtype torch.float64 are not supported by backend 'cuda'"),
        (lambda: stats(X, X.bfloat16()), "ref_logits of dtype torch.bfloat16 beside logits of dtype torch.float32"),
        (
            lambda: cuda.elementwise("reinforce", [X[0].half()] * 2, [], None),
            "columns of dtype torch.float16 are not supported by backend 'cuda'",
        ),
        (
            lambda: cuda.gae(X.half(), X.half(), None, None, 0.9, 0.9, "none"),
            "rewards of dtype torch.float16 are not supported by backend 'cuda'",
        ),
    ),
)
def test_a_dtype_without_a_kernel_is_refused(backend, call, message):
    with pytest.raises(NotImplementedError, match=message):
        call()


@pytest.mark.fault(45)
def test_a_launch_names_the_device_and_the_stream_of_its_tensors(monkeypatch):
    device = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda d: SimpleNamespace(cuda_stream=77) if d == 1 else None)
    for raw in (None, {1: 77}.get):  # a torch without the private function, and one with it
        monkeypatch.setattr(cuda, "_raw_stream", raw)
        assert cuda._stream(SimpleNamespace(device=device)) == (1, 77)


def test_the_compiled_objectives_are_those_of_the_header(host_module):
    from rlkernels.objectives import OBJECTIVES

    expected = {
        name: (len(o.columns), len(o.params))
        for name, o in OBJECTIVES.items()
        if o.function.__module__.startswith("rlkernels.")
    }
    assert host_module[0].OBJECTIVES == expected


needs_module = pytest.mark.skipif(
    cuda._cuda is None, reason="rlkernels._cuda was not built here (no nvcc, or RLKERNELS_CUDA=0)"
)


@pytest.mark.fault(58)
@needs_module
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver here")
@pytest.mark.parametrize("name", CALLS)
def test_without_a_driver_the_module_loads_and_the_error_names_the_kernel(monkeypatch, name):
    monkeypatch.setattr(cuda, "_stream", lambda tensor: (0, 0))
    with pytest.raises(RuntimeError, match=f"^{name}(<\\w+>)?: .*(driver|device)"):
        CALLS[name]()


@pytest.mark.fault(59, 60)
@needs_module
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is not installed")
def test_no_symbol_of_torch_or_of_a_shared_cuda_runtime_is_needed():
    wanted = subprocess.run(
        ["nm", "-D", "--undefined-only", cuda._cuda.__file__], capture_output=True, text=True, check=True
    ).stdout
    assert "PyObject" in wanted
    assert not [s for s in wanted.split() if s.startswith("cuda") or "c10" in s or "torch" in s]


def test_an_objective_that_the_row_kernels_do_not_hold_takes_the_two_passes(monkeypatch):
    """``pairwise`` is compiled into ``elementwise`` alone: the row kernel's switch would answer with NaN."""
    monkeypatch.setattr(cuda, "_available_or_raise", lambda: None)
    monkeypatch.setattr(cuda, "_cuda", SimpleNamespace(OBJECTIVES={"pairwise": (1, 0)}))
    monkeypatch.setattr(cuda.eager, "fused_policy", lambda rows, policy, with_grad, out, passes: (policy, passes))
    logits, targets = torch.zeros(2, 5), torch.zeros(2, dtype=torch.long)
    arguments = "pairwise", logits, targets, 1.0, -100, None, [], [], torch.ones(2), None, None, None, None, True, None
    policy, passes = Flat(cuda).fused_policy(*arguments)
    assert policy.objective == "pairwise" and passes == (cuda.token_stats, cuda.token_stats_backward)
