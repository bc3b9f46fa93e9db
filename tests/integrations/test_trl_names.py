"""TRL's names as public functions of ours, against float64 formulas and against models' own logits."""

import doctest
import importlib

import pytest
import torch

from rlkernels.integrations import trl as integration


def logits_and_index(*shape, k=None, dtype=torch.float32):
    torch.manual_seed(4)
    logits = (torch.randn(*shape, 33) * 3).to(dtype).requires_grad_()
    return logits, torch.randint(0, 33, shape if k is None else (*shape, k))


@pytest.mark.parametrize("k", [None, 1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_selected_log_probabilities_with_k_labels_a_mask_and_a_temperature(k, dtype):
    logits, index = logits_and_index(2, 5, k=k, dtype=dtype)
    mask = torch.rand(index.shape, generator=torch.Generator().manual_seed(1)) < 0.6
    found = integration.selective_log_softmax(logits, index, 0.7, mask.int())
    twin = logits.detach().double().requires_grad_()
    of_ids = (twin / 0.7).log_softmax(-1).gather(-1, index if k else index[..., None])
    truth = torch.where(mask, of_ids if k else of_ids[..., 0], 0.0)
    assert found.shape == index.shape and found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=2e-6)
    upstream = torch.randn(index.shape)
    (found * upstream).sum().backward()
    (truth * upstream).sum().backward()
    tolerance = {"rtol": 8e-3, "atol": 1e-4} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 2e-6}
    torch.testing.assert_close(logits.grad.double(), twin.grad, **tolerance)


def test_entropy_alone_and_beside_log_probabilities():
    logits, index = logits_and_index(2, 5)
    log_p = logits.detach().double().log_softmax(-1)
    torch.testing.assert_close(
        integration.entropy_from_logits(logits, chunk_size=1).double(), -(log_p.exp() * log_p).sum(-1)
    )
    log_p = (logits.detach().double() / 1.5).log_softmax(-1)
    for wanted in (True, False):
        logprobs, entropy = integration.selective_log_softmax_and_entropy(logits, index, wanted, temperature=1.5)
        torch.testing.assert_close(logprobs.double(), log_p.gather(-1, index[..., None])[..., 0], rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(entropy.double(), -(log_p.exp() * log_p).sum(-1), rtol=1e-5, atol=2e-6)
        assert logprobs.requires_grad and entropy.requires_grad is wanted


def test_what_is_wrong_is_refused():
    logits, index = logits_and_index(2, 5)
    with pytest.raises(ValueError, match="selective_log_softmax: temperature must be positive, got 0"):
        integration.selective_log_softmax(logits, index, 0)
    with pytest.raises(ValueError, match=r"row_mask must have the shape of index, \(2, 5\), got \(2, 4\)"):
        integration.selective_log_softmax(logits, index, row_mask=torch.ones(2, 4))
    with pytest.raises(IndexError):  # TRL has no index that stands for "ignore"
        integration.selective_log_softmax(logits, torch.full_like(index, -100))
    with pytest.raises(ValueError, match=r"teacher_weight must have shape \[V, 8\], got \(0,\): gather"):
        operands = torch.ones(1, 8), torch.ones(3, 8), None, torch.ones(1, 8), torch.empty(0), None
        integration.ChunkedDivergenceFunction.apply(*operands, 0.5)


def kl(p, q):
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("beta", [0.0, 1.0, 0.3])
def test_the_divergence_of_two_heads_and_its_gradients_for_any_upstream_gradient(beta):
    torch.manual_seed(6)
    student = [torch.randn(shape).requires_grad_() for shape in ((19, 8), (37, 8), (37,))]
    teacher = torch.randn(19, 12), torch.randn(37, 12), torch.randn(37)
    found, entropy = integration.ChunkedDivergenceFunction.apply(*student, *teacher, beta, 0.8, 0.5, 6.0, 1.5, None)
    twins = [x.detach().double().requires_grad_() for x in student]
    hidden, weight, bias = twins
    p = (6.0 * torch.tanh((hidden @ weight.T + bias) * 0.5 / 6.0) / 0.8).log_softmax(-1)
    q = ((teacher[0].double() @ teacher[1].double().T + teacher[2].double()) * 1.5 / 0.8).log_softmax(-1)
    m = ((1 - beta) * p.exp() + beta * q.exp()).log()
    truth = {0.0: kl(q, p), 1.0: kl(p, q)}.get(beta, beta * kl(q, m) + (1 - beta) * kl(p, m))
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(entropy.double(), -(p.exp() * p).sum(-1), rtol=1e-5, atol=2e-6)
    assert not entropy.requires_grad
    upstream = torch.randn(19)
    upstream[3] = 0.0
    (found * upstream).sum().backward()
    (truth * upstream).sum().backward()
    for ours, twin in zip(student, twins, strict=True):
        torch.testing.assert_close(ours.grad.double(), twin.grad, rtol=1e-4, atol=2e-6)


# Softcap; scale; its reciprocal; a bias; a scale of another name.
ARCHITECTURES = {
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 4.0},
    "GPTJ": {"rotary_dim": 4},
    "FalconH1": {"lm_head_multiplier": 0.4, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_state": 8},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_fused_head_of_a_model_scores_as_its_own_logits_do(name):
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    if name == "GPTJ":
        sizes = dict(vocab_size=61, n_embd=32, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=2)
    config = getattr(transformers, f"{name}Config")(**sizes, **ARCHITECTURES[name])
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    if name == "GPTJ":
        torch.nn.init.normal_(model.lm_head.bias)
    # A head of unit scale, so that softcap and scale matter.
    torch.nn.init.normal_(model.get_output_embeddings().weight)
    ids = torch.randint(3, 61, (2, 9))
    labels = ids.clone()
    labels[0, :4] = -100
    own = model(input_ids=ids).logits[:, :-1].double() / 0.7
    log_p = own.log_softmax(-1)
    live = labels[:, 1:] != -100
    truth = torch.where(live, log_p.gather(-1, ids[:, 1:, None])[..., 0], 0.0)
    weights = dict(model.named_parameters())
    (-truth.sum() / live.sum()).backward()
    expected = {key: p.grad.clone() for key, p in weights.items() if p.grad is not None}
    model.zero_grad()
    integration.add_fused_lm_head(model, temperature=0.7, outputs=("log_probs", "entropy"))
    out = model(input_ids=ids, labels=labels, fused_lm_head=True)
    torch.testing.assert_close(out.log_probs.double(), truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.entropy.double(), torch.where(live, -(log_p.exp() * log_p).sum(-1), 0.0))
    assert torch.equal(out.label_mask, live) and out.is_top1 is None
    out.loss.backward()
    for key, gradient in expected.items():
        torch.testing.assert_close(weights[key].grad, gradient, rtol=1e-3, atol=1e-5)
    assert torch.equal(model(input_ids=ids).logits[:, :-1].double() / 0.7, own)  # the forward without it is the model's


def tiny_llama(transformers):
    torch.manual_seed(0)
    sizes = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=False))


def test_settings_of_a_fused_head_are_replaced_and_mistakes_are_refused():
    transformers = pytest.importorskip("transformers")
    model = tiny_llama(transformers)
    ids = torch.randint(3, 61, (2, 7))
    with pytest.raises(ValueError, match=r"unknown outputs \['top_k'\]; known are \['log_probs', 'entropy'"):
        integration.add_fused_lm_head(model, outputs=("top_k",))
    integration.add_fused_lm_head(model, temperature=0.5)
    integration.add_fused_lm_head(model, temperature=2.0)
    with pytest.raises(ValueError, match="needs labels or shift_labels, got neither"):
        model(input_ids=ids, fused_lm_head=True)
    truth = (model(input_ids=ids).logits.double() / 2.0).log_softmax(-1)
    shifted = model(input_ids=ids, shift_labels=ids, fused_lm_head=True, num_items_in_batch=5)
    torch.testing.assert_close(shifted.log_probs.double(), truth.gather(-1, ids[..., None])[..., 0])
    torch.testing.assert_close(shifted.loss.double(), -shifted.log_probs.double().sum() / 5)
    all_masked = model(input_ids=ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
    all_masked.loss.backward()
    assert all_masked.loss.item() == 0.0 and not model.lm_head.weight.grad.any()
    model.lm_head = torch.nn.Sequential(model.lm_head)
    model.lm_head.weight = model.lm_head[0].weight
    with pytest.raises(TypeError, match="the head is a Sequential, expected torch.nn.Linear"):
        model(input_ids=ids, labels=ids, fused_lm_head=True)


@pytest.mark.fault(105)
def test_a_lora_on_the_head_moves_the_log_probabilities_and_gets_gradients():
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    model = tiny_llama(transformers)
    integration.add_fused_lm_head(model)
    ids = torch.randint(3, 61, (2, 7))
    plain = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
    found = adapted(input_ids=ids, labels=ids, fused_lm_head=True).log_probs
    truth = adapted(input_ids=ids).logits[:, :-1].double().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    assert (found - plain).abs().max() > 1e-3
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)
    head = model.get_output_embeddings()
    head = head if hasattr(head, "lora_A") else adapted.base_model.model.lm_head
    expected = torch.autograd.grad(truth.sum(), [head.lora_A["default"].weight, head.lora_B["default"].weight])
    got = torch.autograd.grad(found.sum(), [head.lora_A["default"].weight, head.lora_B["default"].weight])
    for ours, own in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, own, rtol=1e-3, atol=1e-5)
    head.lora_dropout["default"] = torch.nn.Dropout(0.5)
    adapted.train()
    with pytest.raises(TypeError, match="lora_dropout=0"):
        adapted(input_ids=ids, labels=ids, fused_lm_head=True)


@pytest.mark.fault(107)
def test_a_model_with_a_router_keeps_the_loss_of_its_router():
    transformers = pytest.importorskip("transformers")
    sizes = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    sizes |= dict(num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True)
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, router_aux_loss_coef=0.5)).eval()
    ids = torch.randint(3, 61, (2, 9))
    own = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    integration.add_fused_lm_head(model)
    ours = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, fused_lm_head=True)
    assert own.aux_loss > 0.5
    torch.testing.assert_close(ours.aux_loss, own.aux_loss)
    torch.testing.assert_close(ours.loss, own.loss, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["_patching", "trl.functions", "trl.fused_lm_head"])
def test_the_examples_of_the_adapter_print_what_they_say(name):
    pytest.importorskip("transformers")
    found = doctest.testmod(importlib.import_module(f"rlkernels.integrations.{name}"), extraglobs={"torch": torch})
    assert found.attempted >= 3 and found.failed == 0
