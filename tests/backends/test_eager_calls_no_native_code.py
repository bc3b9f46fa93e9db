"""Under ``use_backend("eager")`` no public function calls the compiled CPU module, forward or backward.

Every function of the module raises here. The same calls without ``use_backend`` show that the trap holds.
"""

import json
import sys

import pytest
import torch
from paths import SUPPORT
from present_backends import native
from public_calls import CALLS, call, data
from subprocesses import child
from written_results import written

import rlkernels as rlk
from rlkernels import ops
from rlkernels.backends import cpu, cpu_memory

pytestmark = native
LARGE = {"every tensor is large": 0, "as it is": None}
"""From so many bytes on a tensor takes memory that the module keeps."""


class NativeCode(Exception):
    """A function of the compiled module was called. Not a RuntimeError, which the library catches to add a name."""


def _raising(name):
    def call_of_native_code(*arguments):
        raise NativeCode(name)

    return call_of_native_code


@pytest.fixture
def trap(monkeypatch):
    """Lets every function of ``rlkernels._cpu`` raise: in the module, and in every table that holds it elsewhere."""
    functions = {name: x for name, x in vars(cpu._cpu).items() if callable(x) and not name.startswith("__")}
    assert {"gemm", "gemm_f32_preferred", "token_stats", "fused_policy", "elementwise_f32", "Buffer"} <= set(functions)
    raising = {id(x): _raising(name) for name, x in functions.items()}
    for module in [m for name, m in sys.modules.items() if name.startswith("rlkernels.")]:
        for name, x in list(vars(module).items()):
            if id(x) in raising:
                monkeypatch.setattr(module, name, raising[id(x)])
            if isinstance(x, dict) and not name.startswith("__"):
                for key in [key for key, y in x.items() if id(y) in raising]:
                    monkeypatch.setitem(x, key, raising[id(x[key])])


@pytest.fixture(scope="module")
def without_the_module():
    """The results of every call in a process that has no native code."""
    done = child(SUPPORT / "written_results.py", RLKERNELS_CPU="0")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("large", LARGE)
@pytest.mark.parametrize("name", CALLS)
def test_eager_calls_no_native_code_and_gives_the_results_of_a_process_without_it(
    name, large, trap, without_the_module, monkeypatch
):
    if LARGE[large] is not None:
        monkeypatch.setattr(cpu_memory, "LARGE", LARGE[large])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with rlk.use_backend("eager"):
            results = written(call(name, data()))
    finally:
        torch.set_num_threads(threads)
    assert results == without_the_module[name]


@pytest.mark.parametrize("name", CALLS)
def test_the_backward_of_an_eager_forward_calls_no_native_code_outside_of_use_backend(name, trap):
    def forward_alone(function, d):
        with rlk.use_backend("eager"):
            return function(d)

    call(name, data(), through=forward_alone)


@pytest.fixture(scope="module")
def served():
    """Name of a call to whether the CPU backend serves any op of it."""
    found = {}
    for name in CALLS:
        before = ops.calls()
        call(name, data())
        found[name] = "cpu" in {backend for _, backend in ops.calls() - before}
    assert all(found[name] for name in CALLS if name.startswith("linear_"))
    return found


@pytest.mark.parametrize("name", CALLS)
def test_the_same_calls_without_use_backend_hit_the_trap_wherever_the_cpu_backend_serves_them(name, served, trap):
    try:
        call(name, data())
    except NativeCode:
        hit = True
    else:
        hit = False
    assert hit == served[name]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [name for name in CALLS if name.startswith("linear_")])
def test_eager_takes_no_native_memory_for_the_gradients_of_16_bit_heads(name, dtype, trap, monkeypatch):
    monkeypatch.setattr(cpu_memory, "LARGE", 0)
    d = {k: x.to(dtype) if k in ("hidden", "weight", "bias") else x for k, x in data().items()}
    with rlk.use_backend("eager"):
        call(name, d)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["gemm", "Buffer"])
def test_the_matmuls_and_the_memory_of_a_head_are_trapped_by_themselves(name, dtype, monkeypatch):
    """The statistics of a head alone do not hit the trap: a head that multiplies by torch does not either."""
    if name == "gemm" and not cpu._cpu.gemm_f32_preferred():
        pytest.skip("the matmuls of a head are torch's on this processor")
    monkeypatch.setattr(cpu._cpu, name, _raising(name))
    monkeypatch.setattr(cpu_memory, "LARGE", 0)
    d = {k: x.to(dtype) if k in ("hidden", "weight", "bias") else x for k, x in data().items()}
    operands = d["hidden"], d["weight"], d["targets"]
    with pytest.raises(NativeCode, match=name):
        rlk.linear_token_logprobs(*operands, bias=d["bias"])
    with rlk.use_backend("eager"):
        rlk.linear_token_logprobs(*operands, bias=d["bias"])
