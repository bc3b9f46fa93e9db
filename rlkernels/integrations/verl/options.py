"""The configuration of verl in the words of the library: aggregations, totals of the batch, bounds of clips."""

from typing import Any

from rlkernels.types import Number

TOTALS: dict[str, dict[str, str]] = {
    "token-mean": {"batch_num_tokens": "batch_num_tokens"},
    "token-sum": {},
    "seq-mean-token-sum": {"global_batch_size": "num_sequences"},
    "seq-mean-token-sum-norm": {"global_batch_size": "num_sequences", "loss_scale_factor": "horizon"},
    "seq-mean-token-mean": {"global_batch_size": "num_sequences"},
}
"""verl's modes to the totals that each one reads, under verl's names and ours; the modes themselves have one name."""


def normalizers(
    caller: str,
    loss_agg_mode: str,
    dp_size: int = 1,
    batch_num_tokens: Number | None = None,
    global_batch_size: Number | None = None,
    loss_scale_factor: Number | None = None,
) -> dict[str, Any]:
    """Returns verl's totals of the whole batch as the normalisers of an aggregation.

    Raises:
        ValueError: an unknown mode; several ranks without the total that the mode divides by.
    """
    if loss_agg_mode not in TOTALS:
        raise ValueError(f"{caller}: Invalid loss_agg_mode: {loss_agg_mode!r}, expected one of {', '.join(TOTALS)}")
    given = {
        "batch_num_tokens": batch_num_tokens,
        "global_batch_size": global_batch_size,
        "loss_scale_factor": loss_scale_factor,
    }
    read = TOTALS[loss_agg_mode]
    for name in read:
        if dp_size > 1 and given[name] is None and name != "loss_scale_factor":
            raise ValueError(f"{caller}: {name} is required when dp_size > 1, got dp_size={dp_size} and None")
    totals = {ours: given[name] for name, ours in read.items() if given[name] is not None}
    return {"dp_size": dp_size, **totals}


def required(caller: str, config: Any) -> Any:
    """Returns the configuration of an actor.

    Raises:
        TypeError: there is none, or it is one of an algorithm, which has no clips.
    """
    if config is None or not (hasattr(config, "clip_ratio") and hasattr(config, "global_batch_info")):
        raise TypeError(f"{caller}: config must be verl's ActorConfig, got {type(config).__name__}")
    return config


def reduction(caller: str, loss_agg_mode: str, config: Any) -> dict[str, Any]:
    """Returns the aggregation of a policy loss, with the totals that verl's worker writes into ``config``."""
    totals = normalizers(caller, loss_agg_mode, **config.global_batch_info)
    return {"aggregation": loss_agg_mode, "normalizers": totals}


def clip_widths(config: Any) -> tuple[Number, Number]:
    """Returns ``clip_ratio_low`` and ``clip_ratio_high``, each ``clip_ratio`` where it is None."""
    low, high = config.clip_ratio_low, config.clip_ratio_high
    return (config.clip_ratio if low is None else low), (config.clip_ratio if high is None else high)


def setting(config: Any, name: str, default: Any) -> Any:
    """Returns a field of a configuration, ``default`` where it is absent or None."""
    found = None if config is None else config.get(name, None)
    return default if found is None else found
