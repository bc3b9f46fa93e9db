"""The device that the model speaks of, an H200, and how many blocks of a kernel one of its multiprocessors holds."""

from typing import NamedTuple


class Machine(NamedTuple):
    """What the model assumes. No constant has been measured by this project; ``CALIBRATION`` says which run would."""

    multiprocessors: int = 132
    clock: float = 1.755e9
    reads: float = 4.45e12
    copies: float = 4.3e12
    latency: float = 800e-9
    cache_latency: float = 170e-9
    cache: float = 45e6
    start: int = 1500
    reduction: int = 2200
    cluster: int = 300
    end: int = 700

    @property
    def latency_clocks(self) -> int:
        return round(self.latency * self.clock)

    @property
    def cache_clocks(self) -> int:
        return round(self.cache_latency * self.clock)

    def rate(self, roof: float) -> float:
        """Bytes per clock of one multiprocessor at the roof of the device."""
        return roof / self.multiprocessors / self.clock


SLOW = Machine()
FAST = SLOW._replace(clock=1.98e9, latency=600e-9)
"""The two ends of what the clock under load and the latency under load may be. A prediction is that of the slow one."""

CALIBRATION = {
    "clock": "SM clock under load, Hz: `nvidia-smi --query-gpu=clocks.sm` beside a kernel that runs for seconds",
    "reads": "bytes/s of the fastest read-only reduction: the roofline of `make gpu`",
    "copies": "bytes/s of a copy, read and written: the roofline of `make gpu`",
    "latency": "seconds of a load under load: ncu's memory workload analysis of token_stats",
    "cache_latency": "seconds of a load that hits the level-2 cache",
    "cache": "bytes of the level-2 cache that keep a row: the hit rate that ncu tells of Triton's fused_policy",
    "start": "clocks from a block's launch to its first load",
    "reduction": "clocks from a row's last load to its last store, without the gradient",
    "cluster": "clocks that a barrier of a cluster takes beyond one of a block",
    "end": "clocks from a block's last store to the launch of its successor",
}
"""What a first run on a device would measure to calibrate the model."""

REGISTERS, WARPS, BLOCKS, SHARED, RESERVED = 65536, 64, 32, 228 * 1024, 1024
"""Of a multiprocessor of sm_90. The driver reserves 1 KiB of shared memory per block."""
SHARED_OF_BLOCK = SHARED - RESERVED


def resident_blocks(registers: int, threads: int, shared: int) -> int:
    """Blocks that a multiprocessor holds, by registers per thread, threads and bytes of shared memory of one."""
    warps = threads // 32
    of_warp = -(-registers * 32 // 256) * 256
    return min(BLOCKS, WARPS // warps, REGISTERS // (of_warp * warps), SHARED // (shared + RESERVED))
