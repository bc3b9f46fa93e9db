"""The arguments of the two compiled backends as they cross to native code."""

import torch

from rlkernels.backends import gate

NOWHERE = (0, 0, 0, 1)
"""The place of rows that are not there: address, two strides, the rows that one step of the outer stride spans."""
MASKED = {"skip": 0, "zero": 1, "none": 2}
"""Numbers of the ways in which ``gae`` treats masked tokens."""


def rows(backend, caller, batch, dtypes, real):
    """The ``RowBatch`` behind the gate.

    Raises:
        NotImplementedError: a dtype that the backend's kernels are not compiled for.
    """
    dtype, reference = batch.logits.dtype, batch.ref_logits
    if dtype not in dtypes:
        raise NotImplementedError(
            f'logits of dtype {dtype} are not supported by backend {backend!r}; cast to float32 or use_backend("eager")'
        )
    if reference is not None and reference.dtype != dtype:
        raise NotImplementedError(
            f"ref_logits of dtype {reference.dtype} beside logits of dtype {dtype} are not supported by backend "
            f"{backend!r}; cast one of them"
        )
    return gate.rows(caller, batch, real)


def per_row(module, caller, names, tensors, targets, real, device):
    """Tensors of one number per row, and their addresses; the caller holds on to them, because one may be a copy."""
    at = module.addresses(real, targets, *tensors)
    if at is None:
        tensors = gate.per_row(caller, names, tensors, real, targets.shape[0], device)
        at = gate.addresses(tensors)
    return tensors, at


def numbers(batch, dtypes, inverse=False):
    """A batch of rows that passed the gate as the numbers that both modules take; ``inverse``: ``1 / T`` for a number
    ``T``.
    """
    logits, targets, temperature, ignore_index, vocab_mask, ref_logits = batch
    each = isinstance(temperature, torch.Tensor)
    return (
        dtypes[logits.dtype],
        targets.shape[0],
        logits.shape[-1],
        gate.place(logits),
        NOWHERE if ref_logits is None else gate.place(ref_logits),
        gate.address(targets),
        targets.stride()[0],
        targets.itemsize,
        ignore_index,
        1.0 if each else 1.0 / temperature if inverse else temperature,
        gate.address(temperature) if each else 0,
        gate.address(vocab_mask),
        0 if vocab_mask is None or vocab_mask.dim() == 1 else vocab_mask.stride()[0],
    )


def gae(kernel, rewards, values, mask, cu_seqlens, gamma, lam, masked, *behind):
    """Advantages and returns by a kernel; ``behind``: what it takes behind the addresses."""
    rewards, values, mask, cu_seqlens = gate.scan("gae", rewards, values, mask, cu_seqlens)
    if cu_seqlens is not None:
        cu_seqlens = gate.offsets("gae", cu_seqlens, rewards.shape[0])
    sequences, length = rewards.shape if cu_seqlens is None else (cu_seqlens.numel() - 1, rewards.shape[0])
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    kernel(
        gate.address(rewards),
        gate.address(values),
        gate.address(mask),
        gate.address(cu_seqlens),
        sequences,
        length,
        gamma,
        lam,
        MASKED[masked],
        gate.address(advantages),
        gate.address(returns),
        *behind,
    )
    return advantages, returns
