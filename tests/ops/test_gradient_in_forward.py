"""The gradient that ``logits_policy_loss`` makes in its forward: given away once, as it is only for an upstream
gradient of exactly 1.

On the CPU the host reads the upstream gradient; elsewhere the kernel does, so that nothing waits. ``way`` takes that
second way here too.
"""

import pytest
import torch
from flat_backend import Flat
from reference import draw_rows, same_bits, statistics
from torch.library import opcheck

import rlkernels as rlk
from rlkernels import ops
from rlkernels.backends import BACKENDS
from rlkernels.ops import policy

V = 37
UPSTREAM = (1.0, 2.0**16, -0.5, 0.0)


@pytest.fixture(params=["host reads", "kernel reads"])
def way(request, monkeypatch):
    if request.param == "kernel reads":
        monkeypatch.setattr(policy, "known_to_be_one", lambda x: False)
    return request.param


def problem(dtype, rows=5, entropy_coef=0.1, **options):
    x, targets, _ = draw_rows((rows,), V, dtype)
    leaf = x.requires_grad_()
    old, advantage = -torch.ones(rows) * 3, torch.linspace(-1, 2, rows)

    def loss(inplace=False):
        logits = leaf * 1 if inplace else leaf
        return rlk.logits_policy_loss(
            logits,
            targets,
            old,
            advantage,
            entropy_coef=entropy_coef,
            temperature=0.7,
            inplace_backward=inplace,
            **options,
        )

    return leaf, targets, loss


def two_passes(leaf, loss, g):
    """The gradient with the upstream gradient inside of the one rounding: in place, where none is made in the forward;
    of a copy.
    """
    return torch.autograd.grad(loss(inplace=True), leaf, g)[0]


@pytest.mark.fault(31, 84)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_any_upstream_gradient_gives_the_bits_of_the_two_passes(dtype, way, backend):
    leaf, _, loss = problem(dtype)
    for g in UPSTREAM:
        g = torch.tensor(g, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        expected = two_passes(leaf, loss, g)
        (got,) = torch.autograd.grad(loss(), leaf, g)
        assert same_bits(got, expected), g
        assert g == 0 or got.any(), g


@pytest.mark.fault(33, 34)
def test_a_gradient_is_given_away_once_and_the_next_is_another_tensor(way, backend):
    leaf, _, loss = problem(torch.bfloat16)
    expected = {g: two_passes(leaf, loss, torch.tensor(g)) for g in UPSTREAM}
    for first in UPSTREAM:
        output, given = loss(), []
        for g in (first, *UPSTREAM, first):
            (got,) = torch.autograd.grad(output, leaf, torch.tensor(g), retain_graph=True)
            assert same_bits(got, expected[g]), (first, g)
            assert all(got.data_ptr() != other.data_ptr() for other in given)
            given.append(got.fill_(float("nan")))


@pytest.mark.fault(84)
def test_a_loss_scale_reaches_fp16_before_the_rounding(way, backend):
    leaf, targets, loss = problem(
        torch.float16, entropy_coef=0.0, objective="reinforce", weights=torch.full((5,), 1e-7)
    )
    (got,) = torch.autograd.grad(loss(), leaf, torch.tensor(2.0**16))
    wide = leaf.detach().double().requires_grad_()
    logp = statistics(wide, targets, 0.7)["logprobs"]
    advantage, weight = torch.linspace(-1, 2, 5), 1e-7 * (targets != -100)
    (want,) = torch.autograd.grad(-(2.0**16 * weight.double() * advantage * logp).sum(), wide)
    torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=6e-8)
    assert want.abs().max() < 0.1 and got.any()


def test_one_launch_in_the_forward_and_one_in_the_backward_where_the_host_reads_nothing(monkeypatch, backend):
    monkeypatch.setattr(policy, "known_to_be_one", lambda x: False)
    leaf, _, loss = problem(torch.float32)
    for g in UPSTREAM:
        before = ops.calls()
        torch.autograd.grad(loss(), leaf, torch.tensor(g))
        assert ops.calls() - before == {("fused_policy", backend): 1, ("token_stats_backward", backend): 1}


def arguments(dtype=torch.float32, vocab=V, rows=5):
    x, targets, mask = draw_rows((rows,), vocab, dtype)
    stats = rlk.token_stats(x, targets)
    _, shift, total, entropy, *_ = ops.token_stats_op(x, targets, 1.0, -100, None, None, ops.ENTROPY, False, "eager")
    g = torch.linspace(-1, 1, rows)
    assert stats.logprobs.shape == (rows,)
    return g, g.flip(0).contiguous(), None, x, targets, 1.0, -100, mask, None, shift, total, entropy, None, None, None


def test_unless_of_exactly_1_writes_nothing_and_any_other_everything(backend):
    before = torch.full((5, V), 7.0)
    expected = Flat(BACKENDS[backend]).token_stats_backward(*arguments(), None)
    for unless in (1.0, 2.0**16, -0.5, 0.0, 1.0 + 2.0**-23, float("nan"), float("inf")):
        out = before.clone()
        assert Flat(BACKENDS[backend]).token_stats_backward(*arguments(), out, torch.tensor(unless)) is out
        assert same_bits(out, before if unless == 1.0 else expected), unless


@pytest.mark.fault(41)
def test_opcheck_of_the_backward_into_a_tensor(backend):
    numbers = [ops.number(a) if isinstance(a, float) else a for a in arguments()]
    for unless in (1.0, 0.5):
        opcheck(ops.token_stats_backward_into.op, (*numbers, backend, torch.full((5, V), 7.0), torch.tensor(unless)))
