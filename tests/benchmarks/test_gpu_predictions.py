"""The file of predictions: how one is found for a measured figure."""

import json

import pytest

from benchmarks.gpu_model import predictions
from benchmarks.gpu_model.predictions import Prediction

ROW = Prediction(
    "token_stats", "cuda", "bf16", (8192, 151936), 10.2, 65536, 4, 32, 0.93, "memory", 0.92, 9.0, {"fma": 5.4}
)
HEAD = Prediction(
    "linear_policy_loss",
    "triton",
    "bf16",
    (8192, 4096, 151936),
    None,
    None,
    None,
    None,
    0.89,
    "products",
    0.9,
    plan="2 stretches, 6 chunks",
    extra_gib=2.3,
)


@pytest.fixture
def two(tmp_path, monkeypatch):
    file = tmp_path / "predictions.json"
    file.write_text(predictions.written([ROW, HEAD]))
    monkeypatch.setattr(predictions, "FILE", file)
    predictions.table.cache_clear()
    yield predictions.lookup
    predictions.table.cache_clear()


def test_a_prediction_is_found_as_it_was_written(two):
    assert two("token_stats", "cuda", "bf16", (8192, 151936)) == ROW
    assert two("linear_policy_loss", "triton", "bf16", (8192, 4096, 151936)) == HEAD
    assert json.loads(predictions.FILE.read_text())["label"] == "model, not calibrated"


def test_any_number_of_rows_that_fills_a_device_finds_the_prediction_of_its_vocabulary(two):
    assert two("token_stats", "cuda", "bf16", (2048, 151936)) == ROW
    assert two("token_stats", "cuda", "bf16", (1024, 151936)) is None, "311 MB: the ends of a launch count"
    assert two("linear_policy_loss", "triton", "bf16", (4096, 4096, 151936)) is None, "a head has a plan per batch"


@pytest.mark.parametrize(
    "asked", [("token_stats", "triton", "bf16"), ("token_stats", "cuda", "fp32"), ("none", "cuda", "bf16")]
)
def test_what_the_model_says_nothing_of_is_none(two, asked):
    assert two(*asked, (8192, 151936)) is None


def test_a_goal_is_reached_when_share_and_instructions_are(two):
    assert not ROW.reached, "10.2 instructions where 9 are the goal"
    assert not HEAD.reached and Prediction(**{**vars(HEAD), "share_of_roof": 0.9}).reached
    assert Prediction(**{**vars(ROW), "instructions_per_element": 8.9}).reached
