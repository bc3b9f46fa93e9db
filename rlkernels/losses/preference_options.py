"""The options of the losses of preference pairs, checked once for a batch."""

import inspect
from typing import NamedTuple

import torch
from torch import Tensor

from rlkernels import checks
from rlkernels.checks import tokens as checks_tokens
from rlkernels.logits_layout import dense
from rlkernels.losses.policy_arguments import column, present
from rlkernels.losses.preference_types import FROM_OPTIONS, KINDS, Kind, kind_of_user
from rlkernels.tracing import replaced
from rlkernels.types import FDivergence, LossTypes, LossWeights, Number, PerPair

F_DIVERGENCES = {"reverse_kl": 1.0, "forward_kl": 0.0, "js_divergence": 1.0, "alpha_divergence": 0.5}
"""From the name of an f-divergence to its alpha; that of ``"alpha_divergence"`` is a default."""

DEFAULTS = {"simpo_gamma": 0.5, "discopop_tau": 0.05, "dpop_lambda": 50.0, "rpo_eta": 1.0, "tpo_alpha": 1.0}
"""The options whose None says that the caller did not pass them, because one that no loss takes is refused."""


class PreferenceOptions(NamedTuple):
    """The checked options of ``dpo_loss`` for one batch.

    A number, or a tensor of shape ``()`` in its place, holds for all pairs; every other tensor has one entry per pair.
    """

    names: tuple[str, ...]
    kinds: tuple[Kind, ...]
    loss_weights: tuple[Number, ...]
    beta: Number | PerPair
    label_smoothing: Number
    reference_free: bool
    f_divergence: str
    alpha: Number
    length_normalized: bool
    simpo_gamma: Number
    alphapo_alpha: Number
    discopop_tau: Number
    cpo_alpha: Number | None
    dpop_lambda: Number
    rpo_eta: Number
    tpo_alpha: Number
    lengths: tuple[torch.Tensor, torch.Tensor] | None = None  # of the chosen and the rejected answers, at least 1
    empty: torch.Tensor | None = None  # pairs with an answer of no tokens, where there are lengths
    # The number of pairs in the batch over the tokens of its chosen answers, also in a part of the batch. The second
    # one is over the tokens of its gold answers.
    pairs_per_token: torch.Tensor | None = None
    pairs_per_gold_token: torch.Tensor | None = None
    pair_weights: torch.Tensor | None = None
    win_and_lose: tuple[torch.Tensor, torch.Tensor] | None = None  # the shares that the rewards ask for
    num_pairs: Number = 1.0  # the divisor of a mean
    params: dict[str, tuple[Number, ...]] = {}  # of each objective of a user's own, by its name

    def separable(self) -> bool:
        """Tells whether the loss of each pair depends on that pair alone, so that a batch may be cut into parts."""
        return all(kind.separable for kind in self.kinds)

    def needs_reference(self) -> bool:
        """Tells whether a loss of the mixture looks at the references."""
        return not self.reference_free and any(kind.reference for kind in self.kinds)

    def part(self, start: int, end: int) -> "PreferenceOptions":
        """Returns the options of the pairs ``[start, end)`` of the batch."""
        lengths = None if self.lengths is None else tuple(x[start:end] for x in self.lengths)
        empty, weights = (None if x is None else x[start:end] for x in (self.empty, self.pair_weights))
        beta = self.beta[start:end] if isinstance(self.beta, torch.Tensor) and self.beta.dim() else self.beta
        shares = None if self.win_and_lose is None else tuple(x[start:end] for x in self.win_and_lose)
        return replaced(self, beta=beta, lengths=lengths, empty=empty, pair_weights=weights, win_and_lose=shares)

    def each_has_a_beta(self) -> bool:
        """Tells whether there is a beta per pair."""
        return isinstance(self.beta, torch.Tensor) and self.beta.dim() > 0


def preference_options(
    caller: str,
    like: Tensor,
    *,
    beta: Number | PerPair = 0.1,
    loss_type: LossTypes = "sigmoid",
    loss_weights: LossWeights | None = None,
    label_smoothing: Number = 0.0,
    reference_free: bool = False,
    f_divergence: FDivergence = "reverse_kl",
    alpha: Number | None = None,
    length_normalized: bool = False,
    simpo_gamma: Number | None = None,
    alphapo_alpha: Number = 0.0,
    discopop_tau: Number | None = None,
    cpo_alpha: Number | None = None,
    chosen_lengths: PerPair | None = None,
    rejected_lengths: PerPair | None = None,
    pair_weights: PerPair | None = None,
    dpop_lambda: Number | None = None,
    chosen_rewards: PerPair | None = None,
    rejected_rewards: PerPair | None = None,
    rpo_eta: Number | None = None,
    gold_logps: PerPair | None = None,
    gold_lengths: PerPair | None = None,
    tpo_alpha: Number | None = None,
    num_pairs: Number | None = None,
    num_chosen_tokens: Number | None = None,
    num_gold_tokens: Number | None = None,
    **params: Number,
) -> PreferenceOptions:
    """Checks the options of ``dpo_loss``. ``like``: a tensor ``[B]`` of the dtype and device of the losses."""
    single = isinstance(loss_type, str) or inspect.isfunction(loss_type)
    kinds = [_kind(caller, x) for x in ((loss_type,) if single else checks.several(caller, "loss_type", loss_type))]
    names = tuple(name for name, _ in kinds)
    weights = (1.0,) * len(names) if loss_weights is None else checks.several(caller, "loss_weights", loss_weights)
    if not names or len(weights) != len(names):
        raise ValueError(
            f"{caller}: loss_weights has {len(weights)} elements, loss_type {len(names)}; "
            "one weight for each of at least one type"
        )
    weights = tuple(checks.coefficient(checks.finite, caller, "loss_weights", weight, like) for weight in weights)
    checks.choice(caller, "f_divergence", f_divergence, F_DIVERGENCES)
    checks.flags(caller, reference_free=reference_free, length_normalized=length_normalized)
    if alpha is not None and f_divergence != "alpha_divergence":
        raise ValueError(f"{caller}: alpha needs f_divergence='alpha_divergence', got {f_divergence!r}")
    options = PreferenceOptions(
        names,
        tuple(kind for _, kind in kinds),
        weights,
        beta,
        label_smoothing,
        reference_free,
        f_divergence,
        F_DIVERGENCES[f_divergence] if alpha is None else alpha,
        length_normalized,
        DEFAULTS["simpo_gamma"] if simpo_gamma is None else simpo_gamma,
        alphapo_alpha,
        DEFAULTS["discopop_tau"] if discopop_tau is None else discopop_tau,
        cpo_alpha,
        DEFAULTS["dpop_lambda"] if dpop_lambda is None else dpop_lambda,
        DEFAULTS["rpo_eta"] if rpo_eta is None else rpo_eta,
        DEFAULTS["tpo_alpha"] if tpo_alpha is None else tpo_alpha,
    )
    options = _numbers(caller, options, like)
    if params or any(kind.objective is not None for kind in options.kinds):
        options = _params(caller, options, like, params)
    _check_use(
        caller,
        options,
        label_smoothing=present(options.label_smoothing),
        f_divergence=f_divergence != "reverse_kl",
        length_normalized=length_normalized,
        simpo_gamma=simpo_gamma is not None,
        alphapo_alpha=present(options.alphapo_alpha),
        discopop_tau=discopop_tau is not None,
        cpo_alpha=cpo_alpha is not None,
        dpop_lambda=dpop_lambda is not None,
        rpo_eta=rpo_eta is not None,
        chosen_rewards=chosen_rewards is not None,
        rejected_rewards=rejected_rewards is not None,
        tpo_alpha=tpo_alpha is not None,
        gold_logps=gold_logps is not None,
        gold_lengths=gold_lengths is not None,
    )
    options = _counts(caller, options, like, num_pairs, num_chosen_tokens, num_gold_tokens)
    options = _tensors(caller, options, like, chosen_lengths, rejected_lengths, pair_weights, num_chosen_tokens)
    options = _beta_per_pair(caller, options, like)
    options = _rewards(caller, options, like, chosen_rewards, rejected_rewards)
    return _gold(caller, options, like, gold_logps, gold_lengths, num_gold_tokens)


def _kind(caller: str, loss_type: object) -> tuple[str, Kind]:
    """Returns the name of a loss type and its kind, of the library or of a user's objective."""
    if isinstance(loss_type, str) and loss_type in KINDS:
        return loss_type, KINDS[loss_type]
    own = kind_of_user(loss_type)
    if own is None:
        checks.choice(caller, "loss_type", loss_type, KINDS)
        raise AssertionError("unreachable, because every known name is in the table")
    if own[0] in KINDS:
        raise ValueError(f"{caller}: loss_type {own[0]!r} is a loss of the library; rename the function")
    return own


def _params(caller: str, options: PreferenceOptions, like: Tensor, params: dict[str, Number]) -> PreferenceOptions:
    """Checks the parameters of users' objectives; returns the options with their values."""
    found, known = {}, set()
    for name, kind in zip(options.names, options.kinds, strict=True):
        entry = kind.objective
        if entry is None:
            continue
        own = [x for x in entry.params if x not in FROM_OPTIONS]
        for x in (x for x in own if x in OPTIONS):
            raise ValueError(f"{caller}: parameter {x!r} of loss_type {name!r} has the name of an option; rename it")
        for x in (x for x, _ in entry.defaults if x in FROM_OPTIONS):
            raise ValueError(f"{caller}: {x!r} of loss_type {name!r} is the option {x}; leave its default out")
        if options.each_has_a_beta() and "beta" in entry.params:
            raise ValueError(f"{caller}: loss_type {name!r} takes no beta per pair; pass a number")
        known |= set(own)
        given = {x: params[x] for x in own if x in params}
        given |= {x: getattr(options, x) for x in FROM_OPTIONS if x in entry.params}
        found[name] = tuple(checks.params(caller, name, entry, given, like))
    for x in (x for x in params if x not in known):
        raise TypeError(
            f"{caller}: loss_type {_listed(options.names)} takes no {x!r}; "
            f"{f'it takes {_listed(tuple(sorted(known)))}' if known else 'it takes no parameters of its own'}"
        )
    return replaced(options, params=found)


def _numbers(caller: str, options: PreferenceOptions, like: Tensor) -> PreferenceOptions:
    """Checks the numbers among the options; returns the options with each as a Python number, or a tensor of one."""
    number = checks.coefficient
    numbers = {
        "label_smoothing": number(checks.interval, caller, "label_smoothing", options.label_smoothing, like, 0, 1)
    }
    # One number in a tensor of one dimension is refused as any number is, unless there is one pair.
    if not options.each_has_a_beta() or options.beta.numel() == 1 != like.numel():  # type: ignore[union-attr]
        divides = any(kind.divides for kind in options.kinds)
        check = checks.positive if divides else from_zero
        numbers["beta"] = number(check, caller, "beta", options.beta, like)
    smoothing = numbers["label_smoothing"]
    if "exo_pair" in options.names and (not present(smoothing) or _is(smoothing, 1.0)):
        raise ValueError(
            f"{caller}: label_smoothing must be in (0, 1) for loss_type 'exo_pair', got "
            f"{options.label_smoothing}; "
            "its paper uses 1e-3"
        )
    if "robust" in options.names and _is(smoothing, 0.5):
        raise ValueError(f"{caller}: label_smoothing must not be 0.5 for loss_type 'robust', which divides by 1 - 2e")
    numbers["discopop_tau"] = number(checks.positive, caller, "discopop_tau", options.discopop_tau, like)
    names = ("alpha", "simpo_gamma", "alphapo_alpha", "dpop_lambda", "rpo_eta", "tpo_alpha")
    for name in (*names, *(() if options.cpo_alpha is None else ("cpo_alpha",))):
        numbers[name] = number(checks.finite, caller, name, getattr(options, name), like)
    changed = {name: x for name, x in numbers.items() if x is not getattr(options, name)}
    return replaced(options, **changed) if changed else options


def _is(x: Number, value: float) -> bool:
    """Tells whether the host knows that a number is this one."""
    return not isinstance(x, torch.Tensor) and x == value


def from_zero(caller: str, name: str, x: Number) -> float:
    """Returns a number that may be 0, and is positive otherwise."""
    return 0.0 if checks.real(caller, name, x) == 0 else checks.positive(caller, name, x)


def _beta_per_pair(caller: str, options: PreferenceOptions, like: Tensor) -> PreferenceOptions:
    """Checks a beta per pair; a pair of weight 0 gets 1, whatever its own is."""
    if not isinstance(options.beta, torch.Tensor) or not options.beta.dim():
        return options
    column(caller, "beta", options.beta, like, "chosen_logps")
    if not options.separable():
        raise ValueError(
            f"{caller}: loss_type {_listed(options.names)} sorts the batch and takes no beta per pair, got shape "
            f"{tuple(options.beta.shape)}; pass a number"
        )
    beta = dense(options.beta, like.dtype)
    if options.pair_weights is not None:
        beta = torch.where(options.pair_weights != 0, beta, 1.0)
    good = (beta > 0 if any(kind.divides for kind in options.kinds) else beta >= 0) & (beta < torch.inf)
    if checks.host_reads(good) and not good.all():
        raise ValueError(f"{caller}: beta must be positive and finite, got {beta[~good][0].item()}")
    return replaced(options, beta=beta)


def _rewards(
    caller: str, options: PreferenceOptions, like: Tensor, chosen: PerPair | None, rejected: PerPair | None
) -> PreferenceOptions:
    """Checks the rewards of the answers; returns the options with the shares that they ask for."""
    if "rpo" not in options.names:
        return options
    for name, x in {"chosen_rewards": chosen, "rejected_rewards": rejected}.items():
        if x is None:
            raise ValueError(f"{caller}: loss_type 'rpo' needs {name}: the reward of each answer, [B]")
        column(caller, name, x, like, "chosen_logps")
    gap = dense(chosen, like.dtype) - dense(rejected, like.dtype)
    if options.pair_weights is not None:
        gap = torch.where(options.pair_weights != 0, gap, 0.0)
    return replaced(options, win_and_lose=(torch.sigmoid(options.rpo_eta * gap), torch.sigmoid(-options.rpo_eta * gap)))


def _counts(
    caller: str,
    options: PreferenceOptions,
    like: Tensor,
    pairs: Number | None,
    chosen: Number | None,
    gold: Number | None,
) -> PreferenceOptions:
    """Checks the counts of a batch of which only a part is here."""
    given = {"num_pairs": pairs, "num_chosen_tokens": chosen, "num_gold_tokens": gold}
    given = {name: checks_tokens.total(caller, name, x, like) for name, x in given.items() if x is not None}
    needed = {"num_chosen_tokens": any(present(kind.likelihood_coefficient(options)) for kind in options.kinds)}
    needed["num_gold_tokens"] = any(kind.gold for kind in options.kinds) and present(options.tpo_alpha)
    for name, is_needed in needed.items():
        if name in given and not is_needed:
            raise ValueError(f"{caller}: loss_type {_listed(options.names)} takes no {name}; leave it out")
        if ("num_pairs" in given) != (name in given) and is_needed:
            raise ValueError(
                f"{caller}: loss_type {_listed(options.names)} needs num_pairs and {name} of the whole batch; pass "
                "both of them, or none"
            )
    found = given.get("num_pairs")
    if found is None:
        return replaced(options, num_pairs=max(like.numel(), 1))
    return replaced(options, num_pairs=found.clamp(min=1) if isinstance(found, torch.Tensor) else max(found, 1.0))


def _gold(
    caller: str,
    options: PreferenceOptions,
    like: Tensor,
    logps: PerPair | None,
    lengths: PerPair | None,
    tokens: Number | None,
) -> PreferenceOptions:
    """Checks what a loss of three answers needs of the third."""
    if not any(kind.gold for kind in options.kinds) or not present(options.tpo_alpha):
        if logps is not None or lengths is not None:
            raise ValueError(
                f"{caller}: gold_logps and gold_lengths are not looked at with tpo_alpha=0; leave them out"
            )
        return options
    for name, x in {"gold_logps": logps, "gold_lengths": lengths}.items():
        if x is None:
            raise ValueError(
                f"{caller}: loss_type {_listed(options.names)} needs {name} of the third answers, or tpo_alpha=0 for "
                "none of their likelihood"
            )
    checks.floating(caller, "gold_logps", logps)
    checks.shape(caller, "gold_logps", logps, like.shape)
    checks.counts(caller, "gold_lengths", lengths, like.shape)
    checks.no_gradient(caller, gold_lengths=lengths)
    checks.one_device(caller, "chosen_logps", like, gold_logps=logps, gold_lengths=lengths)
    return replaced(options, pairs_per_gold_token=_per_token(options, like, lengths, tokens))


def _per_token(options: PreferenceOptions, like: Tensor, lengths: Tensor, tokens: Number | None) -> Tensor:
    """Returns the pairs of the batch over the tokens of one answer of each."""
    count = lengths.sum().to(like.dtype) if tokens is None else like.new_zeros(()) + tokens
    return options.num_pairs / count.clamp(min=1.0)


def _check_use(caller: str, options: PreferenceOptions, **passed: bool) -> None:
    """Refuses an option that no loss of the mixture takes, and a divergence that one with a score does not take.

    ``passed``: the name of each option to whether the caller passed it.
    """
    for option, was_passed in passed.items():
        without = [name for name, kind in zip(options.names, options.kinds, strict=True) if option not in kind.takes]
        # Its mixture with "sft", which has no score, is one of every score.
        wrong = [name for name in without if name != "sft"] if option == "f_divergence" else []
        if was_passed and (wrong or len(without) == len(options.kinds)):
            raise ValueError(f"{caller}: loss_type {_listed(wrong or options.names)} takes no {option}; leave it out")


def _tensors(
    caller: str,
    options: PreferenceOptions,
    like: Tensor,
    chosen_lengths: PerPair | None,
    rejected_lengths: PerPair | None,
    pair_weights: PerPair | None,
    num_chosen_tokens: Number | None,
) -> PreferenceOptions:
    """Checks lengths and weights of pairs; returns the options with what the losses need of them."""
    if pair_weights is not None:
        column(caller, "pair_weights", pair_weights, like, "chosen_logps")
        if not options.separable():
            raise ValueError(
                f"{caller}: loss_type {_listed(options.names)} sorts the batch and takes no pair_weights: "
                "they would lose their pairs"
            )
        pair_weights = dense(pair_weights, like.dtype)
    averaged = options.length_normalized or any(kind.averages for kind in options.kinds)
    counted = any(present(kind.likelihood_coefficient(options)) for kind in options.kinds)
    lengths = {"chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths}
    for (name, x), needed in zip(lengths.items(), (averaged or counted, averaged), strict=True):
        if x is not None:
            checks.counts(caller, name, x, like.shape)
            checks.one_device(caller, "chosen_logps", like, **{name: x})
            checks.no_gradient(caller, **{name: x})
        elif needed:
            hint = (
                ", or cpo_alpha=0 for none of their likelihood"
                if counted and not averaged and "sft" not in options.names
                else ""
            )
            raise ValueError(
                f"{caller}: loss_type {_listed(options.names)} needs {name}: the number of tokens of each "
                "answer (ones, where "
                f"the log-probabilities are averages already){hint}"
            )
    return replaced(
        options,
        lengths=tuple(x.to(like.dtype).clamp(min=1.0) for x in lengths.values()) if averaged else None,
        empty=(chosen_lengths == 0) | (rejected_lengths == 0) if averaged else None,
        pairs_per_token=_per_token(options, like, chosen_lengths, num_chosen_tokens) if counted else None,
        pair_weights=pair_weights,
    )


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(map(repr, names))


OPTIONS = frozenset(inspect.signature(preference_options).parameters)
"""The names that a parameter of a user's objective cannot have, because a loss of pairs takes them itself."""
