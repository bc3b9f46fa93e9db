"""What a dead token holds, through the public losses, on the CUDA sources built for the host."""

import pytest
from dead_tokens import LOSSES, check


@pytest.mark.fault(128)
@pytest.mark.parametrize("name", LOSSES)
def test_a_dead_token_s_target_and_temperature_change_nothing(name, public):
    check(name)
