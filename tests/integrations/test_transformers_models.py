"""Models of transformers against their own logits, plain torch, and ``Trainer`` against itself without us."""

import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

os.environ.update(HF_HUB_OFFLINE="1", WANDB_DISABLED="true")
transformers = pytest.importorskip("transformers")

import transformers_runs  # noqa: E402
from transformers_runs import CASES, MODELS, SMALL, batch, build, own_logprobs  # noqa: E402

import rlkernels  # noqa: E402
from rlkernels.integrations import transformers as ours  # noqa: E402
from rlkernels.integrations.transformers import deferred_logits  # noqa: E402


def gradients(loss, model):
    return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)


def assert_same_training(model, ids, mask, factor=1.0, tolerance=1e-5):
    expected, found = own_logprobs(model, ids, mask), ours.token_logprobs(model, ids, mask) * factor
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    weights = torch.linspace(-1, 1, found.numel()).view_as(found)
    expected, found = gradients((expected * weights).sum(), model), gradients((found * weights).sum(), model)
    assert any(g is not None for g in found)
    for a, b in zip(found, expected, strict=True):
        if b is None:
            assert a is None
        else:
            torch.testing.assert_close(a, b, rtol=1e-3, atol=20 * tolerance)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_log_probabilities_and_gradients_are_those_of_the_models_own_logits(name, side):
    assert_same_training(build(name), *batch(side))


# The cases of docs/parity.md. Autocast rounds the model's own logits to bf16, and ours are not rounded: there only the
# bits that both keep can be compared.
@pytest.mark.parametrize("name", CASES)
def test_losses_gradients_and_sgd_steps_are_those_of_the_models_own_logits_and_one_percent_of_error_shows(name):
    if hasattr(CASES[name], "peft"):
        pytest.importorskip("peft", reason="needs peft")
    # A processor that multiplies bf16 rounds the gradient of the logits first, and each layer's backward rounds anew.
    values, gradients = 1e-4, 1e-2 if name.startswith("Llama, autocast to bf16") else 1e-4
    found = transformers_runs.gaps(name)
    assert max(found[:2]) < (1e-2 if name == "Llama, autocast to bf16" else values), found
    assert max(found[2:]) < gradients, found
    assert min(transformers_runs.gaps(name, 1.01)) > 5e-3


def test_the_page_has_a_row_for_every_case():
    page = (Path(__file__).resolve().parents[2] / "docs/parity.md").read_text()
    page = page.partition("## transformers")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+) \|(?: \de[+-]\d\d \|){5}$", page, re.MULTILINE)
    assert rows == [*CASES]


def test_one_percent_of_error_is_noticed():
    with pytest.raises(AssertionError):
        assert_same_training(build(), *batch("left"), factor=1.01)


def test_tied_weights_get_the_gradients_of_both_uses():
    model = build(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same_training(model, *batch("right"))


def test_under_autocast_the_head_sees_16_bits():
    model, (ids, mask) = build(), batch("left")
    with torch.autocast("cpu", torch.bfloat16):
        head = ours.hidden_and_head(model, input_ids=ids, attention_mask=mask)
        found, expected = ours.token_logprobs(model, ids, mask), own_logprobs(model, ids, mask)
    assert head.hidden.dtype == head.weight.dtype == torch.bfloat16 and found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0.05)  # the model rounds its logits


def test_autocast_leaves_a_head_of_fp64_as_it_is():
    model, (ids, mask) = build().double(), batch("right")
    with torch.autocast("cpu", torch.bfloat16):
        found, logits = ours.token_logprobs(model, ids, mask), model(input_ids=ids, attention_mask=mask).logits
    assert found.dtype == logits.dtype == torch.float64
    expected = logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(found, torch.where(mask[:, 1:] * mask[:, :-1] != 0, expected, 0.0))


def test_no_cache_is_made_where_the_forward_takes_use_cache_among_its_keywords():
    sizes = {name: value for name, value in SMALL.items() if name != "head_dim"}
    config = transformers.GraniteMoeConfig(**sizes, num_local_experts=2, num_experts_per_tok=1)
    model, (ids, _) = transformers.GraniteMoeForCausalLM(config), batch("left")
    assert model(input_ids=ids).past_key_values is not None
    assert ours.hidden_and_head(model, input_ids=ids).outputs.past_key_values is None
    assert ours.hidden_and_head(model, input_ids=ids, use_cache=True).outputs.past_key_values is not None


def test_no_logits_of_all_tokens_are_made_and_the_head_is_as_before():
    model, (ids, mask) = build(), batch("left")
    head = ours.hidden_and_head(model, input_ids=ids, attention_mask=mask, check=True)
    assert isinstance(head.outputs.logits, ours.DeferredLogits) and head.outputs.logits.shape == (2, 9, 97)
    assert "forward" not in vars(model.lm_head)
    loss = rlkernels.linear_sft_loss(**head, targets=rlkernels.shift_targets(ids))
    torch.testing.assert_close(loss, model(ids, attention_mask=mask, labels=ids).loss)


def test_check_notices_another_factor(monkeypatch):
    model, (ids, mask) = build("Granite"), batch("left")
    scaled = deferred_logits.DeferredLogits._scaled
    monkeypatch.setattr(deferred_logits.DeferredLogits, "_scaled", lambda self, n, x, at: scaled(self, n, x * 2, at))
    with pytest.raises(RuntimeError, match="differ from those of its own logits"):
        ours.hidden_and_head(model, input_ids=ids, attention_mask=mask, check=True)


def test_an_unknown_step_behind_the_head_is_refused_by_name():
    class Strange(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs.logits = outputs.logits.masked_fill(torch.zeros(97).bool(), 0.0)
            return outputs

    with pytest.raises(AttributeError, match="Strange.*masked_fill"):
        ours.token_logprobs(Strange(transformers.LlamaConfig(**SMALL)), batch("left")[0])


def test_refusals():
    model, ids = build(), batch("left")[0]
    with pytest.raises(TypeError, match="labels"):
        ours.hidden_and_head(model, input_ids=ids, labels=ids)
    with pytest.raises(TypeError, match="token_logprobs: check must be True or False"):
        ours.token_logprobs(model, ids, check="no")
    with pytest.raises(TypeError, match="attach: evaluation must be True or False"):
        ours.attach(model, evaluation="no")
    with pytest.raises(TypeError, match="no output embedding"):
        ours.hidden_and_head(model.model, input_ids=ids)
    sizes = dict(vocab_size=97, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    with pytest.raises(TypeError, match="T5ForConditionalGeneration is an encoder-decoder"):
        ours.token_logprobs(transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes)), ids)
    model.lm_head.forward = lambda x: x
    with pytest.raises(RuntimeError, match="was replaced"):
        ours.attach(model)
    del model.lm_head.forward
    model.lm_head.register_forward_hook(lambda head, _, out: setattr(head.weight, "data", torch.empty(0)))
    with pytest.raises(RuntimeError, match="GatheredParameters"):  # as ZeRO-3 leaves it
        ours.hidden_and_head(model, input_ids=ids)


# GPT-J runs a batch of no sequence, Llama fails within its attention, and both fail on sequences of no token.
@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
@pytest.mark.parametrize("name", ["Llama", "GPTJ"])
def test_a_batch_without_a_token_is_refused_by_name(name, shape):
    model, ids = build(name), torch.zeros(shape, dtype=torch.long)
    expected = rf"input_ids has shape \({shape[0]}, {shape[1]}\), expected \[B, L\] with B >= 1 and L >= 1"
    with pytest.raises(ValueError, match=f"token_logprobs: {expected}"):
        ours.token_logprobs(model, ids, torch.ones_like(ids))
    with pytest.raises(ValueError, match=f"hidden_and_head: {expected}"):
        ours.hidden_and_head(model, input_ids=ids, check=True)
    with pytest.raises(ValueError, match="hidden_and_head: inputs_embeds has shape"):
        ours.hidden_and_head(model, inputs_embeds=torch.zeros(*shape, 32))
    if name == "Llama":
        with pytest.raises(ValueError, match=f"RewardModel: {expected}"):
            ours.RewardModel(model.model)(ids)


def test_one_sequence_that_is_masked_stands_for_an_empty_batch():
    model, (ids, mask) = build(), batch("right")
    for found in (
        ours.token_logprobs(model, ids[:1], mask[:1], mask=torch.zeros(1, 9)).sum(),
        ours.compute_loss_func(ours.attach(model).train()(ids[:1]), torch.full((1, 9), -100)),
        ours.compute_loss_func(model.eval()(ids[:1]), torch.full((1, 9), -100)),
    ):
        assert found == 0
        assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients(found, model))


def test_the_loss_of_logits_without_a_row_is_0_and_differentiable():
    logits = torch.zeros(0, 5, 97, requires_grad=True)
    loss = ours.compute_loss_func(SimpleNamespace(logits=logits), torch.zeros(0, 5, dtype=torch.long), 3)
    loss.backward()
    assert loss == 0 and logits.grad.shape == logits.shape


def test_compute_loss_func_refuses_by_the_names_of_its_own_arguments():
    outputs, ids = SimpleNamespace(logits=torch.zeros(2, 9, 97)), batch("left")[0]
    for labels in (ids[0], ids[:, :8], ids[None]):
        with pytest.raises(ValueError, match=r"compute_loss_func: labels has shape .*, expected \(2, 9\)"):
            ours.compute_loss_func(outputs, labels)
    with pytest.raises(TypeError, match="compute_loss_func: labels must be int32 or int64"):
        ours.compute_loss_func(outputs, ids.float())
    with pytest.raises(TypeError, match="compute_loss_func: shift must be True or False"):
        ours.compute_loss_func(outputs, ids, shift="no")
    with pytest.raises(ValueError, match=r"compute_loss_func: labels .*pass shift=False"):
        ours.compute_loss_func(SimpleNamespace(logits=torch.zeros(9, 97)), ids[0])
    routed = SimpleNamespace(logits=outputs.logits, aux_loss=torch.tensor(1.0))
    with pytest.raises(TypeError, match="compute_loss_func: aux_loss_coef must be a number"):
        ours.compute_loss_func(routed, ids, aux_loss_coef="0.1")
    with pytest.raises(ValueError, match=r"hidden_and_head: input_ids has shape \(9,\), expected \[B, L\]"):
        ours.hidden_and_head(build(), input_ids=ids[0])
    with pytest.raises(TypeError, match="hidden_and_head: input_ids must be a torch.Tensor, got list"):
        ours.hidden_and_head(build(), input_ids=ids.tolist())


class DeepSpeedEngine(torch.nn.Module):
    """Stands for that of DeepSpeed, whose backward has no entry where a forward returned no tensor."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **batch):
        return self.module(**batch)


def test_a_loss_behind_an_engine_of_zero_3_is_refused_and_what_needs_no_gradient_is_not():
    model, (ids, mask) = build(), batch("left")
    model.lm_head.weight.ds_id = 0  # as ZeRO-3 marks it
    engine = DeepSpeedEngine(model)
    with pytest.raises(RuntimeError, match="token_logprobs: ZeRO-3 partitions the head of LlamaForCausalLM.*attach"):
        ours.token_logprobs(engine, ids, mask)
    with torch.no_grad():
        torch.testing.assert_close(ours.token_logprobs(engine, ids, mask), own_logprobs(model, ids, mask))
    assert ours.token_logprobs(model, ids, mask).requires_grad  # as within a forward that the engine runs
    ours.attach(engine).train()
    with pytest.raises(RuntimeError, match="compute_loss_func: ZeRO-3 partitions"):
        ours.compute_loss_func(engine(input_ids=ids, attention_mask=mask), ids)
    assert engine(input_ids=ids, attention_mask=mask, labels=ids).loss.requires_grad


def test_lora_on_the_head_changes_log_probabilities_and_gets_gradients():
    peft = pytest.importorskip("peft", reason="needs peft")
    model = peft.get_peft_model(build(), peft.LoraConfig(target_modules=["lm_head", "q_proj"], lora_dropout=0.0))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    ids, mask = batch("left")
    with model.disable_adapter():
        plain = ours.token_logprobs(model, ids, mask)
    found, expected = ours.token_logprobs(model, ids, mask), own_logprobs(model, ids, mask)
    assert (found - plain).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    trained = [p for p in model.parameters() if p.requires_grad]
    for a, b in zip(*(torch.autograd.grad((x**2).sum(), trained) for x in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def train(tmp_path, how):
    """Two SGD steps of two micro-batches of different lengths: the losses, gradient norms and parameters."""
    model = build(hidden_act="silu")
    rows = [batch("left")[0][i % 2] for i in range(8)]
    data = [{"input_ids": r, "labels": torch.where(torch.arange(9) < 2 + i % 6, r, -100)} for i, r in enumerate(rows)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=0.1,
        optim="sgd",
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
    )
    function = {"function": ours.compute_loss_func, "both": ours.compute_loss_func}.get(how)
    if how in ("attach", "both"):
        ours.attach(model)
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data, compute_loss_func=function)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    assert len(logs) == 2
    numbers = [log[key] for log in logs for key in ("loss", "grad_norm")]
    return torch.tensor(numbers), torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    return train(tmp_path_factory.mktemp("stock"), "stock")


@pytest.mark.parametrize("how", ["attach", "function", "both"])
def test_trainer_with_gradient_accumulation_trains_as_the_stock_one(how, tmp_path, stock):
    before = sum(ours.attached.host.calls.values())
    numbers, parameters = train(tmp_path, how)
    assert sum(ours.attached.host.calls.values()) - before == (0 if how == "function" else 4)
    torch.testing.assert_close(numbers, stock[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(parameters, stock[1], rtol=1e-4, atol=1e-5)


def test_trainer_with_one_percent_of_error_is_noticed(tmp_path, stock, monkeypatch):
    right = deferred_logits.linear_sft_loss
    monkeypatch.setattr(deferred_logits, "linear_sft_loss", lambda *a, **k: 1.01 * right(*a, **k))
    numbers, _ = train(tmp_path, "attach")
    with pytest.raises(AssertionError):
        torch.testing.assert_close(numbers, stock[0], rtol=1e-4, atol=0)


def test_a_reward_model_scores_as_the_sequence_classifier_and_comes_back_from_a_folder(tmp_path):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, num_labels=1)
    classifier = transformers.LlamaForSequenceClassification(config)
    ids, mask = batch("right")
    ids = torch.where(mask.bool(), ids, 0)
    model = ours.RewardModel(classifier)
    expected = classifier(input_ids=ids, attention_mask=mask).logits[:, 0]
    torch.testing.assert_close(model(ids, mask), expected, rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path)
    again = ours.RewardModel.from_pretrained(tmp_path)
    assert torch.equal(again(ids, mask), model(ids, mask))
    values = again(ids, mask, positions="all")
    assert values.shape == (2, 9) and torch.equal(values[0, -1], torch.tensor(0.0))
    torch.testing.assert_close(values[1, -1], expected[1], rtol=1e-5, atol=1e-6)
