"""Losses of reward models of steps, spans and lists, and the scores that are picked out: each against a loop."""

import itertools
import math

import torch
from torch.nn.functional import logsigmoid

from fuzz.batches import Batch
from fuzz.draws import FLOATS, leaf, wide
from fuzz.policies import expect_metrics, with_metrics
from fuzz.terms import Sum, Weighting
from fuzz.trial import case, eps


def scores_of(draw, shape, live=None, scale=1.0):
    """Scores as a leaf of any dtype and layout, with garbage where nobody may look."""
    x = draw.normal(shape, draw.choice((torch.float32, *draw.floats)), scale)
    return leaf(draw.laid_out(x if live is None else draw.with_garbage(x, live), keep=True))


def check_total(trial, what, results, truths, sizes, given, truth_of):
    """Results and the gradient of ``given`` under drawn cotangents; ``sizes``: of the terms of each result."""
    unit, ups = 64 * eps(given), []
    for i, (got, truth, size) in enumerate(zip(results, truths, sizes, strict=True)):
        trial.expect(f"result {i} of {what}", got, truth, unit * (size + truth.detach().abs()))
        ups.append(trial.draw.normal(truth.shape, got.dtype))
    (found,) = trial.gradients(results, [given], ups)
    total = sum((x * up.double()).sum() for x, up in zip(truths, ups, strict=True))
    (want,) = torch.autograd.grad(total, truth_of, allow_unused=True) if total.requires_grad else (None,)
    want = torch.zeros(given.shape, dtype=torch.float64) if want is None else want
    reach = 1 + float(want.abs().max()) if want.numel() else 0.0
    trial.expect(f"gradient of {what}", found, want, unit * (want.abs() + reach))


@case("valid")
def span_reward_loss(trial):
    draw = trial.draw
    pairs, length, pad, skipped = draw.choice((0, 1, 2, 4)), draw.choice((1, 2, 5, 9)), draw.choice((0, -1, 7)), 0
    ids = draw.integers(1, 4, (2, pairs, length))
    ids[1] = torch.where(draw.coins((pairs, length), draw.choice((0.0, 0.3, 1.0))), ids[1], ids[0])
    ids = torch.where(draw.coins(ids.shape, draw.choice((0.0, 0.3))), pad, ids)
    options = {"allow_first_difference": True} if bool((ids[0] != ids[1])[:, 0].any()) or draw.flag(0.3) else {}
    if draw.flag(0.3):
        options["num_padding_at_beginning"] = skipped = draw.choice((0, 1, 2))
    normalizers = {"num_sequences": draw.number(draw.choice((0, 3)))} if draw.flag(0.3) else {}
    normalizers |= draw.choice(({}, {}, {"count_empty_rows": True}, {"scale": 0.5, "dp_size": 2}))
    if normalizers:
        options["normalizers"] = normalizers
    rewards, given_ids = (
        scores_of(draw, (2 * pairs, length)),
        ids.view(-1, length).to(draw.choice((torch.int32, torch.int64))),
    )
    got = trial.call("span_reward_loss", rewards, draw.laid_out(given_ids, keep=True), pad, **options)
    x, spans, ends = wide(rewards), [], []
    for c, r in zip(*ids.tolist(), strict=True):
        ends.append([])
        for row in (c, r):
            places = [t for t, token in enumerate(row) if token == pad]
            ends[-1].append(places[skipped] if len(places) > skipped else length)
        first = next((t for t in range(length) if c[t] != r[t]), None)
        spans.append([length - 1] if first is None else list(range(first, max(ends[-1]))))
    counted = pairs if normalizers.get("count_empty_rows") else sum(bool(span) for span in spans)
    counted = float(normalizers.get("num_sequences", counted))
    share = normalizers.get("scale", 1.0) * normalizers.get("dp_size", 1) / counted if counted else 0.0
    total = Sum(x.sum() * 0.0)
    for i, span in enumerate(spans):
        for t in span:
            total = total.plus(
                torch.tensor(share / len(span), dtype=torch.float64), -logsigmoid(x[i, t] - x[i + pairs, t])
            )
    last = (
        [x[range(k * pairs, (k + 1) * pairs), [end[k] - 1 for end in ends]] for k in range(2)]
        if pairs
        else [x.new_zeros(0)] * 2
    )
    check_total(trial, f"{rewards.dtype}", got, (total.value, *last), (total.size, 1.0, 1.0), rewards, x)


@case("valid")
def rank_list_loss(trial):
    draw = trial.draw
    kind, aggregation = draw.choice(("logsigmoid", "sigmoid")), draw.choice(("pair-mean", "list-mean"))
    lengths = [draw.choice((0, 1, 2, 3, 5)) for _ in range(draw.choice((0, 1, 2, 4)))]
    positional, shape = (), (sum(lengths),)
    if draw.flag(0.5):
        shape = draw.choice(((3, 4), (2, 2, 3), (0, 3), (4, 0), (1, 5)))
        lengths = [shape[-1]] * math.prod(shape[:-1])
    else:
        positional = (draw.choice((lengths, draw.laid_out(torch.tensor(lengths, dtype=torch.int64), keep=True))),)
    live = draw.coins(shape, draw.choice((0.4, 0.8, 1.0)))
    mask = draw.masked(live) if draw.flag(0.7) else None
    live = live if mask is not None else torch.ones(shape, dtype=torch.bool)
    scores = scores_of(draw, shape, live)
    options = {"mask": mask, "kind": kind, "aggregation": aggregation}
    loss, metrics = with_metrics(trial, "rank_list_loss", scores, *positional, **options)
    x = wide(scores)
    flat, lists, start = x.view(-1), [], 0
    for n in lengths:
        alive = [t for t in range(start, start + n) if live.flatten()[t]]
        lists.append(list(itertools.combinations(alive, 2)))
        start += n
    lists = [pairs for pairs in lists if pairs]
    count, total = sum(map(len, lists)), Sum(torch.where(live, x, 0.0).sum() * 0.0)
    for pairs in lists:
        weight = 1.0 / (count if aggregation == "pair-mean" else len(lists) * len(pairs))
        for a, b in pairs:
            gap = flat[a] - flat[b]
            total = total.plus(
                torch.tensor(-weight, dtype=torch.float64), logsigmoid(gap) if kind == "logsigmoid" else gap.sigmoid()
            )
    check_total(trial, f"{kind}, {aggregation}", (loss,), (total.value,), (total.size,), scores, x)
    sorted_ = [[bool(flat[a] > flat[b]) for a, b in pairs] for pairs in lists]
    accuracy = sum(map(all, sorted_)) / max(len(lists), 1), sum(map(sum, sorted_)) / max(count, 1)
    truth = dict(zip(("accuracy", "pair_accuracy"), torch.tensor(accuracy, dtype=torch.float64), strict=True))
    expect_metrics(trial, kind, metrics, truth, eps(loss))


class Steps:
    """Logits of a batch, labels at the ends of steps, and which tokens those are."""

    def __init__(self, draw, batch):
        self.soft = draw.flag(0.4)
        vocab = draw.choice((2, 3, 7, 33))
        self.columns = list(range(vocab))
        self.options = {}
        if self.soft or draw.flag(0.4):
            self.columns = draw.sample(range(vocab), 2 if self.soft else draw.randint(1, vocab))
            given = draw.laid_out(torch.tensor(self.columns), keep=True)
            self.options["reward_token_ids"] = draw.choice((self.columns, tuple(self.columns), given))
        ignore = draw.choice((-100, -100, 0, -1)) if self.soft else draw.choice((-100, -100, vocab))
        if ignore != -100 or draw.flag(0.2):
            self.options["ignore_index"] = ignore
        ends, self.ids = torch.ones(batch.shape, dtype=torch.bool), ()
        if draw.flag(0.6):
            ends = draw.coins(batch.shape, 0.6)
            ids = torch.where(ends, 9, draw.integers(0, 9, batch.shape)).to(draw.choice((torch.int32, torch.int64)))
            self.ids = (draw.laid_out(ids, keep=True), 9)
        ignored = draw.coins(batch.shape, 0.2)
        if self.soft:
            labels = draw.among(batch.shape, (0.125, 0.25, 0.5, 0.75, 1.0), draw.choice(FLOATS))
        else:
            labels = torch.tensor(self.columns)[draw.integers(0, len(self.columns), batch.shape)]
            labels = labels.to(draw.choice((torch.int32, torch.int64)))
        labels = torch.where(ignored, ignore, labels).to(labels.dtype)
        steps, batch.live = batch.live & ends, batch.live & ends & ~ignored
        self.counted = steps if self.ids else batch.live
        # Nobody looks at the label of what is no step.
        garbage = draw.choice((5e4, math.nan, -1.0) if self.soft else (vocab + 5, -7, 2**31 - 1))
        given = torch.where(steps | draw.coins(batch.shape, 0.5), labels, garbage).to(labels.dtype)
        self.labels, self.given = labels, draw.laid_out(given, keep=True)
        x = draw.normal((*batch.shape, vocab), draw.dtype(), draw.choice((0.5, 2)))
        self.x = leaf(draw.laid_out(draw.with_garbage(x, batch.live[..., None]), keep=True))
        self.wide = torch.where(batch.live[..., None], self.x.detach().double(), 0.0).requires_grad_()

    def truth(self, batch):
        """Of each token its loss, and whether the largest column is that of its label."""
        chosen = self.wide[..., self.columns]
        log_p = chosen.log_softmax(-1)
        if self.soft:
            p = torch.where(batch.live, self.labels.double(), 0.0)
            right = (chosen[..., 0] >= chosen[..., 1]) == (p >= 0.5)
            return -p * log_p[..., 0] - (1 - p) * log_p[..., 1], right
        place = torch.zeros(batch.shape, dtype=torch.int64)
        for i, column in enumerate(self.columns):
            place[self.labels == column] = i
        at = place[..., None]
        return -log_p.gather(-1, at)[..., 0], chosen.gather(-1, at)[..., 0] == chosen.amax(-1)


@case("valid")
def process_reward_loss(trial):
    draw = trial.draw
    batch = Batch(draw)
    steps = Steps(draw, batch)
    weighting = Weighting(draw, batch)
    options = {"mask": batch.mask, **steps.options, **weighting.options, **batch.packing()}
    loss, metrics = with_metrics(trial, "process_reward_loss", steps.x, steps.given, *steps.ids, **options)
    each, right = steps.truth(batch)
    total, what = Sum(steps.wide.sum() * 0.0).plus(weighting.truth(batch), each), f"{steps.soft}, {weighting.mode}"
    check_total(trial, f"{what}, {steps.x.dtype}", (loss,), (total.value,), (total.size,), steps.x, steps.wide)
    accuracy = (right & batch.live).sum().double() / steps.counted.sum().clamp(min=1)
    expect_metrics(trial, what, metrics, {"accuracy": accuracy}, eps(loss))


@case("valid")
def solution_scores(trial):
    draw = trial.draw
    batch, kind = Batch(draw), draw.choice(("min", "product"))
    x = draw.uniform(batch.shape, 0.0, 1.0, draw.choice((torch.float32, *FLOATS)))
    x = draw.laid_out(draw.with_garbage(x, batch.live), keep=True)
    got = trial.call("solution_scores", x, batch.mask, kind=kind, **batch.packing())
    steps = [[] for _ in range(batch.count)]
    for s, live, value in zip(
        batch.sequence.tolist(), batch.live.flatten().tolist(), x.double().flatten().tolist(), strict=True
    ):
        if live:
            steps[s].append(value)
    truth = torch.tensor(
        [math.prod(y) if kind == "product" else min(y, default=1.0) for y in steps], dtype=torch.float64
    )
    trial.expect(f"{kind} of steps", got, truth, 16 * eps(got) * truth)


@case("valid")
def end_scores(trial):
    draw = trial.draw
    count, form = draw.choice((0, 1, 2, 4)), draw.choice(("none", "mask", "ids", "packed"))
    length, options, positional = draw.choice((1, 2, 5)), {}, ()
    if form == "packed":
        lengths = [draw.choice((1, 2, 4)) for _ in range(count)]
        bounds = torch.tensor(
            [sum(lengths[:i]) for i in range(count + 1)], dtype=draw.choice((torch.int32, torch.int64))
        )
        options["cu_seqlens"], shape = draw.laid_out(bounds, keep=True), (sum(lengths),)
        last = (bounds[1:].long() - 1).tolist()
    else:
        shape, last = (count, length), [length - 1] * count
    if form == "mask":
        live = draw.coins(shape, 0.5)
        last = [max((t for t in range(length) if row[t]), default=length - 1) for row in live]
        positional = (draw.masked(live),)
    if form == "ids":
        ids, pad, prompt = draw.integers(0, 3, shape), draw.choice((0, 2, -1)), draw.choice((1, 1, 2, 9))
        last = [next((t for t in range(prompt, length) if row[t] == pad), length) - 1 for row in ids]
        options = {
            "input_ids": draw.laid_out(ids.to(draw.choice((torch.int32, torch.int64))), keep=True),
            "pad_id": pad,
        }
        options |= {"prompt_length": prompt} if prompt > 1 or draw.flag(0.5) else {}
    values = scores_of(draw, shape)
    got, ends = trial.call("end_scores", values, *positional, **options)
    x = wide(values)
    places = torch.tensor(last, dtype=torch.int64)
    trial.expect("ends", ends.double(), places.double(), 0.0)
    truth = x[places] if form == "packed" else x[torch.arange(count), places]
    check_total(trial, f"ends by {form}", (got,), (truth,), (0.0,), values, x)
