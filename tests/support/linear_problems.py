"""Problems of a head, and every loss over it in float64: all logits at once, by plain torch and autograd.

Imports torch and the oracles alone.
"""

import oracles
import preference_oracles
import torch

B, L, H, V = 3, 7, 32, 133  # no size divides a block, a vector or a chunk
HEAD = ("temperature", "softcap", "logit_scale", "valid_vocab", "ignore_index")
PARAMS = {
    "ppo_clip": {"clip_low": 0.2, "clip_high": 0.28},
    "dual_clip": {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 1.5},
    "cispo": {"clip_low": 1.0, "clip_high": 0.5},
    "sapo": {"tau_pos": 1.0, "tau_neg": 1.05},
    "reinforce": {},
    "surrogate": {},
    "ppo_clip_cap": {"ratio_cap": 1.1, "clip_low": 0.2, "clip_high": 0.28},
    "cispo_max_only": {"clip_high": 0.5},
    "cispo_absolute": {"ratio_max": 0.9},
    "dro": {"beta": 0.5},
    "dppo_tv": {"delta_low": 0.03, "delta_high": 0.02, "ratio_max": 1.5},
    "dppo_tv_surrogate": {"delta_low": 0.03, "delta_high": 0.02},
    "dppo_kl": {"delta_low": 0.03, "delta_high": 0.02, "ratio_max": 1.5},
    "dppo_kl_surrogate": {"delta_low": 0.03, "delta_high": 0.02},
    "linear_squared": {"pull": 0.7},
}
OF_RATIOS = ("ppo_clip", "dual_clip", "cispo", "sapo")


def linear_squared(logp, old_logp, advantage, pull):
    """What a user's own objective of that name is to be."""
    return -advantage * logp + 0.5 * pull * (logp - old_logp).square()


def problem(dtype=torch.float32, shape=(B, L), hidden=H, vocab=V, seed=0, **head):
    """Tokens of every kind.

    ``old`` and ``ref`` lie near the log-probabilities under the options ``head``: both sides of every clip are met.
    """
    draw = torch.Generator().manual_seed(seed)

    def normal(*sizes):
        return torch.randn(*sizes, generator=draw, dtype=torch.float64)

    real = torch.float64 if dtype == torch.float64 else torch.float32
    d = {
        "hidden": normal(*shape, hidden).to(dtype),
        "weight": (3.0 / hidden**0.5 * normal(vocab, hidden)).to(dtype),
        "bias": normal(vocab).to(dtype),
    }
    d["targets"] = torch.randint(head.get("valid_vocab", vocab), shape, generator=draw)
    d["mask"] = torch.rand(shape, generator=draw) < 0.7
    if d["mask"].numel():
        d["mask"][..., 0] = True
        d["targets"].view(-1)[-1] = head.get("ignore_index", -100)
    d["advantages"], d["token_weights"] = normal(*shape).to(real), torch.rand(shape, generator=draw).to(real)
    d["temperature"] = (0.6 + torch.rand(shape, generator=draw)).to(real)
    logp, _ = rows(d, leaves(d), **head)
    d["old"], d["ref"] = ((logp.detach() + 0.4 * normal(*shape)).to(real) for _ in range(2))
    return d


def leaves(d, bias=True, dtype=torch.float64):
    """Hidden states, weight and bias (None without) as fresh leaves; in float64 they are those of the truth."""
    names = ("hidden", "weight", "bias") if bias else ("hidden", "weight")
    return [d[name].detach().to(dtype, copy=True).requires_grad_() for name in names] + ([] if bias else [None])


def own(d, bias=True):
    return leaves(d, bias, d["hidden"].dtype)


def live_of(d, ignore_index=-100, **options):
    return d["mask"] & (d["targets"] != ignore_index)


def rows(d, operands, *, temperature=1.0, softcap=None, logit_scale=1.0, valid_vocab=None, ignore_index=-100, **others):
    """Log-probability and entropy of every token that has a target, 0 elsewhere; differentiable in ``operands``."""
    hidden, weight, bias = operands
    u = hidden @ weight.t() + (0.0 if bias is None else bias)
    u = logit_scale * u if softcap is None else softcap * torch.tanh(logit_scale * u / softcap)
    t = temperature.to(u.dtype)[..., None] if isinstance(temperature, torch.Tensor) else temperature
    log_p = (u[..., :valid_vocab] / t).log_softmax(-1)
    known = d["targets"] != ignore_index
    logp = log_p.gather(-1, torch.where(known, d["targets"], 0).long()[..., None])[..., 0]
    return torch.where(known, logp, 0.0), torch.where(known, -(log_p.exp() * log_p).sum(-1), 0.0)


def sequences(shape, cu_seqlens=None):
    """The sequence of each token, flat, and how many there are."""
    if cu_seqlens is None:
        return torch.arange(shape[0]).repeat_interleave(shape[1]), shape[0]
    lengths = cu_seqlens.diff()
    return torch.arange(len(lengths)).repeat_interleave(lengths), len(lengths)


def aggregation(
    mode,
    live,
    ids,
    count,
    length,
    *,
    batch_num_tokens=None,
    num_sequences=None,
    horizon=None,
    group_ids=None,
    rollout_ids=None,
):
    """The weights of an aggregation by hand, flat."""
    tokens = torch.bincount(ids[live], minlength=count).double()
    n, used = tokens[ids].clamp(min=1), (tokens > 0).sum().double()

    def same(groups):  # of each token: the sequences of its group
        return (groups[ids][:, None] == groups[None]).double()

    rows_, horizon = count if num_sequences is None else num_sequences, length if horizon is None else horizon
    filled = used if num_sequences is None else num_sequences
    if mode in ("prompt-mean", "group-mean"):
        mine, groups = same(group_ids), len(set(group_ids[tokens > 0].tolist()))
    weight = {
        "token-mean": lambda: 1 / (tokens.sum() if batch_num_tokens is None else batch_num_tokens),
        "token-sum": lambda: 1.0,
        "global-token-mean": lambda: 1 / batch_num_tokens,
        "seq-mean-token-mean": lambda: 1 / (filled * n),
        "seq-mean": lambda: 1 / (filled * n),
        "seq-mean-token-sum": lambda: 1 / filled,
        "seq-mean-token-sum-norm": lambda: 1 / (filled * horizon),
        "fixed-horizon": lambda: 1 / (rows_ * horizon),
        "rollout-mean": lambda: 1 / (rows_ * (same(rollout_ids) @ tokens)),
        "prompt-mean": lambda: 1 / (groups * (mine @ tokens)),
        "group-mean": lambda: 1 / (groups * n * (mine @ (tokens > 0).double())),
    }[mode]()
    return torch.where(live, torch.as_tensor(weight, dtype=torch.float64), 0.0)


def objective_of(name, logp, old, advantages):
    if name == "reinforce":
        return oracles.reinforce(logp, advantages)
    function = linear_squared if name == "linear_squared" else getattr(oracles, name)
    return function(logp, old, advantages, **PARAMS[name])


def policy(
    d,
    operands,
    *,
    objective="ppo_clip",
    ratio_level="token",
    aggregation_="token-mean",
    normalizers=None,
    weights=None,
    kl="k3",
    kl_coef=0.0,
    entropy_coef=0.0,
    cu_seqlens=None,
    advantages=None,
    **head,
):
    """The policy loss; ``advantages``: shaped like the targets, or per sequence."""
    logp, entropy = (x.reshape(-1) for x in rows(d, operands, **head))
    live, (ids, count) = live_of(d, **head).reshape(-1), sequences(d["targets"].shape, cu_seqlens)
    A = d["advantages"] if advantages is None else advantages
    A = A.reshape(-1) if A.numel() == live.numel() else A.reshape(-1)[ids]
    old, ref, A = d["old"].reshape(-1).double(), d["ref"].reshape(-1).double(), A.double()
    length = d["targets"].shape[-1]
    if weights is None:
        mode = "seq-mean" if ratio_level == "sequence_sum" and aggregation_ == "token-mean" else aggregation_
        w = aggregation(mode, live, ids, count, length, **(normalizers or {}))
    else:
        w = torch.where(live, weights.reshape(-1).double(), 0.0)
    inside = [live & (ids == i) for i in range(count)]
    total = logp.new_zeros(())
    if ratio_level == "sequence_sum":
        losses = [
            w[s].sum() * objective_of(objective, logp[s].sum()[None], old[s].sum()[None], A[s].mean()[None])[0]
            for s in inside
            if s.any()
        ]
        total = torch.stack(losses).sum() if losses else total
    else:
        x, y = logp, old
        for s in inside:
            if ratio_level == "sequence" and s.any():
                x, y = torch.where(s, logp[s].mean(), x), torch.where(s, old[s].mean(), y)
            elif ratio_level == "sequence_token" and s.any():
                y = torch.where(s, logp.detach() - (logp[s].detach() - old[s]).mean(), y)
        used = w != 0
        total = (w * objective_of(objective, x, y, A))[used].sum()
    used = w != 0
    total = total + kl_coef * (w * getattr(oracles, kl)(logp, ref))[used].sum()
    return total - entropy_coef * (w * entropy)[used].sum()


def answers(d, operands, cu_seqlens=None, **head):
    """Summed log-probabilities of each answer's live tokens, and their number."""
    logp, _ = rows(d, operands, **head)
    live, (ids, count) = live_of(d, **head).reshape(-1), sequences(d["targets"].shape, cu_seqlens)
    sums = torch.stack([logp.reshape(-1)[live & (ids == i)].sum() for i in range(count)])
    return sums, torch.bincount(ids[live], minlength=count).double()


def pairs(name, C, R, f, g, n, m, *, beta, smoothing=0.1, divergence="reverse_kl", averaged=False):
    """Losses of pairs by their formulas, without the likelihood that ``cpo`` and ``sft`` add."""
    e, oracle = smoothing if name in preference_oracles.SMOOTHED else 0.0, preference_oracles
    if name in oracle.OF_MARGIN or name in oracle.AVERAGED:
        c, r = (oracle.SCORES[divergence](x) for x in (C - f, R - g))
        c, r = (c / n, r / m) if averaged or name in oracle.AVERAGED else (c, r)
        return oracle.OF_MARGIN[oracle.AVERAGED.get(name, name)](c - r, beta, e)
    if name in oracle.OF_RATIOS:
        return oracle.OF_RATIOS[name](C - f, R - g, beta)
    if name in ("aot", "aot_unpaired"):
        return getattr(oracle, name)(C, R, f, g, beta, e)
    return torch.zeros_like(C) if name == "sft" else oracle.OF_POLICY[name](C, R, n, m, beta, e)


def likelihood(name):
    """The coefficient of minus the mean log-probability of the chosen tokens."""
    return 1.0 if name == "sft" or name.startswith("cpo") else 0.0


def gradients(loss, operands, upstream=1.0):
    """Of the leaves that there are; 0 where the loss does not depend on one."""
    wanted = [x for x in operands if x is not None and x.requires_grad]
    found = torch.autograd.grad(loss, wanted, torch.as_tensor(upstream, dtype=loss.dtype), allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found, strict=True)]


def frobenius(got, truth):
    return ((got.double() - truth).norm() / truth.norm().clamp(min=1e-300)).item()


def assert_gradients(got, truth, bonus=False, slope=1.0):
    """The policy of errors: fp64 and fp32 by their digits, 16 bits by one cast of the truth (half as much again with an
    entropy bonus).

    ``slope``: by how much the loss's derivative magnifies the rounding of what it is taken at.
    """
    for name, x, t in zip(("hidden", "weight", "bias"), got, truth, strict=False):
        assert x.shape == t.shape and x.isfinite().all(), name
        if x.dtype in (torch.float64, torch.float32):
            allowed = slope * (1e-12 if x.dtype == torch.float64 else 4e-6)
        else:
            allowed = (1.5 if bonus else 1.05) * frobenius(t.to(x.dtype), t)
        error = frobenius(x, t)
        assert error <= allowed or t.norm() == 0 and not x.any(), (
            f"gradient of {name} in {x.dtype}: error {error:.3g}, allowed {allowed:.3g}"
        )


def assert_loss(got, truth, size=1.0):
    """``size``: of the terms that the loss is a sum of."""
    allowed = (1e-13 if got.dtype == torch.float64 else 4e-6) * max(size, abs(truth.item()))
    assert abs(got.item() - truth.item()) <= allowed, (
        f"loss {got.item():.9g}, truth {truth.item():.9g}, allowed {allowed:.3g}"
    )
