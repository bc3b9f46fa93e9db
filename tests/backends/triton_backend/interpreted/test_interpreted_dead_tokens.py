"""What a dead token holds, through the public losses, in Triton's interpreter."""

import pytest
from dead_tokens import IDS, LOSSES, check


@pytest.mark.fault(128)
@pytest.mark.parametrize("name", LOSSES)
def test_a_dead_token_s_target_and_temperature_change_nothing(name, backend, small_tiles):
    check(name, {"beyond": IDS["beyond"], "beyond int32": IDS["beyond int32"]}, (0.0,))
