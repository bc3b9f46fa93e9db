"""The functions of DeepSpeed-Chat against the recorded answers of its own code, and what ``patch`` does to a host.

The host here is a small one with DeepSpeed-Chat's names and signatures. ``test_deepspeed_chat_originals.py`` patches
the real one.
"""

import doctest
import importlib
import json
import sys
import types
from pathlib import Path

import deepspeed_chat_cases as cases
import pytest
import torch
from torch import nn

import rlkernels
from rlkernels.integrations import deepspeed_chat
from rlkernels.integrations.deepspeed_chat import functions

RECORD = json.loads((Path(__file__).parent / "recorded/deepspeed_chat.json").read_text())
SOURCE = """
def gather_log_probs(logits, labels):
    return "host"

class DeepSpeedPPOTrainer:
    kl_ctl, clip_reward_value, cliprange, cliprange_value, gamma, lam = 0.1, 5, 0.2, 0.2, 1.0, 0.95

    def compute_rewards(self, prompts, log_probs, ref_log_probs, reward_score, action_mask):
        return "host"

    def actor_loss_fn(self, logprobs, old_logprobs, advantages, mask):
        return "host"

    def critic_loss_fn(self, values, old_values, returns, mask):
        return "host"

    def get_advantages_and_returns(self, values, rewards, start):
        return "host"

    def logp(self, logits, labels):
        return gather_log_probs(logits, labels)
"""
REWARD = """
from torch import nn

class RewardModel(nn.Module):
    def __init__(self, base_model, tokenizer, num_padding_at_beginning=0, compute_fp32_loss=False):
        super().__init__()
        self.rwtransformer, self.PAD_ID = base_model, tokenizer.pad_token_id
        self.num_padding_at_beginning, self.compute_fp32_loss = num_padding_at_beginning, compute_fp32_loss
        self.v_head = nn.Linear(base_model.config.hidden_size, 1, bias=False)

    def forward(self, input_ids=None, past_key_values=None, attention_mask=None, position_ids=None, head_mask=None,
                inputs_embeds=None, use_cache=False):
        return "host"

    def forward_value(self, input_ids=None, attention_mask=None, past_key_values=None, position_ids=None,
                      head_mask=None, inputs_embeds=None, return_value_only=False, prompt_length=0, use_cache=False):
        assert return_value_only, "only the scores of tokens come from here"
        more = {} if self.rwtransformer.config.model_type == "llama" else {"head_mask": head_mask}
        return self.v_head(self.rwtransformer(input_ids, **more)[0]).squeeze(-1)
"""
SCRIPT = """
def get_batch_logps(logits, input_ids, label_mask):
    return "host"
"""
NAMES = {
    "dschat": "",
    "dschat.rlhf": "",
    "dschat.rlhf.ppo_trainer": SOURCE,
    "dschat.utils": "",
    "dschat.utils.model": "",
    "dschat.utils.model.reward_model": REWARD,
    "a_dpo_script": SCRIPT,
}


@pytest.fixture
def fake(monkeypatch):
    """Installs a host whose sources may be changed: ``fake(old=new)``."""

    def install(old="", new=""):
        for name, source in NAMES.items():
            module = types.ModuleType(name)
            module.__path__ = []
            module.__file__ = "/x/step2_dpo_finetuning/main.py" if name == "a_dpo_script" else f"/x/{name}.py"
            exec(source.replace(old, new) if old else source, vars(module))
            monkeypatch.setitem(sys.modules, name, module)
        ppo, reward = (importlib.import_module(name) for name in ("dschat.rlhf.ppo_trainer", REWARD_NAME))
        return types.SimpleNamespace(ppo=ppo, reward=reward, dpo=sys.modules["a_dpo_script"])

    yield install
    deepspeed_chat.unpatch()


REWARD_NAME = "dschat.utils.model.reward_model"
PLACES = (
    ("gather_log_probs", lambda host: host.ppo),
    *((name, lambda host: host.ppo.DeepSpeedPPOTrainer) for name in ("compute_rewards", "actor_loss_fn")),
    *((name, lambda host: host.ppo.DeepSpeedPPOTrainer) for name in ("critic_loss_fn", "get_advantages_and_returns")),
    ("forward", lambda host: host.reward.RewardModel),
    ("forward_value", lambda host: host.reward.RewardModel),
    ("get_batch_logps", lambda host: host.dpo),
)


def held(host):
    return [vars(owner(host))[name] for name, owner in PLACES]


def close(found, want, rtol):
    assert found.keys() == want.keys()
    for name, tensors in want.items():
        assert len(found[name]) == len(tensors), name
        for got, x in zip(found[name], tensors, strict=True):
            torch.testing.assert_close(
                got.double(), x, rtol=rtol, atol=rtol, msg=lambda text, name=name: f"{name}: {text}"
            )


def recorded():
    return {
        name: [torch.tensor(numbers, dtype=torch.float64).view(shape) for shape, numbers in tensors]
        for name, tensors in RECORD["cases"].items()
    }


def ours(host):
    return cases.system(functions, deepspeed_chat.RLKRewardModel)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_values_and_gradients_are_those_that_deepspeed_chat_gave(fake, dtype, rtol):
    assert len(RECORD["cases"]) == 12 * len(cases.SEEDS) and RECORD["commit"] == cases.COMMIT
    close(cases.measured(ours(fake()), dtype), recorded(), rtol)


def test_one_percent_of_error_is_noticed(fake, monkeypatch):
    host = fake()
    for name in ("token_logprobs", "policy_loss", "value_loss", "assemble_rewards"):
        right = getattr(functions, name)
        monkeypatch.setattr(functions, name, lambda *a, right=right, **k: 1.01 * right(*a, **k))
        with pytest.raises(AssertionError):
            close(cases.measured(ours(host)), recorded(), 1e-3)
        monkeypatch.undo()
        host = fake()


def test_a_pair_is_scored_as_by_its_formula():
    ids = torch.tensor([[5, 6, 7, 0], [5, 8, 0, 0]])
    rewards = torch.tensor([[0.0, 1.0, 2.0, 9.0], [0.0, 1.5, -1.0, 9.0]], dtype=torch.float64)
    out = deepspeed_chat.pairwise_divergence_loss(rewards, ids, 0, 0, True)
    want = (
        torch.log1p(torch.exp(torch.tensor(0.5).double())) + torch.log1p(torch.exp(torch.tensor(-3.0).double()))
    ) / 2
    assert out["loss"].item() == pytest.approx(want.item(), rel=1e-12)
    assert out["chosen_mean_scores"].tolist() == [2.0] and out["rejected_mean_scores"].tolist() == [1.5]


@pytest.mark.parametrize("compute_fp32_loss", [False, True])
def test_the_results_of_a_bf16_reward_model_have_the_dtypes_of_the_originals(compute_fp32_loss):
    ids, hidden, head = cases.pairs("padded", 0)
    rewards = (hidden @ head.mT).squeeze(-1).bfloat16()
    out = deepspeed_chat.pairwise_divergence_loss(rewards, ids, cases.PAD, 0, compute_fp32_loss)
    assert out["loss"].dtype == (torch.float32 if compute_fp32_loss else torch.bfloat16)
    assert out["chosen_mean_scores"].dtype == out["rejected_mean_scores"].dtype == torch.bfloat16


def test_masked_positions_reach_nothing_whatever_they_hold():
    new, old, advantages, values, returns, _ = cases.tokens(0)[0]
    mask = cases.tokens(0)[1]
    spoilt = [torch.where(mask != 0, x, float("nan")) for x in (new, old, advantages, values, returns)]
    for got, want in (
        (functions.actor_loss_fn(*spoilt[:3], mask), functions.actor_loss_fn(new, old, advantages, mask)),
        (
            functions.critic_loss_fn(spoilt[3], *spoilt[1:3], mask),
            functions.critic_loss_fn(values, old, advantages, mask),
        ),
    ):
        assert torch.equal(got, want)
    prompts, new, ref, score, mask = cases.experience(0)
    want = functions.compute_rewards(prompts, new, ref, score, mask)
    ended = want == 0
    assert ended.any()
    spoilt = [torch.where(ended, float("nan"), x) for x in (new, ref)]
    assert torch.equal(functions.compute_rewards(prompts, *spoilt, score, mask), want)
    logits, ids, mask = cases.sequences(0)
    want = functions.get_batch_logps(logits, ids, mask)
    dead = torch.cat([mask[:, 1:] == 0, torch.ones(4, 1, dtype=torch.bool)], 1)
    assert torch.equal(functions.get_batch_logps(logits.masked_fill(dead[..., None], float("nan")), ids, mask), want)


def test_the_host_reads_nothing_of_a_device():
    """On ``meta`` there is nothing that could be read, so that a read raises."""

    def made(*shape):
        return torch.empty(shape, device="meta")

    ids, leaf = torch.zeros(2, 5, dtype=torch.long, device="meta"), made(4, 5).requires_grad_()
    functions.gather_log_probs(made(2, 5, 7), ids)
    functions.actor_loss_fn(made(2, 5), made(2, 5), made(2, 5), ids)
    functions.critic_loss_fn(made(2, 5), made(2, 5), made(2, 5), ids)
    functions.get_advantages_and_returns(made(2, 5), made(2, 5), 2)
    functions.compute_rewards(ids[:, :3], made(2, 5), made(2, 5), made(2), ids)
    functions.get_batch_logps(made(2, 5, 7), ids, ids)
    out = functions.pairwise_divergence_loss(leaf, ids.repeat(2, 1), cases.PAD, 1)
    (out["loss"] + out["chosen_mean_scores"].sum()).backward()
    functions.answer_end_scores(made(2, 5), ids, cases.PAD, 2)
    with pytest.raises(RuntimeError, match="meta"):
        out["loss"].item()


def test_no_label_is_ignored():
    with pytest.raises(IndexError, match="-100"):
        functions.gather_log_probs(torch.zeros(2, 3), torch.tensor([0, -100]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: functions.get_advantages_and_returns(x, x, 3), r"start must be a position of \[0, 3\), got 3"),
        (
            lambda x: functions.get_advantages_and_returns(x[0], x, 0),
            r"values has shape \(3,\), expected two dimensions",
        ),
        (
            lambda x: functions.compute_rewards(x.long(), x, x, x[:, 0], x > 0, kl_ctl=-1.0),
            "kl_ctl must not be negative",
        ),
        (lambda x: functions.compute_rewards(x[:, :0], x, x, x[:, 0], x > 0), r"prompts has shape \(2, 0\)"),
        (lambda x: functions.compute_rewards(x, x, x, x[:, 0], (x > 0)[:1]), "action_mask has shape"),
        (lambda x: functions.answer_end_scores(x, x.long(), 0, 1), "prompt_length must be greater than 1, got 1"),
        (lambda x: functions.pairwise_divergence_loss(x, x.long(), 0), "pair 0 differs at its first token"),
    ],
)
def test_a_bad_argument_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.arange(6.0).view(2, 3))


def test_patch_replaces_every_function_and_unpatch_restores_the_very_objects(fake):
    host = fake()
    before = held(host)
    report = deepspeed_chat.patch()
    assert len(report.replaced) == len(PLACES) and report.skipped == ()
    assert all(now is not was for now, was in zip(held(host), before, strict=True))
    assert deepspeed_chat.patch() == report, "twice is once"
    assert rlkernels.status()["deepspeed_chat"] == deepspeed_chat.status()
    assert len(deepspeed_chat.status().replaced) == len(PLACES)
    deepspeed_chat.unpatch()
    assert all(now is was for now, was in zip(held(host), before, strict=True))
    assert deepspeed_chat.status().replaced == ()


def test_patched_methods_take_the_settings_of_their_trainer_and_every_call_is_counted(fake):
    host = fake()
    deepspeed_chat.patch()
    trainer = host.ppo.DeepSpeedPPOTrainer()
    new, old, advantages, values, returns, rewards = cases.tokens(0)[0]
    mask = cases.tokens(0)[1]
    trainer.cliprange, trainer.cliprange_value, trainer.gamma, trainer.lam = 0.05, 0.1, 0.9, 0.5
    trainer.kl_ctl, trainer.clip_reward_value = 0.3, 1.0
    prompts, logp, ref, score, actions = cases.experience(0)
    for got, want in (
        (
            trainer.actor_loss_fn(new, old, advantages, mask),
            functions.actor_loss_fn(new, old, advantages, mask, cliprange=0.05),
        ),
        (
            trainer.critic_loss_fn(values, old, returns, mask=mask),
            functions.critic_loss_fn(values, old, returns, mask, cliprange_value=0.1),
        ),
        (
            trainer.get_advantages_and_returns(values, rewards, 2)[0],
            functions.get_advantages_and_returns(values, rewards, 2, gamma=0.9, lam=0.5)[0],
        ),
        (
            trainer.compute_rewards(prompts, logp, ref, score, actions),
            functions.compute_rewards(prompts, logp, ref, score, actions, kl_ctl=0.3, clip_reward_value=1.0),
        ),
        (trainer.logp(*cases.logits(0)), functions.gather_log_probs(*cases.logits(0))),
        (host.dpo.get_batch_logps(*cases.sequences(0)), functions.get_batch_logps(*cases.sequences(0))),
    ):
        assert torch.equal(got, want)
    ids, hidden, head = cases.pairs("padded", 0)
    out = cases.reward_model(host.reward.RewardModel, hidden, head)(ids)
    assert list(out) == ["loss", "chosen_mean_scores", "rejected_mean_scores"]
    names = [name for name, _ in PLACES if name != "forward_value"]
    assert deepspeed_chat.status().calls == dict.fromkeys(names, 1) and not deepspeed_chat.status().delegations


OUTSIDE = [
    ("actor_loss_fn", lambda t, x, m: t.actor_loss_fn(x, x, x[:, :1], m), "advantages is broadcast"),
    ("actor_loss_fn", lambda t, x, m: t.actor_loss_fn(x, x, x.clone().requires_grad_(), m), "advantages requires a"),
    ("critic_loss_fn", lambda t, x, m: t.critic_loss_fn(x.to("meta"), x, x, m), "values is on the device meta"),
    (
        "get_advantages_and_returns",
        lambda t, x, m: t.get_advantages_and_returns(x, x.int(), 0),
        r"rewards is torch\.int32",
    ),
    ("compute_rewards", lambda t, x, m: t.compute_rewards(m, x, x, x[:, 0], m), "kl_ctl is no number of at least 0"),
    ("gather_log_probs", lambda t, x, m: t.logp([0.0], m), "logits is a list"),
]


@pytest.mark.parametrize(("name", "call", "reason"), OUTSIDE)
def test_a_call_outside_our_domain_raises_or_goes_to_the_original_and_is_counted(fake, name, call, reason):
    host = fake()
    trainer = host.ppo.DeepSpeedPPOTrainer()
    trainer.kl_ctl = -0.1
    x, mask = cases.tokens(0)[0][0], cases.tokens(0)[1]
    deepspeed_chat.patch()
    with pytest.raises(RuntimeError, match=f"{name}: {reason}.*; patch\\(strict=False\\) hands such calls"):
        call(trainer, x, mask)
    deepspeed_chat.patch(strict=False)
    assert call(trainer, x, mask) == "host"
    ((seam, why), count), *others = deepspeed_chat.status().delegations.items()
    assert seam == name and why.startswith(reason.replace("\\", "")) and count == 1 and not others
    assert name not in deepspeed_chat.status().calls


def test_an_odd_number_of_rows_is_none_of_ours(fake):
    host = fake()
    ids, hidden, head = cases.pairs("padded", 0)
    model = cases.reward_model(host.reward.RewardModel, hidden, head)
    deepspeed_chat.patch(strict=False)
    assert model(ids[:5]) == "host"
    assert deepspeed_chat.status().delegations == {("forward", "input_ids has an odd number of rows"): 1}


@pytest.mark.fault(110)
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("advantages, mask", "advantages, loss_mask", r"actor_loss_fn takes \('self', .*'loss_mask'\), known"),
        (
            "(logits, labels):\n    return",
            "(scores, labels):\n    return",
            r"gather_log_probs takes \('scores', 'labels'\)",
        ),
        ("prompt_length=0", "prompt=0", r"forward_value takes .*'prompt'"),
        ("label_mask", "mask", r"get_batch_logps takes .*'mask'"),
        ("def compute_rewards", "def rewards", r"compute_rewards does not exist"),
    ],
)
def test_an_unknown_signature_is_refused_and_nothing_is_replaced(fake, old, new, message):
    host = fake(old, new)
    before = [vars(owner(host)).get(name) for name, owner in PLACES]
    with pytest.raises(RuntimeError, match=f"DeepSpeed-Chat: .*{message}.*nothing was patched"):
        deepspeed_chat.patch()
    assert all(vars(owner(host)).get(name) is was for (name, owner), was in zip(PLACES, before, strict=True))


@pytest.mark.fault(108)
def test_the_patch_of_another_library_is_left_alone(fake, monkeypatch):
    host = fake()
    monkeypatch.setattr(host.reward.RewardModel, "forward", lambda *args: "foreign")
    with pytest.raises(RuntimeError, match="another library has patched it"):
        deepspeed_chat.patch()
    assert host.ppo.DeepSpeedPPOTrainer.actor_loss_fn(None, 1, 2, 3, 4) == "host"


@pytest.mark.fault(106)
def test_a_subclass_keeps_its_own_loss(fake):
    host = fake()

    class Own(host.ppo.DeepSpeedPPOTrainer):
        def actor_loss_fn(self, logprobs, old_logprobs, advantages, mask):
            return "own"

    deepspeed_chat.patch()
    assert Own().actor_loss_fn(1, 2, 3, 4) == "own"


def test_a_host_without_deepspeed_keeps_its_reward_model_patched(fake, monkeypatch):
    host = fake()
    monkeypatch.delitem(sys.modules, "dschat.rlhf.ppo_trainer")
    monkeypatch.delitem(sys.modules, "a_dpo_script")

    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name == "dschat.rlhf.ppo_trainer":
                raise ModuleNotFoundError("No module named 'deepspeed'", name="deepspeed")

    monkeypatch.setattr(sys, "meta_path", [Finder(), *sys.meta_path])
    report = deepspeed_chat.patch()
    assert [line.split(" -> ")[0].split(".")[-1] for line in report.replaced] == ["forward", "forward_value"]
    assert (
        "needs DeepSpeed (No module named 'deepspeed')" in report.skipped[0] and "main.py absent" in report.skipped[1]
    )
    assert host.reward.RewardModel.forward is not None


def test_without_deepspeed_chat_the_error_says_what_to_install():
    if importlib.util.find_spec("dschat") is not None:
        pytest.skip("DeepSpeed-Chat is here")
    for ask in (deepspeed_chat.patch, lambda: deepspeed_chat.RLKRewardModel):
        with pytest.raises(ImportError, match="pip install -e applications/DeepSpeed-Chat"):
            ask()
    with pytest.raises(AttributeError, match="has no attribute 'RewardModel'"):
        deepspeed_chat.RewardModel  # noqa: B018


def test_the_examples_of_the_docstrings_run():
    found = doctest.testmod(functions)
    assert found.attempted > 10 and not found.failed


def test_the_subclass_is_a_reward_model_of_the_host(fake):
    host = fake()
    kind = deepspeed_chat.RLKRewardModel
    assert issubclass(kind, host.reward.RewardModel) and issubclass(kind, nn.Module)
    # Once made, and found where pickle looks for it.
    assert kind is getattr(importlib.import_module(kind.__module__), kind.__qualname__)


@pytest.mark.parametrize("name", ["actor_loss_fn", "critic_loss_fn"])
def test_a_loss_without_its_mask_is_refused(name):
    x = torch.zeros(1, 2)
    with pytest.raises(TypeError, match=f"{name}: mask must be a torch.Tensor"):
        getattr(functions, name)(x, x, x, None)
    with pytest.raises(TypeError, match=f"{name}: old_"):
        getattr(functions, name)(x, None, x, x)


def test_what_is_no_tensor_is_refused_by_the_name_of_the_function():
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(TypeError, match="answer_end_scores: values must"):
        functions.answer_end_scores(None, ids, 0, 2)
    with pytest.raises(TypeError, match="get_batch_logps: label_mask must"):
        functions.get_batch_logps(torch.zeros(1, 3, 4), ids, None)
