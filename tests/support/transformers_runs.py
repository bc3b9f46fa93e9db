"""Small models of transformers, each with its own loss and with ours: how far log-probabilities, losses, gradients and
parameters after SGD steps are apart.
"""

import contextlib
from types import SimpleNamespace

import torch
import transformers

from rlkernels.integrations import transformers as ours
from rlkernels.integrations.transformers import deferred_logits

SMALL = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GPT = dict(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
MODELS = {
    "Llama": SMALL,
    "Qwen2": SMALL,
    "Qwen3": SMALL,
    "Gemma2": {**SMALL, "final_logit_softcapping": 1.5},
    "Gemma3": {**SMALL, "final_logit_softcapping": 2.5},
    "Cohere": {**SMALL, "logit_scale": 0.3},
    "Granite": {**SMALL, "logits_scaling": 3.0},
    "GPTJ": {**GPT, "rotary_dim": 4},
    "GPT2": GPT,
    "Phi": SMALL,
    "FalconH1": {
        **SMALL,
        "lm_head_multiplier": 0.4,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_n_groups": 1,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    },
    "Mpt": dict(vocab_size=97, d_model=32, n_layers=1, n_heads=4),
    "GraniteMoe": {
        **{name: value for name, value in SMALL.items() if name != "head_dim"},
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "output_router_logits": True,
        "router_aux_loss_coef": 0.1,
    },
}
STEPS, LEARNING_RATE = 3, 0.02


def build(name="Llama", **more):
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
    suffix = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    torch.manual_seed(0)
    model = getattr(transformers, name + suffix)(config(**{**MODELS[name], **more}))
    with torch.no_grad():  # far from uniform, or a softcap would not be noticed
        for p in model.parameters():
            p.mul_(3) if p.dim() > 1 else p.add_(0.1 * torch.randn_like(p))
    return model


def batch(side):
    ids, mask = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(1)), torch.ones(2, 9).long()
    mask[0, slice(0, 3) if side == "left" else slice(6, 9)] = 0
    return ids, mask


def own_logprobs(model, ids, mask, **more):
    logits = model(input_ids=ids, attention_mask=mask, **more).logits[:, :-1]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logp = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return torch.where((mask[:, 1:] * mask[:, :-1]).bool(), logp, 0.0)


def lora(*targets):
    """Returns a Llama with LoRA on these modules whose second matrices are not 0."""
    import peft

    model = peft.get_peft_model(build(), peft.LoraConfig(target_modules=list(targets), lora_dropout=0.0))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    return model


class UnroundedHead(torch.nn.Linear):
    """A head that multiplies what autocast would have cast, and keeps the sums in fp32."""

    def forward(self, hidden):
        with torch.autocast("cpu", enabled=False):
            return torch.nn.functional.linear(hidden.bfloat16().float(), self.weight.bfloat16().float())


def _plain(name, **more):
    return SimpleNamespace(build=lambda: build(name, **more))


CASES = {
    "Llama": _plain("Llama"),
    "Llama, fp64": SimpleNamespace(build=lambda: build().double()),
    "Llama, tied weights": _plain("Llama", tie_word_embeddings=True),
    "Llama, LoRA on attention": SimpleNamespace(build=lambda: lora("q_proj", "v_proj"), peft=True),
    "Llama, LoRA on the head, too": SimpleNamespace(build=lambda: lora("lm_head", "q_proj"), peft=True),
    "Llama, autocast to bf16": SimpleNamespace(build=build, autocast=True),
    "Llama, autocast to bf16, against logits that are not rounded": SimpleNamespace(
        build=build, autocast=True, unrounded=True
    ),
    "Qwen2": _plain("Qwen2"),
    "Qwen3": _plain("Qwen3"),
    "Gemma 2, softcap 1.5": _plain("Gemma2"),
    "Gemma 3, softcap 2.5, tied weights": _plain("Gemma3"),
    "Cohere, logit scale 0.3": _plain("Cohere"),
    "Granite, logits divided by 3": _plain("Granite"),
    "GPT-J, bias": _plain("GPTJ"),
    "GPT-2": _plain("GPT2"),
    "Phi, bias": _plain("Phi"),
    "Falcon-H1, multiplier 0.4": _plain("FalconH1"),
    "MPT": _plain("Mpt"),
    "GraniteMoe, loss of its router": _plain("GraniteMoe"),
}
"""What a row of docs/parity.md compares: a model, its numbers and what lies around it."""


def _context(case):
    return torch.autocast("cpu", torch.bfloat16) if getattr(case, "autocast", False) else contextlib.nullcontext()


def train(case, attached):
    """Returns log-probabilities, losses, gradients of the first step and the way of the parameters under SGD."""
    model, (ids, mask) = case.build(), batch("right")
    model.train()
    if getattr(case, "unrounded", False) and not attached:
        model.lm_head.__class__ = UnroundedHead
    with _context(case):
        logprobs = ours.token_logprobs(model, ids, mask) if attached else own_logprobs(model, ids, mask)
    if attached:
        ours.attach(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in trained]
    optimizer, losses, gradient = torch.optim.SGD(trained, LEARNING_RATE), [], None
    for _ in range(STEPS):
        optimizer.zero_grad()
        with _context(case):
            loss = model(input_ids=ids, attention_mask=mask, labels=torch.where(mask.bool(), ids, -100)).loss
        loss.backward()
        losses.append(loss.detach())
        if gradient is None:
            gradient = _flat(p.grad if p.grad is not None else torch.zeros_like(p) for p in trained)
        optimizer.step()
    way = _flat(p.detach() - s for p, s in zip(trained, start, strict=True))
    return logprobs.detach().double(), torch.stack(losses).double(), gradient, way


def _flat(tensors):
    return torch.cat([x.flatten() for x in tensors]).double()


def gaps(name, wrong=1.0):
    """Returns how far ours is from the model's own: log-probabilities by the largest difference, the rest relative.

    ``wrong``: a factor of all that our functions return.
    """
    case = CASES[name]
    right = deferred_logits.linear_sft_loss
    deferred_logits.linear_sft_loss = lambda *args, **kwargs: wrong * right(*args, **kwargs)
    try:
        found = train(case, attached=True)
    finally:
        deferred_logits.linear_sft_loss = right
    expected = train(case, attached=False)
    logprobs = (found[0] * wrong - expected[0]).abs().max().item()
    return (logprobs, *(((a - b).norm() / b.norm()).item() for a, b in zip(found[1:], expected[1:], strict=True)))
