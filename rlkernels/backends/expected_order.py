"""The order of GPU backends that a model expects where nothing was measured: it is not a measurement.

CUDA C++ goes first for two kinds of work, on devices of compute capability 9.0 and newer where its module is present:
``fused_policy``, because its blocks keep a row on the chip and the Triton kernel reads it twice, and the statistics of
two models, because the model gives them more of the memory's bandwidth. ``benchmarks/gpu_model`` is that model. What
``measured_order.TABLE`` says comes before it.
"""

import torch

from rlkernels.backends import cuda

CAPABILITY = (9, 0)
"""The oldest that has clusters of blocks. Without them the kernel reads long rows twice, as Triton's does."""
WORK = ("fused_policy", "token_stats of two models")

_capable: dict[int | None, bool] = {}


def capable(index: int | None) -> bool:
    """Tells whether CUDA device ``index`` (None: the current one) is of a capability for which the model speaks."""
    found = _capable.get(index)
    if found is None:
        # A version of ROCm has numbers of its own there.
        found = torch.version.hip is None and torch.cuda.get_device_capability(index) >= CAPABILITY
        if index is not None:  # the current device may be another one in the next call
            _capable[index] = found
    return found


# Dynamo would put torch's question into the graph. The mark of torch.compiler.assume_constant_result, which imports all
# of Dynamo.
capable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def expected(
    op: str,
    dtype: torch.dtype | None,
    choices: tuple[str, ...],
    index: int | None = None,
    models: int = 1,
    objective: str | None = None,
) -> tuple[str, ...]:
    """``choices`` with CUDA C++ first where the model expects that.

    ``models``: of ``token_stats``, the models whose logits are read. ``objective``: of ``fused_policy``. One that is
    not compiled into the row kernels takes two passes there, and one in Triton.
    """
    if cuda._cuda is None or "cuda" not in choices or dtype not in cuda.DTYPES:
        return choices
    if not (op == "fused_policy" or (op == "token_stats" and models == 2)):
        return choices
    if objective is not None and not cuda.in_row_kernels(objective):
        return choices
    return ("cuda", *(name for name in choices if name != "cuda")) if capable(index) else choices
