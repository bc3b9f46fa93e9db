"""OpenRLHF's names against numbers that OpenRLHF returned, and where ours differ from them.

The numbers are recorded by ``record_openrlhf.py``. With an OpenRLHF installed the same calls, with other numbers, run
through its own modules, too.
"""

import doctest
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import openrlhf_cases
import openrlhf_host
import pytest
import subprocesses
import torch

from rlkernels import ops
from rlkernels.backends import eager
from rlkernels.integrations import openrlhf
from rlkernels.integrations.openrlhf import legacy
from rlkernels.ops import register

WORKER = Path(__file__).with_name("openrlhf_worker.py")
RECORD = json.loads((Path(__file__).parent / "recorded" / "openrlhf.json").read_text())
CASES = {"0.11.2": openrlhf_cases.cases, "0.9.5": openrlhf_cases.cases_of_09, "0.5.5": openrlhf_cases.legacy_cases}
OURS = {"0.11.2": openrlhf, "0.9.5": legacy, "0.5.5": legacy}
TOLERANCE = {torch.float64: 1e-6, torch.float32: 5e-5}
"""Relative to the largest number of a tensor. OpenRLHF computes KL and distillation in fp32 for every input."""


def families(version):
    return sorted({case.name.split()[0] if version == "0.11.2" else case.name.split()[1] for case in CASES[version]()})


def of_family(version, family, seed=1):
    return [case for case in CASES[version](seed) if family in case.name.split()[:2]]


ALL = [(version, family) for version in CASES for family in families(version)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("version", "family"), ALL)
def test_value_gradients_and_metrics_are_those_that_openrlhf_returned(version, family, dtype):
    for case in of_family(version, family):
        error, where = openrlhf_cases.worst(case.run(OURS[version], dtype), RECORD[version]["cases"][case.name])
        assert error <= TOLERANCE[dtype], f"{case.name}: {where} is off by {error:.1e}"


@pytest.mark.parametrize(("version", "family"), ALL)
def test_an_error_of_one_percent_does_not_pass(version, family):
    """The record less one percent, in each tensor alone, so that no single metric is compared loosely."""
    for case in of_family(version, family):
        expected = RECORD[version]["cases"][case.name]
        found = case.run(OURS[version], torch.float32)
        for name, x in expected.items():
            if x is None or not torch.tensor(x).count_nonzero():
                continue
            error, where = openrlhf_cases.worst(found, {**expected, name: torch.tensor(x, dtype=torch.float64) * 1.01})
            assert error > 10 * TOLERANCE[torch.float32] and where == name, f"{case.name}: {name} may be wrong"


@pytest.mark.parametrize(("version", "family"), ALL)
def test_the_host_reads_nothing_of_a_device(version, family, monkeypatch):
    """Tensors on ``meta`` take the ways of an accelerator, and have nothing that could be read."""
    monkeypatch.setattr(openrlhf_cases.Source, "device", "meta")
    monkeypatch.setattr(ops, "serving", lambda *arguments, **of: "triton")
    for module in (ops, register):
        monkeypatch.setattr(module, "run", lambda op, backend, *arguments: getattr(eager, op)(*arguments))
    cases = of_family(version, family)
    for case in cases[:: 5 if len(cases) > 20 else 1]:  # shapes on ``meta`` take ten times as long
        found = case.run(OURS[version], torch.float32)
        assert all(x is None or x.is_meta for x in found.values()), case.name


def test_the_record_holds_every_case():
    for version, cases in CASES.items():
        assert list(RECORD[version]["cases"]) == [case.name for case in cases()]


@pytest.mark.parametrize("seed", (2, 3))
@pytest.mark.parametrize(("version", "family"), ALL)
def test_value_gradients_and_metrics_are_those_of_the_installed_openrlhf(version, family, seed, stock):
    api = stock(version)
    # OpenRLHF adds and takes away a surrogate of up to 1e3 in fp32 where its gradient is the unbiased one.
    of_theirs = 1e-4 if family == "compute_approx_kl" else 0.0
    for case in of_family(version, family, seed):
        for dtype, tolerance in TOLERANCE.items():
            error, where = openrlhf_cases.worst(case.run(OURS[version], dtype), case.run(api, torch.float64))
            assert error <= max(tolerance, of_theirs), f"{case.name}: {where} is off by {error:.1e}"


@pytest.fixture(scope="module")
def stock():
    loaded = {}

    def load(version):
        if version not in loaded:
            loaded[version] = openrlhf_host.stock(version)
            if version == "0.5.5":  # its KTOLoss reduces over the default group
                store = torch.distributed.HashStore()
                torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        return loaded[version]

    yield load
    if "0.5.5" in loaded:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("version", CASES)
def test_signatures_are_those_of_the_installed_openrlhf(version, stock):
    api = stock(version)
    for name, theirs in vars(api).items():
        renamed = version == "0.9.5" and name == "PolicyLoss"
        ours = getattr(OURS[version], "PolicyLoss09" if renamed else name, None)
        if version == "0.9.5" and not renamed and name not in ("KDLoss", "KTOLoss", "PRMLoss", "VanillaKTOLoss"):
            continue  # those of 0.5.5 and of 0.11.2, which differ
        if ours is None or name in openrlhf_host.METHODS:
            continue
        pairs = [(theirs, ours)]
        if isinstance(ours, type):
            pairs = [(getattr(theirs, f), getattr(ours, f)) for f in ("__init__", "forward") if f in vars(theirs)]
        for one, other in pairs:
            one, other = (list(inspect.signature(f).parameters.values()) for f in (one, other))
            assert [(p.name, p.default, p.kind) for p in one] == [(p.name, p.default, p.kind) for p in other], name


def test_losses_over_two_ranks_are_those_of_the_installed_openrlhf(tmp_path):
    path = os.pathsep.join([subprocesses.PATH, str(openrlhf_host.root("0.11.2").parent)])
    started = [
        subprocess.Popen(
            [sys.executable, WORKER, str(rank), "2", tmp_path / "rendezvous", tmp_path / f"{rank}.json"],
            cwd=os.sep,
            env=subprocesses.environment(PYTHONPATH=path, OMP_NUM_THREADS="1"),
            stderr=(tmp_path / f"{rank}.log").open("w"),
        )
        for rank in range(2)
    ]
    try:
        for process in started:
            process.wait(timeout=240)
    finally:
        for process in started:
            process.kill()
    for rank in range(2):
        report = tmp_path / f"{rank}.json"
        assert report.exists(), (tmp_path / f"{rank}.log").read_text()[-3000:]
        assert json.loads(report.read_text()) == [], f"rank {rank}"


def test_the_examples_of_the_package_print_what_they_say():
    for module in (openrlhf.functions, openrlhf.policy, openrlhf.supervised, legacy):
        found = doctest.testmod(module, extraglobs={"torch": torch})
        assert found.attempted and not found.failed, module.__name__


# Where ours differ, and what they promise instead.


def batch():
    source = openrlhf_cases.Source(5, torch.float32)
    logprobs = source.logprobs(3, 6)
    others = [logprobs + source.normal(3, 6, scale=0.3), source.normal(3, 6), logprobs + source.normal(3, 6, scale=0.2)]
    return logprobs, *others, source.mask(3, 6)


POLICY = (
    {},
    {"dual_clip": 3.0},
    {"token_level_loss": False},
    {"policy_loss_type": "gspo"},
    {"is_correction_level": "token"},
    {"is_correction_level": "token", "is_correction_mode": "clip"},
    {"is_correction_level": "seq"},
    {"is_correction_level": "seq", "is_correction_gating": "tv", "is_correction_threshold": [0.0, 0.1]},
    {"is_correction_level": "token", "policy_loss_type": "gspo"},
)


@pytest.mark.parametrize("options", POLICY, ids=str)
@pytest.mark.parametrize("garbage", (float("nan"), float("inf"), 1e30))
def test_a_masked_token_reaches_neither_loss_nor_gradient_nor_metric(options, garbage):
    logprobs, old, advantages, rollout, mask = batch()
    loss = openrlhf.PolicyLoss(**options)

    def run(fill):
        tensors = [x if fill is None else torch.where(mask != 0, x, fill) for x in (logprobs, old, advantages, rollout)]
        return openrlhf_cases.observed(loss, tensors[:1], tensors[1], tensors[2], mask, tensors[3])

    clean, dirty = run(None), run(garbage)
    for name, x in clean.items():
        assert x is None and dirty[name] is None or torch.equal(x, dirty[name]), name


def test_logits_are_not_divided_in_place():
    logits, labels = torch.randn(2, 5, 11), torch.zeros(2, 5, dtype=torch.long)
    before = logits.clone()
    found = openrlhf.log_probs_from_logits(logits, labels, temperature=0.5)
    assert torch.equal(logits, before)
    expected = torch.log_softmax(before.double() / 0.5, -1)[..., 0]
    assert (found - expected).abs().max() < 1e-5


def test_the_loss_of_bai_et_al_is_finite_where_openrlhf_overflows():
    chosen, rejected = torch.tensor([0.0], requires_grad=True), torch.tensor([1000.0], requires_grad=True)
    loss = openrlhf.LogExpLoss()(chosen, rejected)
    loss.backward()
    assert (loss.item(), chosen.grad.item(), rejected.grad.item()) == (1000.0, -1.0, 1.0)


def test_a_mean_over_nothing_is_0_with_a_gradient_of_0():
    x, nothing = torch.randn(2, 3, requires_grad=True), torch.zeros(2, 3)
    means = [openrlhf.masked_mean(x, nothing), openrlhf.masked_mean(x, nothing, dim=-1).sum()]
    means += [openrlhf.aggregate_loss(x, nothing, level) for level in (True, False)]
    means += [openrlhf.SFTLoss()(x, nothing), openrlhf.ValueLoss(0.2)(x, torch.zeros(2, 3), torch.ones(2, 3), nothing)]
    means += [
        openrlhf.PolicyLoss(**options)(x, *[torch.ones(2, 3)] * 2, nothing, torch.ones(2, 3))[0] for options in POLICY
    ]
    means.append(openrlhf.GPTLMLoss()(x[None], torch.full((1, 2), -100)))
    for mean in means:
        (gradient,) = torch.autograd.grad(mean, x)
        assert mean.item() == 0.0 and not gradient.any()


@pytest.mark.parametrize(("mode", "weight", "filtered"), [("mask", 0.0, 0.25), ("clip", 1.0, 0.0)])
def test_a_token_that_the_rollout_engine_could_not_score_is_dropped_by_the_mask_alone(mode, weight, filtered):
    zeros, ones = torch.zeros(1, 4, requires_grad=True), torch.ones(1, 4)
    rollout = torch.tensor([[float("nan"), 0.0, 0.0, 0.0]])
    loss = openrlhf.PolicyLoss(is_correction_level="token", is_correction_mode=mode)
    found = loss(zeros, zeros.detach(), ones, ones, rollout)
    (gradient,) = torch.autograd.grad(found[0], zeros)
    assert gradient.tolist() == [[-0.25 * weight, -0.25, -0.25, -0.25]] and found[4].item() == filtered


def test_a_logit_of_minus_infinity_adds_no_entropy():
    logits = torch.tensor([[0.0, 0.0, -float("inf")]], requires_grad=True)
    entropy = openrlhf.compute_entropy(logits)
    entropy.sum().backward()
    assert entropy.item() == pytest.approx(0.6931472) and logits.grad.isfinite().all()


def test_a_soft_label_that_is_ignored_counts_nowhere():
    logits, inputs = torch.randn(1, 3, 5), torch.tensor([[4, 4, 4]])
    loss = legacy.PRMLoss(4, [0, 1])
    found = loss(inputs, logits, torch.tensor([[0.3, -100.0, 0.8]]))
    assert found.item() == pytest.approx(loss(inputs[:, ::2], logits[:, ::2], torch.tensor([[0.3, 0.8]])).item())


def test_the_ratio_of_the_unbiased_gradient_is_capped_at_10_and_the_value_at_10():
    logprobs = torch.tensor([0.0, 0.0, 0.0], requires_grad=True)
    base, old = torch.tensor([-2.0, -2.0, 100.0]), torch.tensor([-3.0, -1.0, 0.0])
    for kind, values in (("k1", [2.0, 2.0, -10.0]), ("k2", [2.0, 2.0, 10.0]), ("k3", [1.1353353, 1.1353353, 10.0])):
        found = openrlhf.compute_approx_kl(logprobs, base, old, kind, unbiased_gradient=True)
        (gradient,) = torch.autograd.grad(found.sum(), logprobs)
        assert found.tolist() == pytest.approx(values) and gradient.tolist() == pytest.approx([20.0, 5.4365637, -100.0])
        biased = openrlhf.compute_approx_kl(logprobs, base, old, kind)
        (gradient,) = torch.autograd.grad(biased.sum(), logprobs)
        assert torch.equal(biased, found) and gradient[2] == 0.0 and gradient[0] != 20.0


def test_the_smallest_variance_is_a_bound_and_not_added():
    x, ones = torch.tensor([[0.0, 2e-5]], dtype=torch.float64), torch.ones(1, 2)
    assert openrlhf.masked_normalize(x, ones).tolist() == [pytest.approx([-0.1, 0.1])]  # the variance is 1e-10
    assert openrlhf.masked_normalize(1e4 * x, ones).tolist() == [pytest.approx([-1.0, 1.0], rel=1e-9)]


def test_a_masked_token_has_no_reward():
    found = openrlhf.compute_reward(torch.ones(1), 0.5, torch.ones(1, 3), torch.tensor([[1, 1, 0]]))
    assert found.tolist() == [[-0.5, 0.5, 0.0]]


def test_a_gspo_ratio_far_from_1_is_not_clamped_as_that_of_ppo_is():
    """OpenRLHF 0.11.2 clamps the log-ratio of PPO alone; -A rho of a negative advantage has no other bound."""
    logprobs, old, advantages = torch.zeros(1, 2), torch.full((1, 2), -25.0), -torch.ones(1, 2)
    for kind, bound in (("ppo", 20.0), ("gspo", 25.0)):
        loss = openrlhf.PolicyLoss(policy_loss_type=kind)(logprobs, old, advantages, torch.ones(1, 2))[0]
        assert loss.item() == pytest.approx(torch.tensor(bound).exp().item(), rel=1e-5), kind


def test_bfloat16_log_probabilities_come_in_fp32():
    logits, labels = torch.randn(2, 5, 97).bfloat16(), torch.zeros(2, 5, dtype=torch.long)
    found = openrlhf.log_probs_from_logits(logits, labels)
    assert found.dtype == torch.float32
    assert (found - torch.log_softmax(logits.double(), -1)[..., 0]).abs().max() < 1e-5


def test_rewards_have_the_dtype_of_the_kl_and_not_that_of_the_scores():
    scores, mask = torch.ones(2, dtype=torch.float64), torch.ones(2, 3)
    for dtype in (torch.float32, torch.float64):
        assert openrlhf.compute_reward(scores, 0.1, torch.ones(2, 3, dtype=dtype), mask).dtype == dtype


def test_bad_options_are_refused_by_name():
    refused = (
        ({"policy_loss_type": "grpo"}, "policy_loss_type"),
        ({"is_correction_level": "sequence"}, "is_correction_level"),
        ({"is_correction_mode": "drop"}, "is_correction_mode"),
        ({"is_correction_gating": "kl"}, "is_correction_gating"),
        ({"dual_clip": 1.0}, "dual_clip"),
        ({"is_correction_level": "seq", "is_correction_mode": "clip"}, "is_correction_mode"),
        ({"is_correction_level": "token", "is_correction_gating": "tv"}, "is_correction_threshold"),
    )
    for options, name in refused:
        with pytest.raises(ValueError, match=name):
            openrlhf.PolicyLoss(**options)
    logprobs, old, advantages, _, mask = batch()
    with pytest.raises(ValueError, match="needs rollout_log_probs"):
        openrlhf.PolicyLoss(is_correction_level="token")(logprobs, old, advantages, mask)
    with pytest.raises(ValueError, match="kl_estimator"):
        openrlhf.compute_approx_kl(logprobs, old, kl_estimator="k4")
    with pytest.raises(TypeError, match="action_mask"):
        openrlhf.compute_reward(torch.ones(3), 0.1, old)
    with pytest.raises(RuntimeError, match="world_size is 2"):
        legacy.KTOLoss(0.1, 1.0, 1.0, 2, "cpu")(*[torch.zeros(2)] * 6)
