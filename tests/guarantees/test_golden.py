"""Every golden case, through public functions, on every backend: values, metrics and gradients of other
systems' code.
"""

import golden_adapter
import golden_ops
import pytest
import torch
from golden_adapter import NotOffered, check_gradients, check_outputs, close, missing_outputs
from golden_coverage import CASES, COVERED, NOT_COVERED, OUTPUTS_NOT_OFFERED, not_offered, reasons
from present_backends import PRESENT

from rlkernels.backends import use_backend


def runs():
    """Every covered case in the precision of its file, and, where that is float64, in float32 too."""
    for case in COVERED:
        for dtype in (torch.float64, torch.float32) if case.dtype == torch.float64 else (case.dtype,):
            yield pytest.param(case, dtype, id=f"{case.id}-{str(dtype).removeprefix('torch.')}")


@pytest.mark.fault(111)
@pytest.mark.parametrize("backend", PRESENT)
@pytest.mark.parametrize("case,dtype", list(runs()))
def test_golden_case(case, dtype, backend):
    inputs = case.tensors(dtype)
    with use_backend(backend):
        if case.raised():
            error, message = case.raised()
            with pytest.raises(error, match=message):
                golden_ops.run(case, inputs)
            return
        outputs = golden_ops.run(case, inputs)
        for name in missing_outputs(case, outputs):
            assert not_offered(case, name), f"{name} is expected and was not returned"
        check_outputs(case, outputs, dtype)
        check_gradients(case, inputs, outputs, dtype)
        if "equals_compact" in case.expected:
            compact = case.compact()
            smaller = golden_ops.run(compact, compact.tensors(dtype))
            want = case.expected["equals_compact"]["loss"]
            close(smaller["loss"], want, 1e-5 if dtype == torch.float32 else 1e-12, 1e-14, "compact loss")


def test_the_table_of_uncovered_cases_is_exact():
    for key in NOT_COVERED:
        assert any(key in reasons(case) for case in CASES), f"stale: {key!r} names no case"
    for case in CASES:
        keys = reasons(case)
        assert len(keys) <= 1, f"{case.id} is listed twice: {keys}"
        if not keys:
            assert case.op in golden_ops.ADAPTERS, f"{case.id}: no adapter for {case.op} and no reason"
        elif case.op in golden_ops.ADAPTERS:
            with pytest.raises(NotOffered):  # an entry whose case runs is stale
                golden_ops.run(case, case.tensors(case.dtype))
    print(f"\ngolden cases: {len(COVERED)} run, {len(CASES) - len(COVERED)} not covered, {len(CASES)} in all")


def test_the_table_of_outputs_not_offered_is_exact():
    unused = set(OUTPUTS_NOT_OFFERED)
    for case in COVERED:
        if not case.raised():
            missing = missing_outputs(case, golden_ops.run(case, case.tensors(case.dtype)))
            unused -= {key for name in missing for key in not_offered(case, name)}
    assert not unused


@pytest.mark.fault(112)
@pytest.mark.parametrize("plant", ["value", "gradient"])
def test_a_result_one_percent_off_fails_the_comparison(plant):
    case = next(case for case in COVERED if case.id == "policy.trl.grpo")
    inputs = case.tensors(torch.float64)
    outputs = golden_ops.run(case, inputs)
    loss = outputs["loss"]
    outputs["loss"] = 1.01 * loss if plant == "value" else loss.detach() + 1.01 * (loss - loss.detach())
    with pytest.raises(AssertionError, match="not close"):
        check_outputs(case, outputs, torch.float64)
        check_gradients(case, inputs, outputs, torch.float64)


def test_the_generator_of_inputs_follows_the_flat_index():
    made = golden_adapter.tensor({"gen": "sin", "shape": [2, 3], "scale": 3.0, "step": 0.37, "offset": 0.1})
    assert made[1, 2].item() == pytest.approx(3.0 * torch.tensor(0.37 * 5 + 0.1, dtype=torch.float64).sin().item())
    assert golden_adapter.tensor({"gen": "zeros", "shape": [2]}).tolist() == [0.0, 0.0]
    assert golden_adapter.tensor([["inf", "-inf", 1.5]]).tolist() == [[float("inf"), -float("inf"), 1.5]]
