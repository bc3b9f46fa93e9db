"""``patch`` and ``unpatch`` of OpenRLHF: on a stand-in with its signatures, and on an installed OpenRLHF itself."""

import importlib
import sys
import types

import openrlhf_host
import pytest
import torch

import rlkernels
from rlkernels.integrations import openrlhf
from rlkernels.integrations.openrlhf import seams

UTILS = """
import torch

def log_probs_from_logits(logits, labels, temperature=1.0): return "stock"
def compute_entropy(logits): return "stock"
def compute_approx_kl(log_probs, log_probs_base, log_probs_old=None, kl_estimator="k1", unbiased_gradient=False):
    return "stock"
def compute_reward(r, kl_coef, kl, action_mask=None, reward_clip_range=None): return "stock"
def masked_mean(tensor, mask, dim=None): return "stock"
def masked_normalize(tensor, mask, dim=1, eps=1e-8): return "stock"
"""
LOSS = """
from torch import nn
from .utils import masked_mean

def aggregate_loss(loss, loss_mask, token_level_loss=True, dp_size=1, batch_num_tokens=None, global_batch_size=None):
    return "stock"

class PolicyLoss(nn.Module):
    def __init__(self, clip_eps_low=0.2, clip_eps_high=0.2, dual_clip=None, token_level_loss=True,
                 policy_loss_type="ppo", is_correction_level="off", is_correction_mode="mask",
                 is_correction_gating="ratio", is_correction_threshold=(0.5, 5.0)):
        super().__init__()
        vars(self).update({k: v for k, v in locals().items() if k not in ("self", "__class__")})
    def forward(self, log_probs, old_log_probs, advantages, action_mask=None, rollout_log_probs=None, dp_size=1,
                batch_num_tokens=None, global_batch_size=None):
        return "stock"

class ValueLoss(nn.Module):
    def __init__(self, clip_eps=None, token_level_loss=True):
        super().__init__()
        self.clip_eps, self.token_level_loss = clip_eps, token_level_loss
    def forward(self, values, old_values, returns, action_mask=None, dp_size=1, batch_num_tokens=None,
                global_batch_size=None):
        return "stock"

class PairWiseLoss(nn.Module):
    def forward(self, chosen_reward, reject_reward, margin=None): return "stock"

class LogExpLoss(nn.Module):
    def forward(self, chosen_reward, reject_reward, margin=None): return "stock"

class DPOLoss(nn.Module):
    def __init__(self, beta, label_smoothing=0.0, ipo=False):
        super().__init__()
        self.beta, self.label_smoothing, self.ipo = beta, label_smoothing, ipo
    def forward(self, policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps):
        return "stock"

class SFTLoss(nn.Module):
    def __init__(self, token_level_loss=True):
        super().__init__()
        self.token_level_loss = token_level_loss
    def forward(self, per_token_logps, loss_mask, dp_size=1, batch_num_tokens=None, global_batch_size=None):
        return "stock"

class GPTLMLoss(nn.Module):
    def __init__(self, ring_attn_group=None):
        super().__init__()
        self.IGNORE_INDEX, self.ring_attn_group = -100, ring_attn_group
    def forward(self, logits, labels): return "stock"
"""
MAKER = """
import torch
from openrlhf.models.utils import compute_reward as reward_of_tokens

class RemoteExperienceMaker:
    @torch.no_grad()
    def get_advantages_and_returns(self, values, rewards, action_mask, gamma, lambd): return "stock"
    @torch.no_grad()
    def get_cumulative_returns(self, rewards, action_mask, gamma): return "stock"
"""
FILES = {
    "openrlhf/__init__.py": '__version__ = "0.11.2"',
    "openrlhf/models/__init__.py": "from .loss import *",
    "openrlhf/models/utils.py": UTILS,
    "openrlhf/models/loss.py": LOSS,
    "openrlhf/trainer/__init__.py": "",
    "openrlhf/trainer/critic.py": "from openrlhf.models.utils import masked_mean as mean",
    "openrlhf/trainer/ppo_utils/__init__.py": "",
    "openrlhf/trainer/ppo_utils/experience_maker.py": MAKER,
}
ONES = torch.ones(1, 2)


def forget():
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "openrlhf"}


@pytest.fixture
def host(tmp_path, monkeypatch):
    """Writes the stand-in, with lines replaced, and returns a function that imports its modules."""
    before = forget()
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(**replaced):
        for name, text in FILES.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            for old, new in replaced.items():
                text = text.replace(old, new)
            path.write_text(text)
        importlib.invalidate_caches()

    write()
    yield types.SimpleNamespace(write=write, get=lambda name: importlib.import_module(f"openrlhf.{name}"))
    try:
        openrlhf.unpatch()
    finally:
        forget()
        sys.modules.update(before)
        assert not openrlhf._waiting


def calls(models, utils):
    """A call of each seam below ``openrlhf.models``, by its name."""
    logits, ids = torch.zeros(1, 2, 4), torch.zeros(1, 2, dtype=torch.long)
    return {
        "log_probs_from_logits": lambda: utils.log_probs_from_logits(logits, ids),
        "compute_entropy": lambda: utils.compute_entropy(logits),
        "compute_approx_kl": lambda: utils.compute_approx_kl(ONES, ONES),
        "compute_reward": lambda: utils.compute_reward(torch.ones(1), 0.1, ONES, ONES),
        "masked_mean": lambda: utils.masked_mean(ONES, ONES),
        "masked_normalize": lambda: utils.masked_normalize(ONES, ONES),
        "aggregate_loss": lambda: models.aggregate_loss(ONES, ONES),
        "PolicyLoss": lambda: models.PolicyLoss()(ONES, ONES, ONES, ONES),
        "ValueLoss": lambda: models.ValueLoss()(ONES, ONES, ONES, ONES),
        "PairWiseLoss": lambda: models.PairWiseLoss()(ONES[0], ONES[0]),
        "LogExpLoss": lambda: models.LogExpLoss()(ONES[0], ONES[0]),
        "DPOLoss": lambda: models.DPOLoss(0.1)(*[ONES[0]] * 4),
        "SFTLoss": lambda: models.SFTLoss()(ONES, ONES),
        "GPTLMLoss": lambda: models.GPTLMLoss()(logits, ids),
    }


def test_every_seam_calls_ours_counts_it_and_is_restored_to_the_very_object(host):
    models, utils, critic, maker = (
        host.get(name) for name in ("models", "models.utils", "trainer.critic", "trainer.ppo_utils.experience_maker")
    )
    owners = {name: getattr(models, name) for name in seams.CLASSES} | {"maker": maker.RemoteExperienceMaker}
    before = [dict(vars(x)) for x in (models, utils, critic, maker, *owners.values())]
    report = openrlhf.patch()
    assert report.host == "OpenRLHF 0.11.2" and not report.skipped
    assert critic.mean is utils.masked_mean is sys.modules["openrlhf.models.loss"].masked_mean
    assert "openrlhf.trainer.critic.mean -> rlkernels (masked_mean) (OpenRLHF 0.11.2)" in str(report)
    assert maker.reward_of_tokens is utils.compute_reward
    every = calls(models, utils)
    assert all(call() != "stock" for call in every.values())
    made = maker.RemoteExperienceMaker()
    assert made.get_advantages_and_returns(ONES, ONES, ONES, 1.0, lambd=1.0) != "stock"
    assert made.get_cumulative_returns(ONES, None, gamma=1.0).tolist() == [[2.0, 1.0]]
    expected = dict.fromkeys([*every, *seams.METHODS], 1)
    assert rlkernels.status()["openrlhf"].calls == openrlhf.status().calls == expected
    assert not openrlhf.status().delegations and len(openrlhf.status().replaced) == len(report.replaced)
    openrlhf.unpatch()
    assert [dict(vars(x)) for x in (models, utils, critic, maker, *owners.values())] == before
    assert not openrlhf.status().replaced and critic.mean(ONES, ONES) == "stock"


def test_an_instance_and_a_subclass_made_before_the_patch_call_ours_and_a_forward_of_its_own_stays(host):
    models = host.get("models")

    class Inherits(models.PolicyLoss):
        pass

    class Overrides(models.PolicyLoss):
        def forward(self, *args):
            return "its own"

    loss, inherits, overrides = models.PolicyLoss(), Inherits(), Overrides()
    openrlhf.patch()
    arguments = [ONES] * 4
    assert loss(*arguments)[0].item() == inherits(*arguments)[0].item() == -1.0
    assert overrides(*arguments) == "its own" and isinstance(loss, models.PolicyLoss)


def test_modules_imported_after_the_patch_are_patched_and_restored_too(host):
    report = openrlhf.patch()
    assert report.skipped == (f"{seams.MAKER} is patched when it has been imported",)
    critic, maker = host.get("trainer.critic"), host.get("trainer.ppo_utils.experience_maker")
    assert critic.mean(ONES, ONES).item() == 1.0
    assert maker.RemoteExperienceMaker().get_cumulative_returns(ONES, ONES, 1.0).tolist() == [[2.0, 1.0]]
    openrlhf.unpatch()
    assert critic.mean(ONES, ONES) == "stock"
    assert maker.RemoteExperienceMaker().get_cumulative_returns(ONES, ONES, 1.0) == "stock"


def test_an_experience_maker_imported_after_unpatch_stays_as_it_is(host):
    openrlhf.patch()
    openrlhf.unpatch()
    maker = host.get("trainer.ppo_utils.experience_maker")
    assert maker.RemoteExperienceMaker().get_cumulative_returns(ONES, ONES, 1.0) == "stock"


@pytest.mark.fault(108)
def test_patching_twice_is_patching_once(host):
    first = openrlhf.patch()
    held = host.get("models.utils").masked_mean
    assert openrlhf.patch() == first and host.get("models.utils").masked_mean is held
    host.get("trainer.ppo_utils.experience_maker")
    assert len(openrlhf.patch().replaced) == len(first.replaced) + 2  # the two methods
    openrlhf.unpatch()
    assert host.get("models.utils").masked_mean(ONES, ONES) == "stock"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("masked_mean(tensor, mask, dim=None)", "masked_mean(tensor, weights, dim=None)", "masked_mean takes"),
        ("margin=None): return", "margins=None): return", "PairWiseLoss.forward takes"),
        ("clip_eps=None, token_level_loss=True)", "clip=None, token_level_loss=True)", "ValueLoss.__init__ takes"),
        (
            "class PairWiseLoss(nn.Module):",
            "class PairWiseLoss(nn.Module):\n    def __init__(self, x): 0",
            "PairWiseLoss",
        ),
        ("class SFTLoss", "class SFTLosses", "SFTLoss does not exist"),
        ('"0.11.2"', '"0.11.0"', "OpenRLHF 0.11.0: known are 0.11.2"),
        ('"0.11.2"', '"0.12.0"', "patch(strict=False) accepts a newer one"),
    ],
)
def test_an_unknown_version_or_signature_is_refused_and_nothing_is_replaced(host, old, new, words):
    host.write(**{old: new})
    utils = host.get("models.utils")
    before = dict(vars(utils))
    with pytest.raises(RuntimeError) as refused:
        openrlhf.patch()
    assert words in str(refused.value) and "nothing was patched" in str(refused.value)
    assert dict(vars(utils)) == before and not openrlhf.status().replaced


def test_a_newer_version_with_known_signatures_is_accepted_when_asked(host):
    host.write(**{'"0.11.2"': '"0.12.0"'})
    assert openrlhf.patch(strict=False).host == "OpenRLHF 0.12.0"


def test_the_patch_of_another_library_is_refused_before_and_after_ours(host):
    utils = host.get("models.utils")
    stock, foreign = utils.masked_mean, lambda tensor, mask, dim=None: "foreign"
    for wrapped in (foreign, torch.no_grad()(foreign)):
        utils.masked_mean = wrapped
        with pytest.raises(RuntimeError, match="another library has patched it|is not OpenRLHF's own"):
            openrlhf.patch()
    utils.masked_mean = stock
    openrlhf.patch()
    ours, utils.masked_mean = utils.masked_mean, foreign
    for change in (openrlhf.patch, openrlhf.unpatch):
        with pytest.raises(RuntimeError, match="after our patch"):
            change()
    utils.masked_mean = ours


def test_a_call_outside_our_domain_goes_to_the_original_and_is_counted_or_raises(host):
    models, utils = host.get("models"), host.get("models.utils")
    learned = ONES.clone().requires_grad_()
    outside = {
        "mask and tensor of different shapes": lambda: utils.masked_mean(ONES, ONES[:, :1]),
        "dim is not an int": lambda: utils.masked_mean(ONES, ONES, (0, 1)),
        "tensor, mask of different shapes": lambda: utils.masked_normalize(ONES, mask=ONES[:, :1]),
        "log_probs_base requires a gradient": lambda: utils.compute_approx_kl(ONES, learned),
        "old_log_probs requires a gradient": lambda: models.PolicyLoss()(ONES, learned, ONES, ONES),
        "a tensor of torch.complex64": lambda: utils.compute_entropy(ONES.to(torch.complex64)),
    }
    openrlhf.patch(strict=False)
    assert {call() for call in outside.values()} == {"stock"}
    assert {reason: n for (_, reason), n in openrlhf.status().delegations.items()} == dict.fromkeys(outside, 1)
    assert not openrlhf.status().calls
    openrlhf.patch()
    for reason, call in outside.items():
        with pytest.raises(RuntimeError, match=reason.replace(".", r"\.")):
            call()


def test_openrlhf_that_is_not_there_or_cannot_be_imported_is_an_import_error(host, monkeypatch, tmp_path):
    host.write(**{"import torch\n\ndef": "import no_such_accelerator\n\ndef"})
    with pytest.raises(ImportError, match=r"no_such_accelerator.*pip install openrlhf==0.11.2"):
        openrlhf.patch()
    forget()
    monkeypatch.setitem(sys.modules, "openrlhf", None)
    with pytest.raises(ImportError, match=r"needs OpenRLHF.*pip install openrlhf==0.11.2"):
        openrlhf.patch()


# An OpenRLHF that is installed.


@pytest.fixture(scope="module")
def installed():
    """``openrlhf.models`` itself."""
    forget()
    yield openrlhf_host.imported()
    openrlhf.unpatch()
    forget()


def actor_run(actor, module):
    """Action log-probabilities and entropy of ``Actor.forward``, and the gradients of the model."""
    module.zero_grad()
    sequences = torch.arange(14).view(2, 7) % 11
    mask = torch.tensor([[1] * 7, [0, 0] + [1] * 5])
    actions = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    logprobs, output = actor(sequences, actions, mask, return_output=True, return_entropy=True)
    (logprobs.sum() + (output.entropy * 0.1).sum()).backward()
    return [logprobs.detach(), output.entropy.detach(), *(p.grad.clone() for p in module.parameters())]


class Tiny(torch.nn.Module):
    """A language model of one embedding and one head."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = torch.nn.Embedding(11, 8), torch.nn.Linear(8, 11)

    def forward(self, sequences, attention_mask=None, position_ids=None):
        from transformers.modeling_outputs import CausalLMOutputWithPast

        return CausalLMOutputWithPast(logits=self.head(self.embedding(sequences)))


@pytest.mark.parametrize("temperature", (1.0, 0.7))
def test_the_actor_of_openrlhf_gives_the_same_log_probabilities_entropy_and_gradients(installed, temperature):
    torch.manual_seed(0)
    module = Tiny()
    actor = installed.Actor.__new__(installed.Actor)
    torch.nn.Module.__init__(actor)
    actor.model, actor.temperature, actor.packing_samples = module, temperature, False
    stock = actor_run(actor, module)
    openrlhf.patch()
    ours = actor_run(actor, module)
    state = openrlhf.status()
    assert state.calls == {"log_probs_from_logits": 1, "compute_entropy": 1} and not state.delegations
    for x, y in zip(stock, ours, strict=True):
        assert (x - y).abs().max() <= 2e-6 * x.abs().max()
    openrlhf.unpatch()


def test_an_error_of_one_percent_in_the_log_probabilities_would_be_seen_at_the_actor(installed, monkeypatch):
    torch.manual_seed(0)
    module = Tiny()
    actor = installed.Actor.__new__(installed.Actor)
    torch.nn.Module.__init__(actor)
    actor.model, actor.temperature, actor.packing_samples = module, 1.0, False
    stock = actor_run(actor, module)
    right = seams.functions.log_probs_from_logits
    monkeypatch.setattr(seams.functions, "log_probs_from_logits", lambda *args: right(*args) * 1.01)
    openrlhf.patch()
    wrong = actor_run(actor, module)
    openrlhf.unpatch()
    assert max(((x - y).abs().max() / x.abs().max()).item() for x, y in zip(stock, wrong, strict=True)) > 5e-3


def test_the_installed_openrlhf_is_patched_in_all_its_importers_and_restored(installed):
    names = ("models.actor", "models.loss", "models.utils", "models", "trainer.ppo_utils.experience_maker")
    report = openrlhf.patch()
    modules = [importlib.import_module(f"openrlhf.{name}") for name in names]
    maker, utils = modules[-1], modules[2]
    assert maker.compute_reward is utils.compute_reward and modules[0].compute_entropy is utils.compute_entropy
    made = maker.RemoteExperienceMaker.__new__(maker.RemoteExperienceMaker)
    assert made.get_cumulative_returns(ONES, ONES, 1.0).tolist() == [[2.0, 1.0]]
    every = calls(installed, utils)
    for call in every.values():
        call()
    assert set(openrlhf.status().calls) == {*every, "get_cumulative_returns"}
    assert len(openrlhf.status().replaced) > len(report.replaced)
    openrlhf.unpatch()
    assert all(getattr(utils, name).__module__ == "openrlhf.models.utils" for name in ("masked_mean", "compute_reward"))
    assert not any(hasattr(getattr(utils, name), "__wrapped__") for name in ("masked_mean", "compute_reward"))
