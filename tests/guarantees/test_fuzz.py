"""A quick range of the fuzzers: random valid calls against float64 torch, hostile ones against a crash, threads and
races. The long one: ``make fuzz``.
"""

import inspect
from pathlib import Path

import pytest
import subprocesses
from fuzz import ranges
from fuzz.cases import CASES
from fuzz.hostile import FUNCTIONS
from fuzz.ranges import Work

import rlkernels

FUZZ = Path(ranges.HERE)
VALID, HOSTILE = 12, 25
"""Seeds of each kind: seconds here, minutes under ``make fuzz``."""
WITHOUT_GRADIENT = {
    "assemble_rewards",
    "best_of_n",
    "broadcast_advantages",
    "discounted_returns",
    "dynamic_sampling_mask",
    "extended_mask",
    "gae",
    "gae_of_turns",
    "gigpo_advantages",
    "group_advantages",
    "length_desensitized_weights",
    "length_penalty",
    "m2po_mask",
    "masked_moments",
    "merge_moments",
    "off_policy_sequence_mask",
    "optimal_token_advantages",
    "process_sequences",
    "rejection_mask",
    "rho_correction",
    "rollout_gae",
    "rollout_metrics",
    "rollout_weights",
    "shift_targets",
    "solution_scores",
    "spans_to_mask",
    "step_advantages",
    "token_weights",
    "top_entropy_mask",
    "truncation_penalty",
    "vtrace",
    "wpo_weights",
}
ONE_AGAINST_ANOTHER = {"row_alone"}
"""Compares two of our own results, so a change of both is not seen."""
ELSEWHERE = {"process_group", "vocab_start", "kl_group"}  # several processes: test_vocab_parallel
NOT_SUMMED = (
    "value_loss logprobs_sft_loss sft_loss linear_sft_loss divergence_loss linear_distillation_loss "
    "process_reward_loss span_reward_loss rank_list_loss unpaired_preference_loss linear_unpaired_preference_loss"
).split()
"""Functions whose ``reduction="none"`` has its own test of all losses: test_losses_not_summed."""
OF_A_REFERENCE = {"linear_sft_loss": {"asft_alpha", "ref_hidden", "ref_weight", "ref_bias"}}  # there, too


def run(kind, end, *cases, change=None):
    environment = subprocesses.environment(OMP_NUM_THREADS="1")
    return ranges.run(Work(kind, 0, end, cases or tuple(CASES[kind]), change=change), environment)


def told(findings):
    return (
        "\n".join((f"{f.case} {f.seed}: {f.text}") for f in findings[:20])
        + f"\n{len(findings)} findings; python tests/fuzz repeats them"
    )


@pytest.fixture(scope="module")
def valid():
    return run("valid", VALID)


def test_random_valid_calls_give_the_true_values_and_gradients(valid):
    assert not valid.findings, told(valid.findings)


def test_every_public_function_is_called_with_every_argument_that_it_has(valid):
    functions = {name for name in rlkernels.__all__ if inspect.isfunction(getattr(rlkernels, name))} - {
        "objective",
        "check_objective",
        "available_backends",
        "status",
    }
    assert functions == set(FUNCTIONS) == set(CASES["hostile"])
    assert functions <= set(valid.calls)
    given = valid.keywords
    for seeds in (40, 130):  # further seeds give the rare ones, and most of these soon
        rare = never_given(functions, given)
        later = run("valid", seeds, *sorted(rare)) if rare else valid
        assert not later.findings, told(later.findings)
        given = given | later.keywords
    assert not never_given(functions, given)


def never_given(functions, pairs):
    """Function to those of its keywords that no call was given."""
    found = {}
    for name in functions:
        keywords = {
            p.name for p in inspect.signature(getattr(rlkernels, name)).parameters.values() if p.kind == p.KEYWORD_ONLY
        } - ELSEWHERE
        keywords -= {"reduction"} if name in NOT_SUMMED else set()
        keywords -= OF_A_REFERENCE.get(name, set())
        found[name] = keywords - {pair.split()[1] for pair in pairs if pair.split()[0] == name}
    return {name: keywords for name, keywords in found.items() if keywords}


def test_hostile_calls_raise_what_names_the_function_or_give_the_answer_of_eager():
    hostile = run("hostile", HOSTILE)
    assert hostile.calls.total() >= HOSTILE * len(CASES["hostile"]) * 0.9
    assert not hostile.findings, told(hostile.findings)


@pytest.mark.fault(112)
@pytest.mark.parametrize(
    "change, cases",
    (
        ("values", set(CASES["valid"]) - ONE_AGAINST_ANOTHER),
        ("company", ONE_AGAINST_ANOTHER),
        ("gradients", set(CASES["valid"]) - WITHOUT_GRADIENT - ONE_AGAINST_ANOTHER),
    ),
)
def test_an_error_of_one_percent_is_found_by_every_case(change, cases):
    for seeds in (4, 16):  # most show it soon
        if cases:
            cases = cases - {finding.case for finding in run("valid", seeds, *sorted(cases), change=change).findings}
    assert not cases


def test_a_crash_is_a_finding_with_its_seed_and_the_range_goes_on_behind_it():
    crashed = run("valid", 1, "gae", "spans_to_mask", change="crash").findings
    assert [(f.seed, f.case) for f in crashed] == [(0, "gae"), (0, "spans_to_mask")]
    assert all("status -11: Fatal Python error: Segmentation fault" in f.text for f in crashed)


@pytest.mark.fault(123)
@pytest.mark.parametrize("name", ("threads", "races"))
def test_threads_that_call_at_once_or_write_into_the_ids_of_a_call_crash_nothing(name):
    done = subprocesses.child("-X", "faulthandler", FUZZ / f"{name}.py", 5, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert int(done.stdout.splitlines()[-1].split()[0]) > 100
