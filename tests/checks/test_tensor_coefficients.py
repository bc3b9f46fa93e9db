"""Coefficients that are tensors: on a device they are never read, so here the CPU is kept from reading them, too."""

import host_reads
import pytest
import torch
from linear_problems import gradients

import rlkernels as rlk
from rlkernels import tracing
from rlkernels.losses.preference_types import KINDS
from rlkernels.ops import columns, policy

draw = torch.Generator().manual_seed(0)
B, L, V, H = 4, 5, 7, 6
D = {
    "logp": -torch.rand(B, L, generator=draw) - 0.1,
    "entropy": torch.rand(B, L, generator=draw),
    "logits": torch.randn(B, L, V, generator=draw),
    "hidden": 0.3 * torch.randn(B, L, H, generator=draw),
    "head": torch.randn(V, H, generator=draw),
    "one": -9 * torch.rand(B, generator=draw) - 1,
    "two": -9 * torch.rand(B, generator=draw) - 1,
}
OLD = D["logp"] + 0.5 * torch.randn(B, L, generator=draw)
A, REF, MASK = torch.randn(B, L, generator=draw), OLD - 0.2, torch.rand(B, L, generator=draw) < 0.7
Y, N, GOOD = torch.randint(0, V, (B, L), generator=draw), torch.tensor([3, 1, 4, 2]), torch.tensor([1, 0, 1, 0])
F, G = D["one"] + 0.3, D["two"] - 0.4
LEVELS = ("token", "sequence", "sequence_token", "sequence_sum")
NUMBERS = {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": 1.5, "tau_pos": 1.1, "tau_neg": 0.9}
PARAMS = {
    "ppo_clip": ("clip_low", "clip_high"),
    "dual_clip": ("clip_low", "clip_high", "dual_clip"),
    "cispo": ("clip_low", "clip_high"),
    "sapo": ("tau_pos", "tau_neg"),
}


def terms(n):
    return {"kl_coef": n(0.3), "entropy_coef": n(-0.2), "ref_logprobs": REF}


def params(name, n):
    return {"objective": name, **{k: n(NUMBERS[k]) for k in PARAMS[name]}}


# Inputs with a gradient, and the call: n(0.3) is the number 0.3, or a tensor of it.
CALLS = {
    **{
        f"policy_loss {name} {level}": (
            ("logp", "entropy"),
            lambda d, n, name=name, level=level: rlk.policy_loss(
                d["logp"],
                OLD,
                A,
                MASK,
                entropy=d["entropy"],
                ratio_level=level,
                return_metrics=True,
                **terms(n),
                **params(name, n),
            ),
        )
        for name in PARAMS
        for level in LEVELS
    },
    **{
        f"logits_policy_loss {name} {level}": (
            ("logits",),
            lambda d, n, name=name, level=level: rlk.logits_policy_loss(
                d["logits"], Y, OLD - 1, A, MASK, ratio_level=level, return_metrics=True, **terms(n), **params(name, n)
            ),
        )
        for name in PARAMS
        for level in LEVELS
    },
    **{
        f"linear_policy_loss {name} {level}": (
            ("hidden", "head"),
            lambda d, n, name=name, level=level: rlk.linear_policy_loss(
                d["hidden"],
                d["head"],
                Y,
                OLD - 1,
                A,
                MASK,
                ratio_level=level,
                return_metrics=True,
                chunk_tokens=16,
                **terms(n),
                **params(name, n),
            ),
        )
        for name in PARAMS
        for level in LEVELS
    },
    "value_loss": (
        ("logp",),
        lambda d, n: rlk.value_loss(d["logp"], OLD, A, MASK, clip_range=n(0.4), return_metrics=True),
    ),
    "pairwise_reward_loss": (
        ("one", "two"),
        lambda d, n: rlk.pairwise_reward_loss(d["one"], d["two"], center_coef=n(0.2)),
    ),
    **{
        f"dpo_loss {name}": (
            ("one", "two"),
            lambda d, n, name=name: rlk.dpo_loss(
                d["one"],
                d["two"],
                F,
                G,
                loss_type=(name,),
                beta=n(0.3),
                loss_weights=(n(1.5),),
                chosen_lengths=N,
                rejected_lengths=N + 1,
                return_metrics=True,
                **{
                    k: n(x)
                    for k, x in {
                        "label_smoothing": 0.1,
                        "simpo_gamma": 0.4,
                        "alphapo_alpha": 0.3,
                        "discopop_tau": 0.2,
                        "cpo_alpha": 0.7,
                        "dpop_lambda": 5.0,
                        "rpo_eta": 0.6,
                    }.items()
                    if k in KINDS[name].takes
                },
                **({"gold_logps": F, "gold_lengths": N, "tpo_alpha": n(0.4)} if KINDS[name].gold else {}),
                **({"chosen_rewards": F, "rejected_rewards": G} if name == "rpo" else {}),
            ),
        )
        for name in KINDS
    },
    **{
        f"dpo_loss of alpha {alpha}": (
            ("one", "two"),
            lambda d, n, alpha=alpha: rlk.dpo_loss(
                d["one"], d["two"], F, G, f_divergence="alpha_divergence", alpha=n(alpha), beta=n(0.3)
            ),
        )
        for alpha in (0.0, 0.5, 1.0)
    },
    "dpo_loss of AlphaPO at 0": (
        ("one", "two"),
        lambda d, n: rlk.dpo_loss(
            d["one"], d["two"], loss_type="simpo", alphapo_alpha=n(0.0), chosen_lengths=N, rejected_lengths=N
        ),
    ),
    "linear_dpo_loss": (
        ("hidden", "head"),
        lambda d, n: rlk.linear_dpo_loss(
            d["hidden"],
            d["head"],
            Y,
            MASK,
            ref_chosen_logps=F[:2],
            ref_rejected_logps=G[:2],
            beta=n(0.3),
            label_smoothing=n(0.1),
        ),
    ),
    **{
        f"unpaired_preference_loss {name}": (
            ("one",),
            lambda d, n, name=name: rlk.unpaired_preference_loss(
                d["one"],
                F,
                GOOD,
                loss_type=name,
                beta=n(0.3),
                desirable_weight=n(1.5),
                undesirable_weight=n(0.0),
                return_metrics=True,
                **{"kto": {"kl": n(0.2)}, "bco": {"delta": n(0.1)}}.get(name, {}),
            ),
        )
        for name in ("kto", "apo_zero_unpaired", "bco", "kto_paired_batch")
    },
    "linear_unpaired_preference_loss": (
        ("hidden", "head"),
        lambda d, n: rlk.linear_unpaired_preference_loss(
            d["hidden"],
            d["head"],
            Y,
            F,
            GOOD,
            MASK,
            kl=n(0.2),
            beta=n(0.3),
            desirable_weight=n(1.5),
            undesirable_weight=n(0.5),
        ),
    ),
}


def results(name, n):
    leaves, call = CALLS[name]
    d = {**D, **{k: D[k].clone().requires_grad_() for k in leaves}}
    found = call(d, n)
    loss, metrics = found if isinstance(found, tuple) else (found, {})
    return [loss.detach(), *gradients(loss, [d[k] for k in leaves]), *metrics.values()]


@pytest.fixture
def unread(monkeypatch):
    """As on a device: no coefficient is read, and no kernel is given one."""
    host_reads.answer(monkeypatch, False)
    monkeypatch.setattr(tracing, "on_device", lambda x: isinstance(x, torch.Tensor))
    for module in (columns, policy):
        monkeypatch.setattr(module, "on_device", tracing.on_device)


@pytest.mark.fault(147)
@pytest.mark.parametrize("name", CALLS)
def test_a_tensor_counts_as_its_number(name, backend, monkeypatch, request):
    want = results(name, float)
    read = results(name, torch.tensor)  # a tensor on the CPU is free to read
    request.getfixturevalue("unread")
    found = results(name, torch.tensor)
    wide = results(name, lambda x: torch.tensor(x, dtype=torch.float64))
    for got in (read, found, wide):
        for x, expected in zip(got, want, strict=True):
            assert x.dtype == expected.dtype
            torch.testing.assert_close(x, expected, rtol=3e-6, atol=3e-7)


@pytest.mark.fault(147)
@pytest.mark.parametrize(
    "name",
    [
        "policy_loss ppo_clip token",
        "logits_policy_loss ppo_clip token",
        "linear_policy_loss ppo_clip token",
        "dpo_loss sigmoid",
    ],
)
def test_a_tensor_with_a_gradient_is_refused(name, unread):
    with pytest.raises(ValueError, match="gets no gradient; detach it"):
        results(name, lambda x: torch.tensor(x, requires_grad=True))


@pytest.mark.fault(147)
def test_the_next_coefficient_may_be_written_before_the_backward(unread, backend):
    coefficient, logp = torch.tensor(0.3), D["logp"].clone().requires_grad_()
    loss = rlk.policy_loss(logp, OLD, A, kl_coef=coefficient, ref_logprobs=REF)
    hidden, head = (D[k].clone().requires_grad_() for k in ("hidden", "head"))
    clip = torch.tensor(0.2)
    held = rlk.linear_policy_loss(hidden, head, Y, OLD - 1, A, kl_coef=coefficient, ref_logprobs=REF, clip_low=clip)
    coefficient.fill_(7.0), clip.fill_(0.9)
    want = rlk.policy_loss(logp, OLD, A, kl_coef=0.3, ref_logprobs=REF)
    torch.testing.assert_close(gradients(loss, [logp]), gradients(want, [logp]), rtol=3e-6, atol=1e-8)
    want = gradients(
        rlk.linear_policy_loss(hidden, head, Y, OLD - 1, A, kl_coef=0.3, ref_logprobs=REF, clip_low=0.2), (hidden, head)
    )
    for _ in range(2):  # the second one makes the gradients anew
        torch.testing.assert_close(
            list(torch.autograd.grad(held, (hidden, head), retain_graph=True)), want, rtol=3e-6, atol=1e-7
        )


@pytest.mark.fault(147)
def test_a_compiled_loss_takes_tensors_and_compiles_once():
    compilations = []

    def counted(graph, inputs):
        compilations.append(graph)
        return graph.forward

    @torch.compile(backend=counted, fullgraph=True)
    def step(logits, low, coefficient):
        return rlk.logits_policy_loss(
            logits, Y, OLD - 1, A, MASK, clip_low=low, kl_coef=coefficient, entropy_coef=coefficient, ref_logprobs=REF
        )

    for low, coefficient in ((0.1, 0.2), (0.3, 0.0), (0.05, -0.4)):
        want = rlk.logits_policy_loss(
            D["logits"],
            Y,
            OLD - 1,
            A,
            MASK,
            clip_low=low,
            kl_coef=coefficient,
            entropy_coef=coefficient,
            ref_logprobs=REF,
        )
        torch.testing.assert_close(
            step(D["logits"], torch.tensor(low), torch.tensor(coefficient)), want, rtol=2e-6, atol=1e-7
        )
    assert len(compilations) == 1
