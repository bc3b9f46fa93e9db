"""The rest of the native CPU backend's protocol: the fused pass, elementwise objectives, the scan, and the memory of
large gradients.
"""

import os
import time

import oracles
import pytest
import subprocesses
import torch
from flat_backend import Flat
from reference import (
    EPS32,
    assert_gradient,
    assert_within_policy,
    cotangents,
    draw_rows,
    gradient_allowance,
    same_bits,
    statistics,
)

from rlkernels.backends import cpu, cpu_memory, eager
from rlkernels.backends.protocol import ENTROPY
from rlkernels.objectives import OBJECTIVES, objective

pytestmark = pytest.mark.skipif(not cpu.available()[0], reason=cpu.available()[1])

NAN = float("nan")
PARAMS = {
    **{"order": 3.0, "low": -0.5, "high": 0.7, "value_low": -0.1, "value_high": 0.2, "cap": 1.5},  # of kl_term
    **{"moving": 1.0, "straight": 0.0},
    "ratio_cap": 1.1,
    "ratio_max": 1.5,
    "delta_low": 0.03,
    "delta_high": 0.02,
    "delta": 0.05,
    "clip_low": 0.2,
    "clip_high": 0.3,
    "dual_clip": 3.0,
    "tau_pos": 1.0,
    "tau_neg": 1.05,
    "clip_range": 0.2,
    "beta": 0.1,
    "label_smoothing": 0.1,
    "alpha": 0.5,
    "tau": 0.05,
}
COMPILED = sorted(cpu._cpu.OBJECTIVES) if cpu.available()[0] else []
OF_LOGP = [name for name in COMPILED if OBJECTIVES[name].columns[0] == "logp" and name != "kl_term"]  # not one of rows


def params(name):
    return [PARAMS[p] for p in OBJECTIVES[name].params]


def columns(name, n, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(n, generator=generator, dtype=torch.float64) for _ in OBJECTIVES[name].columns]
    return [(-x.abs() if name == "log_odds" else x).to(dtype) for x in drawn]  # odds are of a probability below 1


def test_every_objective_of_the_library_is_compiled_in():
    shipped = {
        name for name, entry in OBJECTIVES.items() if entry.function.__module__.startswith("rlkernels.objectives.")
    }
    assert set(COMPILED) == shipped
    assert all(cpu._cpu.OBJECTIVES[n] == (len(OBJECTIVES[n].columns), len(OBJECTIVES[n].params)) for n in COMPILED)


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_elementwise_is_the_oracle_and_its_derivative(name, dtype):
    for n in (0, 1, 5, 4096, 9001):  # none, one part of the sum exactly, parts and a rest
        state = columns(name, n, dtype, seed=n)
        weight = torch.randn(n, generator=torch.Generator().manual_seed(n + 1), dtype=torch.float64).to(dtype)
        weight[::3] = 0
        loss, value, derivative = cpu.elementwise(name, state, params(name), weight)
        first = state[0].double().requires_grad_()
        truth = getattr(oracles, name)(first, *(c.double() for c in state[1:]), *params(name))
        (slope,) = torch.autograd.grad(truth.sum(), first) if n else (first,)
        live, tolerance = weight != 0, 1e-11 if dtype == torch.float64 else 4e-6
        torch.testing.assert_close(
            value.double(), torch.where(live, truth.detach(), 0.0), rtol=tolerance, atol=tolerance
        )
        torch.testing.assert_close(derivative.double(), torch.where(live, slope, 0.0), rtol=tolerance, atol=tolerance)
        expected = (weight.double() * truth.detach()).sum()
        assert (
            loss.dtype == dtype
            and abs(loss.double() - expected) <= tolerance * (weight.double() * truth.detach()).abs().sum()
        )


def test_elementwise_sums_in_one_order_and_skips_weight_zero():
    state, weight = columns("ppo_clip", 50000), torch.ones(50000)
    state[0][7], weight[7] = NAN, 0
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(cpu.elementwise("ppo_clip", state, params("ppo_clip"), weight))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))
    assert results[0][0].isfinite() and results[0][1][7] == 0 and results[0][2][7] == 0


def fused(
    name,
    x,
    y,
    state,
    weight,
    *,
    temperature=1.0,
    mask=None,
    entropy=None,
    kl=None,
    ref=None,
    kl_weight=None,
    grad=True,
    out=None,
):
    return Flat(cpu).fused_policy(
        name, x, y, temperature, -100, mask, state, params(name), weight, entropy, kl, ref, kl_weight, grad, out
    )


@pytest.mark.parametrize("name", OF_LOGP)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_fused_pass_is_float64_autograd(name, dtype):
    rows, vocab = 12, 4099
    x, y, mask = draw_rows((rows,), vocab, dtype)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(3)
    wide = x.double().requires_grad_()
    truth = statistics(wide, y, 0.9, vocab_mask=mask)
    near = (truth["logprobs"].detach() + 0.3 * torch.randn(rows, generator=generator, dtype=torch.float64)).to(real)
    others = [
        near if c in ("old_logp", "ref_logp", "rollout_logp") else torch.randn(rows, generator=generator).to(real)
        for c in OBJECTIVES[name].columns[1:]
    ]
    weight, entropy, kl_weight = (torch.rand(rows, generator=generator).to(real) for _ in range(3))
    weight[3], entropy[4], kl_weight[5] = 0, 0, 0
    for dead in (weight, entropy, kl_weight):
        dead[8] = 0
    options = {"temperature": 0.9, "mask": mask, "entropy": entropy, "kl": "k3", "ref": near, "kl_weight": kl_weight}
    loss, gradient, logp, _, _, h, dlogp = fused(name, x, y, others, weight, **options)
    live = (y != -100) & (torch.arange(rows) != 8)
    values = getattr(oracles, name)(truth["logprobs"], *(c.double() for c in others), *params(name))
    total = (
        weight.double() * values
        - entropy.double() * truth["entropy"]
        + kl_weight.double() * oracles.k3(truth["logprobs"], near.double())
    )
    expected = torch.where(live, total, 0.0).sum()
    precision = 1e-6 if dtype == torch.float64 else 1.0
    assert abs(loss.double() - expected.detach()) <= 4e-6 * precision * total.detach()[live].abs().sum()
    # In two steps: dlogp, which carries the rounding of logp (the error of a ratio is relative, that of a gap is
    # absolute), and the row from it.
    (slope,) = torch.autograd.grad(expected, truth["logprobs"], retain_graph=True)
    of_logp = 1e-6 * (1 + truth["logprobs"].detach().abs()) * (weight.double() * 8 + kl_weight.double() * 8)
    assert (((dlogp.double() - slope)[live]).abs() <= precision * (of_logp + 4e-6 * slope.abs())[live]).all()
    upstream = {"logprobs": torch.where(live, dlogp, 0.0), "entropy": torch.where(live, -entropy, 0.0)}
    (slope,) = torch.autograd.grad((truth["logprobs"], truth["entropy"]), wide, [g.double() for g in upstream.values()])
    assert_gradient(gradient, slope, precision * gradient_allowance(upstream, x, y, 0.9, vocab_mask=mask), name)
    assert all((v[~live] == 0).all() for v in (gradient, logp, h, dlogp))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_fused_pass_has_the_bits_of_two_passes(dtype):
    x, y, mask = draw_rows((9,), 4500, dtype)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    old, advantage, weight, entropy = (g.to(real) for g in cotangents((9,), 4))
    weight[6], entropy[6] = 0, 0
    for extra in ({}, {"entropy": entropy}, {"mask": mask, "temperature": 0.7}):
        loss, gradient, logp, shift, sum_exp, h, dlogp = fused("ppo_clip", x, y, [old, advantage], weight, **extra)
        targets = torch.where((weight == 0) & (entropy == 0 if "entropy" in extra else True), -100, y)
        temperature, support = extra.get("temperature", 1.0), extra.get("mask")
        s = Flat(cpu).token_stats(x, targets, temperature, -100, support, None, ENTROPY)
        assert all(same_bits(a, b) for a, b in zip((logp, shift, sum_exp, h), s, strict=False))
        dentropy = -extra["entropy"] if "entropy" in extra else None
        two = Flat(cpu).token_stats_backward(
            dlogp,
            dentropy,
            None,
            x,
            targets,
            temperature,
            -100,
            support,
            None,
            shift,
            sum_exp,
            h,
            None,
            None,
            None,
            None,
        )
        assert same_bits(gradient, two)
        place = x.clone()
        again = fused("ppo_clip", place, y, [old, advantage], weight, out=place, **extra)
        assert same_bits(place, gradient) and same_bits(again[0], loss)
        alone = fused("ppo_clip", x, y, [old, advantage], weight, grad=False, **extra)
        assert alone[1].shape == (0, 0) and all(
            same_bits(a, b) for a, b in zip(alone[2:], (logp, shift, sum_exp, h, dlogp), strict=True)
        )


def test_a_term_of_weight_zero_is_left_out_of_the_fused_pass():
    x, y, _ = draw_rows((4,), 64)
    y[:] = 5
    old, advantage = torch.full((4,), NAN), torch.ones(4)
    weight, entropy = torch.zeros(4), torch.full((4,), 0.5)
    loss, gradient, *_ = fused(
        "ppo_clip", x, y, [old, advantage], weight, entropy=entropy, kl="k3", ref=old, kl_weight=torch.zeros(4)
    )
    truth = statistics(x.double(), y)["entropy"]
    assert_within_policy(loss, -(0.5 * truth).sum(), -(0.5 * truth).sum().float(), "loss") and gradient.isfinite().all()


def test_a_user_objective_runs_through_the_native_passes():
    if "test_cpu_squared" not in OBJECTIVES:

        @objective
        def test_cpu_squared(logp, target):
            r"""Half the squared distance of ``logp`` from a number."""
            gap = logp - target
            return 0.5 * gap * gap, gap

    x, y, _ = draw_rows((5,), 700)
    goal, weight = torch.randn(5), torch.ones(5)
    loss, gradient, logp, *_ = Flat(cpu).fused_policy(
        "test_cpu_squared", x, y, 1.0, -100, None, [goal], [], weight, None, None, None, None, True, None
    )
    wide = x.double().requires_grad_()
    truth = (0.5 * (statistics(wide, y)["logprobs"] - goal.double()).square())[y != -100].sum()
    (slope,) = torch.autograd.grad(truth, wide)
    torch.testing.assert_close(gradient.double(), slope, rtol=4e-6, atol=4e-6 * float(slope.abs().max()))
    torch.testing.assert_close(loss.double(), truth.detach(), rtol=2e-6, atol=1e-6)
    del OBJECTIVES["test_cpu_squared"]


def scan_by_hand(rewards, values, mask, gamma, lam, masked):
    """One row as a Python loop over floats."""
    advantages, returns, trace, following = [], [], 0.0, 0.0
    for r, v, m in reversed(list(zip(rewards.tolist(), values.tolist(), mask.tolist(), strict=True))):
        live = m or masked == "none"
        if live or masked == "zero":
            r, v = (r, v) if live else (0.0, 0.0)
            trace = r + gamma * following - v + gamma * lam * trace
            following = v
        advantages.append(trace if live else 0.0)
        returns.append(trace + following if live else 0.0)
    return advantages[::-1], returns[::-1]


@pytest.mark.parametrize("masked", ["skip", "zero", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gae_is_a_python_loop_padded_and_packed(masked, dtype):
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(4, 33, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    mask = torch.rand(4, 33, generator=generator) < 0.6
    mask[2] = False
    expected = [scan_by_hand(r, v, m, 0.97, 0.9, masked) for r, v, m in zip(rewards, values, mask, strict=True)]
    if masked != "none":
        rewards, values = rewards.masked_fill(~mask, NAN), values.masked_fill(~mask, NAN)
    cu = torch.tensor([0, 33, 66, 66, 99, 132])  # one segment is empty
    padded = cpu.gae(rewards, values, mask, None, 0.97, 0.9, masked)
    packed = cpu.gae(rewards.view(-1), values.view(-1), mask.view(-1), cu, 0.97, 0.9, masked)
    for k, (a, b) in enumerate(zip(padded, packed, strict=True)):
        truth = torch.tensor([e[k] for e in expected], dtype=torch.float64)
        torch.testing.assert_close(
            a.double(),
            truth,
            rtol=1e-13 if dtype == torch.float64 else EPS32,
            atol=1e-13 if dtype == torch.float64 else 1e-7,
        )
        assert same_bits(a.view(-1), b) and (masked == "none" or (a[~mask] == 0).all())


@pytest.mark.fault(97)
def test_gae_of_131072_tokens_takes_at_most_10_ms():
    rewards, values = torch.randn(1, 131072), torch.randn(1, 131072)
    best = min(_thread_time(lambda: cpu.gae(rewards, values, None, None, 1.0, 0.95, "skip")) for _ in range(5))
    assert best <= 0.010, f"{best * 1e3:.1f} ms of processor time"


def _thread_time(run):
    start = time.thread_time()
    run()
    return time.thread_time() - start


def test_bad_values_are_named():
    x, y = torch.randn(7, 37), torch.zeros(7, dtype=torch.long)
    y[5] = 37
    with pytest.raises(IndexError, match=r"target 37 at row 5 is outside \[0, 37\)"):
        Flat(cpu).token_stats(x, y, 1.0, -100, None, None, 0)
    with pytest.raises(IndexError, match=r"target -1 at row 2 is outside \[0, 37\)"):
        Flat(cpu).token_stats(x, torch.tensor([0, 1, -1, 0, 0, 0, 0], dtype=torch.int32), 1.0, -100, None, None, 0)
    for bad, shown in ((0.0, "0.0"), (-1.0, "-1.0"), (NAN, "nan"), (float("inf"), "inf")):
        temperature = torch.ones(7)
        temperature[3] = bad
        with pytest.raises(ValueError, match=f"temperature must be positive and finite, got {shown} at row 3"):
            Flat(cpu).token_stats(x, torch.zeros(7, dtype=torch.long), temperature, -100, None, None, 0)
    with pytest.raises(NotImplementedError, match="logits of dtype torch.int64 are not supported by backend 'cpu'"):
        Flat(cpu).token_stats(x.long(), y, 1.0, -100, None, None, 0)
    with pytest.raises(
        NotImplementedError, match="ref_logits of dtype torch.bfloat16 beside logits of dtype torch.float32"
    ):
        Flat(cpu).token_stats(x, y, 1.0, -100, None, x.bfloat16(), 0)
    with pytest.raises(NotImplementedError, match="columns of dtype torch.bfloat16 are not supported by backend 'cpu'"):
        cpu.elementwise("k1", [x[0].bfloat16()] * 2, [], None)


def test_the_memory_of_a_large_gradient_serves_the_next_one():
    x, y, _ = draw_rows((80,), 128256, torch.float32)  # 41 MB
    s, ones = Flat(cpu).token_stats(x, y, 1.0, -100, None, None, ENTROPY), torch.ones(80)

    def gradient():
        return Flat(cpu).token_stats_backward(
            ones, None, None, x, y, 1.0, -100, None, None, *s[1:4], None, None, None, None
        )

    cpu_memory.release_memory()
    first = gradient()
    second = gradient()
    assert first.data_ptr() != second.data_ptr() and same_bits(first, second), "a gradient in use is not written again"
    view, address = first[3], first.data_ptr()
    del first
    assert cpu_memory.kept_bytes() == 0, "a view keeps the whole gradient"
    del view
    assert cpu_memory.kept_bytes() >= 80 * 128256 * 4
    third = gradient()
    assert third.data_ptr() == address and cpu_memory.kept_bytes() == 0 and same_bits(second, third)
    del third
    cpu_memory.release_memory()
    assert cpu_memory.kept_bytes() == 0


def test_our_loops_run_on_the_threads_that_torch_has():
    code = """
import os, torch
torch.set_num_threads(2)
count = lambda: len(os.listdir("/proc/self/task"))
x = torch.randn(3000, 3000)
(x * 2).exp().sum()
before = count()
from flat_backend import Flat
from rlkernels.backends import cpu
Flat(cpu).token_stats(x, torch.zeros(3000, dtype=torch.long), 1.0, -100, None, None, 1)
assert count() == before, (before, count())
"""
    if not os.path.isdir("/proc/self/task"):
        pytest.skip("no /proc on this system")
    done = subprocesses.code(code, without=("OMP_NUM_THREADS",))
    assert done.returncode == 0, done.stderr


def test_eager_and_native_agree_where_a_target_is_outside_the_support():
    x, y, _ = draw_rows((5,), 99)
    y[:], mask = 7, torch.ones(99, dtype=torch.bool)
    mask[7] = False
    s, dlogp, dentropy = (
        Flat(cpu).token_stats(x, y, 1.0, -100, mask, None, ENTROPY),
        torch.ones(5),
        torch.full((5,), 0.3),
    )
    assert (s[0] == -float("inf")).all() and s[3].isfinite().all()
    alone = Flat(cpu).token_stats_backward(
        dlogp, None, None, x, y, 1.0, -100, mask, None, *s[1:4], None, None, None, None
    )
    assert (alone == 0).all()
    both = [
        Flat(b).token_stats_backward(
            dlogp, dentropy, None, x, y, 1.0, -100, mask, None, *s[1:4], None, None, None, None
        )
        for b in (cpu, eager)
    ]
    torch.testing.assert_close(*both, rtol=1e-5, atol=1e-7)
