"""Functions of the language that no built-in objective calls, and columns of users, in Triton's interpreter."""

import all_functions
import pytest
import torch

from rlkernels import logits_policy_loss, policy_loss
from rlkernels.backends.triton import launch
from rlkernels.objectives import OBJECTIVES, exp, objective


def of_many(logp, old_logp, ref_logp, rollout_logp, advantage, gate, shift, beta=0.3, scale=1.5):
    """More columns than any objective of the library has, and parameters with defaults."""
    near = logp - ref_logp - shift
    ratio = exp(logp - rollout_logp)
    value = scale * gate * (0.5 * beta * near * near - ratio * advantage) + old_logp
    return value, scale * gate * (beta * near - ratio * advantage)


@pytest.fixture(autouse=True)
def registered():
    objective(all_functions.bent), objective(of_many, columns=7)
    yield
    del OBJECTIVES["bent"], OBJECTIVES["of_many"]


def test_every_column_of_a_user_reaches_the_kernels_and_dead_rows_hold_anything(backend, small_tiles):
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 40, generator=draw, requires_grad=True)
    targets, mask = torch.randint(40, (2, 3), generator=draw), torch.tensor([[1, 1, 0], [0, 1, 1]])
    drawn = [torch.randn(2, 3, generator=draw) for _ in range(6)]
    dead = [torch.where(mask != 0, x, float("nan")) for x in drawn]
    options = dict(zip(("ref_logprobs", "rollout_logprobs", "gate", "shift"), (*dead[1:3], *dead[4:]), strict=True))
    x = logits.detach().double().requires_grad_()
    logp = x.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    old, ref, rollout, advantage, gate, shift = (y.double() for y in drawn)
    value = 1.5 * gate * (0.15 * (logp - ref - shift) ** 2 - (logp - rollout).exp() * advantage) + old
    expected = value[mask != 0].mean()
    got = logits_policy_loss(logits, targets, dead[0], dead[3], mask, objective=of_many, **options)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)
    (want,) = torch.autograd.grad(expected, x, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(got, logits)[0].double(), want, rtol=1e-4, atol=1e-6)
    short = logp.detach().float()
    alone = policy_loss(short, dead[0], dead[3], mask, objective=of_many, **options)
    torch.testing.assert_close(alone.double(), expected.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_derivatives_are_those_of_torch(dtype):
    columns = all_functions.columns(dtype)
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-13}[dtype]
    got = launch.elementwise("bent", list(columns), [-0.5], None)[1:]
    for x, want in zip(got, all_functions.truth(*columns), strict=True):
        torch.testing.assert_close(x.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_nan_operand_gives_nan_and_an_infinite_one_its_limit(dtype):
    columns, want = all_functions.special(dtype)
    got = launch.elementwise("bent", list(columns), [-0.5], None)[1]
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0, equal_nan=True)
