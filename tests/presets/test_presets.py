"""Presets: the golden cases of a system run with nothing but its name, and every preset fits our functions."""

import inspect
import json

import golden_adapter
import pytest
import torch
from golden_adapter import Live, check_gradients, check_outputs
from golden_coverage import CASES
from present_backends import PRESENT

import rlkernels as rlk
from rlkernels import presets
from rlkernels.backends import use_backend
from rlkernels.losses.row_options import ROW_KINDS
from rlkernels.objectives import OBJECTIVES

NAMED = {
    case["id"]: case["preset"]
    for path in golden_adapter.FOLDER.glob("*.json")
    for case in json.loads(path.read_text())["cases"]
    if "preset" in case
}
KEYS = [(name, key) for name in presets.names() for key in presets.PRESETS[name].settings]
VARIANTS = {"policy.ppo_paper.no_clip": "no_clip"}
REST = {
    "policy.trl.dapo": {"normalizers": {"batch_num_tokens": 5.0, "count_empty_rows": True}},
    "dpo.openrlhf-0.11.cdpo0.1": {"label_smoothing": 0.1},
    "gae.bootstrap": {"gamma": 0.93, "lam": 0.77},
}
"""What a case asks for beside the conventions of its system: our keywords."""


def policy_loss(x, of):
    more = {"ref_logprobs": x["ref_logp"]} if "ref_logp" in x else {}
    loss = rlk.policy_loss(x["logp"], x["old_logp"], x["advantages"], x["mask"], **of("policy_loss"), **more)
    return {"loss": loss}


def value_loss(x, of):
    return {"loss": rlk.value_loss(x["values"], x["old_values"], x["returns"], x["mask"], **of("value_loss"))}


def gae(x, of):
    start = of.case.parameters.get("start", 0)  # a slice of the inputs
    rewards, values = x["rewards"][:, start:], x["values"][:, start:]
    options = of("gae") | {"bootstrap_values": x.get("bootstrap_value")}
    return dict(zip(("advantages", "returns"), rlk.gae(rewards, values, x.get("mask"), **options), strict=True))


def group_advantage(x, of):
    return {"advantages": rlk.group_advantages(x["rewards"], x["group_id"], **of("group_advantages"))}


def process_advantage(x, of):
    ends = torch.zeros(len(x["step_end"]), x["num_tokens"], dtype=torch.bool)
    rewards = torch.zeros(ends.shape, dtype=torch.float64)
    for row, (at, values) in enumerate(zip(x["step_end"], x["step_reward"], strict=True)):
        ends[row, at], rewards[row, at] = True, torch.tensor(values, dtype=torch.float64)
    groups = torch.zeros(len(ends), dtype=torch.int64)
    return {"advantages": rlk.step_advantages(rewards, ends, groups, **of("step_advantages"))}


def kl_controller(x, of):
    controller, found = rlk.KLController(**of("KLController")), []
    for kl in x["kl"]:
        controller.update(kl, 1)
        found.append(controller.coef)
    return {"coef": torch.stack(found)}


def preference_loss(x, of):
    columns = [x[name] for name in ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")]
    loss, metrics = rlk.dpo_loss(*columns, **of("dpo_loss"), return_metrics=True)
    return {"loss": loss, "accuracy": metrics["accuracy"], "margin": metrics["reward_margin"]}


def preference_loss_from_tokens(x, of):
    live, pairs = x["completion_mask"][:, 1:], len(x["per_token_logp"]) // 2
    sums = [rlk.sequence_sums(x[name], live) for name in ("per_token_logp", "ref_per_token_logp")]
    columns = [part for each in sums for part in (each[:pairs], each[pairs:])]
    return {"loss": rlk.dpo_loss(*columns, **of("dpo_loss"))}


def assemble_rewards(x, of):
    mask = x["attention_mask"][:, 1:].clone()
    mask[:, : x["prompt_length"] - 1] = 0
    rewards = rlk.assemble_rewards(
        x["score"], mask, logprobs=x["logp"], ref_logprobs=x["ref_logp"], **of("assemble_rewards")
    )
    of_answer = torch.ones_like(rewards)
    of_answer[:, : x["prompt_length"] - 1] = 0  # the source leaves the KL of the prompt there
    return {"rewards_after_end_zeroed": Live(rewards * of_answer, of_answer)}


def ppo_step_per_sample(x, of):
    start = x["query_len"] - 1
    logp = rlk.token_logprobs(x["logits"][:, start:-1], x["input_ids"][:, start + 1 :])
    advantages, returns = rlk.gae(x["rewards"], x["old_values"], **of("gae"))
    whitened = rlk.masked_whiten(advantages, **of("masked_whiten"))
    values = x["value_predictions"][:, start:-1]
    value_loss = rlk.value_loss(values, x["old_values"], returns, **of("value_loss"))
    return {
        "policy_loss": rlk.policy_loss(logp, x["old_logp"], whitened, **of("policy_loss")),
        "value_loss": value_loss,
        "value_loss_times_coef": presets.coefficients(of.preset)["vf_coef"] * value_loss,
        "whitened_advantages": whitened,
    }


def ppo_step_masked(x, of):
    policy, value = policy_loss(x, of)["loss"], value_loss(x, of)["loss"]
    loss = policy + presets.coefficients(of.preset)["vf_coef"] * value
    return {"policy_loss": policy, "value_loss": value, "loss": loss}


class Conventions:
    """The settings of a case's preset by function, with what the case itself asks for."""

    def __init__(self, case):
        self.case, self.preset = case, NAMED[case.id]

    def __call__(self, function):
        return presets.settings(self.preset, function, VARIANTS.get(self.case.id)) | REST.get(self.case.id, {})


@pytest.mark.parametrize("backend", PRESENT)
@pytest.mark.parametrize("case", [case for case in CASES if case.id in NAMED], ids=lambda case: case.id)
def test_a_golden_case_runs_with_the_name_of_its_preset(case, backend):
    inputs = case.tensors(torch.float64)
    with use_backend(backend):
        outputs = globals()[case.op](inputs, Conventions(case))
        compared = {name: x for name, x in outputs.items() if name in case.expected}
        assert compared, f"nothing of {case.id} was compared"
        check_outputs(case, compared, torch.float64)
        check_gradients(case, inputs, outputs, torch.float64)


FUNCTIONS = {
    "policy_loss": "policy_loss",
    "value_loss": "value_loss",
    "gae": "gae",
    "group_advantage": "group_advantages",
    "preference_loss": "dpo_loss",
    "preference_loss_from_tokens": "dpo_loss",
    "assemble_rewards": "assemble_rewards",
    "kl_controller": "KLController",
}
OURS = {"clip": "clip_range", "init": "coef", "kl_estimator": "kl"}
NUMBERS = "clip_low clip_high dual_clip clip gamma lam eps beta loss_type kl_coef kl_estimator init target".split()
COMPARED = [
    (case, name)
    for case in CASES
    if case.id in NAMED and case.op in FUNCTIONS
    for name in NUMBERS
    if name in case.parameters
]


@pytest.mark.parametrize(("case", "name"), COMPARED, ids=lambda x: getattr(x, "id", x))
def test_a_setting_is_the_number_that_the_system_was_run_with(case, name):
    # A number may change without a change of the case's loss, where no token lies between the two bounds.
    ours, function = OURS.get(name, name), FUNCTIONS[case.op]
    settings = Conventions(case)(function)
    default = inspect.signature(getattr(rlk, function)).parameters.get(ours)
    assert settings.get(ours, default and default.default) == case.parameters[name]


def test_every_preset_of_the_golden_files_is_there():
    assert set(NAMED.values()) <= set(presets.names())
    assert len(NAMED) == 27


@pytest.mark.parametrize(("name", "key"), KEYS, ids=[f"{name}-{key}" for name, key in KEYS])
def test_every_setting_is_a_keyword_of_its_function(name, key):
    function, _, variant = key.partition("/")
    known = set(inspect.signature(getattr(rlk, function)).parameters)
    settings = presets.settings(name, function, variant or None)
    if "objective" in settings:
        objective = settings["objective"]
        known |= set(ROW_KINDS[objective].numbers) if objective in ROW_KINDS else set(OBJECTIVES[objective].params)
    assert set(settings) <= known


POLICIES = [(name, key) for name, key in KEYS if key.startswith("policy_loss")]


@pytest.mark.parametrize(("name", "key"), POLICIES, ids=[f"{name}-{key}" for name, key in POLICIES])
def test_every_policy_loss_of_a_preset_runs(name, key):
    draw = torch.Generator().manual_seed(0)
    logp, old, ref, rollout = (torch.randn(4, 5, generator=draw, dtype=torch.float64) for _ in range(4))
    settings = presets.settings(name, "policy_loss", key.partition("/")[2] or None)
    more = {"ref_logprobs": ref} if "kl" in settings or settings["objective"] == "ref_kl" else {}
    if settings["objective"] == "real":
        more["group_size"] = 2
    if settings.get("kl") == "forward_kl":  # exact, of logits
        settings.pop("kl")
    totals = {"batch_num_tokens": 20.0, "horizon": 5, "group_ids": torch.tensor([0, 0, 1, 1])}
    modes = {"global-token-mean": "batch_num_tokens", "fixed-horizon": "horizon", "prompt-mean": "group_ids"}
    if settings.get("aggregation") in modes:
        wanted = modes[settings["aggregation"]]
        settings["normalizers"] = settings.get("normalizers", {}) | {wanted: totals[wanted]}
    columns = OBJECTIVES[settings["objective"]].columns if settings["objective"] in OBJECTIVES else ()
    if {"rollout_logp"} & set(columns) or "ratio_denominator" in settings:
        more["rollout_logprobs"] = rollout
    advantages = torch.randn(4, generator=draw, dtype=torch.float64) if "advantage" in columns or not columns else None
    logp.requires_grad_()
    loss = rlk.policy_loss(logp, old, advantages, **settings, **more)
    assert loss.isfinite() and torch.autograd.grad(loss, logp)[0].isfinite().all()


def test_settings_are_a_new_dict_that_the_caller_may_change():
    presets.settings("trl-1.16", "policy_loss")["normalizers"]["count_empty_rows"] = False
    assert presets.settings("trl-1.16", rlk.logits_policy_loss)["normalizers"] == {"count_empty_rows": True}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("verl", "policy_loss"), "preset.*verl-0.9"),
        (("dapo", "gae"), "function.*policy_loss"),
        (("verl-0.9", "policy_loss", "grpo"), "variant.*gspo"),
        (("dpo-paper", rlk.gae), "function"),
    ],
    ids=("preset", "function", "variant", "function object"),
)
def test_what_a_preset_does_not_hold_is_refused_with_what_it_holds(arguments, words):
    with pytest.raises(ValueError, match=words):
        presets.settings(*arguments)


@pytest.mark.parametrize("name", presets.names())
def test_a_description_names_every_function_and_note(name):
    text = presets.describe(name)
    assert text.startswith(name) and all(key in text for key in presets.PRESETS[name].settings)
    assert all(note in text for note in presets.PRESETS[name].notes)


def test_the_sequence_ratio_of_openrlhf_has_no_clamp():
    """OpenRLHF 0.11.2 clamps the log-ratio of PPO to 20 and leaves that of GSPO as it is."""
    new, old, advantages = torch.tensor([[24.0, 26.0]]), torch.zeros(1, 2), torch.tensor([-1.0])
    loss = {
        variant: rlk.policy_loss(new, old, advantages, **presets.settings("openrlhf-0.11", "policy_loss", variant))
        for variant in (None, "gspo")
    }
    torch.testing.assert_close(loss["gspo"].double(), torch.tensor(25.0).double().exp(), rtol=1e-6, atol=0)
    torch.testing.assert_close(loss[None].double(), torch.tensor(20.0).double().exp(), rtol=1e-6, atol=0)
