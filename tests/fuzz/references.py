"""Estimates of a KL, the exact one inside of a policy loss, and the losses of single tokens."""

import math

import oracles
import torch

from fuzz.batches import Batch
from fuzz.divergences import check
from fuzz.draws import leaf, wide
from fuzz.heads import Head
from fuzz.policies import LogitsOfABatch, check_rows_gradient
from fuzz.terms import Weighting, per_sequence
from fuzz.trial import case, eps

CLAMPS = ((0.7, (-0.7, 0.7)), ((None, 0.3), (-math.inf, 0.3)), ((-1.1, None), (-1.1, math.inf)))
FREE = -math.inf, math.inf


@case("valid")
def kl_estimate(trial):
    draw = trial.draw
    batch, kind = Batch(draw), draw.choice(("k1", "k2", "k3", "abs"))
    straight, weighted, options = draw.flag(0.3), draw.flag(0.4), {}
    bounds = dict.fromkeys(("diff_clamp", "value_clamp"), FREE)
    for name in bounds:
        if draw.flag(0.4):
            options[name], bounds[name] = draw.choice(CLAMPS)
    old, cap, moving = None, math.inf, weighted and not straight
    if straight or draw.flag(0.2):
        options["gradient"] = "k2" if straight else "pathwise"
    if weighted:
        options["ratio_weighted"] = True
        if draw.flag(0.5):
            options["ratio_cap"] = cap = draw.choice((0.9, 1.3))
        if moving and draw.flag(0.4):
            options["ratio_detached"], moving = True, False
        if draw.flag(0.7):
            options["old_logprobs"] = old = draw.column(batch.live, 0.5)
    x, ref = leaf(draw.column(batch.live, 0.5)), draw.column(batch.live, 0.5)
    got = trial.call("kl_estimate", x, ref, kind, mask=batch.mask, **options)
    logp = wide(x)
    gap = [torch.where(batch.live, y.double(), 0.0) for y in (logp, ref, logp.detach() if old is None else old)]
    if not weighted:
        gap[2] = gap[0].detach()
    order = {"abs": 0, "k1": 1, "k2": 2, "k3": 3}[kind]
    truth = oracles.kl_term(*gap, order, *bounds["diff_clamp"], *bounds["value_clamp"], cap, moving, straight)
    truth, what = torch.where(batch.live, truth, 0.0), f"{kind}, {sorted(options)}"
    # The ratio multiplies the error of the estimate.
    reach = 1 + sum(y.detach().abs() for y in gap) + truth.detach().abs()
    trial.expect(f"values of {what}", got, truth, 64 * eps(got) * reach.square())
    g = draw.normal(batch.shape, got.dtype)
    (found,), (want,) = trial.gradients([got], [x], [g]), torch.autograd.grad(truth, logp, g.double())
    trial.expect(f"gradient of {what}", found, want, 64 * eps(got) * (g.abs() * reach.square() + want.abs()))


def true_kl(kind, student, teacher, keep):
    """Of rows of log-probabilities, over the columns that are kept."""
    p, q = (student, teacher) if kind == "reverse_kl" else (teacher, student)
    gap = torch.where(keep, p, 0.0) - torch.where(keep, q, 0.0)
    return torch.where(keep, p.exp() * gap, 0.0).sum(-1)


def columns_of(draw, batch):
    """Old log-probabilities and advantages: arguments, and float64 without garbage."""
    old = draw.column(batch.live, 0.5)
    advantages, advantage = per_sequence(draw, batch, torch.float32)
    return old, advantages, torch.where(batch.live, old.double(), 0.0), advantage


@case("valid")
def policy_losses_with_an_exact_kl(trial):
    draw = trial.draw
    batch, linear = Batch(draw), draw.flag(0.5)
    rows = Head(draw, batch) if linear else LogitsOfABatch(draw, batch)
    weighting = Weighting(draw, batch)
    old, advantages, old64, advantage = columns_of(draw, batch)
    kind, coef = draw.choice(("reverse_kl", "forward_kl")), draw.choice((0.1, 1.0))
    options = {**rows.options, **weighting.options, **batch.packing()}
    options |= {"kl": kind, "kl_coef": coef, "objective": "surrogate"}
    if linear:
        truth, keep, z = rows.statistics(), rows.kept(), rows.z
        features = draw.choice((1, 3))
        parts = [
            draw.normal(shape, rows.hidden.dtype)
            for shape in ((*batch.shape, features), (rows.vocab, features), (rows.vocab,))
        ]
        given = [draw.laid_out(draw.with_garbage(parts[0], batch.live[..., None]), keep=True), *parts[1:]]
        biased = draw.flag(0.5)
        options |= dict(zip(("ref_hidden", "ref_weight", "ref_bias"), given if biased else given[:2], strict=False))
        other = parts[0].double() @ parts[1].double().T + (parts[2].double() if biased else 0.0)
        other = other[..., : rows.columns] * rows.scale
        other = other if rows.softcap is None else rows.softcap * torch.tanh(other / rows.softcap)
        arguments = rows.arguments()
        leaves = {rows.hidden: rows.h, rows.weight: rows.w, rows.bias: rows.b}
        leaves = {x: y for x, y in leaves.items() if x is not None and x.requires_grad}
    else:
        truth, keep, z = rows.truth(), rows.vocab_mask, rows.wide
        part = draw.normal(rows.x.shape, rows.dtype)
        options["ref_logits"] = draw.laid_out(draw.with_garbage(part, batch.live[..., None]), keep=True)
        other, arguments, leaves = part.double(), (rows.x, rows.visible), {rows.x: rows.wide}
    name = "linear_policy_loss" if linear else "logits_policy_loss"
    loss = trial.call(name, *arguments, old, advantages, batch.mask, **options)
    if linear and rows.logits_dtype:
        return
    keep = torch.ones(z.shape[-1], dtype=torch.bool) if keep is None else keep
    student, teacher = ((x / rows.t[..., None]).masked_fill(~keep, -math.inf).log_softmax(-1) for x in (z, other))
    logp = torch.where(batch.live, truth["logprobs"], 0.0)
    each = oracles.surrogate(logp, old64, advantage) + coef * true_kl(kind, student, teacher, keep)
    what = f"{name}, {kind}, {weighting.mode}, {arguments[0].dtype}"
    check(trial, what, loss, torch.where(batch.live, each, 0.0), weighting.truth(batch), leaves, 0.0)


@case("valid")
def policy_losses_of_tokens(trial):
    """Without a sum, and without weights."""
    draw = trial.draw
    batch, name = Batch(draw), draw.choice(("policy_loss", "logits_policy_loss", "linear_policy_loss"))
    rows = None
    if name != "policy_loss":
        rows = (Head if name == "linear_policy_loss" else LogitsOfABatch)(draw, batch)
    old, advantages, old64, advantage = columns_of(draw, batch)
    options = {"objective": "surrogate", "reduction": "none", **batch.packing()}
    if rows is None:
        x = leaf(draw.column(batch.live, 0.5))
        arguments, leaf64, unit = (x,), wide(x), 0.0
        logp = leaf64
    else:
        options |= rows.options
        arguments = rows.arguments() if name == "linear_policy_loss" else (rows.x, rows.visible)
        truth = rows.statistics() if name == "linear_policy_loss" else rows.truth()
        logp, unit = truth["logprobs"], rows.unit() if name == "linear_policy_loss" else 0.0
    got = trial.call(name, *arguments, old, advantages, batch.mask, **options)
    logp = torch.where(batch.live, logp, 0.0)
    each = torch.where(batch.live, oracles.surrogate(logp, old64, advantage), 0.0)
    size = each.detach().abs() * (1 + logp.detach().abs() + old64.abs())
    trial.expect(f"values of {name}", got, each, 64 * eps(arguments[0]) * size + 4 * unit * each.detach().abs())
    g = draw.normal(batch.shape, got.dtype)
    if name == "linear_policy_loss" and got.requires_grad and not rows.logits_dtype:
        rows.check(trial, name, [got], [g], (each * g.double()).sum(), truth)
    if name == "logits_policy_loss":
        check_rows_gradient(trial, name, rows, got, g, each, truth)
    if rows is None:
        (found,), (want,) = trial.gradients([got], [x], [g]), torch.autograd.grad(each, leaf64, g.double())
        trial.expect("gradient of policy_loss", found, want, 64 * eps(x) * g.abs() * size + 2.0**-52)
