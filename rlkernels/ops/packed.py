"""Ops over sequences of tokens, padded or packed: the scan of advantages, and the check of offsets at run time."""

import torch

from rlkernels.checks.tokens import read_offsets
from rlkernels.ops import register
from rlkernels.tracing import value


def _gae(rewards, values, mask, cu_seqlens, gamma, lam, masked, backend):
    return register.run("gae", backend, rewards, values, mask, cu_seqlens, value(gamma), value(lam), masked)


def gae_fake(rewards, *rest):
    return rewards.new_empty(rewards.shape), rewards.new_empty(rewards.shape)


gae = register.define(
    "gae",
    "(Tensor rewards, Tensor values, Tensor? mask, Tensor? cu_seqlens, Tensor gamma, Tensor lam, str masked, "
    "str backend) -> (Tensor, Tensor)",
    _gae,
    gae_fake,
)


def offsets_fake(cu_seqlens, *rest):
    return cu_seqlens.new_empty(cu_seqlens.shape, dtype=torch.int64)


# The check of offsets in a compiled program, because their values are there at run time alone.
# ``checks.tokens.segments`` calls it.
offsets = register.define(
    "offsets",
    "(Tensor cu_seqlens, SymInt tokens, bool filled, str where, Tensor? mask=None) -> Tensor",
    read_offsets,
    offsets_fake,
)
