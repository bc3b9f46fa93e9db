"""Sums and means of sequences, aggregations, advantages of tokens, whitening, spans: each against a loop."""

import math

import torch

import rlkernels
from fuzz.batches import MODES, Batch, draw_normalizers, true_weights
from fuzz.draws import FLOATS, NAN, leaf, wide
from fuzz.trial import EPS64, case, eps


def check(trial, what, got, truth, size, given, truth_of, steep=0.0):
    """A result and the gradient of one input; ``size``: of the terms that an element of the result is a sum of,
    ``steep``: of those of the gradient.
    """
    unit = 16 * eps(given)
    trial.expect(what, got, truth, unit * size)
    g = trial.draw.normal(truth.shape, got.dtype)
    (found,) = trial.gradients([got], [given], [g])
    (want,) = torch.autograd.grad(truth, truth_of, g.double(), allow_unused=True)
    want = torch.zeros(given.shape, dtype=torch.float64) if want is None else want
    trial.expect(
        f"gradient of {what}",
        found,
        want,
        unit * (want.abs() + steep + (1 + want.abs().max() if want.numel() else 0.0)),
    )


def values_of(draw, batch):
    return leaf(
        draw.with_garbage(
            draw.laid_out(draw.normal(batch.shape, draw.choice((torch.float32, *draw.floats)))), batch.live
        )
    )


def reduced(trial, name, means):
    batch = Batch(trial.draw)
    x = values_of(trial.draw, batch)
    got = trial.call(name, x, batch.mask, batch.offsets)
    truth_of = wide(x)
    truth, size = (batch.means(y) if means else batch.sums(y) for y in (truth_of, truth_of.detach().abs()))
    check(trial, name, got, truth, size, x, truth_of)


@case("valid")
def sequence_sums(trial):
    reduced(trial, "sequence_sums", False)


@case("valid")
def sequence_means(trial):
    reduced(trial, "sequence_means", True)


@case("valid")
def broadcast_to_tokens(trial):
    draw = trial.draw
    batch = Batch(draw)
    x = leaf(draw.laid_out(draw.normal((batch.count,), draw.dtype())))
    got = trial.call("broadcast_to_tokens", x, draw.masked(batch.live), batch.offsets)
    truth_of = wide(x)
    truth = torch.where(batch.live, batch.spread(truth_of), 0.0)
    check(trial, "broadcast_to_tokens", got, truth, truth.detach().abs(), x, truth_of)


@case("valid")
def aggregate(trial):
    draw = trial.draw
    batch, mode = Batch(draw), draw.choice(MODES)
    normalizers, x = draw_normalizers(draw, mode, batch), values_of(draw, batch)
    given, times = dict(draw.choice(({}, {"dtype": torch.float64}))), None
    if draw.flag(0.2):
        times = draw.among(batch.shape, (0.0, 0.5, 1.0, 3.0), draw.choice(FLOATS))
        given["weights"] = draw.laid_out(draw.with_garbage(times, batch.live), keep=True)
    got = trial.call("aggregate", x, batch.mask, mode, **batch.packing(), **normalizers, **given)
    truth_of, weights = wide(x), true_weights(mode, batch, normalizers, None if times is None else times.double())
    terms = weights * torch.where(batch.live, truth_of, 0.0)
    check(trial, f"aggregate by {mode}", got, terms.sum(), terms.detach().abs().sum(), x, truth_of)


@case("valid")
def token_weights(trial):
    draw = trial.draw
    batch, mode = Batch(draw), draw.choice(MODES)
    normalizers, dtype = draw_normalizers(draw, mode, batch), draw.choice((torch.float32, torch.float64))
    got = trial.call("token_weights", draw.masked(batch.live), mode, dtype=dtype, **batch.packing(), **normalizers)
    truth = true_weights(mode, batch, normalizers)
    trial.expect(f"weights of {mode}", got, truth, 8 * eps(got) * truth.abs())


class Steps:
    """Sequences of rewards (and values), discounted by a loop from the back."""

    def __init__(self, draw):
        self.batch, self.masked = Batch(draw), draw.choice(("skip", "zero", "none"))
        self.gamma, self.live = draw.choice((0, 0.9, 1.0, 1)), self.batch.live
        if self.masked == "none":
            self.live = torch.ones(self.batch.shape, dtype=torch.bool)
        self.options = {"gamma": self.gamma, "masked": self.masked, **self.batch.packing()}

    def loop(self, rewards, values, lam, bootstrap=None):
        """``(advantages, returns)``. With ``"zero"`` a dead token is a step of reward and value 0."""
        batch, live = self.batch, self.live.flatten().tolist()
        rewards, values = rewards.flatten().tolist(), values.flatten().tolist()
        advantages, returns = ([0.0] * len(rewards) for _ in range(2))
        for s in range(batch.count):
            following = 0.0 if bootstrap is None else bootstrap[s]
            trace, begun = 0.0, False
            decay = self.gamma * (lam[s] if isinstance(lam, list) else lam)
            for t in reversed([t for t in range(len(rewards)) if batch.sequence[t] == s]):
                if live[t]:
                    trace = rewards[t] + self.gamma * following - values[t] + decay * trace
                    following, begun = values[t], True
                    advantages[t], returns[t] = trace, trace + values[t]
                elif self.masked == "reset":
                    trace = following = 0.0
                elif self.masked == "zero" and begun:
                    trace, following = self.gamma * following + decay * trace, 0.0
        return [torch.tensor(x, dtype=torch.float64).view(batch.shape) for x in (advantages, returns)]

    def expect(self, trial, names, got, truth, unit):
        length = max(self.batch.shape[-1], 1)
        for name, g, x in zip(names, got, truth, strict=True):
            trial.expect(
                f"{name}, masked={self.masked}", g, x, 16 * unit * length * (1 + x.abs().max() if x.numel() else x)
            )


@case("valid")
def gae(trial):
    draw = trial.draw
    steps, lam = Steps(draw), draw.choice((0, 0.5, 0.95, 1.0))
    if draw.flag(0.3):
        lam = draw.laid_out(draw.uniform((steps.batch.count,), 0.0, 1.0, draw.choice((torch.float32, torch.float64))))
    seen = steps.live  # with masked="none" what a dead position holds counts
    rewards, values = draw.column(seen), draw.column(seen)
    bootstrap = (
        draw.laid_out(draw.normal((steps.batch.count,), draw.choice((torch.float32, torch.float64))))
        if draw.flag(0.4)
        else None
    )
    got = trial.call("gae", rewards, values, steps.batch.mask, lam=lam, bootstrap_values=bootstrap, **steps.options)
    lam = lam.tolist() if isinstance(lam, torch.Tensor) else lam
    real = torch.float64 if torch.float64 in (rewards.dtype, values.dtype) else torch.float32
    ends = None if bootstrap is None else bootstrap.to(real).tolist()
    steps.expect(
        trial, ("advantages", "returns"), got, steps.loop(rewards.double(), values.double(), lam, ends), eps(got[0])
    )


@case("valid")
def discounted_returns(trial):
    draw = trial.draw
    steps = Steps(draw)
    if draw.flag(0.2):
        steps.masked = steps.options["masked"] = "reset"
        steps.live = steps.batch.live
    rewards = draw.column(steps.live)
    got = trial.call("discounted_returns", rewards, steps.batch.mask, **steps.options)
    truth = steps.loop(rewards.double(), torch.zeros(rewards.shape), 1.0)[1]
    steps.expect(trial, ("returns",), (got,), (truth,), eps(got))


@case("valid")
def best_of_n(trial):
    draw = trial.draw
    size, count = draw.choice((0, 1, 5, 9)), draw.choice((1, 2, 4))
    rewards = draw.normal((size,), draw.choice((torch.float32, *draw.floats))).round()
    rewards = draw.laid_out(torch.where(draw.coins((size,), 0.2), NAN, rewards).to(rewards.dtype))
    ids = draw.integers(0, 3, (size,))
    got = trial.call("best_of_n", rewards, draw.laid_out(ids, keep=True), count=count)
    truth, values = torch.zeros(size, dtype=torch.float64), rewards.double().tolist()
    for group in set(ids.tolist()):
        scored = [i for i in range(size) if ids[i] == group and not math.isnan(values[i])]
        truth[sorted(scored, key=lambda i: (-values[i], i))[:count]] = 1.0
    trial.expect("selected", got.double(), truth, 0.0)


@case("valid")
def masked_whiten(trial):
    draw = trial.draw
    shape = draw.choice(((0,), (1,), (5,), (2, 3), (3, 0), (2, 3, 4)))
    live = draw.coins(shape, draw.choice((0.0, 0.5, 1.0)))
    mask = draw.masked(live) if draw.flag(0.8) else None
    live = live if mask is not None else torch.ones(shape, dtype=torch.bool)
    x = leaf(draw.with_garbage(draw.laid_out(draw.normal(shape, draw.dtype(), 2.0)), live))
    shift, unbiased, small, add, dim = (
        draw.flag(0.5),
        draw.flag(0.5),
        draw.choice((1e-8, 1e-5, 0.1)),
        draw.flag(0.5),
        draw.choice((None, -1, 0)),
    )
    moments = None
    if draw.flag(0.2):
        moments = rlkernels.Moments(draw.number(9), draw.number(draw.choice((0.5, -1.0))), draw.number(20.0))
    got = trial.call(
        "masked_whiten",
        x,
        mask,
        moments=moments,
        shift_mean=shift,
        unbiased=unbiased,
        eps=small,
        eps_mode="add" if add else "clamp",
        dim=dim,
    )
    truth_of, along = wide(x), tuple(range(len(shape))) if dim is None else dim
    count = live.sum(along, keepdim=True)
    mean = torch.where(live, truth_of, 0.0).sum(along, keepdim=True) / count.clamp(min=1)
    if moments is not None:
        mean = torch.full_like(mean, float(moments.mean), requires_grad=False)
    gap = torch.where(live, truth_of - mean, 0.0)
    variance = gap.square().sum(along, keepdim=True) / (count - int(unbiased)).clamp(min=1)
    if moments is not None:
        variance = torch.full_like(mean, 20.0 / (9 - int(unbiased)))
    if bool((variance.detach() < 1e-9).any()):
        spread = torch.where(variance.detach() < 1e-9, 0.0, 1.0)  # equal elements: 0, without a derivative to speak of
        truth = torch.where(live, gap * spread * (variance + 1.0).rsqrt() * 0.0 + (0.0 if shift else mean), 0.0)
        alone = variance.detach().expand(shape) < 1e-9
        trial.expect(
            "whitened equal elements",
            torch.where(alone, got, 0.0),
            torch.where(alone, truth, 0.0),
            1e-6 * (1 + truth.detach().abs()),
        )
        return
    y = gap * (variance + small if add else variance.clamp(min=small)).rsqrt()
    truth = torch.where(live, y if shift else y + mean, 0.0)
    steep = (
        8 * float((variance.detach() + small if add else variance.detach().clamp(min=small)).rsqrt().max())
        if variance.numel()
        else 0.0
    )
    check(trial, "masked_whiten", got, truth, 4 + truth.detach().abs(), x, truth_of, steep)


@case("valid")
def spans_to_mask(trial):
    draw = trial.draw
    shape, count, length, shift = (
        draw.choice(((), (2,), (0,), (2, 3))),
        draw.choice((0, 1, 3)),
        draw.choice((1, 2, 5, 8)),
        draw.flag(0.5),
    )
    spans = draw.integers(0, 9, (*shape, count, 2)).sort(-1).values
    got = trial.call("spans_to_mask", draw.laid_out(spans, keep=True), length, shift=shift)
    places = range(1 if shift else 0, length)
    rows = [
        [any(a <= t < b for a, b in row) for t in places] for row in spans.reshape(math.prod(shape), count, 2).tolist()
    ]
    trial.expect("mask of spans", got, torch.tensor(rows, dtype=torch.bool).reshape(*shape, len(places)), 0.0)


def moments_of(values):
    """Count, mean and sum of squared deviations of a list of numbers."""
    mean = math.fsum(values) / max(len(values), 1)
    return len(values), mean, math.fsum((x - mean) ** 2 for x in values)


def expect_moments(trial, what, got, truth):
    """``truth``: moments of each slice, shaped like the results."""
    columns = zip(*truth, strict=True) if truth else ((), (), ())
    for name, g, x in zip(("count", "mean", "squares"), got, columns, strict=True):
        x = torch.tensor(x, dtype=torch.float64).view(g.shape)
        trial.expect(f"{name} of {what}", g, x, 16 * EPS64 * (1 + x.abs()))


def elements(draw, shape):
    """Numbers of any kind, and which of them are live: ``(argument, mask, live, float64)``."""
    live = draw.coins(shape, draw.choice((0.0, 0.5, 1.0)))
    mask = draw.masked(live) if draw.flag(0.8) else None
    live = live if mask is not None else torch.ones(shape, dtype=torch.bool)
    x = draw.normal(shape, torch.float64, 3.0).to(draw.choice((torch.bool, torch.int64, torch.int32, *FLOATS)))
    x = draw.with_garbage(x, live) if x.is_floating_point() else x
    x = draw.laid_out(x, keep=True)
    return x, mask, live, x.double()


@case("valid")
def masked_moments(trial):
    draw = trial.draw
    shape = draw.choice(((), (0,), (1,), (5,), (2, 3), (3, 0), (2, 3, 4)))
    x, mask, live, wide_x = elements(draw, shape)
    dim = draw.choice((None, None, -1, 0, (0, 1))) if shape else None
    dim = 0 if dim == (0, 1) and len(shape) < 2 else dim
    got = trial.call("masked_moments", x, mask, dim=dim)
    along = (
        tuple(range(len(shape))) if dim is None else tuple(d % len(shape) for d in (dim if dim == (0, 1) else (dim,)))
    )
    places = [i for i in range(len(shape)) if i not in along]
    rows = torch.stack([wide_x, live.double()]).permute(0, *(i + 1 for i in (*places, *along)))
    rows = rows.reshape(2, math.prod(shape[i] for i in places), math.prod(shape[i] for i in along)).tolist()
    truth = [moments_of([y for y, alive in zip(*row, strict=True) if alive]) for row in zip(*rows, strict=True)]
    kept = [1 if i in along else n for i, n in enumerate(shape)]
    if list(got[1].shape) != ([] if dim is None else kept):
        trial.findings.append(f"the mean has shape {tuple(got[1].shape)}, along {dim} of {shape}")
        return
    expect_moments(trial, f"{x.dtype} along {dim}", got, truth)


@case("valid")
def merge_moments(trial):
    draw = trial.draw
    parts = [draw.normal((draw.choice((0, 1, 2, 5)),), torch.float64, 3.0).tolist() for _ in range(draw.randint(1, 4))]
    offset = draw.choice((0.0, 0.0, 100.0))
    parts = [[x + offset for x in part] for part in parts]
    given = [moments_of(part) for part in parts]
    if draw.flag(0.5):
        given = [tuple(torch.tensor(x, dtype=torch.float64) for x in part) for part in given]
    got = trial.call("merge_moments", [rlkernels.Moments(*part) for part in given])
    expect_moments(trial, "all parts", got, [moments_of([x for part in parts for x in part])])
