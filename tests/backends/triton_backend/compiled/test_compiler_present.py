"""One line where these tests cannot run, and the proof that a spill, an overflow and a refused kernel are seen where
they can.
"""

import pytest


def test_compilers_are_there_and_planted_faults_are_seen(absent):
    if absent:
        pytest.skip(f"tests/backends/triton_backend/compiled: {absent}")
    import triton_aot

    triton_aot.self_test()
