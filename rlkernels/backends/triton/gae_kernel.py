"""Generalised advantage estimation as one reverse scan per sequence, any length, masks and packed batches included.

Walked from the end, a live token takes the trace ``A`` to ``r_t - V_t + gamma V_next + gamma lam A``; a dead one leaves
it alone ("skip"). Both are maps ``A' = q A + s``, and maps compose: an associative scan inside a block, and a carry
from block to block. ``V_next`` is the value of the token behind, or, where dead tokens are skipped, of the live one
behind: a scan of selections. The composition order is fixed, so the bits depend on nothing but the sequence. Traces are
fp64: with ``gamma = lam = 1`` an fp32 trace over 8192 tokens has lost three digits.
"""

import triton
import triton.language as tl


@triton.jit
def _latest(value_a, live_a, value_b, live_b):
    """The value of ``b`` (nearer the start) where it is live, else that of ``a``."""
    return tl.where(live_b != 0, value_b, value_a), live_a | live_b


@triton.jit
def _then(q_a, s_a, q_b, s_b):
    """The map of ``a`` (nearer the end), then that of ``b``."""
    return q_a * q_b, q_b * s_a + s_b


@triton.jit(do_not_specialize=["length"])
def gae(
    rewards_ptr,
    values_ptr,
    mask_ptr,
    ends_ptr,
    length,
    gamma,
    gamma_low,
    decay,
    decay_low,
    advantages_ptr,
    returns_ptr,
    PACKED: tl.constexpr,
    MASKED: tl.constexpr,
    SKIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One sequence per program.

    ``decay = gamma lam``; ``SKIP``: a dead token is passed over, else it is a step with reward and value 0.
    """
    row = tl.program_id(0).to(tl.int64)
    if PACKED:
        first = tl.load(ends_ptr + row)
        stop = tl.load(ends_ptr + row + 1)
    else:
        first = row * length
        stop = first + length
    latest = tl.zeros((), values_ptr.dtype.element_ty)
    trace = tl.zeros((), tl.float64)
    step_gamma = trace + gamma + gamma_low  # a number argument is fp32: each comes as a sum of two
    step_decay = trace + decay + decay_low
    for done in range(0, stop - first, BLOCK):
        offset = done + tl.arange(0, BLOCK)  # 0 is the last token of the sequence
        t = stop - 1 - offset
        inside = t >= first
        live = inside
        behind = inside & (t + 1 < stop)
        if MASKED:
            live = inside & (tl.load(mask_ptr + t, inside, other=0) != 0)
            behind = behind & (tl.load(mask_ptr + t + 1, behind, other=0) != 0)
        r = tl.load(rewards_ptr + t, live, other=0.0).to(tl.float64)
        v = tl.load(values_ptr + t, live, other=0.0).to(tl.float64)
        value_next = tl.load(values_ptr + t + 1, behind, other=0.0)
        last = offset == done + BLOCK - 1
        step = inside
        if SKIP and MASKED:
            step = live
            value_next, found = tl.associative_scan((value_next, behind.to(tl.int32)), 0, _latest)
            value_next = tl.where(found != 0, value_next, latest)
            latest = tl.sum(tl.where(last, value_next, 0.0), 0)
        q = tl.where(step, step_decay, 1.0)
        s = tl.where(step, r - v + step_gamma * value_next.to(tl.float64), 0.0)
        q, s = tl.associative_scan((q, s), 0, _then)
        advantage = q * trace + s
        tl.store(advantages_ptr + t, tl.where(live, advantage, 0.0).to(advantages_ptr.dtype.element_ty), inside)
        tl.store(returns_ptr + t, tl.where(live, advantage + v, 0.0).to(returns_ptr.dtype.element_ty), inside)
        trace = tl.sum(tl.where(last, advantage, 0.0), 0)
