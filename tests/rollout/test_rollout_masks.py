"""Masks and metrics of the rollout mismatch against loops in Python floats."""

import math

import pytest
import torch
from test_rollout_weights import ADVANTAGES, CU, MASK, OLD, ROLLOUT, loop

import rlkernels as rlk
from rlkernels.rollout.masks import RULES

Q = [
    [math.log(w) if m else 0.0 for w, m in zip(row, live, strict=True)]
    for row, live in zip(loop().tolist(), MASK, strict=True)
]
DIVERGENCES = {"k1": lambda q: -q, "k2": lambda q: q * q / 2, "k3": lambda q: math.exp(q) - 1 - q}
REDUCTIONS = {"seq_sum": math.fsum, "seq_mean": lambda x: math.fsum(x) / len(x), "seq_max": max}


def kept_by(rule, low, high):
    """One rule of verl, row by row."""
    level, estimator = rule.rsplit("_", 1)
    rows = []
    for q, live in zip(Q, MASK.tolist(), strict=True):
        each = [DIVERGENCES[estimator](x) for x in q]
        if level != "token" and any(live):
            each = [REDUCTIONS[level]([x for x, m in zip(each, live, strict=True) if m])] * len(q)
        rows.append([m and low <= x <= high for x, m in zip(each, live, strict=True)])
    return torch.tensor(rows)


BOUNDS = {"k1": (0.8, 1.4), "k2": 0.05, "k3": 0.05}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("packed", [False, True])
def test_every_rule_equals_a_loop(rule, packed):
    given = BOUNDS[rule[-2:]]
    low, high = map(math.log, given) if isinstance(given, tuple) else (-math.inf, given)
    want = kept_by(rule, low, high)
    assert not torch.equal(want, MASK) and want.any()
    tensors = (x.view(-1) if packed else x for x in (OLD, ROLLOUT, MASK))
    kept, metrics = rlk.rejection_mask(
        *tensors, rules={rule: given}, cu_seqlens=CU if packed else None, return_metrics=True
    )
    assert torch.equal(kept.view(MASK.shape), want)
    lost = MASK & ~want
    assert metrics["rejected_tokens"].item() == pytest.approx((lost.sum() / MASK.sum()).item())
    assert metrics["touched_sequences"].item() == pytest.approx((lost.any(-1).sum() / MASK.any(-1).sum()).item())


def test_all_rules_must_pass_and_one_ratio_stands_for_its_inverse_too():
    rules = {"token_k1": 1.5, "seq_mean_k3": 0.2}
    want = kept_by("token_k1", -math.log(1.5), math.log(1.5)) & kept_by("seq_mean_k3", -math.inf, 0.2)
    assert torch.equal(rlk.rejection_mask(OLD, ROLLOUT, MASK, rules=rules), want)


def test_without_sequences_rules_of_tokens_work_and_their_metric_is_of_tokens():
    kept, metrics = rlk.rejection_mask(OLD[1], ROLLOUT[1], rules={"token_k2": 0.05}, return_metrics=True)
    assert torch.equal(kept, kept_by("token_k2", -math.inf, 0.05)[1]) and set(metrics) == {"rejected_tokens"}


def off_policy(now, old, advantages, delta):
    rows = []
    for x, y, a, live in zip(now.tolist(), old.tolist(), advantages.tolist(), MASK.tolist(), strict=True):
        gaps = [0.0 if math.isnan(u - v) else u - v for u, v, m in zip(y, x, live, strict=True) if m]
        near = not gaps or math.fsum(gaps) / len(gaps) <= delta
        rows.append([m and (b >= 0 or near) for b, m in zip(a, live, strict=True)])
    return torch.tensor(rows)


@pytest.mark.parametrize("packed", [False, True])
def test_sequences_that_moved_away_lose_their_tokens_of_negative_advantage(packed):
    want = off_policy(OLD, ROLLOUT, ADVANTAGES, 0.05)
    assert not torch.equal(want, MASK) and want.any()
    tensors = [x.view(-1) if packed else x for x in (OLD, ROLLOUT, ADVANTAGES, MASK)]
    offsets = CU if packed else None
    got = rlk.off_policy_sequence_mask(*tensors, delta=0.05, cu_seqlens=offsets)
    assert torch.equal(got.view(MASK.shape), want)
    per_row = torch.tensor([-1.0, 1.0, -1.0, -1.0])
    got = rlk.off_policy_sequence_mask(*tensors[:2], per_row, tensors[3], delta=0.05, cu_seqlens=offsets)
    assert torch.equal(got.view(MASK.shape), off_policy(OLD, ROLLOUT, per_row[:, None].expand(MASK.shape), 0.05))


def m2po(threshold):
    squares = sorted(((q * q, -i) for i, q in enumerate(x for row in Q for x in row) if MASK.view(-1)[i]), reverse=True)
    while len(squares) > 1 and math.fsum(x for x, _ in squares) / len(squares) >= threshold:
        del squares[0]
    kept = torch.zeros(MASK.numel(), dtype=torch.bool)
    kept[[-i for _, i in squares]] = True
    return kept.view(MASK.shape)


@pytest.mark.parametrize("threshold,count", [(0.0, 1), (0.01, None), (0.1, None), (9.0, 8)])
def test_the_largest_squares_go_until_the_mean_of_the_rest_is_small(threshold, count):
    want = m2po(threshold)
    assert count is None or want.sum() == count
    for shape in (MASK.shape, (-1,)):
        tensors = (x.reshape(shape) for x in (OLD, ROLLOUT, MASK))
        assert torch.equal(rlk.m2po_mask(*tensors, threshold=threshold).view(MASK.shape), want)


def masks(old, rollout, mask):
    yield rlk.rejection_mask(old, rollout, mask, rules={"token_k1": 1.5, "seq_max_k3": 0.9, "seq_sum_k2": 5.0})
    yield rlk.off_policy_sequence_mask(old, rollout, ADVANTAGES[:, : old.shape[-1]], mask, delta=0.05)
    yield rlk.m2po_mask(old, rollout, mask, threshold=0.05)


def test_what_dead_tokens_hold_is_not_seen_by_masks_and_metrics():
    for junk in (float("nan"), float("inf"), -float("inf")):
        dirty = [torch.where(MASK, x, junk) for x in (OLD, ROLLOUT)]
        for got, want in zip(masks(*dirty, MASK), masks(OLD, ROLLOUT, MASK), strict=True):
            assert torch.equal(got, want)
        assert rlk.rollout_metrics(*dirty, MASK) == rlk.rollout_metrics(OLD, ROLLOUT, MASK)


def test_without_a_live_token_masks_are_empty_and_metrics_are_zero():
    nothing = torch.zeros_like(MASK)
    assert not any(kept.any() for kept in masks(OLD, ROLLOUT, nothing))
    assert not any(x.item() for x in rlk.rollout_metrics(OLD, ROLLOUT, nothing).values())
    for shape in ((4, 0),):
        empty, mask = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool)
        assert all(kept.shape == shape for kept in masks(empty, empty, mask))
        assert not any(x.item() for x in rlk.rollout_metrics(empty, empty, mask).values())


def test_a_nan_of_the_trainer_stays_in_the_batch_so_that_the_loss_shows_it():
    old = OLD.clone()
    old[1, 1] = float("nan")
    for kept in masks(old, ROLLOUT, MASK):
        assert kept[1, 1] or ADVANTAGES[1, 1] < 0
    assert rlk.rollout_metrics(old, ROLLOUT, MASK)["rollout_kl"].isnan()


@pytest.mark.parametrize("packed", [False, True])
def test_metrics_equal_their_definitions(packed):
    q = torch.tensor([x for row, live in zip(Q, MASK, strict=True) for x, m in zip(row, live, strict=True) if m])
    q = q.double()
    r, p_old = q.exp(), OLD[MASK].exp()
    p_rollout = (OLD[MASK] - q).exp()
    of_sequences = torch.stack([loop()[i][MASK[i]].log().sum() for i in (0, 1, 3)])
    want = {
        "rollout_kl": -q.mean(),
        "rollout_k3": (r - 1 - q).mean(),
        "rollout_ratio": r.mean(),
        "rollout_ratio_min": r.min(),
        "rollout_ratio_max": r.max(),
        "rollout_tv": (r - 1).abs().mean() / 2,
        "rollout_chi2": (r * r).mean() - 1,
        "rollout_ess": r.mean() ** 2 / (r * r).mean(),
        "rollout_prob_gap": (p_old - p_rollout).abs().mean(),
        "rollout_prob_gap_max": (p_old - p_rollout).abs().max(),
        "rollout_unscored": torch.tensor(1 / 8),
        "rollout_sequence_kl": -of_sequences.mean(),
        "rollout_sequence_ratio_max": of_sequences.max().exp(),
    }
    tensors = (x.view(-1) if packed else x for x in (OLD, ROLLOUT, MASK))
    found = rlk.rollout_metrics(*tensors, cu_seqlens=CU if packed else None)
    assert set(found) == set(want)
    for name, x in want.items():
        torch.testing.assert_close(
            found[name], x.double(), rtol=1e-6, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_of_equal_policies_every_divergence_is_zero_and_every_ratio_one():
    found = rlk.rollout_metrics(OLD.float(), OLD.float(), MASK)
    ones = {name for name, x in found.items() if x == 1}
    assert ones == {
        "rollout_ratio",
        "rollout_ratio_min",
        "rollout_ratio_max",
        "rollout_ess",
        "rollout_sequence_ratio_max",
    }
    assert all(x == 0 for name, x in found.items() if name not in ones)
    assert {x.dtype for x in found.values()} == {torch.float32}


def reject(rules):
    return lambda: rlk.rejection_mask(OLD, ROLLOUT, MASK, rules=rules)


BAD = {
    "rule": (ValueError, "rules: unknown 'seq_max_k1'; known: token_k1", reject({"seq_max_k1": 1.0})),
    "no dict": (TypeError, "rules must be a dict of rules to bounds", reject(["token_k1"])),
    "no rule": (TypeError, "rules must be a dict of rules to bounds.*an empty dict", reject({})),
    "pair for k3": (TypeError, r"rules\['token_k3'\] must be a number", reject({"token_k3": (0.1, 0.2)})),
    "three numbers": (ValueError, r"rules\['token_k1'\] must be a number or a pair", reject({"token_k1": (1, 2, 3)})),
    "order": (ValueError, r"rules\['token_k1'\] must be a pair \(low, high\)", reject({"token_k1": 0.5})),
    "sign": (ValueError, r"rules\['token_k2'\] must be positive and finite", reject({"token_k2": -1.0})),
    "sequences": (
        ValueError,
        r"rule 'seq_sum_k1' needs sequences: old_logprobs \[B, L\]",
        lambda: rlk.rejection_mask(OLD[0], ROLLOUT[0], rules={"seq_sum_k1": 2.0}),
    ),
    "delta": (
        ValueError,
        "delta must be finite and not negative, got -1.0",
        lambda: rlk.off_policy_sequence_mask(OLD, ROLLOUT, ADVANTAGES, delta=-1.0),
    ),
    "advantages": (
        ValueError,
        r"advantages has shape \(3,\), expected \(4, 4\)",
        lambda: rlk.off_policy_sequence_mask(OLD, ROLLOUT, ADVANTAGES[0, :3], delta=1.0),
    ),
    "rows": (
        ValueError,
        "the mask needs sequences",
        lambda: rlk.off_policy_sequence_mask(OLD[0], ROLLOUT[0], ADVANTAGES[0], delta=1.0),
    ),
    "threshold": (
        ValueError,
        "threshold must be finite and not negative, got inf",
        lambda: rlk.m2po_mask(OLD, ROLLOUT, threshold=float("inf")),
    ),
    "metrics": (
        ValueError,
        r"rollout_logprobs has shape \(4,\), expected \(4, 4\)",
        lambda: rlk.rollout_metrics(OLD, ROLLOUT[0]),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    error, message, call = BAD[case]
    with pytest.raises(error, match=f"^(rejection_mask|off_policy_sequence_mask|m2po_mask|rollout_metrics): {message}"):
        call()
