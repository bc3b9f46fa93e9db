"""Moments of a batch in parts: any cut of it gives the whole batch's whitening and scale, over micro-batches and over
ranks.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import subprocesses
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rlkernels as rlk

WORKER = Path(__file__).with_name("moments_worker.py")


@st.composite
def cut_batches(draw):
    """Elements, a mask with holes, and the parts that they are cut into; a part may be empty or dead."""
    sizes = draw(st.lists(st.integers(0, 5), min_size=1, max_size=5))
    seed, offset = draw(st.integers(0, 999)), draw(st.sampled_from([0.0, 1e4]))
    g = torch.Generator().manual_seed(seed)
    x = offset + torch.randn(sum(sizes), dtype=torch.float64, generator=g)
    if draw(st.booleans()):
        x = x.round()  # equal elements
    return x, torch.rand(len(x), generator=g) < draw(st.sampled_from([0.0, 0.6, 1.0])), sizes


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cut_batches(), st.booleans(), st.booleans(), st.sampled_from(["add", "clamp"]))
def test_any_cut_of_a_batch_is_whitened_as_the_whole(batch, unbiased, shift_mean, eps_mode):
    x, mask, sizes = batch
    x = torch.where(mask, x, float("nan"))
    options = {"unbiased": unbiased, "shift_mean": shift_mean, "eps_mode": eps_mode}
    parts = list(zip(x.split(sizes), mask.split(sizes), strict=True))
    moments = rlk.merge_moments([rlk.masked_moments(*part) for part in parts])
    live = x[mask]
    assert moments.count == len(live)
    if len(live):
        torch.testing.assert_close(moments.mean, live.mean(), rtol=1e-14, atol=1e-14)
        torch.testing.assert_close(moments.squares, (live - live.mean()).square().sum(), rtol=1e-9, atol=1e-9)
    found = torch.cat([rlk.masked_whiten(*part, moments=moments, **options) for part in parts])
    whole = rlk.masked_whiten(x, mask, **options)
    torch.testing.assert_close(found, whole, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.float(), whole.float(), rtol=2e-6, atol=2e-6)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cut_batches(), st.booleans(), st.sampled_from(["mean", "batch-mean", "leave-one-out"]))
def test_any_cut_between_groups_has_the_scale_and_the_baseline_of_the_batch(batch, unbiased, baseline):
    rewards, scored, sizes = batch
    rewards = torch.where(scored, rewards, float("nan"))
    groups = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    options = {"scale": "batch-std", "baseline": baseline, "unbiased": unbiased}
    moments = rlk.masked_moments(rewards, scored)
    parts = zip(rewards.split(sizes), groups.split(sizes), strict=True)
    found = torch.cat([rlk.group_advantages(*part, **options, moments=moments) for part in parts])
    torch.testing.assert_close(found, rlk.group_advantages(rewards, groups, **options), rtol=1e-9, atol=1e-9)


def test_equal_elements_of_several_parts_have_no_spread():
    parts = [torch.full((n,), 0.1, dtype=torch.float64) for n in (1, 3, 0, 7)]
    moments = rlk.merge_moments([rlk.masked_moments(part) for part in parts])
    assert moments.squares == 0
    for part in parts:
        assert torch.equal(rlk.masked_whiten(part, moments=moments, eps=0.0), torch.zeros_like(part))


def test_given_numbers_are_constants_and_the_gradient_is_the_scale():
    x = torch.tensor([1.0, 3.0, float("inf")], dtype=torch.float64, requires_grad=True)
    y = rlk.masked_whiten(x, torch.tensor([1, 1, 0]), moments=rlk.Moments(4, 2.0, 12.0))
    torch.testing.assert_close(y.detach(), torch.tensor([-0.5, 0.5, 0.0], dtype=torch.float64))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64))


def test_moments_per_row_whiten_rows():
    g = torch.Generator().manual_seed(0)
    x, mask = torch.randn(4, 6, generator=g), torch.rand(4, 6, generator=g) < 0.7
    moments = rlk.masked_moments(x, mask, dim=-1)
    assert moments.count.shape == (4, 1) and moments.mean.dtype == torch.float64
    torch.testing.assert_close(rlk.masked_whiten(x, mask, dim=1, moments=moments), rlk.masked_whiten(x, mask, dim=1))


def test_a_live_nan_poisons_the_whole_and_a_dead_one_nothing():
    x = torch.tensor([1.0, float("nan"), 3.0])
    moments = rlk.merge_moments([rlk.masked_moments(x), rlk.masked_moments(torch.tensor([2.0]))])
    assert moments.squares.isnan()
    assert rlk.masked_whiten(torch.tensor([2.0, 4.0]), moments=moments).isnan().all()
    assert rlk.masked_moments(x, ~x.isnan()).mean == 2.0


@pytest.mark.parametrize("ranks", [2])
def test_ranks_of_a_process_group_whiten_their_shares_as_the_whole_batch(ranks, tmp_path):
    started = [
        subprocess.Popen(
            [sys.executable, WORKER, str(rank), str(ranks), tmp_path / "rendezvous", tmp_path / f"{rank}.json"],
            cwd=os.sep,
            env=subprocesses.environment(OMP_NUM_THREADS="1"),
            stderr=(tmp_path / f"{rank}.log").open("w"),
        )
        for rank in range(ranks)
    ]
    try:
        for process in started:
            process.wait(timeout=120)
    finally:
        for process in started:
            process.kill()
    for rank in range(ranks):
        report = tmp_path / f"{rank}.json"
        assert report.exists(), (tmp_path / f"{rank}.log").read_text()[-3000:]
        assert json.loads(report.read_text()) == [], f"rank {rank}"


X = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
R, IDS = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 0, 1])
GIVEN = rlk.Moments(4, 2.0, 12.0)
BAD = {
    "three": (TypeError, "moments must hold count, mean and squares", lambda: rlk.masked_whiten(X, moments=(1.0, 2.0))),
    "negative": (ValueError, "moments.count must not be", lambda: rlk.masked_whiten(X, moments=rlk.Moments(-1, 0, 0))),
    "16 bits": (
        TypeError,
        "moments.count has dtype torch.bfloat16",
        lambda: rlk.masked_whiten(X, moments=rlk.Moments(torch.tensor(3.0).bfloat16(), 0.0, 1.0)),
    ),
    "gradient": (
        ValueError,
        "moments.mean gets no gradient; detach it",
        lambda: rlk.masked_whiten(X, moments=rlk.Moments(3, torch.tensor(0.0, requires_grad=True), 1.0)),
    ),
    "shape": (
        ValueError,
        r"moments.count has shape \(2, 1\), expected \(\)",
        lambda: rlk.masked_whiten(X, moments=rlk.masked_moments(X, dim=1)),
    ),
    "both": (
        ValueError,
        "moments and process_group both give the statistics",
        lambda: rlk.masked_whiten(X, moments=GIVEN, process_group=3),
    ),
    "no group": (
        TypeError,
        "process_group must be a torch.distributed.ProcessGroup",
        lambda: rlk.masked_whiten(X, process_group=3),
    ),
    "rows of a group": (
        ValueError,
        "process_group takes the moments of all elements; leave dim out",
        lambda: rlk.masked_whiten(X, dim=1, process_group=3),
    ),
    "dim": (ValueError, "dim must name dimensions of x", lambda: rlk.masked_moments(X, dim=2)),
    "mask": (ValueError, r"mask has shape \(2,\), expected \(2, 2\)", lambda: rlk.masked_moments(X, X[0] > 0)),
    "complex": (TypeError, "x has dtype torch.complex64", lambda: rlk.masked_moments(X.to(torch.complex64))),
    "no part": (ValueError, "parts is empty", lambda: rlk.merge_moments([])),
    "one part": (TypeError, "parts must be a list of moments, got Moments", lambda: rlk.merge_moments(GIVEN)),
    "shapes of parts": (
        ValueError,
        "parts must all have one shape",
        lambda: rlk.merge_moments([GIVEN, rlk.masked_moments(X, dim=1)]),
    ),
    "unread": (
        ValueError,
        "moments is read with baseline 'batch-mean' or scale 'batch-std' alone",
        lambda: rlk.group_advantages(R, IDS, moments=GIVEN),
    ),
    "both of groups": (
        ValueError,
        "moments and process_group both give the statistics",
        lambda: rlk.group_advantages(R, IDS, scale="batch-std", moments=GIVEN, process_group=3),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    error, message, call = BAD[case]
    with pytest.raises(error, match=f"^(masked_whiten|masked_moments|merge_moments|group_advantages): {message}"):
        call()
