"""Triton's own launcher over a driver that runs nothing: the grid, the stream and every parameter of every kernel."""

import cases
import pytest
import stand_in_driver
import torch
from measured import record, threads

from rlkernels.backends.triton import launch as backend

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
BIG = cases.BIG
# One of each kernel and of each way in which arguments differ: tuples of any length, numbers, 64 bits, no tensor.
CALLS = {
    "entropy": cases.stats(BF16, BIG, 1),
    "two models": cases.stats(BF16, BIG, 17, ref=True),
    "gradient": cases.backward(BF16, BIG, (True, True, False)),
    "policy": cases.policy("ppo_clip", BF16, BIG),
    "head policy": cases.policy("ppo_clip", FP32, BIG, out=BF16),
    "policy without columns": cases.policy("reinforce", BF16, 32_000, entropy=False, kl=None),
    "divergence": cases.divergence("forward_kl", BF16, BIG),
    "objective": cases.objective("ppo_clip", True),
    "objective fp64": cases.objective("ppo_clip", True, FP64),
    "weighted loss": cases.weighted("ppo_clip", mask=True, counted=True),
    "scan": cases.scan("skip", False, True),
    "packed scan": cases.scan("skip", True, True),
}


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    if stand_in_driver.CC is None:
        pytest.skip("no C compiler: Triton's launcher cannot be built")
    return stand_in_driver.StandIn(tmp_path_factory.mktemp("driver"))


@pytest.fixture(autouse=True)
def warps_of_nvidia(monkeypatch):
    monkeypatch.setattr(backend, "warp_width", lambda device: 32)


@pytest.mark.parametrize("name", CALLS)
def test_the_driver_gets_every_parameter_of_a_launch_as_it_was_given(name, driver):
    supposed = record(CALLS[name], "sm_90")
    with driver.active() as launches:
        CALLS[name]()
    assert [made.kernel for made in launches] == [launch.kernel for launch in supposed]
    for made, launch in zip(launches, supposed, strict=True):
        assert made.parameters and made.stream == stand_in_driver.STREAM and made.threads == threads(launch)
        wrong = [p for p in made.parameters if p.got != p.expected]
        assert not wrong, made.kernel
        # Axis 1 ends at 65535, so rows and elements lie on axis 0.
        assert made.grid[0] >= 1 and (made.grid[1:] == (1, 1) or made.kernel == "token_stats_backward")


def test_a_row_has_a_program_and_few_rows_of_a_gradient_are_divided(driver):
    with driver.active() as launches:
        CALLS["entropy"]()
        CALLS["gradient"]()
    rows, slices = launches
    assert rows.grid == (cases.ROWS, 1, 1)
    assert slices.grid[0] == cases.ROWS and slices.grid[1] == -(-BIG // 4096), "a tile per program"


def test_the_stand_in_sees_a_parameter_that_is_not_what_was_given(driver, monkeypatch):
    monkeypatch.setattr(backend, "inverse", lambda temperature: 2.0)
    with driver.active() as launches:
        CALLS["entropy"]()
    (temperature,) = (p for p in launches[0].parameters if p.name == "temperature")
    assert temperature.given == 2.0 and temperature.got == temperature.expected
    assert temperature._replace(given=1.0).expected != temperature.got


def test_a_launch_that_fails_is_an_error_and_the_next_one_runs(driver):
    with driver.active():
        driver.fail()
        with pytest.raises(RuntimeError, match="too many resources requested for launch"):
            CALLS["scan"]()
        CALLS["scan"]()
