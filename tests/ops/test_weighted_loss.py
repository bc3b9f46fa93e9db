"""The op behind losses of columns: values, gradients, and how many launches a loss is made of."""

import pytest
import torch
from reference import same_bits
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from weighted_losses import CASES, check, check_without_a_live_element, columns, definition

import rlkernels as rlk
from rlkernels import ops
from rlkernels.backends import BACKENDS

LAUNCHES_NOTHING = {
    "aten.detach",
    "aten.select",
    "aten.view",
    "aten.reshape",
    "aten.alias",
    "aten.empty_like",
    "aten.empty",
    "aten.new_empty",
    "aten.ones_like",
}  # ones_like: the gradient that backward() starts from


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 7, 5000])
@pytest.mark.parametrize(("objective", "taken", "kind"), CASES)
def test_loss_and_slopes_are_the_definition_in_float64(objective, taken, kind, n, dtype, backend):
    check(BACKENDS[backend].weighted_loss, objective, taken, kind, n, dtype)


def test_no_live_element_and_no_element_give_zero(backend):
    check_without_a_live_element(BACKENDS[backend].weighted_loss)


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_gradients_reach_the_first_column_and_what_is_taken_from_it(taken, backend):
    first, *rest = (x.requires_grad_() for x in columns(40, 1 + taken, torch.float32))
    loss, _ = ops.weighted_loss("pairwise", first, *(rest + [None, None])[:2], [], (), None, None, 0.5, backend)
    _, slopes = definition("pairwise", first.detach(), [x.detach() for x in rest], [], None, None, 0.5)
    got = torch.autograd.grad(loss, [first, *rest], torch.tensor(3.0))
    for gradient, slope in zip(got, (slopes[0], *[-slopes[0]] * taken), strict=True):
        torch.testing.assert_close(gradient.double(), 3.0 * slope, rtol=1e-5, atol=1e-7)


@pytest.mark.fault(41)
@pytest.mark.parametrize("weight", [None, torch.tensor([True, False, True, True]), torch.tensor([0.0, 0.5, -1.0, 2.0])])
def test_opcheck(weight, backend):
    first, minus, other = columns(4, 3, torch.float32)
    total = torch.tensor(3) if weight is not None and weight.dtype == torch.bool else None
    rest = ops.numbers(()), weight, total, ops.number(0.3), backend
    opcheck(ops.weighted_loss.op, ("pairwise", first.requires_grad_(), minus.requires_grad_(), other, [], *rest))
    opcheck(ops.weighted_loss.op, ("k2", first, None, None, [other], *rest))
    slopes = torch.stack([other, -other])
    opcheck(ops.weighted_loss_backward.op, (ops.number(0.3).float(), slopes, first.detach(), minus.detach(), None))


class Launches(TorchDispatchMode):
    """What passes the dispatcher and works on an accelerator; an op of ours, and torch's product in its backward, is
    one launch of a kernel.
    """

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, out = ".".join(str(function).split(".")[:2]), function(*args, **(kwargs or {}))
        # Run-time numbers, as a registered op takes them.
        of_the_host = name in ("aten.full", "aten.stack") and out.dtype == torch.float64
        if name not in LAUNCHES_NOTHING and not of_the_host:
            self.names.append(name)
        return out


def launches(function, *leaves):
    """``(forward, backward)``."""
    with Launches() as forward:
        loss = function(*leaves)
    with Launches() as backward:
        torch.autograd.grad(loss, leaves)
    return forward.names, backward.names


OURS, BACK = "rlkernels.weighted_loss", "rlkernels.weighted_loss_backward"


def test_a_pair_loss_is_one_launch_each_way(backend):
    chosen, rejected, margin = (x.requires_grad_() for x in columns(32, 3, torch.float32))
    assert launches(rlk.pairwise_reward_loss, chosen, rejected) == ([OURS], [BACK])
    assert launches(lambda *x: rlk.pairwise_reward_loss(*x[:2], margin=x[2]), chosen, rejected, margin) == (
        [OURS],
        [BACK],
    )


def test_a_policy_loss_counts_its_tokens_and_is_one_launch_each_way(backend):
    logp, old, advantages = (x.view(4, 8) for x in columns(32, 3, torch.float32))
    mask = torch.ones(4, 8, dtype=torch.bool)
    mask[1, 3:] = False
    logp.requires_grad_()
    assert launches(lambda x: rlk.policy_loss(x, old, advantages, mask), logp) == (["aten.sum", OURS], [BACK])
    assert launches(lambda x: rlk.policy_loss(x, old, advantages), logp) == ([OURS], [BACK])
    assert launches(lambda x: rlk.value_loss(x, old, advantages, mask, clip_range=0.2), logp) == (
        ["aten.sum", OURS],
        [BACK],
    )


def test_the_counted_mean_has_the_bits_of_its_weights(backend):
    logp, old, advantages = columns(50, 3, torch.float32)
    mask = torch.arange(50) % 3 != 0
    with rlk.use_backend(backend):
        counted = rlk.policy_loss(logp.requires_grad_(), old, advantages, mask, ref_logprobs=old, kl_coef=0.125)
        weighed = rlk.policy_loss(
            logp, old, advantages, mask, weights=rlk.token_weights(mask), ref_logprobs=old, kl_coef=0.125
        )
    assert same_bits(counted.detach(), weighed.detach())
    assert same_bits(*(torch.autograd.grad(loss, logp)[0] for loss in (counted, weighed)))


def test_value_and_loss_of_elementwise_are_differentiated_with_their_weights(backend):
    first, other, weight = columns(30, 3, torch.float64)
    weight[::4] = 0.0
    upstream = columns(30, 1, torch.float64, seed=5)[0]
    leaf = first.clone().requires_grad_()
    loss, value, _ = ops.elementwise("k2", leaf, [other], (), weight, backend)
    (got,) = torch.autograd.grad([loss, value], leaf, [torch.tensor(3.0, dtype=torch.float64), upstream])
    torch.testing.assert_close(got, torch.where(weight != 0, (3.0 * weight + upstream) * (first - other), 0.0))
