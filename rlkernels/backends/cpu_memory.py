"""Memory for large results on the CPU: what a tensor frees goes to the next one."""

import math
from contextlib import contextmanager

import torch

from rlkernels.backends.context import forced
from rlkernels.backends.cpu_module import _cpu

# Bytes. From 32 MiB on the C library maps fresh pages for every allocation. The bound is half of that, because a head's
# rounded gradient (31 MiB at 32000 x 512) shall come from what was kept, not on top of it.
LARGE = 16 << 20


def empty(shape, dtype):
    """An uninitialised tensor on the CPU.

    A large one takes over the memory that an earlier one freed, because page faults would cost as much as the work.
    Under ``use_backend("eager")`` the memory is torch's.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < LARGE or _cpu is None or forced() == "eager":
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.frombuffer(_cpu.Buffer(size), dtype=dtype).view(shape)  # the tensor owns the buffer


def kept_bytes():
    """Bytes of freed results (three at most) that are kept for the next ones; the kernel of the system may take them
    back at any time.
    """
    return _cpu.kept_bytes()


def release_memory():
    """Gives the kept memory back at once."""
    if _cpu is not None:
        _cpu.release()


@contextmanager
def torchs_memory():
    """Inside, large tensors come from torch's allocator: for a measurement of memory that would not see ours."""
    global LARGE
    before, LARGE = LARGE, math.inf
    try:
        yield
    finally:
        LARGE = before
