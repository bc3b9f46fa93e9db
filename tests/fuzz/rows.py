"""Row statistics of logits: every output, its gradient, every argument in every layout, special values."""

import math

import torch
from reference import same_bits, statistics

import rlkernels
from fuzz.draws import INF, NAN, leaf
from fuzz.tokens import shared_temperature
from fuzz.trial import case, eps

OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
VOCABULARIES = (1, 2, 3, 5, 7, 15, 16, 17, 31, 33, 63, 64, 65, 100, 129, 257)
WIDE = (1023, 1024, 1025, 2053, 4095, 4097, 5000)


def vocabulary(draw):
    return draw.choice(WIDE if draw.flag(0.1) and not draw.small else VOCABULARIES)


def leading_shape(draw):
    """No row, one, some; up to three dimensions."""
    return draw.choice(((), (0,), (1,), (2,), (5,), (17,), (0, 3), (3, 0), (1, 4), (3, 6), (2, 2, 3)))


def specials(draw, x, chance):
    """``x`` with infinities, NaN, denormal and huge numbers in it."""
    tail = torch.finfo(x.dtype).max / 8
    found = draw.among(x.shape, (-INF, -INF, -INF, INF, NAN, 0.0, -0.0, 1e-40, min(tail, 1e30), -min(tail, 1e30))).to(
        x.dtype
    )
    return torch.where(draw.coins(x.shape, chance), found, x)


def logits_like(draw, shape, dtype):
    x = draw.normal(shape, dtype, draw.choice((0.01, 1, 1, 5, 30)))
    if draw.flag(0.3):
        x = specials(draw, x, draw.choice((0.01, 0.1)))
    if draw.flag(0.1):
        x = torch.where(draw.coins(shape, 0.5), -INF, x).to(dtype)
    return draw.laid_out(x)


def temperature_of(draw, shape, dtype):
    """``(argument, float64 per row)``."""
    if draw.flag(0.1):
        return shared_temperature(draw, shape, dtype)
    if draw.flag(0.5):
        t = draw.choice((1.0, 1, 0.7, 2.5, 0.1, 10.0))
        return t, torch.full(shape, float(t), dtype=torch.float64)
    t = draw.laid_out(draw.uniform(shape, 0.3, 2.3, draw.choice((torch.float32, torch.bfloat16, torch.float64))))
    real = torch.float64 if dtype == torch.float64 else torch.float32
    return t, t.to(real).double()


def targets_of(draw, shape, vocab, ignore_chance=0.3):
    """``(targets, ignore_index)``, in either dtype."""
    dtype = draw.choice((torch.int32, torch.int64))
    ignore = draw.choice(
        (
            -100,
            -100,
            -1,
            0,
            vocab - 1,
            vocab,
            2**31 - 1,
            *((10**12, -(2**63), 2**63 - 1) if dtype == torch.int64 else ()),
        )
    )
    y = draw.integers(0, vocab, shape)
    if draw.flag(0.5):
        y = torch.where(draw.coins(shape, ignore_chance), ignore, y)
    return draw.laid_out(y.to(dtype)), ignore


def vocab_mask_of(draw, shape, vocab):
    if draw.flag(0.65):
        return None
    return draw.laid_out(draw.coins((vocab,) if draw.flag(0.5) else (*shape, vocab), draw.choice((0.1, 0.5, 0.9, 1.0))))


def log_softmax(x, temperature, vocab_mask):
    z = x.detach().double() / temperature[..., None]
    return (z if vocab_mask is None else z.masked_fill(~vocab_mask, -INF)).log_softmax(-1)


def with_cancelled(upstream):
    """The upstream gradients of a loss whose terms may cancel: the least of them has the digits of the others, not its
    own.
    """
    return {name: g.abs() + 0.1 * g.abs().max() if g.numel() else g for name, g in upstream.items()}


def sizes(x, targets, temperature, vocab_mask, upstream, ref_logits=None):
    """What each element of the gradient is a sum of, without signs: an error is small against these.

    ``upstream``: name to cotangent.
    """
    log_p = log_softmax(x, temperature, vocab_mask).nan_to_num(0.0, 0.0, -800.0)
    p, depth = log_p.exp(), 1 - log_p
    hit = torch.zeros_like(p).scatter(-1, targets.long().clamp(0, p.shape[-1] - 1)[..., None], 1.0)
    total = torch.zeros_like(p)
    for name, g in upstream.items():
        spread = depth
        if name == "kl":
            spread = depth - log_softmax(ref_logits, temperature, vocab_mask).nan_to_num(0.0, 0.0, -800.0)
        size = hit + p * depth if name == "logprobs" else p * depth * (spread + (p * spread).sum(-1, keepdim=True))
        total = total + g.double().abs()[..., None] * size
    return total / temperature.abs()[..., None]


class Rows:
    """Drawn arguments of a function over logits, and their truth."""

    def __init__(self, draw):
        self.shape, self.vocab, self.dtype = leading_shape(draw), vocabulary(draw), draw.dtype()
        self.x = leaf(logits_like(draw, (*self.shape, self.vocab), self.dtype))
        self.targets, self.ignore_index = targets_of(draw, self.shape, self.vocab)
        dead = self.targets == self.ignore_index
        self.temperature, self.t = temperature_of(draw, self.shape, self.dtype)
        self.t = torch.where(dead, 1.0, self.t)
        self.vocab_mask = vocab_mask_of(draw, self.shape, self.vocab)
        self.wide = self.x.detach().double().contiguous().requires_grad_()
        self.options = {
            "temperature": self.temperature,
            "ignore_index": self.ignore_index,
            "vocab_mask": self.vocab_mask,
        }

    def outside(self):
        """Rows whose target is not in the mask: its log-probability is constant, and moves nothing, whatever else the
        row holds.
        """
        if self.vocab_mask is None:
            return torch.zeros(self.shape, dtype=torch.bool)
        hit = torch.where(self.targets == self.ignore_index, 0, self.targets).long()
        return ~self.vocab_mask.expand(*self.shape, self.vocab).gather(-1, hit[..., None])[..., 0]

    def truth(self, ref_logits=None):
        """By textbook formulas; NaN in a broken row, where they would say inf."""
        found = statistics(
            self.wide,
            self.targets,
            self.t,
            ignore_index=self.ignore_index,
            vocab_mask=self.vocab_mask,
            ref_logits=ref_logits,
        )
        broken = self.broken(self.x)
        ref_broken = broken if ref_logits is None else self.broken(ref_logits)
        where = {"ref_logprobs": ref_broken, "kl": broken | ref_broken, "mean_logits": torch.zeros_like(broken)}
        return {
            name: x if x.dtype == torch.bool else torch.where(where.get(name, broken), NAN, x)
            for name, x in found.items()
        }

    def broken(self, x):
        """Live rows that hold NaN or inf, or no number at all."""
        seen = (
            x.detach().double() if self.vocab_mask is None else x.detach().double().masked_fill(~self.vocab_mask, -INF)
        )
        return (seen.isnan().any(-1) | (seen == INF).any(-1) | (seen == -INF).all(-1)) & (
            self.targets != self.ignore_index
        )

    def allowed(self, truth, ref_logits=None):
        """Of each statistic.

        The logarithm of a sum over V is a few units of ``log V`` off, a quotient by the temperature one of its own
        size.
        """
        unit, base = 16 * eps(self.x), 1 + math.log(self.vocab)
        z = (self.x.detach().double() / self.t[..., None]).nan_to_num(0.0, 0.0, 0.0).abs()
        found = {name: unit * (base + x.detach().double().abs()) for name, x in truth.items()}
        found["logsumexp"] = found["logsumexp"] + unit * z.amax(-1)
        found["mean_logits"] = unit * (1 + z.mean(-1) if self.vocab_mask is None else 1 + z.amax(-1))
        found["is_top1"] = torch.zeros(self.shape)
        if ref_logits is not None:
            p = log_softmax(self.x, self.t, self.vocab_mask).exp()
            gap = log_softmax(ref_logits, self.t, self.vocab_mask).abs().nan_to_num(0.0, 0.0, 0.0)
            found["kl"] = unit * (base + (p * gap).sum(-1).nan_to_num(0.0))
        return found

    def gradient_of(self, truth, upstream):
        """True gradient, 0 in a row without any upstream gradient whatever it holds, and the error allowed to it."""
        (want,) = torch.autograd.grad(
            [truth[name] for name in upstream], self.wide, [g.double() for g in upstream.values()], retain_graph=True
        )
        support = (
            torch.ones(want.shape, dtype=torch.bool) if self.vocab_mask is None else self.vocab_mask.expand(want.shape)
        )
        want = torch.where(self.broken(self.x)[..., None] & support, NAN, want)
        moved = (
            sum(
                torch.where(self.outside(), 0.0, g.abs()) if name == "logprobs" else g.abs()
                for name, g in upstream.items()
            )
            != 0
        )
        return torch.where(moved[..., None], want, 0.0)


def check_gradient(trial, rows, stats, truth, upstream, ref_logits=None):
    """Of a weighted sum of several outputs."""
    outputs = [stats[name] for name in upstream]
    (got,) = trial.gradients(
        outputs, [rows.x], [g.to(x.dtype) for g, x in zip(upstream.values(), outputs, strict=True)]
    )
    want = rows.gradient_of(truth, upstream)
    size = sizes(rows.x, rows.targets, rows.t, rows.vocab_mask, upstream, ref_logits)
    trial.expect(f"gradient of {' and '.join(upstream)} for {rows.dtype}", got, want, 16 * eps(rows.x) * (size + 1e-9))


@case("valid")
def token_logprobs(trial):
    rows = Rows(trial.draw)
    got = trial.call("token_logprobs", rows.x, rows.targets, **rows.options)
    truth = rows.truth()
    trial.expect("logprobs", got, truth["logprobs"], rows.allowed(truth)["logprobs"])
    check_gradient(trial, rows, {"logprobs": got}, truth, {"logprobs": cotangent(trial.draw, rows)})


@case("valid")
def token_stats(trial):
    draw = trial.draw
    rows = Rows(draw)
    outputs = tuple(name for name in OUTPUTS if draw.flag(0.5))
    ref = logits_like(draw, rows.x.shape, rows.dtype) if draw.flag(0.5) else None
    kl = draw.choice((None, "k1", "k2", "k3", "exact")) if ref is not None else None
    stats = trial.call(
        "token_stats", rows.x, rows.targets, ref_logits=ref, kl=kl, outputs=outputs, **rows.options
    )._asdict()
    truth = rows.truth(ref)
    allowed = rows.allowed(truth, ref)
    asked = (
        {"logprobs", "logsumexp", *outputs}
        | ({"ref_logprobs"} if ref is not None else set())
        | ({"kl"} if kl else set())
    )
    if {name for name, x in stats.items() if x is not None} != asked:
        trial.findings.append(
            f"token_stats gave {[name for name, x in stats.items() if x is not None]}, asked for {sorted(asked)}"
        )
    if kl not in (None, "exact"):
        estimate(trial, truth, allowed, kl)
    for name in sorted(asked):
        trial.expect(f"{name} for {rows.dtype}", stats[name], truth[name], allowed[name])
    trained = (
        ["logprobs"]
        + ["entropy"] * ("entropy" in outputs)
        + ["kl"] * (kl == "exact" and bool(truth["kl"].isfinite().all()))
    )
    some = draw.sample(trained, draw.randint(1, len(trained)))
    check_gradient(trial, rows, stats, truth, {name: cotangent(draw, rows) for name in some}, ref)


def estimate(trial, truth, allowed, kl):
    """Puts the estimator's truth in place of the exact divergence."""
    p, q = truth["logprobs"], truth["ref_logprobs"]
    gap, error = p - q, allowed["logprobs"] + allowed["ref_logprobs"]
    truth["kl"] = {"k1": gap, "k2": gap * gap / 2, "k3": torch.expm1(-gap) + gap}[kl]
    slope = {"k1": torch.ones_like(gap), "k2": gap.abs(), "k3": 1 + (-gap).exp()}[kl]
    allowed["kl"] = error * (1 + slope.detach()) + 4 * truth["kl"].detach().abs() * error.clamp(max=1e-3)


def cotangent(draw, rows):
    """For a statistic of every row, in any layout; some zeros."""
    g = draw.normal(rows.shape)
    return draw.laid_out(torch.where(draw.coins(rows.shape, 0.3), 0.0, g) if draw.flag(0.3) else g)


@case("valid")
def row_alone(trial):
    """Its bits are those that it has among others, whatever the layout, the number of threads, and whether a gradient
    is wanted.
    """
    draw = trial.draw
    rows = Rows(draw)
    count = rows.targets.numel()
    if not count or trial.backend == "eager" or rlkernels.available_backends()["absent"].get("cpu"):
        return  # torch's reductions follow strides
    i = draw.randrange(count)

    def one(x):
        if (
            not isinstance(x, torch.Tensor)
            or x is rows.vocab_mask
            and x.dim() == 1
            or x.shape[: len(rows.shape)] != rows.shape
        ):
            return x
        return x.reshape(count, *x.shape[len(rows.shape) :])[i : i + 1].clone()

    if isinstance(rows.temperature, torch.Tensor) and (
        rows.temperature.dim() == 0 or rows.temperature.shape != rows.shape
    ):
        # That of a sequence, for each of its rows; one for all is a number.
        rows.options["temperature"] = rows.t.contiguous() if rows.temperature.dim() else float(rows.temperature)
    among = trial.call("token_stats", rows.x, rows.targets, outputs=OUTPUTS, **rows.options)
    with torch.no_grad():
        alone = trial.call(
            "token_stats",
            one(rows.x.detach()),
            one(rows.targets),
            outputs=OUTPUTS,
            **{name: one(x) for name, x in rows.options.items()},
        )
    for name, x in among._asdict().items():
        if x is not None and not same_bits(x.detach().reshape(-1)[i : i + 1], getattr(alone, name)):
            trial.findings.append(
                f"{name} of {rows.dtype} has other bits alone: {x.flatten()[i].item()!r}, "
                f"{getattr(alone, name).item()!r}"
            )


@case("valid")
def rows_in_place(trial):
    """The gradient written over the logits, in a layout whose rows do not overlap."""
    draw = trial.draw
    rows = Rows(draw)
    base, view = layout_without_overlap(draw, rows.wide.detach().to(rows.dtype))
    base = leaf(base)
    whole = base * 1.0
    if draw.flag(0.5):
        got = trial.call("token_logprobs", view(whole), rows.targets, inplace_backward=True, **rows.options)
    else:
        got = trial.call("token_stats", view(whole), rows.targets, inplace_backward=True, **rows.options).logprobs
    g = cotangent(draw, rows)
    (found,) = trial.gradients([got], [base], [g.to(got.dtype)])
    want = rows.gradient_of(rows.truth(), {"logprobs": g})
    size = sizes(rows.wide, rows.targets, rows.t, rows.vocab_mask, {"logprobs": g})
    trial.expect(f"gradient in place for {rows.dtype}", view(found), want, 16 * eps(rows.x) * (size + 1e-9))


def layout_without_overlap(draw, x):
    """``(parent, view)``: ``view(parent)`` holds ``x``."""
    before = [draw.randint(0, 1) for _ in x.shape]
    order = list(range(x.dim()))
    draw.shuffle(order)
    parent = torch.zeros([x.shape[i] + 2 * before[i] for i in order], dtype=x.dtype)

    def view(p):
        p = p.permute([order.index(i) for i in range(x.dim())])
        return p[tuple(slice(a, a + n) for a, n in zip(before, x.shape, strict=True))]

    view(parent).copy_(x)
    return parent, view
