"""F37, F145: a tangent that an argument carries arrives in the results, or there is an error that says so.

So it is with what torch.func does.
"""

import pytest
import torch
from public_calls import CALLS, TRAINED, arguments, data, tensor_arguments, tensors
from torch.autograd import forward_ad

import rlkernels as rlk

STEP = 2.0**-20


def results(name, d, change):
    with arguments(lambda _, argument, x: change(argument, x)):
        return [x for x in tensors(CALLS[name](d)) if x.is_floating_point()]


def directions(argument, x):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(len(argument)), dtype=x.dtype)


@pytest.mark.fault(145)
@pytest.mark.parametrize("name", CALLS)
def test_every_argument_with_a_tangent_moves_the_results_as_it_should_or_is_refused(name, backend):
    d = {k: v.double() if v.is_floating_point() else v for k, v in data().items()}
    floating = [a for a in tensor_arguments(name, d) if a[1].is_floating_point()]
    for argument, x in floating:
        direction = directions(argument, x)

        def moved(step, argument=argument, direction=direction):
            return results(name, d, lambda key, z: z + step * direction if key == argument else z)

        with forward_ad.dual_level():
            try:
                found = [
                    forward_ad.unpack_dual(x).tangent
                    for x in results(
                        name, d, lambda key, z, a=argument, v=direction: forward_ad.make_dual(z, v) if key == a else z
                    )
                ]
            except NotImplementedError as error:  # torch's own
                assert "forward AD" in str(error), (argument, error)
                continue
            except RuntimeError as error:
                assert str(error).startswith(
                    f"{name.split(' ')[0]}: forward-mode AD is not supported by rlkernels; use reverse mode"
                ), (argument, error)
                continue
        for k, (tangent, ahead, behind) in enumerate(zip(found, moved(STEP), moved(-STEP), strict=True)):
            slope = (ahead.double() - behind.double()) / (2 * STEP)
            tangent = torch.zeros_like(slope) if tangent is None else tangent.double()
            torch.testing.assert_close(
                tangent, slope, rtol=1e-5, atol=1e-7, msg=lambda m, a=argument, k=k: f"{a} of {name}, result {k}: {m}"
            )


@pytest.mark.fault(145)
@pytest.mark.parametrize("name", ["policy_loss of weights", "gae", "dpo_loss", "sft_loss"])
def test_an_argument_without_a_tangent_is_welcome_inside_of_a_level(name, backend):
    expected = results(name, data(), lambda key, x: x)
    with forward_ad.dual_level():
        got = results(name, data(), lambda key, x: x)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.fault(145)
def test_jvp_of_a_secondary_argument_is_refused():
    z = torch.zeros(2, 3)
    for function in (
        lambda x: rlk.policy_loss(z, x, z),
        lambda x: rlk.policy_loss(z, z, x),
        lambda x: rlk.value_loss(z, None, x),
        lambda x: rlk.token_logprobs(torch.zeros(2, 3, 5), z.long(), temperature=x + 1),
        lambda x: rlk.gae(x, z)[0],
    ):
        with pytest.raises(RuntimeError, match="forward-mode AD is not supported"):
            torch.func.jvp(function, (z,), (z + 1,))


TORCHS_OWN = (
    "vmap",
    "Batching rule not implemented",
    "doesn't have storage",
    "function being transformed",
    "broadcast shape",
)


@pytest.mark.fault(148)
@pytest.mark.parametrize("name", CALLS)
def test_torch_func_grad_is_right_or_refused_by_the_functions_name(name, backend):
    d = data()
    leaves = {k: v.clone().requires_grad_() if k in TRAINED else v for k, v in d.items()}
    trained = [argument for argument, x in tensor_arguments(name, leaves) if x.is_floating_point()]
    for argument in trained:

        def total(x, argument=argument):
            found = results(name, d, lambda key, z: x if key == argument else z)
            return sum((y.sum() for y in found), 0.0 * x.sum())  # a selection alone has no number to sum

        x = next(x for a, x in tensor_arguments(name, d) if a == argument)
        try:
            got = torch.func.grad(total)(x)
        except (RuntimeError, ValueError) as error:
            assert str(error).startswith(f"{name.split(' ')[0]}: "), (argument, error)
            continue
        leaf = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(total(leaf), leaf)
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", CALLS)
def test_vmap_is_right_or_torchs_own_error(name, backend):
    d = data()
    for argument, x in tensor_arguments(name, d):

        def one(x, argument=argument):
            with arguments(lambda _, key, z: x if key == argument else z):
                return tuple(tensors(CALLS[name](d)))

        both = torch.stack([x, x.flip(0) if x.dim() and argument not in ("cu_seqlens", "spans") else x])
        try:
            got = torch.func.vmap(one)(both)
        except RuntimeError as error:
            assert any(words in str(error) for words in TORCHS_OWN), (argument, error)
            continue
        for a, b in zip(got, zip(*map(one, both), strict=True), strict=True):
            torch.testing.assert_close(a, torch.stack(b), rtol=1e-6, atol=1e-7, equal_nan=True)
