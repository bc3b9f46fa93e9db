"""verl's names without verl: against numbers that verl returned, masked tokens, refusals, the head against float64."""

import importlib
import json
import math
import pathlib
import sys

import pytest
import torch
import verl_cases
from verl_cases import Config, call, config_of, differences

from rlkernels.integrations import verl
from rlkernels.integrations.verl.names import NAMED_ADVANTAGES, NAMED_LOSSES

RECORD = json.loads((pathlib.Path(__file__).parent / "recorded" / "verl.json").read_text())
CASES = {name: case for name, case in verl_cases.cases(RECORD["seeds"]).items() if name in RECORD["cases"]}
KINDS = sorted({name.rsplit("-", 1)[0] for name in CASES})
TOLERANCE = {torch.float64: 2e-6, torch.float32: 2e-4}
"""Relative to the largest number. verl adds 1e-8 to counts and computes some numbers in fp32 for every input."""
LOSSES = [name for name in verl_cases.LOSSES if name != "bypass_mode"]


def of_kind(kind):
    return {name: case for name, case in CASES.items() if name.rsplit("-", 1)[0] == kind}


def test_the_record_holds_every_call_but_that_which_asks_verl():
    every = {name.rsplit("-", 1)[0] for name in verl_cases.cases(1)}
    assert every - set(KINDS) == {"bypass_mode"} and RECORD["versions"]["verl"] == "0.9.1"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_values_gradients_and_metrics_are_those_that_verl_returned(kind, dtype):
    for name, case in of_kind(kind).items():
        found = call(getattr(verl, case.name), case, dtype)
        assert not differences(found, flat(RECORD["cases"][name], found), TOLERANCE[dtype]), name


def flat(record, found):
    """The record with the shapes of what was found."""
    shaped = {
        part: [torch.tensor(x).view(like.shape) for x, like in zip(record[part], found[part], strict=True)]
        for part in ("results", "gradients")
    }
    return {**shaped, "metrics": record["metrics"]}


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_of_one_percent_in_any_number_does_not_pass(kind):
    for name, case in of_kind(kind).items():
        found = call(getattr(verl, case.name), case, torch.float32)
        record = flat(RECORD["cases"][name], found)
        for part in ("results", "gradients"):
            for i, x in enumerate(record[part]):
                wrong = {**record, part: [1.01 * y if i == j else y for j, y in enumerate(record[part])]}
                assert not x.count_nonzero() or differences(found, wrong, TOLERANCE[torch.float32]), (name, part, i)
        for key, x in record["metrics"].items():
            wrong = {**record, "metrics": {**record["metrics"], key: x + 0.01 * max(1.0, abs(x))}}
            assert differences(found, wrong, TOLERANCE[torch.float32]), (name, key)


@pytest.mark.parametrize("name", LOSSES)
def test_a_masked_token_touches_neither_loss_nor_gradient_nor_metric(name):
    case = verl_cases.policy_case(name, 3)
    dead = case.args["response_mask"] == 0
    assert dead.any()
    clean = call(getattr(verl, case.name), case)
    for key, x in case.args.items():
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            case.args[key] = torch.where(dead, math.nan, x)
    found = call(getattr(verl, case.name), case)
    assert not differences(found, clean, 1e-12) and not found["gradients"][0][dead].any()


@pytest.mark.parametrize("name", LOSSES)
def test_metrics_are_detached_tensors(name):
    case = verl_cases.policy_case(name, 0)
    case.args["log_prob"].requires_grad_()
    _, metrics = getattr(verl, case.name)(**case.args, config=config_of(case))
    assert all(isinstance(x, torch.Tensor) and x.shape == () and not x.requires_grad for x in metrics.values())


def test_clip_cov_leaves_as_many_tokens_without_loss_as_verl_would():
    case = verl_cases.policy_case("clip_cov", 2)
    case.args["rollout_is_weights"] = None
    live = case.args["response_mask"].sum().item()
    chosen = {}
    for share in (1.0, 0.11):
        case.settings["policy_loss"]["clip_cov_ratio"] = share
        found = call(verl.compute_policy_loss_clip_cov, case)
        chosen[share] = round(found["metrics"]["actor/pg_clipfrac"] * live)
    assert chosen[0.11] == max(1, int(0.11 * live)) < chosen[1.0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_fused_head_is_the_softmax_of_float64(temperature):
    draw = torch.Generator().manual_seed(1)
    hidden, weight = verl_cases.randn(draw, 2, 5, 8), verl_cases.randn(draw, 19, 8)
    ids = torch.randint(19, (2, 5), generator=draw, dtype=torch.int32)
    truth = [x.clone().requires_grad_() for x in (hidden, weight)]
    logp = (truth[0] @ truth[1].t() / temperature).log_softmax(-1)
    entropy, of_ids = -(logp.exp() * logp).sum(-1), logp.gather(-1, ids.long()[..., None])[..., 0]
    up = verl_cases.randn(draw, 2, 2, 5)
    (of_ids * up[0] + entropy * up[1]).sum().backward()
    for function in (verl.FusedLinearForPPO(chunk_size=3), verl.linear_cross_entropy):
        ours = [x.float().requires_grad_() for x in (hidden, weight)]
        found = [x.view(2, 5) for x in function(*ours, ids, temperature)]
        (found[0] * up[0] + found[1] * up[1]).sum().backward()
        for a, b in zip((*found, ours[0].grad, ours[1].grad), (of_ids, entropy, *(x.grad for x in truth)), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5)


def test_permission_to_overwrite_is_no_demand():
    logits, labels = torch.randn(4, 7, requires_grad=True), torch.arange(4)
    for given in (logits, logits.view(4, 7), 1.0 * logits):
        before = given.detach().clone()
        verl.logprobs_from_logits(given, labels).sum().backward()
        assert torch.equal(given, before)


def test_what_verl_ignores_elsewhere_a_registered_name_takes_from_the_configuration():
    rewards, mask = torch.tensor([[1.0], [0.0], [0.5]]), torch.ones(3, 1)
    columns = {"token_level_rewards": rewards, "response_mask": mask, "index": ["a"] * 3}
    for name in ("rlk_grpo", "rlk_grpo_vectorized"):
        for divided in (True, False):
            found, _ = NAMED_ADVANTAGES[name](**columns, config=Config(norm_adv_by_std_in_grpo=divided))
            torch.testing.assert_close(found, (rewards - 0.5) / (0.5 if divided else 1.0))
    found, _ = NAMED_ADVANTAGES["rlk_rloo"](**columns, config=Config())
    torch.testing.assert_close(found, 1.5 * (rewards - 0.5))


def test_a_registered_name_says_what_verl_did_not_pass():
    columns = {"token_level_rewards": torch.ones(1, 1), "response_mask": torch.ones(1, 1), "index": ["a"]}
    for name in ("rlk_gae", "rlk_gdpo", "rlk_optimal_token_baseline", "rlk_tir_optimal_token_baseline"):
        config = Config(gdpo_reward_keys=["a"])
        with pytest.raises(ValueError, match=rf"{name}: needs \w+, .*adv_estimator={name[4:]}"):
            NAMED_ADVANTAGES[name](**columns, config=config)
    assert set(NAMED_LOSSES) == {f"rlk_{name}" for name in verl_cases.LOSSES}


def test_what_cannot_be_honoured_raises():
    losses, mask = torch.ones(2, 3), torch.ones(2, 3)
    with pytest.raises(ValueError, match="Invalid loss_agg_mode"):
        verl.agg_loss(losses, mask, "mean")
    for mode, total in (("token-mean", "batch_num_tokens"), ("seq-mean-token-sum", "global_batch_size")):
        with pytest.raises(ValueError, match=rf"{total}.* is required when dp_size > 1"):
            verl.agg_loss(losses, mask, mode, dp_size=2)
    with pytest.raises(NotImplementedError, match="unknown 'full'"):
        verl.kl_penalty(losses, losses, "full")
    columns = losses, losses, losses, mask
    with pytest.raises(TypeError, match="config must be verl's ActorConfig, got NoneType"):
        verl.compute_policy_loss_vanilla(*columns)
    case = verl_cases.policy_case("vanilla", 0)
    case.settings["clip_ratio_c"] = 1.0
    with pytest.raises(ValueError, match="clip_ratio_c must be greater than 1"):
        call(verl.compute_policy_loss_vanilla, case)
    case = verl_cases.policy_case("dro", 0)
    case.settings["policy_loss"]["dro_beta"] = None
    with pytest.raises(ValueError, match="dro_beta must be a positive value"):
        call(verl.compute_policy_loss_dro, case)
    for name, key in (("kl_cov", "kl_cov_ratio"), ("clip_cov", "clip_cov_ratio")):
        case = verl_cases.policy_case(name, 0)
        case.settings["policy_loss"][key] = 0.0
        with pytest.raises(ValueError, match=f"{key} must be positive"):
            call(getattr(verl, case.name), case)
    case = verl_cases.baseline_case("optimal_token_baseline", 0)
    case.args["handle_zero_tail"] = False
    with pytest.raises(ValueError, match="handle_zero_tail must be True"):
        call(verl.compute_optimal_token_baseline_advantage, case)
    with pytest.raises(ValueError, match=r"Pass@k requires at least 2 .* Got 1 for group 'a'"):
        verl.compute_grpo_passk_outcome_advantage(losses, mask[:, :1], ["a", "b"], config=Config())
    with pytest.raises(ValueError, match="impl_backend must be one of torch, liger"):
        verl.FusedLinearForPPO(impl_backend="triton")
    with pytest.raises(ValueError, match="reduction 'mean', expected 'none'"):
        verl.linear_cross_entropy(torch.ones(1, 2), torch.ones(3, 2), torch.zeros(1).long(), 1.0, "mean")
    for threshold, error in ((True, TypeError), (-1.0, ValueError), ("3_2", ValueError), ("x", ValueError)):
        with pytest.raises(error, match="rollout_is_threshold"):
            verl.compute_rollout_correction_weights(losses, mask, rollout_is_threshold=threshold)
    with pytest.raises(ValueError, match="Invalid rollout_is: 'geometric'"):
        verl.compute_rollout_correction_weights(losses, mask, rollout_is="geometric")
    with pytest.raises(ValueError, match="level must be one of .*got 'loss'"):
        verl.patch("loss")


@pytest.mark.fault(109)
def test_the_plugin_reports_its_own_failure(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("verl 9: POLICY_LOSS_REGISTRY does not exist")

    monkeypatch.setattr(verl, "patch", broken)
    monkeypatch.delitem(sys.modules, "rlkernels.integrations.verl.plugin", raising=False)
    with pytest.warns(RuntimeWarning, match="plugin of verl is not active.*POLICY_LOSS_REGISTRY"):
        importlib.import_module("rlkernels.integrations.verl.plugin")


def test_a_missing_argument_is_refused_by_function_and_name():
    rewards, mask = torch.ones(2, 3), torch.ones(2, 3)
    for name in ("grpo_outcome", "rloo_outcome", "rloo_vectorized_outcome", "opo_outcome", "gpg_outcome"):
        estimator = getattr(verl, f"compute_{name}_advantage")
        for arguments, missing in (
            ((None, mask, ["a", "a"]), "token_level_rewards"),
            ((rewards, None, ["a", "a"]), "response_mask"),
            ((rewards, mask, None), "index"),
        ):
            with pytest.raises(TypeError, match=f"compute_{name}_advantage: {missing} must"):
                estimator(*arguments)
        with pytest.raises(ValueError, match=f"compute_{name}_advantage: response_mask has shape"):
            estimator(rewards, mask[:, 1:], ["a", "a"])
    for call_it, message in (
        (lambda: verl.compute_value_loss(rewards, rewards, rewards, mask, None), "compute_value_loss: cliprange_value"),
        (lambda: verl.kl_penalty(rewards, rewards, None), "kl_penalty: kl_penalty must be one of"),
        (lambda: verl.entropy_from_logits(None), "entropy_from_logits: logits must"),
        (lambda: verl.logprobs_from_logits(None, mask), "logprobs_from_logits: logits must"),
        (lambda: verl.compute_rollout_correction_weights(None, mask), "weights: log_ratio must"),
    ):
        with pytest.raises(TypeError, match=message):
            call_it()
