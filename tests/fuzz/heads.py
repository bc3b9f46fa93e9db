"""The functions of hidden states and a head: the truth forms all logits in float64."""

import torch
from reference import statistics

from fuzz.batches import Batch
from fuzz.draws import NAN, leaf
from fuzz.policies import SupervisedTerms, expect_metrics, upstream, with_metrics
from fuzz.rows import OUTPUTS, sizes, with_cancelled
from fuzz.terms import PolicyTerms
from fuzz.tokens import targets_in_batch, temperature_in_batch
from fuzz.trial import case, eps

ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


class Head:
    """Hidden states of the tokens of a batch, a head, and the options of a chunk loop."""

    def __init__(self, draw, batch):
        dtype = draw.dtype()
        features, self.vocab = draw.choice((1, 2, 3, 8, 16, 17, 33)), draw.choice((1, 2, 3, 7, 17, 33, 50, 100, 257))
        self.columns = draw.randint(1, self.vocab) if draw.flag(0.2) else self.vocab
        self.targets, self.known, ignore = targets_in_batch(draw, batch, self.columns)
        temperature, self.t = temperature_in_batch(draw, batch, dtype)
        hidden = draw.laid_out(draw.normal((*batch.shape, features), dtype, draw.choice((0.5, 1))))
        if draw.flag(0.3):
            hidden = draw.laid_out(torch.where(batch.live[..., None], hidden, NAN).to(dtype), keep=True)
        trained = draw.choice(((1, 1, 1), (1, 1, 1), (1, 0, 1), (0, 1, 0)))
        self.hidden = leaf(hidden, bool(trained[0]))
        self.weight = leaf(
            draw.laid_out(draw.normal((self.vocab, features), dtype, draw.choice((0.3, 1)))), bool(trained[1])
        )
        self.bias = leaf(draw.laid_out(draw.normal((self.vocab,), dtype)), bool(trained[2])) if draw.flag(0.4) else None
        self.softcap, self.scale = draw.choice((None, None, 2.0, 10.0)), draw.choice((1.0, 1.0, 0.5, 2.0))
        self.logits_dtype = draw.choice(tuple(ROUNDING)) if dtype != torch.float64 and draw.flag(0.15) else None
        self.options = {
            "temperature": temperature,
            "ignore_index": ignore,
            "bias": self.bias,
            "softcap": self.softcap,
            "logit_scale": self.scale,
            "valid_vocab": self.columns if self.columns < self.vocab else None,
        }
        self.vocab_mask = self._vocab_mask(draw, batch, ignore) if draw.flag(0.2) else None
        if self.vocab_mask is not None:
            self.options["vocab_mask"] = self.vocab_mask
        if self.logits_dtype:
            self.options["logits_dtype"] = self.logits_dtype
        if draw.flag(0.4):
            self.options["chunk_tokens"] = draw.choice((1, 2, 3, 5, 16, 17, 1000))
        elif draw.flag(0.3):
            self.options["logits_budget"] = draw.choice((1, 1000, 10**5))
        if draw.flag(0.2):
            self.options["max_live_tokens"] = max(1, int(batch.live.sum()) + draw.choice((0, 3, 100)))
        self.live, self.ignore_index = batch.live, ignore

    def _vocab_mask(self, draw, batch, ignore):
        """With every target in it: the log-probability of another is -inf, and no loss is finite."""
        hit = torch.where(self.known == ignore, 0, self.known)
        keep = draw.coins((self.vocab,) if draw.flag(0.5) else (*batch.shape, self.vocab), 0.7)
        keep = keep.index_fill(-1, hit.flatten(), True) if keep.dim() == 1 else keep.scatter(-1, hit[..., None], True)
        return draw.laid_out(keep.index_fill(-1, torch.tensor([0]), True), keep=True)

    def kept(self):
        """The mask of the columns, or None; those of the padding are none of the vocabulary."""
        return None if self.vocab_mask is None else self.vocab_mask[..., : self.columns]

    def arguments(self):
        return self.hidden, self.weight, self.targets

    def statistics(self):
        """The true ones, differentiable in the float64 leaves ``h``, ``w``, ``b`` and in the logits ``u`` before scale
        and cap.
        """
        self.h = torch.where(self.live[..., None], self.hidden.detach().double(), 0.0).requires_grad_()
        self.w = self.weight.detach().double().contiguous().requires_grad_()
        self.b = (
            torch.zeros(self.vocab, dtype=torch.float64)
            if self.bias is None
            else self.bias.detach().double().contiguous()
        )
        self.b.requires_grad_()
        z = (self.h @ self.w[: self.columns].T + self.b[: self.columns]) * self.scale
        z = z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)
        if self.logits_dtype:
            z = z + (z.detach().float().to(self.logits_dtype).double() - z.detach())
        self.z = z
        return statistics(z, self.known, self.t, ignore_index=self.ignore_index, vocab_mask=self.kept())

    def unit(self):
        """How far off a logit may be, over the temperature: its sum over the features, and what it is rounded to."""
        z = self.z.detach().abs()
        reach = self.h.detach().abs() @ self.w.detach()[: self.columns].abs().T + self.b.detach()[: self.columns].abs()
        off = 8 * eps(self.hidden) * (1 + reach * self.scale) + ROUNDING.get(self.logits_dtype, 0.0) * z
        return (off / self.t[..., None]).amax(-1)

    def slack(self):
        """What ``expect_metrics`` takes for the unit of a mean."""
        unit = self.unit()
        return 8 * eps(self.hidden) + (float(unit.max()) if unit.numel() else 0.0)

    def smooth(self, metrics):
        """Without counts of what is beyond a bound, where rounded logits may step over it."""
        return {name: x for name, x in metrics.items() if not self.logits_dtype or "fraction" not in name}

    def check(self, trial, what, outputs, upstream, total, truth):
        """The gradients of ``outputs`` against those of the true ``total``, a scalar."""
        given = {"hidden": (self.hidden, self.h), "weight": (self.weight, self.w), "bias": (self.bias, self.b)}
        trained = {name: pair for name, pair in given.items() if pair[0] is not None and pair[0].requires_grad}
        got = trial.gradients(outputs, [x for x, _ in trained.values()], upstream)
        names = ("logprobs", "entropy")
        found = torch.autograd.grad(
            total, [*(x for _, x in trained.values()), *(truth[name] for name in names)], allow_unused=True
        )
        want, inner = found[: len(trained)], found[len(trained) :]
        allowed = self._allowed(
            {name: torch.zeros_like(self.t) if g is None else g for name, g in zip(names, inner, strict=True)}
        )
        for (name, (x, _)), g, w in zip(trained.items(), got, want, strict=True):
            if g.dtype != x.dtype:
                trial.findings.append(f"the gradient of {name} has dtype {g.dtype}, {name} has {x.dtype}")
            w = torch.zeros(x.shape, dtype=torch.float64) if w is None else w
            # 2^-52: the truth's own, which has 0 where 1 - sigmoid is less.
            trial.expect(f"gradient of {name} of {what}", g, w, allowed[name] + 2.0**-52)

    def _allowed(self, inner):
        """Each gradient is a sum of products: so is the error allowed to it."""
        d = sizes(self.z, self.known, self.t, self.kept(), with_cancelled(inner)) * self.scale
        stored = {self.hidden.dtype, self.logits_dtype}
        if torch.float16 in stored and d.numel():
            d = d + 2.0**-13 * d.max()  # what is small beside the largest one loses digits
        off = 64 * eps(self.hidden) + 4 * self.unit()[..., None] + 2 * max(ROUNDING.get(dtype, 0.0) for dtype in stored)
        if self.softcap is not None:  # 1 - tanh^2 has the digits of 1
            off = (
                off * (1 - (self.z.detach() / self.softcap).square())
                + 16 * eps(self.hidden)
                + 4 * ROUNDING.get(self.logits_dtype, 0.0)
            )
        d = (off * d).reshape(-1, self.columns)
        h, w = self.h.detach().abs().reshape(-1, self.h.shape[-1]), self.w.detach()[: self.columns].abs()
        padding = self.vocab - self.columns
        return {
            "hidden": (d @ w).view(self.h.shape),
            "weight": torch.nn.functional.pad(d.T @ h, (0, 0, 0, padding)),
            "bias": torch.nn.functional.pad(d.sum(0), (0, padding)),
        }


def some_tokens(draw):
    """A batch of which no token is dead but by its target."""
    batch = Batch(draw)
    batch.live, batch.mask = torch.ones(batch.shape, dtype=torch.bool), None
    return batch


def check_statistics(trial, head, stats):
    truth, unit = head.statistics(), head.unit()
    for name, x in stats.items():
        slack = 16 * eps(head.hidden) * (8 + truth[name].detach().double().abs()) + 4 * unit * (
            1 + truth[name].detach().double().abs()
        )
        trial.expect(f"{name} of {head.hidden.dtype}", x, truth[name], torch.where(head.live, slack, 0.0))
    if not any(x.requires_grad for x in stats.values()):
        return
    trained = [name for name in ("logprobs", "entropy") if name in stats]
    g = [trial.draw.normal(head.live.shape, stats["logprobs"].dtype) for _ in trained]
    total = sum((truth[name] * up.double()).sum() for name, up in zip(trained, g, strict=True))
    head.check(
        trial, f"{' and '.join(trained)} of {head.hidden.dtype}", [stats[name] for name in trained], g, total, truth
    )


@case("valid")
def linear_token_logprobs(trial):
    head = Head(trial.draw, some_tokens(trial.draw))
    check_statistics(trial, head, {"logprobs": trial.call("linear_token_logprobs", *head.arguments(), **head.options)})


@case("valid")
def linear_token_stats(trial):
    head = Head(trial.draw, some_tokens(trial.draw))
    outputs = tuple(name for name in OUTPUTS[:3] if trial.draw.flag(0.5))
    stats = trial.call("linear_token_stats", *head.arguments(), outputs=outputs, **head.options)
    check_statistics(trial, head, {name: x for name, x in stats._asdict().items() if x is not None})


def check_loss(trial, what, head, loss, total, truth, steps=1.0):
    """A scalar and its gradients.

    ``steps``: how strongly the loss follows a log-probability, where that is more than its size says.
    """
    unit = eps(head.hidden)
    slack = 256 * unit * (total.size + abs(float(total.value.detach()))) + steps * 4 * float(head.unit().sum()) + 1e-30
    trial.expect(f"loss of {what}", loss, total.value, slack)
    if loss.requires_grad and not head.logits_dtype:
        up = upstream(trial.draw, loss)
        head.check(trial, what, [loss], [up], total.value * up.double(), truth)


@case("valid")
def linear_policy_loss(trial):
    draw = trial.draw
    batch = Batch(draw)
    terms = PolicyTerms(draw, batch)
    head = Head(draw, batch)
    old, every = terms.visible_old(draw), draw.flag(0.1)
    terms.options |= {"top_entropy_fraction": 1.0} if every else {}
    loss, metrics = with_metrics(
        trial,
        "linear_policy_loss",
        *head.arguments(),
        old,
        terms.advantages,
        batch.mask,
        **terms.options,
        **head.options,
    )
    truth, what = head.statistics(), f"{terms.name}, {terms.level}, {terms.weighting.mode}, {head.hidden.dtype}"
    total = terms.truth(batch, truth["logprobs"], truth["entropy"])
    check_loss(trial, what, head, loss, total, truth, 1 + total.size)
    known = terms.metrics(batch, truth["logprobs"], truth["entropy"])
    expect_metrics(trial, what, metrics, head.smooth(known), head.slack())


@case("valid")
def linear_sft_loss(trial):
    draw = trial.draw
    batch = Batch(draw)
    sft = SupervisedTerms(draw, batch)
    head = Head(draw, batch)
    further = {"z_loss_coef": 0.0} if draw.flag(0.1) else {}
    loss, metrics = with_metrics(
        trial, "linear_sft_loss", *head.arguments(), batch.mask, **sft.options, **head.options, **further
    )
    truth, what = head.statistics(), f"{sft.kind}, {sft.weighting.mode}, {head.hidden.dtype}"
    total = sft.truth(batch, truth["logprobs"])
    check_loss(trial, what, head, loss, total, truth, 1 + total.size)
    expect_metrics(trial, what, metrics, sft.metrics(batch, truth["logprobs"]), head.slack())
