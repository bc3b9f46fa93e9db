"""Weights of the rollout mismatch against loops in Python floats: levels, modes, gates, NaN, layouts, bad arguments."""

import math

import pytest
import torch

import rlkernels as rlk

# Holes, a full row, an empty row, a single token.
MASK = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]], dtype=torch.bool)
CU = torch.tensor([0, 4, 8, 12, 16])


def randn(seed):
    return torch.randn(MASK.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


OLD = -1.5 + 0.5 * randn(0)
ROLLOUT = OLD + 0.6 * randn(1)
ROLLOUT[1, 2] = float("nan")  # the engine could not score it
ADVANTAGES = randn(2)


def loop(level="token", mode="clip", low=None, high=None, gate="ratio", gate_level=None, nan_ratio=1.0):
    """The weights of OLD and ROLLOUT, token by token."""
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    weights = []
    for olds, rollouts, live in zip(OLD.tolist(), ROLLOUT.tolist(), MASK.tolist(), strict=True):
        here = [t for t, m in enumerate(live) if m]
        q = {t: math.log(nan_ratio) if math.isnan(rollouts[t]) else olds[t] - rollouts[t] for t in here}

        def at(kind, x, t, here=here):
            if kind == "token":
                return x[t]
            return math.fsum(x[s] for s in here) / (len(here) if kind == "sequence_mean" else 1)

        def divergence(t, q=q, olds=olds):
            p_old, p_rollout = (min(max(math.exp(x), 1e-6), 1 - 1e-6) for x in (olds[t], olds[t] - q[t]))
            if gate == "tv":
                return abs(p_rollout - p_old)
            return p_rollout * math.log(p_rollout / p_old) + (1 - p_rollout) * math.log((1 - p_rollout) / (1 - p_old))

        row = [0.0] * len(live)
        for t in here:
            w = math.exp(at(level, q, t))
            if mode == "clip":
                row[t] = min(max(w, low), high)
                continue
            kind = level if gate_level is None else gate_level
            if gate == "ratio":
                compared = math.exp(at(kind, q, t))
            else:
                compared = at(kind, {s: divergence(s) for s in here}, t)
            row[t] = w if low <= compared <= high else 0.0
        weights.append(row)
    return torch.tensor(weights, dtype=torch.float64)


CASES = {
    "importance sampling": {},
    "TIS": {"high": 1.2},
    "TIS of both sides": {"low": 0.8, "high": 1.2},
    "IcePop": {"mode": "mask", "low": 0.7, "high": 1.4},
    "sequence TIS": {"level": "sequence", "high": 1.1},
    "sequence MIS": {"level": "sequence", "mode": "mask", "high": 1.1},
    "geometric": {"level": "sequence_mean", "mode": "mask", "low": 0.9, "high": 1.1},
    "masked sequences": {"mode": "mask", "gate_level": "sequence_mean", "low": 0.9, "high": 1.1},
    "products behind a gate of tokens": {"level": "sequence", "mode": "mask", "gate_level": "token", "high": 1.3},
    "KL of a token": {"mode": "mask", "gate": "kl", "high": 0.02},
    "KL of a sequence": {"mode": "mask", "gate": "kl", "gate_level": "sequence_mean", "high": 0.01},
    "TV of a token": {"mode": "mask", "gate": "tv", "high": 0.08},
    "TV summed": {"mode": "mask", "gate": "tv", "gate_level": "sequence", "high": 0.15},
    "another ratio for NaN": {"high": 2.0, "nan_ratio": 0.5},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("packed", [False, True])
def test_weights_equal_a_loop_over_tokens(case, packed):
    want = loop(**CASES[case])
    assert case in ("importance sampling",) or not torch.equal(want, loop()), "the case changes nothing"
    given = OLD, ROLLOUT, MASK
    options = {**CASES[case], **({"cu_seqlens": CU} if packed else {})}
    got = rlk.rollout_weights(*(x.view(-1) if packed else x for x in given), **options).view(MASK.shape)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


def test_what_dead_tokens_hold_is_not_seen():
    for junk in (float("nan"), float("inf"), -float("inf")):
        old, rollout = (torch.where(MASK, x, junk) for x in (OLD, ROLLOUT))
        for options in CASES.values():
            expected = rlk.rollout_weights(OLD, ROLLOUT, MASK, **options, return_metrics=True)
            got = rlk.rollout_weights(old, rollout, MASK, **options, return_metrics=True)
            assert torch.equal(got[0], expected[0]) and got[1] == expected[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_of_lower_precision_are_fp32_and_those_of_the_rounded_inputs(dtype):
    old, rollout = OLD.to(dtype), ROLLOUT.to(dtype)
    got = rlk.rollout_weights(old, rollout, MASK, level="sequence", high=1.5)
    assert got.dtype == torch.float32
    want = rlk.rollout_weights(old.double(), rollout.double(), MASK, level="sequence", high=1.5)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)


def test_a_nan_of_the_trainer_is_seen():
    old = OLD.clone()
    old[0, 1] = float("nan")
    for options in CASES.values():
        weights = rlk.rollout_weights(old, ROLLOUT, MASK, **options)
        assert weights[0, 1].isnan(), options
        assert not weights[1:].isnan().any()


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_mean"])
def test_batch_normalisation_makes_the_mean_one_over_tokens_or_filled_sequences(level):
    weights = loop(level=level, high=1.2)
    of_rows = weights.sum(-1) / MASK.sum(-1).clamp(min=1)
    mean = weights[MASK].mean() if level == "token" else of_rows[MASK.any(-1)].mean()
    options = {"level": level, "high": 1.2, "batch_normalize": True}
    torch.testing.assert_close(rlk.rollout_weights(OLD, ROLLOUT, MASK, **options), weights / mean)
    rows = [
        rlk.rollout_weights(*(x[i : i + 1] for x in (OLD, ROLLOUT, MASK)), batch_mean=mean, **options) for i in range(4)
    ]
    torch.testing.assert_close(torch.cat(rows), weights / mean)


def test_nothing_is_left_of_a_batch_that_is_dropped_or_empty():
    for mask in (torch.zeros_like(MASK), MASK):
        for level in ("token", "sequence"):
            options = {"level": level, "mode": "mask", "low": 1e9, "batch_normalize": True}
            weights, metrics = rlk.rollout_weights(OLD, ROLLOUT, mask, **options, return_metrics=True)
            assert torch.equal(weights, torch.zeros_like(OLD))
            assert metrics["rollout_weight_ess"] == 0 and metrics["rollout_filtered"] == mask.any()
    for shape in ((0, 4), (3, 0)):
        empty = torch.zeros(shape)
        assert rlk.rollout_weights(empty, empty, level="sequence", batch_normalize=True).shape == shape


def test_metrics_are_the_mean_the_effective_share_and_the_share_beyond_the_bounds():
    weights, metrics = rlk.rollout_weights(OLD, ROLLOUT, MASK, high=1.2, return_metrics=True)
    live = weights[MASK]
    assert metrics["rollout_weight"].item() == pytest.approx(live.mean().item())
    assert metrics["rollout_weight_ess"].item() == pytest.approx((live.mean() ** 2 / (live**2).mean()).item())
    assert metrics["rollout_filtered"].item() == pytest.approx((loop()[MASK] > 1.2).double().mean().item())
    assert 0 < metrics["rollout_filtered"] < 1


@pytest.mark.parametrize("level", ["token", "sequence_mean"])
@pytest.mark.parametrize("packed", [False, True])
def test_rho_drops_first_and_clamps_then(level, packed):
    free = loop(level=level)
    want = torch.where((free < 0.85) | (free > 1.5), 0.0, free.clamp(0.9, 1.2)) * MASK
    given = (x.view(-1) if packed else x for x in (OLD, ROLLOUT, MASK))
    bounds = {"mask_low": 0.85, "mask_high": 1.5, "clamp_low": 0.9, "clamp_high": 1.2}
    got = rlk.rho_correction(*given, level=level, **bounds, cu_seqlens=CU if packed else None)
    torch.testing.assert_close(got.view(MASK.shape), want)
    assert len(set(want.flatten().tolist()) & {0.9, 1.2}) > 0 and (want[MASK] == 0).any()


def test_rho_by_divergence_drops_only_tokens_that_move_further_away():
    free = loop()
    mean = ((free - 1).abs() * MASK).sum(-1, keepdim=True) / MASK.sum(-1, keepdim=True).clamp(min=1)
    bad = (mean > 0.2) & (free.log().sign() * ADVANTAGES > 0)
    got = rlk.rho_correction(OLD, ROLLOUT, MASK, advantages=ADVANTAGES, gate="tv", mask_high=0.2)
    want = torch.where(bad | ~MASK, 0.0, free)
    torch.testing.assert_close(got, want)
    assert (bad & MASK).any() and (~bad & MASK & (mean > 0.2)).any()
    of_rows = rlk.rho_correction(OLD, ROLLOUT, MASK, advantages=ADVANTAGES[:, 0], gate="tv", mask_high=0.2)
    wide = ADVANTAGES[:, :1].expand(MASK.shape)
    torch.testing.assert_close(
        of_rows, rlk.rho_correction(OLD, ROLLOUT, MASK, advantages=wide, gate="tv", mask_high=0.2)
    )


def test_rho_clamps_the_log_ratio_at_ten_unless_told_otherwise():
    old, rollout = torch.tensor([0.0, -30.0], dtype=torch.float64), torch.tensor([-30.0, 0.0], dtype=torch.float64)
    found = rlk.rho_correction(old, rollout).log()
    torch.testing.assert_close(found, torch.tensor([10.0, -10.0], dtype=torch.float64))
    found = rlk.rho_correction(old, rollout, log_ratio_clamp=None).log()
    torch.testing.assert_close(found, torch.tensor([30.0, -30.0], dtype=torch.float64))


def weigh(old=OLD, rollout=ROLLOUT, **options):
    return lambda: rlk.rollout_weights(old, rollout, MASK, **options)


BAD = {
    "level": (ValueError, "level must be one of token, sequence, sequence_mean; got 'row'", weigh(level="row")),
    "mode": (ValueError, "mode must be one of clip, mask; got 'tis'", weigh(mode="tis")),
    "gate": (ValueError, "gate must be one of ratio, kl, tv; got 'js'", weigh(mode="mask", gate="js", high=1.0)),
    "no bound": (ValueError, "mode 'mask' needs low or high", weigh(mode="mask")),
    "order": (ValueError, "low must not be above high, got 2.0 and 1.0", weigh(low=2.0, high=1.0)),
    "negative": (ValueError, "high must be finite and not negative, got -1.0", weigh(high=-1.0)),
    "nan_ratio": (ValueError, "nan_ratio must be finite and not negative, got nan", weigh(nan_ratio=float("nan"))),
    "clip by a gate": (ValueError, "mode 'clip' takes no gate", weigh(gate="kl", high=1.0)),
    "clip by a level": (ValueError, "mode 'clip' takes no gate_level", weigh(gate_level="token", high=1.0)),
    "low of a divergence": (
        ValueError,
        "gate 'tv' is a divergence; it needs high",
        weigh(mode="mask", gate="tv", low=0.1),
    ),
    "batch_mean": (ValueError, "batch_mean is read with batch_normalize=True alone", weigh(batch_mean=1.0)),
    "shape": (ValueError, r"rollout_logprobs has shape \(4,\), expected \(4, 4\)", weigh(rollout=ROLLOUT[0])),
    "dtype": (TypeError, "old_logprobs has dtype torch.int64", weigh(old=OLD.long())),
    "gradient": (ValueError, "old_logprobs gets no gradient; detach it", weigh(old=OLD.clone().requires_grad_())),
    "sequences": (
        ValueError,
        r"level='sequence' needs sequences: old_logprobs \[B, L\], or packed \[T\] with cu_seqlens; got shape \(4,\)",
        lambda: rlk.rollout_weights(OLD[0], ROLLOUT[0], level="sequence"),
    ),
    "mask": (
        ValueError,
        r"mask has shape \(4,\), expected \(4, 4\)",
        lambda: rlk.rollout_weights(OLD, ROLLOUT, MASK[0]),
    ),
    "rho without advantages": (
        ValueError,
        "gate 'tv' needs advantages",
        lambda: rlk.rho_correction(OLD, ROLLOUT, gate="tv"),
    ),
    "rho with advantages": (
        ValueError,
        "gate 'ratio' takes no advantages",
        lambda: rlk.rho_correction(OLD, ROLLOUT, advantages=ADVANTAGES),
    ),
    "rho order": (
        ValueError,
        "clamp_low must not be above clamp_high",
        lambda: rlk.rho_correction(OLD, ROLLOUT, clamp_low=2.0, clamp_high=1.0),
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    error, message, call = BAD[case]
    with pytest.raises(error, match=f"^(rollout_weights|rho_correction): {message}"):
        call()


@pytest.mark.parametrize("gate", ("ratio", "tv", "kl"))
def test_a_bound_cuts_between_the_token_half_a_percent_inside_and_the_one_outside(gate):
    old, rollout = torch.tensor([[-0.7, -0.7]], dtype=torch.float64), torch.tensor([[-1.2, -1.3]], dtype=torch.float64)
    p, q = old.exp(), rollout.exp()
    number = {"ratio": p / q, "tv": (p - q).abs(), "kl": q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()}[gate][
        0, 0
    ].item()
    for factor, kept in ((1.005, True), (0.995, False)):
        weights = rlk.rollout_weights(old[:, :1], rollout[:, :1], mode="mask", gate=gate, high=factor * number)
        assert bool(weights[0, 0] != 0) is kept
