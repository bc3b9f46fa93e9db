"""Names and sizes of what the first quarter of an hour measures, and of a rehearsal. Needs no torch."""

SHAPE, HIDDEN = (8192, 151936), 4096
REHEARSAL = "rehearsal: no GPU, the CPU stands in"
REHEARSED_SHAPE, REHEARSED_HIDDEN = (32, 131), 16
BACKENDS, REHEARSED_BACKENDS = ("triton", "cuda"), ("auto",)

READ_TWICE = -1
BLOCKS = (READ_TWICE, 2, 4, 8)
"""Ways of the CUDA policy kernel through a row: one block has not the shared memory for one of that length."""
CHUNKS = (1024, 1168, 2048)
"""Rows of a chunk of the fused head."""
FUSED, BACKWARD = "fused_policy by blocks per row", "token_stats_backward"
"""Names of cases, beside those of the benchmark."""
COUNTED_KERNELS = "token_stats|fused_policy"
"""The kernels that a profiler counts, as a regular expression over their functions' names."""
BUDGET_LABEL = "rlkernels auto, 1 GiB of logits"


def blocks_label(backend, count):
    return f"rlkernels {backend}, " + ("row read twice" if count == READ_TWICE else f"{count} blocks")


def chunk_label(rows):
    return f"rlkernels auto, chunks of {rows}"
