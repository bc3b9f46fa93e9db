"""Shapes and dtypes of what each op returns, for callers that hold no data.

Every output is contiguous, whatever the layout of the inputs.
"""

import torch

from rlkernels.backends.eager import ENTROPY, IS_TOP1, KL, LOG_SUM_SQ, MEAN_LOGITS, real_dtype


def token_stats_fake(logits, targets, temperature, ignore_index, vocab_mask, ref_logits, wanted, inplace, backend):
    real = real_dtype(logits.dtype)

    def row(present=True, dtype=real):
        return logits.new_empty(targets.shape if present else (0,), dtype=dtype)

    ref = ref_logits is not None
    return (
        row(),
        row(),
        row(),
        row(wanted & ENTROPY),
        row(wanted & LOG_SUM_SQ),
        row(wanted & MEAN_LOGITS),
        row(wanted & IS_TOP1, torch.bool),
        row(ref),
        row(ref),
        row(ref),
        row(wanted & KL),
    )


def gradient_fake(dlogp, dentropy, dkl, logits, *rest):
    return logits.new_empty(logits.shape)


def nothing_fake(*arguments):
    """The fake of an op that writes into an argument."""


def fused_policy_fake(
    objective,
    logits,
    targets,
    temperature,
    ignore_index,
    vocab_mask,
    columns,
    params,
    weight,
    entropy_weight,
    kl,
    ref_logp,
    kl_weight,
    with_grad,
    inplace,
    backend,
):
    real = real_dtype(logits.dtype)
    dlogits = logits.new_empty((targets.shape[0], logits.shape[-1]) if with_grad else (0, 0))
    return logits.new_empty((), dtype=real), dlogits, *(logits.new_empty(targets.shape, dtype=real) for _ in range(5))


def elementwise_fake(objective, first, *rest):
    return first.new_empty(()), first.new_empty(first.shape), first.new_empty(first.shape)


def elementwise_backward_fake(dloss, dvalue, first, *rest):
    return first.new_empty(first.shape)


def weighted_loss_fake(objective, first, minus, *rest):
    return first.new_empty(()), first.new_empty((1 if minus is None else 2, *first.shape))


def weighted_loss_backward_fake(dloss, slopes, *inputs):
    return slopes.new_empty(slopes.shape)


def gae_fake(rewards, *rest):
    return rewards.new_empty(rewards.shape), rewards.new_empty(rewards.shape)


def offsets_fake(cu_seqlens, *rest):
    return cu_seqlens.new_empty(cu_seqlens.shape, dtype=torch.int64)
