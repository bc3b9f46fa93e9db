"""The suite of a machine with a GPU, on the CPU's backend: it is seldom run where it belongs, and must not rot
meanwhile.
"""

import re
from pathlib import Path

import subprocesses
from present_backends import native


@native
def test_the_gpu_suite_passes_where_it_needs_no_gpu():
    done = subprocesses.child(
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "--tb=short",
        Path(__file__).with_name("gpu"),
        GPU_SUITE_DEVICE="cpu",
        OMP_NUM_THREADS="1",
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 400
