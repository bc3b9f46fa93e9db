"""Distillation from the hidden states and the heads of both models to the scalar, without ``[T, V]`` logits."""

from typing import Literal, NamedTuple, overload

import torch

from rlkernels import checks, ops
from rlkernels.backends.protocol import RowBatch, real_dtype
from rlkernels.checks import tokens as checks_tokens
from rlkernels.linear import vocab_parallel
from rlkernels.linear.chunked_loss import ChunkLoop, compare_ranks, detached_for_loss, differentiable
from rlkernels.linear.chunking import budget_bytes, live_rows
from rlkernels.linear.head import OPERANDS, HeadOptions, LinearHead, linear_head, sum_bytes, without_autocast
from rlkernels.linear.projection import HeadProjection
from rlkernels.linear.rank_agreement import pattern, same_on_every_rank, sketch
from rlkernels.linear.token_loss import check_batch
from rlkernels.losses.divergence import DEAD, divergence_metrics, kind_and_beta, one_teacher, topk
from rlkernels.losses.token_weights import live_tokens, loss_weights, losses_of_tokens, summed
from rlkernels.packed_rows import takes_one_row
from rlkernels.tracing import replaced, value
from rlkernels.types import (
    Aggregation,
    DivergenceKind,
    HeadBias,
    HeadWeight,
    HiddenStates,
    Mask,
    Metrics,
    Normalizers,
    Number,
    Offsets,
    PerToken,
    PolicyReduction,
    Scalar,
    TeacherTopk,
    Temperature,
    VocabMask,
)


class TeacherHead(NamedTuple):
    """A teacher of the rows of a student's head.

    ``hidden``, ``weight``, ``bias``, ``softcap``, ``logit_scale``: those of the teacher's head, as in ``LinearHead``;
    None with top log-probabilities in ``of``.
    """

    hidden: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    softcap: float | None
    logit_scale: float
    of: ops.Teacher

    def beside(self, head):
        """Returns the teacher's LinearHead, whose rows are those of ``head``."""
        return replaced(
            head,
            hidden=self.hidden,
            weight=self.weight,
            bias=self.bias,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
        )


class DivergenceTerms(NamedTuple):
    """A loss ``sum_t weight_t D_t``; ``weight``: ``[T]``. ``upstream``: the weights are gradients that came in."""

    teacher: TeacherHead
    weight: torch.Tensor
    upstream: bool = False

    def gradient_scale(self):
        """Returns the largest weight, by which a gradient of 1 per token is multiplied."""
        return self.weight.abs().amax() if self.weight.numel() else 1.0


@overload
def linear_distillation_loss(
    hidden: HiddenStates,
    weight: HeadWeight,
    teacher_hidden: HiddenStates | None = None,
    teacher_weight: HeadWeight | None = None,
    mask: Mask | None = None,
    *,
    bias: HeadBias | None = None,
    temperature: Temperature = 1.0,
    softcap: Number | None = None,
    logit_scale: Number = 1.0,
    vocab_mask: VocabMask | None = None,
    logits_dtype: torch.dtype = torch.float32,
    chunk_tokens: int | None = None,
    logits_budget: int | None = None,
    max_live_tokens: int | None = None,
    valid_vocab: int | None = None,
    process_group: "torch.distributed.ProcessGroup | None" = None,
    vocab_start: int | None = None,
    teacher_bias: HeadBias | None = None,
    teacher_softcap: Number | None = None,
    teacher_logit_scale: Number = 1.0,
    kind: DivergenceKind = "forward_kl",
    beta: float = 0.5,
    teacher_topk: TeacherTopk | None = None,
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    cu_seqlens: Offsets | None = None,
    normalizers: Normalizers | None = None,
    reduction: PolicyReduction = "aggregation",
    return_metrics: Literal[False] = False,
) -> Scalar: ...


@overload
def linear_distillation_loss(
    hidden: HiddenStates,
    weight: HeadWeight,
    teacher_hidden: HiddenStates | None = None,
    teacher_weight: HeadWeight | None = None,
    mask: Mask | None = None,
    *,
    bias: HeadBias | None = None,
    temperature: Temperature = 1.0,
    softcap: Number | None = None,
    logit_scale: Number = 1.0,
    vocab_mask: VocabMask | None = None,
    logits_dtype: torch.dtype = torch.float32,
    chunk_tokens: int | None = None,
    logits_budget: int | None = None,
    max_live_tokens: int | None = None,
    valid_vocab: int | None = None,
    process_group: "torch.distributed.ProcessGroup | None" = None,
    vocab_start: int | None = None,
    teacher_bias: HeadBias | None = None,
    teacher_softcap: Number | None = None,
    teacher_logit_scale: Number = 1.0,
    kind: DivergenceKind = "forward_kl",
    beta: float = 0.5,
    teacher_topk: TeacherTopk | None = None,
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    cu_seqlens: Offsets | None = None,
    normalizers: Normalizers | None = None,
    reduction: PolicyReduction = "aggregation",
    return_metrics: Literal[True],
) -> tuple[Scalar, Metrics]: ...


@overload
def linear_distillation_loss(
    hidden: HiddenStates,
    weight: HeadWeight,
    teacher_hidden: HiddenStates | None = None,
    teacher_weight: HeadWeight | None = None,
    mask: Mask | None = None,
    *,
    bias: HeadBias | None = None,
    temperature: Temperature = 1.0,
    softcap: Number | None = None,
    logit_scale: Number = 1.0,
    vocab_mask: VocabMask | None = None,
    logits_dtype: torch.dtype = torch.float32,
    chunk_tokens: int | None = None,
    logits_budget: int | None = None,
    max_live_tokens: int | None = None,
    valid_vocab: int | None = None,
    process_group: "torch.distributed.ProcessGroup | None" = None,
    vocab_start: int | None = None,
    teacher_bias: HeadBias | None = None,
    teacher_softcap: Number | None = None,
    teacher_logit_scale: Number = 1.0,
    kind: DivergenceKind = "forward_kl",
    beta: float = 0.5,
    teacher_topk: TeacherTopk | None = None,
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    cu_seqlens: Offsets | None = None,
    normalizers: Normalizers | None = None,
    reduction: PolicyReduction = "aggregation",
    return_metrics: bool,
) -> Scalar | tuple[Scalar, Metrics]: ...


@takes_one_row(2, per_token=True)
@same_on_every_rank
def linear_distillation_loss(
    hidden: HiddenStates,
    weight: HeadWeight,
    teacher_hidden: HiddenStates | None = None,
    teacher_weight: HeadWeight | None = None,
    mask: Mask | None = None,
    *,
    bias: HeadBias | None = None,
    temperature: Temperature = 1.0,
    softcap: Number | None = None,
    logit_scale: Number = 1.0,
    vocab_mask: VocabMask | None = None,
    logits_dtype: torch.dtype = torch.float32,
    chunk_tokens: int | None = None,
    logits_budget: int | None = None,
    max_live_tokens: int | None = None,
    valid_vocab: int | None = None,
    process_group: "torch.distributed.ProcessGroup | None" = None,
    vocab_start: int | None = None,
    teacher_bias: HeadBias | None = None,
    teacher_softcap: Number | None = None,
    teacher_logit_scale: Number = 1.0,
    kind: DivergenceKind = "forward_kl",
    beta: float = 0.5,
    teacher_topk: TeacherTopk | None = None,
    aggregation: Aggregation = "token-mean",
    weights: PerToken | None = None,
    cu_seqlens: Offsets | None = None,
    normalizers: Normalizers | None = None,
    reduction: PolicyReduction = "aggregation",
    return_metrics: bool = False,
) -> Scalar | tuple[Scalar, Metrics]:
    r"""Computes ``divergence_loss`` from the hidden states and the heads of both models, without ``[T, V]`` logits.

    ``sum_t w_t D(p_t, q_t)``, ``w`` the aggregation's weights, ``D`` of ``token_divergences``, ``p`` and ``q`` the
    softmax of each model's logits. Three matmuls of the student and one of the teacher, because the gradient is made in
    the forward. Logits of both models exist for a chunk of tokens at a time.

    Args:
        hidden, weight, bias: ``[..., H]``, ``[V, H]``, ``[V]`` of the student; all three get gradients where they
            require them.
        teacher_hidden, teacher_weight, teacher_bias: ``[..., H']``, ``[V', H']``, ``[V']`` of the teacher, without
            gradient; ``H'`` and the dtype may be others. Columns beyond the smaller of ``V`` and ``V'`` are padding of
            one vocabulary: they enter no matmul.
        mask, kind, beta, teacher_topk, aggregation, weights, cu_seqlens, normalizers, reduction: as for
            ``divergence_loss``; ``teacher_topk`` stands in place of the teacher's hidden states and head. A token of
            weight 0 enters no matmul. With ``"none"`` each token waits for its own upstream gradient, so that the
            backward multiplies the logits once more: four matmuls of the student and two of the teacher.
        temperature: of both models, as for ``divergence_loss``.
        vocab_mask: bool ``[V]`` or ``[..., V]``, True keeps a column, in both models; not with ``teacher_topk``.
        softcap, logit_scale, logits_dtype, chunk_tokens, max_live_tokens, valid_vocab: as for
            ``linear_token_logprobs``; ``logits_dtype`` and ``valid_vocab`` of both models.
        logits_budget: bytes for the logits of a chunk, of both models together.
        process_group, vocab_start: as for ``linear_token_logprobs``; the teacher's head is cut like the student's, and
            ``teacher_topk`` with ids of the whole vocabulary is the same on every rank.
        teacher_softcap, teacher_logit_scale: those of the teacher's head.

    Returns:
        Scalar, or one number per token, fp32 (fp64 for fp64 hidden states); with ``return_metrics``, ``(loss,
        {"divergence": ...})``.

    Raises:
        TypeError, ValueError, IndexError, RuntimeError: as ``linear_token_logprobs`` and ``divergence_loss``; neither
            or both teachers, or an option of a teacher's head without that head.

    Example:
        >>> hidden = torch.ones(1, 2, 3)
        >>> student, teacher = torch.zeros(2, 3), torch.tensor([[0.0, 0.0], [2.0, 0.0]])
        >>> round(linear_distillation_loss(hidden, student, torch.ones(1, 2, 2), teacher).item(), 4)
        0.3278
    """
    caller = "linear_distillation_loss"
    checks.flags(caller, return_metrics=return_metrics)
    one_teacher(caller, "teacher_hidden", teacher_hidden, teacher_topk)
    checks.floating(caller, "hidden", hidden)
    targets = torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device)
    chunk_tokens, logits_budget = (
        checks.positive_integer(caller, name, x)
        for name, x in (("chunk_tokens", chunk_tokens), ("logits_budget", logits_budget))
    )
    if teacher_topk is None:  # half of the budget is for the teacher
        checks.floating(caller, "weight", weight)
        # The rows of a shard that may differ in size are no number that all ranks share.
        of_sum = sum_bytes(weight, weight.shape[0]) if weight.dim() == 2 and vocab_start is None else 0
        logits_budget = max(1, budget_bytes(logits_budget, hidden.device.type, of_sum) // 2)
    options: HeadOptions = {
        "bias": bias,
        "temperature": temperature,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "ignore_index": DEAD,
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
    check_batch(caller, hidden)
    like = targets.new_empty(targets.shape, dtype=head.result_dtype())
    cu_seqlens = checks_tokens.rows(caller, "hidden without its last dimension", like, cu_seqlens, mask)
    live = live_tokens(caller, like, mask)
    numbers = kind_and_beta(caller, kind, beta)
    if teacher_topk is None:
        of_teacher: HeadOptions = {
            **options,
            "bias": teacher_bias,
            "temperature": 1.0,
            "softcap": teacher_softcap,
            "logit_scale": teacher_logit_scale,
            "vocab_mask": None,
            "valid_vocab": None if process_group is None else valid_vocab,
        }
        head, teacher = _two_heads(caller, head, hidden, teacher_hidden, teacher_weight, targets, of_teacher, numbers)
    else:
        if vocab_mask is not None:
            raise ValueError(f"{caller}: vocab_mask goes with teacher_hidden, got teacher_topk; leave it out")
        _refuse_head(caller, teacher_weight, teacher_bias, teacher_softcap, teacher_logit_scale)
        known = topk(caller, teacher_topk, live, head.vocab(), like)
        teacher = TeacherHead(None, None, None, None, 1.0, ops.Teacher(*known, *numbers))
    backend = ops.serving("divergence", head.hidden)
    if not summed(caller, reduction):
        losses_of_tokens(caller, live, aggregation, weights, normalizers)
        values = linear_divergences(*head.without(~live.reshape(-1)).flatten(), *_of_teacher(teacher), backend).view(
            like.shape
        )
        return (values, divergence_metrics(values, live.to(values.dtype))) if return_metrics else values
    per_token = head.per_row(loss_weights(caller, like, live, aggregation, weights, cu_seqlens, normalizers))
    terms = DivergenceTerms(teacher, per_token)
    if torch.compiler.is_compiling():
        loss, values = _compiled(head.without(~live.reshape(-1)), terms, backend)
    else:
        work = detached_for_loss(head, per_token != 0)
        loss, values, _ = differentiable(head, backend, _distilled, work, terms)
    return (loss, divergence_metrics(values, per_token)) if return_metrics else loss


def _two_heads(caller, head, hidden, teacher_hidden, teacher_weight, targets, options, numbers):
    """Checks the teacher's head and returns the student's LinearHead and a TeacherHead, of one vocabulary."""
    if teacher_weight is None:
        raise ValueError(f"{caller}: teacher_hidden came without teacher_weight; pass both")
    checks.floating(caller, "teacher_hidden", teacher_hidden)
    checks.head(caller, teacher_hidden, teacher_weight, options["bias"], "teacher_", hidden)
    no_gradient = {"teacher_hidden": teacher_hidden, "teacher_weight": teacher_weight, "teacher_bias": options["bias"]}
    checks.no_gradient(caller, **no_gradient)
    checks.one_device(caller, "hidden", hidden, **no_gradient)
    theirs = linear_head(f"{caller}, of the teacher", teacher_hidden, teacher_weight, targets, options)
    if theirs.logits_dtype != head.logits_dtype:
        raise TypeError(
            f"{caller}: hidden has dtype {head.hidden.dtype}, teacher_hidden {theirs.hidden.dtype}; cast one of them"
        )
    if head.shard != theirs.shard:
        raise ValueError(
            f"{caller}: over a process_group both heads are cut alike; weight has {weight_rows(head)}, teacher_weight "
            f"{weight_rows(theirs)}"
        )
    columns = min(head.weight.shape[0], theirs.weight.shape[0])
    (head, theirs) = (
        replaced(x, weight=x.weight[:columns], bias=None if x.bias is None else x.bias[:columns])
        if x.weight.shape[0] > columns
        else x
        for x in (head, theirs)
    )
    if head.vocab_mask is not None and head.shard is None:
        head = replaced(head, vocab_mask=head.vocab_mask[..., :columns].contiguous())
    head = replaced(head, chunk_rows=min(head.chunk_rows, theirs.chunk_rows))
    of_head = theirs.hidden, theirs.weight, theirs.bias, theirs.softcap, theirs.logit_scale
    return head, TeacherHead(*of_head, ops.Teacher(None, None, *numbers))


def weight_rows(head):
    """Returns the rows of a shard as an error names them."""
    return f"columns [{head.shard.start}, {head.shard.start + head.shard.columns}) of {head.shard.vocab}"


def _refuse_head(caller, weight, bias, softcap, logit_scale):
    """Raises ValueError for options of a teacher's head beside a teacher that has none."""
    for name, given in (
        ("teacher_weight", weight is not None),
        ("teacher_bias", bias is not None),
        ("teacher_softcap", softcap is not None),
        ("teacher_logit_scale", isinstance(logit_scale, torch.Tensor) or logit_scale != 1.0),
    ):
        if given:
            raise ValueError(f"{caller}: {name} belongs to teacher_hidden, got teacher_topk; leave it out")


def _in_common(head, terms):
    """Returns facts and a sum that all ranks must have alike: of the upstream gradients in a backward, else of the
    teacher.

    One of them, because the forward has compared the teacher, and a message between ranks has room for two sums.
    """
    if terms.upstream:
        size = terms.weight.double().abs().sum().item()
        return [], [("sizes of upstream gradients of divergences", size, size)]
    live, teacher = head.targets != head.ignore_index, terms.teacher
    if teacher.hidden is not None:
        return [], [("hidden states of the teacher", *sketch(teacher.hidden, live))]
    ids, logprobs = teacher.of[:2]
    used = live[:, None] & (logprobs > -torch.inf)
    return [("digest of the teacher's ids", pattern(used.view(-1), ids.view(-1)))], [
        ("probabilities of the teacher, each times a factor", *sketch(logprobs.exp(), live))
    ]


@torch.no_grad()
def _distilled(head, terms, backend, needs):
    """Returns the LossAndGradients of DivergenceTerms, chunk by chunk; its ``logp`` holds the divergences."""
    rows = live_rows(head.targets != head.ignore_index, head.max_live_tokens)
    teacher, projection = terms.teacher, None
    if head.shard is not None:
        compare_ranks(head, head.chunk_sizes(len(rows)), None, needs, False, lambda: _in_common(head, terms))
    loop = ChunkLoop(head, needs, [len(rows)], backend, terms, keeps=True)
    if teacher.hidden is not None:
        projection = HeadProjection(teacher.beside(head), loop.projection.rows, backend)
    for part in loop.parts(rows):
        logits, hidden = loop.logits(part)
        theirs = None if projection is None else projection.logits(part.hidden(teacher.hidden))[: len(part)]
        batch = RowBatch(logits, *head.row_arguments(part), theirs)
        ids, logprobs = (x if x is None else x[part.index] for x in teacher.of[:2])
        weight = part.select(terms.weight)
        scaled = loop.scaled(weight) if any(needs) else None
        out = loop.projection.gradient_buffer(logits) if any(needs) else None
        of_rows = ops.Teacher(ids, logprobs, teacher.of.kind, teacher.of.beta)
        if head.shard is None:
            found = ops.run_divergence(backend, batch, of_rows, scaled, out)
        elif ids is not None:
            found = vocab_parallel.topk_divergence(head.shard, backend, batch, of_rows, scaled, out)
        else:
            found = vocab_parallel.divergence(head.shard, batch, of_rows[2:], scaled, out)
        loop.loss += ops.weighted(found.value, weight)
        loop.logp[part.index] = found.value
        if any(needs):
            loop.add(part, out, logits, hidden, weight != 0)
    return loop.result()


def _compiled(head, terms, backend):
    """Returns the loss and the divergences ``[T]`` by a registered op, which a compiled program needs."""
    needs = [
        x is not None and x.requires_grad and torch.is_grad_enabled() for x in (head.hidden, head.weight, head.bias)
    ]
    return linear_divergence(*head.flatten(), *_of_teacher(terms.teacher), terms.weight, *needs, False, backend)[:2]


def _of_teacher(teacher):
    """Returns a TeacherHead as arguments of a registered op, in the order of OF_TEACHER."""
    softcap = None if teacher.softcap is None else ops.number(teacher.softcap)
    return *teacher[:3], softcap, ops.number(teacher.logit_scale), *teacher.of[:3], ops.number(teacher.of.beta)


def _unflatten(operands):
    """Returns the LinearHead and the TeacherHead that the arguments of a registered op stand for."""
    count = len(operands) - OF_TEACHER.count(", ") - 1
    hidden, weight, bias, softcap, scale, *of_teacher = operands[count:]
    beta = value(of_teacher.pop())
    teacher = TeacherHead(hidden, weight, bias, value(softcap), value(scale), ops.Teacher(*of_teacher, beta))
    return LinearHead.unflatten(operands[:count]), teacher


def _linear_divergence(*arguments):
    *operands, weight, need_hidden, need_weight, need_bias, upstream, backend = arguments
    head, teacher = _unflatten(operands)
    needs = need_hidden, need_weight, need_bias
    with without_autocast(head.hidden.device.type):
        work = detached_for_loss(head, weight != 0)
        found = _distilled(work, DivergenceTerms(teacher, weight, upstream), backend, needs)
    nothing = (torch.empty_like(found.logp[:0]) for _ in needs)
    return found.loss, found.logp, *(n if g is None else g for g, n in zip(found.gradients, nothing, strict=True))


def _fake(hidden, weight, bias, targets, *rest):
    *_, per_token, need_hidden, need_weight, need_bias, _, _ = rest
    real = per_token.dtype
    shapes = ((), targets.shape, hidden.shape, weight.shape, weight.shape[:1])
    present = (True, True, need_hidden, need_weight, need_bias)
    return tuple(hidden.new_empty(shape if p else (0,), dtype=real) for shape, p in zip(shapes, present, strict=True))


def _setup(ctx, inputs, output):
    _, values, *gradients = output
    ctx.mark_non_differentiable(values, *gradients)
    ctx.set_materialize_grads(False)
    ctx.dtypes = [x if x is None else x.dtype for x in inputs[:3]]
    ctx.save_for_backward(*gradients)


def _gradient(ctx, dloss, *_):
    needs = ctx.needs_input_grad
    if dloss is None:
        return (None,) * len(needs)
    trained = (
        (gradient * dloss).to(dtype) if need else None
        for gradient, dtype, need in zip(ctx.saved_tensors, ctx.dtypes, needs[:3], strict=True)
    )
    return *trained, *(None,) * (len(needs) - 3)


def _linear_divergences(*arguments):
    *operands, backend = arguments
    head, teacher = _unflatten(operands)
    with without_autocast(head.hidden.device.type):
        live = head.targets != head.ignore_index
        terms = DivergenceTerms(teacher, live.to(head.result_dtype()))
        return _distilled(detached_for_loss(head, live), terms, backend, (False, False, False)).logp


def _values_fake(hidden, weight, bias, targets, *rest):
    return hidden.new_empty(targets.shape, dtype=real_dtype(hidden.dtype))


def _values_setup(ctx, inputs, output):
    *operands, ctx.backend = inputs
    ctx.tensors = [i for i, x in enumerate(operands) if isinstance(x, torch.Tensor)]
    ctx.save_for_backward(*(operands[i] for i in ctx.tensors))
    ctx.rest = [None if isinstance(x, torch.Tensor) else x for x in operands]


def _values_gradient(ctx, dvalues):
    needs, operands = ctx.needs_input_grad, list(ctx.rest)
    for i, x in zip(ctx.tensors, ctx.saved_tensors, strict=True):
        operands[i] = x
    *_, dhidden, dweight, dbias = linear_divergence(*operands, dvalues.contiguous(), *needs[:3], True, ctx.backend)
    trained = (
        x.to(operand.dtype) if need else None
        for x, operand, need in zip((dhidden, dweight, dbias), operands[:3], needs[:3], strict=True)
    )
    return *trained, *(None,) * (len(needs) - 3)


OF_TEACHER = (
    "Tensor? teacher_hidden, Tensor? teacher_weight, Tensor? teacher_bias, Tensor? teacher_softcap, "
    "Tensor teacher_logit_scale, Tensor? teacher_ids, Tensor? teacher_logprobs, str kind, Tensor beta"
)
"""The schema of ``_of_teacher``."""
linear_divergence = ops.define(
    "linear_divergence",
    f"({OPERANDS}, {OF_TEACHER}, Tensor per_token, bool need_hidden, bool need_weight, bool need_bias, "
    "bool upstream, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _linear_divergence,
    _fake,
    _gradient,
    _setup,
)
linear_divergences = ops.define(
    "linear_divergences",
    f"({OPERANDS}, {OF_TEACHER}, str backend) -> Tensor",
    _linear_divergences,
    _values_fake,
    _values_gradient,
    _values_setup,
)
