"""Problems for kernels called directly, and their truths in float64 torch: textbook formulas and the oracles, none of
our own code.
"""

import oracles
import torch
from reference import draw_rows, gradient_allowance, statistics

NAN = float("nan")
PARAMS = {
    **{"order": 3.0, "low": -0.5, "high": 0.7, "value_low": -0.1, "value_high": 0.2, "cap": 1.5},  # of kl_term
    **{"moving": 1.0, "straight": 0.0},
    "ratio_cap": 1.1,
    "ratio_max": 1.5,
    "delta_low": 0.03,
    "delta_high": 0.02,
    "delta": 0.05,
    "clip_low": 0.2,
    "clip_high": 0.28,
    "dual_clip": 3.0,
    "tau_pos": 1.0,
    "tau_neg": 1.05,
    "clip_range": 0.2,
    "beta": 0.5,
    "label_smoothing": 0.1,
    "tau": 0.05,
    "alpha": 0.5,
}
EVERYTHING = 31  # entropy, log_sum_sq_probs, mean_logits, is_top1, kl


def policy_problem(vocab, dtype=torch.float32, rows=6, seed=0):
    """Rows, targets and everything per row that a policy loss takes: log-probs on both sides of every clip, weights
    with zeros.
    """
    x, targets, mask = draw_rows((rows,), vocab, dtype, seed=seed)
    real = torch.float64 if dtype == torch.float64 else torch.float32
    generator = torch.Generator().manual_seed(seed + 100)

    def draw():
        return torch.randn(rows, generator=generator, dtype=torch.float64)

    logp = statistics(x.double(), targets)["logprobs"]
    columns = {"old_logp": logp + 0.4 * draw(), "advantage": draw(), "ref_logp": logp + 0.4 * draw()}
    columns["rollout_logp"] = columns["old_logp"] + 0.1
    columns |= {"weight": draw().abs() + 0.1, "entropy_weight": 0.3 * draw().abs(), "kl_weight": 0.5 * draw().abs()}
    for k, name in enumerate(("weight", "entropy_weight", "kl_weight")):
        columns[name][k] = 0.0  # one term off: the row lives by the others
    if rows > 4:
        for name in ("weight", "entropy_weight", "kl_weight"):
            columns[name][4] = 0.0  # all terms off: a dead row
    return x, targets, mask, {name: c.to(real) for name, c in columns.items()}


def policy_truth(oracle, names, x, targets, temperature, mask, c, params, entropy, kl, ignore_index=-100):
    """``(loss, dlogits, allowed error of dlogits)`` in float64."""
    wide = x.detach().double().requires_grad_()
    found = statistics(wide, targets, temperature, vocab_mask=mask, ignore_index=ignore_index)
    logp = found["logprobs"]
    live = targets != ignore_index
    c = {name: torch.where(live, column.double(), 0.0) for name, column in c.items()}
    leaf = logp.detach().requires_grad_()

    def term(weight, values):
        return torch.where(c[weight] != 0, c[weight] * values, 0.0).sum()

    def of_logp(logp):
        total = term("weight", oracle(logp, *(c[n] for n in names), *params))
        return total + term("kl_weight", getattr(oracles, kl)(logp, c["ref_logp"])) if kl else total

    loss = of_logp(logp)
    if entropy:
        loss = loss - term("entropy_weight", found["entropy"])
    (gradient,) = torch.autograd.grad(loss, wide)
    (dlogp,) = torch.autograd.grad(of_logp(leaf), leaf)
    upstream = {"logprobs": dlogp} | ({"entropy": c["entropy_weight"]} if entropy else {})
    allowed = gradient_allowance(upstream, x, targets, temperature, vocab_mask=mask, ignore_index=ignore_index)
    # dlogp itself follows exp(logp - old_logp), and logp is known to 4e-6 of its size.
    p = torch.softmax(torch.where(mask, wide, -torch.inf) if mask is not None else wide, -1).detach().nan_to_num()
    at = torch.zeros_like(p).scatter(-1, targets.clamp(min=0)[:, None], 1.0)
    t = temperature.double()[:, None] if isinstance(temperature, torch.Tensor) else temperature
    return (
        loss.detach(),
        gradient,
        allowed + 8e-6 * ((c["weight"] + c["kl_weight"] + dlogp.abs())[:, None] * (at + p) / t),
    )
