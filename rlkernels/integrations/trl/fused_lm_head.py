"""``add_fused_lm_head``: a causal language model that returns log-probabilities of its labels instead of logits."""

import functools
import types
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from rlkernels.integrations.trl.functions import OUTPUTS, ChunkedLogProbFunction

CHUNK = 32768
FIELDS = ("log_probs", *OUTPUTS)


@functools.cache
def output_class() -> type:
    """Returns ``FusedCausalLMOutput``, with the fields of TRL's; made here because its base is transformers'."""
    from dataclasses import make_dataclass

    from transformers.utils import ModelOutput

    fields = [(name, Any, None) for name in ("loss", *FIELDS, "label_mask", "aux_loss")]
    return make_dataclass("FusedCausalLMOutput", fields, bases=(ModelOutput,))


def add_fused_lm_head(
    model: Any, temperature: float = 1.0, cast_lm_head_to_fp32: bool = False, outputs: tuple[str, ...] = ("log_probs",)
) -> None:
    """Adds ``fused_lm_head=True`` to the forward of ``model``: with it, and ``labels=``, no logits come to be.

    ``model(input_ids, labels=labels, fused_lm_head=True)`` returns an object with ``loss``, ``log_probs``, ``entropy``,
    ``log_sum_sq_probs``, ``mean_logits``, ``is_top1``, ``label_mask`` and ``aux_loss``. Fields of tokens are
    ``[B, S - 1]``, 0 where the label is -100 and None where ``outputs`` does not name them. Without the argument the
    forward is the model's own, so generation is unchanged. ``shift_labels=`` is scored without shifting, ``[B, S]``.

    ``loss = -sum log_probs / n``, ``n`` the number of labels or ``num_items_in_batch``, and with router logits
    ``+ router_aux_loss_coef aux_loss``. A micro-batch of masked labels gives a differentiable 0.

    Softcap and scale of the logits come from the model's configuration. A head that is a DTensor is gathered, and a
    LoRA on the head counts: its update is added to the weight and gets its gradient. Called again, the function
    replaces the settings.

    Args:
        model: a causal language model of transformers.
        temperature: the logits are divided by it.
        cast_lm_head_to_fp32: runs the head in fp32, outside autocast. Without it the logits are fp32 sums of the head's
            own dtype.
        outputs: the fields to compute; ``log_probs`` always is.

    Raises:
        ValueError: an unknown output; at the call, neither ``labels`` nor ``shift_labels``, or a head without elements.
        TypeError: at the call, a head that is no linear layer, or an adapter on it that is not a plain LoRA.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes))
        >>> add_fused_lm_head(model, outputs=("log_probs", "entropy"))
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> model(ids, labels=ids, fused_lm_head=True).entropy.shape
        torch.Size([1, 2])
    """
    unknown = [name for name in outputs if name not in FIELDS]
    if unknown:
        raise ValueError(f"add_fused_lm_head: unknown outputs {unknown}; known are {list(FIELDS)}")
    own = getattr(model.forward, "rlkernels_own_forward", model.forward)
    text = model.config.get_text_config()
    softcap, scale = getattr(text, "final_logit_softcapping", None), logit_scale(text)

    @functools.wraps(type(model).forward)
    def forward(
        self: Any,
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head:
            further = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            return own(*args, **kwargs, **{name: x for name, x in further.items() if x is not None})
        if labels is None and shift_labels is None:
            raise ValueError("add_fused_lm_head: fused_lm_head=True needs labels or shift_labels, got neither")
        if getattr(text, "output_router_logits", False):
            kwargs.setdefault("output_router_logits", True)
        found = self.base_model(*args, **{**kwargs, "use_cache": False})
        hidden = found.last_hidden_state
        if shift_labels is None:
            assert labels is not None
            hidden, shift_labels = hidden[:, :-1], labels[:, 1:]
        per_token = _score(self.get_output_embeddings(), hidden, shift_labels)
        mask = per_token.pop("label_mask")
        count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss, aux_loss = -per_token["log_probs"].sum() / count, None
        if kwargs.get("output_router_logits"):
            aux_loss = _router_loss(text, found.router_logits, kwargs.get("attention_mask"))
            loss = loss + getattr(text, "router_aux_loss_coef", 0.0) * aux_loss
        return output_class()(loss=loss, **per_token, label_mask=mask, aux_loss=aux_loss)

    def _score(head: Any, hidden: Tensor, labels: Tensor) -> dict[str, Any]:
        weight, bias = head_weight(head)
        hidden, labels = hidden.to(weight.device), labels.to(weight.device)
        mask = labels != -100
        context: Any = nullcontext()
        if cast_lm_head_to_fp32:
            hidden, context = hidden.float(), torch.autocast(hidden.device.type, enabled=False)
        with context:
            # Masked labels are -100, which our function does not read.
            found = ChunkedLogProbFunction.apply(
                hidden.reshape(-1, hidden.shape[-1]),
                weight,
                bias,
                labels.reshape(-1),
                temperature,
                CHUNK,
                softcap,
                scale,
                outputs,
            )
        shaped = (None if x is None else x.view(mask.shape) for x in found)
        return {**dict(zip(FIELDS, shaped, strict=True)), "label_mask": mask}

    forward.rlkernels_own_forward = own  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)


def logit_scale(config: Any) -> float:
    """Returns the factor by which a model of transformers multiplies its logits, from its text configuration."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):  # Cohere, Muse Glimmer, Falcon-H1
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    # Granite and MiniCPM3 divide by what HyperCLOVA X multiplies by.
    return float(scaling) if config.model_type == "hyperclovax" else 1.0 / float(scaling)


def head_weight(head: Any) -> tuple[Tensor, Tensor | None]:
    """Returns the weight and the bias of a head, gathered, with the update of a LoRA.

    Raises:
        TypeError: the head is no linear layer, or carries another adapter, whose effect its weight does not show.
    """
    base = head.get_base_layer() if hasattr(head, "get_base_layer") else head
    if not isinstance(base, torch.nn.Linear):
        raise TypeError(f"add_fused_lm_head: the head is a {type(base).__name__}, expected torch.nn.Linear")
    weight, bias = (x.full_tensor() if isinstance(x, DTensor) else x for x in (base.weight, base.bias))
    if base is head or head.merged or head.disable_adapters:
        return weight, bias
    if not hasattr(head, "lora_A") or any(head.use_dora.values()):
        raise TypeError(f"add_fused_lm_head: the head has a {type(head).__name__}; only a plain LoRA is known")
    for name in head.active_adapters:
        if name in head.lora_A:
            if head.training and not isinstance(head.lora_dropout[name], torch.nn.Identity):
                raise TypeError("add_fused_lm_head: a LoRA on the head must have lora_dropout=0, got a dropout")
            weight = weight + head.get_delta_weight(name)
    return weight, bias


def _router_loss(config: Any, router_logits: Any, attention_mask: Tensor | None) -> Tensor:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    experts = getattr(config, "num_experts", None) or config.num_local_experts
    return load_balancing_loss_func(router_logits, experts, config.num_experts_per_tok, attention_mask)
