"""A head over a process group: 2 and 4 processes against the dense head in float64; and heads whose weight the caller
makes or gathers.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import oracles
import pytest
import subprocesses
import torch
import torch.distributed.fsdp
import vocab_parallel_disagreement  # noqa: F401  (its cases)
import vocab_parallel_errors  # noqa: F401  (its cases)
import vocab_parallel_masks  # noqa: F401  (its cases)
import vocab_parallel_refusals  # noqa: F401  (its cases)
import vocab_parallel_topk  # noqa: F401  (its cases)
from filelock import FileLock  # torch depends on it
from paths import ROOT
from reference import statistics
from vocab_parallel_cases import CASES

import rlkernels as rlk

WORK = Path(__file__).with_name("vocab_parallel_worker.py")


def reports(ranks, tmp_path_factory):
    """What each rank found, ``[{case: [complaint, digests]}]``: one start of ``ranks`` processes for the whole file,
    whoever asks first.
    """
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    folder = shared / f"parallel{ranks}"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            started = [
                subprocess.Popen(
                    [sys.executable, WORK, str(rank), str(ranks), folder / "rendezvous", folder / f"{rank}.json"],
                    cwd=os.sep,
                    env=subprocesses.environment(OMP_NUM_THREADS="1"),
                    stderr=(folder / f"{rank}.log").open("w"),
                )
                for rank in range(ranks)
            ]
            try:
                for process in started:
                    process.wait(timeout=300)
            finally:
                for process in started:
                    process.kill()
    found = []
    for rank in range(ranks):
        report = folder / f"{rank}.json"
        assert report.exists(), (
            f"rank {rank} of {ranks} wrote no report: {(folder / f'{rank}.log').read_text()[-3000:]}"
        )
        found.append(json.loads(report.read_text()))
    return found


@pytest.mark.fault(5, 54, 55, 88, 134)
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("sentence", CASES, ids=[re.sub(r"\W+", "-", sentence) for sentence in CASES])
def test_on_every_rank(sentence, ranks, tmp_path_factory):
    found = [report[sentence] for report in reports(ranks, tmp_path_factory)]
    complaints = [f"rank {rank}: {complaint}" for rank, (complaint, _) in enumerate(found) if complaint]
    assert not complaints, "\n".join(complaints)
    first = found[0][1]
    for rank, (_, digests) in enumerate(found):
        assert digests == first, (
            f"rank {rank} has other bits than rank 0 in {[name for name in first if digests.get(name) != first[name]]}"
        )


FSDP = [
    name
    for name in ("set_gradient_divide_factor", "set_force_sum_reduction_for_comms")
    if not hasattr(torch.distributed.fsdp.FSDPModule, name)
]


@pytest.mark.fault(54)
@pytest.mark.skipif(bool(FSDP), reason=f"FSDP2 of this torch lacks {FSDP}")
def test_the_example_under_FSDP2_equals_one_process_and_its_gradient_reaches_the_sharded_head():
    done = subprocesses.child(
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        ROOT / "examples/fsdp2_policy.py",
        OMP_NUM_THREADS="1",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for head in ("tied", "of its own"):
        for gather in ("forward", "full_tensor"):
            assert re.search(
                f"head {head}, gathered by {gather}: loss 0.\\d+; loss, gradients and step are those of one process",
                done.stdout,
            ), done.stdout


def head_problem(dtype):
    draw = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(12, 32, generator=draw, dtype=torch.float64).to(dtype),
        torch.randn(67, 32, generator=draw, dtype=torch.float64).to(dtype),
    )
    targets = torch.randint(67, (12,), generator=draw)
    return hidden, weight, targets, draw


def loss_and_truth(hidden, weight, wide_hidden, wide_weight, targets, draw):
    """A policy loss of an effective weight, and the same from dense logits in float64."""
    truth = statistics(wide_hidden @ wide_weight.t(), targets, 0.7)["logprobs"]
    old, advantages = (truth.detach() + 0.2 * torch.randn(12, generator=draw)).float(), torch.randn(12, generator=draw)
    loss = rlk.linear_policy_loss(hidden, weight, targets, old, advantages, temperature=0.7, chunk_tokens=5)
    return loss, oracles.ppo_clip(truth, old.double(), advantages.double(), 0.2, 0.2).mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_low_rank_update_of_the_head_is_trained_through_the_effective_weight_of_the_caller(dtype):
    hidden, weight, targets, draw = head_problem(dtype)
    a, b = (torch.randn(*shape, generator=draw).to(dtype).requires_grad_() for shape in ((4, 32), (67, 4)))
    wide = [x.detach().double().requires_grad_() for x in (hidden, a, b)]
    hidden.requires_grad_()
    effective = weight + 0.5 * (b @ a)  # the caller's: merged, scaled, in whatever dtype the caller wants
    # The truth starts from the effective weight as it was rounded; its derivatives are those of b @ a.
    exact = weight.double() + 0.5 * (wide[2] @ wide[1])
    loss, truth = loss_and_truth(
        hidden, effective, wide[0], exact + (effective.double() - exact).detach(), targets, draw
    )
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
    for x, t in zip(torch.autograd.grad(loss, (hidden, a, b)), torch.autograd.grad(truth, wide), strict=True):
        # Bf16: the caller's own product rounds.
        assert (x.double() - t).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * t.norm()
    assert weight.grad is None and not weight.requires_grad


def test_a_head_that_is_the_embedding_gets_the_sum_of_both_gradients():
    hidden, weight, targets, draw = head_problem(torch.float32)
    ids, mix = torch.randint(67, (12,), generator=draw), torch.randn(32, 32, generator=draw) / 8
    embedding, wide = weight.clone().requires_grad_(), weight.double().requires_grad_()
    loss, truth = loss_and_truth(embedding[ids] @ mix, embedding, wide[ids] @ mix.double(), wide, targets, draw)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)
    loss.backward()
    truth.backward()
    assert (embedding.grad - wide.grad).norm() <= 1e-5 * wide.grad.norm()
    (alone,) = torch.autograd.grad(
        loss_and_truth((embedding[ids] @ mix).detach(), embedding, wide[ids] @ mix.double(), wide, targets, draw)[0],
        embedding,
    )
    assert (embedding.grad - alone).norm() > 0.1 * embedding.grad.norm()  # the embedding's part is not small


@pytest.mark.fault(134)
@pytest.mark.parametrize("when", ["before the call", "between two calls", "before the backward"])
def test_a_process_that_dies_leaves_the_other_with_an_error_of_the_group_within_its_timeout(when, tmp_path):
    command = [sys.executable, Path(__file__).with_name("vocab_parallel_deaths.py")]
    dying = subprocess.Popen(
        [*command, "1", tmp_path / "rendezvous", when], cwd=os.sep, env=subprocesses.environment(OMP_NUM_THREADS="1")
    )
    try:
        done = subprocess.run(
            [*command, "0", tmp_path / "rendezvous", when],
            cwd=os.sep,
            env=subprocesses.environment(OMP_NUM_THREADS="1"),
            capture_output=True,
            text=True,
            timeout=90,
        )
        assert dying.wait(timeout=90) == 3
    finally:
        dying.kill()
    assert done.returncode == 0, done.stderr[-3000:]
    seconds, text = re.search(r"^([\d.]+) s: (.+)", done.stdout, re.MULTILINE).groups()
    assert float(seconds) < 15 and re.search("closed|reset|imed out", text), done.stdout
