"""The lm_head as all ``linear_*`` functions see it: the options of a call, and the checked head with its rows."""

import contextlib
from typing import NamedTuple, TypedDict

import torch

from rlkernels import checks, ops
from rlkernels.backends import gate
from rlkernels.backends.protocol import check_rows, real_dtype
from rlkernels.checks import tokens as checks_tokens
from rlkernels.linear import vocab_parallel
from rlkernels.linear.chunk_plan import HeadShape, full_chunks, planned_stretches
from rlkernels.linear.chunking import budget_bytes, multiprocessors, on_accelerator, rows_within
from rlkernels.linear.matmul import AcceleratorMatmul
from rlkernels.linear.rank_agreement import pattern, sketch
from rlkernels.linear.vocab_parallel import Shard
from rlkernels.logits_layout import or_ignored, or_one
from rlkernels.tracing import replaced, value

AUTOCAST = {
    kind: torch.amp.is_autocast_available(kind) for kind in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia", "maia", "xla")
}
"""Device type to whether torch has autocast there. Asked at import, because torch 2.11 cannot trace the question."""
ALIGNED = 16
"""The stride of a row of logits is a multiple of this, so that every row takes 16-byte loads for any vocabulary."""


class HeadOptions(TypedDict):
    """The keywords that every ``linear_*`` function has, as the caller passed them; see ``linear_token_logprobs``."""

    bias: torch.Tensor | None
    temperature: float | torch.Tensor
    softcap: float | None
    logit_scale: float
    ignore_index: int
    vocab_mask: torch.Tensor | None
    logits_dtype: torch.dtype
    chunk_tokens: int | None
    logits_budget: int | None
    max_live_tokens: int | None
    valid_vocab: int | None
    process_group: "torch.distributed.ProcessGroup | None"
    vocab_start: int | None


class LinearHead(NamedTuple):
    """Checked hidden states ``[T, H]``, a head, and what belongs to each row.

    ``temperature``: ``[T]``, or one number as a tensor ``[]``. ``vocab_mask``: ``[V]`` or ``[T, V]``, of the whole
    vocabulary over a process group, too. ``chunk_rows``: rows per chunk, at most. ``planned``: whether a chunk may have
    fewer. ``caller``: the public function that was called. Only methods, no properties: torch 2.8 traces no property of
    a named tuple.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    targets: torch.Tensor
    temperature: torch.Tensor
    vocab_mask: torch.Tensor | None
    softcap: float | None
    logit_scale: float
    ignore_index: int
    logits_dtype: torch.dtype
    chunk_rows: int
    planned: bool
    max_live_tokens: int | None
    shard: Shard | None
    caller: str

    def flatten(self):
        """Returns the head as arguments of a registered op, in the order of OPERANDS."""
        shard = (None, 0, 0, 0) if self.shard is None else self.shard
        return (
            self.hidden,
            self.weight,
            self.bias,
            self.targets,
            self.temperature,
            self.vocab_mask,
            None if self.softcap is None else ops.number(self.softcap),
            ops.number(self.logit_scale),
            self.ignore_index,
            self.logits_dtype,
            self.chunk_rows,
            self.planned,
            self.max_live_tokens,
            *shard,
            self.caller,
        )

    @classmethod
    def unflatten(cls, operands):
        """Returns the head that the arguments of a registered op stand for; reads its numbers."""
        *tensors, softcap, logit_scale = operands[:TENSORS]
        ignore_index, logits_dtype, chunk_rows, planned, bound, group, *columns, caller = operands[TENSORS:]
        shard = None if group is None else Shard(group, *columns)
        numbers = value(softcap), value(logit_scale), ignore_index
        return cls(*tensors, *numbers, logits_dtype, chunk_rows, planned, bound, shard, caller)

    def result_dtype(self):
        """Returns the dtype of per-row results and of losses: fp32, or fp64 for fp64 hidden states."""
        return real_dtype(self.hidden.dtype)

    def vocab(self):
        """Returns the number of columns of the logits, over a process group those of all ranks."""
        return self.weight.shape[0] if self.shard is None else self.shard.vocab

    def stretches(self, rows, keeps=False):
        """Returns the chunks of so many rows, as ``planned_stretches``.

        Over a process group the plan knows no waves, because its ranks may have devices and shards of different sizes,
        and every chunk is a collective.
        """
        if not self.planned:
            return full_chunks(rows, self.chunk_rows)
        processors = multiprocessors(self.weight.device) if self.shard is None else 1
        shape = HeadShape(self.vocab(), self.weight.shape[1], processors)
        return planned_stretches(rows, self.chunk_rows, shape, keeps)

    def chunk_sizes(self, rows, keeps=False):
        """Returns the rows of each chunk of so many rows."""
        return [size for stretch in self.stretches(rows, keeps) for size in stretch]

    def per_row(self, x):
        """Returns a copy of a per-row tensor as a contiguous ``[T]`` of the dtype of results; None stays None.

        A copy, because a second backward makes the gradients anew, from what the caller may have written over since.
        """
        return None if x is None else x.detach().to(self.result_dtype(), copy=True).reshape(-1).contiguous()

    def without(self, dead):
        """Returns the head with the rows that are ``dead``, bool ``[T]``, ignored.

        Nobody looks at the target and the temperature that they hold.
        """
        return replaced(
            self, targets=or_ignored(dead, self.targets, self.ignore_index), temperature=or_one(dead, self.temperature)
        )

    def row_arguments(self, rows):
        """Returns ``targets, temperature, ignore_index, vocab_mask`` of the selected rows, as a backend takes them."""
        mask = self.vocab_mask
        mask = mask if mask is None or mask.dim() == 1 else mask[rows.index]
        return *rows.row_arguments(self.targets, self.temperature, self.ignore_index), mask

    def check_targets(self):
        """Raises on the CPU for a live row whose target is outside the vocabulary or whose temperature is not positive.

        The error names the row as the caller counts it.
        """
        check_rows(
            self.targets,
            self.vocab(),
            self.ignore_index,
            self.temperature if self.temperature.dim() else 1.0,
            self.caller,
        )

    def in_common(self):
        """Returns facts that all ranks of a process group must have alike, and a sum over hidden states.

        Facts are named as an error names them. The host reads them from the tensors.
        """
        live = self.targets != self.ignore_index
        temperature = self.temperature
        bits = {torch.float32: torch.int32, torch.float64: torch.int64}[temperature.dtype]
        return [
            ("tokens", self.hidden.shape[0]),
            ("features", self.hidden.shape[1]),
            ("live tokens", live.sum().item()),
            ("rows per chunk", self.chunk_rows),
            ("chunk_tokens given", not self.planned),
            ("max_live_tokens", self.max_live_tokens),
            ("dtype of hidden", self.hidden.dtype),
            ("logits_dtype", self.logits_dtype),
            ("softcap", self.softcap),
            ("logit_scale", self.logit_scale),
            ("with a bias", self.bias is not None),
            ("temperature", pattern(live, temperature.view(bits)) if temperature.dim() else temperature.item()),
            ("digest of live targets", pattern(live, self.targets)),
            ("digest of vocab_mask", self._digest_of_mask(live)),
        ], [("hidden states, each times a factor", *sketch(self.hidden, live))]

    def _digest_of_mask(self, live):
        """Returns digests of the columns that each row has, and of the rows that each column has."""
        mask = self.vocab_mask
        if mask is None or mask.dim() == 1:
            return None if mask is None else pattern(mask, torch.arange(mask.shape[0], device=mask.device))
        of_columns = mask[live].sum(0)
        return pattern(live, mask.sum(-1)) + pattern(of_columns >= 0, of_columns)


OPERANDS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor temperature, Tensor? vocab_mask, "
    "Tensor? softcap, Tensor logit_scale, int ignore_index, ScalarType logits_dtype, int chunk_rows, "
    "bool planned, int? max_live_tokens, str? group, int start, int columns, int vocab, str caller"
)
"""The schema of ``LinearHead.flatten``. Numbers are tensors, because torch.compile specialises a Python float."""
TENSORS = OPERANDS.count("Tensor")
"""So many operands come first that are tensors or None."""


def linear_head(caller, hidden, weight, targets, options):
    """Checks the arguments that every ``linear_*`` function takes and returns them as a LinearHead.

    Args:
        caller: the name of the public function. options: HeadOptions.

    Raises:
        TypeError, ValueError, RuntimeError: as ``linear_token_logprobs``.
    """
    hidden, weight, bias = _operands(caller, hidden, weight, options["bias"])
    shape = hidden.shape[:-1]
    checks.targets(caller, targets, shape)
    checks.readable(caller, "targets", targets)
    temperature = checks.temperature(caller, options["temperature"], shape)
    ignore_index = checks.integer(caller, "ignore_index", options["ignore_index"])
    targets = checks_tokens.holding(caller, targets, ignore_index)
    logit_scale, softcap = _scale_and_cap(caller, options)
    logits_dtype = options["logits_dtype"]
    if not isinstance(logits_dtype, torch.dtype) or logits_dtype not in checks.FLOATS:
        raise TypeError(f"{caller}: logits_dtype must be floating, one of {checks.FLOAT_NAMES}; got {logits_dtype}")
    chunk_tokens, logits_budget, max_live_tokens, valid_vocab = (
        checks.positive_integer(caller, name, options[name])
        for name in ("chunk_tokens", "logits_budget", "max_live_tokens", "valid_vocab")
    )
    vocab_mask, vocab_start = options["vocab_mask"], options["vocab_start"]
    shard = vocab_parallel.shard_of(caller, weight, options["process_group"], vocab_start, valid_vocab)
    checks.vocab_mask(caller, vocab_mask, (*shape, weight.shape[0] if shard is None else shard.vocab))
    checks.one_device(
        caller,
        "hidden",
        hidden,
        weight=weight,
        targets=targets,
        bias=bias,
        temperature=temperature,
        vocab_mask=vocab_mask,
    )
    checks.no_forward_ad(caller, hidden, weight, bias)
    logits_dtype = _logits_dtype(caller, hidden, logits_dtype)
    if shard is None and valid_vocab is not None and valid_vocab > weight.shape[0]:
        raise ValueError(f"{caller}: valid_vocab is {valid_vocab}, weight has {weight.shape[0]} rows")
    # Of the whole vocabulary, because shards may differ in size. A chunk is a collective, so that ranks with different
    # numbers of rows would wait for ever.
    width = weight.shape[0] if vocab_start is None else shard.vocab
    columns = valid_vocab if shard is None else shard.columns
    if columns is not None and columns < weight.shape[0]:
        # Padding behind the vocabulary takes no part, so it is cut off before any matmul.
        weight, bias = weight[:columns], None if bias is None else bias[:columns]
        vocab_mask = vocab_mask if vocab_mask is None or shard is not None else vocab_mask[..., :columns]
    if vocab_mask is not None:
        vocab_mask = vocab_mask.reshape(*([-1] if vocab_mask.dim() > 1 else []), vocab_mask.shape[-1]).contiguous()
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.reshape(-1).to(real_dtype(hidden.dtype)).contiguous()
    else:
        temperature = ops.number(temperature)
    bytes_per_row = (width + ALIGNED) * _bytes_per_logit(weight, logits_dtype, softcap)
    planned = chunk_tokens is None and on_accelerator(hidden.device.type)
    budget = budget_bytes(logits_budget, hidden.device.type, sum_bytes(weight, width))
    chunk_rows = chunk_tokens or rows_within(budget, bytes_per_row)
    return LinearHead(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        targets.reshape(-1),
        temperature,
        vocab_mask,
        softcap,
        logit_scale,
        ignore_index,
        logits_dtype,
        chunk_rows,
        planned,
        max_live_tokens,
        shard,
        caller,
    )


def sum_bytes(weight, rows):
    """Returns the bytes of the sum of the gradient of a weight of so many ``rows``; 0 where it gets none."""
    trained = weight.requires_grad and torch.is_grad_enabled()
    return rows * weight.shape[1] * real_dtype(weight.dtype).itemsize if trained else 0


def _operands(caller, hidden, weight, bias):
    """Returns hidden states, weight and bias, checked and cast as autocast says."""
    checks.floating(caller, "hidden", hidden)
    if type(weight).__name__ == "DTensor":
        raise TypeError(
            f"{caller}: weight is a DTensor; pass weight.full_tensor(), or its local rows with process_group"
        )
    checks.head(caller, hidden, weight, bias)
    if not (caller.startswith("linear_token_") or torch.compiler.is_compiling()):
        # The losses call kernels without the dispatcher, which would unwrap a subclass of Tensor.
        hidden, weight, bias = (
            x if x is None else gate.own(caller, name, x)
            for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias))
        )
    kind = hidden.device.type
    if _has_autocast(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.dtype != hidden.dtype:
            raise TypeError(
                f"{caller}: {name} has dtype {x.dtype}, hidden has {hidden.dtype}; cast one of them, or use autocast"
            )
    return hidden, weight, bias


def _scale_and_cap(caller, options):
    logit_scale, softcap = checks.finite(caller, "logit_scale", options["logit_scale"]), options["softcap"]
    if logit_scale != 0:
        checks.within_reach(caller, "logit_scale", abs(logit_scale), "0")
    if softcap is not None:
        softcap = checks.positive(caller, "softcap", softcap)
        checks.within_reach(caller, "softcap", softcap, "None")
    return logit_scale, softcap


def _logits_dtype(caller, hidden, logits_dtype):
    """Returns the dtype of the logits; fp32, the default, stands for fp64 where the hidden states are fp64."""
    if hidden.dtype == torch.float64 and logits_dtype == torch.float32:
        return torch.float64
    if (hidden.dtype == torch.float64) != (logits_dtype == torch.float64):
        raise TypeError(
            f"{caller}: logits_dtype is {logits_dtype}, hidden has dtype {hidden.dtype}; float64 logits are "
            "those of float64 hidden states, "
            "whose logits are not rounded"
        )
    return logits_dtype


def _has_autocast(kind):
    return AUTOCAST[kind] if kind in AUTOCAST else torch.amp.is_autocast_available(kind)


def without_autocast(kind):
    """Returns a context in which autocast is off on devices of this kind.

    It would round the matmuls of fp32 to 16 bits, and ``linear_head`` has cast what the caller wants cast.
    """
    return torch.autocast(kind, enabled=False) if _has_autocast(kind) else contextlib.nullcontext()


def _bytes_per_logit(weight, logits_dtype, softcap):
    # On a CPU no matmul needs bytes beside the logits. So nothing is asked of the native module, which torch.compile
    # could not trace.
    beside = AcceleratorMatmul(weight).extra_bytes if on_accelerator(weight.device.type) else 0
    return logits_dtype.itemsize * (1 if softcap is None else 2) + beside
