"""Policy, value and supervised losses, from log-probabilities and from logits."""

import oracles
import torch

from fuzz.batches import Batch
from fuzz.draws import leaf, wide
from fuzz.rows import Rows, sizes, with_cancelled
from fuzz.terms import PolicyTerms, Sum, Weighting, per_sequence
from fuzz.tokens import targets_in_batch, temperature_in_batch
from fuzz.trial import case, eps


class LogitsOfABatch(Rows):
    """Finite logits of the tokens of a batch, whose ignored targets die in it."""

    def __init__(self, draw, batch):
        vocab, dtype = draw.choice((1, 2, 3, 7, 17, 33, 64, 65, 130)), draw.dtype()
        self.shape, self.vocab, self.dtype = batch.shape, vocab, dtype
        x = draw.laid_out(draw.normal((*batch.shape, vocab), dtype, draw.choice((0.5, 1, 2))))
        self.visible, self.targets, self.ignore_index = targets_in_batch(draw, batch, vocab)
        self.temperature, self.t = temperature_in_batch(draw, batch, dtype)
        self.vocab_mask = self._vocab_mask(draw) if draw.flag(0.3) else None
        self.x = leaf(draw.laid_out(draw.with_garbage(x, batch.live[..., None]), keep=True) if draw.flag(0.5) else x)
        # The truth looks at nothing that is dead.
        self.wide = torch.where(batch.live[..., None], self.x.detach().double(), 0.0).requires_grad_()
        self.options = {
            "temperature": self.temperature,
            "ignore_index": self.ignore_index,
            "vocab_mask": self.vocab_mask,
        }

    def _vocab_mask(self, draw):
        """With every target in it: the log-probability of another is -inf, and no loss is finite."""
        keep = draw.coins((self.vocab,) if draw.flag(0.5) else (*self.shape, self.vocab), 0.8)
        hit = torch.where(self.targets == self.ignore_index, 0, self.targets)
        keep = keep.index_fill(-1, hit.flatten(), True) if keep.dim() == 1 else keep.scatter(-1, hit[..., None], True)
        return draw.laid_out(keep.index_fill(-1, torch.tensor([0]), True), keep=True)


def upstream(draw, loss):
    return torch.tensor(draw.choice((1.0, 1.0, 2.5, -1.0, 0.0)), dtype=loss.dtype)


def expect_loss(trial, what, loss, total, unit, factor=64):
    trial.expect(
        what,
        loss,
        total.value,
        factor * unit * (total.size + abs(float(total.value.detach().nan_to_num(0.0, 0.0, 0.0)))) + 1e-30,
    )


def expect_metrics(trial, what, got, truth, unit):
    """Those that the truth names, where the call returned any."""
    for name, x in truth.items() if got else ():
        trial.expect(f"metric {name} of {what}", got.get(name), x, 64 * unit * (1 + x.abs().nan_to_num(0.0, 0.0, 0.0)))


def with_metrics(trial, name, *arguments, **options):
    """``(loss, metrics)`` of a call; no metrics where they were not asked for."""
    asked = trial.draw.flag(0.3)
    result = trial.call(name, *arguments, return_metrics=asked, **options)
    return result if asked else (result, {})


@case("valid")
def policy_loss(trial):
    draw = trial.draw
    batch = Batch(draw)
    terms = PolicyTerms(draw, batch)
    x = leaf(
        draw.with_garbage(
            draw.laid_out(draw.normal(batch.shape, draw.choice((torch.float32, *draw.floats)), 0.5)), batch.live
        )
    )
    entropy = None
    if terms.entropy_coef or draw.flag(0.1):
        entropy = leaf(
            draw.with_garbage(
                draw.uniform(batch.shape, dtype=draw.choice((torch.float32, torch.bfloat16, torch.float64))), batch.live
            )
        )
    old = terms.visible_old(draw)
    if entropy is not None and draw.flag(0.2):
        terms.options["top_entropy_fraction"] = 1.0
    loss, metrics = with_metrics(
        trial, "policy_loss", x, old, terms.advantages, batch.mask, entropy=entropy, **terms.options
    )
    logp, h = wide(x), wide(torch.zeros(batch.shape) if entropy is None else entropy)
    total = terms.truth(batch, logp, h)
    what = f"{terms.name}, {terms.level}, {terms.weighting.mode}, {x.dtype}"
    expect_loss(trial, f"loss of {what}", loss, total, eps(x))
    up = upstream(draw, loss)
    got = trial.gradients([loss], [x] + ([entropy] if terms.entropy_coef else []), [up])
    want = torch.autograd.grad(total.value, [logp, h], up.double(), allow_unused=True)
    for name, g, w in zip(("logprobs", "entropy"), got, want, strict=False):
        w = torch.zeros(batch.shape, dtype=torch.float64) if w is None else w
        # 2^-52: the truth's own, which has 0 where 1 - sigmoid is less.
        trial.expect(
            f"gradient of {name} of {what}",
            g,
            w,
            64 * eps(x) * (w.abs() + w.abs().max() if w.numel() else w) + 2.0**-52,
        )
    expect_metrics(trial, what, metrics, terms.metrics(batch, logp, None if entropy is None else h), eps(x))


@case("valid")
def ratio_of_long_sequences(trial):
    """A sum over thousands of tokens keeps the digits of the small differences that it is made of."""
    draw = trial.draw
    shape, scale = (2, draw.choice((1000, 4096, 20000))), draw.choice((1e-6, 3e-5))
    old = draw.uniform(shape, -3.0, 0.0, torch.float32)
    x = leaf((old.double() + scale * draw.normal(shape)).float())
    advantages, level = draw.normal((2,), torch.float32), draw.choice(("sequence", "sequence_sum", "sequence_token"))
    loss = trial.call(
        "policy_loss", x, old, advantages, objective="ppo_clip", ratio_level=level, aggregation="seq-mean"
    )
    wide_x = wide(x)
    gap = wide_x - old.double()
    ratio = (gap.sum(-1) if level == "sequence_sum" else gap.mean(-1)).exp()
    terms = oracles.ppo_clip(ratio.log(), torch.zeros(2, dtype=torch.float64), advantages.double(), 0.2, 0.2)
    trial.expect(f"loss of {level}", loss, terms.mean(), 2e-6 * terms.abs().mean())
    (got,), (want,) = trial.gradients([loss], [x], [torch.ones(())]), torch.autograd.grad(terms.mean(), wide_x)
    trial.expect(f"gradient of {level}", got, want, 4e-6 * want.abs())


@case("valid")
def logits_policy_loss(trial):
    draw = trial.draw
    batch = Batch(draw)
    terms = PolicyTerms(draw, batch)
    rows = LogitsOfABatch(draw, batch)
    in_place, every = draw.flag(0.3), draw.flag(0.1)
    terms.options |= {"top_entropy_fraction": 1.0} if every else {}
    given = rows.x * 1.0 if in_place else rows.x
    old = terms.visible_old(draw)
    options = {**terms.options, **rows.options, **({"inplace_backward": True} if in_place else {})}
    loss, metrics = with_metrics(
        trial, "logits_policy_loss", given, rows.visible, old, terms.advantages, batch.mask, **options
    )
    truth, what = rows.truth(), f"{terms.name}, {terms.level}, {terms.weighting.mode}, {rows.dtype}"
    check_rows_loss(trial, what, rows, loss, terms.truth(batch, truth["logprobs"], truth["entropy"]), truth)
    found = terms.metrics(batch, truth["logprobs"], truth["entropy"])
    expect_metrics(trial, what, metrics, found, 8 * eps(rows.x))


def check_rows_loss(trial, what, rows, loss, total, truth):
    """A loss of logits and its gradient."""
    expect_loss(trial, f"loss of {what}", loss, total, eps(rows.x), 256)
    check_rows_gradient(trial, what, rows, loss, upstream(trial.draw, loss), total.value, truth)


def check_rows_gradient(trial, what, rows, loss, up, value, truth):
    """The gradient of a loss, or of the losses of tokens, whose truth is ``value``."""
    unit = eps(rows.x)
    (got,) = trial.gradients([loss], [rows.x], [up])
    names = ("logprobs", "entropy")
    (want, *inner) = torch.autograd.grad(
        value, [rows.wide, *(truth[name] for name in names)], up.double(), allow_unused=True
    )
    inner = {
        name: torch.zeros(rows.shape, dtype=torch.float64) if g is None else g
        for name, g in zip(names, inner, strict=True)
    }
    want = torch.zeros_like(rows.wide) if want is None else want
    size = sizes(rows.wide, rows.targets, rows.t, rows.vocab_mask, with_cancelled(inner))
    trial.expect(
        f"gradient of logits of {what}",
        got,
        want,
        torch.where(want.abs().sum(-1, keepdim=True) == 0, 0.0, 64 * unit * size),
    )


@case("valid")
def sft_loss(trial):
    draw = trial.draw
    batch = Batch(draw)
    rows = LogitsOfABatch(draw, batch)
    sft = SupervisedTerms(draw, batch)
    in_place = {"inplace_backward": True} if draw.flag(0.15) else {}
    given = rows.x * 1.0 if in_place else rows.x
    loss, metrics = with_metrics(
        trial, "sft_loss", given, rows.visible, batch.mask, **sft.options, **rows.options, **in_place
    )
    truth, what = rows.truth(), f"{sft.kind}, {sft.weighting.mode}, {rows.dtype}"
    check_rows_loss(trial, what, rows, loss, sft.truth(batch, truth["logprobs"]), truth)
    expect_metrics(trial, what, metrics, sft.metrics(batch, truth["logprobs"], truth["entropy"]), 8 * eps(rows.x))


@case("valid")
def sft_loss_of_rows(trial):
    """The terms that look at a whole row."""
    draw = trial.draw
    batch = Batch(draw)
    vocab = draw.choice((1, 3, 30, 70))
    dtype = draw.choice([x for x in draw.floats if x in (torch.float32, torch.float64)])
    everywhere = batch.live[..., None].expand(*batch.shape, vocab)
    x = leaf(draw.with_garbage(draw.normal((*batch.shape, vocab), dtype, 2), everywhere))
    targets = torch.where(batch.live, draw.integers(0, vocab, batch.shape), -100)
    kind, z = draw.choice(("nll", "dft", "eaft", "asft")), draw.choice((0.0, 0.1))
    smoothing = draw.choice((0.0, 0.2, 1.0)) if kind == "nll" else 0.0
    more = {"eaft_alpha": draw.choice((0.5, 1.0))} if kind == "eaft" else {}
    if kind == "asft":
        ref = draw.with_garbage(draw.normal((*batch.shape, vocab), dtype, 2), everywhere)
        more = {"asft_alpha": 0.3, "ref_logits": ref}
    loss = trial.call(
        "sft_loss",
        x,
        targets,
        batch.mask,
        kind=kind,
        z_loss_coef=z,
        label_smoothing=smoothing,
        **more,
        **batch.packing(),
    )
    wide_x = wide(x)
    rows = torch.where(batch.live[..., None], wide_x, 0.0)
    logp = torch.log_softmax(rows, -1)
    target = logp.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    losses = -(1 - smoothing) * target - smoothing * logp.mean(-1)
    if kind in ("dft", "asft"):
        losses = oracles.dft(target)
    if kind == "asft":
        reference = torch.log_softmax(torch.where(batch.live[..., None], wide(ref).detach(), 0.0), -1)
        losses = losses + 0.3 * (reference.exp() * (reference - logp)).sum(-1)
    if kind == "eaft":
        top = torch.log_softmax(rows.detach().topk(min(20, vocab)).values, -1)
        losses = -((-(top.exp() * top).sum(-1) / 3) ** more["eaft_alpha"]) * target
    share = batch.live.double() / batch.live.sum().clamp(min=1)
    total = Sum().plus(share, losses).plus(share, z * rows.logsumexp(-1) ** 2)
    what, up = f"{kind}, {dtype}", upstream(draw, loss)
    expect_loss(trial, f"loss of {what}", loss, total, eps(x), 256)
    (got,) = trial.gradients([loss], [x], [up])
    (want,) = torch.autograd.grad(total.value, wide_x, up.double())
    want = torch.where(batch.live[..., None], want, 0.0)
    largest = want.abs().max() if want.numel() else 0.0
    trial.expect(f"gradient of {what}", got, want, 256 * eps(x) * (want.abs() + largest) + 2.0**-45)


class SupervisedTerms:
    """Kind, weights and sample weights of a supervised loss."""

    def __init__(self, draw, batch):
        self.kind, self.weighting, self.sample_weight = draw.choice(("nll", "dft")), Weighting(draw, batch), None
        self.options = {"kind": self.kind, **self.weighting.options, **batch.packing()}
        if draw.flag(0.4):
            x = draw.column(batch.live)
            whole = draw.flag(0.4) or batch.is_ambiguous()
            self.options["sample_weights"], self.sample_weight = (
                per_sequence(draw, batch, torch.float32) if whole else (x, x.double())
            )
            if "normalizers" not in self.options and draw.flag(0.2):
                x = self.options["sample_weights"]
                # Positive, because a sum of either sign may be near 0.
                positive = x.abs() + 0.5
                # Of the rounded argument, because x in half precision plus 0.5 is another number than in float64.
                self.sample_weight = batch.spread(positive.flatten().double()) if whole else positive.double()
                self.options |= {"sample_weights": positive, "normalize_by_weight": True}

    def weights(self, batch):
        weight = self.weighting.truth(batch)
        if self.sample_weight is not None:
            plain = weight
            weight = torch.where(weight != 0, weight * torch.where(batch.live, self.sample_weight, 0.0), 0.0)
            if self.options.get("normalize_by_weight") and weight.sum() != 0:
                weight = weight * plain.sum() / weight.sum()
        return weight

    def truth(self, batch, logp):
        return Sum().plus(self.weights(batch), getattr(oracles, self.kind)(torch.where(batch.live, logp, 0.0)))

    def metrics(self, batch, logp, entropy=None):
        """Means over the tokens with a weight."""
        read = self.weights(batch) != 0
        found = {"nll": -logp, "probability": logp.exp()} | ({} if entropy is None else {"entropy": entropy})
        return {name: torch.where(read, x.detach(), 0.0).sum() / read.sum().clamp(min=1) for name, x in found.items()}


@case("valid")
def logprobs_sft_loss(trial):
    draw = trial.draw
    batch = Batch(draw)
    sft = SupervisedTerms(draw, batch)
    x = leaf(
        draw.with_garbage(
            draw.laid_out(draw.normal(batch.shape, draw.choice((torch.float32, *draw.floats)))), batch.live
        )
    )
    loss, metrics = with_metrics(trial, "logprobs_sft_loss", x, batch.mask, **sft.options)
    logp, what = wide(x), f"{sft.kind}, {sft.weighting.mode}, {x.dtype}"
    check_columns_loss(trial, what, x, loss, sft.truth(batch, logp), logp)
    expect_metrics(trial, what, metrics, sft.metrics(batch, logp), eps(x))


def check_columns_loss(trial, what, x, loss, total, truth_of_x):
    expect_loss(trial, f"loss of {what}", loss, total, eps(x))
    up = upstream(trial.draw, loss)
    (got,) = trial.gradients([loss], [x], [up])
    (want,) = torch.autograd.grad(total.value, truth_of_x, up.double())
    trial.expect(
        f"gradient of {what}", got, want, 64 * eps(x) * (want.abs() + want.abs().max() if want.numel() else want)
    )


@case("valid")
def value_loss(trial):
    draw = trial.draw
    batch = Batch(draw)
    weighting, clip = Weighting(draw, batch), draw.choice((None, 0.2, 1.0))
    named = {"objective": "value_plain" if clip is None else "value_clip"} if draw.flag(0.2) else {}
    x = leaf(
        draw.with_garbage(
            draw.laid_out(draw.normal(batch.shape, draw.choice((torch.float32, *draw.floats)))), batch.live
        )
    )
    old, returns = draw.column(batch.live), draw.column(batch.live)
    loss, metrics = with_metrics(
        trial,
        "value_loss",
        x,
        old if clip or draw.flag(0.5) else None,
        returns,
        batch.mask,
        clip_range=clip,
        **named,
        **weighting.options,
        **batch.packing(),
    )
    leaf64 = wide(x)
    v, o, r = (torch.where(batch.live, part.double(), 0.0) for part in (leaf64, old, returns))
    each = oracles.value_plain(v, r) if clip is None else oracles.value_clip(v, o, r, clip)
    total = Sum().plus(weighting.truth(batch), each)
    check_columns_loss(trial, f"clip {clip}, {weighting.mode}, {x.dtype}", x, loss, total, leaf64)
    count = batch.live.sum().clamp(min=1)
    known = {"error": torch.where(batch.live, (v - r).square(), 0.0).detach().sum() / count}
    if clip is not None and not named:
        larger = ((v - o).abs() > clip) & ((o + (v - o).clamp(-clip, clip) - r).square() > (v - r).square())
        known["clip_fraction"] = (batch.live & larger).sum().double() / count
    expect_metrics(trial, f"clip {clip}, {x.dtype}", metrics, known, eps(x))
