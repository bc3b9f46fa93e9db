"""Two of the deliberate mistakes in the Triton kernels, planted for real.

All of them: ``python tests/repository/mutation --backend triton``.
"""

import runpy

import pytest
from paths import ROOT, TESTS


@pytest.mark.fault(112)
def test_mistakes_in_the_triton_kernels_are_really_noticed():
    script = runpy.run_path(str(TESTS / "repository/mutation/__main__.py"), run_name="mutation")
    asked = (
        "test_interpreted_blocks.py::test_log_sigmoid_keeps_both_tails",
        "test_interpreted_policy.py::test_a_clipped_token_is_not_swept_again_and_gets_zeros",
    )
    todo = [
        ("triton", m._replace(tests=asked))
        for m in script["LISTS"]["triton"]
        if m.name in ("log1p by addition", "the tail of a dead row is not written")
    ]
    found = script["run"](ROOT, todo, show=lambda *_, **__: None)
    assert found == {f"triton: {m.name}": True for _, m in todo} and len(found) == 2
