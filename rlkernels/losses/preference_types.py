"""The terms of each preference loss: a table from its name to objectives of one number per pair."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor

from rlkernels.losses.policy_arguments import present
from rlkernels.losses.weighted_sum import each
from rlkernels.objectives import OBJECTIVES, Objective, registered
from rlkernels.types import Number

if TYPE_CHECKING:  # because the options are made from the table below
    from rlkernels.losses.preference_options import PreferenceOptions

Both: TypeAlias = tuple[Tensor, Tensor] | list[Tensor]
"""A number per chosen answer, and one per rejected answer."""
Term: TypeAlias = tuple[Number, str, Tensor, tuple[Number, ...]]
"""A coefficient, the name of an objective, numbers per pair, and the objective's parameters."""
Terms: TypeAlias = Callable[["Pairs", "PreferenceOptions"], list[Term]]


class Pairs:
    """The numbers per pair that the losses look at, ``[B]``: log-ratios, scores of them, and margins between scores."""

    def __init__(
        self,
        chosen: Tensor,
        rejected: Tensor,
        ref_chosen: Tensor | None,
        ref_rejected: Tensor | None,
        options: "PreferenceOptions",
    ) -> None:
        self.policy, self.options = (chosen, rejected), options
        self.references = [None if options.reference_free else x for x in (ref_chosen, ref_rejected)]
        self.log_ratios = [
            logp if ref is None else logp - ref for logp, ref in zip(self.policy, self.references, strict=True)
        ]

    def scored(self, objective: str, x: Tensor, *params: Number) -> Tensor:
        """Computes an objective's value, differentiable; 0 without a gradient for a pair of weight 0."""
        return each(objective, *of_each_beta(objective, x, params), self.options.pair_weights)

    def diverged(self, scores: Both, alpha: Number) -> Both:
        """Computes scores under an alpha-divergence.

        At ``alpha = 1`` that is the reverse KL, whose score is the log-ratio itself. What is nearer to 1 than the dtype
        can tell counts as 1.
        """
        near = torch.finfo(scores[0].dtype).eps
        if not isinstance(alpha, torch.Tensor):
            return scores if abs(alpha - 1.0) <= near else [self.scored("alpha_divergence", x, alpha) for x in scores]
        limit = (alpha.double() - 1.0).abs() <= near
        other = torch.where(limit, 0.0, alpha)
        return [torch.where(limit, x, self.scored("alpha_divergence", x, other)) for x in scores]

    def averages(self, both: Both) -> Both:
        """Divides a number per chosen and per rejected answer by the answers' lengths."""
        return [x / n for x, n in zip(both, self.options.lengths, strict=True)]

    def ratios(self) -> Both:
        """Returns the log-ratios, or their averages per token where the caller asked for these."""
        return self.averages(self.log_ratios) if self.options.length_normalized else self.log_ratios

    def margin(self, averaged: bool) -> Tensor:
        """Computes ``S_c - S_r``, ``S = f(log-ratio)``, each divided by the answer's length where ``averaged``."""
        js = self.options.f_divergence == "js_divergence"
        scores = (
            [self.scored("js_divergence", x) for x in self.log_ratios]
            if js
            else self.diverged(self.log_ratios, self.options.alpha)
        )
        chosen, rejected = self.averages(scores) if averaged else scores
        return chosen - rejected

    def policy_scores(self, averaged: bool) -> Both:
        """Computes the scores of losses without a reference: log-probabilities, or averages per token.

        AlphaPO transforms them where its alpha is not 0.
        """
        return self.diverged(self.averages(self.policy) if averaged else self.policy, 1.0 - self.options.alphapo_alpha)

    def policy_margin(self, averaged: bool) -> Tensor:
        """Computes the difference of ``policy_scores``."""
        chosen, rejected = self.policy_scores(averaged)
        return chosen - rejected

    def odds(self) -> Tensor:
        """Computes the log of the odds ratio, from averages per token.

        It is 0 for a pair with an empty answer, and for a pair of two certain answers.
        """
        chosen, rejected = (self.scored("log_odds", x) for x in self.averages(self.policy))
        # Selected, because odds of probability 1 are infinite, and infinity less infinity would make the mean NaN.
        equal = self.options.empty | (chosen == torch.inf) & (rejected == torch.inf)
        return torch.where(equal, 0.0, chosen - rejected)

    def terms(self) -> Iterator[Term]:
        """Yields every term of every loss in the mixture.

        A term is its coefficient, the name of its objective, numbers per pair, and the objective's parameters.
        """
        for kind, weight in zip(self.options.kinds, self.options.loss_weights, strict=True):
            # Not 1.0 times beta, because in torch 2.11 a product of two numbers is a constant of the graph. Every beta
            # would have a graph of its own.
            plain = not isinstance(weight, torch.Tensor) and weight == 1.0
            for coefficient, objective, x, params in kind.terms(self, self.options):
                x, params = of_each_beta(objective, x, params)
                yield coefficient if plain else weight * coefficient, objective, x, params
            likelihood = kind.likelihood_coefficient(self.options)
            if present(likelihood):
                yield weight * likelihood * self.options.pairs_per_token, "nll", self.policy[0], ()


def of_each_beta(objective: str, x: Tensor, params: tuple[Number, ...]) -> tuple[Tensor, tuple[Number, ...]]:
    """Moves a beta per pair from the parameters of an objective into its column, with 1 in its place.

    Every objective is one of ``beta x``, but IPO, which is one of ``x - 1/(2 beta)``.
    """
    names = OBJECTIVES[objective].params
    beta = params[0] if names and names[0] == "beta" else None
    if not isinstance(beta, torch.Tensor) or not beta.dim():
        return x, params
    return x - 0.5 / beta + 0.5 if objective == "ipo" else beta * x, (1.0, *params[1:])


# Each function below returns the terms of one loss, from (pairs, options). The likelihood of the chosen answers, which
# some losses add, is in ``Pairs.terms``.


def _none(p: Pairs, o: "PreferenceOptions") -> list[Term]:
    return []


def _margin(objective: str, *names: str, averaged: bool = False) -> Terms:
    return lambda p, o: [
        (1.0, objective, p.margin(averaged or o.length_normalized), tuple(getattr(o, name) for name in names))
    ]


def _of_user(objective: str) -> Terms:
    return lambda p, o: [(1.0, objective, p.margin(o.length_normalized), o.params[objective])]


def _policy(objective: str, *names: str) -> Terms:
    return lambda p, o: [
        (1.0, objective, p.policy_margin(o.length_normalized), tuple(getattr(o, name) for name in names))
    ]


def _simpo(p: Pairs, o: "PreferenceOptions") -> list[Term]:
    return [(1.0, "dpo_sigmoid", p.policy_margin(True) - o.simpo_gamma / o.beta, (o.beta, o.label_smoothing))]


def _dpop(p: Pairs, o: "PreferenceOptions") -> list[Term]:
    chosen, rejected = p.ratios()
    fallen = torch.relu(-chosen)
    return [(1.0, "dpo_sigmoid", chosen - rejected - o.dpop_lambda * fallen, (o.beta, o.label_smoothing))]


def _rpo(p: Pairs, o: "PreferenceOptions") -> list[Term]:
    margin, (win, lose) = p.margin(o.length_normalized), o.win_and_lose
    entropy = -torch.special.xlogy(win, win) - torch.special.xlogy(lose, lose)
    return [
        (win, "dpo_sigmoid", margin, (o.beta, 0.0)),
        (lose, "dpo_sigmoid", -margin, (o.beta, 0.0)),
        (1.0, "nll", entropy, ()),  # a constant, which makes the loss a divergence
    ]


def _nca(p: Pairs, o: "PreferenceOptions") -> list[Term]:
    chosen, rejected = p.ratios()
    return [
        (weight, "dpo_sigmoid", x, (o.beta, 0.0)) for weight, x in ((1.0, chosen), (0.5, -chosen), (0.5, -rejected))
    ]


def _bco(p: Pairs, o: "PreferenceOptions") -> list[Term]:
    chosen, rejected = p.ratios()
    return [(1.0, "dpo_sigmoid", x, (o.beta, 0.0)) for x in (chosen, -rejected)]


def _up_and_down(objective: str) -> Terms:
    def terms(p: Pairs, o: "PreferenceOptions") -> list[Term]:
        chosen, rejected = p.ratios()
        return [(1.0, objective, chosen, (o.beta,)), (1.0, objective, -rejected, (o.beta,))]

    return terms


def _apo_down(p: Pairs, o: "PreferenceOptions") -> list[Term]:
    chosen, rejected = p.ratios()
    return [(1.0, "kto", -chosen, (o.beta,)), (1.0, "kto", chosen - rejected, (o.beta,))]


def _aot(p: Pairs, o: "PreferenceOptions") -> list[Term]:
    policy, references = p.policy, p.references
    if o.length_normalized:
        policy = p.averages(policy)
        references = references if references[0] is None else p.averages(references)
    gap = (policy[0] - policy[1]).flatten().sort().values
    if references[0] is not None:
        gap = gap - (references[0] - references[1]).flatten().sort().values
    return [(1.0, "dpo_sigmoid", gap, (o.beta, o.label_smoothing))]


def _aot_unpaired(p: Pairs, o: "PreferenceOptions") -> list[Term]:
    chosen, rejected = (x.flatten().sort().values for x in p.ratios())
    return [(1.0, "dpo_sigmoid", chosen - rejected, (o.beta, o.label_smoothing))]


def _odds_ratio(p: Pairs, o: "PreferenceOptions") -> list[Term]:
    return [(o.beta, "pairwise", p.odds(), ())]


def _orpo(p: Pairs, o: "PreferenceOptions") -> list[Term]:
    return [(1.0, "nll", p.averages(p.policy)[0], ()), *_odds_ratio(p, o)]


class Kind(NamedTuple):
    """A loss type: its terms, and the further inputs that it takes besides ``beta`` and the log-probabilities."""

    terms: Terms
    takes: tuple[str, ...] = ()  # further options
    averages: bool = False  # always of averages per token
    reference: bool = True
    separable: bool = True  # the loss of a pair depends on that pair alone
    divides: bool = False  # by beta, which must not be 0
    gold: bool = False  # adds the likelihood of a third answer
    # The coefficient of the mean over tokens of -log pi of the chosen answers. In losses that take cpo_alpha, that
    # option replaces it.
    likelihood: float = 0.0
    objective: Objective | None = None  # of a user's own, with parameters of its own

    def likelihood_coefficient(self, options: "PreferenceOptions") -> Number:
        """Returns the coefficient of the likelihood of the chosen answers."""
        return options.cpo_alpha if options.cpo_alpha is not None and "cpo_alpha" in self.takes else self.likelihood


SMOOTH, SCORE, AVERAGE = ("label_smoothing",), ("f_divergence", "length_normalized"), ("length_normalized",)
POLICY = ("alphapo_alpha", "cpo_alpha", "length_normalized")
TRIPLE = ("alphapo_alpha", "tpo_alpha", "gold_logps", "gold_lengths")
KINDS = {
    "sigmoid": Kind(_margin("dpo_sigmoid", "beta", "label_smoothing"), SMOOTH + SCORE),
    "hinge": Kind(_margin("hinge", "beta"), SCORE),
    "ipo": Kind(_margin("ipo", "beta"), SCORE, divides=True),
    "exo_pair": Kind(_margin("exo_pair", "beta", "label_smoothing"), SMOOTH + SCORE),
    "nca_pair": Kind(_nca, AVERAGE),
    "robust": Kind(_margin("robust", "beta", "label_smoothing"), SMOOTH + SCORE),
    "bco_pair": Kind(_bco, AVERAGE),
    "sppo_hard": Kind(_up_and_down("ipo"), AVERAGE, divides=True),
    "aot": Kind(_aot, SMOOTH + AVERAGE, separable=False),
    "aot_unpaired": Kind(_aot_unpaired, SMOOTH + AVERAGE, separable=False),
    "apo_zero": Kind(_up_and_down("kto"), AVERAGE),
    "apo_down": Kind(_apo_down, AVERAGE),
    "discopop": Kind(_margin("discopop", "beta", "discopop_tau"), (*SCORE, "discopop_tau")),
    "sft": Kind(_none, (), reference=False, likelihood=1.0),
    "sigmoid_norm": Kind(
        _margin("dpo_sigmoid", "beta", "label_smoothing", averaged=True), SMOOTH + SCORE, averages=True
    ),
    "ipo_norm": Kind(_margin("ipo", "beta", averaged=True), SCORE, averages=True, divides=True),
    "dpop": Kind(_dpop, (*SMOOTH, *AVERAGE, "dpop_lambda")),
    "rpo": Kind(_rpo, (*SCORE, "rpo_eta", "chosen_rewards", "rejected_rewards")),
    "cpo": Kind(_policy("dpo_sigmoid", "beta", "label_smoothing"), SMOOTH + POLICY, reference=False, likelihood=1.0),
    "cpo_hinge": Kind(_policy("hinge", "beta"), POLICY, reference=False, likelihood=1.0),
    "cpo_ipo": Kind(_policy("ipo", "beta"), POLICY, reference=False, likelihood=1.0, divides=True),
    "simpo": Kind(_simpo, (*SMOOTH, *POLICY, "simpo_gamma"), averages=True, reference=False, divides=True),
    "orpo": Kind(_orpo, averages=True, reference=False),
    "orpo_odds_ratio": Kind(_odds_ratio, averages=True, reference=False),
    "tpo": Kind(
        _policy("dpo_sigmoid", "beta", "label_smoothing"), SMOOTH + AVERAGE + TRIPLE, reference=False, gold=True
    ),
    "tpo_hinge": Kind(_policy("hinge", "beta"), AVERAGE + TRIPLE, reference=False, gold=True),
    "tpo_ipo": Kind(_policy("ipo", "beta"), AVERAGE + TRIPLE, reference=False, divides=True, gold=True),
    "tpo_l": Kind(_simpo, (*SMOOTH, *TRIPLE, "simpo_gamma"), averages=True, reference=False, divides=True, gold=True),
}
FROM_OPTIONS = ("beta", "label_smoothing")
"""The parameters of a user's objective that are options of every loss of pairs."""


def kind_of_user(loss_type: object) -> tuple[str, Kind] | None:
    """Returns the name and the kind of a user's objective of one margin, None where it is no such objective."""
    entry = registered(loss_type)
    if entry is None or entry.columns != ("margin",) or entry.ours:
        return None
    name, params = entry.function.__name__, entry.params
    takes = SCORE + tuple(x for x in FROM_OPTIONS[1:] if x in params)
    return name, Kind(_of_user(name), takes, divides="beta" in params, objective=entry)
