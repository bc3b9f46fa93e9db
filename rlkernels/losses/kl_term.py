"""The KL term of a policy loss: its estimator, clamps, gradient and ratio, and the tokens that it acts on."""

import math
from dataclasses import dataclass
from typing import NamedTuple, cast, get_args

from torch import Tensor

from rlkernels import checks
from rlkernels.aggregation import AGGREGATIONS
from rlkernels.objectives import OBJECTIVES, Objective, registered
from rlkernels.types import (
    KL,
    Aggregation,
    Clamp,
    ExactKL,
    KLGradient,
    KLRatioLevel,
    Mask,
    Normalizers,
    ObjectiveLike,
    PerToken,
)

KLS, EXACT, GRADIENTS, LEVELS = get_args(KL), get_args(ExactKL), get_args(KLGradient), get_args(KLRatioLevel)
PLAIN = ("k1", "k2", "k3", "kl_abs")
"""The objectives that the kernels over rows hold as a KL term: two columns and no numbers."""
ORDERS = {"abs": 0.0, "k1": 1.0, "k2": 2.0, "k3": 3.0}
"""The numbers by which the objective ``kl_term`` knows the estimators."""


class KLObjective(NamedTuple):
    """A KL estimator as a registered objective: its name and the numbers behind its columns."""

    name: str
    params: tuple[float, ...] = ()

    def others(self, logp: Tensor, ref_logp: Tensor, old_logp: Tensor | None) -> list[Tensor]:
        """Returns the columns behind ``logp``; without ``old_logp`` the ratio is 1."""
        if self.name in PLAIN:
            return [ref_logp]
        old_logp = logp.detach() if old_logp is None else old_logp
        return [ref_logp if name == "ref_logp" else old_logp for name in OBJECTIVES[self.name].columns[1:]]

    def of_a_user(self) -> bool:
        """Tells whether the estimator is not one of the library."""
        return self.name not in (*PLAIN, *EXACT, "kl_term")

    def moving(self) -> bool:
        """Tells whether the gradient flows through the ratio."""
        return self.name == "kl_term" and self.params[6] > 0.5

    def with_constant_ratio(self) -> "KLObjective":
        """Returns the same estimator, weighed by the ratio as by a constant."""
        return KLObjective(self.name, (*self.params[:6], 0.0, *self.params[7:]))

    def cap(self) -> float:
        """Returns the upper bound of the ratio."""
        return self.params[5]


def named_objective(kl: str) -> str:
    """Returns the objective of a plain estimator."""
    return "kl_abs" if kl == "abs" else kl


def kl_objective(
    caller: str,
    argument: str,
    estimator: KL | ExactKL | ObjectiveLike,
    diff_clamp: Clamp,
    value_clamp: Clamp,
    gradient: KLGradient,
    ratio_weighted: bool,
    ratio_detached: bool,
    ratio_cap: float | None,
    known: tuple[str, ...] = KLS,
) -> KLObjective:
    """Checks the options of an estimator and returns its objective; ``argument``: the name of the estimator's argument.

    Raises:
        TypeError, ValueError: unknown names, bounds that are no numbers or in the wrong order, an option of the ratio
            without the ratio.
    """
    own = None if isinstance(estimator, str) and estimator in KLS + EXACT else registered(estimator)
    if own is None or known is KLS:
        checks.choice(caller, argument, estimator, known)
    checks.choice(caller, "gradient", gradient, GRADIENTS)
    ratio_weighted = checks.flag(caller, "ratio_weighted", ratio_weighted)
    ratio_detached = checks.flag(caller, "ratio_detached", ratio_detached)
    low, high = _bounds(caller, "diff_clamp", diff_clamp)
    value_low, value_high = _bounds(caller, "value_clamp", value_clamp)
    if not ratio_weighted and (ratio_detached or ratio_cap is not None):
        option = "ratio_detached" if ratio_detached else "ratio_cap"
        raise ValueError(f"{caller}: {option} belongs to ratio_weighted=True, got ratio_weighted=False")
    if ratio_detached and gradient == "k2":
        raise ValueError(
            f"{caller}: ratio_detached=True with gradient='k2': the ratio is a constant there; leave ratio_detached out"
        )
    cap = math.inf if ratio_cap is None else checks.positive(caller, "ratio_cap", ratio_cap)
    straight = gradient == "k2"
    if not (straight or ratio_weighted or diff_clamp is not None or value_clamp is not None):
        return KLObjective(named_objective(estimator)) if own is None else _of_a_user(caller, argument, own)
    if own is not None:
        raise ValueError(
            f"{caller}: {argument}={own.function.__name__!r} takes no clamp, ratio or other gradient; write them into "
            "the objective"
        )
    if estimator in EXACT:
        raise ValueError(
            f"{caller}: {argument}={estimator!r} is no estimate of sampled tokens: it takes no clamp, ratio or "
            "other gradient; leave them out"
        )
    moving = ratio_weighted and not ratio_detached and not straight
    bounds = low, high, value_low, value_high
    return KLObjective("kl_term", (ORDERS[cast(str, estimator)], *bounds, cap, float(moving), float(straight)))


def _of_a_user(caller: str, argument: str, entry: Objective) -> KLObjective:
    """Returns a registered objective as a KL estimator, with the defaults of its parameters."""
    name = entry.function.__name__
    further = [c for c in entry.columns if c not in ("logp", "ref_logp", "old_logp")]
    if further or entry.columns[0] != "logp" or "ref_logp" not in entry.columns:
        raise ValueError(
            f"{caller}: {argument}={name!r} has columns {', '.join(entry.columns)}; expected logp, then ref_logp and, "
            "if need be, old_logp"
        )
    defaults = dict(entry.defaults)
    missing = [p for p in entry.params if p not in defaults]
    if missing:
        raise ValueError(f"{caller}: {argument}={name!r} has {', '.join(missing)} without a default; give it one")
    return KLObjective(name, tuple(defaults[p] for p in entry.params))


def _bounds(caller: str, name: str, clamp: Clamp) -> tuple[float, float]:
    """Returns the lower and the upper bound of a clamp, infinite where it has none."""
    if clamp is None:
        return -math.inf, math.inf
    if not isinstance(clamp, (tuple, list)):
        high = checks.positive(caller, name, clamp)
        return -high, high
    if len(clamp) != 2:
        raise ValueError(
            f"{caller}: {name} has {len(clamp)} entries, expected (low, high), of which either may be None"
        )
    low, high = (
        side if x is None else checks.finite(caller, name, x)
        for x, side in zip(clamp, (-math.inf, math.inf), strict=True)
    )
    if not low < high:
        raise ValueError(f"{caller}: {name} must be (low, high) with low < high, got ({low}, {high})")
    return low, high


@dataclass(frozen=True, eq=False)
class KLTerm:
    r"""The KL term of a policy loss, where a name does not say enough: ``policy_loss(..., kl=KLTerm(...), kl_coef=c)``.

    Per token ``w clip(k(clip(d, diff_clamp)), value_clamp)``, ``d = log pi - log ref``, ``rho = pi / old``. Without
    ``ratio_weighted`` ``w`` is 1. With it ``w = min(rho, ratio_cap)``, through which the gradient flows: ``rho k'(d) +
    rho k(d)``. A bound has the slope 0 beyond it. A term without options is the plain name, with the same bits.

    Args:
        estimator: ``"k1"``, ``"k2"``, ``"k3"``, or ``"abs"``, which is ``|d|``. From logits and hidden states also the
            exact KL over the vocabulary, without options but those of its tokens: ``"reverse_kl"``, ``KL(pi || ref)``,
            and ``"forward_kl"``, ``KL(ref || pi)``. Or an estimator of your own, the name or the function of an
            ``@objective`` of ``logp``, ``ref_logp`` and perhaps ``old_logp``, whose parameters have defaults.
        diff_clamp, value_clamp: bounds of ``d`` before and of the value after the estimator: ``(low, high)``, of which
            either may be None, or a number ``c`` for ``(-c, c)``.
        gradient: ``"pathwise"``, that of the formula; ``"k2"``: the value of the estimator without ``w``, with the
            gradient ``sg(w) d`` (straight-through).
        ratio_weighted, ratio_cap, ratio_detached: whether ``rho`` weighs the term, its upper bound, and whether it is a
            constant. ``old_logprobs=None`` stands for the detached log-probabilities, where ``rho`` is 1.
        ratio_level: ``"token"``, or ``"loss"``: ``rho`` is that of the loss's ``ratio_level``, over the tokens of the
            objective, with the gradient that the loss has there (TRL with GSPO).
        mask: the tokens of the term, if they are others than those of the objective, such as tool tokens.
        weights, aggregation, normalizers: weights of its own, as in ``policy_loss``; by default those of the loss. With
            a mask of its own beside the ``normalizers`` of the loss it needs ``normalizers`` that count its own tokens.

    Raises:
        TypeError, ValueError: an unknown name, a bound that is no number or in the wrong order, an option of the ratio
            without ``ratio_weighted``.

    Example:
        >>> from rlkernels import policy_loss
        >>> logprobs, old = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -2.0]])
        >>> term = KLTerm("k3", ratio_weighted=True)
        >>> loss = policy_loss(logprobs, old, torch.zeros(1), ref_logprobs=old, kl=term, kl_coef=1.0)
        >>> round(loss.item(), 4)  # e^0.5 (e^-0.5 - 1 + 0.5) / 2
        0.0878

    DeepSeek-V3.2 2025, arXiv:2512.02556, eq. 7 (the ratio; TRL's ``use_bias_correction_kl``); verl ``k3+``
    (straight-through) and its clamps at 20 and 10; OpenRLHF, SkyRL, NeMo-RL.
    """

    estimator: KL | ExactKL | ObjectiveLike = "k3"
    diff_clamp: Clamp = None
    value_clamp: Clamp = None
    gradient: KLGradient = "pathwise"
    ratio_weighted: bool = False
    ratio_detached: bool = False
    ratio_cap: float | None = None
    ratio_level: KLRatioLevel = "token"
    mask: Mask | None = None
    weights: PerToken | None = None
    aggregation: Aggregation | None = None
    normalizers: Normalizers | None = None

    def __post_init__(self) -> None:
        self.objective("KLTerm")
        checks.choice("KLTerm", "ratio_level", self.ratio_level, LEVELS)
        if self.ratio_level != "token" and not self.ratio_weighted:
            raise ValueError("KLTerm: ratio_level belongs to ratio_weighted=True, got ratio_weighted=False")
        if self.aggregation is not None:
            checks.choice("KLTerm", "aggregation", self.aggregation, AGGREGATIONS)
        if self.weights is not None and (self.aggregation is not None or self.normalizers):
            raise ValueError("KLTerm: weights and aggregation or normalizers both decide the weights; pass one of them")

    def objective(self, caller: str = "KLTerm") -> KLObjective:
        """Returns the objective of the estimator with its options."""
        return kl_objective(
            caller,
            "estimator",
            self.estimator,
            self.diff_clamp,
            self.value_clamp,
            self.gradient,
            self.ratio_weighted,
            self.ratio_detached,
            self.ratio_cap,
            KLS + EXACT,
        )

    def has_own_weights(self) -> bool:
        """Tells whether the term weighs its tokens otherwise than the loss does."""
        return not (self.mask is self.weights is self.aggregation is self.normalizers is None)


def exact_kind(kl: KL | ExactKL | KLTerm) -> ExactKL | None:
    """Returns the direction of an exact KL, None for an estimate."""
    name = kl.estimator if isinstance(kl, KLTerm) else kl
    return cast(ExactKL, name) if isinstance(name, str) and name in EXACT else None


def simplified(kl: KL | ExactKL | KLTerm) -> KL | ExactKL | KLTerm:
    """Returns the plain name of a KLTerm without options, so that it takes the path of a name."""
    if not isinstance(kl, KLTerm) or kl.has_own_weights():
        return kl
    plain = exact_kind(kl) is not None or kl.objective().name in PLAIN
    return cast("KL | ExactKL", kl.estimator) if plain else kl
