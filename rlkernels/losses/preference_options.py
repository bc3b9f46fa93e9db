"""The options of the losses of preference pairs, checked once for a batch."""

from typing import NamedTuple

import torch
from torch import Tensor

from rlkernels import checks
from rlkernels.logits_layout import dense
from rlkernels.losses.policy_arguments import column, present
from rlkernels.losses.preference_types import KINDS, Kind
from rlkernels.tracing import replaced
from rlkernels.types import FDivergence, LossTypes, LossWeights, Number, PerPair

F_DIVERGENCES = {"reverse_kl": 1.0, "forward_kl": 0.0, "js_divergence": 1.0, "alpha_divergence": 0.5}
"""From the name of an f-divergence to its alpha; that of ``"alpha_divergence"`` is a default."""


class PreferenceOptions(NamedTuple):
    """The checked options of ``dpo_loss`` for one batch.

    A number, or a tensor of shape ``()`` in its place, holds for all pairs; every other tensor has one entry per pair.
    """

    names: tuple[str, ...]
    kinds: tuple[Kind, ...]
    loss_weights: tuple[Number, ...]
    beta: Number
    label_smoothing: Number
    reference_free: bool
    f_divergence: str
    alpha: Number
    length_normalized: bool
    simpo_gamma: Number
    alphapo_alpha: Number
    discopop_tau: Number
    cpo_alpha: Number | None
    lengths: tuple[torch.Tensor, torch.Tensor] | None = None  # of the chosen and the rejected answers, at least 1
    empty: torch.Tensor | None = None  # pairs with an answer of no tokens, where there are lengths
    # The number of pairs in the batch over the tokens of its chosen answers, also in a part of the batch.
    pairs_per_token: torch.Tensor | None = None
    pair_weights: torch.Tensor | None = None

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
        return replaced(self, lengths=lengths, empty=empty, pair_weights=weights)


def preference_options(
    caller: str,
    like: Tensor,
    *,
    beta: Number = 0.1,
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
) -> PreferenceOptions:
    """Checks the options of ``dpo_loss``. ``like``: a tensor ``[B]`` of the dtype and device of the losses."""
    names = (loss_type,) if isinstance(loss_type, str) else checks.several(caller, "loss_type", loss_type)
    for name in names:
        checks.choice(caller, "loss_type", name, KINDS)
    weights = (1.0,) * len(names) if loss_weights is None else checks.several(caller, "loss_weights", loss_weights)
    if not names or len(weights) != len(names):
        raise ValueError(
            f"{caller}: loss_weights has {len(weights)} elements, loss_type {len(names)}; "
            "one weight for each of at least one type"
        )
    weights = tuple(checks.coefficient(checks.finite, caller, "loss_weights", weight, like) for weight in weights)
    checks.choice(caller, "f_divergence", f_divergence, F_DIVERGENCES)
    if alpha is not None and f_divergence != "alpha_divergence":
        raise ValueError(f"{caller}: alpha needs f_divergence='alpha_divergence', got {f_divergence!r}")
    options = PreferenceOptions(
        names,
        tuple(KINDS[name] for name in names),
        weights,
        beta,
        label_smoothing,
        reference_free,
        f_divergence,
        F_DIVERGENCES[f_divergence] if alpha is None else alpha,
        length_normalized,
        0.5 if simpo_gamma is None else simpo_gamma,
        alphapo_alpha,
        0.05 if discopop_tau is None else discopop_tau,
        cpo_alpha,
    )
    options = _numbers(caller, options, like)
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
    )
    return _tensors(caller, options, like, chosen_lengths, rejected_lengths, pair_weights)


def _numbers(caller: str, options: PreferenceOptions, like: Tensor) -> PreferenceOptions:
    """Checks the numbers among the options; returns the options with each as a Python number, or a tensor of one."""
    number = checks.coefficient
    numbers = {
        "beta": number(checks.positive, caller, "beta", options.beta, like),
        "label_smoothing": number(
            checks.interval, caller, "label_smoothing", options.label_smoothing, like, 0, 0.5, closed=False
        ),
    }
    if "exo_pair" in options.names and not present(numbers["label_smoothing"]):
        raise ValueError(
            f"{caller}: label_smoothing must be in (0, 0.5) for loss_type 'exo_pair', got "
            f"{options.label_smoothing}; "
            "its paper uses 1e-3"
        )
    numbers["discopop_tau"] = number(checks.positive, caller, "discopop_tau", options.discopop_tau, like)
    for name in ("alpha", "simpo_gamma", "alphapo_alpha", *(() if options.cpo_alpha is None else ("cpo_alpha",))):
        numbers[name] = number(checks.finite, caller, name, getattr(options, name), like)
    changed = {name: x for name, x in numbers.items() if x is not getattr(options, name)}
    return replaced(options, **changed) if changed else options


def _check_use(caller: str, options: PreferenceOptions, **passed: bool) -> None:
    """Refuses an option that no loss of the mixture takes, and a divergence that some of them do not take.

    ``passed``: the name of each option to whether the caller passed it.
    """
    for option, was_passed in passed.items():
        users = [option in kind.takes for kind in options.kinds]
        if was_passed and not (all(users) if option == "f_divergence" else any(users)):
            raise ValueError(f"{caller}: loss_type {_listed(options.names)} takes no {option}; leave it out")


def _tensors(
    caller: str,
    options: PreferenceOptions,
    like: Tensor,
    chosen_lengths: PerPair | None,
    rejected_lengths: PerPair | None,
    pair_weights: PerPair | None,
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
        pairs_per_token=like.numel() / chosen_lengths.sum().to(like.dtype).clamp(min=1.0) if counted else None,
        pair_weights=pair_weights,
    )


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(map(repr, names))
