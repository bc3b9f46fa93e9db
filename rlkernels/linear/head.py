"""The lm_head as all ``linear_*`` functions see it: its checked arguments, the logits of a chunk, and the way back."""

import contextlib
from typing import NamedTuple

import torch

from rlkernels import checks, ops
from rlkernels.backends import cpu_memory, gate
from rlkernels.backends.protocol import RowBatch, SavedRows, Upstream, check_rows, real_dtype
from rlkernels.checks import tokens as checks_tokens
from rlkernels.linear import vocab_parallel
from rlkernels.linear.chunking import budget_bytes, rows_within
from rlkernels.linear.matmul import products
from rlkernels.linear.rank_agreement import pattern, sketch
from rlkernels.logits_layout import or_one
from rlkernels.tracing import replaced

AUTOCAST = {
    kind: torch.amp.is_autocast_available(kind) for kind in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "maia", "xla")
}
"""Asked once: torch 2.11 cannot trace the question."""
ALIGNED = 16  # columns: 16-byte loads in every row, whatever the vocabulary


class Head(NamedTuple):
    """Hidden states ``[T, H]``, a head, and what belongs to each row; checked.

    ``where``: the function that was called.
    """

    where: str
    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    targets: torch.Tensor
    temperature: torch.Tensor
    softcap: float | None
    logit_scale: float
    ignore_index: int
    logits_dtype: torch.dtype
    chunk: int
    bound: int | None
    shard: vocab_parallel.Shard | None
    shape: torch.Size
    real: torch.dtype  # of per-row results. A field: torch 2.8 traces no property of a named tuple

    def flat(self, x):
        """A per-row tensor as a contiguous ``[T]`` of the arithmetic's dtype; None stays None."""
        # A copy: a second backward makes the gradients anew, from what the caller may have written over since.
        return None if x is None else x.detach().to(self.real, copy=True).reshape(-1).contiguous()

    def in_common(self):
        return in_common(
            self.hidden,
            self.bias,
            self.targets,
            self.temperature,
            self.softcap,
            self.logit_scale,
            self.ignore_index,
            self.logits_dtype,
            self.chunk,
            self.bound,
        )

    def temperature_without(self, dead, given):
        """The temperature as it was ``given``, if it is one number; else one per row, 1 where ``dead``, whose shape is
        that of the rows.
        """
        return or_one(dead, self.temperature.view(dead.shape)) if self.temperature.dim() else given

    def detached(self):
        return replaced(
            self,
            hidden=self.hidden.detach(),
            weight=self.weight.detach(),
            bias=None if self.bias is None else self.bias.detach(),
        )


def head(
    where,
    hidden,
    weight,
    targets,
    *,
    bias=None,
    temperature=1.0,
    softcap=None,
    logit_scale=1.0,
    ignore_index=-100,
    logits_dtype=torch.float32,
    chunk_tokens=None,
    logits_budget=None,
    max_live_tokens=None,
    valid_vocab=None,
    process_group=None,
    vocab_start=None,
):
    """Checks the arguments that every ``linear_*`` function takes and lays them out."""
    hidden, weight, bias = _operands(where, hidden, weight, bias)
    shape = hidden.shape[:-1]
    checks.targets(where, targets, shape)
    checks.readable(where, "targets", targets)
    temperature = checks.temperature(where, temperature, shape)
    ignore_index = checks.integer(where, "ignore_index", ignore_index)
    targets = checks_tokens.holding(where, targets, ignore_index)
    logit_scale = checks.finite(where, "logit_scale", logit_scale)
    if logit_scale != 0:
        checks.within_reach(where, "logit_scale", abs(logit_scale), "0")
    if softcap is not None:
        softcap = checks.positive(where, "softcap", softcap)
        checks.within_reach(where, "softcap", softcap, "None")
    if logits_dtype not in checks.FLOATS:
        raise TypeError(f"{where}: logits_dtype must be floating, one of {checks.FLOAT_NAMES}; got {logits_dtype}")
    chunk_tokens, logits_budget, max_live_tokens, valid_vocab = (
        checks.positive_integer(where, name, x)
        for name, x in (
            ("chunk_tokens", chunk_tokens),
            ("logits_budget", logits_budget),
            ("max_live_tokens", max_live_tokens),
            ("valid_vocab", valid_vocab),
        )
    )
    checks.one_device(where, "hidden", hidden, weight=weight, targets=targets, bias=bias, temperature=temperature)
    checks.no_forward_ad(where, hidden, weight, bias)
    if hidden.dtype == torch.float64 and logits_dtype == torch.float32:  # the default: the accumulator as it is
        logits_dtype = torch.float64
    if (hidden.dtype == torch.float64) != (logits_dtype == torch.float64):
        raise TypeError(
            f"{where}: logits_dtype is {logits_dtype}, hidden has dtype {hidden.dtype}; float64 logits are "
            "those of float64 hidden states, "
            "whose logits are not rounded"
        )
    shard = vocab_parallel.shard(where, weight, process_group, vocab_start, valid_vocab)
    if shard is None and valid_vocab is not None and valid_vocab > weight.shape[0]:
        raise ValueError(f"{where}: valid_vocab is {valid_vocab}, weight has {weight.shape[0]} rows")
    # A chunk is a collective: ranks with unlike shares of the columns must come to the same number of rows, or they
    # wait for ever.
    width = weight.shape[0] if vocab_start is None else shard.vocab
    # Rows of padding behind the vocabulary take no part: they are cut off before any product.
    columns = valid_vocab if shard is None else shard.columns
    if columns is not None and columns < weight.shape[0]:
        weight, bias = weight[:columns], None if bias is None else bias[:columns]
    per_row = isinstance(temperature, torch.Tensor)
    temperature = (
        temperature.reshape(-1).to(real_dtype(hidden.dtype)).contiguous() if per_row else ops.number(temperature)
    )
    bytes_per_row = (width + ALIGNED) * _bytes_per_logit(weight, logits_dtype, softcap)
    chunk = chunk_tokens or rows_within(budget_bytes(logits_budget, hidden.device.type), bytes_per_row)
    return Head(
        where,
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        targets.reshape(-1),
        temperature,
        softcap,
        logit_scale,
        ignore_index,
        logits_dtype,
        chunk,
        max_live_tokens,
        shard,
        shape,
        real_dtype(hidden.dtype),
    )


def _operands(where, hidden, weight, bias):
    checks.floating(where, "hidden", hidden)
    if type(weight).__name__ == "DTensor":
        raise TypeError(
            f"{where}: weight is a DTensor; pass weight.full_tensor(), or its local rows with process_group"
        )
    checks.floating(where, "weight", weight)
    if weight.numel() == 0:
        raise ValueError(f"{where}: weight has 0 elements; gather it first (ZeRO-3: deepspeed.zero.GatheredParameters)")
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"{where}: hidden has {hidden.shape[-1] if hidden.dim() else 'no'} features, weight has "
            f"{weight.shape[-1] if weight.dim() else 'no'}; "
            f"expected [..., H] and [V, H], got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if bias is not None:
        checks.floating(where, "bias", bias)
        checks.shape(where, "bias", bias, weight.shape[:1])
    if not (where.startswith("linear_token_") or torch.compiler.is_compiling()):
        # The losses hand their chunks to kernels without the dispatcher, which would unwrap a subclass of Tensor.
        hidden, weight, bias = (
            x if x is None else gate.own(where, name, x)
            for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias))
        )
    kind = hidden.device.type
    if _has_autocast(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.dtype != hidden.dtype:
            raise TypeError(
                f"{where}: {name} has dtype {x.dtype}, hidden has {hidden.dtype}; cast one of them, or use autocast"
            )
    return hidden, weight, bias


def _has_autocast(kind):
    return AUTOCAST[kind] if kind in AUTOCAST else torch.amp.is_autocast_available(kind)


def without_autocast(kind):
    """On devices of this kind.

    It would take the products of fp32 back to 16 bits; ``head`` has cast what the caller wants cast.
    """
    return torch.autocast(kind, enabled=False) if _has_autocast(kind) else contextlib.nullcontext()


def _bytes_per_logit(weight, logits_dtype, softcap):
    # Which product a CPU takes is not for a graph to ask.
    beside = 0 if weight.device.type == "cpu" else products(weight, logits_dtype).extra_bytes
    return logits_dtype.itemsize * (1 if softcap is None else 2) + beside


def fresh(shape, dtype, device):
    """An uninitialised tensor; on a CPU the memory of a large one is that of the last call's."""
    return cpu_memory.empty(shape, dtype) if device.type == "cpu" else torch.empty(shape, dtype=dtype, device=device)


class Chunk:
    """``hidden -> logits`` of some rows, in one buffer that all chunks of a call share, and back."""

    def __init__(self, weight, bias, softcap, logit_scale, logits_dtype, shard, rows, bias_gradient):
        self.products, self.columns, self.shard = products(weight, logits_dtype), weight.shape[0], shard
        self.bias, self.softcap, self.scale = None if bias is None else bias.to(logits_dtype), softcap, logit_scale
        self.width = self.columns + (shard is not None)  # a shard has one column more, for targets that are elsewhere
        stride = -(-self.width // ALIGNED) * ALIGNED
        self.buffers = [fresh((rows, stride), logits_dtype, weight.device) for _ in range(1 if softcap is None else 2)]
        # Kernels write what the products take at once, where nothing else wants it unrounded: 14 bytes of memory
        # traffic per logit instead of 22.
        plain = softcap is None and logit_scale == 1.0 and not (bias is not None and bias_gradient)
        self.rounded = self.products.gradient_dtype if plain and logits_dtype == torch.float32 else None

    def logits(self, hidden):
        x = self.buffers[0][: hidden.shape[0], : self.width]
        body = x[:, : self.columns]
        self.products.logits(hidden, body)
        if self.bias is not None:
            body.add_(self.bias)
        if self.scale != 1.0:
            body.mul_(self.scale)
        if self.softcap is not None:
            body.div_(self.softcap).tanh_().mul_(self.softcap)
        if self.shard is not None:
            x[:, self.columns] = vocab_parallel.absent(x.dtype)
        return x

    def statistics(self, backend, x, arguments, wanted):
        """``token_stats`` of whole rows; over a process group, one collective."""
        if self.shard is None:
            return ops.run("token_stats", backend, RowBatch(x, *arguments), wanted)
        return vocab_parallel.token_stats(self.shard, backend, x, *arguments, wanted)

    def dlogits(self, backend, dlogp, dentropy, x, arguments, saved):
        """The gradient of the logits ``x``, written where ``gradient_of`` says; ``saved``: shift, sum_exp and entropy
        of the rows.
        """
        out = self.gradient_of(x)
        if self.shard is None:
            upstream, saved = Upstream(dlogp, dentropy), SavedRows(*saved)
            return ops.run("token_stats_backward", backend, upstream, RowBatch(x, *arguments), saved, out)
        return vocab_parallel.token_stats_backward(self.shard, backend, dlogp, dentropy, x, *arguments, *saved, out)

    def gradient_of(self, x):
        """The place of the gradient of the logits ``x``: over them, unless the way back through the softcap needs them
        or it is rounded.
        """
        if self.rounded is not None and len(self.buffers) == 1:
            self.buffers.append(torch.empty_like(self.buffers[0], dtype=self.rounded))
        return x if len(self.buffers) == 1 else self.buffers[1][: x.shape[0], : self.width]

    def back(self, dlogits, x, hidden, want_hidden, dweight, dbias, first):
        """Adds to ``dweight`` and ``dbias`` (None: not wanted; ``dweight`` is filled at ``first``); returns the
        gradient of ``hidden``, or None.

        ``x`` is spent.
        """
        d = dlogits[:, : self.columns]
        if self.softcap is not None:
            d.mul_(x[:, : self.columns].div_(self.softcap).square_().neg_().add_(1.0))
        if self.scale != 1.0:
            d.mul_(self.scale)
        if dbias is not None:
            dbias.add_(d.sum(0, dtype=dbias.dtype))
        return self.products.gradients(d, hidden, want_hidden, dweight, first)


def check_targets(where, targets, ignore_index, temperature, columns, shard):
    """On the CPU: a target outside the vocabulary, a temperature of a live row that is not positive, by the caller's
    row.
    """
    check_rows(
        targets,
        columns if shard is None else shard.vocab,
        ignore_index,
        temperature if temperature.dim() else 1.0,
        where,
    )


def in_common(hidden, bias, targets, temperature, softcap, logit_scale, ignore_index, logits_dtype, chunk, bound):
    """Facts that all ranks of a process group must have alike, under the names that an error gives it; and a sum over
    hidden states. Read on the host.
    """
    live = targets != ignore_index
    bits = {torch.float32: torch.int32, torch.float64: torch.int64}[temperature.dtype]
    return [
        ("tokens", hidden.shape[0]),
        ("features", hidden.shape[1]),
        ("live tokens", live.sum().item()),
        ("rows per chunk", chunk),
        ("max_live_tokens", bound),
        ("dtype of hidden", hidden.dtype),
        ("logits_dtype", logits_dtype),
        ("softcap", softcap),
        ("logit_scale", logit_scale),
        ("with a bias", bias is not None),
        ("temperature", pattern(live, temperature.view(bits)) if temperature.dim() else temperature.item()),
        ("digest of live targets", pattern(live, targets)),
    ], [("hidden states, each times a factor", *sketch(hidden, live))]
