"""The mismatch of rollout engine and trainer: weights, masks and metrics, each against a loop over tokens."""

import math

import torch

from fuzz.batches import Batch
from fuzz.draws import FLOATS, NAN
from fuzz.terms import per_sequence
from fuzz.trial import case, eps

LEVELS = ("token", "sequence", "sequence_mean")
RULES = {
    **{f"{level}_k1": (1.7, (0.6, 2.1)) for level in ("token", "seq_sum", "seq_mean")},
    **{f"{level}_k{k}": (0.03, 0.7) for level in ("token", "seq_sum", "seq_mean", "seq_max") for k in (2, 3)},
}


def logprobs(draw, live, unscored=0.0):
    """Log-probabilities of tokens in some dtype and layout, some of them NaN, with garbage at dead tokens."""
    x = draw.uniform(live.shape, -3.0, 0.0, draw.choice((torch.float32, *FLOATS)))
    x = torch.where(draw.coins(live.shape, unscored), NAN, x).to(x.dtype)
    return draw.laid_out(draw.with_garbage(x, live), keep=True)


def clipped(x, low, high):
    x = x if low is None else max(x, low)
    return x if high is None else min(x, high)


def beyond(x, low, high):
    return low is not None and x < low or high is not None and x > high


class Mismatch:
    """Drawn log-probabilities, and as lists of numbers: ``old``, ``rollout``, and their difference ``gap``."""

    def __init__(self, draw, packing=True):
        self.batch = Batch(draw)
        self.live = self.batch.live.flatten().tolist()
        given = logprobs(draw, self.batch.live), logprobs(draw, self.batch.live, draw.choice((0.0, 0.2)))
        nan_ratio, self.options = draw.choice((1.0, 1.0, 0.5, 2)), self.batch.packing() if packing else {}
        if nan_ratio != 1.0 or draw.flag(0.3):
            self.options["nan_ratio"] = draw.number(nan_ratio)
        self.arguments = (*given, self.batch.mask)
        self.old, rollout = ([float(x) for x in y.double().flatten()] for y in given)
        self.unscored = [math.isnan(x) for x in rollout]
        missing = math.log(nan_ratio)
        self.gap = [missing if lost else a - b for a, b, lost in zip(self.old, rollout, self.unscored, strict=True)]
        self.rollout = [a - q for a, q in zip(self.old, self.gap, strict=True)]

    def sequences(self):
        """Of each sequence that has some, its live tokens."""
        found = [[] for _ in range(self.batch.count)]
        for t, s in enumerate(self.batch.sequence.tolist()):
            if self.live[t]:
                found[s].append(t)
        return [tokens for tokens in found if tokens]

    def tokens(self):
        return [t for t, live in enumerate(self.live) if live]

    def at(self, level, values):
        """Of a token, or of its sequence the ``"sequence"`` sum, mean or largest one; 0 where dead."""
        if level == "token":
            return [x if live else 0.0 for x, live in zip(values, self.live, strict=True)]
        found = [0.0] * len(values)
        for tokens in self.sequences():
            x = [values[t] for t in tokens]
            reduced = max(x) if level == "max" else math.fsum(x) / (len(x) if level == "sequence_mean" else 1)
            for t in tokens:
                found[t] = reduced
        return found

    def mean(self, values):
        return math.fsum(values[t] for t in self.tokens()) / max(len(self.tokens()), 1)

    def mean_of_sequences(self, values):
        means = [math.fsum(values[t] for t in tokens) / len(tokens) for tokens in self.sequences()]
        return math.fsum(means) / max(len(means), 1)

    def expect(self, trial, what, got, values):
        truth = torch.tensor([float(x) for x in values], dtype=torch.float64).view(self.batch.shape)
        trial.expect(what, got, truth, 8 * eps(got) * truth.abs())

    def expect_mask(self, trial, what, got, values):
        trial.expect(what, got, torch.tensor(values, dtype=torch.bool).view(self.batch.shape), 0.0)

    def expect_metrics(self, trial, what, got, truth):
        if set(got) != set(truth):
            trial.findings.append(f"{what} has the metrics {sorted(got)}, expected {sorted(truth)}")
        for name, x in truth.items():
            unit = 8 * eps(next(iter(got.values())))
            trial.expect(
                f"{name} of {what}", got.get(name), torch.tensor(float(x), dtype=torch.float64), unit * (1 + abs(x))
            )

    def gate(self, kind, level):
        """What the mask of ``rollout_weights`` compares with its bounds."""
        if kind == "ratio":
            return [math.exp(x) for x in self.at(level, self.gap)]
        found = []
        for t, live in enumerate(self.live):
            if not live:
                found.append(0.0)
                continue
            a, b = (min(max(math.exp(x[t]), 1e-6), 1 - 1e-6) for x in (self.rollout, self.old))
            divergence = a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b))
            found.append(abs(a - b) if kind == "tv" else divergence)
        return self.at(level, found)


@case("valid")
def rollout_weights(trial):
    draw, of = trial.draw, Mismatch(trial.draw)
    level, gate, gate_level = draw.choice(LEVELS), draw.choice(("ratio", "ratio", "kl", "tv")), None
    low, high = draw.choice(((None, 1.7), (0.6, 1.7), (0.6, None), (None, None)))
    mode = "mask" if draw.flag(0.5) and (low, high) != (None, None) else "clip"
    options = {"level": level, "mode": mode, "batch_normalize": draw.flag(0.4)}
    if mode == "mask":
        gate_level = draw.choice((None, *LEVELS))
        low, high = (low, high) if gate == "ratio" else (None, draw.choice((0.05, 0.3)))
        options |= {"gate": gate, "gate_level": gate_level}
    options |= {"low": None if low is None else draw.number(low), "high": None if high is None else draw.number(high)}
    # A tensor of float32 is another number.
    low, high = (None if options[name] is None else float(options[name]) for name in ("low", "high"))
    asked = draw.flag(0.4)
    if options["batch_normalize"] and draw.flag(0.4):
        options["batch_mean"] = draw.number(draw.choice((0, 0.5, 2.0)))
    got = trial.call("rollout_weights", *of.arguments, return_metrics=asked, **options, **of.options)
    weights = [math.exp(x) for x in of.at(level, of.gap)]
    compared = of.gate(gate, gate_level or level) if mode == "mask" else weights
    out = [live and beyond(x, low, high) for x, live in zip(compared, of.live, strict=True)]
    if mode == "clip":
        weights = [clipped(x, low, high) for x in weights]
    weights = [0.0 if not live or mode == "mask" and o else x for x, o, live in zip(weights, out, of.live, strict=True)]
    divisor = 1.0
    if options["batch_normalize"]:
        mean = options.get("batch_mean", (of.mean if level == "token" else of.mean_of_sequences)(weights))
        divisor = float(mean) or 1.0
    what = f"{mode} at {level} by {gate} of {gate_level}"
    of.expect(trial, f"weights, {what}", got[0] if asked else got, [x / divisor for x in weights])
    if asked:
        mean, square = of.mean(weights), of.mean([x * x for x in weights])
        truth = {
            "rollout_weight": mean,
            "rollout_weight_ess": mean * mean / square if square else 0.0,
            "rollout_filtered": of.mean(out),
        }
        of.expect_metrics(trial, what, got[1], truth)


@case("valid")
def rejection_mask(trial):
    draw, of = trial.draw, Mismatch(trial.draw)
    names, asked = draw.sample(sorted(RULES), draw.choice((1, 1, 2, 3))), draw.flag(0.5)
    rules = {name: draw.choice(RULES[name]) for name in names}
    got = trial.call("rejection_mask", *of.arguments, rules=rules, return_metrics=asked, **of.options)
    gap = [min(max(x, -20.0), 20.0) for x in of.gap]
    kept = list(of.live)
    for name, bound in rules.items():
        level, estimator = name.rsplit("_", 1)
        each = {"k1": [-x for x in gap], "k2": [x * x / 2 for x in gap], "k3": [math.expm1(x) - x for x in gap]}[
            estimator
        ]
        low, high = (None, bound) if estimator != "k1" else bound if isinstance(bound, tuple) else (1 / bound, bound)
        if estimator == "k1":
            low, high = math.log(low), math.log(high)
        places = {"token": "token", "seq_sum": "sequence", "seq_mean": "sequence_mean", "seq_max": "max"}
        values = of.at(places[level], each)
        kept = [k and not beyond(x, low, high) for k, x in zip(kept, values, strict=True)]
    of.expect_mask(trial, f"mask by {names}", got[0] if asked else got, kept)
    if asked:
        touched = [not all(kept[t] for t in tokens) for tokens in of.sequences()]
        truth = {"rejected_tokens": of.mean([not k for k in kept])}
        truth["touched_sequences"] = sum(touched) / max(len(touched), 1)
        of.expect_metrics(trial, f"{names}", got[1], truth)


@case("valid")
def rho_correction(trial):
    draw, of = trial.draw, Mismatch(trial.draw)
    level, tv = draw.choice(LEVELS), draw.flag(0.4)
    limit = draw.choice((10.0, 10.0, None, 0.4))
    bounds = {"mask_low": (0.1, 0.6), "mask_high": (0.3, 1.7), "clamp_low": (0.7, 0.8), "clamp_high": (1.3, 1.5)}
    given = {name: draw.choice(values) for name, values in bounds.items() if draw.flag(0.5)}
    if given.get("mask_low", 0.0) > given.get("mask_high", 9.0):
        del given["mask_low"]
    options = {**given, "level": level, "gate": "tv" if tv else "ratio"}
    if limit != 10.0 or draw.flag(0.3):
        options["log_ratio_clamp"] = limit
    signs = None
    if tv:
        if draw.flag(0.5) and not of.batch.is_ambiguous():
            options["advantages"] = draw.column(of.batch.live)
            signs = options["advantages"].double().flatten().tolist()
        else:
            options["advantages"], signs = per_sequence(draw, of.batch, torch.float32)
            signs = signs.flatten().tolist()
    got = trial.call("rho_correction", *of.arguments, **options, **of.options)
    gap = of.gap if limit is None else [min(max(x, -limit), limit) for x in of.gap]
    rho = [math.exp(x) for x in of.at(level, gap)]
    low, high = given.get("mask_low"), given.get("mask_high")
    dropped = [beyond(x, low, high) for x in rho]
    if tv:
        far = of.at(
            "sequence_mean", [abs(math.exp(x) - 1) if live else 0.0 for x, live in zip(gap, of.live, strict=True)]
        )
        dropped = [beyond(x, low, high) and q * a > 0 for x, q, a in zip(far, gap, signs, strict=True)]
    truth = [
        clipped(x, given.get("clamp_low"), given.get("clamp_high")) if live and not out else 0.0
        for x, out, live in zip(rho, dropped, of.live, strict=True)
    ]
    of.expect(trial, f"weights at {level}, {sorted(given)}", got, truth)


@case("valid")
def off_policy_sequence_mask(trial):
    draw, of = trial.draw, Mismatch(trial.draw)
    now, old, mask = of.arguments[1], of.arguments[0], of.arguments[2]
    if draw.flag(0.5) and not of.batch.is_ambiguous():
        advantages = draw.column(of.batch.live)
        signs = advantages.double()
    else:
        advantages, signs = per_sequence(draw, of.batch, draw.choice((torch.float32, torch.bfloat16, torch.float64)))
    delta = draw.choice((0, 0.1, 0.4))
    packing = of.batch.packing()
    got = trial.call("off_policy_sequence_mask", now, old, advantages, mask, delta=draw.number(delta), **packing)
    gap = [0.0 if x != x else x for x in (old.double() - now.double()).flatten().tolist()]
    drift = of.at("sequence_mean", gap)
    kept = [
        live and (a >= 0 or d <= delta) for live, a, d in zip(of.live, signs.flatten().tolist(), drift, strict=True)
    ]
    of.expect_mask(trial, "mask", got, kept)


@case("valid")
def m2po_mask(trial):
    draw, of = trial.draw, Mismatch(trial.draw, packing=False)
    threshold = draw.choice((0, 0.03, 0.3, 1.1, 9.0))
    got = trial.call("m2po_mask", *of.arguments, threshold=draw.number(threshold), **of.options)
    rest = sorted(of.tokens(), key=lambda t: -(of.gap[t] ** 2))
    while len(rest) > 1 and math.fsum(of.gap[t] ** 2 for t in rest) / len(rest) >= threshold:
        rest.pop(0)
    of.expect_mask(trial, f"mask under {threshold}", got, [t in rest for t in range(len(of.live))])


@case("valid")
def rollout_metrics(trial):
    of = Mismatch(trial.draw)
    if of.batch.packed and trial.draw.flag(0.3):
        del of.options["cu_seqlens"]
    got = trial.call("rollout_metrics", *of.arguments, **of.options)
    ratio, tokens = [math.exp(q) if live else 0.0 for q, live in zip(of.gap, of.live, strict=True)], of.tokens()
    apart = [
        abs(math.exp(a) - math.exp(b)) if live else 0.0 for a, b, live in zip(of.old, of.rollout, of.live, strict=True)
    ]
    square = of.mean([r * r for r in ratio])
    truth = {
        "rollout_kl": of.mean([-q for q in of.gap]),
        "rollout_k3": of.mean([r - 1 - q for r, q in zip(ratio, of.gap, strict=True)]),
        "rollout_ratio": of.mean(ratio),
        "rollout_ratio_min": min((ratio[t] for t in tokens), default=0.0),
        "rollout_ratio_max": max((ratio[t] for t in tokens), default=0.0),
        "rollout_tv": of.mean([abs(r - 1) / 2 for r in ratio]),
        "rollout_chi2": square - 1.0 if tokens else 0.0,
        "rollout_ess": of.mean(ratio) ** 2 / square if tokens else 0.0,
        "rollout_prob_gap": of.mean(apart),
        "rollout_prob_gap_max": max((apart[t] for t in tokens), default=0.0),
        "rollout_unscored": of.mean(of.unscored),
    }
    if not of.batch.packed or "cu_seqlens" in of.options:
        sums = [math.fsum(of.gap[t] for t in tokens) for tokens in of.sequences()]
        truth["rollout_sequence_kl"] = -math.fsum(sums) / max(len(sums), 1)
        truth["rollout_sequence_ratio_max"] = max((math.exp(x) for x in sums), default=0.0)
    of.expect_metrics(trial, "the mismatch", got, truth)


@case("valid")
def top_entropy_mask(trial):
    draw = trial.draw
    batch, fraction = Batch(draw), draw.choice((0.125, 0.25, 0.5, 1))
    entropy = draw.uniform(batch.shape, 0.0, 4.0, draw.choice((torch.float32, *FLOATS)))
    entropy = draw.laid_out(draw.with_garbage(entropy, batch.live), keep=True)
    got = trial.call("top_entropy_mask", entropy, batch.mask, fraction)
    values = entropy.double()[batch.live]
    bound = torch.quantile(values, 1 - fraction).item() if values.numel() else 0.0
    trial.expect(f"mask of {fraction}", got, batch.live & (entropy.double() >= bound), 0.0)
