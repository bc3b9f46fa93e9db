"""Triton backend: launchers, and the rebinding that turns an objective into a device function.

Imported only where it serves.
"""

import ctypes
import functools
import types
from contextlib import nullcontext
from math import gcd, isinf

import torch
import triton
import triton.language as tl

from rlkernels.backends import gate
from rlkernels.backends.protocol import PolicyRows, RowStats, check_rows, real_dtype
from rlkernels.backends.triton import column_kernels as blocks
from rlkernels.backends.triton import gae_kernel, launch_configs, objective_functions, row_kernels
from rlkernels.backends.triton.row_statistics import PER
from rlkernels.objectives import OBJECTIVES, functions

TWINS = {name: getattr(objective_functions, name) for name in functions.FUNCTIONS}
REAL = {torch.float32: tl.float32, torch.float64: tl.float64}
FUSION = {"enable_fp_fusion": True}  # explicit: the default flips in Triton 3.10, and with it the bits
GRADIENTS = {torch.float32: (torch.float32, torch.bfloat16, torch.float16)}
"""Dtypes in which the gradient of logits of this dtype may be written; of the others, their own."""
SLICES = 2048  # programs that a gradient is divided into where there are fewer rows


@functools.cache
def device_function(function):
    """``function`` with its math names bound to Triton's: the same code object, jitted.

    ``tl`` must be in scope too: the interpreter asserts that it can find it.
    """
    scope = {**function.__globals__, **TWINS, "tl": tl}
    twin = types.FunctionType(function.__code__, scope, function.__name__)
    twin.__module__, twin.__qualname__ = function.__module__, function.__qualname__
    return triton.jit(twin)


@functools.cache
def warp_width(device):
    """Threads of a warp: 64 on AMD's data-centre chips, where 32 warps would be more threads than a
    program may have.
    """
    return 32 if device.type == "cpu" else triton.runtime.driver.active.get_current_target().warp_size


def device_of(x):
    """Context in which launches go to the device of ``x``; a CPU tensor arrives only in Triton's interpreter."""
    return nullcontext() if x.device.type == "cpu" else getattr(torch, x.device.type).device_of(x)


def options(device, threads):
    return {"num_warps": max(1, threads // warp_width(device)), **FUSION}


def split(x):
    """A number as the sum of two fp32 numbers: what a kernel can be given of an fp64 number."""
    high = ctypes.c_float(x).value
    return high, 0.0 if isinf(high) else x - high  # because inf - inf is NaN


def inverse(temperature):
    """``1 / T`` as a kernel forms it from an fp32 entry of a temperature tensor: the same bits."""
    return ctypes.c_float(1.0 / ctypes.c_float(temperature).value).value


class _Launch:
    """Arguments of every kernel over rows: addresses and strides of logits, targets, temperature and mask."""

    def __init__(self, op, rows):
        logits, targets, temperature, ignore_index, vocab_mask, self.ref = gate.rows(
            op, rows, real_dtype(rows.logits.dtype)
        )
        if self.ref is not None and self.ref.dtype != logits.dtype:
            raise TypeError(f"{op}: ref_logits has dtype {self.ref.dtype}, logits {logits.dtype}; cast one of them")
        self.op, self.logits, self.shape = op, logits, (targets.shape[0], logits.shape[-1])
        check_rows(targets, logits.shape[-1], ignore_index, temperature)
        self.tokens, self.vocab, self.real = targets.shape[0], logits.shape[-1], real_dtype(logits.dtype)
        if self.real == torch.float64 and not isinstance(temperature, torch.Tensor):
            # A kernel's number argument is fp32.
            temperature = logits.new_full((self.tokens,), temperature, dtype=torch.float64)
        per_row = isinstance(temperature, torch.Tensor)
        self.level = max(logits.shape[1], 1) if logits.dim() == 3 else 1
        self.labels = (targets, targets.stride(0), ignore_index)
        mask_stride = 0 if vocab_mask is None or vocab_mask.dim() == 1 else vocab_mask.stride(0)
        keep = targets if vocab_mask is None else vocab_mask.view(torch.int8)
        self.softmax = (
            1.0 if per_row else inverse(temperature),
            temperature if per_row else targets,
            keep,
            mask_stride,
            self.vocab,
        )
        self.config = launch_configs.row_config(op, logits.element_size(), self.vocab, vocab_mask is not None)
        self.flags = {
            "PER_ROW": per_row,
            "MASKED": vocab_mask is not None,
            "REAL": REAL[self.real],
            "LANES": self.config.lanes,
            **options(logits.device, self.config.threads),
        }

    def per_row(self, names, tensors):
        return gate.per_row(self.op, names, tensors, self.real, self.tokens, self.logits.device)

    def gradient(self, out, dtypes):
        """The place of the gradient of the logits: ``out``, unless there is none or its layout is not one that kernels
        write.
        """
        found = None if out is None else gate.writable(self.op, out, dtypes, self.shape, self.logits.device)
        return self.logits.new_empty(self.shape, dtype=None if out is None else out.dtype) if found is None else found

    def places(self, *tensors):
        """``(outer, inner)`` of each tensor's rows and their common unit: row r is at ``(r // level) outer + (r %
        level) inner``, level 1 for [T, V].
        """
        pairs = []
        for x in tensors:
            flat = x.dim() == 2  # a fresh gradient is [T, V] where the logits are [B, L, V]
            pairs.append((x.stride(0) * self.level, x.stride(0)) if flat else (x.stride(0), x.stride(1)))
        align = gcd(16, *(stride for pair in pairs for stride in pair))
        return [(outer // align, inner // align) for outer, inner in pairs], align


def _per_row(tokens, like, real):
    return torch.empty(tokens, dtype=real, device=like.device)


def token_stats(rows, wanted):
    reference = rows.ref_logits is not None
    at = _Launch("token_stats_ref" if reference else "token_stats", rows)
    logits, ref = at.logits, at.ref if reference else at.logits
    stats = RowStats.empty(_per_row(0, logits, at.real), at.tokens, wanted, reference)
    if at.tokens:
        (place, ref_place), align = at.places(logits, ref)
        with device_of(logits):
            row_kernels.token_stats[(at.tokens,)](
                logits,
                *place,
                at.level,
                ref,
                *ref_place,
                *at.labels,
                *at.softmax,
                *(x.view(torch.int8) if x.dtype == torch.bool else x for x in stats),
                WANTED=wanted,
                REF=reference,
                ALIGN=align,
                AHEAD=at.config.ahead,
                **at.flags,
            )
    return stats


def token_stats_backward(upstream, rows, saved, out=None, unless=None):
    at = _Launch("token_stats_backward" if upstream.dkl is None else "token_stats_backward_ref", rows)
    per_row = at.per_row(gate.BACKWARD, gate.of_backward(at.op, upstream, at.ref, saved))
    dlogp, dentropy, dkl, row_max, sum_exp, entropy, ref_row_max, ref_sum_exp, kl = per_row
    logits, gradient = at.logits, at.gradient(out, GRADIENTS.get(at.logits.dtype, (at.logits.dtype,)))
    unless = None if unless is None else gate.taken(at.op, "unless", unless, at.real, (), logits.device)
    if unless is not None and gradient is not out:
        gradient.copy_(out.view(gradient.shape))  # what stays as it is must be there
    if at.tokens:
        tiles = triton.cdiv(at.vocab, at.config.lanes * PER.value)
        slice_tiles = triton.cdiv(tiles, min(tiles, max(1, SLICES // at.tokens), 65535))
        ref = logits if at.ref is None else at.ref
        (place, ref_place), align = at.places(logits, ref)
        (out_place,), out_align = at.places(gradient)
        some = [row_max if x is None else x for x in (dlogp, dentropy, dkl, entropy, ref_row_max, ref_sum_exp, kl)]
        with device_of(logits):
            row_kernels.token_stats_backward[(at.tokens, triton.cdiv(tiles, slice_tiles))](
                *some[:3],
                logits,
                *place,
                at.level,
                ref,
                *ref_place,
                *at.labels,
                *at.softmax,
                row_max,
                sum_exp,
                *some[3:],
                gradient,
                *out_place,
                slice_tiles,
                row_max if unless is None else unless,
                int(unless is not None),  # not a compile-time flag: no second variant of the kernel
                LOGP_TERM=dlogp is not None,
                ENTROPY_TERM=dentropy is not None,
                KL_TERM=dkl is not None,
                ALIGN=align,
                OUT_ALIGN=out_align,
                **at.flags,
            )
    return gate.stored(gradient, out)


def fused_policy(rows, policy, with_grad, out):
    at = _Launch("fused_policy", rows)
    loss, logp, row_max, sum_exp, entropy, dlogp = (_per_row(at.tokens, at.logits, at.real) for _ in range(6))
    weight, entropy_weight, ref_logp, kl_weight, *columns = at.per_row(gate.POLICY, gate.of_policy(at.op, policy))
    logits, kl = at.logits, policy.kl
    gradient = logits.new_empty((0, 0))
    if with_grad:
        gradient = at.gradient(out, GRADIENTS.get(logits.dtype, (logits.dtype,)))
    if at.tokens:
        (place,), align = at.places(logits)
        (out_place,), out_align = at.places(gradient if with_grad else logits)
        with device_of(logits):
            row_kernels.fused_policy[(at.tokens,)](
                device_function(OBJECTIVES[policy.objective].function),
                device_function(OBJECTIVES[kl or "k1"].function),
                logits,
                *place,
                at.level,
                *at.labels,
                *at.softmax,
                tuple(columns),
                *_numbers(policy.params, at.real),
                weight,
                *(weight if x is None else x for x in (entropy_weight, ref_logp, kl_weight)),
                loss,
                logp,
                row_max,
                sum_exp,
                entropy,
                dlogp,
                gradient if with_grad else logits,
                *out_place,
                WITH_GRAD=with_grad,
                ENTROPY_TERM=entropy_weight is not None,
                KL_TERM=kl is not None,
                ALIGN=align,
                OUT_ALIGN=out_align,
                # Narrow loads are many without looking ahead.
                AHEAD=at.config.ahead if align >= PER.value else 1,
                **at.flags,
            )
    total = loss.sum(dtype=torch.float64).to(at.real)
    return PolicyRows(total, gate.stored(gradient, out if with_grad else None), logp, row_max, sum_exp, entropy, dlogp)


def _numbers(params, real):
    """``(params, params_low)``: fp32 kernels take them as they are."""
    if real == torch.float32:
        return tuple(params), ()
    pairs = [split(p) for p in params]
    return tuple(high for high, _ in pairs), tuple(low for _, low in pairs)


def elementwise(objective, columns, params, weight):
    weight, *columns = gate.weighted_columns("elementwise", weight, columns)
    first = columns[0]
    value, derivative = torch.empty_like(first), torch.empty_like(first)
    loss = _summed(
        blocks.elementwise,
        first,
        lambda partial: (
            device_function(OBJECTIVES[objective].function),
            tuple(columns),
            *_numbers(params, first.dtype),
            first if weight is None else weight,
            value,
            derivative,
            partial,
            first.numel(),
        ),
        WEIGHTED=weight is not None,
    )
    return loss, value, derivative


def weighted_loss(objective, first, minus, others, params, weight, total, share):
    first, *rest = gate.columns("weighted_loss", first, [*minus, *others])
    minus, others = rest[: len(minus)], rest[len(minus) :]
    weight, total = gate.weights("weighted_loss", weight, total, first)
    slopes, masked = (
        first.new_empty((2 if minus else 1, *first.shape)),
        weight is not None and weight.dtype == torch.bool,
    )
    weights = first if weight is None else weight.view(torch.int8) if masked else weight
    loss = _summed(
        blocks.weighted_loss,
        first,
        lambda partial: (
            device_function(OBJECTIVES[objective].function),
            first,
            tuple(minus),
            tuple(others),
            *_numbers(params, first.dtype),
            weights,
            first if total is None else total,
            *_numbers([share], first.dtype),
            slopes[0],
            slopes[-1],
            partial,
            first.numel(),
        ),
        WEIGHTED=weight is not None,
        MASKED=masked,
        COUNTED=total is not None,
    )
    return loss, slopes


def _summed(kernel, first, arguments, **flags):
    """Launches a kernel over columns like ``first``, and a second one where it leaves several partial sums; returns the
    sum.
    """
    n = first.numel()
    count = triton.cdiv(n, launch_configs.BLOCK)
    loss = first.new_empty(()) if n else first.new_zeros(())
    # One block: its partial, rounded once, is the loss.
    partial = loss if count == 1 else first.new_empty(count, dtype=torch.float64)
    if n:
        launch = {"BLOCK": launch_configs.BLOCK, **options(first.device, launch_configs.THREADS)}
        with device_of(first):
            kernel[(count,)](*arguments(partial), **flags, **launch)
            if count > 1:
                blocks.sum_partials[(1,)](partial, loss, count, **launch)
    return loss


def gae(rewards, values, mask, cu_seqlens, gamma, lam, masked):
    rewards, values, mask, cu_seqlens = gate.scan("gae", rewards, values, mask, cu_seqlens)
    if cu_seqlens is not None:
        cu_seqlens = gate.offsets("gae", cu_seqlens, rewards.shape[0])
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    sequences, length = (cu_seqlens.shape[0] - 1, 0) if cu_seqlens is not None else rewards.shape
    use_mask = mask is not None and masked != "none"
    if sequences and rewards.numel():
        with device_of(rewards):
            gae_kernel.gae[(sequences,)](
                rewards,
                values,
                mask.view(torch.int8) if use_mask else rewards,
                rewards if cu_seqlens is None else cu_seqlens,
                length,
                *split(gamma),
                *split(gamma * lam),
                advantages,
                returns,
                PACKED=cu_seqlens is not None,
                MASKED=use_mask,
                SKIP=masked == "skip",
                BLOCK=launch_configs.SCAN,
                **options(rewards.device, launch_configs.THREADS),
            )
    return advantages, returns
