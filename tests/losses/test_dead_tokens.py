"""A token without a mask: its target and its temperature are never looked at, in any loss, whatever they hold."""

import pytest
import torch
from dead_tokens import IDS, LOSSES, check, problem, run
from reference import same_bits

import rlkernels as rlk


@pytest.mark.fault(128)
@pytest.mark.parametrize("name", LOSSES)
def test_a_dead_token_s_target_and_temperature_change_nothing(name, backend):
    check(name)


@pytest.mark.fault(128)
@pytest.mark.parametrize(
    "name", ["sft_loss", "linear_sft_loss", "logits_policy_loss token", "linear_policy_loss token"]
)
def test_nor_do_those_of_a_token_of_weight_zero(name, backend):
    check(name, weights=True)


@pytest.mark.fault(128)
@pytest.mark.parametrize("name", [name for name in LOSSES if not name.startswith("linear")])
def test_a_live_token_s_target_outside_the_vocabulary_is_named(name, backend):
    d = problem()
    d["targets"][0, 0] = 11
    with pytest.raises(IndexError, match=r"target 11 at row 0 is outside \[0, 11\)"):
        run(name, d, mask=d["mask"])
    d = problem()
    d["temperature"][0, 0] = 0.0
    with pytest.raises(ValueError, match="temperature must be positive and finite, got 0.0 at row 0"):
        run(name, d, mask=d["mask"])


@pytest.mark.fault(128)
def test_ignore_index_beyond_int32_beside_int32_targets(backend):
    d = problem()
    targets = d["targets"].int()
    want = rlk.sft_loss(d["logits"], targets, d["mask"])
    assert same_bits(rlk.sft_loss(d["logits"], targets, d["mask"], ignore_index=2**40), want)
    want = rlk.linear_sft_loss(d["hidden"], d["head"], targets, d["mask"])
    assert same_bits(rlk.linear_sft_loss(d["hidden"], d["head"], targets, d["mask"], ignore_index=2**40), want)


@pytest.mark.fault(128)
@pytest.mark.parametrize(
    "name",
    [
        "sft_loss",
        "logits_policy_loss token",
        "logits_policy_loss sequence",
        "linear_sft_loss",
        "linear_policy_loss sequence",
        "linear_dpo_loss",
    ],
)
def test_under_compile_too(name):
    d = problem()
    dead = ~d["mask"]
    _, loss = LOSSES[name]
    compiled = torch.compile(lambda d: loss(d, {"mask": d["mask"]}), backend="eager")
    clean = compiled(d)
    hostile = {
        **d,
        "targets": d["targets"].masked_fill(dead, IDS["beyond int32"]),
        "temperature": d["temperature"].masked_fill(dead, 0.0),
    }
    assert same_bits(compiled(hostile), clean)
