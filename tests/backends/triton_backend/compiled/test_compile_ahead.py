"""The kernels of the GPU suite, compiled before it runs: what is recorded, and that it disturbs nothing."""

import sys

import pytest
import torch
from paths import ROOT

import rlkernels
from rlkernels import backends
from rlkernels.backends import use_backend

sys.path.insert(0, str(ROOT / "tests/backends/gpu"))
from compile_ahead import CARRIER, Ahead  # noqa: E402


@pytest.fixture
def ahead(tmp_path, monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, CARRIER, backends.BACKENDS[CARRIER])
    made = Ahead(tmp_path / "marks", "sm_90")
    made.asked = []
    monkeypatch.setattr(made.launches, "compiled", lambda launch: made.asked.append(launch.kernel))
    made.install()
    return made


def train(rows, inplace=False):
    x = torch.randn(rows, 37, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = rlkernels.logits_policy_loss(
        x * 1, torch.arange(rows), torch.zeros(rows), torch.ones(rows), inplace_backward=inplace
    )
    return loss.detach(), torch.autograd.grad(loss, x)[0]


@pytest.mark.parametrize("inplace", (False, True))
def test_every_kernel_is_compiled_once_and_the_numbers_are_those_of_the_carrier(ahead, monkeypatch, inplace):
    with use_backend(CARRIER):
        loss, grad = train(3, inplace)
        count = len(ahead.asked)
        train(3, inplace)
        assert len(ahead.asked) == count == len(list(ahead.folder.iterdir())) and ahead.failed == 0
    assert "fused_policy" in ahead.asked and ("token_stats_backward" in ahead.asked) is inplace
    monkeypatch.undo()
    with use_backend(CARRIER):
        expected = train(3, inplace)
    assert torch.equal(loss, expected[0]) and torch.equal(grad, expected[1])


def test_a_refusal_is_still_that_of_the_carrier(ahead):
    with use_backend(CARRIER), pytest.raises(IndexError):
        rlkernels.token_logprobs(torch.zeros(1, 4), torch.tensor([7]))
