"""The kernel of TRL's Hub repository ``trl-lib/trl-losses`` under its name and signature, for the package ``kernels``.

``FOLDER`` is a kernel repository as that package reads it from a disk, so no download is needed. It holds no
arithmetic, because it imports this module. Three ways to it, of which the second is an environment variable::

    register_kernel_mapping(hub.kernel_mapping())        # modules that kernelize finds
    LOCAL_KERNELS=trl-lib/trl-losses=FOLDER              # get_kernel("trl-lib/trl-losses", version=0)
    get_local_kernel(hub.FOLDER)                         # the functions themselves
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from rlkernels import checks
from rlkernels.integrations.trl import functions
from rlkernels.types import Logits, Mask, Targets

__all__ = ["FOLDER", "kernel_mapping", "selective_log_softmax_and_entropy"]

FOLDER = Path(__file__).parent / "kernel"
NAME = "selective_log_softmax_and_entropy"
DEVICES = ("cpu", "cuda", "rocm", "xpu")
"""The devices of ``kernels`` that our backends serve."""


def selective_log_softmax_and_entropy(
    logits: Logits, index: Targets, temperature: float = 1.0, row_mask: Mask | None = None
) -> tuple[Tensor, Tensor]:
    r"""Computes the log-probability of each index and the entropy of its row, in one pass over the row.

    ``log pi(y) = z_y - log sum_v exp(z_v)``,  ``H = -sum_v p_v log p_v``,  ``z = logits / temperature``.

    Args:
        logits: ``[..., V]``, any float dtype and any device; the kernel of TRL takes three dimensions at most.
        index: ``[...]`` token ids.
        temperature: ``T``.
        row_mask: ``[...]``; a row where it is 0 is not read and gives 0 twice, whatever its index.

    Returns:
        ``(logprobs, entropy)``, ``[...]`` each, fp32 (fp64 for fp64 logits), both differentiable.

    Raises:
        TypeError, ValueError: dtypes or shapes do not fit; a temperature that is not positive.
        IndexError: on the CPU, an index outside of the vocabulary in a row that is not masked.

    Example:
        >>> selective_log_softmax_and_entropy(torch.zeros(2, 4), torch.tensor([3, 0]), row_mask=torch.tensor([1, 0]))
        (tensor([-1.3863,  0.0000]), tensor([1.3863, 0.0000]))

    TRL's repository, ``kernels/torch-ext/trl_losses``; TRL 1.16 calls the same function with one argument more.
    """
    checks.tensor(NAME, "index", index)
    checks.mask(NAME, row_mask, index.shape, "row_mask")
    checks.one_device(NAME, "index", index, row_mask=row_mask)
    return functions.selective_log_softmax_and_entropy(logits, index, True, temperature, row_mask)


# Read by ``FuncRepository``, which makes a module of the function.
vars(selective_log_softmax_and_entropy).update(can_torch_compile=True, has_backward=True)


def kernel_mapping(devices: Sequence[str] = DEVICES) -> dict[str, dict[str, Any]]:
    """Returns the mapping that ``kernels.register_kernel_mapping`` takes: our layer for each of the devices.

    A function or module of the caller is found by the name ``selective_log_softmax_and_entropy``, as ``kernels`` says:
    ``use_kernel_forward_from_hub(name)``, and ``use_kernelized_func`` on the module that calls it.

    Args:
        devices: names of devices as ``kernels`` has them, among ``cpu``, ``cuda``, ``rocm`` and ``xpu``.

    Raises:
        ImportError: the package ``kernels`` is not installed.
        ValueError: a device that no backend of ours serves.

    Example:
        >>> from kernels import register_kernel_mapping  # doctest: +SKIP
        >>> register_kernel_mapping(kernel_mapping())  # doctest: +SKIP
    """
    unknown = [device for device in devices if device not in DEVICES]
    if unknown:
        raise ValueError(f"kernel_mapping: devices must be among {', '.join(DEVICES)}, got {', '.join(unknown)}")
    try:
        kernels = importlib.import_module("kernels")
    except ImportError as error:
        needs = f'kernel_mapping needs the package kernels ({error}); pip install "kernels>=0.17"'
        raise ImportError(needs) from error
    repository = kernels.LocalLayerRepository(FOLDER, layer_name=NAME)
    return {NAME: dict.fromkeys(devices, repository)}
