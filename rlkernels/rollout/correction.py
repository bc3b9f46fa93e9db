"""The correction of a policy loss for the mismatch of rollout engine and trainer: its options, and its factors."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeAlias, cast, get_args

import torch
from torch import Tensor

from rlkernels import checks
from rlkernels.checks import tokens as checks_tokens
from rlkernels.rollout.log_ratios import log_ratios
from rlkernels.rollout.masks import off_policy_sequence_mask
from rlkernels.rollout.weights import rollout_weights
from rlkernels.types import CorrectionMode, Metrics, Number, PerToken, RatioLevel, RolloutGate, RolloutLevel

CORRECTION_MODES = get_args(CorrectionMode)
OF_WEIGHTS = ("level", "low", "high", "gate", "gate_level", "batch_normalize", "batch_mean")
"""The options of ``rollout_weights`` besides its mode."""


@dataclass(frozen=True)
class Correction:
    r"""The options of a policy loss's ``correction``: weights of trainer over engine, and the off-policy sequence mask.

    The loss of a token is multiplied by ``w_t k_t``: ``w_t`` as ``rollout_weights`` gives it for the old and the
    rollout log-probabilities, ``k_t`` the mask of ``off_policy_sequence_mask``. KL and entropy terms are not, and the
    count that a mean divides by stays.

    Args:
        mode: ``"clip"``, ``"mask"``, or None for no weights.
        level, low, high, gate, gate_level, batch_normalize, batch_mean, nan_ratio: as for ``rollout_weights``.
        opsm_delta: ``delta`` of ``off_policy_sequence_mask``, whose old log-probabilities are those of the engine where
            they are given; None for no such mask.

    Example:
        >>> from rlkernels import policy_loss
        >>> logprobs, engine = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.0, -3.0]])
        >>> policy_loss(logprobs, logprobs, torch.ones(1), rollout_logprobs=engine, correction=Correction(high=2.0))
        tensor(-1.5000)

    Yao et al. 2025 (truncated importance sampling); IcePop, arXiv:2510.18855; DeepSeek-V3.2, arXiv:2512.02556.
    """

    mode: CorrectionMode = "clip"
    level: RolloutLevel = "token"
    low: Number | None = None
    high: Number | None = None
    gate: RolloutGate = "ratio"
    gate_level: RolloutLevel | None = None
    batch_normalize: bool = False
    batch_mean: Number | None = None
    nan_ratio: Number = 1.0
    opsm_delta: Number | None = None

    def changed(self) -> list[str]:
        """Returns the options of weights that are not those of a plain importance weight."""
        return [name for name in OF_WEIGHTS if getattr(self, name) is not PLAIN[name]]


PLAIN = {field.name: field.default for field in fields(Correction)}
"""The options and their defaults, in a dict, because Dynamo does not look into a dataclass."""
CorrectionLike: TypeAlias = Correction | dict[str, Any] | PerToken
"""A ``Correction``, a dict of its options, or factors of tokens."""


def checked_correction(
    caller: str,
    given: Any,
    like: Tensor,
    old_logprobs: PerToken | None,
    rollout_logprobs: PerToken | None,
    ratio_level: RatioLevel,
    token_alone: bool,
) -> Correction | Tensor | None:
    """Returns a correction, or the caller's own factors, checked against what the loss has for it.

    ``like``: a tensor of the shape of the log-probabilities. ``token_alone``: the objective takes weights of tokens
    alone.
    """
    if rollout_logprobs is not None:
        checks.floating(caller, "rollout_logprobs", rollout_logprobs)
        checks.shape(caller, "rollout_logprobs", rollout_logprobs, like.shape)
        checks.no_gradient(caller, rollout_logprobs=rollout_logprobs)
        checks.one_device(caller, "logprobs", like, rollout_logprobs=rollout_logprobs)
    if given is None:
        return None
    if isinstance(given, torch.Tensor):
        return _factors(caller, given, like, rollout_logprobs)
    if isinstance(given, Mapping):
        checks.known_names(caller, "correction", tuple(given), tuple(PLAIN))
        given = Correction(**given)
    if not isinstance(given, Correction):
        raise TypeError(
            f"{caller}: correction must be a Correction, a dict of its options, or a tensor of factors; got "
            f"{type(given).__name__}"
        )
    checks.choice(caller, "correction: mode", given.mode, CORRECTION_MODES)
    if given.mode is None:
        changed = given.changed() + (["nan_ratio"] if given.nan_ratio is not PLAIN["nan_ratio"] else [])
        if changed:
            raise ValueError(f"{caller}: correction of mode None makes no weights, so it takes no {changed[0]}")
        if given.opsm_delta is None:
            raise ValueError(f"{caller}: correction of mode None needs opsm_delta; without it nothing is corrected")
    elif rollout_logprobs is None:
        raise ValueError(f"{caller}: correction of mode {given.mode!r} needs rollout_logprobs")
    if old_logprobs is None and (given.mode is not None or rollout_logprobs is None):
        raise ValueError(f"{caller}: correction needs old_logprobs")
    if given.mode is not None and in_ratio(given, ratio_level) and (given.mode == "mask" or given.changed()):
        name = "mode='mask'" if given.mode == "mask" else given.changed()[0]
        raise ValueError(
            f"{caller}: with ratio_level {ratio_level!r} the rollout log-probabilities become the denominator of the "
            f"ratio, and correction takes no {name}; for weights beside the ratio pass those of rollout_weights as "
            "correction"
        )
    if token_alone and given.mode is not None and given.level != "token":
        raise ValueError(f"{caller}: this objective takes a correction of level 'token' alone, got {given.level!r}")
    if given.opsm_delta is not None:
        checks_tokens.not_negative(caller, "correction: opsm_delta", given.opsm_delta, like)
    return given


def in_ratio(correction: Correction | Tensor | None, ratio_level: RatioLevel) -> bool:
    """Tells whether the engine's log-probabilities replace the old ones in the ratio, as OpenRLHF's GSPO has it."""
    return (
        isinstance(correction, Correction)
        and correction.mode is not None
        and ratio_level in ("sequence", "sequence_token")
    )


def _factors(caller: str, given: Tensor, like: Tensor, rollout_logprobs: PerToken | None) -> Tensor:
    """Checks the caller's own factors."""
    if given.dtype != torch.bool:
        checks.floating(caller, "correction", given)
    checks.shape(caller, "correction", given, like.shape)
    checks.no_gradient(caller, correction=given)
    checks.one_device(caller, "logprobs", like, correction=given)
    if rollout_logprobs is not None:
        raise ValueError(f"{caller}: a correction of factors already holds the engine; leave rollout_logprobs out")
    return given


def rollout_denominator(
    caller: str,
    correction: Correction,
    old_logprobs: PerToken,
    rollout_logprobs: PerToken,
    live: Tensor,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Returns the engine's log-probabilities as the denominator of a ratio, those of NaN by the old ones."""
    ratios = log_ratios(caller, old_logprobs, rollout_logprobs, live, cu_seqlens, correction.nan_ratio)
    return ratios.rollout.to(ratios.dtype)


def correction_weights(
    correction: Correction | Tensor | None,
    old_logprobs: PerToken | None,
    rollout_logprobs: PerToken | None,
    live: Tensor,
    cu_seqlens: Tensor | None,
    real: torch.dtype,
) -> tuple[Tensor | None, Metrics]:
    """Returns the factor of each token that does not depend on the policy, 0 at dead tokens, or None; and metrics."""
    if isinstance(correction, torch.Tensor):
        return torch.where(live, correction.to(real), 0.0), {}
    if correction is None or correction.mode is None:
        return None, {}
    assert old_logprobs is not None and rollout_logprobs is not None
    options = {name: getattr(correction, name) for name in (*OF_WEIGHTS, "mode", "nan_ratio")}
    if real == torch.float64:  # because weights of fp32 inputs come in fp32, with 7 of the loss's 16 digits
        old_logprobs = old_logprobs.double()
    try:
        weights, metrics = rollout_weights(
            old_logprobs, rollout_logprobs, live, **options, cu_seqlens=cu_seqlens, return_metrics=True
        )
    except checks.NAMED as error:
        if type(error) not in checks.NAMED:
            raise
        # The words of rollout_weights name an option, which the loss has within its correction alone.
        text = str(error).removeprefix("rollout_weights: ")
        raise checks.named(type(error)(f"correction: {text}")) from error
    return weights.to(real), {name: x.to(real) for name, x in metrics.items()}


def kept_sequences(
    correction: Correction, logp: Tensor, sampled: PerToken, advantages: Tensor, live: Tensor, cu_seqlens: Tensor | None
) -> Tensor:
    """Returns the off-policy sequence mask of a correction; ``sampled``: the log-probabilities that it compares."""
    try:
        return off_policy_sequence_mask(
            logp.detach(), sampled, advantages, live, delta=cast(Number, correction.opsm_delta), cu_seqlens=cu_seqlens
        )
    except checks.NAMED as error:
        if type(error) not in checks.NAMED:
            raise
        raise checks.named(error, "off_policy_sequence_mask") from error
