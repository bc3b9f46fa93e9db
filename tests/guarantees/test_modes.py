"""F131 and its kind: what torch is set to around a call changes no bit of its results and gradients."""

import threading
from contextlib import contextmanager

import pytest
import torch
from public_calls import CALLS, TRAINED, call, call_with, data, tensor_arguments, tensors
from reference import same_bits

import rlkernels as rlk
from rlkernels.objectives import OBJECTIVES, objective, where


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES = {
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "float16 by default": lambda: default_dtype(torch.float16),
    "float64 by default": lambda: default_dtype(torch.float64),
    "another device by default": lambda: torch.device("meta"),
    "anomalies detected": torch.autograd.detect_anomaly,
}


def assert_bits(got, expected, what):
    assert len(got) == len(expected), what
    for k, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.device.type == "cpu" and same_bits(a, b), f"{what}: result {k}: {a} against {b}"


def in_float64(d):
    return {k: v.double() if v.is_floating_point() else v for k, v in d.items()}


@pytest.mark.fault(131)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CALLS)
def test_what_torch_makes_by_default_changes_no_bit(name, mode, backend):
    for d in (data(), in_float64(data())):
        expected = call(name, d)
        with MODES[mode]():
            got = call(name, d)
        assert_bits(got, expected, f"{name}, {mode}")


@pytest.mark.fault(131)
@pytest.mark.parametrize("mode", MODES)
def test_two_literals_of_an_objective_are_what_is_written(mode, backend):
    @objective
    def of_two_literals(logp, advantage):
        r"""``-s A logp``, ``s`` 1.05 or 1.0. A test."""
        slope = where(advantage > 0.0, 1.05, 1.0)
        return -slope * advantage * logp, -slope * advantage

    logp, advantage = torch.linspace(-2, -1, 6, dtype=torch.float64), torch.linspace(-1, 1, 6, dtype=torch.float64)
    truth = (torch.where(advantage > 0, torch.tensor(1.05, dtype=torch.float64), 1.0) * -advantage * logp).mean()
    try:
        for dtype in (torch.float64, torch.float32):
            inputs = logp.to(dtype), advantage.to(dtype)
            expected = rlk.policy_loss(inputs[0], None, inputs[1], objective="of_two_literals")
            with MODES[mode]():
                got = rlk.policy_loss(inputs[0], None, inputs[1], objective="of_two_literals")
            assert same_bits(got, expected) and got.dtype == dtype
            torch.testing.assert_close(got.double(), truth, rtol=1e-14 if dtype == torch.float64 else 3e-7, atol=0)
    finally:
        del OBJECTIVES["of_two_literals"]


@pytest.mark.parametrize("name", CALLS)
def test_without_gradients_and_in_inference_mode_the_results_are_those_of_training(name, backend):
    d = data()
    leaves = {k: v.clone().requires_grad_() if k in TRAINED else v for k, v in d.items()}
    expected = [x.detach() for x in tensors(CALLS[name](leaves))]
    with torch.no_grad():
        found = tensors(CALLS[name](leaves))
        assert not any(x.requires_grad for x in found)
        assert_bits(found, expected, f"{name}, no_grad")
    with torch.inference_mode():
        assert_bits(tensors(CALLS[name](leaves)), expected, f"{name}, inference mode")
        made = {k: v.clone() for k, v in d.items()}
        assert_bits(tensors(CALLS[name](made)), expected, f"{name}, made in inference mode")
    assert_bits(tensors(CALLS[name](made)), expected, f"{name}, made in inference mode and used outside")


@pytest.mark.parametrize("name", CALLS)
def test_training_on_what_was_made_in_inference_mode_is_right_or_torchs_own_error(name, backend):
    expected = call_with(name, data(), lambda argument, x: x)
    for argument, _ in tensor_arguments(name):

        def change(key, x, argument=argument):
            if key != argument:
                return x
            with torch.inference_mode():
                return x.clone()

        try:
            got = call_with(name, data(), change)
        except RuntimeError as error:
            assert "nference tensor" in str(error), f"{argument} of {name}: {error}"
        else:
            assert_bits(got, expected, f"{argument} of {name}")


@pytest.mark.parametrize("name", CALLS)
def test_autocast_rounds_the_operands_of_a_head_and_nothing_else(name, backend):
    d = data()
    of_heads = ("hidden", "weight", "bias", "teacher_hidden", "teacher_head", "teacher_bias")
    rounded = {k: v.bfloat16() if k in of_heads and name.startswith("linear") else v for k, v in d.items()}
    expected = call(name, rounded)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        forward_alone = call(name, d, through=lambda f, d: f(d))
    assert_bits([x.to(y.dtype) for x, y in zip(forward_alone, expected, strict=True)], expected, name)


def test_four_threads_at_once_get_what_one_alone_gets(backend):
    expected = {name: call(name, data()) for name in CALLS}
    found, errors = [{} for _ in range(4)], []

    def work(k):
        try:
            with rlk.use_backend(backend):  # of this thread alone
                names = list(CALLS)
                for name in names[k * 7 :] + names[: k * 7]:
                    found[k][name] = call(name, data())
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for each in found:
        for name, got in each.items():
            assert_bits(got, expected[name], name)
        assert set(each) == set(CALLS)
