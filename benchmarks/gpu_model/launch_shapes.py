"""The launches of ``csrc/cuda`` and of the Triton backend on an H200, by arithmetic: the model needs no driver.

``tests/backends/cuda_backend/test_cuda_launches.py`` holds these against what the host code launches.
"""

from typing import NamedTuple

from benchmarks.gpu_model.machine import SHARED, SHARED_OF_BLOCK

LANES, GROUP = 1024, 8
RECORDS = 1280
"""Bytes of the records of a row's warps, ``kRecordBytes``."""
FIXED = RECORDS + 64
SLICE = 16384
"""Columns that a block of ``token_stats_backward`` takes."""


class Launch(NamedTuple):
    """One launch: ``cluster`` blocks of so many threads share a row; ``keeps``: in shared memory, else it is read
    twice. ``kernel``: its name among the compiled ones.
    """

    kernel: str
    threads: int
    shared: int = 0
    cluster: int = 1
    keeps: bool = False


def slot_bytes(columns: int, size: int, cluster: int) -> int:
    """Bytes of a row in one block's shared memory."""
    return -(-columns // (LANES * GROUP)) * (LANES // cluster) * GROUP * size


def token_stats(size: int, reference: bool) -> Launch:
    """Statistics with entropy; with ``reference`` the exact KL, too."""
    threads = 512 if reference or size == 4 else 256
    return Launch(f"token_stats<{_name(size)},{5 if reference else 1},{threads}>", threads, RECORDS)


def token_stats_backward(size: int, out: int) -> Launch:
    return Launch(f"token_stats_backward<{_name(size)},{_name(out)},0,256>", 256)


def fused_policy(columns: int, size: int, out: int) -> Launch:
    """With the gradient: the choice of ``choose_cluster``."""
    best, warps = -1, 0
    for cluster in (1, 2, 4, 8):
        if warps >= 20:
            break
        threads = 128 if cluster == 8 else 256
        shared = slot_bytes(columns, size, cluster) + FIXED
        if shared > SHARED_OF_BLOCK:
            continue
        blocks = min(SHARED // (shared + 1024), (512 if size == 4 else 768) // threads)
        found = blocks * threads // 32 // (2 if blocks == 1 else 1)
        if found > warps:
            best, warps = cluster, found
    names = f"{_name(size)},{_name(out)}"
    if best < 0:
        return Launch(f"fused_policy<{names},512,1,0>", 512, FIXED)
    threads = 128 if best == 8 else 256
    shared = slot_bytes(columns, size, best) + FIXED
    return Launch(f"fused_policy<{names},{threads},{best},1>", threads, shared, best, True)


def gae() -> Launch:
    """Fp32: the maps of the warps, then rewards and values of every thread with a gap after eight."""
    return Launch("gae<fp32,256,8>", 256, 2 * 8 * 40 + 8 * 2 * (256 + 32) * 4)


def _name(size: int) -> str:
    return {2: "bf16", 4: "fp32"}[size]
