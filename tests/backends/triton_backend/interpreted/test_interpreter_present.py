"""One line where these tests cannot run, and the proof that the interpreter is an oracle where they can."""

import pytest


def test_interpreter_is_repaired_and_its_checks_fire(absent):
    if absent:
        pytest.skip(f"tests/backends/triton_backend/interpreted: {absent}")
    import triton_interpreter_self_test

    assert len(triton_interpreter_self_test.self_test()) >= 25
