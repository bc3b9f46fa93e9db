"""Log-ratios of whole sequences are small differences of large sums: they keep their digits, whatever the length."""

import host_reads
import pytest
import torch
from linear_problems import PARAMS, gradients, objective_of

import rlkernels as rlk

LONG = 32768
LEVELS = ("sequence", "sequence_token", "sequence_sum")
OBJECTIVES = ("ppo_clip", "dual_clip", "cispo", "sapo")


def long_sequences(length=LONG, seed=0):
    """Two answers of ``length`` tokens; the policy 3e-5 away from where it sampled: the ratio of a sum is 1.1."""
    draw = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(2, length, generator=draw)
    logp = old + 3e-5 * (2 * torch.rand(2, length, generator=draw) - 0.9)
    return logp, old, torch.tensor([0.7, -1.3])


def truth(name, level, logp, old, A):
    """By hand in float64, in autograd: the mean over sequences of the mean over tokens, or of the one loss."""
    losses = []
    for x, o, a in zip(logp, old.double(), A.double(), strict=True):
        if level == "sequence_sum":
            losses.append(objective_of(name, x.sum()[None], o.sum()[None], a[None]))
        elif level == "sequence":
            losses.append(objective_of(name, x.mean()[None], o.mean()[None], a[None]))
        else:
            losses.append(objective_of(name, x, x.detach() - (x.detach() - o).mean(), a.expand_as(x)).mean()[None])
    return torch.cat(losses).mean()


def near(got, want, what):
    scale = want.abs().max()
    error = ((got.double() - want).abs().max() / scale).item()
    assert error <= 2e-6, f"{what}: {error:.3g} relative"


@pytest.mark.fault(126)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_ratio_of_a_long_sequence_keeps_its_digits(name, level, backend):
    logp, old, A = long_sequences()
    for packed in (False, True):
        leaf, wide = logp.clone().requires_grad_(), logp.double().requires_grad_()
        shape, more = ((-1,), {"cu_seqlens": torch.tensor([0, LONG, 2 * LONG])}) if packed else (logp.shape, {})
        loss = rlk.policy_loss(
            leaf.view(shape),
            old.view(shape),
            A,
            ratio_level=level,
            objective=name,
            aggregation="seq-mean",
            **more,
            **PARAMS[name],
        )
        want = truth(name, level, wide, old, A)
        assert loss.dtype == torch.float32
        near(loss.detach(), want.detach(), f"loss of {name}")
        near(torch.autograd.grad(loss, leaf)[0], torch.autograd.grad(want, wide)[0], f"gradient of {name}")


@pytest.mark.fault(126)
@pytest.mark.parametrize("level", LEVELS)
def test_ratios_keep_their_digits_where_log_probabilities_are_far_below_zero(level, backend):
    """One fp32 rounding of a mean of -60 moves a ratio by 2e-6."""
    logp, old, A = long_sequences(64)
    old = (20 * old).contiguous()
    logp = old + 1e-4 * (logp / logp.abs().max() + 0.8)
    want = truth("ppo_clip", level, logp.double(), old, A)
    near(rlk.policy_loss(logp, old, A, ratio_level=level, aggregation="seq-mean", **PARAMS["ppo_clip"]), want, level)


@pytest.mark.fault(126)
@pytest.mark.parametrize("level", LEVELS)
def test_ratios_from_logits_and_from_a_head_keep_their_digits(level, backend):
    """The log-probabilities are fp32 numbers there: the truth takes those that the library returns for
    the same rows.
    """
    draw = torch.Generator().manual_seed(1)
    L, V, H = 4096, 5, 4
    hidden, head, targets = (
        torch.randn(2, L, H, generator=draw),
        torch.randn(V, H, generator=draw),
        torch.randint(0, V, (2, L), generator=draw),
    )
    A, noise = torch.tensor([0.7, -1.3]), 2e-4 * (2 * torch.rand(2, L, generator=draw) - 0.8)
    options = {"ratio_level": level, "objective": "ppo_clip", "aggregation": "seq-mean", **PARAMS["ppo_clip"]}
    for seen, loss in (
        (
            rlk.token_logprobs(hidden @ head.T, targets),
            lambda old: rlk.logits_policy_loss(hidden @ head.T, targets, old, A, **options),
        ),
        (
            rlk.linear_token_logprobs(hidden, head, targets),
            lambda old: rlk.linear_policy_loss(hidden, head, targets, old, A, chunk_tokens=2 * L, **options),
        ),
    ):
        old = seen + noise
        near(loss(old), truth("ppo_clip", level, seen.double(), old, A), level)


def preference_problem(length=4096):
    """One pair whose answers have log-probabilities of about -7000, 0.02 away from the reference's, which is known in
    float64.
    """
    draw = torch.Generator().manual_seed(2)
    hidden, head = torch.randn(2, length, 4, generator=draw), torch.randn(5, 4, generator=draw)
    targets = torch.randint(0, 5, (2, length), generator=draw)
    sums = rlk.linear_token_logprobs(hidden, head, targets).double().sum(-1)
    return hidden, head, targets, sums, sums + torch.tensor([0.0213, -0.0171], dtype=torch.float64)


@pytest.mark.fault(126)
def test_sums_of_answers_stay_wide_beside_a_wide_reference(backend):
    hidden, head, targets, sums, refs = preference_problem()
    want = -torch.nn.functional.logsigmoid(5.0 * ((sums[0] - refs[0]) - (sums[1] - refs[1])))
    for chunk in (16, 4 * 4096):
        loss, metrics = rlk.linear_dpo_loss(
            hidden,
            head,
            targets,
            ref_chosen_logps=refs[:1],
            ref_rejected_logps=refs[1:],
            beta=5.0,
            chunk_tokens=chunk,
            return_metrics=True,
        )
        assert loss.dtype == torch.float32 and all(x.dtype == torch.float32 for x in metrics.values())
        near(loss, want, "pair")
        near(metrics["reward_margin"], 5.0 * ((sums[0] - refs[0]) - (sums[1] - refs[1])), "margin")
    good = torch.tensor([True, False])
    want = torch.stack([torch.sigmoid(-5.0 * (sums[0] - refs[0])), torch.sigmoid(5.0 * (sums[1] - refs[1]))]).mean()
    near(
        rlk.linear_unpaired_preference_loss(hidden, head, targets, refs, good, loss_type="apo_zero_unpaired", beta=5.0),
        want,
        "answers",
    )


@pytest.mark.fault(126)
def test_a_float64_reference_is_not_rounded_beside_float32_log_probabilities(backend):
    C, R = torch.tensor([-7000.0, -6500.5]), torch.tensor([-6900.25, -6400.0])
    f, g = C.double() + 1e-4, R.double() - 3e-4
    c, r = (x.clone().requires_grad_() for x in (C, R))
    loss = rlk.dpo_loss(c, r, f, g, beta=10.0)
    m = 10.0 * ((C - f) - (R - g))
    assert loss.dtype == torch.float64
    near(loss.detach(), -torch.nn.functional.logsigmoid(m).mean(), "pairs")
    near(torch.autograd.grad(loss, c)[0], -10.0 * torch.sigmoid(-m) / 2, "gradient")
    near(
        rlk.unpaired_preference_loss(C, f, torch.tensor([1, 0]), loss_type="bco", delta=0.0, beta=1e3),
        -torch.nn.functional.logsigmoid(1e3 * torch.stack([C[0] - f[0], f[1] - C[1]])).mean(),
        "answers",
    )


@pytest.mark.fault(126)
def test_the_head_s_gradient_of_a_long_sequence_keeps_its_digits(backend):
    """float64 hidden states: the way through the sums is the one that float32 takes."""
    draw = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, 64, 4, generator=draw, dtype=torch.float64, requires_grad=True)
    head, targets = (
        torch.randn(5, 4, generator=draw, dtype=torch.float64, requires_grad=True),
        torch.randint(0, 5, (2, 64), generator=draw),
    )
    logp = (hidden @ head.T).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    old, A = (logp + 1e-3 * torch.randn(2, 64, generator=draw)).detach(), torch.tensor([0.7, -1.3], dtype=torch.float64)
    want = gradients(truth("ppo_clip", "sequence_sum", logp, old, A), (hidden, head))
    loss = rlk.linear_policy_loss(hidden, head, targets, old, A, ratio_level="sequence_sum", **PARAMS["ppo_clip"])
    for got, expected in zip(gradients(loss, (hidden, head)), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_a_factor_that_is_a_float32_tensor_does_not_round_the_weights(monkeypatch):
    host_reads.answer(monkeypatch, False)  # as on a device
    for name in ("dp_size", "scale"):
        got = rlk.token_weights(
            torch.ones(1, 3), "token-mean", batch_num_tokens=3, dtype=torch.float64, **{name: torch.tensor(2.0)}
        )
        assert (got - 2 / 3).abs().max() < 1e-15


def test_the_metric_of_an_entropy_in_16_bits_is_a_mean_in_32():
    entropy = torch.rand(4, 33, generator=torch.Generator().manual_seed(0)).bfloat16()
    z = torch.zeros(4, 33)
    _, metrics = rlk.policy_loss(z, z, z, entropy=entropy, return_metrics=True)
    assert metrics["entropy"].dtype == torch.float32
    assert abs(metrics["entropy"].item() / entropy.double().mean().item() - 1) < 1e-6
