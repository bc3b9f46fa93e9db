"""The table of the objectives of sequences, groups and batches: their columns, their options, the checks of these."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlkernels import checks
from rlkernels.checks import tokens as checks_tokens
from rlkernels.rollout.log_ratios import ordered
from rlkernels.types import Number, ObjectiveOption, RatioLevel


class RowKind(NamedTuple):
    """An entry of the table: an objective whose loss of a token depends on other tokens.

    ``unit``: what has one loss, ``"token"``, ``"sequence"`` or ``"group"``. ``columns``: as those of an objective of
    the language. ``numbers``: options with their defaults; ``tensors``: the others.
    """

    unit: str
    columns: tuple[str, ...]
    numbers: dict[str, Any]
    tensors: tuple[str, ...] = ()


OF_A_RATIO = ("logp", "old_logp", "advantage")
CLIP = {"clip_low": 0.2, "clip_high": 0.2}
ROW_KINDS = {
    "gmpo": RowKind("sequence", OF_A_RATIO, {"clip_low": 0.4, "clip_high": 0.4}),
    "vespo": RowKind("token", OF_A_RATIO, {"k_pos": 2.0, "lambda_pos": 3.0, "k_neg": 3.0, "lambda_neg": 2.0}),
    "fipo": RowKind(
        "token",
        OF_A_RATIO,
        {
            **CLIP,
            "half_life": 32.0,
            "influence_clip": 0.2,
            "influence_high_only": True,
            "safety_threshold": 4.0,
            "ratio_cap": None,
        },
    ),
    "real": RowKind("group", OF_A_RATIO, {"tau": 0.5, "group_size": None}, ("group_ids",)),
    "kl_cov": RowKind("token", OF_A_RATIO, {"kl_cov_ratio": 2e-4, "kl_cov_coef": 1.0}),
    "clip_cov": RowKind(
        "token",
        OF_A_RATIO,
        {**CLIP, "clip_cov_low": 1.0, "clip_cov_high": 5.0, "clip_cov_ratio": 2e-4, "generator": None},
        ("clip_cov_tokens",),
    ),
    "a2po": RowKind("sequence", ("logp",), {"beta1": 0.5, "beta2": 1e-3}, ("rewards", "value_pool")),
}
"""Name to entry; the defaults are those of the papers and trainers that the docstring of each loss names."""


def per_token(options: dict[str, Any]) -> bool:
    """Tells whether the policy loss of these keywords, if it is not summed, has one number per token."""
    objective = options.get("objective")
    kind = ROW_KINDS.get(objective) if isinstance(objective, str) else None
    return options.get("ratio_level") != "sequence_sum" and (kind is None or kind.unit == "token")


class RowChoice(NamedTuple):
    """A chosen entry of the table with its options, checked.

    ``groups``: for objectives of groups, the id of each sequence's group.
    """

    name: str
    kind: RowKind
    options: dict[str, Any]
    groups: Tensor | None

    def draws(self) -> bool:
        """Tells whether tokens are drawn by torch's own generator, which no two processes share."""
        return self.name == "clip_cov" and self.options["clip_cov_tokens"] is self.options["generator"] is None

    def clip_widths(self) -> tuple[Number, ...]:
        """Returns the widths of the clip of a ratio, for the metrics; () where the objective clips none."""
        low, high = self.options.get("clip_low"), self.options.get("clip_high")
        if low is None:
            return ()
        return (_of_ratio(low, -1), _of_ratio(high, 1)) if self.name == "gmpo" else (low, high)


def row_choice(
    caller: str,
    objective: str,
    given: dict[str, ObjectiveOption],
    like: Tensor,
    cu_seqlens: Tensor | None,
    ratio_level: RatioLevel,
    advantages: Tensor | None,
    ref_logprobs: Tensor | None,
) -> RowChoice | None:
    """Returns the checked options of an objective of the table, None for another objective.

    ``like``: a tensor of the shape of the log-probabilities, on their device.
    """
    kind = ROW_KINDS.get(objective) if isinstance(objective, str) else None
    if kind is None:
        return None
    if ratio_level != "token":
        raise ValueError(
            f"{caller}: objective {objective!r} decides itself what has one ratio; it takes no "
            f"ratio_level={ratio_level!r}"
        )
    if cu_seqlens is None and like.dim() != 2:
        raise ValueError(
            f"{caller}: objective {objective!r} needs sequences: logprobs [B, L], or packed [T] with cu_seqlens; got "
            f"shape {tuple(like.shape)}"
        )
    if "advantage" not in kind.columns and advantages is not None:
        raise ValueError(f"{caller}: objective {objective!r} computes its advantages of rewards; pass advantages=None")
    if "advantage" not in kind.columns and ref_logprobs is None:
        raise ValueError(f"{caller}: objective {objective!r} needs ref_logprobs")
    for name in given:
        if name not in kind.numbers and name not in kind.tensors:
            known = ", ".join((*kind.numbers, *kind.tensors))
            raise TypeError(f"{caller}: objective {objective!r} takes no {name!r}; it takes {known}")
    options = {**kind.numbers, **dict.fromkeys(kind.tensors), **given}
    for name in kind.numbers:
        if name in CHECKS:
            options[name] = CHECKS[name](caller, name, options[name], like)
    if "clip_cov_low" in options:
        ordered(caller, options["clip_cov_low"], options["clip_cov_high"], ("clip_cov_low", "clip_cov_high"))
    rows = like.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    _tensors(caller, options, like, rows)
    groups = _groups(caller, options, like, rows) if kind.unit == "group" else None
    return RowChoice(objective, kind, options, groups)


def _positive(caller: str, name: str, x: Any, like: Tensor) -> Number:
    return checks.coefficient(checks.positive, caller, name, x, like)


def _number(caller: str, name: str, x: Any, like: Tensor) -> Number:
    return checks.coefficient(checks.finite, caller, name, x, like)


def _share(caller: str, name: str, x: Any, like: Tensor) -> Number:
    return checks.coefficient(checks.interval, caller, name, x, like, 0, 1)


def _below_one(caller: str, name: str, x: Any, like: Tensor) -> Number:
    return checks.coefficient(checks.interval, caller, name, x, like, 0, 1, closed=False)


def _width(caller: str, name: str, x: Any, like: Tensor) -> Number:
    return checks_tokens.not_negative(caller, name, x, like)


def _generator(caller: str, name: str, x: Any, like: Tensor) -> torch.Generator | None:
    if x is not None and not isinstance(x, torch.Generator):
        raise TypeError(f"{caller}: {name} must be a torch.Generator or None, got {type(x).__name__}")
    return x


CHECKS: dict[str, Callable[[str, str, Any, Tensor], Any]] = {
    "clip_low": _width,
    "clip_high": _width,
    "k_pos": _number,
    "k_neg": _number,
    "lambda_pos": _number,
    "lambda_neg": _number,
    "half_life": lambda caller, name, x, like: checks.positive(caller, name, x),
    "influence_clip": _below_one,
    "influence_high_only": lambda caller, name, x, like: checks.flag(caller, name, x),
    "safety_threshold": _positive,
    "ratio_cap": lambda caller, name, x, like: None if x is None else _positive(caller, name, x, like),
    "tau": _positive,
    "group_size": lambda caller, name, x, like: checks.positive_integer(caller, name, x),
    "kl_cov_ratio": _share,
    "kl_cov_coef": _number,
    "clip_cov_low": _number,
    "clip_cov_high": _number,
    "clip_cov_ratio": _share,
    "generator": _generator,
    "beta1": _positive,
    "beta2": _positive,
}
"""The check of each option that is no tensor of the data."""


def _tensors(caller: str, options: dict[str, Any], like: Tensor, rows: int) -> None:
    """Checks the options that are tensors of the data."""
    tokens = options.get("clip_cov_tokens")
    if tokens is not None:
        checks.tensor(caller, "clip_cov_tokens", tokens)
        if tokens.dtype != torch.bool:
            raise TypeError(
                f"{caller}: clip_cov_tokens must be bool, got {tokens.dtype}; True marks a token without loss"
            )
        checks.shape(caller, "clip_cov_tokens", tokens, like.shape)
        checks.one_device(caller, "logprobs", like, clip_cov_tokens=tokens)
        if options["generator"] is not None:
            raise ValueError(f"{caller}: clip_cov_tokens and generator both choose the tokens; pass one of them")
    if "value_pool" not in options:
        return
    for name, wanted in (("rewards", "[B], one per sequence"), ("value_pool", "[B, n], n rewards per sequence")):
        x = options[name]
        if x is None:
            raise TypeError(f"{caller}: objective 'a2po' needs {name!r}: {wanted}")
        checks_tokens.numbers(caller, name, x)
        expected = (rows,) if name == "rewards" else (rows, *x.shape[1:2])
        if name == "value_pool" and (x.dim() != 2 or x.shape[1] == 0):
            raise ValueError(f"{caller}: value_pool has shape {tuple(x.shape)}, expected ({rows}, n) with n from 1 on")
        checks.shape(caller, name, x, expected)
        checks.no_gradient(caller, **{name: x})
        checks.one_device(caller, "logprobs", like, **{name: x})


def _groups(caller: str, options: dict[str, Any], like: Tensor, rows: int) -> Tensor:
    """Returns the id of each sequence's group, from ids or from the number of adjacent sequences."""
    size, ids = options["group_size"], options["group_ids"]
    if (size is None) == (ids is None):
        raise TypeError(
            f"{caller}: objective 'real' needs one of group_size and group_ids, got "
            f"{'neither' if size is None else 'both'}"
        )
    if ids is not None:
        checks_tokens.ids(caller, "group_ids", ids, (rows,))
        checks.one_device(caller, "logprobs", like, group_ids=ids)
        return ids
    if rows % size:
        raise ValueError(f"{caller}: group_size must divide the number of sequences, got {size} and {rows}")
    return torch.div(torch.arange(rows, device=like.device), size, rounding_mode="floor")


def _of_ratio(width: Number, sign: int) -> Number:
    """Returns a width of a clip of log-ratios as that of their ratios: ``|exp(sign width) - 1|``."""
    if isinstance(width, torch.Tensor):
        return (sign * width.double()).expm1().abs()
    return abs(math.expm1(sign * width))
