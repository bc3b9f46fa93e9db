"""Every golden case, through public functions, on every backend: values, metrics and gradients of other systems' code."""
import golden_adapter
import golden_ops
import pytest
import torch
from golden_adapter import NotOffered, check_gradients, check_outputs, close, missing_outputs

from rlkernels.backends import DEVICES, absent, use_backend

CASES = golden_adapter.load()
PRESENT = [name for name in DEVICES["cpu"] if absent(name) is None]

# An operation, or the beginning of a case's id: why no public function of ours expresses it.
NOT_COVERED = {
    # operations
    "divergence_span_loss": "DeepSpeed-Chat's span loss: no span_reward_loss yet",
    "end_score": "the end found by PAD ids: belongs to span_reward_loss",
    "rank_list_loss": "no rank_list_loss yet",
    "prm_loss": "no process_reward_loss yet",
    "step_score_reduction": "step scores to a solution score: belongs to process_reward_loss",
    "reward_normalizer": "running reward statistics of an evaluation: the trainer's",
    "distillation_loss": "cross-entropy to a teacher: no divergence_stats yet",
    "policy_loss_from_logits": "exact KL(old || new) as a penalty: token_stats offers KL(pi || ref)",
    "process_advantage": "normalised step rewards",
    "gigpo_advantage": "step-level groups by anchor state",
    "rollout_weights": "corrections of the rollout mismatch",
    "rejection_mask": "corrections of the rollout mismatch",
    "off_policy_sequence_mask": "corrections of the rollout mismatch",
    "rho_correction": "corrections of the rollout mismatch",
    "assemble_rewards": "KL in the reward and score placement: the trainer's",
    "process_sequences": "token bookkeeping: the trainer's",
    "length_penalty": "a reward function: the trainer's",
    "kl_controller": "coefficients over time: no controllers yet",
    "entropy_controller": "coefficients over time: no controllers yet",
    "combined_loss": "a weighted sum of numbers: nothing of ours in it",
    # cases of operations that are covered otherwise
    "adv.verl.otb": "optimal token baseline",
    "returns.reset_on_mask": "SkyRL: a masked gap blocks the reward",
    "divergence.forward_kl": "no divergence_stats yet",
    "divergence.jsd": "no divergence_stats yet",
    "kl.verl.abs": "estimator |log-ratio|",
    "kl.verl.k3_straight_through": "value of k3 with the gradient of k2",
    "kl.k3.far.clamped": "a clamp that bites: ours has none",
    "sft.asft": "exact KL(ref || pi) over the vocabulary: token_stats offers KL(pi || ref)",
    "policy.openrlhf-0.11.tis": "corrections of the rollout mismatch",
    "policy.openrlhf-0.11.icepop": "corrections of the rollout mismatch",
    "policy.openrlhf-0.11.seq_mask_tis": "corrections of the rollout mismatch",
    "policy.trl.grpo.opsm0.2": "corrections of the rollout mismatch",
    "policy.trl.grpo.kl_is_weighted": "KL term weighted by the policy ratio",
    "policy.ppo_paper.no_clip": "no objective 'surrogate' yet",
    "policy.verl.dppo_tv": "no objective yet",
    "policy.verl.dppo_kl": "no objective yet",
    "policy.prime_rl.dppo_tv_log_ratio2": "no objective yet",
    "policy.verl.dro": "no objective yet",
    "policy.verl.gmpo": "no objective yet",
    "policy.trl.gmpo": "no objective yet",
    "policy.trl.vespo": "no objective yet",
    "policy.trl.a2po": "no objective yet",
    "policy.swift.fipo": "no objective yet",
    "policy.swift.real": "no objective yet",
    "policy.verl.clip_cov": "no objective yet",
}

# An output that covered cases list and no public function returns: by operation, or the beginning of a case's id.
OUTPUTS_NOT_OFFERED = {
    ("token_logprob", "max_logit"): "bookkeeping of the softmax",
    ("token_logprob", "argmax"): "is_top1 says whether the target is it",
    ("token_logprob", "flags"): "logp is -inf there",
    ("pairwise_reward_loss", "accuracy"): "one comparison of two inputs",
    ("policy_loss", "metrics.clip_fraction_lower"): "how often the dual clip bites",
    ("policy.verl.sapo", "metrics.clip_fraction"): "a constant 0: nothing is clipped",
    ("policy.verl.reinforce.is_weight", "metrics.mean_old_minus_new"): "logged beside an objective without old log-probabilities",
    ("policy.trl.gspo", "metrics.clip_fraction_low"): "a share of sequences, ours is one of tokens",
    ("policy.trl.gspo", "metrics.clip_fraction_high"): "a share of sequences, ours is one of tokens",
    ("policy.trl.gspo", "metrics.clip_fraction_region"): "a share of sequences, ours is one of tokens",
    ("policy.trl.luspo", "metrics.clip_fraction_low"): "a share of sequences, ours is one of tokens",
    ("policy.trl.luspo", "metrics.clip_fraction_high"): "a share of sequences, ours is one of tokens",
    ("policy.trl.luspo", "metrics.clip_fraction_region"): "a share of sequences, ours is one of tokens",
}


def not_offered(case, name):
    """The entries of OUTPUTS_NOT_OFFERED that name this output."""
    return [key for key in OUTPUTS_NOT_OFFERED if key[1] == name and (key[0] == case.op or case.id.startswith(key[0]))]


def reasons(case):
    """The entries of NOT_COVERED that name this case."""
    return [key for key in NOT_COVERED if key == case.op or case.id.startswith(key)]


COVERED = [case for case in CASES if not reasons(case)]


def runs():
    """Every covered case in the precision of its file, and, where that is float64, in float32 too."""
    for case in COVERED:
        for dtype in (torch.float64, torch.float32) if case.dtype == torch.float64 else (case.dtype,):
            yield pytest.param(case, dtype, id=f"{case.id}-{str(dtype).removeprefix('torch.')}")


@pytest.mark.parametrize("backend", PRESENT)
@pytest.mark.parametrize("case,dtype", list(runs()))
def test_golden_case(case, dtype, backend):
    inputs = case.tensors(dtype)
    with use_backend(backend):
        if case.expected.get("raises_or_nan"):
            with pytest.raises(IndexError, match="outside"):
                golden_ops.run(case, inputs)
            return
        outputs = golden_ops.run(case, inputs)
        for name in missing_outputs(case, outputs):
            assert not_offered(case, name), f"{name} is expected and was not returned"
        check_outputs(case, outputs, dtype)
        check_gradients(case, inputs, outputs, dtype)
        if "equals_compact" in case.expected:
            compact = case.compact()
            smaller = golden_ops.run(compact, compact.tensors(dtype))
            want = case.expected["equals_compact"]["loss"]
            close(smaller["loss"], want, 1e-5 if dtype == torch.float32 else 1e-12, 1e-14, "compact loss")


def test_the_table_of_uncovered_cases_is_exact():
    for key in NOT_COVERED:
        assert any(key in reasons(case) for case in CASES), f"stale: {key!r} names no case"
    for case in CASES:
        keys = reasons(case)
        assert len(keys) <= 1, f"{case.id} is listed twice: {keys}"
        if not keys:
            assert case.op in golden_ops.ADAPTERS, f"{case.id}: no adapter for {case.op} and no reason"
        elif case.op in golden_ops.ADAPTERS:
            with pytest.raises(NotOffered):  # an entry whose case runs is stale
                golden_ops.run(case, case.tensors(case.dtype))
    print(f"\ngolden cases: {len(COVERED)} run, {len(CASES) - len(COVERED)} not covered, {len(CASES)} in all")


def test_the_table_of_outputs_not_offered_is_exact():
    unused = set(OUTPUTS_NOT_OFFERED)
    for case in COVERED:
        if not case.expected.get("raises_or_nan"):
            missing = missing_outputs(case, golden_ops.run(case, case.tensors(case.dtype)))
            unused -= {key for name in missing for key in not_offered(case, name)}
    assert not unused


@pytest.mark.parametrize("plant", ["value", "gradient"])
def test_a_result_one_percent_off_fails_the_comparison(plant):
    case = next(case for case in COVERED if case.id == "policy.trl.grpo")
    inputs = case.tensors(torch.float64)
    outputs = golden_ops.run(case, inputs)
    loss = outputs["loss"]
    outputs["loss"] = 1.01 * loss if plant == "value" else loss.detach() + 1.01 * (loss - loss.detach())
    with pytest.raises(AssertionError, match="not close"):
        check_outputs(case, outputs, torch.float64)
        check_gradients(case, inputs, outputs, torch.float64)


def test_the_generator_of_inputs_follows_the_flat_index():
    made = golden_adapter.tensor({"gen": "sin", "shape": [2, 3], "scale": 3.0, "step": 0.37, "offset": 0.1})
    assert made[1, 2].item() == pytest.approx(3.0 * torch.tensor(0.37 * 5 + 0.1, dtype=torch.float64).sin().item())
    assert golden_adapter.tensor({"gen": "zeros", "shape": [2]}).tolist() == [0.0, 0.0]
    assert golden_adapter.tensor([["inf", "-inf", 1.5]]).tolist() == [[float("inf"), -float("inf"), 1.5]]
