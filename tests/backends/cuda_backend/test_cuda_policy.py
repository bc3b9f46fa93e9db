"""The one-launch policy loss on the CUDA backend, run on the CPU: against float64, against the two separate passes, for
every team of blocks.
"""

import math

import oracles
import pytest
import torch
from flat_backend import Flat
from reference import assert_gradient, draw_rows, gradient_allowance, same_bits, statistics
from row_calls import same

from rlkernels.objectives import OBJECTIVES, objective
from rlkernels.ops import policy

TEAMS = (-1, 1, 2, 4, 8)  # two sweeps over device memory; a row in the shared memory of so many blocks
PARAMS = {
    "ratio_cap": 1.1,
    "ratio_max": 1.5,
    "delta_low": 0.03,
    "delta_high": 0.02,
    "delta": 0.05,
    "clip_low": 0.2,
    "clip_high": 0.28,
    "dual_clip": 3.0,
    "tau_pos": 1.0,
    "tau_neg": 1.05,
    "beta": 0.3,
    "label_smoothing": 0.1,
    "clip_range": 0.2,
    "tau": 0.05,
    "alpha": 0.5,
}
NATIVE = [name for name, o in OBJECTIVES.items() if o.function.__module__.startswith("rlkernels.")]


def problem(vocab, dtype, *, rows=5, seed=0, masked=False):
    """Rows with old and reference log-probabilities near their own, and one row without any weight."""
    x, targets, mask = draw_rows((rows,), vocab, dtype, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    mask = mask if masked else None
    logp = statistics(x.double(), targets, 0.8, vocab_mask=mask)["logprobs"].float()
    near = [logp + 0.4 * torch.randn(rows, generator=generator) for _ in range(2)]
    columns = {
        "old_logp": near[0],
        "ref_logp": near[1],
        "rollout_logp": near[0] + 0.1,
        "advantage": torch.randn(rows, generator=generator),
        "returns": near[1],
        "old_value": near[0],
    }
    weight, entropy_weight, kl_weight = torch.rand(3, rows, generator=generator)
    for w in (weight, entropy_weight, kl_weight):
        w[-1] = 0.0
    return x, targets, mask, columns, weight, entropy_weight, kl_weight


def call(backend, name, case, *, kl="k3", with_grad=True, out=None, temperature=0.8):
    x, targets, mask, columns, weight, entropy_weight, kl_weight = case
    o = OBJECTIVES[name]
    return Flat(backend).fused_policy(
        name,
        x,
        targets,
        temperature,
        -100,
        mask,
        [columns[c] for c in o.columns[1:]],
        [PARAMS[p] for p in o.params],
        weight,
        entropy_weight,
        kl,
        columns["ref_logp"] if kl else None,
        kl_weight if kl else None,
        with_grad,
        out,
    )


def truth(name, case, kl="k3", temperature=0.8):
    """``(loss, dlogits, upstream gradients of logp and entropy)`` in float64 autograd, from the
    formulas of the papers.
    """
    x, targets, mask, columns, weight, entropy_weight, kl_weight = case
    leaf = x.double().requires_grad_()
    found = statistics(leaf, targets, temperature, vocab_mask=mask)
    logp, o = found["logprobs"], OBJECTIVES[name]
    wide = {k: v.double() for k, v in columns.items()}
    live = (targets != -100).double()
    term = getattr(oracles, name)(logp, *(wide[c] for c in o.columns[1:]), *(PARAMS[p] for p in o.params))
    value = weight.double() * live * term
    if kl:
        value = value + kl_weight.double() * live * getattr(oracles, kl)(logp, wide["ref_logp"])
    (dlogp,) = torch.autograd.grad(value.sum(), logp, retain_graph=True)
    loss = value.sum() - (entropy_weight.double() * live * found["entropy"]).sum()
    return loss.detach(), torch.autograd.grad(loss, leaf)[0], {"logprobs": dlogp, "entropy": entropy_weight}


# The row kernels compile no others in: of those of log-probabilities not kl_term, which has eight numbers.
@pytest.mark.parametrize("name", [n for n in NATIVE if OBJECTIVES[n].columns[0] == "logp" and n != "kl_term"])
def test_every_objective_matches_float64(backend, name):
    case = problem(1031, torch.float32, seed=len(name))
    loss, expected, upstream = truth(name, case)
    got = call(backend, name, case)
    terms = sum(abs(float(w)) for w in case[4]) + 1
    assert abs(float(got[0]) - float(loss)) <= 4e-6 * max(abs(float(loss)), terms)
    allowed = gradient_allowance(upstream, case[0], case[1], 0.8)  # and what 4 eps32 in a logp of 16 do to a ratio
    assert_gradient(got[1], expected, allowed + 8e-6 * expected.abs(), "dlogits")


@pytest.mark.parametrize("vocab", (1, 7, 1025, 20001))
@pytest.mark.parametrize("kl", [None, "k1", "k2", "k3"])
def test_the_policy_loss_with_entropy_bonus_and_penalty_matches_float64(backend, dtype, vocab, kl):
    case = problem(vocab, dtype, seed=vocab, masked=vocab > 1 and kl == "k3")
    loss, expected, upstream = truth("ppo_clip", case, kl)
    got = call(backend, "ppo_clip", case, kl=kl)
    assert abs(float(got[0]) - float(loss)) <= 1e-5 * max(1.0, abs(float(loss)))
    allowed = gradient_allowance(upstream, case[0], case[1], 0.8, vocab_mask=case[2])
    assert_gradient(got[1], expected, allowed + 8e-6 * expected.abs(), "dlogits")


# A column; a part of a batch of slots; whole batches alone; batches and a part of one; more batches than are in flight.
@pytest.mark.parametrize("vocab", (1, 1031, 8192, 20001, 33001))
def test_every_team_of_blocks_gives_the_bits_of_the_two_separate_passes(backend, host_module, dtype, vocab):
    case = problem(vocab, dtype, rows=3, seed=vocab, masked=vocab == 1031)
    x, targets, mask, _, _, entropy_weight, _ = case
    live = targets.clone()
    live[-1] = -100
    stats = Flat(backend).token_stats(x, live, 0.8, -100, mask, None, 1)
    first = None
    for team in TEAMS:
        host_module[0].choose(team)
        loss, dx, logp, shift, sum_exp, entropy, dlogp = got = call(backend, "ppo_clip", case)
        assert same((logp, shift, sum_exp, entropy), stats[:4]), team
        assert same_bits(
            dx,
            Flat(backend).token_stats_backward(
                dlogp, -entropy_weight, None, x, live, 0.8, -100, mask, None, *stats[1:4], None, None, None, None
            ),
        )
        first = first or got
        assert same(got, first), team


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [1, 13, 1033, 9001])
def test_a_gradient_rounded_as_it_is_stored_has_the_bits_of_one_rounded_afterwards(backend, host_module, vocab, narrow):
    case = problem(vocab, torch.float32, seed=vocab)
    x, targets = case[:2]
    place = torch.full((len(targets), vocab + 3), math.nan, dtype=narrow)
    for team in TEAMS:
        host_module[0].choose(team)
        wide, out = call(backend, "ppo_clip", case), place[:, :vocab]
        got = call(backend, "ppo_clip", case, out=out)
        assert same_bits(out, wide[1].to(narrow)) and same((*got[:1], *got[2:]), (*wide[:1], *wide[2:])), team
    _, _, logp, shift, total, entropy, dlogp = wide
    for upstream in ((dlogp, None, None), (dlogp, -case[5], None)):
        arguments = (*upstream, x, targets, 0.8, -100, None, None, shift, total, entropy, None, None, None)
        expected = Flat(backend).token_stats_backward(*arguments, None)
        assert same_bits(Flat(backend).token_stats_backward(*arguments, out.fill_(math.nan)), expected.to(narrow))
    assert place[:, vocab:].isnan().all()


def test_what_no_kernel_rounds_is_refused(backend):
    x, targets, _, _, weight, *_ = case = problem(13, torch.bfloat16)
    with pytest.raises(
        TypeError,
        match="the gradient goes to a Tensor of shape .* and dtype torch.float32 on cpu, "
        "expected .* torch.bfloat16 on cpu",
    ):
        call(backend, "ppo_clip", case, out=torch.empty(5, 13))
    x = x.float()
    _, shift, total, entropy, *_, ref_shift, ref_total, kl = Flat(backend).token_stats(
        x, targets, 0.8, -100, None, x.flip(0), 31
    )
    with pytest.raises(
        ValueError,
        match="token_stats_backward<float32 to bfloat16>: the gradient of a KL to other "
        "logits has the dtype of the logits",
    ):
        Flat(backend).token_stats_backward(
            weight,
            None,
            weight,
            x,
            targets,
            0.8,
            -100,
            None,
            x.flip(0),
            shift,
            total,
            entropy,
            ref_shift,
            ref_total,
            kl,
            torch.empty(5, 13, dtype=torch.bfloat16),
        )


@pytest.mark.fault(15, 53)
def test_no_alignment_and_no_company_changes_a_bit(backend, host_module):
    case = problem(4099, torch.bfloat16, rows=4, seed=3)
    for team in (-1, 1, 4):
        host_module[0].choose(team)
        together = call(backend, "cispo", case)
        parent = torch.full((4, 4200), math.nan, dtype=torch.bfloat16)
        moved = parent[:, 3:4102].copy_(case[0])
        assert same(call(backend, "cispo", (moved, *case[1:])), together)
        for r in range(4):
            x, targets, _, columns, *weights = case
            one = slice(r, r + 1)
            alone = call(
                backend,
                "cispo",
                (x[one], targets[one], None, {k: v[one] for k, v in columns.items()}, *(w[one] for w in weights)),
            )
            assert same(alone[1:], [t[r : r + 1] for t in together[1:]])


def test_without_a_gradient_the_loss_and_the_statistics_have_the_same_bits(backend, dtype):
    case = problem(2053, dtype, seed=5)
    with_it, without = call(backend, "ppo_clip", case), call(backend, "ppo_clip", case, with_grad=False)
    assert without[1].shape == (0, 0)
    assert same([without[0], *without[2:]], [with_it[0], *with_it[2:]])


@pytest.mark.fault(12, 26)
@pytest.mark.parametrize("team", TEAMS)
def test_rows_without_weight_are_not_read_and_their_gradient_is_zero(backend, host_module, team):
    host_module[0].choose(team)
    case = problem(1031, torch.bfloat16, seed=6)
    expected = call(backend, "ppo_clip", case)
    x, targets, _, columns, *_ = case
    x[2], x[-1] = math.nan, math.nan  # row 2 is ignored by its target, the last one by its weights
    assert targets[2] == -100
    for column in columns.values():
        column[2], column[-1] = math.nan, math.inf
    got = call(backend, "ppo_clip", case)
    assert same(got, expected)
    assert all((part[[2, -1]] == 0).all() for part in got[1:])


def test_a_term_of_weight_zero_is_left_out_though_its_column_is_nan(backend):
    case = problem(257, torch.float32, seed=7)
    _, _, _, columns, weight, entropy_weight, kl_weight = case
    weight[0], kl_weight[1], entropy_weight[3] = 0.0, 0.0, 0.0
    expected = call(backend, "ppo_clip", case)
    columns["old_logp"][0], columns["advantage"][0], columns["ref_logp"][1] = math.nan, math.inf, math.nan
    assert same(call(backend, "ppo_clip", case), expected)
    assert expected[0].isfinite()


@pytest.mark.parametrize("dead", [(4, 6), (4, 5), (5, 6)], ids=["entropy alone", "penalty alone", "objective alone"])
def test_a_row_lives_by_any_of_its_terms(backend, dead):
    case = problem(257, torch.float32, seed=7)
    for term in dead:  # weight, entropy_weight, kl_weight stand at 4, 5, 6
        case[term][0] = 0.0
    loss, expected, upstream = truth("ppo_clip", case)
    got = call(backend, "ppo_clip", case)
    assert abs(float(got[0]) - float(loss)) <= 1e-5 * max(1.0, abs(float(loss))) and got[1][0].any()
    assert_gradient(
        got[1], expected, gradient_allowance(upstream, case[0], case[1], 0.8) + 8e-6 * expected.abs(), "dlogits"
    )


@pytest.mark.fault(84)
def test_the_ratio_to_log_probabilities_of_the_other_kernel_is_exactly_one(backend, host_module):
    x, targets, _ = draw_rows((4,), 9001, torch.bfloat16, seed=8)
    targets = targets.clamp(min=0)
    old = Flat(backend).token_stats(x, targets, 1.0, -100, None, None, 0)[0]
    for team in TEAMS:
        host_module[0].choose(team)
        got = Flat(backend).fused_policy(
            "k2", x, targets, 1.0, -100, None, [old], [], torch.ones(4), None, None, None, None, True, None
        )
        assert float(got[0]) == 0.0 and (got[1] == 0).all() and (got[6] == 0).all()


@pytest.mark.parametrize("team", TEAMS)
def test_in_place_the_gradient_has_the_bits_of_a_fresh_one(backend, host_module, dtype, team):
    host_module[0].choose(team)
    case = problem(2053, dtype, rows=4, seed=9, masked=True)
    fresh = call(backend, "dual_clip", case)
    parent = torch.full((2, 3, 2060), math.nan, dtype=dtype)
    x = parent[:, :2, :2053]
    x.copy_(case[0].view(2, 2, -1))
    got = call(backend, "dual_clip", (x, *case[1:]), out=x)
    assert same([got[0], *got[2:]], [fresh[0], *fresh[2:]])
    assert same_bits(x.reshape(4, -1), fresh[1])
    x.fill_(math.nan)
    assert parent.isnan().all()


@pytest.mark.fault(2)
@pytest.mark.parametrize("team", (-1, 1, 4))
def test_a_target_outside_the_vocabulary_is_nan_in_its_row_alone(backend, host_module, team):
    host_module[0].choose(team)
    case = problem(300, torch.float32, rows=4, seed=10)
    case[1][1] = 300
    _, dx, logp, *_ = call(backend, "reinforce", case)
    assert logp[1].isnan() and dx[1].isnan().all()
    assert logp[[0, 3]].isfinite().all() and dx[[0, 3]].isfinite().all()


def test_a_target_outside_the_mask_gets_no_gradient_of_the_objective(backend):
    case = problem(300, torch.float32, rows=4, seed=11, masked=True)
    x, targets, mask, _, weight, _, _ = case
    targets[1], mask[1, 5] = 5, False
    got = Flat(backend).fused_policy(
        "reinforce", x, targets, 0.8, -100, mask, [torch.ones(4)], [], weight, None, None, None, None, True, None
    )
    assert (got[1][1] == 0).all() and (got[1][0] != 0).any()


def test_many_rows_are_summed_in_their_order_whichever_block_comes_last(backend, host_module):
    host_module[0].choose(1)
    x, targets, _ = draw_rows((140,), 5, torch.float32, seed=12)  # more rows than threads that add them
    weight = torch.rand(140, generator=torch.Generator().manual_seed(1)) * 10.0 ** torch.arange(140).remainder(7)
    losses = []
    for order in ("forward", "reverse", "random:1"):
        host_module[1](order)
        losses.append(
            Flat(backend).fused_policy(
                "reinforce",
                x,
                targets,
                1.0,
                -100,
                None,
                [torch.ones(140)],
                [],
                weight,
                None,
                None,
                None,
                None,
                True,
                None,
            )[0]
        )
    assert same_bits(losses[0], losses[1]) and same_bits(losses[0], losses[2])
    expected = -(weight.double() * statistics(x.double(), targets)["logprobs"]).sum()
    assert abs(float(losses[0]) - float(expected)) <= 2e-6 * abs(float(expected))


def test_a_users_objective_runs_through_the_two_native_passes(backend):
    @objective
    def steep_for_cuda(logp, advantage, beta):
        r"""``-beta A logp``. A test."""
        return -beta * advantage * logp, -beta * advantage

    try:
        case = problem(1031, torch.float32, seed=13)
        x, targets, _, columns, weight, *_ = case
        got = Flat(backend).fused_policy(
            "steep_for_cuda",
            x,
            targets,
            0.8,
            -100,
            None,
            [columns["advantage"]],
            [2.0],
            weight,
            None,
            None,
            None,
            None,
            True,
            None,
        )
        twice = Flat(backend).fused_policy(
            "reinforce",
            x,
            targets,
            0.8,
            -100,
            None,
            [2 * columns["advantage"]],
            [],
            weight,
            None,
            None,
            None,
            None,
            True,
            None,
        )
        assert same(got[1:], twice[1:])
    finally:
        del OBJECTIVES["steep_for_cuda"]


@pytest.mark.fault(31, 84)
def test_the_gradient_of_the_forward_meets_any_upstream_gradient_without_the_host(public, dtype, monkeypatch):
    monkeypatch.setattr(policy, "known_to_be_one", lambda x: False)  # as on a device: the kernel reads it
    x, targets, _, columns, *_ = problem(1031, dtype, seed=14)
    leaf = x.requires_grad_()

    def loss(logits, inplace):
        return public.logits_policy_loss(
            logits, targets, columns["old_logp"], columns["advantage"], entropy_coef=0.1, inplace_backward=inplace
        )

    for g in (1.0, 2.0**16, -0.5, 0.0):
        g, copy = torch.tensor(g), (leaf.detach() * 1).requires_grad_()
        (expected,) = torch.autograd.grad(loss(copy * 1, True), copy, g)
        output = loss(leaf, False)
        for _ in range(3):
            (got,) = torch.autograd.grad(output, leaf, g, retain_graph=True)
            assert same_bits(got, expected)
            got.fill_(math.nan)


@pytest.mark.fault(11)
def test_no_rows_give_a_loss_of_zero(backend):
    none, targets = torch.empty(0), torch.empty(0, dtype=torch.long)
    got = Flat(backend).fused_policy(
        "reinforce", torch.empty(0, 37), targets, 1.0, -100, None, [none], [], none, None, None, None, None, True, None
    )
    assert float(got[0]) == 0.0 and got[1].shape == (0, 37)
