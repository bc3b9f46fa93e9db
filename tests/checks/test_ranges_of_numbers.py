"""Faults at the ends of what arguments may be: F136, temperatures; F144, no rows at all and an ignored id that int32
cannot hold.
"""

import math

import pytest
import torch
from packed_calls import HIDDEN, LOGITS, OLD, TARGETS, VALUES, WEIGHT

import rlkernels as rlk

# F136 -----------------------------------------------------------------------------------------------------------------

COLDEST, HOTTEST = 2.0**-40, 2.0**40
TAKE = {
    "token_logprobs": lambda t, x=LOGITS: rlk.token_logprobs(x, TARGETS, temperature=t),
    "token_stats": lambda t, x=LOGITS: rlk.token_stats(x, TARGETS, temperature=t),
    "logits_policy_loss": lambda t, x=LOGITS: rlk.logits_policy_loss(x, TARGETS, OLD, VALUES, temperature=t),
    "sft_loss": lambda t, x=LOGITS: rlk.sft_loss(x, TARGETS, temperature=t),
    "linear_token_logprobs": lambda t, h=HIDDEN: rlk.linear_token_logprobs(
        h, WEIGHT.to(h.dtype), TARGETS, temperature=t
    ),
    "linear_token_stats": lambda t, h=HIDDEN: rlk.linear_token_stats(h, WEIGHT.to(h.dtype), TARGETS, temperature=t),
    "linear_policy_loss": lambda t, h=HIDDEN: rlk.linear_policy_loss(
        h, WEIGHT.to(h.dtype), TARGETS, OLD, VALUES, temperature=t
    ),
    "linear_sft_loss": lambda t, h=HIDDEN: rlk.linear_sft_loss(h, WEIGHT.to(h.dtype), TARGETS, temperature=t),
    "linear_dpo_loss": lambda t, h=HIDDEN: rlk.linear_dpo_loss(
        h, WEIGHT.to(h.dtype), TARGETS, cu_seqlens=[0, 4, 8], reference_free=True, temperature=t
    ),
}


@pytest.mark.fault(136)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", TAKE)
def test_a_temperature_that_fp32_cannot_divide_by_is_refused(name, dtype, backend):
    operand = (HIDDEN if name.startswith("linear") else LOGITS).to(dtype)
    for bad in (1e-300, 1e-50, 1e-40, 1e-20, COLDEST * 0.99, HOTTEST * 1.01, 1e36, 1e38, 1e300, 5e-324):
        with pytest.raises(
            ValueError,
            match=rf"^{name}: temperature must be from 2\*\*-40 \(9.1e-13\) to 2\*\*40 "
            r"\(1.1e12\), got ",
        ):
            TAKE[name](bad, operand)
        for tensor in {torch.float64, operand.dtype} if dtype == torch.float64 else {torch.float32}:
            temperature = torch.tensor([1.0, 1.0, 1.0, bad, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64).to(tensor)
            with pytest.raises(
                ValueError,
                match=r"temperature must be positive and finite, got .* at row 3; it may be "
                r"from 2\*\*-40 to 2\*\*40",
            ):
                TAKE[name](temperature, operand)
    for good in (COLDEST, 1e-12, 1e12, HOTTEST):
        TAKE[name](good, operand)
        TAKE[name](torch.full((8,), good, dtype=torch.float32), operand)


def truth(x, targets, t, a, b):
    """Log-probabilities, entropies and the gradient of ``a logp + b H``, in float64."""
    leaf = x.double().requires_grad_()
    logs = (leaf / t).log_softmax(-1)
    p = logs.exp()
    logp, entropy = logs.gather(1, targets[:, None])[:, 0], -torch.where(p == 0, 0.0, p * logs).sum(-1)
    (gradient,) = torch.autograd.grad((a * logp + b * entropy).sum(), leaf)
    return logp.detach(), entropy.detach(), gradient


@pytest.mark.fault(136)
@pytest.mark.parametrize("per_row", [False, True], ids=["a number", "a tensor"])
@pytest.mark.parametrize("t", [COLDEST, 1e-12, 1e-8, 1e-4, 1e4, 1e8, 1e12, HOTTEST])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_at_every_temperature_that_is_taken_the_numbers_are_right(dtype, t, per_row, backend):
    draw = torch.Generator().manual_seed(1)
    x = (torch.randn(6, 69, generator=draw) * 5).to(dtype)
    x[4], x[5] = 1.5, x[5] * 1000  # equal logits, and far ones
    targets = torch.randint(0, 69, (6,), generator=draw)
    targets[1] = x[1].argmax()
    a, b = torch.rand(6, generator=draw).to(torch.float64 if dtype == torch.float64 else torch.float32) + 0.5, 0.25
    want = truth(x, targets, t, a.double(), b)
    leaf = x.clone().requires_grad_()
    temperature = torch.full((6,), t, dtype=a.dtype) if per_row else t
    stats = rlk.token_stats(leaf, targets, temperature=temperature)
    (gradient,) = torch.autograd.grad((a * stats.logprobs + b * stats.entropy).sum(), leaf)
    # A row's gradient is of the size of 1/T.
    scale = want[2].abs().amax().item()
    for got, right in zip((stats.logprobs, stats.entropy), want, strict=False):
        torch.testing.assert_close(got.double(), right, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        gradient.double() / scale, want[2] / scale, rtol=5e-3 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
    )
    assert math.isfinite(scale) and (scale > 0 or t > 1)


@pytest.mark.fault(136)
@pytest.mark.parametrize("t", [COLDEST, HOTTEST])
def test_a_head_is_right_at_both_ends(t, backend):
    logits = HIDDEN.double() @ WEIGHT.double().T
    want = (logits / t).log_softmax(-1).gather(1, TARGETS[:, None])[:, 0]
    torch.testing.assert_close(
        rlk.linear_token_logprobs(HIDDEN, WEIGHT, TARGETS, temperature=t).double(), want, rtol=1e-5, atol=1e-6
    )


# F144 -----------------------------------------------------------------------------------------------------------------

EMPTY = [(2, 3, 0, 5), (2, 0, 3, 5), (0, 3, 4, 5), (2, 3, 4, 0, 5), (2, 0, 5), (0, 4, 5), (0, 5)]


@pytest.mark.fault(144)
@pytest.mark.parametrize("inplace", [False, True], ids=["a new gradient", "in place"])
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_logits_without_rows_have_empty_results_and_an_empty_gradient(shape, inplace, backend):
    targets, column = torch.zeros(shape[:-1], dtype=torch.int64), torch.zeros(shape[:-1])
    mask, given = torch.ones(shape, dtype=torch.bool), {"inplace_backward": inplace}
    calls = {
        "token_logprobs": lambda x: rlk.token_logprobs(x, targets, **given),
        "token_stats": lambda x: (
            rlk.token_stats(
                x, targets, temperature=column + 1, vocab_mask=mask, ref_logits=x.detach(), kl="exact", **given
            ).kl
        ),
        "logits_policy_loss": lambda x: rlk.logits_policy_loss(
            x, targets, column, column, entropy_coef=0.1, return_metrics=True, **given
        )[0],
        "sft_loss": lambda x: rlk.sft_loss(x, targets, **given),
    }
    for name, call in calls.items():
        leaf = torch.randn(shape, requires_grad=True)
        result = call(leaf * 1)
        assert result.shape == (() if name.endswith("loss") else shape[:-1]) and not result.sum().item()
        (gradient,) = torch.autograd.grad(result.sum(), leaf)
        assert gradient.shape == shape


ODD = [((0, 4, 5), (1, 1, 1)), ((4, 0, 5), (5, 5, 0)), ((0, 5), (0, 0)), ((4, 0, 5), (1, 1, 1)), ((0, 5), (5, 0))]


@pytest.mark.fault(144)
@pytest.mark.parametrize("shape, strides", ODD, ids=str)
def test_without_rows_no_layout_overlaps(shape, strides, backend):
    leaf = torch.randn(100, requires_grad=True)
    x = (leaf * 1).as_strided(shape, strides)
    rlk.token_logprobs(x, torch.zeros(shape[:-1], dtype=torch.int64), inplace_backward=True).sum().backward()
    assert leaf.grad.shape == (100,) and not leaf.grad.any()


Y32, MASK = TARGETS.int(), torch.tensor([1, 0, 1, 1, 0, 1, 1, 1])
IGNORING = {
    "token_logprobs": lambda y, i: rlk.token_logprobs(LOGITS, y, ignore_index=i),
    "token_stats": lambda y, i: rlk.token_stats(LOGITS, y, ignore_index=i).entropy,
    "logits_policy_loss": lambda y, i: rlk.logits_policy_loss(LOGITS, y, OLD, VALUES, MASK, ignore_index=i),
    "logits_policy_loss of sequences": lambda y, i: rlk.logits_policy_loss(
        LOGITS, y, OLD, VALUES, MASK, ignore_index=i, cu_seqlens=[0, 5, 8], ratio_level="sequence"
    ),
    "sft_loss": lambda y, i: rlk.sft_loss(LOGITS, y, MASK, ignore_index=i),
    "linear_token_logprobs": lambda y, i: rlk.linear_token_logprobs(HIDDEN, WEIGHT, y, ignore_index=i),
    "linear_token_stats": lambda y, i: rlk.linear_token_stats(HIDDEN, WEIGHT, y, ignore_index=i).entropy,
    "linear_policy_loss": lambda y, i: rlk.linear_policy_loss(HIDDEN, WEIGHT, y, OLD, VALUES, MASK, ignore_index=i),
    "linear_sft_loss": lambda y, i: rlk.linear_sft_loss(HIDDEN, WEIGHT, y, MASK, ignore_index=i),
    "linear_dpo_loss": lambda y, i: rlk.linear_dpo_loss(
        HIDDEN, WEIGHT, y, MASK, cu_seqlens=[0, 5, 8], reference_free=True, ignore_index=i
    ),
    "linear_unpaired_preference_loss": lambda y, i: rlk.linear_unpaired_preference_loss(
        HIDDEN, WEIGHT, y, torch.zeros(2), torch.ones(2), MASK, cu_seqlens=[0, 5, 8], kl=0.0, ignore_index=i
    ),
}


@pytest.mark.fault(144)
@pytest.mark.parametrize("name", IGNORING)
def test_an_ignored_id_that_int32_cannot_hold_is_never_met(name, backend):
    want = IGNORING[name](TARGETS, -100)
    for index in (2**31, -(2**31) - 1, 2**40, 2**32 + int(TARGETS[0]), 2**63 - 1, -(2**63)):
        for y in (Y32, TARGETS):
            assert torch.equal(IGNORING[name](y, index), want)
    for index in (2**63, -(2**63) - 1, 2**70):
        with pytest.raises(
            ValueError, match=f"^{name.split(' ')[0]}: ignore_index must be a 64-bit integer, got {index}"
        ):
            IGNORING[name](Y32, index)


@pytest.mark.fault(144)
@pytest.mark.parametrize("name", ["token_logprobs", "linear_policy_loss", "linear_sft_loss", "linear_dpo_loss"])
def test_so_it_is_in_a_compiled_program(name):
    torch._dynamo.reset()
    run = torch.compile(lambda y: IGNORING[name](y, 2**40), backend="eager", fullgraph=True)
    torch.testing.assert_close(run(Y32), IGNORING[name](TARGETS, -100))


@pytest.mark.fault(144)
def test_an_ignored_id_beyond_int32_is_met_in_targets_that_hold_it(backend):
    targets = TARGETS.clone()
    targets[2] = 2**40
    for name in ("token_logprobs", "linear_token_logprobs"):
        got = IGNORING[name](targets, 2**40)
        assert got[2] == 0 and torch.equal(got[3:], IGNORING[name](TARGETS, -100)[3:])
