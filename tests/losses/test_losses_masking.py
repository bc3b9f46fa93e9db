"""Faults of losses: nothing from masked places, no normaliser that drifts, whatever the padding, packing and
micro-batches.
"""

import math

import pytest
import torch
from loss_batches import AGGREGATED, LEVELS, B, L, batch
from reference import draw_rows, same_bits, statistics

import rlkernels as rlk

NAN, INF = math.nan, math.inf


@pytest.mark.fault(23)
@pytest.mark.parametrize("level,aggregation", AGGREGATED)
def test_no_live_token_gives_loss_zero_with_zero_gradients(level, aggregation, backend):
    d = batch()
    x, targets, _ = draw_rows((B, L), 37)
    nothing = torch.zeros(B, L)
    poisoned = [torch.full((B, L), NAN)] * 2
    logp, entropy, leaf, value = (
        y.requires_grad_()
        for y in (torch.full((B, L), NAN), torch.full((B, L), NAN), torch.full_like(x, NAN), poisoned[0].clone())
    )
    options = {
        "ref_logprobs": poisoned[0],
        "kl_coef": 0.1,
        "entropy_coef": 0.1,
        "aggregation": aggregation,
        "ratio_level": level,
    }
    losses = [
        (rlk.policy_loss(logp, *poisoned, nothing, entropy=entropy, **options), logp),
        (rlk.logits_policy_loss(leaf, targets, *poisoned, nothing, **options), leaf),
        (
            rlk.logits_policy_loss(
                leaf, torch.full_like(targets, -100), d["old"], d["advantages"], **options | {"ref_logprobs": d["ref"]}
            ),
            leaf,
        ),
        (rlk.value_loss(value, *poisoned, nothing, clip_range=0.2, aggregation=aggregation), value),
    ]
    for loss, source in losses:
        assert loss.item() == 0.0
        (gradient,) = torch.autograd.grad(loss, source)
        assert gradient.shape == source.shape and not gradient.any()


@pytest.mark.fault(23)
def test_no_pair_gives_loss_zero(backend):
    a, b = torch.empty(0, requires_grad=True), torch.empty(0)
    for loss in (rlk.pairwise_reward_loss(a, b, center_coef=0.1), rlk.dpo_loss(a, b, b, b)):
        assert loss.item() == 0.0
        assert torch.autograd.grad(loss, a)[0].shape == (0,)


@pytest.mark.fault(26, 81)
@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 3e38])
@pytest.mark.parametrize("level", LEVELS)
def test_garbage_at_masked_tokens_changes_neither_loss_nor_gradient_nor_metric(level, garbage, backend):
    d = batch()
    mask = d["mask"]

    def run(d, weights):
        logp, entropy = (d[k].clone().requires_grad_() for k in ("logp", "entropy"))
        loss, metrics = rlk.policy_loss(
            logp,
            d["old"],
            d["advantages"],
            mask,
            ref_logprobs=d["ref"],
            kl_coef=0.1,
            entropy=entropy,
            entropy_coef=0.1,
            weights=weights,
            ratio_level=level,
            return_metrics=True,
        )
        return [loss, *torch.autograd.grad(loss, (logp, entropy)), *metrics.values()]

    for weights in (None, torch.rand(B, L)):
        clean = run(d, weights)
        dirty = run(
            {k: v if k == "mask" else v.masked_fill(~mask, garbage) for k, v in d.items()},
            None if weights is None else weights.masked_fill(~mask, garbage),
        )
        for got, expected in zip(dirty, clean, strict=True):
            assert same_bits(got.detach(), expected.detach()) and got.isfinite().all()


@pytest.mark.fault(26)
@pytest.mark.parametrize("garbage", [NAN, INF, -INF])
@pytest.mark.parametrize("clip_range", [None, 0.2])
def test_garbage_under_the_mask_of_the_value_loss_changes_nothing(clip_range, garbage, backend):
    d = batch()

    def run(values, old, returns):
        values = values.clone().requires_grad_()
        loss, metrics = rlk.value_loss(values, old, returns, d["mask"], clip_range=clip_range, return_metrics=True)
        return [loss, *torch.autograd.grad(loss, values), *metrics.values()]

    columns = [d[k] for k in ("logp", "old", "ref")]
    clean, dirty = run(*columns), run(*(c.masked_fill(~d["mask"], garbage) for c in columns))
    for got, expected in zip(dirty, clean, strict=True):
        assert same_bits(got.detach(), expected.detach()) and got.isfinite().all()


@pytest.mark.fault(26)
def test_a_dead_row_may_hold_a_nan_advantage(backend):
    d = batch()
    d["mask"][1] = False
    advantages = torch.tensor([1.0, NAN, -0.5])
    for level in LEVELS:
        loss = rlk.policy_loss(d["logp"], d["old"], advantages, d["mask"], ratio_level=level)
        assert same_bits(
            loss, rlk.policy_loss(d["logp"], d["old"], advantages.nan_to_num(), d["mask"], ratio_level=level)
        ), level


@pytest.mark.fault(86)
@pytest.mark.parametrize("level", LEVELS)
def test_more_padding_changes_no_bit(level, backend):
    d = batch()

    def run(d):
        logp = d["logp"].clone().requires_grad_()
        aggregation = "seq-mean-token-mean" if level == "sequence" else "token-mean"
        loss = rlk.policy_loss(
            logp,
            d["old"],
            d["advantages"],
            d["mask"],
            ratio_level=level,
            aggregation=aggregation,
            ref_logprobs=d["ref"],
            kl_coef=0.1,
        )
        return loss, torch.autograd.grad(loss, logp)[0]

    loss, gradient = run(d)
    wide_loss, wide_gradient = run({k: torch.nn.functional.pad(v, (0, 77), value=0) for k, v in d.items()})
    assert wide_loss.item() == pytest.approx(loss.item(), rel=1e-7)
    assert same_bits(wide_gradient[:, :L], gradient) and not wide_gradient[:, L:].any()


@pytest.mark.fault(87)
@pytest.mark.parametrize("level,aggregation", AGGREGATED)
def test_a_packed_batch_has_the_loss_of_the_padded_one(level, aggregation, backend):
    d = batch()
    lengths = torch.tensor([6, 2, 4])
    inside = torch.arange(L) < lengths[:, None]
    d["mask"] &= inside
    cu = torch.tensor([0, 6, 8, 12])
    per_sequence = torch.tensor([1.0, -0.5, 2.0])

    def run(pick, advantages, **options):
        logp = pick(d["logp"]).clone().requires_grad_()
        loss = rlk.policy_loss(
            logp,
            pick(d["old"]),
            advantages,
            pick(d["mask"]),
            ratio_level=level,
            aggregation=aggregation,
            ref_logprobs=pick(d["ref"]),
            kl_coef=0.1,
            entropy=pick(d["entropy"]),
            entropy_coef=0.1,
            **options,
        )
        return loss, torch.autograd.grad(loss, logp)[0]

    padded_loss, padded = run(lambda x: x, per_sequence)
    for dtype in (torch.int32, torch.int64):
        packed_loss, packed = run(lambda x: x[inside], per_sequence, cu_seqlens=cu.to(dtype))
        assert packed_loss.item() == pytest.approx(padded_loss.item(), rel=1e-6)
        torch.testing.assert_close(packed, padded[inside], rtol=1e-6, atol=1e-9)


@pytest.mark.fault(30)
def test_micro_batches_add_up_to_the_batch(backend):
    d = batch(shape=(4, 6))
    x, targets, _ = draw_rows((4, 6), 37)
    targets = targets.clamp(min=0)
    for aggregation, normalizers in (
        ("token-mean", {"batch_num_tokens": int(d["mask"].sum())}),
        ("seq-mean-token-mean", {"num_sequences": 4}),
    ):
        options = {"aggregation": aggregation, "ref_logprobs": d["ref"], "kl_coef": 0.1}
        whole = x.clone().requires_grad_()
        loss = rlk.logits_policy_loss(whole, targets, d["old"], d["advantages"], d["mask"], **options)
        parts, leaf = 0.0, x.clone().requires_grad_()
        for rows in (slice(0, 1), slice(1, 4)):
            options["ref_logprobs"] = d["ref"][rows]
            part = rlk.logits_policy_loss(
                leaf[rows],
                targets[rows],
                d["old"][rows],
                d["advantages"][rows],
                d["mask"][rows],
                normalizers=normalizers,
                **options,
            )
            part.backward()
            parts += part.item()
        assert parts == pytest.approx(loss.item(), rel=2e-6)
        torch.testing.assert_close(leaf.grad, torch.autograd.grad(loss, whole)[0], rtol=4e-6, atol=1e-7)


def test_a_token_of_weight_zero_is_not_evaluated(backend):
    d = batch()
    x, targets, _ = draw_rows((B, L), 37)
    weights = torch.rand(B, L) + 0.1
    weights[1, 2] = weights[0, 0] = 0.0
    targets[1, 2] = targets[0, 0] = 3
    dead = weights == 0
    results = []
    for poison in (0.5, NAN):
        leaf = x.masked_fill(dead[..., None], poison).requires_grad_()
        loss = rlk.logits_policy_loss(
            leaf,
            targets,
            *(d[k].masked_fill(dead, poison) for k in ("old", "advantages")),
            weights=weights,
            entropy_coef=0.1,
            ref_logprobs=d["ref"].masked_fill(dead, poison),
            kl_coef=0.1,
        )
        results.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
    assert results[1][0].isfinite() and not results[1][1][dead].any()


@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_metrics_leave_out_tokens_that_were_not_read_because_they_weigh_nothing(entropy_coef, backend):
    d = batch()
    x, targets, _ = draw_rows((B, L), 37)
    old = rlk.token_logprobs(x, targets).detach()
    weights = torch.rand(B, L) + 0.1
    weights[:, ::2] = 0.0
    _, metrics = rlk.logits_policy_loss(
        x,
        targets,
        old,
        d["advantages"].nan_to_num(0.0),
        weights=weights,
        entropy_coef=entropy_coef,
        return_metrics=True,
    )
    assert metrics["ratio"] == 1.0 and metrics["approx_kl"] == 0.0
    entropy = statistics(x, targets)["entropy"][(weights != 0) & (targets != -100)].mean()
    assert metrics["entropy"].item() == pytest.approx(entropy.item(), rel=2e-6)
