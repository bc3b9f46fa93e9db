"""Divergences from a teacher, of logits and of heads: the truth forms both distributions in float64."""

import math

import torch

from fuzz.batches import Batch
from fuzz.draws import leaf
from fuzz.heads import Head
from fuzz.policies import upstream, with_metrics
from fuzz.terms import Sum, Weighting
from fuzz.tokens import temperature_in_batch
from fuzz.trial import case

KINDS = ("forward_kl", "reverse_kl", "jsd", "cross_entropy")
LOOSE = {torch.float64: 1e-9, torch.float32: 3e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def written_out(student, teacher, kind, beta):
    """Of log-probabilities; an outcome without mass counts for nothing."""
    p, q = student.exp(), teacher.exp()
    known = teacher > -math.inf
    student, teacher = torch.where(known, student, 0.0), torch.where(known, teacher, 0.0)
    if kind == "forward_kl":
        return (q * (teacher - student)).sum(-1)
    if kind == "reverse_kl":
        return (p * (student - teacher)).sum(-1)
    if kind == "cross_entropy":
        return -(q * student).sum(-1)
    mixture = torch.where(known, ((1 - beta) * p + beta * q), 1.0).log()
    return (beta * q * (teacher - mixture) + (1 - beta) * p * (student - mixture)).sum(-1)


class Comparison:
    """A kind, and a teacher: logits, or the ids and log-probabilities of its likeliest tokens."""

    def __init__(self, draw):
        self.kind, self.beta = draw.choice(KINDS), 0.5
        self.coarse = 0.0
        self.options = {} if self.kind == "forward_kl" and draw.flag(0.5) else {"kind": self.kind}
        if self.kind == "jsd" and draw.flag(0.8):
            self.options["beta"] = self.beta = draw.choice((0.1, 0.5, 0.8))

    def likeliest(self, draw, z, live):
        """``teacher_topk`` of the teacher's float64 log-probabilities ``z``; sets the truth of them."""
        count = draw.randint(1, max(1, z.shape[-1] - 1))
        known, self.ids = z.topk(count)
        dtype = draw.choice((torch.float32, torch.float64))
        known = known.to(dtype)
        self.known = known.double()
        if draw.flag(0.3):
            garbage = torch.where(live[..., None], self.ids, 10**6)
            known = draw.laid_out(draw.with_garbage(known, live[..., None]), keep=True)
            return draw.laid_out(garbage, keep=True), known
        return self.ids.to(draw.choice((torch.int32, torch.int64))), known

    def outcomes(self, logprobs, dtype):
        """The log-probabilities of the known ids and of all other tokens together, of the student and of the teacher;
        sets how far a difference from 1 may be off.
        """
        least = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
        top = logprobs.gather(-1, self.ids)
        rest = logprobs.scatter(-1, self.ids, -math.inf).logsumexp(-1, keepdim=True).clamp(min=math.log(least))
        tail = (1 - self.known.exp().sum(-1, keepdim=True)).clamp(min=least)
        smallest = torch.cat([rest.detach().exp(), tail], -1)
        self.coarse = 16 * least / float(smallest.min()) if smallest.numel() else 0.0
        return torch.cat([top, rest], -1), torch.cat([self.known, tail.log()], -1)


class Compared(Comparison):
    """Logits of a batch and their teacher."""

    def __init__(self, draw, batch):
        super().__init__(draw)
        vocab, dtype = draw.choice((2, 3, 7, 17, 33, 65, 130)), draw.dtype()
        x, y = (draw.normal((*batch.shape, vocab), dtype, draw.choice((0.5, 1))) for _ in range(2))
        live = batch.live[..., None]
        self.x = leaf(draw.laid_out(draw.with_garbage(x, live), keep=True))
        temperature, t = temperature_in_batch(draw, batch, dtype)
        self.wide = torch.where(live, x.double(), 0.0).requires_grad_()
        student = (self.wide / t[..., None]).log_softmax(-1)
        teacher = (torch.where(live, y.double(), 0.0) / t[..., None]).log_softmax(-1)
        self.options["temperature"] = temperature
        self.positional = (self.x, None)
        if draw.flag(0.3):
            self.options["teacher_topk"] = self.likeliest(draw, teacher, batch.live)
            student, teacher = self.outcomes(student, dtype)
        else:
            self.positional = (self.x, draw.laid_out(draw.with_garbage(y, live), keep=True))
            if draw.flag(0.3):
                keep = draw.coins((vocab,), 0.7).index_fill(0, torch.tensor([0]), True)
                self.options["vocab_mask"] = draw.laid_out(keep, keep=True)
                student, teacher = (z.masked_fill(~keep, -math.inf).log_softmax(-1) for z in (student, teacher))
        self.truth = torch.where(batch.live, written_out(student, teacher, self.kind, self.beta), 0.0)


def near(x, want, coarse):
    """What a result of the dtype of ``x`` may be off by: a share of the largest number."""
    want = want.detach()
    return (LOOSE[x.dtype] + coarse) * (0.1 + (float(want.abs().max()) if want.numel() else 0.0))


@case("valid")
def token_divergences(trial):
    draw = trial.draw
    batch = Batch(draw)
    of = Compared(draw, batch)
    got = trial.call("token_divergences", *of.positional, batch.mask, **of.options)
    what = f"{of.kind}, {of.x.dtype}"
    trial.expect(f"values of {what}", got, of.truth, (LOOSE[got.dtype] + of.coarse) * (1 + of.truth.detach().abs()))
    up = draw.normal(batch.shape, got.dtype)
    (gradient,) = trial.gradients([got], [of.x], [up])
    (want,) = torch.autograd.grad((of.truth * up.double()).sum(), of.wide)
    trial.expect(f"gradient of {what}", gradient, want, near(of.x, want, of.coarse))


@case("valid")
def divergence_loss(trial):
    draw = trial.draw
    batch = Batch(draw)
    of, weighting = Compared(draw, batch), Weighting(draw, batch)
    loss, _ = with_metrics(
        trial, "divergence_loss", *of.positional, batch.mask, **of.options, **weighting.options, **batch.packing()
    )
    check(
        trial,
        f"{of.kind}, {weighting.mode}, {of.x.dtype}",
        loss,
        of.truth,
        weighting.truth(batch),
        {of.x: of.wide},
        of.coarse,
    )


def check(trial, what, loss, truth, weight, leaves, coarse):
    """The loss and its gradients; ``leaves``: each argument, and the float64 leaf that stands for it."""
    total = Sum().plus(weight, truth)
    size = total.size + abs(float(total.value.detach()))
    trial.expect(f"loss of {what}", loss, total.value, (LOOSE[loss.dtype] + coarse) * (0.1 + size))
    if not loss.requires_grad:
        return
    up = upstream(trial.draw, loss)
    found = trial.gradients([loss], list(leaves), [up])
    wanted = torch.autograd.grad(total.value * up.double(), list(leaves.values()), allow_unused=True)
    for x, g, w in zip(leaves, found, wanted, strict=True):
        w = torch.zeros(x.shape, dtype=torch.float64) if w is None else w
        if g.dtype != x.dtype:
            trial.findings.append(f"a gradient has dtype {g.dtype}, its argument has {x.dtype}")
        trial.expect(f"gradient of shape {tuple(x.shape)} of {what}", g, w, near(x, w, coarse))


@case("valid")
def linear_distillation_loss(trial):
    draw = trial.draw
    batch = Batch(draw)
    head, weighting, of = Head(draw, batch), Weighting(draw, batch), Comparison(draw)
    batch.mask = draw.masked(batch.live)
    head.statistics()
    options = {name: x for name, x in head.options.items() if name != "ignore_index"} | of.options
    keep = torch.ones(head.columns, dtype=torch.bool) if head.vocab_mask is None else head.kept()
    student = (head.z / head.t[..., None]).masked_fill(~keep, -math.inf).log_softmax(-1)
    features = draw.choice((1, 3, 8))
    shapes = (*batch.shape, features), (head.vocab, features)
    other, matrix = (draw.normal(shape, head.hidden.dtype) for shape in shapes)
    bias = draw.normal((head.vocab,), head.hidden.dtype)
    cap, scale = draw.choice((None, 3.0)), draw.choice((1.0, 0.5))
    z = scale * (other.double() @ matrix.double().T + bias.double())[..., : head.columns]
    z = z if cap is None else cap * torch.tanh(z / cap)
    teacher = (z / head.t[..., None]).masked_fill(~keep, -math.inf).log_softmax(-1)
    positional = ()
    if head.columns > 1 and head.vocab_mask is None and draw.flag(0.3):
        options["teacher_topk"] = of.likeliest(draw, teacher, batch.live)
        student, teacher = of.outcomes(student, head.hidden.dtype)
    else:
        positional = draw.with_garbage(other, batch.live[..., None]), draw.laid_out(matrix, keep=True)
        options |= {"teacher_bias": bias, "teacher_softcap": cap, "teacher_logit_scale": scale}
    loss, _ = with_metrics(
        trial,
        "linear_distillation_loss",
        head.hidden,
        head.weight,
        *positional,
        mask=batch.mask,
        **options,
        **weighting.options,
        **batch.packing(),
    )
    if head.logits_dtype:
        return
    given = {head.hidden: head.h, head.weight: head.w, head.bias: head.b}
    leaves = {x: wide for x, wide in given.items() if x is not None and x.requires_grad}
    truth = torch.where(batch.live, written_out(student, teacher, of.kind, of.beta), 0.0)
    what = f"{of.kind}, {weighting.mode}, {head.hidden.dtype}"
    check(trial, what, loss, truth, weighting.truth(batch), leaves, of.coarse)
