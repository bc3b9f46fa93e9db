"""The drop-in under TRL's own trainers: same losses and gradient norms as stock, whatever subclass or moment."""

import importlib
import os
import random
import types

import pytest
import subprocesses
import torch

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", WANDB_DISABLED="true", TRL_EXPERIMENTAL_SILENCE="1")
trl = pytest.importorskip("trl", minversion="1.15")  # test_trl_parity.py takes older ones, too

from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    PrinterCallback,
    set_seed,
)
from trl.trainer import reward_trainer, utils  # noqa: E402

from rlkernels import ops  # noqa: E402
from rlkernels.integrations import trl as integration  # noqa: E402
from rlkernels.integrations.trl import replacements  # noqa: E402

# Correct runs differ by up to 2e-6, runs whose log-probabilities are 1 % wrong by 1e-3 and more.
TOLERANCE = 1e-4
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers renames arguments that TRL still passes
SEAMS = [
    (utils, "_ChunkedLogProbFunction"),
    (importlib.import_module("trl.kernels"), "ChunkedLogProbFunction"),
    (reward_trainer, "nn"),
]


@pytest.fixture(autouse=True)
def unpatched():
    before = [getattr(*seam) for seam in SEAMS]
    yield
    integration.unpatch()
    assert all(getattr(*seam) is held for seam, held in zip(SEAMS, before, strict=True))


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A policy and a reward model of 97 words, saved and used by path: TRL opens ``_name_or_path`` again for an
    implicit reference.
    """
    directory = tmp_path_factory.mktemp("tiny")
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(93))]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    config = dict(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    for name, model, extra in (
        ("policy", LlamaForCausalLM, {}),
        ("reward", LlamaForSequenceClassification, {"num_labels": 1}),
    ):
        torch.manual_seed(7)
        model(LlamaConfig(**config, **extra)).save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    return types.SimpleNamespace(
        policy=str(directory / "policy"), reward=str(directory / "reward"), out=str(directory / "out")
    )


def words(n):
    return " ".join(f"w{random.randrange(90)}" for _ in range(n))


def distinct(completions, **_):
    return [float(len(set(c.split()))) for c in completions]


def build(name, paths, cls=None):
    """The trainer ``kind/variant``, the same at every call."""
    set_seed(0)
    random.seed(0)
    kind, variant = name.split("/")
    common = dict(
        output_dir=paths.out,
        max_steps=3,
        report_to="none",
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        logging_steps=1,
        gradient_checkpointing=False,
        learning_rate=1e-3,
        seed=1,
        disable_tqdm=True,
        per_device_train_batch_size=4 if kind == "grpo" else 2,
    )
    tokenizer = AutoTokenizer.from_pretrained(paths.policy)
    keywords = {"processing_class": tokenizer}
    if kind == "reward":
        model = AutoModelForSequenceClassification.from_pretrained(paths.reward, num_labels=1)
        rows = [dict(chosen=words(8), rejected=words(9)) for _ in range(8)]
        if variant == "margin":
            rows = [{**row, "margin": 0.25 * i} for i, row in enumerate(rows)]
        args = trl.RewardConfig(center_rewards_coefficient=0.01 if variant == "centred" else None, **common)
        return (cls or trl.RewardTrainer)(model, args=args, train_dataset=Dataset.from_list(rows), **keywords)
    model, reference = (AutoModelForCausalLM.from_pretrained(paths.policy) for _ in range(2))
    if kind == "dpo":
        rows = [dict(prompt=words(5), chosen=" " + words(6), rejected=" " + words(7)) for _ in range(8)]
        args = trl.DPOConfig(loss_type=[variant], use_weighting=variant == "ipo", **common)
        trainer, keywords["ref_model"] = trl.DPOTrainer, reference
    elif kind == "grpo":
        rows = [dict(prompt=words(5)) for _ in range(8)]
        args = trl.GRPOConfig(
            loss_type=variant,
            num_generations=4,
            max_completion_length=8,
            beta=0.04,
            num_iterations=2,
            temperature=0.7,
            **common,
        )
        trainer, keywords["reward_funcs"] = trl.GRPOTrainer, distinct
    elif kind == "kto":
        rows = [dict(prompt=words(5), completion=" " + words(6), label=bool(i % 2)) for i in range(8)]
        args, trainer, keywords["ref_model"] = trl.KTOConfig(loss_type=variant, **common), trl.KTOTrainer, reference
    else:
        rows = [dict(text=words(12)) for _ in range(8)]
        args, trainer = trl.SFTConfig(loss_type=variant, max_length=64, **common), trl.SFTTrainer
    return (cls or trainer)(model, args=args, train_dataset=Dataset.from_list(rows), **keywords)


TRAINERS = (
    "dpo/sigmoid",
    "dpo/ipo",
    "grpo/dapo",
    "grpo/cispo",
    "kto/kto",
    "sft/nll",
    "sft/dft",
    "reward/margin",
    "reward/centred",
)


def train(trainer):
    """Losses and gradient norms, step by step. Parameters after Adam steps would be blind to a wrong scale."""
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return torch.tensor(
        [[entry["loss"] for entry in logs], [entry["grad_norm"] for entry in logs]], dtype=torch.float64
    )


_stock = {}


def stock(name, paths):
    if name not in _stock:
        _stock[name] = train(build(name, paths))
    return _stock[name]


def gap(a, b):
    """The larger of the two relative differences: of the loss, and of the gradient norm."""
    return ((a - b).abs().amax(1) / a.abs().amax(1)).max().item()


@pytest.mark.fault(107, 111)
@pytest.mark.parametrize("name", TRAINERS)
def test_a_patched_trainer_has_the_losses_and_gradient_norms_of_the_stock_one(name, paths):
    reference = stock(name, paths)
    before = ops.calls()
    integration.patch()
    patched = train(build(name, paths))
    status = integration.status()
    assert status.calls["reward_pairs" if name.startswith("reward") else "fused_head"] >= 3 and not status.delegations
    assert sum((ops.calls() - before).values()) >= 3
    assert gap(reference, patched) <= TOLERANCE


@pytest.mark.fault(112)
@pytest.mark.parametrize("name", ("dpo/sigmoid", "grpo/cispo", "kto/kto", "sft/nll", "reward/margin"))
def test_log_probabilities_one_percent_wrong_fail_the_parity_check(name, paths, monkeypatch):
    reference = stock(name, paths)  # before the patch, like every reference here: a worker may run this test alone
    right, pairs = replacements.FusedHead.apply, replacements.LogSigmoid.__call__

    def wrong(self, *args):
        logprobs, *rest = right(self, *args)
        return (1.01 * logprobs, *rest)

    monkeypatch.setattr(replacements.FusedHead, "apply", wrong)
    monkeypatch.setattr(replacements.LogSigmoid, "__call__", lambda self, x: 1.01 * pairs(self, x))
    integration.patch()
    assert gap(reference, train(build(name, paths))) > 3 * TOLERANCE


def test_patching_after_construction_reaches_the_trainer(paths):
    reference, trainer = stock("dpo/sigmoid", paths), build("dpo/sigmoid", paths)
    integration.patch()
    assert gap(reference, train(trainer)) <= TOLERANCE
    assert integration.status().calls["fused_head"] == 6


def test_patching_before_trl_is_imported_reaches_the_trainers():
    code = (
        "import sys\nfrom rlkernels.integrations import trl as integration\nassert 'trl' not in sys.modules\n"
        "print(integration.patch())\nimport trl, trl.trainer.utils as utils\nfrom trl import DPOTrainer, "
        "RewardTrainer\n"
        "assert 'rlkernels' in repr(utils._ChunkedLogProbFunction)\n"
        "assert 'rlkernels' in "
        "repr(RewardTrainer.compute_loss.__globals__['nn'].functional.logsigmoid)\nintegration.unpatch()\n"
        "assert utils._ChunkedLogProbFunction.__module__ == 'trl.kernels.chunked_logprob'\n"
    )
    done = subprocesses.child("-W", "ignore", "-c", code)
    assert done.returncode == 0, done.stderr
    assert (
        f"trl.trainer.utils._ChunkedLogProbFunction -> rlkernels (fused) (TRL {trl.__version__})"
        in done.stdout.splitlines()
    )


@pytest.mark.fault(106)
def test_a_subclass_with_its_own_reward_loss_keeps_it(paths):
    seen = []

    class Hinge(trl.RewardTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            chosen, rejected = torch.chunk(model(**{**inputs, "use_cache": False}).logits.squeeze(-1), 2)
            seen.append((chosen.detach(), rejected.detach()))
            return torch.relu(1.0 - (chosen - rejected)).mean()

    integration.patch()
    losses, _ = train(build("reward/plain", paths, Hinge))
    expected = [(1.0 - (c - r).double()).clamp(min=0).mean() for c, r in seen]
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-6, atol=0)
    assert "reward_pairs" not in integration.status().calls


@pytest.mark.fault(106)
def test_a_subclass_with_its_own_policy_loss_keeps_it(paths):
    class Tripled(trl.GRPOTrainer):
        def _compute_loss(self, model, inputs):
            return 3.0 * super()._compute_loss(model, inputs)

    integration.patch()
    tripled = train(build("grpo/dapo", paths, Tripled))
    # The first step alone: from the second on the weights differ.
    torch.testing.assert_close(tripled[1, 0], 3.0 * stock("grpo/dapo", paths)[1, 0], rtol=TOLERANCE, atol=0)
    assert integration.status().calls["fused_head"] > 0


@pytest.mark.fault(23)
def test_an_all_masked_batch_gives_a_differentiable_zero(paths, monkeypatch):
    # As on a GPU, where TRL passes the live positions only: none here, so our kernel sees zero rows.
    monkeypatch.setattr(utils, "_use_triton", lambda device: True)
    integration.patch()
    model = AutoModelForCausalLM.from_pretrained(paths.policy)
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    ids = torch.arange(4, 16).view(2, 6)
    out = model(input_ids=ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
    out.loss.backward()
    assert out.loss.item() == 0.0 and not out.is_top1.any()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters()) and model.lm_head.weight.grad is not None
    assert integration.status().calls == {"fused_head": 1}


@pytest.mark.fault(109)
def test_a_run_that_never_reaches_our_kernels_counts_no_call(paths):
    integration.patch(level="pairs")
    train(build("sft/nll", paths))
    assert integration.status().calls == {}


def test_the_empty_seam_of_trl_1_15_without_triton_is_filled_and_emptied_again(paths, monkeypatch):
    reference = stock("dpo/sigmoid", paths)
    monkeypatch.setattr(trl, "__version__", "1.15.0")
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", None)
    with pytest.raises(AttributeError):
        train(build("dpo/sigmoid", paths))
    integration.patch()
    assert gap(reference, train(build("dpo/sigmoid", paths))) <= TOLERANCE
    integration.unpatch()
    assert utils._ChunkedLogProbFunction is None
