"""Faults that concern what is computed of a row of logits: its precision and its meaning."""

import math

import pytest
import torch
from reference import EPS32, cotangents, draw_rows, gradient_allowance, judge, same_bits, statistics
from row_runs import ALL, DTYPES, SIXTEEN, assert_same, assert_same_bits, run

import rlkernels as rlk

INF = math.inf


@pytest.mark.fault(18)
def test_a_common_offset_changes_nothing(backend):
    x, targets, _ = draw_rows((6,), 1025)
    grid = (x * 256).round() / 256  # 1e4 + grid is exact in fp32
    at_zero, at_ten_thousand = run(grid, targets), run(grid + 1e4, targets)
    for name in ("logprobs", "entropy", "log_sum_sq_probs"):
        assert (at_zero[name] - at_ten_thousand[name]).abs().max() <= 4e-6, name
    far = grid.round()
    judge(rlk.token_stats, far + 1e6, targets)
    torch.testing.assert_close(run(far + 1e6, targets)["gradient"], run(far, targets)["gradient"], atol=1e-7, rtol=4e-6)


@pytest.mark.fault(18)
def test_a_peaked_row_keeps_its_tiny_entropy(backend):
    x = torch.zeros(2, 1025)
    x[:, 7] = torch.tensor([34.0, 20.0])
    for offset in (0.0, 5000.0):
        got = run(x + offset, torch.tensor([7, 7]))["entropy"]
        truth = statistics(x + offset, torch.tensor([7, 7]))["entropy"]
        assert truth[0] < 1e-10
        torch.testing.assert_close(got.double(), truth, rtol=0.05, atol=0)


@pytest.mark.fault(19)
@pytest.mark.parametrize("dtype", SIXTEEN)
def test_sixteen_bit_logits_give_the_bits_of_the_same_values_in_fp32(dtype, backend):
    x, targets, mask = draw_rows((6,), 4133, dtype)
    reference = draw_rows((6,), 4133, dtype, seed=5)[0]
    for options in ({}, {"vocab_mask": mask}):
        narrow = run(x, targets, ref_logits=reference, kl="exact", **options)
        wide = run(x.float(), targets, ref_logits=reference.float(), kl="exact", **options)
        assert same_bits(narrow.pop("gradient"), wide.pop("gradient").to(dtype))  # one rounding, of the fp32 gradient
        assert_same_bits(narrow, wide)


@pytest.mark.fault(20)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.9, 0.99, 0.999, 0.9999])
def test_the_true_class_keeps_its_gradient_near_certainty(p, dtype, backend):
    x = torch.zeros(1, 65, dtype=dtype)
    x[0, 3] = math.log(p / (1 - p) * 64)
    got = run(x, torch.tensor([3]), g=(torch.tensor([0.7]), torch.tensor([0.0])))["gradient"][0, 3]
    truth = 0.7 * (1 - statistics(x, torch.tensor([3]))["logprobs"].exp().item())
    assert got.item() == pytest.approx(truth, rel=5e-3)


@pytest.mark.fault(22)
def test_gradients_below_any_filter_are_exact(backend):
    x = torch.zeros(1, 4096)
    x[0, 3] = 14.0  # every other column has p = 8e-7, far below 2**-12
    got = run(x, torch.tensor([3]), g=(torch.tensor([0.7]), torch.tensor([0.0])))["gradient"][0]
    p = x[0].double().softmax(0)
    assert (got[4:] != 0).all()
    torch.testing.assert_close(got[4:].double(), -0.7 * p[4:], rtol=4e-6, atol=0)


@pytest.mark.fault(27)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_temperature_per_row_is_a_loop_over_temperatures(dtype, backend):
    x, targets, mask = draw_rows((8,), 133, dtype)
    t = torch.tensor([1.0, 0.5, 1e-3, 0.7, 100.0, 1.0, 0.7, 3.0])
    reference = draw_rows((8,), 133, dtype, seed=5)[0]
    g = cotangents((8,), 2)
    got = run(x, targets, temperature=t, vocab_mask=mask, g=g, ref_logits=reference, kl="exact")
    for r in range(8):
        one = run(
            x[r : r + 1],
            targets[r : r + 1],
            temperature=t[r].item(),
            vocab_mask=mask[r : r + 1],
            g=tuple(v[r : r + 1] for v in g),
            ref_logits=reference[r : r + 1],
            kl="exact",
        )
        assert_same({k: v[r : r + 1] for k, v in got.items()}, one, backend)
    judge(rlk.token_stats, x, targets, t, vocab_mask=mask)


@pytest.mark.fault(66)
def test_rows_far_below_zero_do_not_underflow(backend):
    noise, targets, _ = draw_rows((4,), 9000)
    x = noise - 1e4
    x[1, :5000] = -1e30
    x[3] = -1e30
    targets[:] = torch.tensor([8999, 8999, -100, 4])
    judge(rlk.token_stats, x, targets)
    assert rlk.token_logprobs(x, targets)[3].item() == pytest.approx(-math.log(9000), rel=1e-6)


@pytest.mark.fault(68)
@pytest.mark.parametrize("dtype", SIXTEEN)
def test_entropy_is_not_rounded_to_sixteen_bits(dtype, backend):
    x = (0.05 * torch.randn(5, 9000, generator=torch.Generator().manual_seed(0))).to(dtype)
    targets = torch.zeros(5, dtype=torch.int64)
    entropy = rlk.token_stats(x, targets).entropy
    truth = statistics(x, targets)["entropy"]
    assert entropy.dtype == torch.float32 and (truth > 9).all()
    assert (entropy - truth).abs().max() <= 1e-5


@pytest.mark.fault(75)
@pytest.mark.parametrize("vocab", [262_144, 300_000])
def test_large_vocabularies_stay_within_the_bounds(vocab, backend):
    x, targets, _ = draw_rows((2,), vocab, torch.bfloat16)
    targets[1] = vocab - 1
    stats = judge(rlk.token_stats, x, targets)
    truth = statistics(x, targets)
    for name in ("logprobs", "logsumexp", "entropy"):
        assert (getattr(stats, name) - truth[name]).abs().max() <= 1e-5, name


@pytest.mark.fault(76)
@pytest.mark.parametrize("shape", ["rising", "falling", "peak in the last block", "equal"])
def test_rescaling_between_blocks_does_not_drift(shape, backend):
    x = torch.linspace(-30, 30, 20_000)
    x = {
        "rising": x,
        "falling": x.flip(0),
        "peak in the last block": torch.cat([x[:-1] / 30, x[-1:] * 2]),
        "equal": torch.zeros_like(x),
    }[shape]
    x = torch.stack([x, x + 100, x * 0.1])
    judge(rlk.token_stats, x, torch.tensor([0, 19_999, 7_000]), ref_logits=x.flip(-1).contiguous())


@pytest.mark.fault(77)
def test_a_replayed_top_p_support_has_ratio_one_and_the_whole_vocabulary_has_the_kept_mass(backend):
    x, _, _ = draw_rows((1,), 50)
    p, order = x[0].double().softmax(0).sort(descending=True)
    kept = order[: int((p.cumsum(0) < 0.8).sum()) + 1]
    support = torch.zeros(50, dtype=torch.bool).index_fill(0, kept, True)
    sampled = x[0].double().index_fill(0, (~support).nonzero()[:, 0], -INF).log_softmax(0)
    rows = x.expand(len(kept), 50)
    ratio = (rlk.token_logprobs(rows, kept, vocab_mask=support).double() - sampled[kept]).exp()
    assert (ratio - 1).abs().max() <= 16 * EPS32
    whole = (rlk.token_logprobs(rows, kept).double() - sampled[kept]).exp()
    mass = p[: len(kept)].sum()
    assert mass < 0.999 and whole.mean().item() == pytest.approx(mass.item(), rel=1e-5)


@pytest.mark.fault(72)
def test_temperature_is_applied_once(backend):
    x, targets, _ = draw_rows((5,), 37)
    ours, callers = rlk.token_logprobs(x, targets, temperature=0.5), rlk.token_logprobs(x / 0.5, targets)
    torch.testing.assert_close(ours, callers, atol=2e-6, rtol=2e-6)  # division by a power of two is exact
    assert ((ours - rlk.token_logprobs(x, targets)).abs() > 1e-3).sum() >= 3
    assert ((ours - rlk.token_logprobs(x / 0.5, targets, temperature=0.5)).abs() > 1e-3).sum() >= 3


@pytest.mark.fault(84)
@pytest.mark.parametrize("dtype", DTYPES)
def test_old_and_new_logprobs_from_any_of_our_functions_have_ratio_exactly_one(dtype, backend):
    x, targets, mask = draw_rows((2, 6), 1037, dtype)
    options = {"temperature": 0.7, "vocab_mask": mask}
    old = rlk.token_logprobs(x, targets, **options)
    for new in (
        rlk.token_stats(x, targets, outputs=(), **options).logprobs,
        rlk.token_stats(x, targets, outputs=ALL, **options).logprobs,
        rlk.token_stats(x, targets, ref_logits=x, kl="exact", **options).logprobs,
        rlk.token_stats(x, targets, ref_logits=x, kl="exact", **options).ref_logprobs,
        rlk.token_logprobs(x.clone().requires_grad_(), targets, **options),
    ):
        assert same_bits(new.detach(), old)
    _, metrics = rlk.logits_policy_loss(
        x.requires_grad_(), targets, old, torch.ones(2, 6), return_metrics=True, **options
    )
    assert metrics["ratio"].item() == 1.0 and metrics["ppo_kl"].item() == 0.0 and metrics["approx_kl"].item() == 0.0


@pytest.mark.fault(65)
def test_logits_at_t_score_the_target_at_t(backend):
    # p = 1/6, 2/6, 3/6 in every row, by hand.
    logits = torch.tensor([1.0, 2.0, 3.0]).log().expand(3, 3)
    got = rlk.token_logprobs(logits, torch.tensor([2, 0, 1]))
    assert got.tolist() == pytest.approx([math.log(1 / 2), math.log(1 / 6), math.log(1 / 3)], rel=1e-6)
    # The caller's shift for next-token prediction.
    shifted = rlk.token_logprobs(logits[:-1], torch.tensor([2, 0, 1])[1:])
    assert shifted.tolist() == pytest.approx([math.log(1 / 6), math.log(1 / 3)], rel=1e-6)


@pytest.mark.fault(87, 88)
def test_shards_and_packed_samples_of_shifted_labels_equal_the_whole(backend):
    x, targets, _ = draw_rows((8,), 133)
    whole, g = run(x, targets), cotangents((8,), 2)
    for cut in (1, 4, 7):
        parts = [run(x[part], targets[part], g=tuple(v[part] for v in g)) for part in (slice(0, cut), slice(cut, 8))]
        assert_same({k: torch.cat([p[k] for p in parts]) for k in whole}, whole, backend)


@pytest.mark.fault(94)
def test_what_is_not_asked_for_is_not_computed(backend):
    x, targets, _ = draw_rows((4,), 37)
    assert [k for k, v in rlk.token_stats(x, targets, outputs=())._asdict().items() if v is not None] == [
        "logprobs",
        "logsumexp",
    ]
    for name in ALL:
        found = rlk.token_stats(x, targets, outputs=(name,))._asdict()
        assert {k for k, v in found.items() if v is not None} == {"logprobs", "logsumexp", name}
        assert same_bits(found[name], run(x, targets)[name])


@pytest.mark.fault(74)
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_sampled_estimators_of_two_models_equal_their_formula_and_get_its_gradient(kl, backend):
    x, targets, _ = draw_rows((6,), 37)
    x = x.clamp(-6, 6)  # log-probabilities below 20: their difference is known to 1e-5
    reference = x + 0.3 * torch.randn(6, 37, generator=torch.Generator().manual_seed(8))
    leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    got = rlk.token_stats(leaf, targets, ref_logits=reference, kl=kl, temperature=0.7).kl
    truth = statistics(wide, targets, 0.7, ref_logits=reference)
    gap = truth["ref_logprobs"] - truth["logprobs"]
    expected = {"k1": -gap, "k2": gap**2 / 2, "k3": gap.exp() - 1 - gap}[kl]
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=4e-6)
    (g,) = cotangents((6,), 1)
    (gradient,), (expected_gradient,) = (
        torch.autograd.grad(got, leaf, g),
        torch.autograd.grad(expected, wide, g.double()),
    )
    allowed = gradient_allowance({"logprobs": 3 * g}, x, targets, 0.7) + 1.5e-5 * (g.abs() / 0.7)[:, None]
    assert ((gradient - expected_gradient).abs() <= allowed).all() and expected_gradient.abs().max() > 1e-3
