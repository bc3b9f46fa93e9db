"""The statistics of ``rlkernels.token_stats`` from hidden states and the lm_head: one loop over chunks of rows.

The forward keeps a few numbers per token. The backward makes the logits of each chunk again, writes their gradient over
them and feeds it to two matmuls: four matmuls in all, for any upstream gradient. Rows with an ignored target enter no
matmul.
"""

import functools

import torch

from rlkernels import checks, ops
from rlkernels.backends import gate
from rlkernels.backends.protocol import RowStats
from rlkernels.linear.chunking import live_rows
from rlkernels.linear.gradients import Gradients
from rlkernels.linear.head import OPERANDS, TENSORS, HeadOptions, LinearHead, linear_head, without_autocast
from rlkernels.linear.projection import keeps_gradients, planned_projection
from rlkernels.linear.rank_agreement import meeting, pattern, ranks_compare, same_on_every_rank
from rlkernels.logprobs import TokenStats, collect
from rlkernels.types import (
    HeadBias,
    HeadWeight,
    HiddenStates,
    Number,
    Outputs,
    PerToken,
    Targets,
    Temperature,
    VocabMask,
)


@same_on_every_rank
def linear_token_logprobs(
    hidden: HiddenStates,
    weight: HeadWeight,
    targets: Targets,
    *,
    bias: HeadBias | None = None,
    temperature: Temperature = 1.0,
    softcap: Number | None = None,
    logit_scale: Number = 1.0,
    ignore_index: int = -100,
    vocab_mask: VocabMask | None = None,
    logits_dtype: torch.dtype = torch.float32,
    chunk_tokens: int | None = None,
    logits_budget: int | None = None,
    max_live_tokens: int | None = None,
    valid_vocab: int | None = None,
    process_group: "torch.distributed.ProcessGroup | None" = None,
    vocab_start: int | None = None,
) -> PerToken:
    r"""Computes the log-probability of each target from hidden states and the lm_head, without ever holding ``[T, V]``
    logits.

    ``token_logprobs`` of ``z / temperature``, ``z = softcap tanh(u / softcap)`` (``z = u`` without), ``u = logit_scale
    (hidden weight^T + bias)``.

    Args:
        hidden: ``[..., H]``. weight: ``[V, H]``, same dtype. bias: ``[V]``. All three get gradients where they require
            them.
        targets, temperature, ignore_index: as for ``token_logprobs``. A token with an ignored target enters no matmul.
        vocab_mask: bool ``[V]`` or ``[..., V]``, True keeps a column, as for ``token_logprobs``; over a process group
            that of the whole vocabulary, without padding, on every rank.
        softcap, logit_scale: from ``2**-40`` to ``2**40``; no cap is None, and a scale may be negative or 0.
        logits_dtype: float32 keeps the matmul's accumulator; bfloat16 or float16 rounds the logits as an inference
            engine may.
        chunk_tokens: rows per chunk.
        logits_budget: instead of ``chunk_tokens``, bytes that the logits of one chunk, and what their gradient needs
            beside them, may take. By default ``RLKERNELS_LOGITS_BUDGET``, else 256 MiB on a CPU. Elsewhere 1 GiB,
            or as much as the fp32 gradient of the weight, where it gets one that is larger.
        max_live_tokens: a bound on the tokens that are not ignored. Without it the host reads their number, once per
            direction. With it the host reads nothing, and as many rows as the bound says are multiplied. A bound too
            small raises on a CPU, and fails an assertion on an accelerator.
        valid_vocab: columns from here on are padding and take no part; their rows of ``weight`` get a gradient of 0.
        process_group: each rank holds ``[V_local, H]``, in rank order; targets and the result are global. Everything
            but the shard must be equal on all ranks. The gradient of the hidden states is summed over the group.
        vocab_start: first column of this rank, where shards differ in size.

    Returns:
        Tensor ``[...]``, fp32 (fp64 for fp64 hidden states). The bits of a row depend neither on the rows that come
        with it nor on the number of threads where the matmuls are our own: on a CPU in bf16 with AVX512_BF16 or AMX,
        and on AMD's with AVX-512 in fp32, fp16 and bf16 (bf16 logits of a bf16 head are a library's). Elsewhere a
        library may add in another order for another number of rows or threads.

    Raises:
        TypeError, ValueError: shapes or dtypes do not fit; a sharded weight without elements; shards that do not cover
            the vocabulary.
        IndexError: on the CPU, a target outside ``[0, V)`` that is not ``ignore_index``.
        RuntimeError: on the CPU, or with ``RLKERNELS_CHECK=1``, ranks of ``process_group`` that differ in anything but
            their shard, or of which one has raised: on every rank.

    Example:
        >>> hidden, weight = torch.eye(2), torch.tensor([[0.0, 2.0], [1.0, 2.0]])
        >>> linear_token_logprobs(hidden, weight, torch.tensor([1, 0]))
        tensor([-0.3133, -0.6931])
    """
    caller = "linear_token_logprobs"
    options: HeadOptions = {
        "bias": bias,
        "temperature": temperature,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "ignore_index": ignore_index,
        "vocab_mask": vocab_mask,
        "logits_dtype": logits_dtype,
        "chunk_tokens": chunk_tokens,
        "logits_budget": logits_budget,
        "max_live_tokens": max_live_tokens,
        "valid_vocab": valid_vocab,
        "process_group": process_group,
        "vocab_start": vocab_start,
    }
    return head_logprobs(linear_head(caller, hidden, weight, targets, options)).view(targets.shape)


@same_on_every_rank
def linear_token_stats(
    hidden: HiddenStates,
    weight: HeadWeight,
    targets: Targets,
    *,
    bias: HeadBias | None = None,
    temperature: Temperature = 1.0,
    softcap: Number | None = None,
    logit_scale: Number = 1.0,
    ignore_index: int = -100,
    vocab_mask: VocabMask | None = None,
    logits_dtype: torch.dtype = torch.float32,
    chunk_tokens: int | None = None,
    logits_budget: int | None = None,
    max_live_tokens: int | None = None,
    valid_vocab: int | None = None,
    process_group: "torch.distributed.ProcessGroup | None" = None,
    vocab_start: int | None = None,
    outputs: Outputs = ("entropy",),
) -> TokenStats:
    r"""Computes ``token_stats`` from hidden states and the lm_head, without ever holding ``[T, V]`` logits.

    The logits are ``z / temperature``, ``z = softcap tanh(u / softcap)`` (``z = u`` without), ``u = logit_scale (hidden
    weight^T + bias)``. ``H = -sum_v p_v log p_v``; the other statistics as for ``token_stats``.

    Args:
        outputs: as for ``token_stats``; the rest as for ``linear_token_logprobs``.

    Returns:
        TokenStats of tensors ``[...]``; ``logprobs``, ``logsumexp`` and ``entropy`` are differentiable.

    Raises:
        TypeError, ValueError, IndexError: as for ``linear_token_logprobs``; an unknown output.
        RuntimeError: a backward through another statistic, except in a compiled program, where it is a constant.

    Example:
        >>> linear_token_stats(torch.ones(1, 2), torch.zeros(4, 2), torch.tensor([3])).entropy
        tensor([1.3863])
    """
    caller = "linear_token_stats"
    checks.outputs(caller, outputs, ops.FLAGS)
    options: HeadOptions = {
        "bias": bias,
        "temperature": temperature,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "ignore_index": ignore_index,
        "vocab_mask": vocab_mask,
        "logits_dtype": logits_dtype,
        "chunk_tokens": chunk_tokens,
        "logits_budget": logits_budget,
        "max_live_tokens": max_live_tokens,
        "valid_vocab": valid_vocab,
        "process_group": process_group,
        "vocab_start": vocab_start,
    }
    head = linear_head(caller, hidden, weight, targets, options)
    return head_stats(head, outputs, targets.shape)


def head_logprobs(head):
    """Returns the log-probabilities ``[T]`` of a LinearHead, differentiable."""
    return _row_stats(head, 0).logp


def head_stats(head, outputs, shape):
    """Returns the TokenStats of a LinearHead in the ``shape`` of the targets, differentiable."""
    wanted = 0
    for name in outputs:
        wanted |= ops.FLAGS[name]
    return collect(_row_stats(head, wanted), shape, head.temperature, outputs, False, None)


def _row_stats(head, wanted):
    """Returns the RowStats of a LinearHead.

    Raises:
        TypeError: a subclass of Tensor that knows torch's own operations alone; says which argument, and what to pass.
    """
    try:
        return RowStats(*linear_stats(*head.flatten(), wanted, ops.serving("token_stats", head.hidden)))
    except (NotImplementedError, TypeError):
        for name, x in (("hidden", head.hidden), ("weight", head.weight), ("bias", head.bias)):
            if x is not None:
                gate.own(head.caller, name, x)
        raise


def _check_shapes(head, **per_row):
    """Repeats the checks of the public functions, for those who call a registered op.

    ``per_row``: tensors of one number per target, or None.

    Raises:
        TypeError, ValueError: dtypes or shapes do not fit.
    """
    hidden, weight, targets = head.hidden, head.weight, head.targets
    shapes_fit = weight.dim() == 2 and targets.dim() == 1 and hidden.shape == (targets.shape[0], weight.shape[1])
    if not shapes_fit or head.chunk_rows < 1:
        raise ValueError(
            f"linear_stats: weight has shape {tuple(weight.shape)}, hidden {tuple(hidden.shape)}, targets "
            f"{tuple(targets.shape)}, chunk_rows is {head.chunk_rows}; expected [V, H], [T, H], [T] and a positive "
            "chunk_rows"
        )
    for name, x in (("weight", weight), ("bias", head.bias)):
        if x is not None and x.dtype != hidden.dtype:
            raise TypeError(f"linear_stats: {name} has dtype {x.dtype}, hidden has {hidden.dtype}; cast one of them")
    checks.vocab_mask("linear_stats", head.vocab_mask, (targets.shape[0], head.vocab()))
    if head.temperature.dim():
        per_row["temperature"] = head.temperature
    for name, x, shape in (
        ("bias", head.bias, weight.shape[:1]),
        *((name, x, targets.shape) for name, x in per_row.items()),
    ):
        if x is not None:
            checks.shape("linear_stats", name, x, shape)


def _check_values(head, direction, further):
    """Checks what the host can read: targets and temperatures, and over a process group what its ranks share.

    ``further()``: further facts to compare, and sums, or None for those of ``LinearHead.in_common``.
    """
    if head.shard is None:
        return head.check_targets()
    with meeting(head.caller + direction, head.shard.process_group(), head.hidden.device) as now:
        head.check_targets()
        if ranks_compare(head.hidden.device):
            facts, sums = head.in_common()
            further_facts, further_sums = further()
            now.compare(head.shard[1:], facts + further_facts, further_sums or sums)


def _chunks(head, live, backend, needs=(False, False, False)):
    """Returns the projection that all chunks of the live rows share, and the rows of each.

    ``needs``: which of hidden states, weight and bias get a gradient.
    """
    rows, keeps = live_rows(live, head.max_live_tokens), keeps_gradients(head, backend, needs)
    projection = planned_projection(head, [len(rows)], backend, needs, keeps)
    return projection, rows.cut(head.chunk_sizes(len(rows), keeps))


def _linear_stats(*arguments):
    *operands, wanted, backend = arguments
    head = LinearHead.unflatten(operands)
    with without_autocast(head.hidden.device.type):
        _check_shapes(head)
        _check_values(head, "", functools.partial(_wanted_in_common, wanted))
        outputs = tuple(x.zero_() for x in _linear_stats_fake(*arguments))
        projection, chunks = _chunks(head, head.targets != head.ignore_index, backend)
        for rows in chunks:
            logits = projection.logits(rows.hidden(head.hidden))[: len(rows)]
            part = projection.statistics(logits, head.row_arguments(rows), wanted)
            for whole, values in zip(outputs, part, strict=True):
                if whole.numel():
                    whole[rows.index] = values
        return outputs


def _wanted_in_common(wanted):
    return [("outputs", [name for name, flag in ops.FLAGS.items() if wanted & flag])], None


def _linear_stats_fake(hidden, weight, bias, targets, temperature, *rest):
    *_, wanted, backend = rest
    return ops.token_stats_fake(hidden, targets, temperature, None, None, None, wanted, False, backend)


def _linear_stats_setup(ctx, inputs, output):
    *operands, wanted, ctx.backend = inputs
    logp, row_max, sum_exp, entropy, *rest = output
    ctx.mark_non_differentiable(row_max, *rest, *(() if wanted & ops.ENTROPY else (entropy,)))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*operands[:TENSORS], row_max, sum_exp, entropy)
    ctx.rest = operands[TENSORS:]


def _linear_stats_grad(ctx, dlogp, drow_max, dsum_exp, dentropy, *_):
    needs, tensors = ctx.needs_input_grad, ctx.saved_tensors
    if dlogp is None and dentropy is None and dsum_exp is None:
        return (None,) * len(needs)
    operands, dlse = (*tensors[:TENSORS], *ctx.rest), None
    if dsum_exp is not None:
        # The row maximum counts as a constant, so that the sum stands for the logsumexp. It is 0 in ignored rows.
        sum_exp = tensors[TENSORS + 1]
        dlse = torch.where(sum_exp == 0, 0.0, dsum_exp * sum_exp)
        dlogp = -dlse if dlogp is None else dlogp - dlse
    gradients = linear_stats_backward(
        dlogp, dentropy, *operands, *tensors[TENSORS:], needs[0], needs[1], needs[2], ctx.backend, dlse
    )
    trained = (g if need else None for g, need in zip(gradients, needs[:3], strict=True))
    return *trained, *(None,) * (len(needs) - 3)


def _linear_stats_backward(dlogp, dentropy, *arguments):
    """Differentiates the statistics. ``dlse``: the upstream gradient of the logsumexp, by which that of the
    log-probability is less already.
    """
    *arguments, dlse = arguments if not isinstance(arguments[-1], str) else (*arguments, None)
    *operands, row_max, sum_exp, entropy, need_hidden, need_weight, need_bias, backend = arguments
    head, needs = LinearHead.unflatten(operands), (need_hidden, need_weight, need_bias)
    with without_autocast(head.hidden.device.type):
        _check_shapes(
            head,
            dlogp=dlogp,
            dentropy=dentropy,
            dlse=dlse,
            row_max=row_max,
            sum_exp=sum_exp,
            entropy=None if dentropy is None else entropy,
        )
        # Prompt and padding rows arrive with a gradient of exactly 0: they enter no matmul.
        moves = torch.stack([d != 0 for d in (dlogp, dentropy, dlse) if d is not None]).any(0)
        live = (head.targets != head.ignore_index) & moves
        _check_values(
            head,
            ", backward",
            functools.partial(_upstream_in_common, head.targets, live, (dlogp, dentropy, dlse), needs),
        )
        gradients = Gradients(head, needs, backend)
        _accumulate(gradients, live, (dlogp, dentropy, dlse), (row_max, sum_exp, entropy), backend)
        # The buffer of the chunks went with the function's frame, so it does not stand beside the rounded gradients.
        return gradients.rounded()


def _upstream_in_common(targets, live, upstream, needs):
    """Returns facts about the upstream gradients that all ranks must have alike, and their sums."""
    facts = [
        ("gradients of hidden, weight, bias", needs),
        ("rows with an upstream gradient", live.sum().item()),
        ("their digest", pattern(live, targets)),
    ]
    dlogp, dentropy, dlse = (
        0.0 if d is None else torch.where(live, d, 0.0).double().abs().sum().item() for d in upstream
    )
    # Together, because a message between ranks has room for two sums.
    return facts, [
        (f"sizes of upstream gradients of {name}", x, x)
        for name, x in (("logprobs", dlogp + dlse), ("entropy", dentropy))
    ]


def _accumulate(gradients, live, upstream, saved, backend):
    """Adds the gradients of the live rows, chunk by chunk.

    ``upstream``: of the log-probability, the entropy and the logsumexp. ``saved``: row maximum, sum of exponentials,
    entropy.
    """
    head = gradients.head
    projection, chunks = _chunks(head, live, backend, gradients.needs)
    for rows in chunks:
        hidden = rows.hidden(head.hidden)
        logits = projection.logits(hidden)[: len(rows)]
        *of_rows, dlse = (None if d is None else rows.select(d).contiguous() for d in upstream)
        arguments, stats = head.row_arguments(rows), [rows.select(x) for x in saved]
        if dlse is not None:
            of_rows[0], arguments = _scored_inside(of_rows[0], dlse, arguments)
        repair = None if dlse is None else projection.target_repair(*of_rows, dlse, logits, arguments, stats)
        dlogits = projection.dlogits(*of_rows, logits, arguments, stats)
        if repair is not None:
            dlogits.scatter_(1, repair[0], repair[1].to(dlogits.dtype))
        gradients.add(projection, rows, dlogits, logits, hidden)
    gradients.finish(projection)


def _scored_inside(dlogp, dlse, row_arguments):
    """Gives a row whose target is outside of the vocabulary mask a target inside, of gradient 0.

    A kernel makes nothing of the log-probability of a target outside, and with it goes the logsumexp's gradient.
    """
    targets, temperature, ignore_index, mask = row_arguments
    if mask is None:
        return dlogp, row_arguments
    of_rows = mask.expand(targets.shape[0], -1)
    known = (targets != ignore_index) & (targets >= 0) & (targets < of_rows.shape[1])
    outside = known & ~of_rows.gather(1, torch.where(known, targets, 0).long()[:, None])[:, 0]
    targets = torch.where(outside, of_rows.byte().argmax(-1).to(targets.dtype), targets)
    return torch.where(outside, -dlse, dlogp), (targets, temperature, ignore_index, mask)


def _linear_stats_backward_fake(dlogp, dentropy, hidden, weight, *rest):
    rest = rest if isinstance(rest[-1], str) else rest[:-1]
    *_, need_hidden, need_weight, need_bias, _ = rest
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        weight.new_empty(weight.shape[:1] if need_bias else (0,)),
    )


linear_stats = ops.define(
    "linear_stats",
    f"({OPERANDS}, int wanted, str backend) -> ({', '.join(['Tensor'] * 11)})",
    _linear_stats,
    _linear_stats_fake,
    _linear_stats_grad,
    _linear_stats_setup,
)
linear_stats_backward = ops.define(
    "linear_stats_backward",
    f"(Tensor? dlogp, Tensor? dentropy, {OPERANDS}, Tensor row_max, Tensor sum_exp, Tensor entropy, bool need_hidden, "
    "bool need_weight, bool need_bias, str backend, Tensor? dlse=None) -> (Tensor, Tensor, Tensor)",
    _linear_stats_backward,
    _linear_stats_backward_fake,
)
