"""DeepSpeed-Chat's own code, run beside ours and with ours in its place.

It needs a checkout: ``DEEPSPEED_CHAT=PATH/applications/DeepSpeed-Chat`` of DeepSpeedExamples at commit 45b4b71.
"""

import hashlib
import json
import sys
import types
from pathlib import Path

import deepspeed_chat_cases as cases
import pytest
import torch

from rlkernels.integrations import deepspeed_chat
from rlkernels.integrations.deepspeed_chat import functions

pytestmark = pytest.mark.skipif(
    cases.checkout() is None,
    reason=f"{cases.VARIABLE} names no checkout of applications/DeepSpeed-Chat of DeepSpeedExamples",
)
RECORD = json.loads((Path(__file__).parent / "recorded/deepspeed_chat.json").read_text())


@pytest.fixture(scope="module")
def loaded():
    with cases.originals(cases.checkout()) as modules:
        sys.modules[modules.dpo.__name__] = modules.dpo
        yield modules
        del sys.modules[modules.dpo.__name__]


@pytest.fixture
def originals(loaded):
    yield loaded
    deepspeed_chat.unpatch()


def close(found, want, rtol):
    assert found.keys() == want.keys()
    for name, tensors in want.items():
        for got, x in zip(found[name], tensors, strict=True):
            torch.testing.assert_close(
                got.double(), x.double(), rtol=rtol, atol=rtol, msg=lambda text, n=name: f"{n}: {text}"
            )


def test_the_checkout_is_the_recorded_one_and_gives_the_recorded_numbers(originals):
    for name, digest in RECORD["files"].items():
        assert hashlib.sha256((cases.checkout() / name).read_bytes()).hexdigest() == digest, name
    recorded = {
        name: [torch.tensor(numbers, dtype=torch.float64).view(shape) for shape, numbers in tensors]
        for name, tensors in RECORD["cases"].items()
    }
    close(cases.measured(cases.of_originals(originals)), recorded, 1e-11)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_our_functions_and_subclass_agree_with_the_originals(originals, dtype, rtol):
    want = cases.measured(cases.of_originals(originals))
    close(cases.measured(cases.system(functions, deepspeed_chat.RLKRewardModel), dtype), want, rtol)


def test_the_patched_originals_agree_and_every_call_is_ours(originals):
    want = cases.measured(cases.of_originals(originals))
    report = deepspeed_chat.patch()
    assert len(report.replaced) == 8 and not report.skipped
    close(cases.measured(cases.of_originals(originals)), want, 1e-12)
    status, seeds = deepspeed_chat.status(), len(cases.SEEDS)
    assert status.calls.pop("forward") == seeds * len(cases.PAIRS)
    assert len(status.calls) == 7 and set(status.calls.values()) == {seeds} and not status.delegations
    deepspeed_chat.unpatch()
    close(cases.measured(cases.of_originals(originals)), want, 0)


@pytest.mark.parametrize("name", cases.PAIRS)
def test_identical_pairs_and_ends_are_those_of_the_original_in_bf16(originals, name):
    """In bf16 the original rounds every step; ours rounds once, so that the bound is that of bf16."""
    ids, hidden, head = cases.pairs(name, 5)
    options = {"opt": name == "opt"}
    theirs, mine, exact = (
        cases.reward_model(kind, hidden.to(dtype), head.to(dtype), **options)
        for kind, dtype in (
            (originals.reward.RewardModel, torch.bfloat16),
            (deepspeed_chat.RLKRewardModel, torch.bfloat16),
            (originals.reward.RewardModel, torch.float64),
        )
    )
    for model in (theirs, mine, exact):
        model(ids)["loss"].backward()
    outputs = [model(ids) for model in (theirs, mine, exact)]
    for key, x in outputs[0].items():
        assert outputs[1][key].dtype == x.dtype and outputs[1][key].shape == x.shape
    assert torch.equal(outputs[0]["chosen_mean_scores"], outputs[1]["chosen_mean_scores"])
    assert torch.equal(outputs[0]["rejected_mean_scores"], outputs[1]["rejected_mean_scores"])
    truth = exact.rwtransformer.hidden.grad
    gaps = [(model.rwtransformer.hidden.grad.double() - truth).norm() / truth.norm() for model in (theirs, mine)]
    assert gaps[1] < 2e-2 and gaps[1] <= 1.2 * gaps[0]


class Engine:
    """The face of a DeepSpeed engine that ``train_rlhf`` uses, over a model and plain SGD."""

    def __init__(self, model):
        self.module = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        self.norms = []

    def __call__(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def forward_value(self, *args, **kwargs):
        return self.module.forward_value(*args, **kwargs)

    def backward(self, loss):
        loss.backward()
        gradients = [p.grad.flatten() for p in self.module.parameters() if p.grad is not None]
        self.norms.append(torch.cat(gradients).norm().item())

    def step(self):
        self.optimizer.step()
        self.optimizer.zero_grad()

    def train(self):
        self.module.train()

    def eval(self):
        self.module.eval()


def trained(originals, steps=3):
    """Three steps of generating and training by the unmodified methods: losses and gradient norms."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=29,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    actor, ref = (transformers.LlamaForCausalLM(config) for _ in range(2))
    tokenizer = types.SimpleNamespace(pad_token_id=0)
    critic, reward = (originals.reward.RewardModel(transformers.LlamaModel(config), tokenizer) for _ in range(2))
    engines = [Engine(model) for model in (actor, ref, critic, reward)]
    trainer = cases.trainer(originals.ppo)
    args = types.SimpleNamespace(print_answers=False, align_overflow=False, local_rank=0)
    vars(trainer).update(
        zip(("actor_model", "ref_model", "critic_model", "reward_model"), engines, strict=True),
        tokenizer=tokenizer,
        args=args,
        max_answer_seq_len=6,
        z3_enabled=False,
        last_generated_experience=None,
    )
    found = []
    for step in range(steps):
        prompts = torch.randint(3, 29, (4, 5), generator=torch.Generator().manual_seed(step))
        prompts[0, :2] = 0
        inputs = trainer.generate_experience(prompts, (prompts != 0).long(), step)
        found += [x.item() for x in trainer.train_rlhf(inputs)]
        found += [inputs["logprobs"].sum().item(), inputs["rewards"].sum().item()]
    return found + engines[0].norms + engines[2].norms


def test_the_trainer_trains_as_before_on_our_kernels(originals, monkeypatch):
    """Its own ``generate_experience`` and ``train_rlhf``: losses and gradient norms, and the negative control."""
    stock = trained(originals)
    deepspeed_chat.patch()
    assert trained(originals) == pytest.approx(stock, rel=1e-4, abs=1e-6)
    status = deepspeed_chat.status()
    assert status.calls == {
        "gather_log_probs": 9,
        "compute_rewards": 3,
        "get_advantages_and_returns": 3,
        "actor_loss_fn": 3,
        "critic_loss_fn": 3,
        "forward_value": 9,
    }
    assert not status.delegations
    for name in ("token_logprobs", "policy_loss", "value_loss", "end_scores"):
        right = getattr(functions, name)

        def wrong(*args, right=right, **kwargs):
            result = right(*args, **kwargs)
            return (1.01 * result[0], *result[1:]) if isinstance(result, tuple) else 1.01 * result

        monkeypatch.setattr(functions, name, wrong)
        assert trained(originals) != pytest.approx(stock, rel=1e-4, abs=1e-6), name
        monkeypatch.undo()


def test_the_ratio_is_one_where_the_original_mixes_precisions(originals):
    """``--compute_fp32_loss`` upcasts the logits of the old log-probabilities alone."""
    logits = cases.logits(3)[0].bfloat16()
    labels = cases.logits(3)[1]

    def ratio(gather):
        return (gather(logits, labels) - gather(logits.float(), labels)).float().exp()

    assert (ratio(originals.ppo.gather_log_probs) - 1).abs().max() > 1e-3
    deepspeed_chat.patch()
    assert torch.equal(ratio(originals.ppo.gather_log_probs), torch.ones(labels.shape))
