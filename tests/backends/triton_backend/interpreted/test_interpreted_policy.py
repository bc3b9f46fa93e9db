"""The one-pass policy loss of every registered objective, and of a user's own, against float64 autograd over the
oracles.
"""

import oracles
import pytest
import torch
from flat_backend import Flat
from problems import NAN, PARAMS, policy_problem, policy_truth
from reference import assert_gradient, same_bits

from rlkernels.backends.triton import launch as kernels
from rlkernels.objectives import OBJECTIVES, objective

POLICIES = [
    name for name, entry in OBJECTIVES.items() if entry.columns[0] == "logp" and "ref_logp" not in entry.columns
]
TERMS = {
    "alone": (False, None),
    "k1": (False, "k1"),
    "k2": (True, "k2"),
    "k3 and entropy": (True, "k3"),
    "entropy": (True, None),
}


@objective
def squared_gap(logp, old_logp, advantage, beta):
    r"""A user's own: ``-(A logp - beta/2 (logp - old_logp)^2)``."""
    gap = logp - old_logp
    return 0.5 * beta * gap * gap - advantage * logp, beta * gap - advantage


def squared_gap_oracle(logp, old_logp, advantage, beta):
    return -(advantage * logp - beta / 2 * (logp - old_logp).square())


def run(name, x, targets, temperature, mask, c, entropy, kl, with_grad=True, out=None, ignore_index=-100):
    entry = OBJECTIVES[name]
    return Flat(kernels).fused_policy(
        name,
        x,
        targets,
        temperature,
        ignore_index,
        mask,
        [c[n] for n in entry.columns[1:]],
        [PARAMS[p] for p in entry.params],
        c["weight"],
        c["entropy_weight"] if entropy else None,
        kl,
        c["ref_logp"] if kl else None,
        c["kl_weight"] if kl else None,
        with_grad,
        out,
    )


def check(name, x, targets, temperature, mask, c, entropy, kl):
    entry = OBJECTIVES[name]
    oracle = squared_gap_oracle if name == "squared_gap" else getattr(oracles, name)
    params = [PARAMS[p] for p in entry.params]
    loss, gradient, allowed = policy_truth(
        oracle, entry.columns[1:], x, targets, temperature, mask, c, params, entropy, kl
    )
    got = run(name, x, targets, temperature, mask, c, entropy, kl)
    torch.testing.assert_close(got[0].double(), loss, rtol=2e-6, atol=4e-6)
    assert_gradient(got[1], gradient, allowed, name)
    return got


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize("name", [*POLICIES, "squared_gap"])
def test_every_objective_with_every_term_equals_its_oracle(name, terms, small_tiles):
    x, targets, mask, c = policy_problem(69, torch.bfloat16 if terms in ("k1", "k3 and entropy") else torch.float32)
    check(name, x, targets, 0.7, mask if terms in ("k2", "k3 and entropy") else None, c, *TERMS[terms])


# Two tiles of 32 are loaded ahead: nothing whole, one and a part, exactly two, two and one, two and a part.
@pytest.mark.fault(4)
@pytest.mark.parametrize("vocab", [1, 7, 33, 64, 96, 101])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_policy_loss_holds_its_bounds_at_every_vocabulary_size(vocab, dtype, small_tiles):
    x, targets, _, c = policy_problem(vocab, dtype, seed=vocab)
    temperature = torch.tensor([1.0, 0.7, 3.0, 1.0, 0.5, 1.3])
    check("ppo_clip", x, targets, temperature, None, c, True, "k3")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_and_statistics_have_the_bits_of_the_two_kernels(dtype, small_tiles):
    x, targets, mask, c = policy_problem(101, dtype)
    mask = mask.clone()
    mask[1].scatter_(0, targets[1:2], False)  # a target outside the support moves nothing
    _, gradient, logp, shift, total, entropy, dlogp = run("ppo_clip", x, targets, 0.7, mask, c, True, "k3")
    stats = Flat(kernels).token_stats(x, targets, 0.7, -100, mask, None, 1)
    live = (targets != -100) & ((c["weight"] != 0) | (c["entropy_weight"] != 0) | (c["kl_weight"] != 0))
    assert live.sum() == 4
    for got, want in zip((logp, shift, total, entropy), stats[:4], strict=True):
        assert same_bits(got[live], want[live]) and not got[~live].any()
    again = Flat(kernels).token_stats_backward(
        dlogp,
        -torch.where(live, c["entropy_weight"], 0.0),
        None,
        x,
        torch.where(live, targets, -100),
        0.7,
        -100,
        mask,
        None,
        shift,
        total,
        entropy,
        None,
        None,
        None,
        None,
    )
    assert same_bits(gradient, again)
    in_place = x.clone()
    assert run("ppo_clip", in_place, targets, 0.7, mask, c, True, "k3", out=in_place)[1] is in_place and same_bits(
        in_place, gradient
    )
    without = run("ppo_clip", x, targets, 0.7, mask, c, True, "k3", with_grad=False)
    assert without[1].shape == (0, 0)
    assert all(
        same_bits(a, b)
        for k, (a, b) in enumerate(zip(without, run("ppo_clip", x, targets, 0.7, mask, c, True, "k3"), strict=True))
        if k != 1
    )


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, 33, 101])
def test_a_gradient_rounded_as_it_is_stored_has_the_bits_of_one_rounded_afterwards(vocab, narrow, small_tiles):
    x, targets, _, c = policy_problem(vocab, torch.float32, seed=vocab)
    # Between the gradients of other chunks, which wait for the same product.
    rows = len(targets)
    place = torch.full((3 * rows, vocab + 3), NAN, dtype=narrow)
    wide, out = run("ppo_clip", x, targets, 0.7, None, c, True, "k3"), place[rows : 2 * rows, :vocab]
    got = run("ppo_clip", x, targets, 0.7, None, c, True, "k3", out=out)
    assert same_bits(out, wide[1].to(narrow))
    assert all(same_bits(a, b) for a, b in zip((got[0], *got[2:]), (wide[0], *wide[2:]), strict=True))
    _, _, _, shift, total, entropy, dlogp = wide
    arguments = (
        dlogp,
        -c["entropy_weight"],
        None,
        x,
        targets,
        0.7,
        -100,
        None,
        None,
        shift,
        total,
        entropy,
        None,
        None,
        None,
    )
    expected = Flat(kernels).token_stats_backward(*arguments, None)
    assert same_bits(Flat(kernels).token_stats_backward(*arguments, out.fill_(NAN)), expected.to(narrow))
    assert place[:, vocab:].isnan().all() and place[:rows].isnan().all() and place[2 * rows :].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_the_gradient_kernel_writes_nothing_where_unless_is_exactly_1(dtype, small_tiles):
    x, targets, mask, c = policy_problem(101, dtype)
    stats, upstream = (
        Flat(kernels).token_stats(x, targets, 0.7, -100, mask, None, 1),
        (c["weight"], c["entropy_weight"], None),
    )

    def run_with(out, unless):
        return Flat(kernels).token_stats_backward(
            *upstream, x, targets, 0.7, -100, mask, None, *stats[1:4], None, None, None, out, unless
        )

    expected, before = run_with(None, None), torch.full_like(x, 7.0)
    for unless in (1.0, 2.0**16, -0.5, 0.0, 1.0 + 2.0**-23, NAN):
        pair = torch.tensor([NAN, unless], dtype=stats[0].dtype)
        out = run_with(before.clone(), pair[1])  # no multiple of 16 bytes from an allocation
        assert same_bits(out, before if unless == 1.0 else expected), unless


@pytest.mark.fault(12, 26, 93)
def test_dead_rows_full_of_nan_change_nothing_and_get_zeros(small_tiles):
    x, targets, mask, c = policy_problem(69)
    clean = run("dual_clip", x, targets, 0.7, mask, c, True, "k3")
    dead = (targets == -100) | ((c["weight"] == 0) & (c["entropy_weight"] == 0) & (c["kl_weight"] == 0))
    assert dead.sum() == 2
    x[dead] = NAN
    for name in ("old_logp", "advantage", "ref_logp"):
        c[name][dead] = NAN
    # A term of weight 0 is excluded by branch: what belongs to it alone may be anything.
    c["advantage"][0] = NAN
    c["ref_logp"][2 if not dead[2] else 4] = NAN
    got = run("dual_clip", x, targets, 0.7, mask, c, True, "k3")
    assert all(same_bits(a, b) for a, b in zip(got, clean, strict=True))
    assert not got[1][dead].any()


@pytest.mark.fault(25)
@pytest.mark.parametrize("name", POLICIES)
def test_ratios_that_overflow_give_no_nan(name, small_tiles):
    x, targets, _, c = policy_problem(33, rows=8)
    gap = torch.tensor([20.0, 88.0, 200.0, 1e4, -20.0, -88.0, -200.0, -1e4])
    targets[2] = 3
    c |= {"old_logp": torch.gather(x.log_softmax(-1), 1, targets[:, None])[:, 0] - gap, "weight": torch.ones(8)}
    for sign in (1.0, -1.0, 0.0):
        got = run(name, x, targets, 1.0, None, {**c, "advantage": torch.full((8,), sign)}, False, None)
        assert not got[0].isnan() and not got[1].isnan().any(), (name, sign)


def test_a_clipped_token_is_not_swept_again_and_gets_zeros(small_tiles):
    x, targets, _, c = policy_problem(69)
    # Every ratio is far above the upper bound.
    c |= {"old_logp": c["old_logp"] - 5, "advantage": torch.ones(6), "weight": torch.ones(6)}
    gradient = run("ppo_clip", x, targets, 0.7, None, c, False, None)[1]
    assert same_bits(gradient, torch.zeros(6, 69))


@pytest.mark.fault(2)
def test_a_label_outside_the_vocabulary_makes_its_row_nan_and_reads_no_neighbour(small_tiles, monkeypatch):
    # Values of labels are read on the CPU only: here as on a GPU.
    monkeypatch.setattr(kernels, "check_rows", lambda *_: None)
    x, targets, _, c = policy_problem(69)
    targets[:] = torch.tensor([5, 69, 74, -1, 3, 2**31 - 1])
    c["weight"][:] = 0.5
    bad = torch.tensor([False, True, True, True, False, True])
    parent = torch.full((6, 80), NAN)  # label 69 falls into the gap behind the row, which the interpreter guards
    x = parent[:, :69].copy_(x)
    stats = Flat(kernels).token_stats(x, targets, 0.7, -100, None, x.flip(0).contiguous(), 31)
    gradient = Flat(kernels).token_stats_backward(
        *[torch.full((6,), 0.3) for _ in range(3)],
        x,
        targets,
        0.7,
        -100,
        None,
        x.flip(0).contiguous(),
        *stats[1:4],
        *stats[8:11],
        None,
    )
    fused = run("ppo_clip", x, targets, 0.7, None, c, True, "k3")
    masked = run("ppo_clip", x, targets, 0.7, torch.ones(6, 69, dtype=torch.bool), c, True, "k3")
    for name, rows in {
        "logp": stats[0],
        "entropy": stats[3],
        "kl": stats[10],
        "gradient": gradient,
        "fused": fused[1],
        "fused logp": fused[2],
        "with a mask": masked[1],
    }.items():
        assert rows[bad].isnan().all() and rows[~bad].isfinite().all(), name
    assert not stats[6][bad].any()
