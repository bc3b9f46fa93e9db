"""The losses on the device: every objective from logits and over columns, the pair losses and the scan, against
float64.
"""

import gpu_support as gpu
import oracles
import pytest
import reference
import torch
import weighted_losses
from torch.nn.functional import logsigmoid

import rlkernels
from rlkernels import ops
from rlkernels.objectives import OBJECTIVES
from rlkernels.ops import policy

both = pytest.mark.parametrize("backend", gpu.BACKENDS, indirect=True)
every_dtype = pytest.mark.parametrize("dtype", gpu.DTYPES, ids=str)
KL, ENTROPY = 0.04, 0.01


def close(got, expected, scale=1.0, rtol=2e-6):
    error = (got.detach().double() - expected).abs().max().item()
    assert error <= rtol * max(scale, 1e-30), f"error {error:.3g}, allowed {rtol * scale:.3g}"


def options(objective):
    return {p: gpu.PARAMS[p] for p in OBJECTIVES[objective].params}


def run(backend, x, targets, columns, objective, inplace=False, **rest):
    leaf = x.clone().requires_grad_()
    with gpu.using(backend):
        loss = rlkernels.logits_policy_loss(
            leaf * 1 if inplace else leaf,
            targets,
            columns["old"],
            columns["advantage"],
            columns["mask"],
            objective=objective,
            inplace_backward=inplace,
            **rest,
            **options(objective),
        )
    (grad,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), grad


@both
@every_dtype
@pytest.mark.parametrize("objective", gpu.POLICIES)
def test_every_objective_from_logits_equals_its_oracle(backend, objective, dtype):
    x, targets, _ = gpu.rows((2, 6), 1030, dtype, seed=1)
    columns = gpu.policy_inputs(x, targets)
    loss, grad = run(backend, x, targets, columns, objective)
    expected, dlogits, allowed, size = gpu.policy_truth(objective, x, targets, columns)
    close(loss, expected, size, 2e-5)
    reference.assert_gradient(grad, dlogits, allowed, objective)


@both
@every_dtype
@pytest.mark.parametrize("kl", ("k1", "k2", "k3"))
@pytest.mark.parametrize("vocab", (7, 32000, 151936, 262144))
def test_policy_loss_with_kl_and_entropy_equals_its_oracle(backend, vocab, kl, dtype):
    if vocab > 151936 and kl != "k3":
        pytest.skip("the widest rows are judged with one estimator")
    x, targets, _ = gpu.rows((6,), vocab, dtype, seed=2)
    columns = gpu.policy_inputs(x, targets, 0.8)
    rest = {"kl": kl, "kl_coef": KL, "entropy_coef": ENTROPY, "temperature": 0.8}
    loss, grad = run(backend, x, targets, columns, "ppo_clip", ref_logprobs=columns["ref"], **rest)
    expected, dlogits, allowed, size = gpu.policy_truth("ppo_clip", x, targets, columns, **rest)
    close(loss, expected, size + 1.0, 2e-5)
    reference.assert_gradient(grad, dlogits, allowed, kl)


@both
@every_dtype
@pytest.mark.parametrize("vocab", (37, 4099, 151936))
def test_in_place_gives_the_bits_of_a_new_gradient(backend, vocab, dtype):
    x, targets, _ = gpu.rows((6,), vocab, dtype, seed=3)
    columns = gpu.policy_inputs(x, targets)
    fresh = run(backend, x, targets, columns, "ppo_clip", ref_logprobs=columns["ref"], kl_coef=KL, entropy_coef=ENTROPY)
    placed = run(
        backend, x, targets, columns, "ppo_clip", True, ref_logprobs=columns["ref"], kl_coef=KL, entropy_coef=ENTROPY
    )
    assert gpu.bits(fresh[0], placed[0]) and gpu.bits(fresh[1], placed[1])


@both
@every_dtype
@pytest.mark.parametrize("vocab", (37, 32000, 151936))
def test_the_gradient_made_in_the_forward_has_the_bits_of_the_two_pass_one(backend, vocab, dtype):
    x, targets, _ = gpu.rows((6,), vocab, dtype, seed=4)
    columns, one = gpu.policy_inputs(x, targets, 0.9), ops.number(0.9)
    weight = torch.full((6,), 1 / 6, device=gpu.DEVICE)
    bonus, penalty = weight * ENTROPY, weight * KL
    arguments = (
        "ppo_clip",
        x,
        targets,
        one,
        -100,
        None,
        [columns["old"], columns["advantage"]],
        ops.numbers((0.2, 0.28)),
        weight,
        bonus,
        "k3",
        columns["ref"],
        penalty,
    )
    with torch.no_grad():
        loss, dlogits, _, shift, total, entropy, dlogp = ops.fused_policy_op(*arguments, True, False, backend)
        loss_alone, *rest = ops.fused_policy_op(*arguments, False, False, backend)
        live = targets != -100
        passes = ops.token_stats_backward(
            dlogp,
            torch.where(live, -bonus, 0.0),
            None,
            x,
            targets,
            one,
            -100,
            None,
            None,
            shift,
            total,
            entropy,
            None,
            None,
            None,
            backend,
        )
    assert gpu.bits(loss, loss_alone)
    assert gpu.bits(dlogits.view(x.shape), passes)


@pytest.mark.parametrize("backend", gpu.BACKENDS[-1:], indirect=True)
@every_dtype
@pytest.mark.parametrize("masked", (False, True), ids=("all columns", "masked"))
@pytest.mark.parametrize("vocab", (1025, 33333))
def test_a_row_kept_by_any_number_of_blocks_or_read_twice_has_the_same_bits(backend, vocab, masked, dtype):
    x, targets, mask = gpu.rows((6,), vocab, dtype, seed=13)
    columns, weight = gpu.policy_inputs(x, targets, 0.9), torch.full((6,), 1 / 6, device=gpu.DEVICE)
    arguments = (targets, ops.number(0.9), -100, mask if masked else None, [columns["old"], columns["advantage"]])
    arguments += (ops.numbers((0.2, 0.28)), weight, weight * ENTROPY, "k3", columns["ref"], weight * KL)
    first = None
    for blocks in gpu.TEAMS:
        with torch.no_grad(), gpu.team(blocks):
            got = ops.fused_policy_op("ppo_clip", x, *arguments, True, False, backend)
            placed = ops.fused_policy_op("ppo_clip", x.clone(), *arguments, True, True, backend)
        first = first or got
        assert got[1].isfinite().all() and got[1].any()
        for other in (got, placed):
            assert gpu.bits(other[0], first[0]) and gpu.bits(other[1].view_as(first[1]), first[1]), blocks


UPSTREAM = (1.0, 2.0**16, -0.5, 0.0)


def held(x, targets, columns, inplace=False):
    """A loss whose gradient is made in the forward; in place none is."""
    leaf = x.clone().requires_grad_()
    loss = rlkernels.logits_policy_loss(
        leaf * 1 if inplace else leaf,
        targets,
        columns["old"],
        columns["advantage"],
        columns["mask"],
        temperature=0.9,
        entropy_coef=ENTROPY,
        inplace_backward=inplace,
    )
    return loss, leaf


@pytest.mark.fault(31, 34, 84)
@both
@every_dtype
@pytest.mark.parametrize("vocab", (37, 32000, 151936))
def test_the_gradient_of_the_forward_meets_any_upstream_gradient_in_one_launch(backend, vocab, dtype, monkeypatch):
    if gpu.REHEARSAL:
        monkeypatch.setattr(policy, "known_to_be_one", lambda x: False)  # the way of a device
    x, targets, _ = gpu.rows((6,), vocab, dtype, seed=11)
    columns = gpu.policy_inputs(x, targets, 0.9)
    with gpu.using(backend):
        for g in (torch.tensor(g, device=gpu.DEVICE) for g in UPSTREAM):
            placed, placed_leaf = held(x, targets, columns, inplace=True)
            (expected,) = torch.autograd.grad(placed, placed_leaf, g)
            before = ops.calls()
            loss, leaf = held(x, targets, columns)
            given = []
            with gpu.hidden_syncs_raise():
                for _ in range(3):  # retained: the second and third are made anew, in tensors of their own
                    given.append(torch.autograd.grad(loss, leaf, g, retain_graph=True)[0])
            assert ops.calls() - before == {("fused_policy", backend): 1, ("token_stats_backward", backend): 3}
            assert len({got.data_ptr() for got in given}) == 3
            assert all(gpu.bits(got, expected) for got in given), g.item()
            assert g == 0 or expected.any()


@pytest.mark.fault(84)
@both
def test_a_loss_scale_reaches_fp16_before_the_rounding(backend):
    x, targets, _ = gpu.rows((6,), 4099, torch.float16, seed=12)
    weights = torch.full((6,), 1e-7, device=gpu.DEVICE)
    leaf = x.clone().requires_grad_()
    with gpu.using(backend):
        loss = rlkernels.logits_policy_loss(
            leaf, targets, None, torch.ones(6, device=gpu.DEVICE), objective="reinforce", weights=weights
        )
        (got,) = torch.autograd.grad(loss, leaf, torch.tensor(2.0**16, device=gpu.DEVICE))
    wide = x.double().requires_grad_()
    (want,) = torch.autograd.grad(
        -(2.0**16 * 1e-7) * reference.statistics(wide, targets)["logprobs"][targets != -100].sum(), wide
    )
    torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=6e-8)
    assert want.abs().max() < 0.1 and got.any()


@both
@pytest.mark.parametrize("n", (1, 1023, 1025, 64 * 2048, 300_001))
@pytest.mark.parametrize("objective", sorted(n for n in OBJECTIVES if hasattr(oracles, n)))
def test_every_objective_over_columns_equals_its_oracle(backend, objective, n):
    entry = OBJECTIVES[objective]
    known = {**gpu.PARAMS, "clip_range": 0.2, "beta": 0.5, "label_smoothing": 0.1}
    params = [known[p] for p in entry.params]
    columns = [gpu.noise(n, seed=k) * 0.5 for k, _ in enumerate(entry.columns)]
    if objective == "log_odds":
        columns[0] = -columns[0].abs() - 0.1  # the logarithm of a probability, with digits left in 1 - p
    weight = torch.where(gpu.noise(n, seed=9) > -1, gpu.noise(n, seed=8).abs() / n, 0.0)
    loss, value, derivative = ops.elementwise(objective, columns[0], columns[1:], ops.numbers(params), weight, backend)
    wide = [c.double() for c in columns]
    wide[0].requires_grad_()
    expected = getattr(oracles, objective)(*wide, *params)
    (slope,) = torch.autograd.grad(expected.sum(), wide[0])
    live = weight != 0
    torch.testing.assert_close(value.double(), torch.where(live, expected.detach(), 0.0), rtol=4e-6, atol=2e-6)
    torch.testing.assert_close(derivative.double(), torch.where(live, slope, 0.0), rtol=4e-6, atol=2e-6)
    close(
        loss,
        (weight.double() * expected.detach()).sum(),
        (weight.double() * expected.detach()).abs().sum().item(),
        4e-6,
    )


@both
@pytest.mark.parametrize("n", (1, 1025, 300_001))
@pytest.mark.parametrize(("objective", "taken", "kind"), weighted_losses.CASES)
def test_a_weighted_loss_and_its_slopes_are_the_definition(backend, objective, taken, kind, n):
    def run(name, first, minus, others, params, weight, total, share):
        def there(x):
            return None if x is None else x.to(gpu.DEVICE)

        given = [there(x) for x in (first, *(minus + [None, None])[:2])], [there(x) for x in others]
        loss, slopes = ops.weighted_loss(
            name, *given[0], given[1], tuple(params), there(weight), there(total), share, backend
        )
        return loss.cpu(), slopes.cpu()

    weighted_losses.check(run, objective, taken, kind, n)


@both
@pytest.mark.parametrize("pairs", (1, 7, 4096, 100_003))
def test_pair_losses_equal_logsigmoid_in_float64(backend, pairs):
    a, b, c, d = (10 * gpu.noise(pairs, seed=k) for k in range(4))
    leaves = [x.clone().requires_grad_() for x in (a, b)]
    wide = [x.double().requires_grad_() for x in (a, b)]
    with gpu.using(backend):
        pair = rlkernels.pairwise_reward_loss(*leaves)
        dpo = rlkernels.dpo_loss(*leaves, c, d, beta=0.3)
    truths = (-logsigmoid(wide[0] - wide[1]).mean(), -logsigmoid(0.3 * ((wide[0] - c) - (wide[1] - d))).mean())
    for got, expected in zip((pair, dpo), truths, strict=True):
        close(got, expected.detach(), expected.item())
        for x, y in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(expected, wide), strict=True):
            torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-6 / pairs)


@pytest.mark.fault(24)
@both
def test_the_pair_loss_is_finite_far_from_zero(backend):
    gap = torch.tensor([-1e4, -1000.0, -90.0, 20.0, 1e4], device=gpu.DEVICE)
    with gpu.using(backend):
        each = [rlkernels.pairwise_reward_loss(g.view(1), torch.zeros(1, device=gpu.DEVICE)).item() for g in gap]
    assert each[:3] == [1e4, 1000.0, 90.0] and each[4] == 0.0
    assert abs(each[3] - 2.0611536e-9) < 1e-15


@both
@pytest.mark.parametrize("masked", ("skip", "zero", "none"))
@pytest.mark.parametrize("shape", ((1, 1), (3, 7), (5, 1023), (64, 4096), (300, 131)))
def test_gae_equals_the_recurrence_in_float64(backend, shape, masked):
    r, v, chance = (gpu.noise(*shape, seed=k) for k in range(3))
    mask = chance < 1.0
    with gpu.using(backend):
        advantages, returns = rlkernels.gae(r, v, mask, gamma=0.99, lam=0.95, masked=masked)
    wide_r, wide_v = r.double(), v.double()
    if masked == "zero":
        wide_r, wide_v = torch.where(mask, wide_r, 0.0), torch.where(mask, wide_v, 0.0)
    following = trace = torch.zeros(shape[0], dtype=torch.float64, device=gpu.DEVICE)
    expected = torch.zeros_like(wide_r)
    for t in reversed(range(shape[1])):
        step = wide_r[:, t] + 0.99 * following - wide_v[:, t] + 0.99 * 0.95 * trace
        live = mask[:, t] if masked == "skip" else torch.ones_like(mask[:, t])
        following, trace = torch.where(live, wide_v[:, t], following), torch.where(live, step, trace)
        expected[:, t] = trace
    shown = torch.ones_like(mask) if masked == "none" else mask
    expected = torch.where(shown, expected, 0.0)
    close(advantages, expected, max(1.0, expected.abs().max().item()))
    close(returns, torch.where(shown, expected + wide_v, 0.0), max(1.0, expected.abs().max().item()))


@both
def test_packed_gae_is_the_padded_one_of_each_sequence(backend):
    lengths = [1, 1023, 5, 2049, 64]
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device=gpu.DEVICE)
    r, v = gpu.noise(sum(lengths), seed=1), gpu.noise(sum(lengths), seed=2)
    with gpu.using(backend):
        advantages, returns = rlkernels.gae(r, v, cu_seqlens=offsets, gamma=0.97, lam=0.9)
        start = 0
        for n in lengths:
            here = slice(start, start + n)
            alone = rlkernels.gae(r[None, here], v[None, here], gamma=0.97, lam=0.9)
            assert gpu.bits(advantages[here], alone[0][0]) and gpu.bits(returns[here], alone[1][0])
            start += n


@both
def test_garbage_under_the_mask_changes_no_bit(backend):
    x, targets, _ = gpu.rows((2, 6), 1025, torch.float32, seed=6)
    columns = gpu.policy_inputs(x, targets)
    dead = ~columns["mask"]
    dirty = {k: v if k == "mask" else torch.where(dead, float("nan"), v) for k, v in columns.items()}
    poisoned = torch.where(dead[..., None], float("nan"), x)
    clean = run(backend, x, targets, columns, "ppo_clip", ref_logprobs=columns["ref"], kl_coef=KL, entropy_coef=ENTROPY)
    got = run(
        backend, poisoned, targets, dirty, "ppo_clip", ref_logprobs=dirty["ref"], kl_coef=KL, entropy_coef=ENTROPY
    )
    assert gpu.bits(clean[0], got[0]) and gpu.bits(clean[1], got[1])
