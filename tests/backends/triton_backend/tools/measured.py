"""Compiles a case for a target and reads what the compilers made of it: one ``triton_aot.Row`` per kernel."""

from __future__ import annotations

import re

import triton
import triton_aot
from launches import compiled, recording, target_of

from rlkernels.backends.triton import launch as backend


def record(call, target):
    """The launches of a call, as on ``target``."""
    backend.warp_width, width = lambda device: target_of(target).warp_size, backend.warp_width
    try:
        with recording(target) as launches:
            call()
    finally:
        backend.warp_width = width
    return launches


def measure(call, target):
    """``{kernel: Row}``; ``load_bits`` is the width that the typical bit arrives with."""
    found = {}
    for launch in record(call, target):
        kernel = compiled(launch)
        row = triton_aot.Row(launch.kernel, target, shared=kernel.metadata.shared)
        if target.startswith("sm_"):
            triton_aot._read_nvidia(row, kernel, kernel.metadata.num_warps)
            loads, stores = (triton_aot._ptx_bits(kernel.asm["ptx"], kind) for kind in ("ld", "st"))
        else:
            triton_aot._read_amd(row, kernel)
            loads, stores = (triton_aot._amd_bits(kernel.asm["amdgcn"], kind) for kind in ("load", "store"))
        row.load_bits, row.store_bits = typical(loads), typical(stores)
        found[launch.kernel] = row
    return found


def typical(widths):
    """Half of all bits travel in accesses at least this wide.

    The commonest access is no measure: a row kernel has ten scalar arguments to load.
    """
    total = 0
    for width in sorted(widths, reverse=True):
        total += width
        if 2 * total >= sum(widths):
            return width
    return 0


def threads(launch):
    return launch.options.num_warps * launch.target.warp_size


def minor_version():
    return ".".join(re.findall(r"\d+", triton.__version__)[:2])
