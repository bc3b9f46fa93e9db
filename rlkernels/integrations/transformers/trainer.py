"""``transformers.Trainer`` without logits: the model's own loss of deferred logits, or a ``compute_loss_func``."""

from typing import Any

import torch
from torch import Tensor, nn

from rlkernels import checks
from rlkernels.integrations.transformers import output_head
from rlkernels.integrations.transformers.attached import host, models
from rlkernels.integrations.transformers.deferred_logits import DeferredLogits
from rlkernels.linear.sft_loss import linear_sft_loss
from rlkernels.losses.sft import sft_loss
from rlkernels.packing import shift_targets
from rlkernels.types import Normalizers, Scalar, Targets


class _Attached:
    """The hooks of one attached model, which say during its forward whether its head defers."""

    def __init__(self, model: nn.Module, head: nn.Module, evaluation: bool):
        self.evaluation, self.head = evaluation, head
        self.tokens: list[Any] = []
        self.handles = [
            model.register_forward_pre_hook(self.before, with_kwargs=True),
            model.register_forward_hook(self.after, always_call=True),
        ]

    def before(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        wanted = torch.is_grad_enabled() if model.training else self.evaluation and kwargs.get("labels") is not None
        self.tokens.append(output_head.deferring.set(wanted or output_head.deferring.get()))

    def after(self, model: nn.Module, args: Any, outputs: Any) -> None:
        output_head.deferring.reset(self.tokens.pop())


ATTACHED = "_rlkernels_attached"
"""The attribute of an attached model; on the model, so that a deep copy has its own."""


def attach(model: nn.Module, *, evaluation: bool = False) -> nn.Module:
    """Lets a model compute its own loss without logits, while it is trained.

    The model's forward and its ``loss_function`` stay. Where they take ``cross_entropy`` of the logits,
    ``linear_sft_loss`` serves it. So the shift, ``num_items_in_batch``, auxiliary losses and gradient accumulation
    stay with model and trainer. Under ``Trainer`` attach the model before or after the trainer is built. Without
    labels the result's ``logits`` are deferred, for ``compute_loss_func``.

    Args:
        model: as for ``hidden_and_head``. It defers its logits in forwards of ``model.train()`` with gradients. Under
            ``no_grad``, as in ``generate``, they are computed. An unknown operation on deferred logits raises.
        evaluation: also in evaluation where ``labels`` are given. Then ask ``Trainer`` for
            ``prediction_loss_only=True``, because metrics need logits.

    Returns:
        ``model``. Attaching twice changes ``evaluation`` alone. ``rlkernels.status()["transformers"]`` counts the
        losses.

    Raises:
        TypeError: a model without a linear head, or in FSDP1 or DataParallel.
        RuntimeError: somebody else replaced the forward of the head.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        >>> model, ids = LlamaForCausalLM(LlamaConfig(vocab_size=11, **sizes)), torch.tensor([[1, 2, 3]])
        >>> stock = model.train()(ids, labels=ids).loss
        >>> loss = attach(model)(ids, labels=ids).loss
        >>> torch.allclose(loss, stock)
        True
        >>> detach(model)
    """
    caller = "attach"
    evaluation = checks.flag(caller, "evaluation", evaluation)
    inside = output_head.unwrapped(caller, model)
    attached = vars(inside).get(ATTACHED)
    if attached is not None:
        attached.evaluation = evaluation
        return model
    head = output_head.output_head(caller, inside)
    output_head.head_operands(head, type(inside).__name__)  # refuses a head of an unknown kind now
    if output_head.installed(head) is not None:
        raise RuntimeError(f"{caller}: the head of {type(inside).__name__} is attached already, through another module")
    output_head.install(caller, head, type(inside).__name__)
    setattr(inside, ATTACHED, _Attached(inside, head, evaluation))
    models.add(inside)
    return model


def detach(model: nn.Module) -> None:
    """Removes what ``attach`` put on a model; does nothing where it put nothing."""
    inside = output_head.unwrapped("detach", model)
    attached = vars(inside).pop(ATTACHED, None)
    if attached is not None:
        models.discard(inside)
        for handle in attached.handles:
            handle.remove()
        output_head.uninstall(attached.head)


def compute_loss_func(
    outputs: Any,
    labels: Targets,
    num_items_in_batch: int | Tensor | None = None,
    *,
    shift: bool = True,
    aux_loss_coef: float | None = None,
    **options: Any,
) -> Scalar:
    r"""Computes ``sft_loss`` of a model's result, as the ``compute_loss_func`` of ``transformers.Trainer``.

    ``sum_t loss_t / num_items_in_batch``, so that the micro-batches of an accumulated step add up to the whole batch.
    Of an attached model no logits are held. Of any other model the logits exist, and each row is read once.

    Args:
        outputs: what the model returned, with ``logits``.
        labels: ``[B, L]``, -100 where none is scored; position ``t`` holds the token itself.
        num_items_in_batch: labels of all micro-batches and ranks of the step; None divides by those of this one.
        shift: row ``t`` predicts label ``t + 1``; False for an encoder-decoder, and for labels shifted already.
        aux_loss_coef: the factor of ``outputs.aux_loss``, the loss of a router; must be given where a model has one.
        options: keywords of ``sft_loss`` and ``linear_sft_loss``: ``kind="dft"``, ``z_loss_coef``, ``temperature``;
            by ``functools.partial``.

    Returns:
        Scalar, fp32.

    Raises:
        TypeError: no labels; an ``aux_loss`` without a coefficient; an option that the loss does not know.
        ValueError: labels of another shape than the rows of the logits; as the losses.
        RuntimeError: an attached model under ZeRO-3, which must compute its own loss.

    Example:
        >>> from types import SimpleNamespace
        >>> outputs = SimpleNamespace(logits=torch.zeros(1, 3, 4))
        >>> round(compute_loss_func(outputs, torch.tensor([[0, 1, 2]]), num_items_in_batch=4).item(), 4)  # 2 log(4) / 4
        0.6931
    """
    caller = "compute_loss_func"
    shift = checks.flag(caller, "shift", shift)
    if not isinstance(labels, Tensor):
        raise TypeError(
            f"{caller}: labels is {type(labels).__name__}, expected a tensor [B, L]; the batch has no labels"
        )
    logits = getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor | DeferredLogits):
        raise TypeError(f"{caller}: outputs has no logits, got {type(outputs).__name__}")
    checks.shape(caller, "labels", labels, logits.shape[:-1])
    if labels.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{caller}: labels must be int32 or int64, got {labels.dtype}")
    if shift and labels.dim() != 2:
        raise ValueError(
            f"{caller}: labels has shape {tuple(labels.shape)}, expected [B, L]; pass shift=False for labels that are "
            "shifted already"
        )
    taken = {"aggregation", "normalizers"} & options.keys()
    if taken:
        raise TypeError(f"{caller}: {sorted(taken)} are the trainer's, which passes num_items_in_batch")
    normalizers = None if num_items_in_batch is None else Normalizers(batch_num_tokens=num_items_in_batch)
    targets = (shift_targets(labels) if shift else labels).to(logits.device)
    if isinstance(logits, DeferredLogits):
        logits.check_backward(caller)
        head = logits.head()
        with output_head.without_autocast(logits.device.type):
            loss = linear_sft_loss(**head, targets=targets, normalizers=normalizers, **options)
        host.served("compute_loss_func")
    else:
        loss = sft_loss(logits, targets, normalizers=normalizers, **options)
    aux_loss = getattr(outputs, "aux_loss", None)
    if aux_loss is None:
        return loss
    if aux_loss_coef is None:
        raise TypeError(
            f"{caller}: the model returned an aux_loss; pass aux_loss_coef, which its own loss takes from "
            "config.router_aux_loss_coef, or 0.0"
        )
    aux_loss_coef = checks.finite(caller, "aux_loss_coef", aux_loss_coef)
    return loss + aux_loss_coef * aux_loss.to(loss.device) if aux_loss_coef else loss
