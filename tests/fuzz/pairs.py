"""Options of ``dpo_loss`` and its truth: every type of loss by hand, from the oracles of what it is made of."""

import oracles
import torch
from torch import sigmoid
from torch.nn.functional import logsigmoid

from fuzz.terms import Sum

THREE = {"tpo", "tpo_hinge", "tpo_ipo", "tpo_l"}
RATIOS = {"nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down", "aot", "aot_unpaired", "dpop"}
WITHOUT_REFERENCE = THREE | {"sft", "cpo", "cpo_hinge", "cpo_ipo", "simpo", "orpo", "orpo_odds_ratio"}
SCORED = {"sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm", "ipo_norm", "rpo"}
SMOOTHED = {
    "tpo",
    "tpo_l",
    "dpop",
    "sigmoid",
    "exo_pair",
    "robust",
    "sigmoid_norm",
    "aot",
    "aot_unpaired",
    "cpo",
    "simpo",
}
POLICY = {"cpo", "cpo_hinge", "cpo_ipo", "simpo"}
TYPES = tuple(sorted(SCORED | SMOOTHED | WITHOUT_REFERENCE | RATIOS))


class PairOptions:
    """Drawn options; ``given`` are the keywords. ``lengths=None``: the caller sets them to those of the answers."""

    def __init__(self, draw, pairs, lengths=(1, 9), betas=(0.1, 0.5, 1.0, 2)):
        self.names = tuple(draw.choice(TYPES) for _ in range(draw.choice((1, 1, 1, 2, 3))))
        names = set(self.names)
        self.coefficients = (
            tuple(draw.choice((1.0, 0.5, -1.0, 0, 2)) for _ in self.names)
            if draw.flag(0.5)
            else (1.0,) * len(self.names)
        )
        self.beta = draw.choice(betas)
        self.given = {
            "loss_type": self.names[0] if len(self.names) == 1 and draw.flag(0.5) else self.names,
            "beta": self.beta,
        }
        if self.coefficients != (1.0,) * len(self.names):
            self.given["loss_weights"] = self.coefficients
        self.smoothing = (
            self._optional(draw, "label_smoothing", (0.001, 0.1, 0.3), names & SMOOTHED, "exo_pair" in names) or 0.0
        )
        divergences = (*DIVERGENCES, *["alpha_divergence"] * 2)
        self.divergence = (
            self._optional(draw, "f_divergence", divergences, names <= SCORED | {"sft"} and names != {"sft"})
            or "reverse_kl"
        )
        self.alpha = (
            self._optional(draw, "alpha", (0.3, 2.0, -1.0), self.divergence == "alpha_divergence", draw.flag(0.6))
            or 0.5
        )
        self.averaged = bool(
            self._optional(draw, "length_normalized", (True,), names - {"sft", "orpo", "orpo_odds_ratio", "tpo_l"})
        )
        self.tau = self._optional(draw, "discopop_tau", (0.1, 1.0), "discopop" in names) or 0.05
        self.a = self._optional(draw, "alphapo_alpha", (0.2, -0.3), names & (POLICY | THREE)) or 0.0
        self.cpo_alpha = self._optional(draw, "cpo_alpha", (0, 0.5, 2.0), names & POLICY)
        gamma = self._optional(draw, "simpo_gamma", (0.0, 1.0), names & {"simpo", "tpo_l"})
        self.gamma = 0.5 if gamma is None else gamma
        self.reference_free = bool(self._optional(draw, "reference_free", (True,), True))
        self.needs_reference = not self.reference_free and bool(names - WITHOUT_REFERENCE)
        self.weights = None
        if not names & {"aot", "aot_unpaired"} and draw.flag(0.3):
            x = draw.uniform((pairs,), 0.0, 1.0, draw.choice((torch.float32, torch.bfloat16, torch.float64)))
            self.weights = draw.laid_out(torch.where(draw.coins((pairs,), 0.3), 0.0, x).to(x.dtype))
            self.given["pair_weights"] = self.weights
        self.fallen = self._optional(draw, "dpop_lambda", (0.0, 5.0), "dpop" in names)
        self.fallen = 50.0 if self.fallen is None else self.fallen
        self._draw_further(draw, pairs, names)
        if lengths is not None:
            self.draw_lengths(draw, pairs, lengths)

    def _draw_further(self, draw, pairs, names):
        """Draws a beta per pair, rewards, gold answers and the counts of a whole batch."""
        if not names & {"aot", "aot_unpaired"} and draw.flag(0.2):
            self.given["beta"] = draw.laid_out(draw.uniform((pairs,), 0.1, 2.0, torch.float32))
            self.beta = self.given["beta"].double()
        if "rpo" in names:
            eta = self._optional(draw, "rpo_eta", (0.5, -1.0), True) or 1.0
            rewards = [draw.laid_out(draw.normal((pairs,), torch.float32)) for _ in range(2)]
            self.given |= {"chosen_rewards": rewards[0], "rejected_rewards": rewards[1]}
            self.asked = sigmoid(eta * (rewards[0].double() - rewards[1].double()))
        alpha = self._optional(draw, "tpo_alpha", (0, 0.5), names & THREE)
        self.gold = None
        if names & THREE and alpha != 0:
            gold, counts = draw.uniform((pairs,), -6.0, 0.0, torch.float32), draw.integers(0, 9, (pairs,))
            self.given |= {
                "gold_logps": draw.laid_out(gold, keep=True),
                "gold_lengths": draw.laid_out(counts, keep=True),
            }
            self.gold = gold.double(), counts.double().sum(), 1.0 if alpha is None else alpha
        counted = {"cpo", "cpo_hinge", "cpo_ipo"} if self.cpo_alpha is None else POLICY if self.cpo_alpha else set()
        likelihood = bool(names & (counted | {"sft"}))
        self.counts = None
        if draw.flag(0.15):
            self.counts = {"num_pairs": 9, "num_chosen_tokens": 31, "num_gold_tokens": 17}
            counted = {"num_pairs": True, "num_chosen_tokens": likelihood, "num_gold_tokens": self.gold is not None}
            self.given |= {name: x for name, x in self.counts.items() if counted[name]}
        self.summed = self.counts is None and draw.flag(0.15)
        if self.summed:
            self.given["reduction"] = "sum"

    def share(self, pairs, tokens, name):
        """The weights of a pair and of a token in the loss."""
        pairs = self.counts["num_pairs"] if self.counts else max(pairs, 1)
        tokens = self.counts[name] if self.counts else tokens.clamp(min=1)
        return (1.0, pairs / tokens) if self.summed else (1.0 / pairs, 1.0 / tokens)

    def draw_lengths(self, draw, pairs, between):
        """Draws ``chosen_lengths`` and ``rejected_lengths``."""
        counts = [
            draw.laid_out(draw.integers(*between, (pairs,)).to(draw.choice((torch.int64, torch.int32, torch.float32))))
            for _ in range(2)
        ]
        self.given |= {"chosen_lengths": counts[0], "rejected_lengths": counts[1]}
        self.lengths = [x.double() for x in counts]

    def _optional(self, draw, name, values, taken, needed=False):
        if not taken or not needed and draw.flag(0.65):
            return None
        self.given[name] = draw.choice(values)
        return self.given[name]


def alpha_divergence(log_ratio, alpha):
    """The oracle's, its exponent capped at 80 as the objective says, because fp32 ends at 88."""
    cap = 80.0 / (alpha - 1.0)
    return oracles.alpha_divergence(log_ratio.clamp(max=cap) if cap > 0 else log_ratio.clamp(min=cap), alpha)


DIVERGENCES = {
    "reverse_kl": lambda rho, alpha: rho,
    "forward_kl": lambda rho, alpha: alpha_divergence(rho, 0.0),
    "js_divergence": lambda rho, alpha: oracles.js_divergence(rho),
    "alpha_divergence": alpha_divergence,
}


def pair_metrics(chosen, rejected, ref_chosen, ref_rejected, o):
    """Means of the implicit rewards over the pairs with a weight.

    Without references there are losses that average per token: left out here.
    """
    if ref_chosen is None and any(name in ("simpo", "orpo", "orpo_odds_ratio", "tpo_l") for name in o.names):
        return {}
    c, r = (
        o.beta * (x.detach() - (0.0 if ref is None else ref))
        for x, ref in ((chosen, ref_chosen), (rejected, ref_rejected))
    )
    live = torch.ones(c.shape, dtype=torch.bool) if o.weights is None else o.weights != 0
    means = {"reward_chosen": c, "reward_rejected": r, "reward_margin": c - r}
    if (c - r).abs().min() > 1e-3 if c.numel() else True:  # a tie is for nobody to win
        means["accuracy"] = (c > r).double()
    return {name: torch.where(live, x, 0.0).sum() / live.sum().clamp(min=1) for name, x in means.items()}


def true_dpo(chosen, rejected, ref_chosen, ref_rejected, o):
    """``Sum`` of the loss; all in float64."""
    n = [x.clamp(min=1.0) for x in o.lengths]
    weights = torch.ones_like(chosen, requires_grad=False) if o.weights is None else o.weights.double()
    per_pair, per_token = o.share(chosen.numel(), o.lengths[0].sum(), "num_chosen_tokens")
    total = Sum()
    for name, coefficient in zip(o.names, o.coefficients, strict=True):
        loss = _each(name, chosen, rejected, ref_chosen, ref_rejected, n, o)
        likelihood = {"sft": 1.0, "cpo": 1.0, "cpo_hinge": 1.0, "cpo_ipo": 1.0}.get(name, 0.0)
        likelihood = o.cpo_alpha if name in POLICY and o.cpo_alpha is not None else likelihood
        total = total.plus(weights * coefficient * per_pair, loss)
        total = total.plus(weights * coefficient * likelihood * per_token, -chosen)
        if name in THREE and o.gold is not None:
            gold, tokens, alpha = o.gold
            _, per_gold_token = o.share(chosen.numel(), tokens, "num_gold_tokens")
            total = total.plus(weights * coefficient * alpha * per_gold_token, -gold)
    return total


def _each(name, chosen, rejected, ref_chosen, ref_rejected, n, o):
    """Of each pair, without the likelihood of the chosen answers."""
    b, e = o.beta, o.smoothing
    free = o.reference_free or ref_chosen is None
    rho = [chosen, rejected] if free else [chosen - ref_chosen, rejected - ref_rejected]

    def averages(both, averaged):
        return [x / length for x, length in zip(both, n, strict=True)] if averaged else both

    def margin(averaged):
        c, r = averages([DIVERGENCES[o.divergence](x, o.alpha) for x in rho], averaged)
        return c - r

    def policy(averaged):
        c, r = ((1 - (-o.a * x).exp()) / o.a if o.a else x for x in averages([chosen, rejected], averaged))
        return c - r

    def logistic(x):
        return oracles.dpo_sigmoid(x, b, e)

    if name in RATIOS:
        rho = averages(rho, o.averaged)
    match name:
        case "ipo_norm":
            return oracles.ipo(margin(True), b)
        case "dpop":
            return logistic(rho[0] - rho[1] - o.fallen * torch.relu(-rho[0]))
        case "rpo":
            t, x = o.asked, b * margin(o.averaged)
            entropy = torch.xlogy(t, t) + torch.xlogy(1 - t, 1 - t)
            return entropy - t * logsigmoid(x) - (1 - t) * logsigmoid(-x)
        case "tpo":
            return logistic(policy(o.averaged))
        case "tpo_hinge":
            return oracles.hinge(policy(o.averaged), b)
        case "tpo_ipo":
            return oracles.ipo(policy(o.averaged), b)
        case "tpo_l":
            return logistic(policy(True) - o.gamma / b)
        case "sigmoid" | "sigmoid_norm":
            return logistic(margin(o.averaged or name == "sigmoid_norm"))
        case "hinge" | "ipo":
            return getattr(oracles, name)(margin(o.averaged), b)
        case "exo_pair" | "robust":
            return getattr(oracles, name)(margin(o.averaged), b, e)
        case "discopop":
            return oracles.discopop(margin(o.averaged), b, o.tau)
        case "nca_pair":
            return -logsigmoid(b * rho[0]) - logsigmoid(-b * rho[0]) / 2 - logsigmoid(-b * rho[1]) / 2
        case "bco_pair":
            return -logsigmoid(b * rho[0]) - logsigmoid(-b * rho[1])
        case "sppo_hard":
            return (rho[0] - 0.5 / b) ** 2 + (rho[1] + 0.5 / b) ** 2
        case "apo_zero":
            return 1 - sigmoid(b * rho[0]) + sigmoid(b * rho[1])
        case "apo_down":
            return sigmoid(b * rho[0]) + 1 - sigmoid(b * (rho[0] - rho[1]))
        case "aot":
            c, r = averages([chosen, rejected], o.averaged)
            gap = (c - r).sort().values
            if free:
                return logistic(gap)
            c, r = averages([ref_chosen, ref_rejected], o.averaged)
            return logistic(gap - (c - r).sort().values)
        case "aot_unpaired":
            return logistic(rho[0].sort().values - rho[1].sort().values)
        case "sft":
            return torch.zeros_like(chosen)
        case "cpo":
            return logistic(policy(o.averaged))
        case "cpo_hinge":
            return oracles.hinge(policy(o.averaged), b)
        case "cpo_ipo":
            return oracles.ipo(policy(o.averaged), b)
        case "simpo":
            return logistic(policy(True) - o.gamma / b)
        case "orpo" | "orpo_odds_ratio":
            c, r = averages([chosen, rejected], True)
            return -b * logsigmoid(oracles.log_odds(c) - oracles.log_odds(r)) - (c if name == "orpo" else 0.0)
    raise ValueError(name)
