"""The truth in float64, the error policy, and the layouts and rows that the tests share.

Imports torch alone: it shares no code with what it judges.
"""

import torch

EPS32 = 2.0**-23


def statistics(
    logits, targets, temperature=1.0, *, ignore_index=-100, vocab_mask=None, ref_logits=None, dtype=torch.float64
):
    """Row statistics by their textbook formulas in ``dtype``, differentiable; 0 (False) in ignored rows."""
    live = targets != ignore_index
    t = temperature.to(dtype)[..., None] if isinstance(temperature, torch.Tensor) else temperature
    support = (
        torch.ones_like(logits, dtype=torch.bool, requires_grad=False)
        if vocab_mask is None
        else vocab_mask.expand(logits.shape) | ~live[..., None]
    )
    y = torch.where(live, targets, 0).long()[..., None]

    def scaled(x):
        return torch.where(support, torch.where(live[..., None], x, 0.0).to(dtype) / t, -torch.inf)

    def per_row(x):
        return torch.where(live, x, 0.0)

    def of_target(log_p):  # -inf, and no gradient, where the target is outside the support
        return per_row(torch.where(support.gather(-1, y), log_p.gather(-1, y), -torch.inf)[..., 0])

    z = scaled(logits)
    log_p = z.log_softmax(-1)
    p = log_p.exp()
    known = p != 0  # a NaN is known
    found = {
        "logprobs": of_target(log_p),
        "logsumexp": per_row(z.logsumexp(-1)),
        "entropy": per_row(-(p * torch.where(known, log_p, 0.0)).sum(-1)),
        "log_sum_sq_probs": per_row((2 * log_p).logsumexp(-1)),
        "mean_logits": per_row(torch.where(support, z, 0.0).sum(-1) / support.sum(-1)),
        "is_top1": live & (z.argmax(-1) == y[..., 0]) & z.amax(-1).isfinite(),
    }
    if ref_logits is not None:
        log_q = scaled(ref_logits).log_softmax(-1)
        found["ref_logprobs"] = of_target(log_q)
        found["kl"] = per_row((p * torch.where(known, log_p - log_q, 0.0)).sum(-1))
    return found


def gae(rewards, values, gamma, lam):
    """One row without a mask, as a Python loop over floats."""
    advantages, following, trace = [], 0.0, 0.0
    for r, v in zip(reversed(rewards), reversed(values), strict=True):
        trace = r + gamma * following - v + gamma * lam * trace
        following = v
        advantages.append(trace)
    return advantages[::-1]


def assert_within_policy(got, truth, base, what):
    """``|k - R| <= 2 max|B - R| + 4 eps32 max(1, |R|)`` per element; what is not finite in R is the same in k.

    B: torch in fp32.
    """
    got, truth, base = got.detach().double(), truth.detach(), base.detach().double()
    assert got.shape == truth.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    finite = truth.isfinite()
    same = torch.where(finite, got.isfinite(), (got == truth) | got.isnan() & truth.isnan())
    assert same.all(), f"{what}: {got[~same][0]} where the truth is {truth[~same][0]}"
    if not finite.any():
        return
    torchs = (base - truth)[finite & base.isfinite()].abs()
    allowed = 2 * (torchs.max() if torchs.numel() else 0.0) + 4 * EPS32 * truth[finite].abs().clamp(min=1)
    excess = (got - truth)[finite].abs() - allowed
    worst = excess.argmax()
    assert excess[worst] <= 0, (
        f"{what}: got {got[finite][worst]:.9g}, truth {truth[finite][worst]:.9g}, allowed {allowed[worst]:.3g}"
    )


def gradient_allowance(
    upstream, logits, targets, temperature=1.0, *, ignore_index=-100, vocab_mask=None, ref_logits=None
):
    """Error allowed to dlogits in fp32: 4e-6 of the terms each element is a sum of, 1e-9 |g|, and 4 eps32 |g| in the
    target's column.

    ``upstream``: name of a statistic to its cotangent. The gradients of entropy and KL are differences, ``p (log p +
    H)``: a bound relative to the difference would ask for more digits than ``log p`` has, which is known to eps32 as
    the log of an fp32 sum.
    """
    live = (targets != ignore_index)[..., None]
    t = temperature.double()[..., None] if isinstance(temperature, torch.Tensor) else temperature
    support = True if vocab_mask is None else vocab_mask

    def log_softmax(x):
        return torch.where(support | ~live, torch.where(live, x, 0.0).double() / t, -torch.inf).log_softmax(-1)

    def size(x):
        return x.abs().nan_to_num(0.0, 0.0, 0.0)

    log_p = log_softmax(logits.detach())
    p = size(log_p.exp())
    log_q = log_p if ref_logits is None else log_softmax(ref_logits)

    def spread(x):
        return 4e-6 * p * (x + (p * x).sum(-1, keepdim=True)) + 2 * EPS32 * p

    of_all = {"logprobs": 4e-6 * p, "entropy": spread(size(log_p)), "kl": spread(size(log_p) + size(log_q))}
    total = sum(g.double().abs()[..., None] / t * (of_all[name] + 1e-9) for name, g in upstream.items())
    size_of_g = sum(g.double().abs()[..., None] / t for g in upstream.values())
    at_target = torch.zeros_like(p, dtype=torch.bool).scatter(-1, targets.clamp(min=0).long()[..., None], True)
    return total + torch.where(at_target, 4 * EPS32 * size_of_g, 0.0)


def assert_gradient(got, truth, allowed, what):
    """``got`` is the one rounding, to its dtype, of some number within ``allowed`` of the truth: for 16 bits that is
    one ulp at most.
    """
    assert got.shape == truth.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    low, high = ((truth + sign * allowed).to(got.dtype) for sign in (-1, 1))
    good = (low <= got) & (got <= high) | got.isnan() & truth.isnan()
    if not good.all():
        excess = torch.where(good, -1.0, (got.double() - truth).abs() - allowed).nan_to_num(torch.inf).flatten()
        worst = excess.argmax()
        raise AssertionError(
            f"{what}: got {got.flatten()[worst]:.9g}, truth {truth.flatten()[worst]:.9g}, allowed "
            f"{allowed.flatten()[worst]:.3g}, "
            f"at {tuple(int(i) for i in torch.unravel_index(worst, got.shape))}; {int((~good).sum())} "
            "elements are off"
        )


def same_bits(a, b):
    """Equal in every bit, NaN included."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))
    )


def draw_rows(shape, vocab, dtype=torch.float32, seed=0):
    """Logits ``[*shape, V]`` whose rows are of every temperament, targets (the third row is ignored), a mask with the
    target in it.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, vocab, generator=generator, dtype=torch.float64)
    rows = x.view(-1, vocab)
    # Nothing near-uniform only: padding columns would not show in such a row.
    spread = torch.tensor([3.0, 0.01, 8.0, 1.0, 3.0, 20.0])
    rows *= spread[torch.arange(rows.shape[0]) % 6, None]
    targets = torch.randint(vocab, shape, generator=generator)
    flat = targets.view(-1)
    for r in range(rows.shape[0]):
        if r % 4 == 1:
            rows[r, flat[r]] += 12  # a confident token
        if r % 4 == 3:
            rows[r] -= 40  # a row far below 0: a maximum that starts at 0 underflows here
        if r % 7 == 2 and rows.shape[0] > 2:
            flat[r] = -100
    mask = torch.rand(*shape, vocab, generator=generator) < 0.7
    mask.scatter_(-1, targets.clamp(min=0)[..., None], True)
    return rows.view(x.shape).clamp(-60, 60).to(dtype), targets, mask


def cotangents(shape, count, seed=1, dtype=torch.float32):
    """Upstream gradients that are not 1: every sign, a zero, several sizes."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(count, *shape, generator=generator, dtype=torch.float64)
    if g[0].numel() > 1:
        g.view(count, -1)[:, 0] = 0.0
    return tuple(g.to(dtype))


def _offset(x):
    storage = torch.full((x.numel() + 1,), float("nan"), dtype=x.dtype)
    storage[1:] = x.reshape(-1)
    return storage[1:].view(x.shape)


def _inside(x, before, after, dims):
    """A view in a NaN parent: what is read outside of it shows."""
    sizes = [n + (before + after) * (d in dims) for d, n in enumerate(x.shape)]
    parent = torch.full(sizes, float("nan"), dtype=x.dtype)
    view = parent[tuple(slice(before, before + n) if d in dims else slice(None) for d, n in enumerate(x.shape))]
    view.copy_(x)
    return view


def _every_other(x):
    parent = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype)
    parent[..., ::2] = x
    return parent[..., ::2]


LAYOUTS = {
    "contiguous": lambda x: x.clone(),
    "sliced like next-token logits": lambda x: _inside(x, 0, 1, (1,)),
    "rows apart": lambda x: _inside(x, 3, 2, (2,)),
    "storage offset of one element": _offset,
    "transposed leading dimensions": lambda x: (
        x.transpose(0, 1).clone(memory_format=torch.contiguous_format).transpose(0, 1)
    ),
    "expanded": lambda x: x[:1, :1].clone().expand(x.shape),
    "stride 2 in the row": _every_other,
    "vocabulary first": lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "four dimensions": lambda x: x.reshape(1, *x.shape).clone(),
    "four dimensions, transposed": lambda x: (
        x.reshape(*x.shape[:2], 1, -1).transpose(0, 2).clone(memory_format=torch.contiguous_format).transpose(0, 2)
    ),
    "two dimensions, rows apart": lambda x: _inside(x.reshape(-1, x.shape[-1]), 1, 4, (1,)),
    "one row": lambda x: x[0, 0].clone(),
}
"""From ``[B, L, V]`` to a tensor of the same rows (or some of them) laid out in memory in some other way."""


def judge(token_stats, x, targets, temperature=1.0, *, ignore_index=-100, vocab_mask=None, ref_logits=None, seed=1):
    """Runs ``token_stats`` (the function under test) with every output, and holds each, and each one's gradient,
    against the truth.
    """
    options = {"ignore_index": ignore_index, "vocab_mask": vocab_mask, "ref_logits": ref_logits}
    leaf, wide = x.detach().requires_grad_(), x.detach().double().requires_grad_()
    outputs = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    stats = token_stats(
        leaf, targets, temperature=temperature, kl=None if ref_logits is None else "exact", outputs=outputs, **options
    )
    truth = statistics(wide, targets, temperature, **options)
    base = statistics(
        x.detach().float(),
        targets,
        temperature,
        **{**options, "ref_logits": None if ref_logits is None else ref_logits.float()},
        dtype=torch.float32,
    )
    for name, expected in truth.items():
        got = getattr(stats, name)
        if name == "is_top1":
            assert torch.equal(got, expected), name
        else:
            assert got.dtype == torch.float32
            assert_within_policy(got, expected, base[name], name)
    names = ("logprobs", "entropy") if ref_logits is None else ("logprobs", "entropy", "kl")
    for name, g in zip(names, cotangents(targets.shape, len(names), seed), strict=True):
        (got,) = torch.autograd.grad(getattr(stats, name), leaf, g, retain_graph=True)
        (expected,) = torch.autograd.grad(truth[name], wide, g.double(), retain_graph=True)
        assert got.dtype == x.dtype
        assert_gradient(
            got, expected, gradient_allowance({name: g}, x, targets, temperature, **options), f"gradient of {name}"
        )
    return stats
