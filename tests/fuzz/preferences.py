"""Losses of pairs, of answers judged one by one, and of reward models, from log-probabilities and from
hidden states.
"""

import torch
from torch import sigmoid
from torch.nn.functional import logsigmoid

from fuzz.batches import Batch
from fuzz.draws import leaf, wide
from fuzz.heads import Head, check_loss
from fuzz.pairs import PairOptions, pair_metrics, true_dpo
from fuzz.policies import expect_loss, expect_metrics, upstream, with_metrics
from fuzz.terms import Sum
from fuzz.trial import case, eps

LOOSE = 8
"""Losses of differences of log-probabilities: how many times the error of a term exceeds what its own size allows."""


def sums_of(draw, shape, low=-6.0):
    """Log-probabilities of whole answers, as leaves."""
    return leaf(
        draw.laid_out(draw.uniform(shape, low, -0.05, draw.choice((torch.float32, torch.float32, *draw.floats))))
    )


def check_pairs_loss(trial, what, loss, total, given, truths):
    """``given``: trained arguments; ``truths``: their float64 leaves."""
    unit = eps(loss)
    expect_loss(trial, f"loss of {what}", loss, total, unit, 64 * LOOSE)
    up = upstream(trial.draw, loss)
    got = trial.gradients([loss], given, [up])
    want = (
        torch.autograd.grad(total.value, truths, up.double(), allow_unused=True)
        if total.value.requires_grad
        else [None] * len(truths)
    )
    for x, g, w in zip(given, got, want, strict=True):
        w = torch.zeros(x.shape, dtype=torch.float64) if w is None else w
        largest = w.abs().max() if w.numel() else 0.0
        size = w.abs() + largest + total.size * abs(float(up)) / max(x.numel(), 1)
        trial.expect(f"gradient of {what}, {x.dtype}", g, w, 64 * LOOSE * unit * size + torch.finfo(loss.dtype).tiny)


@case("valid")
def dpo_loss(trial):
    draw = trial.draw
    pairs = draw.choice((0, 1, 2, 3, 5, 8))
    chosen, rejected = sums_of(draw, (pairs,)), sums_of(draw, (pairs,))
    options = PairOptions(draw, pairs)
    refs = (None, None)
    if options.needs_reference or draw.flag(0.4):
        refs = tuple(
            draw.laid_out(
                draw.uniform((pairs,), -6.0, 0.0, draw.choice((torch.float32, torch.bfloat16, torch.float64)))
            )
            for _ in range(2)
        )
    loss, metrics = with_metrics(trial, "dpo_loss", chosen, rejected, *refs, **options.given)
    c, r = wide(chosen), wide(rejected)
    refs = [None if x is None else x.double() for x in refs]
    check_pairs_loss(trial, f"{options.names}", loss, true_dpo(c, r, *refs, options), [chosen, rejected], [c, r])
    expect_metrics(trial, f"{options.names}", metrics, pair_metrics(c, r, *refs, options), eps(loss))


class UnpairedOptions:
    """Options of a loss of single answers, and its truth."""

    def __init__(self, draw, count):
        self.name, self.beta = (
            draw.choice(("kto", "apo_zero_unpaired", "bco", "kto_paired_batch")),
            draw.choice((0.1, 1.0)),
        )
        self.class_weights = draw.choice((1.0, 0.0, 0.7)), draw.choice((1.0, 0, 1.3))
        self.given = {
            "loss_type": self.name,
            "beta": self.beta,
            "desirable_weight": self.class_weights[0],
            "undesirable_weight": self.class_weights[1],
        }
        self.good = draw.coins((count,), draw.choice((0.0, 0.5, 1.0)))
        self.desirable = draw.masked(self.good)
        self.baseline = 0.0
        if self.name == "bco":
            self.baseline = draw.choice((0.0, 0.3, -1.0))
            self.given["delta"] = draw.number(self.baseline)
        elif self.name == "kto" and draw.flag(0.5):
            self.baseline = draw.choice((0.0, 0.3))
            self.given["kl"] = draw.number(self.baseline)
        elif self.name == "kto":
            size = (draw.choice((0, 1, 4)),)
            drift = [draw.laid_out(draw.normal(size, draw.choice((torch.float32, torch.bfloat16)))) for _ in range(2)]
            self.baseline = max(0.0, float((drift[0].double() - drift[1].double()).sum() / max(size[0], 1)))
            self.given |= {"kl_logps": drift[0], "ref_kl_logps": drift[1]}

        self.lengths = torch.ones((), dtype=torch.float64)
        if draw.flag(0.2):
            lengths = draw.laid_out(draw.integers(0, 9, (count,)))
            self.given |= {"length_normalized": True, "lengths": lengths}
            self.lengths = lengths.double().clamp(min=1)

    def base(self):
        """The baseline as it was given: a number in float32 is not the decimal that was meant."""
        return float(self.given.get("kl", self.given.get("delta", self.baseline)))

    def metrics(self, logps, refs):
        rewards = self.beta * (logps.detach() - refs) / self.lengths
        found = {
            f"reward_{name}": torch.where(one, rewards, 0.0).sum() / one.sum().clamp(min=1)
            for name, one in (("desirable", self.good), ("undesirable", ~self.good))
        }
        return found | ({"kl": torch.tensor(self.base(), dtype=torch.float64)} if self.name == "kto" else {})

    def truth(self, logps, refs):
        rho, good, beta, n, base = (
            (logps - refs) / self.lengths,
            self.good,
            self.beta,
            max(self.good.numel(), 1),
            self.base(),
        )
        if self.name == "bco":
            x = beta * rho - base
            each = -logsigmoid(torch.where(good, x, -x))
        elif self.name == "kto_paired_batch":
            means = [(torch.where(one, rho, 0.0).sum() / one.sum().clamp(min=1)).clamp(min=0) for one in (good, ~good)]
            each = 1 - sigmoid(beta * torch.where(good, rho - means[1], means[0] - rho))
        else:
            each = 1 - sigmoid(beta * torch.where(good, rho - base, base - rho))
        weights = torch.where(good, *torch.tensor(self.class_weights, dtype=torch.float64))
        return Sum().plus(weights / n, each)


@case("valid")
def unpaired_preference_loss(trial):
    draw = trial.draw
    count = draw.choice((0, 1, 2, 5, 8))
    x, refs = (
        sums_of(draw, (count,)),
        draw.laid_out(draw.uniform((count,), -6.0, 0.0, draw.choice((torch.float32, torch.bfloat16, torch.float64)))),
    )
    options = UnpairedOptions(draw, count)
    loss, metrics = with_metrics(trial, "unpaired_preference_loss", x, refs, options.desirable, **options.given)
    truth = wide(x)
    check_pairs_loss(trial, options.name, loss, options.truth(truth, refs.double()), [x], [truth])
    expect_metrics(trial, options.name, metrics, options.metrics(truth, refs.double()), eps(loss))


@case("valid")
def pairwise_reward_loss(trial):
    draw = trial.draw
    shape, scale = draw.choice(((), (0,), (1,), (5,), (2, 3))), draw.choice((1, 30, 1000))
    given = [
        leaf(draw.laid_out(draw.normal(shape, draw.choice((torch.float32, *draw.floats)), scale)))
        for _ in range(3 if draw.flag(0.5) else 2)
    ]
    centre, kind, reduction = draw.choice((0.0, 0.1, 1.0)), "logsigmoid", draw.choice(("mean", "mean", "sum", "none"))
    live, weight = torch.ones(shape, dtype=torch.bool), torch.ones(shape, dtype=torch.float64)
    options = {"center_coef": centre}
    if draw.flag(0.3):
        live = draw.coins(shape, 0.6)
        options["mask"] = draw.masked(live)
        given = [leaf(draw.with_garbage(x.detach(), live)) for x in given]
    if draw.flag(0.3):
        weight = draw.among(shape, (0.0, 0.5, 2.0))
        options["pair_weights"] = draw.laid_out(draw.with_garbage(weight.float(), live), keep=True)
    if len(given) > 2:
        options["margin"] = given[2]
    elif draw.flag(0.5):
        options["kind"] = kind = draw.choice(("logexp", "logsigmoid"))
    if reduction != "mean" or draw.flag(0.2):
        options["reduction"] = reduction
    loss, metrics = with_metrics(trial, "pairwise_reward_loss", *given[:2], **options)
    truths = [wide(x) for x in given]
    c, r, *margin = (torch.where(live, x, 0.0) for x in truths)
    share = torch.where(live, weight / (max(int(live.sum()), 1) if reduction == "mean" else 1), 0.0)
    each, square = -logsigmoid(c - r - (margin[0] if margin else 0.0)), centre * (c + r).square()
    if reduction == "none":
        terms = (share * (each + square)).detach()
        trial.expect("terms", loss, terms, 64 * eps(loss) * (terms + share * (1 + c.abs() + r.abs()).detach()))
        loss = loss.sum()  # which has the gradient of the loss that is a sum
    total = Sum(sum(x.sum() for x in (c, r, *margin)) * 0.0).plus(share, each).plus(share, square)
    check_pairs_loss(trial, f"{given[0].dtype}, {kind}, {reduction}", loss, total, given, truths)
    count = live.sum().clamp(min=1)
    known = {"reward_chosen": c, "reward_rejected": r, "reward_margin": c - r, "accuracy": (c > r).double()}
    known = {name: x.detach().sum() / count for name, x in known.items()}
    reach = 1 + max((float(x.detach().abs().max()) for x in (c, r) if x.numel()), default=0.0)
    expect_metrics(trial, kind, metrics, known, eps(loss) * reach)


@case("valid")
def reward_scores(trial):
    draw = trial.draw
    features, dtype, packed = draw.choice((1, 3, 8)), draw.dtype(), draw.flag(0.4)
    weight = leaf(draw.laid_out(draw.normal((1, features), dtype)))
    bias = leaf(draw.normal((1,), dtype)) if draw.flag(0.4) else None
    count, options = draw.choice((0, 1, 2, 4)), {"bias": bias}
    if packed:
        lengths = [draw.choice((1, 2, 4)) for _ in range(count)]
        ends = torch.tensor([sum(lengths[:i]) for i in range(count + 1)])
        hidden, last = leaf(draw.laid_out(draw.normal((sum(lengths), features), dtype))), ends[1:] - 1
        options["cu_seqlens"] = draw.laid_out(ends.to(draw.choice((torch.int32, torch.int64))), keep=True)
        place = (last,)
    else:
        length = draw.choice((1, 2, 5))
        hidden, last = (
            leaf(draw.laid_out(draw.normal((count, length, features), dtype))),
            torch.full((count,), length - 1),
        )
        if draw.flag(0.7):
            live = draw.coins((count, length), 0.5)
            last = torch.tensor(
                [max([t for t in range(length) if row[t]], default=length - 1) for row in live], dtype=torch.int64
            )
            options["attention_mask"] = draw.masked(live)
        place = (torch.arange(count), last)
    scores = trial.call("reward_scores", hidden, weight, **options)
    h, w, b = wide(hidden), wide(weight), wide(torch.zeros(1) if bias is None else bias)
    truth, size = (h[place] * w).sum(-1) + b, (h[place] * w).detach().abs().sum(-1) + b.detach().abs()
    trial.expect("scores", scores, truth, 16 * eps(hidden) * size)
    g = draw.normal((count,), scores.dtype)
    trained = [(x, t) for x, t in ((hidden, h), (weight, w), (bias, b)) if x is not None]
    got = trial.gradients([scores], [x for x, _ in trained], [g])
    want = torch.autograd.grad(truth, [t for _, t in trained], g.double())
    # Every gradient is a product of three factors, or a sum of count of them; a 16-bit sum is rounded once.
    reach = float(g.double().abs().sum() * (1 + h.detach().abs().max() if h.numel() else 1))
    for (x, _), g_, w_ in zip(trained, got, want, strict=True):
        trial.expect(f"gradient of {x.dtype}", g_, w_, 16 * eps(hidden) * (w_.abs() + reach))


@case("valid")
def reward_scores_of_tokens(trial):
    draw = trial.draw
    features, labels, dtype = draw.choice((1, 3, 8)), draw.choice((1, 1, 3)), draw.dtype()
    live = draw.coins(draw.choice(((4,), (0,), (2, 3), (2, 1, 3))), draw.choice((0.3, 1.0)))
    mask = draw.masked(live) if draw.flag(0.7) else None
    live = live if mask is not None else torch.ones_like(live)
    hidden = leaf(
        draw.laid_out(draw.with_garbage(draw.normal((*live.shape, features), dtype), live[..., None]), keep=True)
    )
    weight, bias = leaf(draw.laid_out(draw.normal((labels, features), dtype))), leaf(draw.normal((labels,), dtype))
    got = trial.call("reward_scores", hidden, weight, attention_mask=mask, bias=bias, positions="all")
    h, w, b = wide(hidden), wide(weight), wide(bias)
    truth = torch.where(live[..., None], h, 0.0) @ w.T + b
    truth = torch.where(live[..., None], truth, 0.0)
    truth = truth if labels > 1 else truth[..., 0]
    reach = 1 + sum(float(x.detach().abs().nan_to_num(0.0, 0.0, 0.0).max()) if x.numel() else 0.0 for x in (h, w, b))
    trial.expect("scores of tokens", got, truth, 64 * eps(hidden) * reach**2)
    g = draw.normal(truth.shape, got.dtype)
    found = trial.gradients([got], [hidden, weight, bias], [g])
    want = torch.autograd.grad(truth, [h, w, b], g.double())
    for x, y in zip(found, want, strict=True):
        trial.expect("gradient of scores of tokens", x, y, 64 * eps(hidden) * reach * (1 + float(g.abs().sum())))


@case("valid")
def length_desensitized_weights(trial):
    draw = trial.draw
    count, alpha = draw.choice((0, 1, 3)), draw.choice((0, 0.5, 1.0))
    masks = [draw.coins((count, length), 0.6) for length in (4, draw.choice((0, 1, 6)))]
    got = trial.call("length_desensitized_weights", *(draw.masked(x) for x in masks), alpha)
    for x, weights in zip(masks, got, strict=True):
        truth = torch.zeros(x.shape, dtype=torch.float64)
        for i in range(count):
            shorter, seen = min(int(m[i].sum()) for m in masks), 0
            for t in range(x.shape[1]):
                seen += int(x[i, t])
                truth[i, t] = 0.0 if not x[i, t] else 1.0 if seen <= shorter else alpha
        trial.expect("weights", weights, truth, 0.0)


@case("valid")
def wpo_weights(trial):
    draw = trial.draw
    batch = Batch(draw, 2 * draw.choice((0, 1, 3)), longest=5)
    x, squares = (draw.uniform(batch.shape, -1.0, 0.0, torch.float32) for _ in range(2))
    given = draw.with_garbage(draw.laid_out(x, keep=True), batch.live)
    more = {"log_sum_sq_probs": draw.laid_out(squares, keep=True)} if draw.flag(0.5) else {}
    got = trial.call("wpo_weights", given, batch.mask, **more, **batch.packing())
    x = x.double() - squares.double() if more else x.double()
    means = batch.sums(x) / batch.counts().clamp(min=1)
    truth = means.view(2, -1).sum(0).exp() if means.numel() else means
    trial.expect("weights", got, truth if more else truth.clamp(max=1), 64 * eps(x.float()) * truth)


@case("valid")
def linear_dpo_loss(trial):
    draw = trial.draw
    pairs = draw.choice((0, 1, 2, 3))
    batch = Batch(draw, 2 * pairs, longest=7)
    head = Head(draw, batch)
    options = PairOptions(draw, pairs, lengths=None, betas=(0.1, 0.5))
    truth = head.statistics()
    sums, counts = batch.sums(truth["logprobs"]), batch.counts()
    if any(name.startswith("orpo") for name in options.names) and bool((sums > -1e-3).any()):
        return  # the odds of a certain answer, such as an empty one, are infinite
    refs = (None, None)
    if options.needs_reference:
        refs = tuple(
            draw.laid_out((x + draw.normal((pairs,))).float(), keep=True)
            for x in (sums[:pairs].detach(), sums[pairs:].detach())
        )
    options.lengths = counts[:pairs], counts[pairs:]
    if draw.flag(0.2):  # in place of those of the answers
        options.draw_lengths(draw, pairs, (1, 9))
    loss, metrics = with_metrics(
        trial,
        "linear_dpo_loss",
        *head.arguments(),
        batch.mask,
        ref_chosen_logps=refs[0],
        ref_rejected_logps=refs[1],
        **batch.packing(),
        **options.given,
        **({"ld_alpha": 1.0} if draw.flag(0.1) else {}),
        **head.options,
    )
    what = f"{options.names}, {head.hidden.dtype}"
    numbers = sums[:pairs], sums[pairs:], *(None if x is None else x.double() for x in refs)
    total = true_dpo(*numbers, options)
    check_loss(trial, what, head, loss, total, truth, 8 * (1 + total.size))
    expect_metrics(
        trial, what, head.smooth(metrics), pair_metrics(*numbers, options), 8 * (1 + batch.live.numel()) * head.slack()
    )


@case("valid")
def linear_unpaired_preference_loss(trial):
    draw = trial.draw
    batch = Batch(draw, longest=7)
    head = Head(draw, batch)
    options = UnpairedOptions(draw, batch.count)
    truth = head.statistics()
    sums = batch.sums(truth["logprobs"])
    refs = draw.laid_out((sums.detach() + draw.normal((batch.count,))).float(), keep=True)
    loss, metrics = with_metrics(
        trial,
        "linear_unpaired_preference_loss",
        *head.arguments(),
        refs,
        options.desirable,
        batch.mask,
        **batch.packing(),
        **options.given,
        **head.options,
    )
    total = options.truth(sums, refs.double())
    check_loss(trial, f"{options.name}, {head.hidden.dtype}", head, loss, total, truth, 1.0)
    expect_metrics(
        trial, options.name, metrics, options.metrics(sums, refs.double()), 8 * (1 + batch.live.numel()) * head.slack()
    )
