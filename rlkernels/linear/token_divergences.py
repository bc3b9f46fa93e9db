"""The divergence of each token from the hidden states and the heads of both models, for any upstream gradient.

The forward keeps one number per token. The backward makes the logits of each chunk again, because only then the
upstream gradient is known: four matmuls of the student and two of the teacher.
"""

import torch

from rlkernels import checks, ops
from rlkernels.linear.chunked_loss import detached_for_loss
from rlkernels.linear.chunking import budget_bytes
from rlkernels.linear.distillation_loss import DivergenceTerms, TeacherHead, distilled, two_heads
from rlkernels.linear.head import OPERANDS, HeadOptions, LinearHead, linear_head, without_autocast
from rlkernels.losses.divergence import DEAD, kind_and_beta
from rlkernels.losses.token_weights import live_tokens
from rlkernels.tracing import value
from rlkernels.types import DivergenceKind, HeadBias, HeadWeight, HiddenStates, Mask, Number, PerToken, Temperature


def linear_token_divergences(
    hidden: HiddenStates,
    weight: HeadWeight,
    teacher_hidden: HiddenStates,
    teacher_weight: HeadWeight,
    mask: Mask | None = None,
    *,
    bias: HeadBias | None = None,
    temperature: Temperature = 1.0,
    softcap: Number | None = None,
    logit_scale: Number = 1.0,
    logits_dtype: torch.dtype = torch.float32,
    chunk_tokens: int | None = None,
    logits_budget: int | None = None,
    teacher_bias: HeadBias | None = None,
    teacher_softcap: Number | None = None,
    teacher_logit_scale: Number = 1.0,
    kind: DivergenceKind = "forward_kl",
    beta: float = 0.5,
) -> PerToken:
    r"""Computes ``token_divergences`` from the hidden states and the heads of both models, without ``[T, V]`` logits.

    ``linear_distillation_loss`` takes one matmul less of the student and one less of the teacher, where the weights of
    the tokens are known before.

    Args:
        hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, temperature, softcap, logit_scale,
            logits_dtype, chunk_tokens, logits_budget, teacher_softcap, teacher_logit_scale: as for
            ``linear_distillation_loss``.
        mask, kind, beta: as for ``token_divergences``. A dead token enters no matmul.

    Returns:
        Tensor ``[...]``, fp32 (fp64 for fp64 hidden states), differentiable once in ``hidden``, ``weight``, ``bias``.

    Raises:
        TypeError, ValueError: as ``linear_distillation_loss``.

    Example:
        >>> student, teacher = torch.zeros(2, 3), torch.tensor([[0.0, 0.0], [2.0, 0.0]])
        >>> linear_token_divergences(torch.ones(1, 3), student, torch.ones(1, 2), teacher)
        tensor([0.3278])
    """
    caller = "linear_token_divergences"
    checks.floating(caller, "hidden", hidden)
    checks.tensor(caller, "teacher_hidden", teacher_hidden)
    targets = torch.zeros(hidden.shape[:-1], dtype=torch.int64, device=hidden.device)
    chunk_tokens, logits_budget = (
        checks.positive_integer(caller, name, x)
        for name, x in (("chunk_tokens", chunk_tokens), ("logits_budget", logits_budget))
    )
    options: HeadOptions = {
        "bias": bias,
        "temperature": temperature,
        "softcap": softcap,
        "logit_scale": logit_scale,
        "ignore_index": DEAD,
        "vocab_mask": None,
        "logits_dtype": logits_dtype,
        "chunk_tokens": chunk_tokens,
        "logits_budget": max(1, budget_bytes(logits_budget, hidden.device.type) // 2),  # half is for the teacher
        "max_live_tokens": None,
        "valid_vocab": None,
        "process_group": None,
        "vocab_start": None,
    }
    head = linear_head(caller, hidden, weight, targets, options)
    live = live_tokens(caller, targets.new_empty(targets.shape, dtype=head.result_dtype()), mask)
    of_teacher: HeadOptions = {
        **options,
        "bias": teacher_bias,
        "temperature": 1.0,
        "softcap": teacher_softcap,
        "logit_scale": teacher_logit_scale,
    }
    numbers = kind_and_beta(caller, kind, beta)
    head, teacher = two_heads(caller, head, hidden, teacher_hidden, teacher_weight, targets, of_teacher, numbers)
    softcap = None if teacher.softcap is None else ops.number(teacher.softcap)
    operands = *teacher[:3], softcap, ops.number(teacher.logit_scale), numbers[0], ops.number(numbers[1])
    backend = ops.serving("divergence", head.hidden)
    return divergences(*head.without(~live.reshape(-1)).flatten(), *operands, backend).view(targets.shape)


def _operands(arguments):
    """Returns the LinearHead and the TeacherHead that the operands of a registered op stand for."""
    *of_head, hidden, weight, bias, softcap, scale, kind, beta, _ = arguments
    of = ops.Teacher(None, None, kind, value(beta))
    return LinearHead.unflatten(of_head), TeacherHead(hidden, weight, bias, value(softcap), value(scale), of)


def _run(arguments, per_token, needs):
    head, teacher = _operands(arguments)
    with without_autocast(head.hidden.device.type):
        live = head.targets != head.ignore_index
        per_token = live.to(head.result_dtype()) if per_token is None else torch.where(live, per_token, 0.0)
        work = detached_for_loss(head, per_token != 0)
        return distilled(work, DivergenceTerms(teacher, per_token), arguments[-1], needs)


def _forward(*arguments):
    return _run(arguments, None, (False, False, False)).logp


def _fake(hidden, weight, bias, targets, *rest):
    real = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return hidden.new_empty(targets.shape, dtype=real)


def _setup(ctx, inputs, output):
    ctx.places = [place for place, x in enumerate(inputs) if isinstance(x, torch.Tensor)]
    ctx.rest = [None if isinstance(x, torch.Tensor) else x for x in inputs]
    ctx.save_for_backward(*(inputs[place] for place in ctx.places))


def _gradient(ctx, dvalues):
    needs = ctx.needs_input_grad
    arguments = list(ctx.rest)
    for place, x in zip(ctx.places, ctx.saved_tensors, strict=True):
        arguments[place] = x
    gradients = divergences_backward(dvalues.contiguous(), *needs[:3], *arguments)
    trained = (g if need else None for g, need in zip(gradients, needs[:3], strict=True))
    return *trained, *(None,) * (len(needs) - 3)


def _backward(dvalues, need_hidden, need_weight, need_bias, *arguments):
    found = _run(arguments, dvalues, (need_hidden, need_weight, need_bias))
    operands = arguments[:3]
    return tuple(
        dvalues.new_empty(0) if g is None else g.to(x.dtype) for g, x in zip(found.gradients, operands, strict=True)
    )


def _backward_fake(dvalues, need_hidden, need_weight, need_bias, hidden, weight, bias, *rest):
    shapes = zip((hidden, weight, bias), (need_hidden, need_weight, need_bias), strict=True)
    return tuple(x.new_empty(x.shape) if need else dvalues.new_empty(0) for x, need in shapes)


ALL = (
    f"{OPERANDS}, Tensor teacher_hidden, Tensor teacher_weight, Tensor? teacher_bias, Tensor? teacher_softcap, "
    "Tensor teacher_logit_scale, str kind, Tensor beta, str backend"
)
divergences = ops.define("linear_token_divergences", f"({ALL}) -> Tensor", _forward, _fake, _gradient, _setup)
divergences_backward = ops.define(
    "linear_token_divergences_backward",
    f"(Tensor dvalues, bool need_hidden, bool need_weight, bool need_bias, {ALL}) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
