"""The fused head's cases of ``python -m benchmarks``: their truth, their judge, the shapes that are run, and
what is told.
"""

import argparse
import json
import sys

import pytest
import torch

import rlkernels
from benchmarks import __main__ as command
from benchmarks import run_linear
from benchmarks.__main__ import main
from benchmarks.cases import linear, linear_cpu, linear_gpu
from benchmarks.cases.case import EAGER, OURS, Case
from benchmarks.cases.linear import gradient_bytes
from benchmarks.cases.linear_cpu import CASES, HALF, TRL
from benchmarks.cases.logits import FORWARD
from benchmarks.judge import wrong
from benchmarks.lineup import Lineup
from benchmarks.problems import linear as linear_problem
from benchmarks.problems import logits as logits_problem
from benchmarks.report import gpu as gpu_report
from benchmarks.report import linear as linear_report
from benchmarks.timing import cpu as cpu_timing
from benchmarks.timing.contender import Contender
from rlkernels.cli import machine
from rlkernels.linear.matmul import BLOCK_BYTES, BlockedFp32Matmul, matmul_for

CPU = torch.device("cpu")
TINY = ["--device", "cpu", "--tokens", "8", "--hidden", "16", "--vocab", "131", "--rounds", "3", "--plain"]
FLOOR = linear_cpu.floor(3)


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def small(request):
    return linear_problem.make(CPU, 24, 32, 1031, request.param), request.param


def test_the_truth_is_torchs_in_float64_whatever_the_blocks(small, monkeypatch):
    problem, _ = small
    monkeypatch.setattr(linear_problem, "PIECE", 24 * 100)  # 1031 columns: eleven blocks, the last a part of one
    found = linear_problem.truth(problem.hidden, problem.weight, problem.targets)
    leaves = [x.double().requires_grad_() for x in (problem.hidden, problem.weight)]
    logps = torch.log_softmax(leaves[0] @ leaves[1].T, -1)
    logp, entropy = logps.gather(1, problem.targets[:, None])[:, 0], -(logps.exp() * logps).sum(1)
    torch.testing.assert_close(found.logp, logp.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.entropy, entropy.detach(), rtol=1e-12, atol=1e-12)
    expected = torch.autograd.grad((logp, entropy), leaves, (problem.dlogp.double(), problem.dentropy.double()))
    got = linear_problem.gradients(problem, problem.dlogp, problem.dentropy)
    torch.testing.assert_close(got[0], expected[0][problem.rows], rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(got[1], expected[1][problem.columns], rtol=1e-11, atol=1e-13)


def test_no_token_of_the_problem_may_skip_a_product(small):
    problem, _ = small
    leaf = problem.truth.logp.clone().requires_grad_()
    (dlogp,) = torch.autograd.grad(logits_problem.ppo(leaf, problem.old_logprobs, problem.advantages).sum(), leaf)
    assert (dlogp != 0).all() and (problem.dlogp != 0).all()
    certain = problem.truth.logp > -1
    assert (
        0 < certain.sum() < 24
        and problem.half.sum() == 12
        and (problem.half & certain).any()
        and (problem.half & ~certain).any()
    )


WITHOUT_TRL = ("linear_sft_loss", "linear_distillation_loss")  # of the log-probabilities: a divergence has its own


@pytest.mark.parametrize("name", CASES)
def test_every_contender_computes_what_is_asked_and_ours_within_the_policy(name, small):
    problem, dtype = small
    peers, _ = linear_cpu.peers()
    case = CASES[name](problem, Lineup(peers=peers))
    floor = case.named(linear_cpu.floor(case.products))
    for contender in case.contenders:
        cpu_timing.first_run(contender)
        assert contender.errors, contender.name
        coarse = (1e-2 if dtype == "bf16" else 1e-5) * (10 if name == "linear_distillation_loss" else 1)  # differences
        told = contender.name, contender.errors
        assert all(e < coarse for q, e in contender.errors.items() if q in ("product", "dhidden", "dweight")), told
        assert contender.errors.get("loss", 0.0) < (0.1 if dtype == "bf16" else 1e-5), told
    assert floor.errors and case.named(OURS).errors.keys() >= {"dhidden", "dweight"}
    assert wrong(case) == []
    assert case.flops == 2 * case.products * 32 * 1031 * case.shape[0] and gradient_bytes(case.shape) == 4 * 32 * (
        case.shape[0] + 1031
    )
    assert (TRL in [c.name for c in case.contenders]) == ("trl_chunked" in peers and name not in WITHOUT_TRL)


def test_what_ours_holds_beside_the_gradients_stays_within_the_budget(monkeypatch):
    monkeypatch.setenv("RLKERNELS_LOGITS_BUDGET", str(2**22))  # a quarter of the logits
    for dtype in ("fp32", "bf16"):
        problem = linear_problem.make(CPU, 512, 64, 8192, dtype)
        case = linear_cpu.policy(problem, Lineup())
        for name in (OURS, EAGER):
            cpu_timing.memory(case.named(name))
        # Where the weight is widened, a block of it lies beside the logits.
        one = matmul_for(problem.weight, torch.float32, "cpu")
        block = min(BLOCK_BYTES, 4 * 8192 * 64) if isinstance(one, BlockedFp32Matmul) else 0
        assert case.named(OURS).peak_bytes - gradient_bytes(case.shape) - block <= 1.05 * 2**22
        assert linear_report.beyond_gradients(case, case.named(EAGER)) > 2 * 2**22


@pytest.mark.parametrize("name", ["linear_policy_loss", "linear_sft_loss"])
def test_one_percent_of_error_fails_the_command(name, monkeypatch, capsys):
    true = getattr(rlkernels, name)
    monkeypatch.setattr(rlkernels, name, lambda *a, **k: true(*a, **k) * 1.01)
    assert main([*TINY, "--dtype", "bf16", "--case", name]) == 1
    printed = capsys.readouterr().out
    for quantity in ("loss", "dhidden", "dweight"):
        assert f"WRONG: {name} forward+backward, bf16 [8, 16, 131], rlkernels: error of {quantity}" in printed


def test_the_command_alone_writes_every_figure_it_prints(capsys, tmp_path):
    file, picture = tmp_path / "linear.json", tmp_path / "linear.png"
    plot = ["--plot", str(picture)] if machine.version("matplotlib") else []
    assert main([*TINY, "--dtype", "bf16", "--case", "linear", "--json", str(file), *plot]) == 0
    printed, data = capsys.readouterr().out, json.loads(file.read_text())
    assert (
        set(data) == {"command", "machine", "threads", "correct", "faults", "remarks", "linear"}
        and data["correct"] is True
    )
    cases = data["linear"]["cases"]
    assert [(c["kind"], c["dtype"]) for c in cases] == [(name, "bf16") for name in CASES]
    for case in cases:
        assert case["name"] in printed and case["shape"] == [8, 16, 131]
        for c in case["contenders"]:
            assert len(c["samples_s"]) == 3 and min(c["samples_s"]) > 0 and c["peak_bytes"] is not None
            assert f"{1e3 * c['median_s']:.2f}" in printed and c["errors"]
        assert [t["shape_of_the_statement"] for t in case["targets"]] == [False] * (
            5 if case["kind"] == "linear_policy_loss" else 0
        )
    assert "other shape" in printed and "NOT MET" not in printed and "median ms" in printed
    assert not plot or picture.read_bytes().startswith(b"\x89PNG")


def test_a_peer_that_is_absent_or_fails_is_one_line(monkeypatch, capsys):
    def fails(*arguments):
        raise RuntimeError("no such device\nsecond line")

    for module in ("liger_kernel", "liger_kernel.chunked_loss"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(linear, "full_logits", fails)
    assert main([*TINY, "--dtype", "fp32", "--case", "linear_policy_loss"]) == 0
    printed = capsys.readouterr().out
    assert "note: Liger chunked GRPO: not measured: ModuleNotFoundError" in printed
    assert (
        "note: linear_policy_loss forward+backward, fp32 [8, 16, 131]: torch eager not measured: no such device\n"
        in printed
    )
    assert (
        "second line" not in printed and "times faster than torch eager >= 1.3" in printed and "not measured" in printed
    )


def plan(*arguments):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return run_linear.plan(parser.parse_args(list(arguments)))


def test_without_a_name_one_shape_is_measured_and_by_name_all_of_them():
    every = list(CASES)
    assert plan() == [((512, 512, 32000), "fp32", every), ((512, 512, 32000), "bf16", every)]
    assert plan("--quick", "--dtype", "bf16") == [((64, 128, 8192), "bf16", every)]
    assert plan("--case", FORWARD) == []
    grid = plan("--case", "linear")
    assert [shape for shape, dtype, _ in grid if dtype == "bf16"] == [
        (t, 512, v) for t in (512, 2048) for v in (32000, 128256)
    ]
    assert all(names == (every if shape[0] == 512 else every[:1]) for shape, _, names in grid)
    assert {shape for shape, _, _ in plan("--case", "linear", "--tokens", "2048", "--vocab", "32000")} == {
        (2048, 512, 32000)
    }
    assert {tuple(names) for _, _, names in plan("--case", "linear_dpo_loss")} == {("linear_dpo_loss",)}


def timed(name, seconds, **rest):
    return Contender(name, lambda _: None, samples=[seconds, seconds, 100.0], **rest)


def test_figures_to_reach_compare_medians_and_leave_the_gradients_out():
    ours = timed(OURS, 1.2, peak_bytes=100, resident_bytes=4 * 512 * (512 + 32000) + 90)
    contenders = [timed(FLOOR, 1.0), ours, timed(HALF, 0.9), timed(EAGER, 1.5)]
    case = Case("c", contenders, shape=(512, 512, 32000), kind="linear_policy_loss", dtype="bf16", products=3)
    goals = linear_report.targets(case, 100)
    assert [g.value for g in goals] == [
        pytest.approx(1.2),
        pytest.approx(1.25),
        None,
        pytest.approx(0.9),
        pytest.approx(0.75),
    ]
    assert [linear_report.cell(case, g) for g in goals] == [
        "1.2 met",
        "1.25 NOT MET",
        "not measured",
        "0.9 met",
        "0.75 NOT MET",
    ]
    case.shape = (512, 512, 31999)
    assert linear_report.cell(case, goals[1]) == "1.25 other shape"


def test_a_measured_case_keeps_figures_and_no_tensors(small):
    case = run_linear.forgotten(linear_cpu.policy(small[0], Lineup()))
    for contender in case.contenders:
        for spent in (contender.run, contender.prepare, contender.check):
            with pytest.raises(RuntimeError, match="its tensors are gone; make the case again"):
                spent(None)


def gpu_plan(*arguments):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args = parser.parse_args(["--device", "cuda", *arguments])
    return linear_gpu.plan(args, args.case or list(linear_gpu.NAMES) + ["linear"])


def test_on_a_gpu_the_headline_is_one_shape_and_the_longest_batch():
    first, rest = list(linear_gpu.NAMES), list(linear_gpu.NAMES[:2])
    assert gpu_plan("--headline") == [((4096, 4096, 151936), first), ((32768, 4096, 151936), rest[:1])]
    assert gpu_plan("--quick") == [((4096, 4096, 151936), first)]
    grid = gpu_plan()
    assert [shape for shape, _ in grid] == [(t, 4096, v) for t in (4096, 8192, 32768) for v in (151936, 128256)]
    assert [names for _, names in grid] == [first, *[rest] * 5]
    alone = "linear_token_logprobs"
    assert gpu_plan("--case", alone, "--vocab", "515") == [((t, 4096, 515), [alone]) for t in (4096, 8192, 32768)]
    assert gpu_plan("--case", "gae") == []


def test_figures_of_the_gpu_are_shares_of_the_products_of_the_same_run():
    def found(name, tokens, times, peak=0):
        return {
            "name": f"{name} [x] forward+backward",
            "shape": [tokens, 4096, 151936],
            "reads_bytes": 1,
            "writes_bytes": 0,
            "entries": [
                {"name": n, "hot": {"median_s": t}, "of_floor": 1.0, "peak_bytes": peak, "launches": None}
                for n, t in times.items()
            ],
        }

    gradients = 4 * 4096 * (32768 + 151936)
    peers = {"TRL chunked": 1.5, "verl FusedLinearForPPO": 1.9}
    cases = [
        found("linear_policy_loss", 4096, {"3 cuBLAS products": 0.9, "rlkernels auto": 1.0, **peers}),
        found("linear_policy_loss", 32768, {"3 cuBLAS products": 7.0, "rlkernels auto": 8.0}, gradients + 2**30),
        found("linear_token_stats", 4096, {"4 cuBLAS products": 0.8, "rlkernels auto": 1.0}),
    ]
    goals = {g["text"]: (g["worst"], g["met"]) for g in gpu_report.goals(cases)}
    assert goals["linear_policy_loss forward+backward, share of 3 cuBLAS products"] == (0.875, False)
    assert goals["linear_token_stats forward+backward, share of 4 cuBLAS products"] == (0.8, False)
    assert goals["linear_policy_loss, times faster than TRL chunked"] == (1.5, True)
    assert goals["linear_policy_loss, times faster than verl FusedLinearForPPO"] == (1.9, False)
    assert goals["linear_policy_loss, times faster than Liger chunked GRPO"] == (None, None)
    assert goals["linear_policy_loss at 32768 tokens, GiB beside inputs and fp32 gradients"] == (1.0, True)
