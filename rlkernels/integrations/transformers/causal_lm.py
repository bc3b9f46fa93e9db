"""Hidden states and head of any model with a language-model head, and the log-probabilities of its tokens."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from rlkernels import checks
from rlkernels.integrations.transformers.deferred_logits import DeferredLogits, HeadInputs
from rlkernels.integrations.transformers.model_inputs import check_tokens
from rlkernels.integrations.transformers.output_head import deferred_head, unwrapped
from rlkernels.linear.head import without_autocast
from rlkernels.linear.token_stats import linear_token_logprobs
from rlkernels.packing import shift_targets
from rlkernels.types import Mask, PerToken, Temperature, TokenIds

CHECKED = 4
"""Positions at the end of each sequence whose logits ``check`` compares."""


def hidden_and_head(model: nn.Module, *, check: bool = False, **batch: Any) -> HeadInputs:
    r"""Runs a model up to its head, and returns what a ``linear_*`` function takes from it.

    The model's own forward runs, hooks and wrappers included. Its head does not multiply. What the model does to its
    logits afterwards is recorded: factors, a softcap, a bias, padding columns. Anything else raises, so that no step
    is left out. Tied weights, LoRA, autocast and gathered parameters are those that the head itself would see.

    Args:
        model: a ``*ForCausalLM``, or another model whose ``get_output_embeddings`` names a linear head. DDP, FSDP2,
            ``torch.compile`` and peft may wrap it.
        check: compares with the model's own logits at the last positions: a second forward under the same random
            state. It reads from the device, and is for trying a new model out.
        batch: the arguments of the model: ``input_ids``, ``attention_mask``, ``position_ids``, images. No ``labels``.
            ``use_cache`` is off unless given.

    Returns:
        HeadInputs, to be spread: ``linear_policy_loss(**head, targets=..., ...)``. Rows are those of the model, not
        shifted: row ``t`` predicts token ``t + 1``; ``shift_targets`` makes the targets.

    Raises:
        TypeError: ``labels``; a model without a linear head, or with a step behind it that is not known; FSDP1.
        ValueError: a batch without a token.
        RuntimeError: ``check`` found other logits; the weight was released; the forward of the head is replaced; a
            gradient through an engine of ZeRO-3.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from rlkernels import linear_sft_loss, shift_targets
        >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        >>> model, ids = LlamaForCausalLM(LlamaConfig(vocab_size=11, **sizes)), torch.tensor([[1, 2, 3]])
        >>> head = hidden_and_head(model, input_ids=ids)
        >>> loss = linear_sft_loss(**head, targets=shift_targets(ids))
        >>> torch.allclose(loss, model(ids, labels=ids).loss)
        True
    """
    caller = "hidden_and_head"
    return _head_inputs(caller, model, check, batch)


def token_logprobs(
    model: nn.Module,
    input_ids: TokenIds,
    attention_mask: Mask | None = None,
    *,
    mask: Mask | None = None,
    temperature: Temperature = 1.0,
    logits_dtype: torch.dtype = torch.float32,
    chunk_tokens: int | None = None,
    logits_budget: int | None = None,
    check: bool = False,
    **batch: Any,
) -> PerToken:
    r"""Computes ``log p(token t + 1 | tokens up to t)`` of a causal model without its logits ``[B, L, V]``.

    Args:
        model, check: as for ``hidden_and_head``.
        input_ids: ``[B, L]``.
        attention_mask: ``[B, L]``; padding on either side neither scores nor is scored.
        mask: ``[B, L]``, the tokens that are scored, before the shift: those of the answer. Only they are multiplied.
        temperature, logits_dtype, chunk_tokens, logits_budget: as for ``linear_token_logprobs``. A temperature per
            token is ``[B, L - 1]``.
        batch: further arguments of the model, such as ``position_ids``.

    Returns:
        ``[B, L - 1]``, fp32 (fp64 for an fp64 model); column ``t`` belongs to token ``t + 1``; 0 where none is scored.

    Raises:
        TypeError, ValueError, RuntimeError: as ``hidden_and_head``, ``shift_targets`` and ``linear_token_logprobs``;
            an encoder-decoder, whose tokens are not ``input_ids``.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        >>> model, ids = LlamaForCausalLM(LlamaConfig(vocab_size=11, **sizes)), torch.tensor([[1, 2, 3]])
        >>> expected = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        >>> torch.allclose(token_logprobs(model, ids), expected, atol=1e-6)
        True
    """
    caller = "token_logprobs"
    config = getattr(unwrapped(caller, model), "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise TypeError(
            f"{caller}: {type(unwrapped(caller, model)).__name__} is an encoder-decoder, whose logits are not of "
            "input_ids; call hidden_and_head with decoder_input_ids, and linear_token_logprobs"
        )
    check_tokens(caller, {"input_ids": input_ids})
    targets = shift_targets(input_ids, attention_mask=attention_mask, mask=mask)
    batch = {"input_ids": input_ids, **({} if attention_mask is None else {"attention_mask": attention_mask}), **batch}
    head = _head_inputs(caller, model, check, batch)
    rows = head.hidden.shape[1]
    if rows != targets.shape[1] and not (rows > targets.shape[1] and _prepends(model)):
        raise ValueError(
            f"{caller}: the model gives {rows} rows for {targets.shape[1]} tokens; call hidden_and_head, and say "
            "which row predicts which token"
        )
    # Virtual tokens of a prompt stand in front.
    hidden = head.hidden[:, rows - targets.shape[1] : rows - 1]
    with without_autocast(hidden.device.type):  # the operands were cast as autocast said
        return linear_token_logprobs(
            **{**head, "hidden": hidden},
            targets=targets[:, :-1],
            temperature=temperature,
            logits_dtype=logits_dtype,
            chunk_tokens=chunk_tokens,
            logits_budget=logits_budget,
        )


def _prepends(model: nn.Module) -> bool:
    """Says whether an adapter puts virtual tokens in front of a sequence."""
    config = getattr(unwrapped("token_logprobs", model), "active_peft_config", None)
    return bool(getattr(config, "is_prompt_learning", False))


def _caches(model: nn.Module) -> bool:
    """Says whether the forward takes ``use_cache``, by name or, as peft's and Qwen3-VL's, among its ``**kwargs``."""
    parameters = _parameters(model)
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return "use_cache" in parameters or (passes_on and hasattr(config, "use_cache"))


def _parameters(model: nn.Module) -> Any:
    return inspect.signature(model.forward).parameters


def _head_inputs(caller: str, model: nn.Module, check: bool, batch: dict[str, Any]) -> HeadInputs:
    check = checks.flag(caller, "check", check)
    check_tokens(caller, batch)
    inside = unwrapped(caller, model)
    owner = type(inside).__name__
    if batch.get("labels") is not None:
        raise TypeError(
            f"{caller}: labels make {owner} compute a loss; pass them to the loss, shifted by shift_targets. For the "
            "model's own loss without logits call attach(model)"
        )
    if _caches(inside):
        batch = {"use_cache": False, **batch}
    state = _random_state(batch) if check else None
    with deferred_head(caller, model):
        outputs = model(**batch)
    logits = _deferred_in(outputs)
    if logits is None:
        raise TypeError(
            f"{caller}: {owner} computes its logits without calling the module that get_output_embeddings() names; "
            "its hidden states and head must be passed to the linear functions by hand"
        )
    if type(model).__name__ == "DeepSpeedEngine":
        logits.check_backward(caller)
    head = logits.head(outputs)
    if check:
        _compare(caller, model, head, batch, state)
    return head


def _deferred_in(outputs: Any) -> DeferredLogits | None:
    found = getattr(outputs, "logits", None)
    if found is None and isinstance(outputs, tuple):
        found = next((x for x in outputs if isinstance(x, DeferredLogits)), None)
    return found if isinstance(found, DeferredLogits) else None


def _random_state(batch: dict[str, Any]) -> tuple[Tensor, list[tuple[torch.device, Tensor]]]:
    """Returns the state of the generators that a forward may draw from."""
    devices = {x.device for x in batch.values() if isinstance(x, Tensor) and x.device.type == "cuda"}
    return torch.get_rng_state(), [(device, torch.cuda.get_rng_state(device)) for device in devices]


@torch.no_grad()
def _compare(caller: str, model: nn.Module, head: HeadInputs, batch: dict[str, Any], state: Any) -> None:
    """Raises RuntimeError where the model's own logits give other log-probabilities than the head."""
    inside = unwrapped(caller, model)
    if "logits_to_keep" in _parameters(inside) and "logits_to_keep" not in batch:
        batch = {**batch, "logits_to_keep": CHECKED}
    now = _random_state(batch)
    _restore(state)
    outputs = model(**batch)
    _restore(now)
    logits = outputs.logits if hasattr(outputs, "logits") else outputs[0]
    rows = min(CHECKED, logits.shape[-2])
    own = logits[..., logits.shape[-2] - rows :, :].float().log_softmax(-1)
    best, targets = own.max(-1)
    hidden = head.hidden[..., head.hidden.shape[-2] - rows :, :]
    ours = linear_token_logprobs(**{**head, "hidden": hidden}, targets=targets)
    error, bound = (ours - best).abs().max().item(), 1e-3 if logits.dtype in (torch.float32, torch.float64) else 0.1
    if not error <= bound:
        raise RuntimeError(
            f"{caller}: log-probabilities of {type(inside).__name__} differ from those of its own logits by "
            f"{error:.2e}, more than {bound:g}; the model does something to its logits that is not known here"
        )


def _restore(state: Any) -> None:
    torch.set_rng_state(state[0])
    for device, of_device in state[1]:
        torch.cuda.set_rng_state(of_device, device)
