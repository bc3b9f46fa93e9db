"""The head of a model: which module it is, which matrix it multiplies, and a stand-in that does not multiply."""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rlkernels.integrations.transformers.deferred_logits import DeferredLogits
from rlkernels.linear.head import without_autocast

WRAPPERS = {"DistributedDataParallel": "module", "OptimizedModule": "_orig_mod", "DeepSpeedEngine": "module"}
"""Modules around a model, and where they keep it."""
REFUSED = {
    "FullyShardedDataParallel": "shard it by torch.distributed.fsdp.fully_shard (FSDP2)",
    "DataParallel": "start one process per device, with DistributedDataParallel",
}
"""Modules around a model that we do not look into, and what to do."""

deferring: ContextVar[bool] = ContextVar("rlkernels_deferring", default=False)
"""The switch of all heads that have our forward: they defer their logits while it is on."""


def unwrapped(caller: str, model: nn.Module) -> nn.Module:
    """Returns the model within the wrappers of data parallelism and compilation.

    Raises:
        TypeError: no module, or a wrapper that is refused.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model must be a torch.nn.Module, got {type(model).__name__}")
    while True:
        name = type(model).__name__
        if name in REFUSED:
            raise TypeError(f"{caller}: model is in {name}; {REFUSED[name]}")
        if name not in WRAPPERS:
            return model
        model = getattr(model, WRAPPERS[name])


def output_head(caller: str, model: nn.Module) -> nn.Module:
    """Returns the module whose result the model calls logits.

    Raises:
        TypeError: the model says of none that it is its output embedding.
    """
    inside = unwrapped(caller, model)
    find = getattr(inside, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if not isinstance(head, nn.Module):
        raise TypeError(
            f"{caller}: {type(inside).__name__} has no output embedding (get_output_embeddings() gives "
            f"{type(head).__name__}); expected a model with a language-model head, such as a *ForCausalLM"
        )
    return head


def head_operands(head: nn.Module, owner: str) -> tuple[Tensor, Tensor | None]:
    """Returns weight ``[V, H]`` and bias of the matrix that ``head`` multiplies, with adapters merged.

    Raises:
        TypeError: the head is not a linear function of its input that we know.
    """
    kind = type(head).__name__
    if "peft" in sys.modules:  # where it is not imported, nothing is of it
        if isinstance(head, importlib.import_module("peft.utils.other").ModulesToSaveWrapper):
            inactive = head.disable_adapters or not head.active_adapters
            saved = head.original_module if inactive else head.modules_to_save[head.active_adapters[0]]
            return head_operands(saved, owner)
        if isinstance(head, importlib.import_module("peft.tuners.lora").Linear):
            return _merged(head, owner)
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise TypeError(
            f"{owner}: the head is a {type(head).__module__}.{kind}, known are torch.nn.Linear, and LoRA and "
            "modules_to_save of peft around it"
        )
    return _whole(head.weight), None if head.bias is None else _whole(head.bias)


def _merged(head: Any, owner: str) -> tuple[Tensor, Tensor | None]:
    """Merges the active LoRA adapters of a head, differentiable in their matrices.

    A merged matrix costs ``[V, H]`` once per call; the head itself multiplies twice.
    """
    weight, bias = head_operands(head.base_layer, owner)
    if head.disable_adapters and head.merged:
        raise TypeError(f"{owner}: the head's adapters are merged and disabled; call unmerge_adapter() first")
    if head.disable_adapters or head.merged:
        return weight, bias
    with without_autocast(weight.device.type):
        for adapter in head.active_adapters:
            if adapter not in head.lora_A:
                continue
            if adapter in head.lora_variant:
                raise TypeError(f"{owner}: adapter {adapter!r} of the head is no plain LoRA, and cannot be merged here")
            if getattr(head.lora_dropout[adapter], "p", 0.0) and head.training:
                raise TypeError(
                    f"{owner}: adapter {adapter!r} of the head has dropout, which a merged matrix does not have; set "
                    "lora_dropout=0 for the head, or leave the head out of target_modules"
                )
            if head.lora_B[adapter].bias is not None:
                raise TypeError(f"{owner}: adapter {adapter!r} of the head has a bias of its own (lora_bias)")
            weight = weight + head.get_delta_weight(adapter).to(weight.dtype)
    return weight, bias


def _whole(parameter: Tensor) -> Tensor:
    """Returns a parameter, gathered where a tensor-parallel head holds its rows only.

    Within a forward FSDP2 has gathered its parameters, so that a DTensor is one of tensor parallelism. There all ranks
    compute the same loss, which is what the gradient of ``full_tensor`` takes for granted.
    """
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _deferred(head: nn.Module, owner: str, hidden: Tensor) -> DeferredLogits:
    """Returns what stands for the logits of ``hidden``, with the operands that the head would multiply now."""
    weight, bias = head_operands(head, owner)
    if isinstance(hidden, DTensor):
        hidden = hidden.full_tensor()
    kind = hidden.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight = _cast(hidden, dtype), _cast(weight, dtype)
        bias = None if bias is None else _cast(bias, dtype)
    partitioned = any(hasattr(parameter, "ds_id") for parameter in head.parameters())
    return DeferredLogits(hidden, weight, bias, owner, hidden.dtype, partitioned=partitioned)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Casts as autocast does, which leaves fp64 as it is."""
    return x if x.dtype == torch.float64 else x.to(dtype)


class DeferringForward:
    """The forward of a head that defers its logits while ``deferring`` says so, and is the head's own otherwise.

    Attributes:
        head, owner: the module, and the name of its model.
        before: the forward that tensor parallelism gave to this head, None where it has that of its class.
    """

    def __init__(self, head: nn.Module, owner: str, before: Any = None):
        self.head, self.owner, self.before = head, owner, before

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not deferring.get():
            if self.before is not None:
                return self.before(hidden, *args, **kwargs)
            return type(self.head).forward(self.head, hidden, *args, **kwargs)
        if args or kwargs:
            raise TypeError(f"{self.owner}: the model passes its head more than hidden states: {len(args)} {[*kwargs]}")
        return _deferred(self.head, self.owner, hidden)


def installed(head: nn.Module) -> DeferringForward | None:
    """Returns our forward where the head has it."""
    forward = vars(head).get("forward")
    return forward if isinstance(forward, DeferringForward) else None


def install(caller: str, head: nn.Module, owner: str) -> DeferringForward:
    """Gives the head our forward.

    Raises:
        RuntimeError: somebody else replaced the head's forward.
    """
    found = installed(head)
    if found is not None:
        return found
    before = vars(head).get("forward")
    if before is not None and not _is_tensor_parallel(before):
        raise RuntimeError(
            f"{caller}: the forward of {owner}'s head was replaced by {vars(head)['forward']!r}; undo that first"
        )
    head.forward = DeferringForward(head, owner, before)
    return head.forward


def _is_tensor_parallel(forward: Any) -> bool:
    """Says whether transformers put this forward on a module to shard it (``tp_plan``).

    It casts inputs to DTensor and gathers the result. Deferred logits need neither, because ``head_operands`` gathers
    the weight.
    """
    place = f"{getattr(forward, '__module__', '')}.{getattr(forward, '__qualname__', '')}"
    return place == "transformers.distributed.tensor_parallel.TensorParallelLayer.install_forward.<locals>.tp_forward"


def uninstall(head: nn.Module) -> None:
    """Takes our forward away, and gives that of tensor parallelism back."""
    found = installed(head)
    if found is not None:
        del head.forward
        if found.before is not None:
            head.forward = found.before


@contextlib.contextmanager
def deferred_head(caller: str, model: nn.Module) -> Iterator[None]:
    """Lets the head of ``model`` defer its logits within the context."""
    head = output_head(caller, model)
    before = installed(head)
    install(caller, head, type(unwrapped(caller, model)).__name__)
    token = deferring.set(True)
    try:
        yield
    finally:
        deferring.reset(token)
        if before is None:
            uninstall(head)
