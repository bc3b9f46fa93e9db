"""The parts of a policy loss: drawn arguments, and the true loss of each in float64 from log-probabilities and
entropies.
"""

import oracles
import torch

from fuzz.batches import MODES, draw_normalizers, true_weights

PARAMETERS = {
    "reinforce": {},
    "ppo_clip": {"clip_low": 0.2, "clip_high": 0.2},
    "dual_clip": {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": 3.0},
    "sapo": {"tau_pos": 1.0, "tau_neg": 1.05},
    "cispo": {"clip_low": 1.0, "clip_high": 0.3},
    "surrogate": {},
    "ppo_clip_cap": {"ratio_cap": 1.5, "clip_low": 0.2, "clip_high": 0.2},
    "cispo_max_only": {"clip_high": 0.3},
    "cispo_absolute": {"ratio_max": 1.3},
}
CHOICES = {
    "clip_low": (0.1, 0.3, 0.7),
    "clip_high": (0.1, 0.3, 0.7),
    "dual_clip": (1.5, 2, 4.0),
    "ratio_cap": (0.7, 1.1, 3),
    "ratio_max": (0.7, 2.0),
    "tau_pos": (0.5, 2.0),
    "tau_neg": (0.5, 2.0),
}
ORACLES = {name: getattr(oracles, name) for name in PARAMETERS}
WITHOUT_DEFAULTS = ("cispo", "regression", "ppo_clip_cap", "cispo_max_only", "cispo_absolute")
OF_A_RATIO = ("ppo_clip", "dual_clip", "sapo", "surrogate", "ppo_clip_cap")
"""The objectives that depend on the log-ratio alone, whose log-ratio may have bounds."""
LEVELS = ("sequence", "sequence_token", "sequence_sum")


class Sum:
    """A loss as a weighted sum: its ``value``, and the ``size`` of its terms, against which an error is small."""

    def __init__(self, value=0.0, size=0.0):
        self.value, self.size = torch.as_tensor(value, dtype=torch.float64), float(size)

    def plus(self, weight, x):
        """With ``weight * x``; an element of weight 0 is left out, whatever it holds."""
        terms = torch.where(weight != 0, weight * torch.where(weight != 0, x, 0.0), 0.0)
        return Sum(self.value + terms.sum(), self.size + terms.detach().abs().nan_to_num(0.0, 0.0, 0.0).sum())


class Weighting:
    """Arguments that say what a token weighs; ``weights`` or an aggregation with its normalisers."""

    def __init__(self, draw, batch):
        self.given, self.mode, self.normalizers = None, "token-mean", {}
        if draw.flag(0.2):
            self.given = draw.column(batch.live, 0.5)
            if draw.flag(0.3):
                self.given = torch.where(draw.coins(batch.shape, 0.3), 0.0, self.given).to(self.given.dtype)
            self.options = {"weights": self.given}
            return
        self.mode = draw.choice(MODES)
        self.normalizers = draw_normalizers(draw, self.mode, batch)
        self.options = {} if self.mode == "token-mean" and draw.flag(0.5) else {"aggregation": self.mode}
        if self.normalizers:
            self.options["normalizers"] = self.normalizers

    def of_sequences(self):
        """One loss per sequence: their mean is one over sequences, which has no number of tokens."""
        if self.given is None and self.mode == "token-mean":
            self.mode = "seq-mean"
            self.normalizers.pop("batch_num_tokens", None)

    def truth(self, batch):
        """Of each token, float64; 0 where it is dead."""
        if self.given is not None:
            return torch.where(batch.live, self.given.double(), 0.0)
        return true_weights(self.mode, batch, self.normalizers)


def per_sequence(draw, batch, dtype):
    """``(argument, float64 per token)`` of one number per sequence; a shape ``[S, 1]`` says so where a length would
    not.
    """
    x = draw.laid_out(draw.normal((batch.count,), dtype))
    return (x[:, None] if batch.live.numel() == batch.count or draw.flag(0.5) else x), batch.spread(x.double())


class PolicyTerms:
    """The drawn arguments of a policy loss besides its log-probabilities; ``options`` are its keywords.

    ``batch.live`` may lose tokens between the draw and the truth: those whose target is ignored.
    """

    def __init__(self, draw, batch):
        self.name = draw.choice(tuple(PARAMETERS))
        given = {
            name: draw.choice(CHOICES[name])
            for name in PARAMETERS[self.name]
            if self.name in WITHOUT_DEFAULTS or draw.flag(0.5)
        }
        self.parameters = {**PARAMETERS[self.name], **given}
        self.level = "token" if self.name == "reinforce" or draw.flag(0.6) else draw.choice(LEVELS)
        self.weighting = Weighting(draw, batch)
        if self.level == "sequence_sum":
            self.weighting.of_sequences()
        self.old = draw.column(batch.live, 0.5)
        self.advantages, self.advantage = self._advantages(draw, batch)
        self.options = {
            **given,
            **self.weighting.options,
            **batch.packing(),
            "objective": self.name,
            "ratio_level": self.level,
        }
        if self.name == "ppo_clip" and draw.flag(0.3):
            del self.options["objective"]
        self.kl, self.kl_coef, self.ref = None, 0.0, None
        if draw.flag(0.4):
            self.kl, self.kl_coef, self.ref = (
                draw.choice(("k1", "k2", "k3")),
                draw.choice((0.1, 1.0, -0.5)),
                draw.column(batch.live, 0.5),
            )
            self.options |= {"kl": self.kl, "kl_coef": self.kl_coef, "ref_logprobs": self.ref}
        self.bounds, self.square, self.rollout = None, 0.0, None
        if self.name in OF_A_RATIO and draw.flag(0.2):
            self.bounds = draw.choice(((-0.2, 0.2), (None, 0.3), (-1.0, 0.1)))
            self.options["log_ratio_clamp"] = 0.2 if self.bounds == (-0.2, 0.2) else self.bounds
        if draw.flag(0.2):
            self.square, self.rollout = draw.choice((0.1, 1.0)), draw.column(batch.live, 0.5)
            self.options |= {"log_ratio_sq_coef": self.square, "rollout_logprobs": self.rollout}
        self.entropy_coef = draw.choice((0.01, 1.0, -0.3)) if draw.flag(0.4) else 0.0
        if self.entropy_coef:
            self.options["entropy_coef"] = self.entropy_coef
        self.factor = self._factor(draw, batch)
        if self.name != "reinforce" and self.rollout is None and "correction" not in self.options and draw.flag(0.15):
            self.options |= {"ratio_denominator": "rollout", "rollout_logprobs": self.old}

    def visible_old(self, draw):
        """``old_logprobs``, None or others where nobody looks at them."""
        if "ratio_denominator" in self.options:
            return draw.choice((None, torch.full_like(self.old, -7.0)))
        return None if self.name == "reinforce" and draw.flag(0.5) else self.old

    def _advantages(self, draw, batch):
        """``(argument, float64 per token)``: per token or per sequence."""
        if draw.flag(0.6) and not batch.is_ambiguous():
            x = draw.column(batch.live)
            x = torch.where(draw.coins(batch.shape, 0.3), 0.0, x).to(x.dtype) if draw.flag(0.2) else x
            return x, x.double()
        return per_sequence(draw, batch, draw.choice((torch.float32, torch.bfloat16, torch.float64)))

    def _factor(self, draw, batch):
        """What multiplies the objective's loss of a token, float64, or None: a correction."""
        kind = draw.choice((None,) * 7 + ("factors", "engine", "engine"))
        if kind == "factors":
            self.options["correction"] = draw.column(batch.live)
            return self.options["correction"].double()
        if kind is None or self.name == "reinforce" or self.level in ("sequence", "sequence_token"):
            return None
        engine = draw.column(batch.live, 0.5) if self.rollout is None else self.rollout
        self.options |= {"correction": {"high": 1.5, "low": 0.6}, "rollout_logprobs": engine}
        return (self.old.double() - self.options["rollout_logprobs"].double()).exp().clamp(0.6, 1.5)

    def objective(self, logp, old, advantage):
        if self.bounds is not None:
            logp, old = (logp - old).clamp(*self.bounds), torch.zeros_like(old)
        columns = (logp, advantage) if self.name == "reinforce" else (logp, old, advantage)
        return ORACLES[self.name](*columns, **self.parameters)

    def truth(self, batch, logp, entropy=None):
        """``Sum`` of the loss: differentiable in ``logp`` and ``entropy``, float64, shaped like the batch."""
        live = batch.live

        def clean(x):
            return torch.where(live, x.double(), 0.0)

        logp, old, advantage, weight = clean(logp), clean(self.old), clean(self.advantage), self.weighting.truth(batch)
        total = Sum()
        own = weight if self.factor is None else torch.where(weight != 0, weight * clean(self.factor), 0.0)
        if self.level == "sequence_sum":
            total = total.plus(
                batch.sums(own), self.objective(batch.sums(logp), batch.sums(old), batch.means(advantage))
            )
        else:
            if self.level == "sequence":
                logp_, old_ = batch.spread(batch.means(logp)), batch.spread(batch.means(old))
            elif self.level == "sequence_token":
                logp_, old_ = logp, logp.detach() - batch.spread(batch.means(logp.detach() - old))
            else:
                logp_, old_ = logp, old
            total = total.plus(own, self.objective(logp_, old_, advantage))
        if self.kl_coef:
            total = total.plus(weight * self.kl_coef, getattr(oracles, self.kl)(logp, clean(self.ref)))
        if self.square:
            total = total.plus(weight * self.square, (logp - clean(self.rollout)).square())
        if self.entropy_coef:
            total = total.plus(-weight * self.entropy_coef, clean(entropy))
        return total

    def metrics(self, batch, logp, entropy):
        """Means over the live tokens that have a weight, factors apart."""
        live = batch.live & (self.weighting.truth(batch) != 0)

        def mean(x):
            return torch.where(live, x.double(), 0.0).sum() / live.sum().clamp(min=1)

        def clean(x):
            return torch.where(batch.live, x.detach().double(), 0.0)

        found = {} if entropy is None else {"entropy": mean(clean(entropy))}
        if self.ref is not None:
            found["kl"] = mean(getattr(oracles, self.kl)(clean(logp), clean(self.ref)))
        if self.name == "reinforce":
            return found
        gap = clean(logp) - clean(self.old)
        spread = gap
        if self.level != "token":
            spread = batch.spread((batch.sums if self.level == "sequence_sum" else batch.means)(gap))
        ratio = (spread if self.bounds is None else spread.clamp(*self.bounds)).exp()
        found |= {"ppo_kl": mean(-gap), "approx_kl": mean(gap * gap / 2), "ratio": mean(ratio)}
        if {"clip_low", "clip_high"} <= set(self.parameters):
            low, high = ratio < 1 - self.parameters["clip_low"], ratio > 1 + self.parameters["clip_high"]
            # A surrogate is clipped on the side where that makes it smaller; CISPO's weight on both.
            if self.name != "cispo":
                low, high = low & (clean(self.advantage) < 0), high & (clean(self.advantage) > 0)
            found |= {
                "clip_fraction_low": mean(low),
                "clip_fraction_high": mean(high),
                "clip_fraction": mean(low | high),
            }
        return found
