"""The CUDA kernels under other thread orders and under sanitizers: missing barriers, races that change bits, reads
outside of a tensor.
"""

import subprocess
import sys
from pathlib import Path

import host_build
import one_of_each
import pytest
import subprocesses


@pytest.fixture(scope="module")
def forward(host_module):
    from rlkernels.backends import cuda

    module, set_order = host_module
    with pytest.MonkeyPatch.context() as patch:
        host_build.install(cuda, module, patch.setattr)
        set_order("forward")
        return one_of_each.hashes(cuda, module.choose)


@pytest.mark.fault(52)
@pytest.mark.parametrize("order", ("reverse", "random:1"))
def test_the_order_of_blocks_and_threads_changes_no_bit(backend, host_module, forward, order):
    host_module[1](order)
    assert one_of_each.hashes(backend, host_module[0].choose) == forward


def test_no_kernel_reads_or_writes_outside_its_tensors_and_shared_memory(pytestconfig, forward):
    """AddressSanitizer and UBSan: bounds, alignment of vector accesses, signed overflow.

    The bits are those of the plain build.
    """
    runtime = [
        subprocess.run(
            [host_build.CXX, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")
    ]
    if not all(Path(path).is_absolute() for path in runtime):
        pytest.skip("the C++ compiler has no sanitizer runtime")
    module = host_build.build(pytestconfig.cache.mkdir("cuda_host"), "asan")
    environment = subprocesses.environment(
        LD_PRELOAD=" ".join(runtime), ASAN_OPTIONS="detect_leaks=0:detect_stack_use_after_return=0", OMP_NUM_THREADS="1"
    )
    done = subprocess.run(
        [sys.executable, one_of_each.__file__, module, "random:2"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert {name: value for value, name in (line.split(" ", 1) for line in done.stdout.splitlines())} == forward
