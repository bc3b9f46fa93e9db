"""``tanh``, ``sqrt``, ``abs``, ``maximum`` and ``minimum``: the same numbers in plain torch and in C++."""

import ctypes
import subprocess

import all_functions
import pytest
import torch
from source_trees import CXX, ROOT

import rlkernels as rlk
from rlkernels.backends import eager
from rlkernels.objectives import OBJECTIVES, abs, cxx, functions, maximum, minimum, objective, sqrt, tanh
from rlkernels.objectives.zero_gradient import still_where_zero

NAN = float("nan")
PROGRAM = """#include "objective_functions.h"
namespace rlk { %s }
template <class S>
void run(const S* x, const S* a, S low, S* value, S* derivative, int n) {
  for (int i = 0; i < n; ++i) {
    const auto term = rlk::bent{}(x[i], a[i], low);
    value[i] = term.value, derivative[i] = term.derivative;
  }
}
extern "C" void run_f32(const float* x, const float* a, double low, float* v, float* d, int n) {
  run<float>(x, a, float(low), v, d, n);
}
extern "C" void run_f64(const double* x, const double* a, double low, double* v, double* d, int n) {
  run<double>(x, a, low, v, d, n);
}
"""


@pytest.fixture(autouse=True)
def bent():
    objective(all_functions.bent)
    yield
    del OBJECTIVES["bent"]


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    if CXX is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("functions")
    objective(all_functions.bent)
    (folder / "bent.cpp").write_text(PROGRAM % cxx.functor("bent"))
    command = [CXX, "-std=c++17", "-O2", "-Wall", "-Werror", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
    subprocess.run([*command, folder / "bent.cpp", "-o", folder / "bent.so"], check=True)
    return ctypes.CDLL(str(folder / "bent.so"))


@pytest.fixture(params=["eager", "cxx"])
def run(request):
    if request.param == "eager":
        return lambda x, a: eager.elementwise("bent", [x, a], [-0.5], None)[1:]
    library = request.getfixturevalue("module")

    def native(x, a):
        function = {torch.float32: library.run_f32, torch.float64: library.run_f64}[x.dtype]
        value, derivative = torch.empty_like(x), torch.empty_like(x)
        addresses = [ctypes.c_void_p(t.data_ptr()) for t in (x, a, value, derivative)]
        function(*addresses[:2], ctypes.c_double(-0.5), *addresses[2:], x.numel())
        return value, derivative

    return native


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_derivatives_are_those_of_torch(run, dtype):
    columns = all_functions.columns(dtype)
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14}[dtype]
    for got, want in zip(run(*columns), all_functions.truth(*columns), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_nan_operand_gives_nan_and_an_infinite_one_its_limit(run, dtype):
    columns, want = all_functions.special(dtype)
    torch.testing.assert_close(run(*columns)[0].double(), want, rtol=1e-6, atol=0, equal_nan=True)


def test_a_loss_of_these_functions_has_the_gradient_of_autograd():
    logp, advantage = all_functions.columns(torch.float64)
    logp.requires_grad_()
    rlk.policy_loss(logp, None, advantage, objective="bent", aggregation="token-sum").backward()
    torch.testing.assert_close(logp.grad, all_functions.truth(logp.detach(), advantage)[1])


def test_autograd_through_the_functions_follows_the_convention():
    zero, one = (torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in (0.0, 1.0))
    assert torch.autograd.grad(abs(zero), zero)[0] == 0 and torch.autograd.grad(sqrt(zero), zero)[0].isinf()
    for function in (maximum, minimum):
        other = one.detach().clone().requires_grad_()
        first, second = torch.autograd.grad(function(one, other), (one, other))
        assert first == 0 and second == 1
    assert torch.autograd.gradcheck(lambda x: tanh(x) + sqrt(abs(x)) + maximum(x, 0.1) + minimum(x, -0.1), one)


@pytest.mark.parametrize(("function", "python"), [(maximum, max), (minimum, min)])
def test_numbers_that_are_no_tensors_are_compared_too(function, python):
    assert function(1.0, 2.0) == python(1.0, 2.0) and function(2.0, -1.0) == python(2.0, -1.0)
    assert function(NAN, 1.0) != function(NAN, 1.0) and function(1.0, NAN) != function(1.0, NAN)
    assert function(torch.tensor(NAN), 1.0).isnan() and function(1.0, torch.tensor(NAN)).isnan()


def test_a_function_that_is_0_at_0_keeps_the_proof_of_a_zero_gradient():
    def of_abs(logp, advantage):
        """d"""
        return tanh(abs(advantage)) * logp, tanh(abs(advantage)) * sqrt(advantage)

    objective(of_abs)
    assert still_where_zero("of_abs", "advantage")
    del OBJECTIVES["of_abs"]


def test_every_function_is_exported_for_objectives():
    assert all(getattr(rlk.objectives, name) is f for name, f in functions.FUNCTIONS.items())
