"""The two barriers that the interpreter cannot miss: it runs the threads of a program in step."""

import re

import cases
import pytest
import torch
from launches import compiled
from measured import record


@pytest.mark.parametrize(
    "call",
    [cases.backward(torch.bfloat16, cases.BIG, in_place=True), cases.policy("ppo_clip", torch.bfloat16, cases.BIG)],
    ids=["gradient", "policy"],
)
def test_the_target_is_read_before_and_written_after_the_rest_of_the_row(call):
    (launch,) = record(call, "sm_90")
    ttir = compiled(launch).asm["ttir"]
    # By the order of the text: the target's logit is loaded, barrier, the loop that stores the row, barrier, the
    # target's element.
    first, second = (m.start() for m in re.finditer(r"\bbarrier\b", ttir))
    loops = [m.start() for m in re.finditer(r"scf\.for", ttir)]
    assert any(first < loop < second for loop in loops), "no loop over the row between the two barriers"
    assert "tt.store" in ttir[first:second] and "tt.store" in ttir[second:]
