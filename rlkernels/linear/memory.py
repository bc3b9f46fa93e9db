"""The memory of a head's large tensors: the logits of a chunk, and the gradient of the weight."""

import torch

from rlkernels.backends import cpu_memory


def empty(shape, dtype, device, backend):
    """Returns an uninitialised tensor.

    On a CPU a large one takes over the memory of one that was freed before, because fresh pages cost as much as the
    work. Backend ``"eager"`` calls no native code, so it asks torch.
    """
    if device.type == "cpu" and backend != "eager":
        return cpu_memory.empty(shape, dtype)
    return torch.empty(shape, dtype=dtype, device=device)
