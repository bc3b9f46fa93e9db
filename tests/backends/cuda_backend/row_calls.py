"""Calls of the backend as the row tests make them, and what they compare."""

import reference
from flat_backend import Flat

NAMES = (
    "logprobs",
    "shift",
    "sum_exp",
    "entropy",
    "log_sum_sq_probs",
    "mean_logits",
    "is_top1",
    "ref_logprobs",
    "ref_shift",
    "ref_sum_exp",
    "kl",
)


def run(backend, x, targets, *, temperature=1.0, mask=None, ref=None, wanted=31, ignore_index=-100):
    return Flat(backend).token_stats(x, targets, temperature, ignore_index, mask, ref, wanted)


def gradient(backend, upstream, x, targets, stats, *, temperature=1.0, mask=None, ref=None, out=None):
    _, shift, sum_exp, entropy, _, _, _, _, ref_shift, ref_sum, kl = stats
    return Flat(backend).token_stats_backward(
        *upstream, x, targets, temperature, -100, mask, ref, shift, sum_exp, entropy, ref_shift, ref_sum, kl, out
    )


def same(first, second):
    """Equal in every bit, output by output."""
    return all(reference.same_bits(a, b) for a, b in zip(first, second, strict=True))
