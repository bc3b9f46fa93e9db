"""Numbers of the head: temperatures per token and sequence, what dead tokens hold, the ends of softcap, scale and
chunk, and what a wrong one is told.
"""

import numpy
import pytest
import torch
from linear_problems import B, L, V, leaves, live_of, own, problem, rows
from reference import same_bits

import rlkernels as rlk

D = problem()
LOSSES = {
    "linear_policy_loss": lambda d, h, w, **o: rlk.linear_policy_loss(
        h, w, d["targets"], d["old"], d["advantages"], d["mask"], entropy_coef=0.1, **o
    ),
    "linear_policy_loss of sequences": lambda d, h, w, **o: rlk.linear_policy_loss(
        h, w, d["targets"], d["old"], d["advantages"], d["mask"], ratio_level="sequence", **o
    ),
    "linear_sft_loss": lambda d, h, w, **o: rlk.linear_sft_loss(h, w, d["targets"], d["mask"], **o),
    "linear_dpo_loss": lambda d, h, w, **o: rlk.linear_dpo_loss(
        h[:2],
        w,
        d["targets"][:2],
        d["mask"][:2],
        ref_chosen_logps=d["old"][:1, 0],
        ref_rejected_logps=d["old"][1:2, 0],
        **{k: x[:2] if k == "temperature" and isinstance(x, torch.Tensor) and x.dim() else x for k, x in o.items()},
    ),
    "linear_unpaired_preference_loss": lambda d, h, w, **o: rlk.linear_unpaired_preference_loss(
        h, w, d["targets"], d["old"][:, 0], d["mask"][:, 1], d["mask"], kl=0.1, **o
    ),
}


def stats_loss(d, h, w, **options):
    stats = rlk.linear_token_stats(h, w, d["targets"], **options)
    return (stats.logprobs * d["advantages"] + stats.entropy).sum()


EVERY = {**LOSSES, "linear_token_stats": stats_loss}
LOGITS = {
    "token_stats": lambda d, z, **o: (lambda s: (s.logprobs * d["advantages"] + s.entropy).sum())(
        rlk.token_stats(z, d["targets"], **o)
    ),
    "logits_policy_loss": lambda d, z, **o: rlk.logits_policy_loss(
        z, d["targets"], d["old"], d["advantages"], d["mask"], **o
    ),
    "sft_loss": lambda d, z, **o: rlk.sft_loss(z, d["targets"], d["mask"], **o),
}


def results(name, d=D, **options):
    """Value and gradients of a function over hidden states, or over logits."""
    if name in LOGITS:
        operands = [(d["hidden"] @ d["weight"].t()).requires_grad_()]
        loss = LOGITS[name](d, *operands, **options)
    else:
        operands = own(d, bias=False)[:2]
        loss = EVERY[name](d, *operands, **options)
    return loss.detach(), *torch.autograd.grad(loss, operands)


def assert_same(got, expected):
    for x, y in zip(got, expected, strict=True):
        assert same_bits(x, y)


@pytest.mark.fault(147)
@pytest.mark.parametrize("name", [*EVERY, *LOGITS])
def test_a_temperature_per_sequence_is_that_of_its_tokens_and_one_of_a_0_dimensional_tensor_is_that_of_all(
    name, backend
):
    of_sequences = torch.tensor([0.7, 1.3, 0.9])
    expected = results(name, temperature=of_sequences[:, None].expand(B, L).contiguous())
    for temperature in (of_sequences, of_sequences[:, None], of_sequences.double(), torch._neg_view(-of_sequences)):
        assert_same(results(name, temperature=temperature), expected)
    expected = results(name, temperature=0.75)
    for temperature in (
        torch.tensor(0.75),
        torch.tensor(0.75, dtype=torch.float64),
        numpy.float32(0.75),
        numpy.float64(0.75),
    ):
        assert_same(results(name, temperature=temperature), expected)


@pytest.mark.fault(147)
def test_in_a_square_batch_a_vector_of_temperatures_is_one_per_sequence(backend):
    d = problem(shape=(L, L))
    t = torch.linspace(0.5, 2.0, L)
    for name in ("linear_token_stats", "token_stats"):
        assert_same(results(name, d, temperature=t), results(name, d, temperature=t[:, None].expand(L, L).contiguous()))
    hidden, weight = leaves(d, bias=False)[:2]
    truth, _ = rows(d, (hidden, weight, None), temperature=t[:, None].expand(L, L))
    torch.testing.assert_close(
        rlk.linear_token_logprobs(d["hidden"], d["weight"], d["targets"], temperature=t).double(),
        truth,
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.fault(147)
@pytest.mark.parametrize("name", ["linear_token_stats", "token_stats", "linear_sft_loss"])
def test_other_shapes_of_temperatures_are_refused_by_name(name):
    for shape in ((L,), (1, L), (B, L, 1), (1,), (1, 1), (B + 1,)):
        said = r"temperature has shape .*, expected \(3, 7\), or \(3,\) or \(3, 1\): one for each sequence; or a number"
        with pytest.raises(ValueError, match=f"^{name}: {said}"):
            results(name, temperature=torch.ones(shape))
    with pytest.raises(ValueError, match="temperature gets no gradient; detach it"):
        results(name, temperature=torch.ones(B, requires_grad=True))
    with pytest.raises(ValueError, match="temperature must be positive and finite, got 0.0"):
        results(name, temperature=torch.tensor(0.0))


@pytest.mark.fault(147)
@pytest.mark.parametrize("name", EVERY)
def test_a_compiled_call_takes_temperatures_per_sequence_and_of_all(name):
    def call(temperature):
        return EVERY[name](D, D["hidden"], D["weight"], temperature=temperature)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for temperature in (torch.tensor([0.7, 1.3, 0.9]), torch.tensor(0.8)):
        torch.testing.assert_close(compiled(temperature), call(temperature), rtol=1e-5, atol=1e-6)


@pytest.mark.fault(128)
@pytest.mark.parametrize("bound", [None, 21])
@pytest.mark.parametrize("name", EVERY)
def test_what_a_dead_token_has_for_target_and_temperature_changes_nothing(name, bound, backend):
    dead = ~live_of(D) if name in LOSSES else D["targets"] == -100
    options = {"max_live_tokens": bound, "temperature": D["temperature"]}
    expected = results(name, **options)
    for target, temperature in (
        (-200, 0.0),
        (V + 100, float("nan")),
        (-(2**31), -1.0),
        (2**40, float("inf")),
        (-100, 1e-30),
    ):
        d = {**D, "targets": D["targets"].clone()}
        if name in LOSSES:
            d["targets"][~D["mask"]] = target
        assert_same(
            results(name, d, **{**options, "temperature": D["temperature"].masked_fill(dead, temperature)}), expected
        )
    for temperature in (0.0, float("nan"), -1.0, 1e-30):  # of a live token it is said which
        wrong = D["temperature"].clone()
        wrong[0, 0] = temperature
        with pytest.raises(
            ValueError,
            match=rf"^{name.split(' ')[0]}: temperature must be positive and finite, got .* "
            r"at row 0",
        ):
            results(name, **{**options, "temperature": wrong})


@pytest.mark.fault(148)
@pytest.mark.parametrize("name", EVERY)
def test_a_target_outside_the_vocabulary_is_named_with_the_function_and_its_row(name):
    d = {**D, "targets": D["targets"].clone()}
    d["targets"][1, 0] = V
    with pytest.raises(IndexError, match=rf"^{name.split(' ')[0]}: target {V} at row {L} is outside \[0, {V}\)$"):
        results(name, d)


@pytest.mark.fault(148)
def test_a_compiled_call_names_the_function_too():
    targets = D["targets"].clone()
    targets[1, 0] = V
    compiled = torch.compile(lambda h, w: rlk.linear_token_logprobs(h, w, targets), fullgraph=True, backend="aot_eager")
    with pytest.raises(IndexError, match=rf"^linear_token_logprobs: target {V} at row {L} is outside"):
        compiled(D["hidden"], D["weight"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "softcap,logit_scale",
    [
        (2.0**-40, 1.0),
        (2.0**40, 1.0),
        (1e-6, 1.0),
        (1e6, 1.0),
        (None, 2.0**-40),
        (None, 1e-6),
        (None, 0.0),
        (None, 1e3),
        (30.0, 2.0**40),
        (30.0, -2.0),
        (None, -(2.0**-40)),
    ],
)
def test_extreme_softcaps_and_scales_give_right_numbers(softcap, logit_scale, dtype, backend):
    d = problem(dtype)
    hidden, weight = own(d, bias=False)[:2]
    wide = leaves(d, bias=False)[:2]
    stats = rlk.linear_token_stats(hidden, weight, d["targets"], softcap=softcap, logit_scale=logit_scale)
    logp, entropy = rows(d, (*wide, None), softcap=softcap, logit_scale=logit_scale)
    exact = dtype == torch.float64
    # A logit of fp32 errs by a few 1e-7 of itself; the log-probability by as much.
    size = 1.0 if softcap is not None and softcap < 100 else max(1.0, abs(logit_scale) * 30)
    torch.testing.assert_close(
        stats.logprobs.double(), logp, rtol=1e-12 if exact else 1e-5, atol=(1e-13 if exact else 4e-7) * size
    )
    torch.testing.assert_close(
        stats.entropy.double(), entropy, rtol=1e-11 if exact else 1e-4, atol=(1e-12 if exact else 1e-6) * size
    )
    if abs(logit_scale) > 100:  # where one column has everything, gradients are differences of rounding errors
        return
    got, truth = (
        torch.autograd.grad((x * d["advantages"]).sum(), y)
        for x, y in ((stats.logprobs, (hidden, weight)), (logp, wide))
    )
    for g, t in zip(got, truth, strict=True):
        once = (t.to(g.dtype).double() - t).norm()
        assert (g.double() - t).norm() <= (1e-10 if exact else 2e-5) * t.norm() + 1.05 * once


@pytest.mark.parametrize("name", ["linear_token_logprobs", "linear_policy_loss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_softcaps_and_scales_that_fp32_cannot_hold_are_refused(name, dtype):
    d = problem(dtype)
    more = (d["old"], d["advantages"]) if name == "linear_policy_loss" else ()

    def call(**options):
        return getattr(rlk, name)(d["hidden"], d["weight"], d["targets"], *more, **options)

    for bad in (1e-300, 5e-324, 1e-45, 1e-40, 1e-20, 1e20, 1e39, 1e300):
        with pytest.raises(
            ValueError,
            match=rf"^{name}: softcap must be from 2\*\*-40 .* got .*; None is as good as "
            r"its limit",
        ):
            call(softcap=bad)
        for sign in (1, -1):
            with pytest.raises(
                ValueError,
                match=rf"^{name}: logit_scale must be from 2\*\*-40 .* got .*; 0 is as good "
                r"as its limit",
            ):
                call(logit_scale=sign * bad)


@pytest.mark.parametrize("name", EVERY)
def test_chunks_and_budgets_of_any_size_give_the_same_numbers(name, backend):
    expected = results(name)
    for options in (
        {"chunk_tokens": 2**62},
        {"chunk_tokens": 2**63 - 1},
        {"chunk_tokens": 1},
        {"logits_budget": 1},
        {"logits_budget": 2**62},
        {"max_live_tokens": 2**62},
        {"max_live_tokens": 2**62, "chunk_tokens": 2**62},
        {"chunk_tokens": numpy.int64(3)},
    ):
        for x, y in zip(results(name, **options), expected, strict=True):
            torch.testing.assert_close(x, y, rtol=2e-6, atol=1e-6)


@pytest.mark.fault(141)
def test_no_traced_path_asks_whether_autocast_is_available(monkeypatch):
    """torch 2.8 and 2.11 cannot trace the question; the later ones can, so that only this shows it."""

    def asked(kind):
        raise AssertionError("torch.amp.is_autocast_available was called")

    monkeypatch.setattr(torch.amp, "is_autocast_available", asked)
    for name in EVERY:
        torch._dynamo.reset()
        compiled = torch.compile(lambda h, w, name=name: EVERY[name](D, h, w), fullgraph=True, backend="eager")
        torch.testing.assert_close(
            compiled(D["hidden"], D["weight"]), EVERY[name](D, D["hidden"], D["weight"]), rtol=1e-5, atol=1e-6
        )
