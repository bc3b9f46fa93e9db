"""The types of the public functions: all there, made of the names that the checks accept, and what a checker says of a
user's script.
"""

import inspect
import re
import subprocess
import sys
from importlib import util
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import pytest
import subprocesses
from paths import ROOT

import rlkernels
from rlkernels import packing, trajectories, types
from rlkernels.advantages import assemble, controllers, environments, gae, group, steps, whitening
from rlkernels.aggregation import AGGREGATIONS
from rlkernels.backends import KNOWN, OPS, protocol
from rlkernels.backends import native as native_backends
from rlkernels.checks import ROW_KLS
from rlkernels.checks.tokens import RESERVED
from rlkernels.integrations import trl
from rlkernels.logprobs import TokenStats
from rlkernels.losses import (
    divergence,
    kl_term,
    policy_arguments,
    policy_ratio,
    preference_options,
    preference_types,
    process_reward,
    rank_list,
    reward_head,
    reward_model,
    sft,
    token_weights,
    unpaired_preference,
)
from rlkernels.objectives import functions, kl
from rlkernels.ops import FLAGS
from rlkernels.rollout import correction, masks, weights
from rlkernels.trajectories import batches, model

TYPED = ROOT / "tests/repository/typed"
FUNCTIONS = {name: f for name, f in vars(rlkernels).items() if name in rlkernels.__all__ and inspect.isfunction(f)}
FURTHER = {
    "use_backend": rlkernels.use_backend.__init__,
    **{f"trl.{name}": f for name, f in vars(trl).items() if name in trl.__all__ and inspect.isfunction(f)},
    "trl.ChunkedLogProbFunction.apply": trl.ChunkedLogProbFunction.apply,
    "trl.ChunkedDivergenceFunction.apply": trl.ChunkedDivergenceFunction.apply,
    **{f"trajectories.{name}": getattr(trajectories, name) for name in trajectories.__all__},
    **{f"objectives.{name}": f for name, f in functions.FUNCTIONS.items()},
    **{f"protocol.{f.__name__}": f for f in (protocol.real_dtype, protocol.presence, protocol.check_rows)},
    "protocol.column_kernel": protocol.column_kernel,
    "protocol.RowStats.empty": protocol.RowStats.empty,
    **{f"BackendModule.{name}": getattr(protocol.BackendModule, name) for name in OPS},
}
WITH_METRICS = [name for name, f in FUNCTIONS.items() if "return_metrics" in inspect.signature(f).parameters]
TABLES = {
    "RatioLevel": policy_arguments.RATIO_LEVELS,
    "KL": kl_term.KLS,
    "ExactKL": kl_term.EXACT,
    "KLGradient": kl_term.GRADIENTS,
    "KLRatioLevel": kl_term.LEVELS,
    "RatioDenominator": policy_ratio.DENOMINATORS,
    "PolicyReduction": token_weights.REDUCTIONS,
    "RowKL": ROW_KLS,
    "Output": tuple(FLAGS),
    "Aggregation": AGGREGATIONS,
    "SftKind": sft.KINDS,
    "LogitsSftKind": sft.LOGITS_KINDS,
    "DivergenceKind": divergence.KINDS,
    "PairwiseKind": reward_model.KINDS,
    "Reduction": reward_model.REDUCTIONS,
    "ScorePositions": reward_head.POSITIONS,
    "RankKind": rank_list.KINDS,
    "RankAggregation": rank_list.RANK_AGGREGATIONS,
    "StepReduction": process_reward.STEP_REDUCTIONS,
    "LossType": tuple(preference_types.KINDS),
    "FDivergence": tuple(preference_options.F_DIVERGENCES),
    "UnpairedLossType": unpaired_preference.LOSS_TYPES,
    "Masked": gae.MASKED,
    "ReturnsMasked": gae.RETURNS_MASKED,
    "StepScale": steps.STEP_SCALES,
    "Alignment": steps.ALIGNMENTS,
    "DonesAt": environments.DONES_AT,
    "Placement": assemble.PLACEMENTS,
    "KLControl": controllers.KINDS,
    "EpsMode": whitening.EPS_MODES,
    "Baseline": group.BASELINES,
    "Scale": group.SCALES,
    "CorrectionMode": correction.CORRECTION_MODES,
    "Singleton": group.SINGLETONS,
    "BatchLayout": batches.LAYOUTS,
    "Provenance": model.PROVENANCES,
    "PaddingSide": packing.PADDING_SIDES,
    "RolloutLevel": weights.LEVELS,
    "RolloutMode": weights.MODES,
    "RolloutGate": weights.GATES,
    "RhoGate": weights.RHO_GATES,
    "RejectionRule": masks.RULES,
    "Backend": KNOWN,
    "TrlLevel": ("all", *trl.LEVELS),
}
"""Name of a ``Literal`` to the names that a check accepts, in the order in which its message lists them."""


@pytest.mark.parametrize("name", TABLES)
def test_a_literal_holds_the_names_that_the_check_accepts(name):
    assert get_args(getattr(types, name)) == TABLES[name]


def test_every_literal_is_compared_with_a_table():
    literals = {name for name, x in vars(types).items() if getattr(get_origin(x), "_name", "") == "Literal"}
    assert literals == set(TABLES)


def test_the_names_that_other_tables_share_with_a_literal_are_its_own():
    assert tuple(native_backends.MASKED) == get_args(types.Masked)
    estimators = {name for name, f in vars(kl).items() if inspect.isfunction(f) and f.__module__ == kl.__name__}
    assert estimators - {"kl_term"} == set(map(kl_term.named_objective, get_args(types.KL)))
    assert set(kl_term.ORDERS) == set(get_args(types.KL))
    assert set(get_args(types.Output)) <= set(TokenStats._fields)
    assert set(rlkernels.objectives.OBJECTIVES) >= set(get_args(types.SftKind))


def test_the_normalizers_of_a_loss_are_the_keywords_of_token_weights():
    keywords = inspect.signature(rlkernels.token_weights).parameters
    hints = get_type_hints(types.Normalizers, include_extras=True)
    assert set(hints) == set(keywords) - set(RESERVED)
    given = get_type_hints(rlkernels.aggregate, include_extras=True)
    assert {name: given[name] for name in hints} == {
        name: get_type_hints(rlkernels.token_weights, include_extras=True)[name] for name in hints
    }


@pytest.mark.parametrize("name", [*FUNCTIONS, *FURTHER])
def test_every_parameter_and_the_result_of_a_public_function_have_a_type(name):
    signature = inspect.signature({**FUNCTIONS, **FURTHER}[name], eval_str=True)
    bare = [p.name for p in signature.parameters.values() if p.annotation is p.empty and p.name != "self"]
    assert not bare, f"{name} has parameters without a type: {bare}"
    assert signature.return_annotation is not signature.empty, f"{name} does not say what it returns"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_public_function_hides_its_keywords(name):
    hidden = [p.name for p in inspect.signature(FUNCTIONS[name]).parameters.values() if p.kind is p.VAR_KEYWORD]
    assert hidden in ([], ["params"]), f"{name} takes {hidden}; spell its keywords"


@pytest.mark.parametrize("name", WITH_METRICS)
@pytest.mark.skipif(sys.version_info < (3, 11), reason="typing of Python 3.10 keeps no overloads")
def test_overloads_differ_from_the_function_in_return_metrics_alone(name):
    from typing import get_overloads

    def rest(f):
        return {k: p for k, p in inspect.signature(f).parameters.items() if k != "return_metrics"}

    overloads = get_overloads(FUNCTIONS[name])
    assert len(overloads) == 3
    assert all(rest(overload) == rest(FUNCTIONS[name]) for overload in overloads)


def mypy(*arguments):
    if util.find_spec("mypy") is None:
        pytest.skip("mypy is not installed here; it is in the extra test")
    return subprocess.run(
        [sys.executable, "-m", "mypy", "--no-error-summary", "--hide-error-codes", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=900,
    )


def test_a_strict_checker_passes_a_right_script_and_names_each_mistake_of_a_wrong_one(tmp_path):
    right, wrong = (str((TYPED / name).relative_to(ROOT)) for name in ("right.py", "wrong.py"))
    done = mypy("--strict", "--follow-imports=silent", f"--cache-dir={tmp_path}", right, wrong)
    assert done.returncode in (0, 1), done.stderr
    said = {}
    for path, line, text in re.findall(r"^(.+?):(\d+): error: (.*)$", done.stdout, re.MULTILINE):
        said.setdefault((path, int(line)), []).append(text)
    assert {path for path, _ in said} == {wrong}, done.stdout
    lines = (ROOT / wrong).read_text().splitlines()
    expected = {number: line.split("  # error: ")[1] for number, line in enumerate(lines, 1) if "  # error: " in line}
    assert len(expected) >= 5
    assert {line for _, line in said} == set(expected), done.stdout
    for number, part in expected.items():
        assert any(part in text for text in said[wrong, number]), f"line {number}: {said[wrong, number]}"


@pytest.mark.parametrize("name", rlkernels.__all__)
def test_the_right_script_has_every_public_name(name):
    assert f"rlk.{name}" in (TYPED / "right.py").read_text()


def test_the_right_script_runs():
    done = subprocesses.child(TYPED / "right.py")
    assert done.returncode == 0, done.stderr


def test_the_checker_is_pinned_and_lint_runs_it():
    assert re.search(r"^mypy==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert '"mypy"' in (ROOT / "pyproject.toml").read_text()
    assert "/mypy" in (ROOT / "Makefile").read_text().split("\nlint:")[1].split("\n\n")[0]
    assert Path(rlkernels.__file__).with_name("py.typed").is_file()
