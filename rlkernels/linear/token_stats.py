"""The same statistics from hidden states and the lm_head: one loop over chunks of rows, no ``[T, V]`` tensor.

The forward keeps a few numbers per token; the backward forms the logits of each chunk again, writes their gradient over
them and feeds it to two matmuls: four products in all, for any upstream gradient. Rows with an ignored target never
enter a product.
"""

import functools
import math

import torch

from rlkernels import checks, ops
from rlkernels.backends import gate
from rlkernels.backends.protocol import RowStats, real_dtype
from rlkernels.linear import vocab_parallel
from rlkernels.linear.chunking import filled_up, live_rows
from rlkernels.linear.head import Chunk, check_targets, fresh, head, in_common, without_autocast
from rlkernels.linear.rank_agreement import agreed, meeting, met, pattern
from rlkernels.logprobs import collect


@agreed
def linear_token_logprobs(
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
    r"""Log-probability of each target from hidden states and the lm_head, without ever holding ``[T, V]`` logits.

    ``token_logprobs`` of ``z / temperature``, ``z = softcap tanh(u / softcap)`` (``z = u`` without), ``u = logit_scale
    (hidden weight^T + bias)``.

    Args:
        hidden: ``[..., H]``. weight: ``[V, H]``, same dtype. bias: ``[V]``. All three get gradients where they require
            them.
        targets, temperature, ignore_index: as for ``token_logprobs``. A token with an ignored target enters no product.
        softcap, logit_scale: from ``2**-40`` to ``2**40``; no cap is None, and a scale may be negative or 0.
        logits_dtype: float32 keeps the matmul's accumulator; bfloat16 or float16 rounds the logits as an inference
            engine may.
        logits_budget: bytes that the logits of one chunk (and what their gradient needs beside them) may take; by
            default ``RLKERNELS_LOGITS_BUDGET``, else 1 GiB, on a CPU 256 MiB. chunk_tokens: rows per chunk instead.
        max_live_tokens: a bound on the tokens that are not ignored. Without it the host reads their number, once per
            direction; with it it reads nothing, and as many rows as the bound says are multiplied. On an accelerator a
            bound too small fails an assertion there.
        valid_vocab: columns from here on are padding and take no part; their rows of ``weight`` get a gradient of 0.
        process_group: each rank holds ``[V_local, H]``, in rank order; targets and the result are global. Hidden states
            must be equal on all ranks, as everything but the shard, and their gradient is summed over the group.
            vocab_start: first column of this rank, where shards differ in size.

    Returns:
        Tensor ``[...]``, fp32 (fp64 for fp64 hidden states). The bits of a row depend neither on the rows that come
        with it nor on the number of threads where the products are our own: on a CPU in bf16 with AVX512_BF16, and on
        AMD's with AVX-512 in fp32, fp16 and bf16 (bf16 logits of a bf16 head are a library's). Elsewhere a library may
        add in another order for another number of rows or threads.

    Raises:
        TypeError, ValueError: shapes or dtypes do not fit; a sharded weight without elements; shards that do not cover
            the vocabulary.
        IndexError: on the CPU, a target outside ``[0, V)`` that is not ``ignore_index``.
        RuntimeError: on the CPU, or with ``RLKERNELS_CHECK=1``, ranks of ``process_group`` that differ in anything but
            their shard, or of which one has raised: on every rank.
    """
    found, shape, _ = _stats(
        "linear_token_logprobs",
        hidden,
        weight,
        targets,
        (),
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        ignore_index=ignore_index,
        logits_dtype=logits_dtype,
        chunk_tokens=chunk_tokens,
        logits_budget=logits_budget,
        max_live_tokens=max_live_tokens,
        valid_vocab=valid_vocab,
        process_group=process_group,
        vocab_start=vocab_start,
    )
    return found[0].view(shape)


@agreed
def linear_token_stats(
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
    outputs=("entropy",),
):
    r"""``token_stats`` from hidden states and the lm_head, without ever holding ``[T, V]`` logits.

    Args:
        outputs: as for ``token_stats``; the rest as for ``linear_token_logprobs``.

    Returns:
        TokenStats of tensors ``[...]``; ``logprobs`` and ``entropy`` are differentiable.

    Raises:
        TypeError, ValueError, IndexError: as for ``linear_token_logprobs``; an unknown output.
    """
    found, shape, temperature = _stats(
        "linear_token_stats",
        hidden,
        weight,
        targets,
        outputs,
        bias=bias,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        ignore_index=ignore_index,
        logits_dtype=logits_dtype,
        chunk_tokens=chunk_tokens,
        logits_budget=logits_budget,
        max_live_tokens=max_live_tokens,
        valid_vocab=valid_vocab,
        process_group=process_group,
        vocab_start=vocab_start,
    )
    return collect(RowStats(*found), shape, temperature, outputs, False, None)


def _stats(where, hidden, weight, targets, outputs, **options):
    checks.outputs(where, outputs, ops.FLAGS)
    h = head(where, hidden, weight, targets, **options)
    wanted = 0
    for name in outputs:
        wanted |= ops.FLAGS[name]
    shard = h.shard or NO_SHARD
    try:
        found = linear_stats(
            h.hidden,
            h.weight,
            h.bias,
            h.targets,
            h.temperature,
            ops.number(math.nan if h.softcap is None else h.softcap),
            ops.number(h.logit_scale),
            h.ignore_index,
            h.logits_dtype,
            h.chunk,
            h.bound,
            *shard,
            where,
            wanted,
            ops.serving("token_stats", hidden),
        )
    except (
        NotImplementedError,
        TypeError,
    ):  # of a subclass of Tensor that knows torch's own operations alone: say which, and what to pass
        for name, x in (("hidden", hidden), ("weight", weight), ("bias", h.bias)):
            if x is not None:
                gate.own(where, name, x)
        raise
    return found, h.shape, h.temperature


NO_SHARD = vocab_parallel.Shard("", 0, 0, 0)


def _own_dtypes(function):
    @functools.wraps(function)
    def call(*arguments):
        with without_autocast(next(x for x in arguments if isinstance(x, torch.Tensor)).device.type):
            return function(*arguments)

    return call


def _fits(hidden, weight, bias, targets, temperature, chunk, **per_row):
    """Repeat what the public functions have checked, for whoever calls a registered op; ``per_row``: numbers for each
    target, or None.
    """
    if weight.dim() != 2 or targets.dim() != 1 or chunk < 1 or hidden.shape != (targets.shape[0], weight.shape[1]):
        raise ValueError(
            f"linear_stats: weight has shape {tuple(weight.shape)}, hidden {tuple(hidden.shape)}, targets "
            f"{tuple(targets.shape)}, chunk is {chunk}; expected [V, H], [T, H], [T] and a positive chunk"
        )
    for name, x in (("weight", weight), ("bias", bias)):
        if x is not None and x.dtype != hidden.dtype:
            raise TypeError(f"linear_stats: {name} has dtype {x.dtype}, hidden has {hidden.dtype}; cast one of them")
    if temperature.dim():
        per_row["temperature"] = temperature
    for name, x, shape in (
        ("bias", bias, weight.shape[:1]),
        *((name, x, targets.shape) for name, x in per_row.items()),
    ):
        if x is not None:
            checks.shape("linear_stats", name, x, shape)


class _Setting:
    """An op's flat arguments as the objects that they stand for."""

    def __init__(
        self,
        weight,
        bias,
        targets,
        temperature,
        softcap,
        logit_scale,
        ignore_index,
        logits_dtype,
        chunk,
        bound,
        group,
        start,
        columns,
        vocab,
        where,
        backend,
    ):
        self.targets, self.temperature, self.ignore_index, self.size, self.bound, self.backend = (
            targets,
            temperature,
            ignore_index,
            chunk,
            bound,
            backend,
        )
        self.shard, self.where = vocab_parallel.Shard(group, start, columns, vocab) if group else None, where
        softcap = softcap.item()
        self.softcap = None if math.isnan(softcap) else softcap
        self.head = weight, bias, self.softcap, logit_scale.item(), logits_dtype, self.shard

    def checked(self, hidden, direction, more):
        """Check what the host can read: targets, temperatures; over a process group what its ranks share, and
        ``more()``: further facts, perhaps other sums.
        """
        weight, bias, softcap, scale, dtype, shard = self.head
        arguments = self.targets, self.ignore_index, self.temperature, weight.shape[0], shard
        if shard is None:
            return check_targets(self.where, *arguments)
        with meeting(self.where + direction, shard.process_group(), hidden.device) as now:
            check_targets(self.where, *arguments)
            if met(hidden.device):
                common, sums = in_common(
                    hidden,
                    bias,
                    self.targets,
                    self.temperature,
                    softcap,
                    scale,
                    self.ignore_index,
                    dtype,
                    self.size,
                    self.bound,
                )
                facts, others = more()
                now.compare(shard[1:], common + facts, others or sums)

    def chunks(self, live, bias_gradient=False):
        """``(Chunk, rows)`` by turns; the chunk's buffer is that of all."""
        rows = live_rows(live, self.bound)
        chunk = Chunk(*self.head, filled_up(min(self.size, len(rows))), bias_gradient) if len(rows) else None
        for start in range(0, len(rows), self.size):
            yield chunk, rows.part(start, start + self.size)

    def arguments(self, rows):
        return rows.arguments(self.targets, self.temperature, self.ignore_index)


@_own_dtypes
def _linear_stats(
    hidden,
    weight,
    bias,
    targets,
    temperature,
    softcap,
    logit_scale,
    ignore_index,
    logits_dtype,
    chunk,
    bound,
    group,
    start,
    columns,
    vocab,
    where,
    wanted,
    backend,
):
    setting = _Setting(
        weight,
        bias,
        targets,
        temperature,
        softcap,
        logit_scale,
        ignore_index,
        logits_dtype,
        chunk,
        bound,
        group,
        start,
        columns,
        vocab,
        where,
        backend,
    )
    _fits(hidden, weight, bias, targets, temperature, chunk)
    setting.checked(
        hidden, "", lambda: ([("outputs", [name for name, flag in ops.FLAGS.items() if wanted & flag])], None)
    )
    found = tuple(
        x.zero_()
        for x in ops.token_stats_fake(hidden, targets, temperature, ignore_index, None, None, wanted, False, backend)
    )
    for head_, rows in setting.chunks(targets != ignore_index):
        x = head_.logits(rows.hidden(hidden))[: len(rows)]
        part = head_.statistics(backend, x, setting.arguments(rows), wanted)
        for whole, values in zip(found, part, strict=True):
            if whole.numel():
                whole[rows.index] = values
    return found


def _linear_stats_fake(
    hidden,
    weight,
    bias,
    targets,
    temperature,
    softcap,
    logit_scale,
    ignore_index,
    logits_dtype,
    chunk,
    bound,
    group,
    start,
    columns,
    vocab,
    where,
    wanted,
    backend,
):
    return ops.token_stats_fake(hidden, targets, temperature, ignore_index, None, None, wanted, False, backend)


def _linear_setup(ctx, inputs, output):
    hidden, weight, bias, targets, temperature, softcap, logit_scale, *ctx.setting, wanted, backend = inputs
    ctx.setting.append(backend)
    logp, shift, sum_exp, entropy, *rest = output
    ctx.mark_non_differentiable(shift, sum_exp, *rest, *(() if wanted & ops.ENTROPY else (entropy,)))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, targets, temperature, softcap, logit_scale, shift, sum_exp, entropy)


def _linear_grad(ctx, dlogp, dshift, dsum, dentropy, *_):
    needs = ctx.needs_input_grad
    hidden, weight, bias, targets, temperature, softcap, logit_scale, shift, sum_exp, entropy = ctx.saved_tensors
    if dlogp is None and dentropy is None:
        return (None,) * len(needs)
    *setting, backend = ctx.setting
    grads = linear_stats_backward(
        dlogp,
        dentropy,
        hidden,
        weight,
        bias,
        targets,
        temperature,
        softcap,
        logit_scale,
        *setting,
        shift,
        sum_exp,
        entropy,
        needs[0],
        needs[1],
        needs[2],
        backend,
    )
    return *(g if need else None for g, need in zip(grads, needs[:3], strict=True)), *(None,) * (len(needs) - 3)


@_own_dtypes
def _linear_backward(
    dlogp,
    dentropy,
    hidden,
    weight,
    bias,
    targets,
    temperature,
    softcap,
    logit_scale,
    ignore_index,
    logits_dtype,
    chunk,
    bound,
    group,
    start,
    columns,
    vocab,
    where,
    shift,
    sum_exp,
    entropy,
    need_hidden,
    need_weight,
    need_bias,
    backend,
):
    setting = _Setting(
        weight,
        bias,
        targets,
        temperature,
        softcap,
        logit_scale,
        ignore_index,
        logits_dtype,
        chunk,
        bound,
        group,
        start,
        columns,
        vocab,
        where,
        backend,
    )
    _fits(
        hidden,
        weight,
        bias,
        targets,
        temperature,
        chunk,
        dlogp=dlogp,
        dentropy=dentropy,
        shift=shift,
        sum_exp=sum_exp,
        entropy=None if dentropy is None else entropy,
    )
    given, needs = [d for d in (dlogp, dentropy) if d is not None], (need_hidden, need_weight, need_bias)
    # Prompt and padding rows arrive with a gradient of exactly 0: they cost no product.
    live = (targets != ignore_index) & torch.stack([d != 0 for d in given]).any(0)

    def of_upstream():
        facts = [
            ("gradients of hidden, weight, bias", needs),
            ("rows with an upstream gradient", live.sum().item()),
            ("their digest", pattern(live, targets)),
        ]
        sums = [0.0 if d is None else torch.where(live, d, 0.0).double().abs().sum().item() for d in (dlogp, dentropy)]
        return facts, [
            (f"sizes of upstream gradients of {name}", x, x)
            for name, x in zip(("logprobs", "entropy"), sums, strict=True)
        ]

    setting.checked(hidden, ", backward", of_upstream)
    total = Gradients(hidden, weight, bias, needs, setting.shard)
    _accumulate(total, setting, dlogp, dentropy, hidden, live, shift, sum_exp, entropy, backend)
    return total.finished()  # with the chunk's buffer given back


def _accumulate(total, setting, dlogp, dentropy, hidden, live, shift, sum_exp, entropy, backend):
    for head_, rows in setting.chunks(live, total.needs[2]):
        h = rows.hidden(hidden)
        x = head_.logits(h)[: len(rows)]
        upstream = (None if d is None else rows.of(d).contiguous() for d in (dlogp, dentropy))
        dlogits = head_.dlogits(
            backend, *upstream, x, setting.arguments(rows), [rows.of(s) for s in (shift, sum_exp, entropy)]
        )
        total.add(head_, rows, dlogits, x, h)


class Gradients:
    """Sums of the gradients of hidden states, weight and bias over chunks; an empty tensor for what is frozen."""

    def __init__(self, hidden, weight, bias, needs, shard, keep=False):
        self.like, self.shard, self.needs = (hidden, weight, bias), shard, needs
        real = real_dtype(hidden.dtype)
        # What is scaled once more or summed over ranks stays fp32: no second rounding, and no fp16 that underflows
        # before the loss scale arrives.
        wide = keep or shard is not None
        self.hidden = (
            torch.zeros(hidden.shape, dtype=real if wide else hidden.dtype, device=hidden.device) if needs[0] else None
        )
        # fp32 whatever the weight is: accumulated over 1024 chunks in bf16 the gradient is 3.7 % off.
        self.weight, self.first = fresh(weight.shape, real, weight.device) if needs[1] else None, True
        self.bias = torch.zeros(weight.shape[:1], dtype=real, device=weight.device) if needs[2] else None

    def add(self, head_, rows, dlogits, x, hidden):
        dhidden = head_.back(dlogits, x, hidden[: len(rows)], self.needs[0], self.weight, self.bias, self.first)
        self.first = False
        if dhidden is not None:
            self.hidden[rows.index] = dhidden.to(self.hidden.dtype)

    def kept(self):
        """In the dtype that they were summed in; None for what is frozen."""
        if self.first and self.weight is not None:
            self.weight.zero_()
        if self.hidden is not None and self.shard is not None:
            torch.distributed.all_reduce(self.hidden, group=self.shard.process_group())
        return self.hidden, self.weight, self.bias

    def finished(self):
        return tuple(
            like.new_empty(0) if d is None else d.to(like.dtype)
            for d, like in zip(self.kept(), (self.like[0], self.like[1], self.like[1]), strict=True)
        )


_OPERANDS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor temperature, Tensor softcap, Tensor "
    "logit_scale, int ignore_index, "
    "ScalarType logits_dtype, int chunk, int? bound, str group, int start, int columns, int vocab, str where"
)
linear_stats = ops.define(
    "linear_stats",
    f"({_OPERANDS}, int wanted, str backend) -> ({', '.join(['Tensor'] * 11)})",
    _linear_stats,
    _linear_stats_fake,
    _linear_grad,
    _linear_setup,
)
linear_stats_backward = ops.define(
    "linear_stats_backward",
    f"(Tensor? dlogp, Tensor? dentropy, {_OPERANDS}, Tensor shift, Tensor sum_exp, Tensor "
    "entropy, bool need_hidden, "
    "bool need_weight, bool need_bias, str backend) -> (Tensor, Tensor, Tensor)",
    _linear_backward,
    lambda dlogp, dentropy, hidden, weight, *rest: (
        hidden.new_empty(hidden.shape) if rest[-4] else hidden.new_empty(0),
        weight.new_empty(weight.shape) if rest[-3] else weight.new_empty(0),
        weight.new_empty(weight.shape[:1] if rest[-2] else (0,)),
    ),
)
